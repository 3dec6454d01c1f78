"""support/prompts.py: tokenizer.json alone turns text into ids and back; a prompt is shown as it is fed."""

import json
import shutil

import pytest
import tokenizers
import transformers
from conftest import ROOT, program
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX as QWEN2_SPLIT

from support import prompts
from support.prompts import SAMPLES, decode_response, encode_prompt, load_tokenizer, show_prompt

# -----------------------------------------------------------------------------------------------------------
# Folders in Hugging Face format, made up after the models of the paper

LLAMA3_SPLIT = QWEN2_SPLIT.replace(r"\p{N}|", r"\p{N}{1,3}|")  # three digits a token at most, not one
CORPUS = [
    "What is 1234567+89? It is 1234656, so \\boxed{1234656}.",
    "naïve 数学 \\frac{5}{6}\n\n  2024 12 345",
] * 20
CHATML = (
    "{%- if messages[0]['role'] != 'system' %}<|im_start|>system\nSYSTEM<|im_end|>\n{% endif %}"
    "{%- for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MATH_SYSTEM = "Please reason step by step, and put your final answer within \\\\boxed{}."
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
INSTRUCTION = "\nPlease reason step by step, and put your final answer within \\boxed{}."
NAMES = {"bos_token": "<s>", "eos_token": "<|im_end|>", "pad_token": "</s>"}
REBUILT = ["LlamaTokenizerFast", "Qwen2Tokenizer", "GPT2Tokenizer"]  # classes that make rules of their own
TEXT = "What is 6+7? 12345678  x\n\\boxed{é数} e\u0301"


def split_then_bytes(pattern):
    split = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])


def byte_level(split=LLAMA3_SPLIT, normalizer=None, special=None):
    """A trained tokenizers.Tokenizer such as those of Qwen2 and Llama 3."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = split_then_bytes(split)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(special or SPECIAL)
    tokenizer.add_tokens(["<think>", "</think>"])
    return tokenizer


def sentencepiece():
    """A trained tokenizers.Tokenizer such as those of Llama 2 and of the older Mistral."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="always", split=False)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    special = ["<unk>", *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([line.split(" ") for line in CORPUS], trainer)
    written = json.loads(tokenizer.to_str())
    added = [token for token in written["added_tokens"] if not token["content"].startswith("<0x")]
    written["added_tokens"] = added
    return Tokenizer.from_str(json.dumps(written))


def with_bos(tokenizer):
    """A post-processor that puts <s> first, as in Llama 3's tokenizer.json."""
    bos = ("<s>", tokenizer.token_to_id("<s>"))
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [bos])
    return tokenizer


def write_folder(folder, tokenizer, name="PreTrainedTokenizerFast", model_type="llama", **config):
    """The folder, now with tokenizer.json, config.json, and in tokenizer_config.json NAMES and `config`."""
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": name, **NAMES, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


def assert_as_written(folder, tokenizer, texts=(*SAMPLES, TEXT)):
    """The ids of prompts and the text of responses are those of the folder's tokenizer.json."""
    reference = Tokenizer.from_file(str(folder / "tokenizer.json"))
    reference.no_truncation()
    reference.no_padding()
    for text in texts:
        ids = encode_prompt(tokenizer, text, template="none")
        ids = ids[1:] if ids[0] == tokenizer.bos_token_id else ids
        assert ids == reference.encode(text, add_special_tokens=False).ids
        assert decode_response(tokenizer, ids) == reference.decode(ids)


def make_tokenizer(template=None, add_bos=False):
    """A byte-level tokenizer with a chat template, with or without a BOS of its own."""
    tokenizer = with_bos(byte_level()) if add_bos else byte_level()
    names = {"bos_token": "<s>" if add_bos else None, "eos_token": "<|im_end|>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    fast.chat_template = template
    return fast


# ----------------------------------------------------------------------------------------------------------
# tokenizer.json is the truth


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "mistral", "gpt2", "unheard_of"])
@pytest.mark.parametrize("name", [*REBUILT, "LlamaTokenizer", "Unheard"])
def test_class_and_model_type_change_nothing(tmp_path, name, model_type):
    folder = write_folder(tmp_path / "DeepSeek-R1-Distill-Llama-8B", byte_level(), name, model_type)
    tokenizer, _ = load_tokenizer(folder)
    assert_as_written(folder, tokenizer)
    ids = encode_prompt(tokenizer, TEXT, suffix="none")
    assert tokenizer.decode(ids) == decode_response(tokenizer, ids) == TEXT


@pytest.mark.parametrize("name", REBUILT)
def test_normalizer_pre_tokenizer_and_decoder_are_those_of_the_file(tmp_path, name):
    for number, tokenizer in enumerate((
        byte_level(r"\p{N}{1,3}|\P{N}+"),
        byte_level(normalizer=normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("?", " ?")])),
        byte_level(QWEN2_SPLIT, normalizers.NFD()),
        sentencepiece(),
    )):  # fmt: skip
        folder = write_folder(tmp_path / str(number), tokenizer, name, "qwen2")
        assert_as_written(folder, load_tokenizer(folder)[0])


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_settings_beside_the_file_change_nothing(tmp_path, model_type):
    flags = {"lstrip": True, "rstrip": True, "single_word": True, "normalized": True}
    tokenizer = byte_level(normalizer=normalizers.Replace("k", "q"))
    decoder = {tokenizer.token_to_id("<think>"): {"content": "<think>", "special": True, **flags}}
    folder = write_folder(
        tmp_path / "all", tokenizer, "LlamaTokenizerFast", model_type, added_tokens_decoder=decoder,
        split_special_tokens=True, add_prefix_space=True, legacy=True, clean_up_tokenization_spaces=True,
        additional_special_tokens=["</think>"], fast_tokenizer_files=["tokenizer.4.0.0.json"],
    )  # fmt: skip
    byte_level(QWEN2_SPLIT).save(str(folder / "tokenizer.4.0.0.json"))
    texts = ("a <think> b</think>c", " <s>x<|im_start|> y <|im_end|>\n", "It is 5 , ok . I 'm", *SAMPLES)
    assert_as_written(folder, load_tokenizer(folder)[0], texts)


def test_truncation_and_padding_of_the_file_do_not_reach_a_prompt(tmp_path):
    tokenizer = byte_level()
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=64)
    folder = write_folder(tmp_path / "short", tokenizer, "LlamaTokenizerFast")
    assert_as_written(folder, load_tokenizer(folder)[0], [TEXT * 9])


def test_the_embedded_tokenizer_is_read_as_transformers_reads_it():
    theirs = AutoTokenizer.from_pretrained(ROOT / "tiny" / "model")
    ours, _ = load_tokenizer(ROOT / "tiny" / "model")
    assert_as_written(ROOT / "tiny" / "model", ours)
    assert encode_prompt(ours, TEXT) == encode_prompt(theirs, TEXT) and len(ours) == len(theirs)


def test_another_tokenizer_than_the_files_is_refused(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "model", byte_level())
    collapse = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("  ", " ")])
    damages = [
        lambda backend: setattr(backend, "pre_tokenizer", pre_tokenizers.Metaspace()),
        lambda backend: setattr(backend, "pre_tokenizer", split_then_bytes(QWEN2_SPLIT)),
        lambda backend: setattr(backend, "decoder", collapse),
        lambda backend: setattr(backend, "normalizer", normalizers.NFC()),
        lambda backend: backend.add_special_tokens([tokenizers.AddedToken("</think>", special=True)]),
    ]
    for number, damage in enumerate(damages):

        class Damaged(PreTrainedTokenizerFast):
            def __init__(self, damage=damage, **options):
                super().__init__(**options)
                damage(self.backend_tokenizer)

        monkeypatch.setattr(prompts, "PreTrainedTokenizerFast", Damaged)
        with pytest.raises(ValueError, match=r"as tokenizer\.json says") as error:
            load_tokenizer(folder)
        assert str(folder) in str(error.value) and "\n" not in str(error.value), number
        assert transformers.__version__ in str(error.value)
    monkeypatch.undo()
    load_tokenizer(folder)


# ----------------------------------------------------------------------------------------------------------
# What the other files add: templates, names, flags


def qwen2():
    return byte_level(QWEN2_SPLIT, normalizers.NFC())


BOS = "{{ bos_token }}"
FAMILIES = {  # where transformers' own choice of a class is right: tokenizer, class, model_type, template
    "qwen2": (qwen2, "Qwen2Tokenizer", "qwen2", "CHATML"),
    "distilled qwen2": (qwen2, "LlamaTokenizerFast", "qwen2", BOS + "CHATML<think>\n"),
    "llama 3": (lambda: with_bos(byte_level()), "PreTrainedTokenizerFast", "llama", BOS + "CHATML"),
    "tekken": (lambda: with_bos(byte_level()), "PreTrainedTokenizerFast", "mistral", BOS + "[INST]CHATML"),
    "mistral": (lambda: with_bos(sentencepiece()), "LlamaTokenizer", "mistral", BOS + "[INST] CHATML"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_are_those_of_transformers_where_it_is_right(tmp_path, family):
    make, name, model_type, template = FAMILIES[family]
    template = template.replace("CHATML", CHATML.replace("SYSTEM", "{{ pad_token }}{{ eos_token }}"))
    folder = write_folder(tmp_path / "model", make(), name, model_type, chat_template=template)
    theirs, (ours, _) = AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)
    message = [{"role": "user", "content": TEXT}]
    options = {"tokenize": False, "add_generation_prompt": True}
    assert ours.apply_chat_template(message, **options) == theirs.apply_chat_template(message, **options)
    for options in {}, {"template": "none"}, {"suffix": "none"}, {"thinking": True}:
        assert encode_prompt(ours, TEXT, **options) == encode_prompt(theirs, TEXT, **options)
    for which in "bos", "eos", "pad":
        assert getattr(ours, f"{which}_token_id") == getattr(theirs, f"{which}_token_id") is not None


CONTENT = "{{ messages[0].content }}"
PLACES = {  # of a chat template: what tokenizer_config.json says, and other files
    "inline": ("inline" + CONTENT, {}),
    "list": ([{"name": "default", "template": "list" + CONTENT}, {"name": "rag", "template": "no"}], {}),
    "file": ("no", {"chat_template.jinja": "file" + CONTENT}),
    "files": (None, {"chat_template.jinja": "files" + CONTENT, "additional_chat_templates/rag.jinja": "no"}),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_chat_template_is_found_wherever_it_is(tmp_path, place):
    template, files = PLACES[place]
    config = {"chat_template": template} if template else {}
    folder = write_folder(tmp_path / "model", byte_level(), "LlamaTokenizerFast", **config)
    (folder / "additional_chat_templates").mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    tokenizer, _ = load_tokenizer(folder)
    assert tokenizer.decode(encode_prompt(tokenizer, "1 + 1", suffix="none")) == place + "1 + 1"


def test_special_tokens_map_and_full_descriptions_name_the_tokens(tmp_path):
    described = {"__type": "AddedToken", "content": "<s>", "lstrip": False, "normalized": True}
    named = {"bos_token": described, "eos_token": None}
    folder = write_folder(tmp_path / "model", byte_level(), "LlamaTokenizerFast", **named)
    written = {"eos_token": {"content": "<|im_end|>", "lstrip": False}}
    (folder / "special_tokens_map.json").write_text(json.dumps(written))
    tokenizer, eos_ids = load_tokenizer(folder)
    assert tokenizer.bos_token_id == tokenizer.convert_tokens_to_ids("<s>")
    assert eos_ids == [tokenizer.eos_token_id] == [tokenizer.convert_tokens_to_ids("<|im_end|>")]
    assert_as_written(folder, tokenizer)


@pytest.mark.parametrize("flag, in_file, first", [
    (True, False, "<s>"), (True, True, "<s>"), (None, True, "<s>"), (False, False, ""), (None, False, "")
])  # fmt: skip
def test_a_bos_that_only_the_flag_asks_for_is_put_first(tmp_path, flag, in_file, first):
    tokenizer = with_bos(byte_level()) if in_file else byte_level()
    folder = write_folder(tmp_path / "model", tokenizer, "LlamaTokenizerFast", add_bos_token=flag)
    loaded, _ = load_tokenizer(folder)
    ids = encode_prompt(loaded, "1+1?", template="none")
    assert loaded.decode(ids) == first + "1+1?"


def test_a_named_end_token_does_not_reach_the_grader(tmp_path):
    """Some files hold the end token as an ordinary added one. Thoughts stay, whatever names they have."""
    tokenizer = byte_level(special=["<s>", "</s>"])
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"])
    folder = write_folder(tmp_path / "model", tokenizer, "Qwen2Tokenizer", "qwen2", think_token="<think>")
    loaded, _ = load_tokenizer(folder)
    ids = loaded.encode("<think>5</think> The answer is 42 , ok .<|im_end|></s>", add_special_tokens=False)
    assert decode_response(loaded, ids) == "<think>5</think> The answer is 42 , ok ."


def test_a_token_that_tokenizer_json_does_not_have_is_refused_unless_nothing_uses_it(tmp_path):
    named = {"<|end|>": {"eos_token": "<|end|>"}, "<bos>": {"bos_token": "<bos>", "pad_token": "<bos>"}}
    named["<tool>"] = {"added_tokens_decoder": {"7000": {"content": "<tool>", "special": True}}}
    named["<|user|>"] = {"additional_special_tokens": ["<|user|>"]}
    named["<image>"] = {"image_token": "<image>"}
    for token, config in named.items():
        with pytest.raises(ValueError, match=r"tokenizer\.json lacks the token") as error:
            load_tokenizer(write_folder(tmp_path / "model", byte_level(), **config))
        assert repr(token) in str(error.value) and "model" in str(error.value)
    for padding in "[PAD]", "!":  # not there, or an ordinary token, which must stay one
        unused = {"pad_token": padding, "unk_token": "<unk>"}
        folder = write_folder(tmp_path / "model", byte_level(), "LlamaTokenizer", **unused)
        tokenizer, _ = load_tokenizer(folder)
        assert len(tokenizer) == byte_level().get_vocab_size() and tokenizer.pad_token_id is None
        assert_as_written(folder, tokenizer, ["[PAD] <unk> 5! = 120!"])


def test_an_end_token_that_is_only_in_the_vocabulary_is_special_all_the_same(tmp_path):
    written = json.loads(byte_level(special=["<s>", "</s>", "<|im_start|>"]).to_str())
    vocabulary = written["model"]["vocab"]
    vocabulary["<|im_end|>"] = len(vocabulary)
    for number, token in enumerate(written["added_tokens"]):
        token["id"] = len(vocabulary) + number
    folder = write_folder(tmp_path / "model", Tokenizer.from_str(json.dumps(written)), "LlamaTokenizerFast")
    tokenizer, eos_ids = load_tokenizer(folder)
    assert tokenizer.encode("5 <|im_end|>", add_special_tokens=False)[-1:] == eos_ids
    assert decode_response(tokenizer, tokenizer.encode("5 6<|im_end|>")) == "5 6"


@pytest.mark.parametrize("names", [["tokenizer.model"], ["vocab.json", "merges.txt"], ["tekken.json"]])
def test_a_folder_without_tokenizer_json_says_how_to_make_it(tmp_path, names):
    write_folder(tmp_path, byte_level(), "Qwen2Tokenizer", "qwen2")
    written = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    (tmp_path / "tokenizer.json").unlink()
    for name in names:  # the vocabulary is real: with vocab.json and merges.txt the advice can be followed
        merges = "\n".join(map(" ".join, written["merges"]))
        (tmp_path / name).write_text(merges if name == "merges.txt" else json.dumps(written["vocab"]))
    with pytest.raises(ValueError, match=r"tokenizer\.json is missing; make it from") as error:
        load_tokenizer(tmp_path)
    sentence = str(error.value)
    assert names[0] in sentence and str(tmp_path) in sentence and "\n" not in sentence
    if "vocab.json" in names:
        exec("from transformers import AutoTokenizer\n" + sentence[sentence.index("AutoTokenizer") :])
        assert load_tokenizer(tmp_path)[0].eos_token == "<|im_end|>"


# ----------------------------------------------------------------------------------------------------------
# Building prompts


HELPFUL = CHATML.replace("SYSTEM", "You are a helpful assistant.")
BOXED = CHATML.replace("SYSTEM", "{{ '" + MATH_SYSTEM + "' }}")
THINKING = CHATML + "{% if not enable_thinking %}<think>\n\n</think>{% endif %}"
NONE = {"template": "none"}


def chat(user, system="You are a helpful assistant."):
    turns = f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{user}<|im_end|>\n"
    return turns + "<|im_start|>assistant\n"


@pytest.mark.parametrize(
    "template, question, options, text",
    [
        (BOXED, "1+1?", {}, chat("1+1?", INSTRUCTION.strip())),  # a template with an instruction of its own
        (BOXED, "1+1?", {"suffix": " Go."}, chat("1+1? Go.", INSTRUCTION.strip())),
        (HELPFUL, "1+1?", {}, chat("1+1?" + INSTRUCTION)),
        (HELPFUL, "1+1? Use \\boxed{}.", {}, chat("1+1? Use \\boxed{}.")),
        (HELPFUL, "1+1?", {"suffix": "none"}, chat("1+1?")),
        (HELPFUL, "1+1?", {"suffix": ""}, chat("1+1?")),
        (None, "1+1?", {}, "1+1?" + INSTRUCTION),
        (None, "1+1=", NONE, "1+1="),
        (CHATML, "1+1=", NONE, "1+1="),
        (None, "1+1=", {**NONE, "suffix": "#"}, "1+1=#"),
        (CHATML, "1+1=", {**NONE, "suffix": "#"}, "1+1=#"),
        (THINKING, "x", {}, chat("x" + INSTRUCTION, "SYSTEM") + "<think>\n\n</think>"),
        (THINKING, "x", {"thinking": True}, chat("x" + INSTRUCTION, "SYSTEM")),
    ],
)
def test_prompts_by_hand(template, question, options, text):
    tokenizer = make_tokenizer(template)
    ids = encode_prompt(tokenizer, question, **options)
    assert isinstance(ids, list) and all(type(i) is int for i in ids)
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == text.count("<|im_start|>")


def test_the_suffix_of_a_choice_asks_for_its_letter():
    tokenizer = make_tokenizer(HELPFUL)
    assert "the letter of your" in tokenizer.decode(encode_prompt(tokenizer, "Which?", kind="choice"))


def test_bos_is_there_once():
    with_bos = make_tokenizer("<s>" + CHATML, add_bos=True)
    bos = with_bos.bos_token_id
    for ids in (
        encode_prompt(with_bos, "1+1?"),
        encode_prompt(with_bos, "1+1?", template="none"),
        encode_prompt(with_bos, "<s>1+1?", template="none"),
        encode_prompt(make_tokenizer(add_bos=True), "1+1?"),
    ):
        assert ids[0] == bos and ids.count(bos) == 1
    no_bos = make_tokenizer(CHATML)
    assert "<s>" not in no_bos.decode(encode_prompt(no_bos, "1+1?", template="none"))


def test_failing_template_is_one_sentence():
    with pytest.raises(ValueError, match="--template none"):
        tokenizer = make_tokenizer("{{ raise_exception('system role only') }}")
        encode_prompt(tokenizer, "x")


def test_load_tokenizer_unites_the_eos_ids(tmp_path):
    make_tokenizer(CHATML).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2", "eos_token_id": 5}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [9, 5, 2]}')
    tokenizer, eos_ids = load_tokenizer(tmp_path)
    assert eos_ids == sorted({2, 5, 9, tokenizer.eos_token_id}) and tokenizer.chat_template == CHATML
    (tmp_path / "generation_config.json").unlink()
    assert load_tokenizer(str(tmp_path))[1] == sorted({5, tokenizer.eos_token_id})


def test_load_tokenizer_errors(tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer\.json is missing") as error:
        load_tokenizer(tmp_path / "nowhere")
    assert "nowhere" in str(error.value)
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text((tmp_path / "tokenizer.json").read_text()[:500])
    with pytest.raises(ValueError, match="does not load"):
        load_tokenizer(tmp_path)


# ----------------------------------------------------------------------------------------------------------
# The prompt in the plan


def test_the_shown_prompt_is_one_line_decoded_from_the_ids():
    tokenizer = make_tokenizer("<s>" + CHATML.replace("SYSTEM", "Box it: \\boxed{}."), add_bos=True)
    ids = encode_prompt(tokenizer, "1+1?\x1b[2J\r\u202e\u2028數é", suffix="none")
    escaped = r"1+1?\x1b[2J\r\u202e\u2028數é"
    text = chat(escaped, r"Box it: \boxed{}.").replace("\n", r"\n")
    assert show_prompt(tokenizer, ids) == "<s>" + text
    assert show_prompt(tokenizer, ids[:1] + ids) == "<s><s>" + text  # shown as it is fed, not as it was meant


def test_a_long_prompt_shows_its_start_and_its_end():
    tokenizer = make_tokenizer()
    exact, long = ("a" * (prompts.SHOWN // 2 + extra) + "b" * (prompts.SHOWN // 2) for extra in (0, 34))
    assert show_prompt(tokenizer, tokenizer.encode(exact)) == exact
    assert show_prompt(tokenizer, tokenizer.encode(long)) == "a" * 200 + " ... 34 characters ... " + "b" * 200


def test_the_program_prints_the_first_prompt_of_a_byte_level_llama(tmp_path):
    """A model in a folder as DeepSeek's are; the plan does not need its weights."""
    template = "{{ bos_token }}{{ bos_token }}User: {{ messages[0].content }}\n\nAssistant:<think>\n"
    config = {"chat_template": template, "add_bos_token": True}
    folder = write_folder(tmp_path / "model", byte_level(), "LlamaTokenizerFast", "qwen2", **config)
    shutil.copy(ROOT / "tiny" / "model" / "config.json", folder)
    sizes = json.loads((folder / "config.json").read_text())
    llama = {**sizes, "vocab_size": 500, "model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(llama))
    asked = [{"prompt": "What is 6+7?\x1b[31m \\neq é數"}, {"prompt": "second"}]
    (tmp_path / "q.json").write_text(json.dumps(asked))
    flags = ["--dry-run", "--model", folder, "--data", tmp_path / "q.json", "--max-new-tokens", "8"]
    shown = r"What is 6+7?\x1b[31m \neq é數"
    suffix = INSTRUCTION.replace("\n", r"\n")
    for more, prompt in (
        ([], rf"<s><s>User: {shown}{suffix}\n\nAssistant:<think>"),
        (["--template", "none"], rf"<s>{shown}"),
    ):
        printed = program(*flags, *more, "--out", tmp_path / "run").stdout
        lines = [line for line in printed.split("\n") if line.startswith("prompt ")]
        assert lines == ["prompt   " + prompt] and "\x1b" not in printed
        assert "second" not in printed and printed.index("plan  ") < printed.index("prompt ")


def test_a_terminal_that_cannot_show_a_prompt_gets_escapes(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    (tmp_path / "q.jsonl").write_text('{"prompt": "What is 6+7 數?"}\n')
    printed = program("--dry-run", "--data", tmp_path / "q.jsonl", "--out", tmp_path / "run").stdout
    assert r"user\nWhat is 6+7 \u6578?<|im_end|>\n" in printed


def test_the_program_refuses_a_tokenizer_in_one_sentence(tmp_path):
    folder = write_folder(tmp_path / "model", byte_level(), eos_token="<|end|>")
    shutil.copy(ROOT / "tiny" / "model" / "config.json", folder)
    flags = ["--dry-run", "--model", folder, "--data", "tiny", "--out", tmp_path / "run"]
    error = program(*flags, code=2).stderr
    assert error.count("\n") == 1 and error.startswith("ttrl.py: ") and "'<|end|>'" in error
