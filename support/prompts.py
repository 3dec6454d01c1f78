r"""Text and token ids: load a tokenizer, build the prompt of a question, decode a response.

    tokenizer, eos_ids = load_tokenizer("Qwen2.5-Math-1.5B")  # a folder in Hugging Face format
    ids = encode_prompt(tokenizer, "What is 6+7?")
    text = decode_response(tokenizer, ids)

tokenizer.json alone says how text is split and joined. transformers 5 builds the tokenizers of some classes
(LlamaTokenizerFast, Qwen2Tokenizer, ...) anew from their vocabulary and drops the rules that tokenizer.json
gives: the spaces of a byte-level vocabulary disappear, or numbers are split in another way than in training,
and nothing says so. So no class is chosen by name here. The files beside tokenizer.json only add the chat
template and the names of special tokens, and `load_tokenizer` compares the result with tokenizer.json on a
fixed sample.
"""

import json
import os
from pathlib import Path

import transformers
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

SUFFIXES = {
    "math": "\nPlease reason step by step, and put your final answer within \\boxed{}.",
    "choice": "\nPlease reason step by step, and put the letter of your final answer within \\boxed{}.",
}
SAMPLES = (  # what tokenizers treat in different ways
    "What is 6+7?",
    "  two spaces,   three,\ttab \n\n  \r\n end. ",
    "1234567 3.14159 1,000,000 2024-11-25 50%",
    "so $x_1^{2} \\neq \\frac{-5}{6}$, hence \\boxed{\\sqrt{2}}.",
    "I don't know , really ... WE'LL SEE !",
    "na\u00efve e\u0301 \ufb01 \u2167 \u00bd\u221a5 \u0663",  # composed, combining, ligature, numerals
    # Chinese, Russian, Korean, an emoji of three code points
    "\u6570\u5b66 \u041f\u0440\u0438\u0432\u0435\u0442 \ud55c\uad6d\uc5b4 \U0001f469\u200d\U0001f3eb",
)
UNUSED = ("pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
SHOWN = 400  # characters of a prompt in the plan


def load_tokenizer(folder: str | os.PathLike) -> tuple:
    """(tokenizer, eos_ids) of an HF folder; eos_ids: sorted union of generation_config, config and tokenizer.

    Raises ValueError if tokenizer.json is missing, does not load or lacks a token that the other files name,
    if transformers does not keep to it, or if nothing names an end-of-sequence token.

    >>> load_tokenizer(Path(__file__).parents[1] / "tiny" / "model")[1]
    [328, 330]
    """
    folder = Path(folder)
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise ValueError(_no_tokenizer(folder))
    try:
        reference = Tokenizer.from_file(str(file))
        beside = PreTrainedTokenizerFast.from_pretrained(folder)  # as transformers reads the other files
    except Exception as error:  # transformers and tokenizers raise anything, plain Exception included
        message = "the tokenizer does not load; are tokenizer.json and tokenizer_config.json whole?"
        raise ValueError(f"{folder}: {message} ({' '.join(str(error).split())})") from None
    names = _special_tokens(folder, beside, reference)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file), **names)
    tokenizer.name_or_path, tokenizer.chat_template = str(folder), beside.chat_template
    if _read_json(folder / "tokenizer_config.json").get("add_bos_token"):
        tokenizer.add_bos_token = True  # DeepSeek's tokenizer.json leaves the BOS to this flag
    _check_samples(folder, tokenizer, reference)
    return tokenizer, _eos_ids(folder, tokenizer)


def _special_tokens(folder: Path, beside: PreTrainedTokenizerFast, reference: Tokenizer) -> dict[str, str]:
    """{name: token} of the named special tokens, such as bos_token; ValueError if tokenizer.json lacks one.

    A model never reads padding and the like: where such a token is missing or an ordinary one, its name is
    dropped.
    """
    named, added = beside.special_tokens_map, _added_tokens(reference)
    used = {token for name, token in named.items() if name not in UNUSED}
    for token in beside.added_tokens_encoder:
        if reference.token_to_id(token) is None and (token in used or token not in named.values()):
            lacks = f"{folder}: tokenizer.json lacks the token {token!r}, which a file beside it names"
            raise ValueError(f"{lacks}; add it to the added_tokens of tokenizer.json, with its id")
    return {name: token for name, token in named.items() if token in added or name not in UNUSED}


def _added_tokens(reference: Tokenizer) -> list[str]:
    return [token.content for token in reference.get_added_tokens_decoder().values()]


def _eos_ids(folder: Path, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Sorted ids that end a response, at least one: of generation_config, config and tokenizer."""
    eos_ids = {tokenizer.eos_token_id}
    for name in "generation_config.json", "config.json":
        value = _read_json(folder / name).get("eos_token_id")
        eos_ids.update(value if isinstance(value, list) else [value])
    if not eos_ids - {None}:
        raise ValueError(f"{folder}: no end-of-sequence token; set eos_token_id in generation_config.json")
    return sorted(eos_ids - {None})


def _no_tokenizer(folder: Path) -> str:
    """The sentence for a folder without tokenizer.json: how to make it, if an older format is there."""
    older = [name for name in ("tokenizer.model", "vocab.json", "tekken.json") if (folder / name).is_file()]
    if not older:
        return f"{folder}: has no tokenizer (tokenizer.json is missing)"
    convert = f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
    return f"{folder}: tokenizer.json is missing; make it from {older[0]} once, with transformers: {convert}"


def _read_json(path: Path) -> dict:
    """The object in a JSON file; empty if there is no such file or something else is in it."""
    try:
        value = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path}: is not valid JSON ({error})") from None
    return value if isinstance(value, dict) else {}


def _check_samples(folder: Path, tokenizer: PreTrainedTokenizerFast, reference: Tokenizer) -> None:
    """Raise ValueError unless ids and texts are those of tokenizer.json, also for every added token."""
    reference.no_truncation()  # a setting for batches that some files keep
    reference.no_padding()
    for text in (*SAMPLES, *(f"1 {token} a{token}" for token in _added_tokens(reference))):
        ids = reference.encode(text, add_special_tokens=False).ids
        same_ids = tokenizer.encode(text, add_special_tokens=False) == ids
        same_text = all(tokenizer.decode(ids, skip) == reference.decode(ids, skip) for skip in (False, True))
        if not (same_ids and same_text):
            version = f"transformers {transformers.__version__}"
            differs = f"{version} does not split and join {text!r} as tokenizer.json says"
            raise ValueError(f"{folder}: {differs}; another version of transformers may")


def encode_prompt(
    tokenizer,
    prompt: str,
    *,
    template: str = "auto",
    suffix: str = "auto",
    thinking: bool = False,
    kind: str = "math",
) -> list[int]:
    """Token ids of a question, ready for the model to answer.

    template: "auto" uses the tokenizer's chat template with its own default system turn, and the bare prompt
    where it has none; "none" takes the prompt verbatim. suffix: "auto" appends SUFFIXES[kind] where neither
    the template nor the question mentions boxed (never with template "none"); "none" or "" appends nothing;
    else it is the text itself. thinking: passed to the template as enable_thinking (Qwen3's switch). Raises
    ValueError if the template fails.
    """
    chat = template == "auto" and bool(tokenizer.chat_template)

    def render(content: str) -> str:
        messages = [{"role": "user", "content": content}]
        options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": thinking}
        return tokenizer.apply_chat_template(messages, **options) if chat else content

    try:
        if suffix == "auto":
            suffix = "" if template == "none" or "boxed" in render(prompt) else SUFFIXES[kind]
        text = render(prompt + ("" if suffix == "none" else suffix))
    except Exception as error:  # a template is a program of its own and raises what it likes
        message = f"the tokenizer's chat template fails ({error}); --template none goes without it"
        raise ValueError(message) from None
    ids = tokenizer.encode(text, add_special_tokens=False)
    # A template writes its own BOS. Elsewhere the model's BOS is put first, if it uses one, and never twice.
    bos = tokenizer.bos_token_id
    wants_bos = not chat and bos is not None and bos in tokenizer.encode("") and ids[:1] != [bos]
    return [bos, *ids] if wants_bos else ids


def decode_response(tokenizer, ids: list[int]) -> str:
    """Text of a response without its special tokens: an end token must not reach the grader."""
    named = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    ids = [i for i in ids if i not in named]  # tokenizer.json may hold the end token as an ordinary one
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def show_prompt(tokenizer, ids: list[int]) -> str:
    r"""One line with the prompt that the model gets, decoded from its ids, special tokens included.

    A newline is shown as \n; other characters that a terminal would obey are escaped too. Of a prompt with
    more than SHOWN characters the middle is left out.

    >>> tokenizer, _ = load_tokenizer(Path(__file__).parents[1] / "tiny" / "model")
    >>> show_prompt(tokenizer, encode_prompt(tokenizer, "1+2=?", template="none"))
    '1+2=?'
    """
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if len(text) <= SHOWN:
        return _printable(text)
    head, tail = text[: SHOWN // 2], text[-SHOWN // 2 :]
    return f"{_printable(head)} ... {len(text) - SHOWN} characters ... {_printable(tail)}"


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
