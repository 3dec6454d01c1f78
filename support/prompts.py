r"""Text and token ids: load a tokenizer, encode a question as a prompt, decode a response.

    tokenizer, eos_ids = load_tokenizer("Qwen2.5-Math-1.5B")  # a folder in Hugging Face format
    ids = encode_prompt(tokenizer, "What is 6+7?")
    text = decode_response(tokenizer, ids)

Only tokenizer.json decides how text is encoded and decoded. For some classes (LlamaTokenizerFast,
Qwen2Tokenizer, ...) transformers 5 rebuilds the tokenizer from its vocabulary and silently drops the rules in
tokenizer.json: the spaces of a byte-level vocabulary disappear, or numbers are split differently than in
training. So no class is chosen by name here. The other files only add the chat template and the names of
special tokens, and `load_tokenizer` compares the result with tokenizer.json on fixed samples.
"""

import contextlib
import os
from pathlib import Path

import transformers
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from support.untrusted import printable, quote, read_json, reason, within_limits

SUFFIXES = {
    "math": "\nPlease reason step by step, and put your final answer within \\boxed{}.",
    "choice": "\nPlease reason step by step, and put the letter of your final answer within \\boxed{}.",
}
SAMPLES = (  # texts that tokenizers treat differently
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
SHOWN = 400  # characters of a prompt that the plan shows


def load_tokenizer(folder: str | os.PathLike) -> tuple:
    """(tokenizer, eos_ids) of an HF folder; eos_ids: sorted union of generation_config, config and tokenizer.

    Raises ValueError if tokenizer.json is missing, does not load or lacks a token that the other files name,
    if transformers deviates from it, if no file names an end-of-sequence token, or if tokenizer or chat
    template exceed the limits of untrusted.py on a sample.

    >>> load_tokenizer(Path(__file__).parents[1] / "tiny" / "model")[1]
    [328, 330]
    """
    folder = Path(folder)
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise ValueError(_no_tokenizer(folder))

    def attempt():
        tokenizer, _ = _load(folder)
        with contextlib.suppress(ValueError):  # --template none does without it
            encode_prompt(tokenizer, SAMPLES[0])

    within_limits(attempt, f"{folder}: the tokenizer or its chat template", file.stat().st_size)
    return _load(folder)


def _load(folder: Path) -> tuple:
    """What `load_tokenizer` returns, by code that may crash or hang on a file that was made to do so."""
    file = folder / "tokenizer.json"
    _read(folder / "special_tokens_map.json")  # which refuses what it must not hold
    settings = _read(folder / "tokenizer_config.json")
    try:
        reference = Tokenizer.from_file(str(file))
        beside = PreTrainedTokenizerFast.from_pretrained(folder)  # reads the other files
    except Exception as error:  # transformers and tokenizers raise anything, even plain Exception
        message = "the tokenizer does not load; check tokenizer.json and tokenizer_config.json"
        raise ValueError(f"{folder}: {message} ({reason(error)})") from None
    names = _special_tokens(folder, beside, reference)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file), **names)
    tokenizer.name_or_path, tokenizer.chat_template = str(folder), beside.chat_template
    if settings.get("add_bos_token"):
        tokenizer.add_bos_token = True  # DeepSeek's tokenizer.json relies on this flag for the BOS
    _check_samples(folder, tokenizer, reference)
    return tokenizer, _eos_ids(folder, tokenizer)


def _read(file: Path) -> dict:
    return read_json(file) if file.is_file() else {}


def _special_tokens(folder: Path, beside: PreTrainedTokenizerFast, reference: Tokenizer) -> dict[str, str]:
    """{name: token} of the special tokens, such as bos_token; ValueError if tokenizer.json lacks one.

    The model never reads the tokens in UNUSED, such as padding. If one of them is missing or is an ordinary
    token, its name is dropped.
    """
    named, added = beside.special_tokens_map, _added_tokens(reference)
    used = {token for name, token in named.items() if name not in UNUSED}
    for token in beside.added_tokens_encoder:
        if reference.token_to_id(token) is None and (token in used or token not in named.values()):
            lacks = f"{folder}: tokenizer.json lacks the token {quote(token)} that another file names"
            raise ValueError(f"{lacks}; add it with its id to added_tokens in tokenizer.json")
    return {name: token for name, token in named.items() if token in added or name not in UNUSED}


def _added_tokens(reference: Tokenizer) -> list[str]:
    return [token.content for token in reference.get_added_tokens_decoder().values()]


def _eos_ids(folder: Path, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The ids that end a response, sorted: those of generation_config, config and tokenizer."""
    eos_ids = {tokenizer.eos_token_id}
    for file in folder / "generation_config.json", folder / "config.json":
        value = _read(file).get("eos_token_id")
        ids = value if isinstance(value, list) else [value]
        if any(i is not None and not (type(i) is int and 0 <= i < 2**31) for i in ids):
            raise ValueError(f"{file}: eos_token_id {quote(value)} is not a token id or a list of them")
        eos_ids.update(ids)
    if not eos_ids - {None}:
        raise ValueError(f"{folder}: no end-of-sequence token; set eos_token_id in generation_config.json")
    return sorted(eos_ids - {None})


def _no_tokenizer(folder: Path) -> str:
    """The error if tokenizer.json is missing: how to make it from an older format, if there is one."""
    older = [name for name in ("tokenizer.model", "vocab.json", "tekken.json") if (folder / name).is_file()]
    if not older:
        return f"{folder}: has no tokenizer (tokenizer.json is missing)"
    convert = f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
    return f"{folder}: tokenizer.json is missing; make it from {older[0]} once, with transformers: {convert}"


def _check_samples(folder: Path, tokenizer: PreTrainedTokenizerFast, reference: Tokenizer) -> None:
    """Raise ValueError unless samples and added tokens are encoded and decoded as tokenizer.json says."""
    reference.no_truncation()  # some files contain these settings for batches
    reference.no_padding()
    for text in (*SAMPLES, *(f"1 {token} a{token}" for token in _added_tokens(reference))):
        ids = reference.encode(text, add_special_tokens=False).ids
        same_ids = tokenizer.encode(text, add_special_tokens=False) == ids
        same_text = all(tokenizer.decode(ids, skip) == reference.decode(ids, skip) for skip in (False, True))
        if not (same_ids and same_text):
            version = f"transformers {transformers.__version__}"
            differs = f"{version} does not encode and decode {quote(text)} as tokenizer.json says"
            raise ValueError(f"{folder}: {differs}; try another version of transformers")


def encode_prompt(
    tokenizer,
    prompt: str,
    *,
    template: str = "auto",
    suffix: str = "auto",
    thinking: bool = False,
    kind: str = "math",
) -> list[int]:
    """The token ids of a question's prompt.

    template: "auto" is the tokenizer's chat template with its default system turn, or the bare prompt if it
    has no template; "none" is the bare prompt. suffix: "auto" appends SUFFIXES[kind] if neither the template
    nor the question mentions "boxed" (never with template "none"); "none" or "" appends nothing; any other
    text is appended. thinking: Qwen3's switch, enable_thinking. Raises ValueError if the template fails.
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
        text.encode()  # no half of a surrogate pair
    except MemoryError:  # for `within_limits`
        raise
    except Exception as error:  # a template is a program and may raise anything
        message = f"the tokenizer's chat template fails ({reason(error)}); --template none does without it"
        raise ValueError(message) from None
    ids = tokenizer.encode(text, add_special_tokens=False)
    if not ids:
        raise ValueError(f"the prompt {quote(prompt)} is no token to the tokenizer and its chat template")
    # A template writes its own BOS. Without one, the BOS comes first if the model uses it, but never twice.
    bos = tokenizer.bos_token_id
    wants_bos = not chat and bos is not None and bos in tokenizer.encode("") and ids[:1] != [bos]
    return [bos, *ids] if wants_bos else ids


def decode_response(tokenizer, ids: list[int]) -> str:
    """The text of a response without special tokens: the EOS must not reach the grader."""
    named = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    ids = [i for i in ids if i not in named]  # tokenizer.json may list the EOS as an ordinary token
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def show_prompt(tokenizer, ids: list[int]) -> str:
    r"""The prompt that the model reads, decoded from its ids to one line, including special tokens.

    Newlines and other control characters are escaped. A prompt with more than SHOWN characters loses its
    middle.

    >>> tokenizer, _ = load_tokenizer(Path(__file__).parents[1] / "tiny" / "model")
    >>> show_prompt(tokenizer, encode_prompt(tokenizer, "1+2=?", template="none"))
    '1+2=?'
    """
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if len(text) <= SHOWN:
        return printable(text)
    head, tail = text[: SHOWN // 2], text[-SHOWN // 2 :]
    return f"{printable(head)} ... {len(text) - SHOWN} characters ... {printable(tail)}"
