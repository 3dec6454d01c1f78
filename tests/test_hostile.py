"""The door: whatever files and flags hold, a start ends in one sentence or in a right result, and soon."""

import ast
import copy
import json
import multiprocessing
import os
import re
import resource
import struct
import sys
import tempfile
import time
from pathlib import Path

import pytest
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from parity import write_model
from test_page import record

from report import screen
from support import untrusted

TINY = ROOT / "tiny" / "model"
LIMIT_SECONDS, LIMIT_BYTES = 10, 2**30  # of a case
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits the memory of a process")

# ----------------------------------------------------------------------------------------------------------
# A process that opens the door, and is killed when a case takes too long or too much


def _worker(pipe):
    import torch.distributed as dist

    import ttrl
    from support.run import open_run

    untrusted.SECONDS = 1  # a loop without end costs no more
    output = [tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115
    for number, file in enumerate(output, 1):  # the descriptors, since libraries print past sys.stderr
        os.dup2(file.fileno(), number)
    while True:
        arguments = pipe.recv()
        code = fault = None
        for file in output:
            file.seek(0)
            file.truncate()
        try:
            open_run(arguments, ttrl.REWARDS)
        except SystemExit as stopped:
            code = stopped.code
        except BaseException as error:  # reported to the test, whatever it is
            fault = repr(error)[:300]
        if dist.is_initialized():
            dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        printed = [os.pread(file.fileno(), 100_000, 0).decode("utf-8", "replace") for file in output]
        pipe.send((code, fault, *printed))


class Door:
    """Opens runs in a process of its own; `enter` returns what a user would see."""

    def __init__(self, folder):
        self.folder = folder
        self.process = None

    def start(self):
        self.pipe, end = multiprocessing.Pipe()
        self.process = multiprocessing.get_context("spawn").Process(target=_worker, args=(end,), daemon=True)
        self.process.start()
        end.close()
        self.slowest = 60  # seconds, for the imports
        assert self.enter(["--dry-run"])[0] == 0
        self.slowest = LIMIT_SECONDS

    def enter(self, arguments):
        if self.process is None:
            self.start()
        began, before = time.monotonic(), self.resident()
        self.pipe.send(arguments)
        while not self.pipe.poll(0.05):
            if time.monotonic() - began > self.slowest:
                self.fail("takes too long")
            if self.resident() - before > LIMIT_BYTES and self.slowest == LIMIT_SECONDS:
                self.fail("fills the memory")
        try:
            return self.pipe.recv()
        except EOFError:
            self.fail("kills the process")

    def resident(self):
        with open(f"/proc/{self.process.pid}/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()

    def fail(self, how):
        self.close()
        raise AssertionError(how)

    def close(self):
        if self.process:
            self.process.kill()
            self.process.join()
            self.process = None

    def ends_well(self, flags, files=None, base=TINY):
        """One sentence and exit code 2, or a start without a word of complaint; returns which of them."""
        with tempfile.TemporaryDirectory(dir=self.folder) as name:
            folder = Path(name)
            for path in base.iterdir():
                (folder / path.name).symlink_to(path)
            for file, content in (files or {}).items():
                (folder / file).unlink(missing_ok=True)
                if content is not None:
                    (folder / file).write_bytes(content)
            here = ["--model", name, "--data", str(ROOT / "tiny" / "questions.json"), "--out", f"{name}/out"]
            code, fault, out, err = self.enter([*here, *(flag.replace("HERE", name) for flag in flags)])
        assert fault is None, (fault, err)
        assert all(c.isprintable() for c in out.replace("\n", "")), out
        if code in (None, 0):
            assert err == ""
            return "a start"
        assert code == 2 and re.fullmatch(r"ttrl\.py: [^\n]{10,900}\n", err), (code, err)
        assert err[:-1].isprintable(), err
        return err


@pytest.fixture(scope="module")
def door(tmp_path_factory):
    door = Door(tmp_path_factory.mktemp("door"))
    yield door
    door.close()


# ----------------------------------------------------------------------------------------------------------
# Damage

RAW = {"@array": "[" * 100_000, "@object": '{"a":' * 100_000, "@digits": "9" * 5000, "@exponent": "1e999"}
VALUES = [
    None, True, False, 0, -1, 1, 2, 3, 0.5, 2**24, 2**31, 2**32 - 1, 2**63, 10**30, 1e308, -1e308, 5e-324,
    float("nan"), float("inf"), "", " ", "x", "a\x1b[2J\r\x9b1m", "\u202eabc\u2066", "\ud800", "\0",
    "a" * 100_000, "\n\nx\n", "../../etc/passwd", "/etc/passwd", "file:///etc/passwd", "__import__('os')",
    "{{ 1/0 }}", [], {}, [[]], [None], [3, "x"], {"a": 1}, {"content": "<s>"}, {"Regex": "(a*)*b"},
    {"String": ""}, *RAW,
]  # fmt: skip  # the keys of RAW stand for text that JSON's writer would not write
TEXTS = [value for value in VALUES if isinstance(value, str)]


@st.composite
def damaged(draw, document, keys=(), values=()):
    """The bytes of a JSON document with one to three fields deleted, replaced, renamed, added or doubled."""
    document, doubled = copy.deepcopy(document), ""
    value = st.sampled_from([*VALUES, *values]).map(copy.deepcopy)
    for _ in range(draw(st.integers(1, 3))):
        node, key = document, None
        while isinstance(node, dict | list) and node and (key is None or draw(st.booleans())):
            places = list(node) if isinstance(node, dict) else range(len(node))
            parent, key = node, draw(st.sampled_from(places))
            node = parent[key]
        if key is None:  # all is deleted
            break
        what = draw(st.sampled_from(["replace", "replace", "delete", "rename", "add", "double"]))
        if what == "delete":
            del parent[key]
        elif what == "double" and isinstance(document, dict):
            name = draw(st.sampled_from(list(document) or ["x"]))
            doubled += f", {json.dumps(name)}: {json.dumps(draw(value))}"
        elif what in ("add", "rename") and isinstance(parent, dict):
            new = draw(st.sampled_from([*keys, *TEXTS]))
            parent[new] = parent.pop(key) if what == "rename" else draw(value)
        else:
            parent[key] = draw(value)
    text = json.dumps(document)
    text = text[:-1] + doubled + text[-1] if len(text) > 2 and doubled else text
    for name, raw in RAW.items():
        text = text.replace(json.dumps(name), raw)
    return draw(bitten(text.encode()))


@st.composite
def bitten(draw, data):
    """The same bytes in most draws; else cut, with a flipped bit, or with bytes that are not UTF-8."""
    place = draw(st.integers(0, len(data)))
    how = draw(st.integers(0, 9))
    if how == 0:
        return data[:place]
    if how == 1 and place < len(data):
        return data[:place] + bytes([data[place] ^ 1 << draw(st.integers(0, 7))]) + data[place + 1 :]
    return data[:place] + b"\0\xff\xfe" + data[place:] if how == 2 else data


def cases(test, strategy, count):
    """Run test(case) on `count` draws, the same in every run."""
    checks = list(HealthCheck)
    options = dict(derandomize=True, database=None, deadline=None, suppress_health_check=checks)

    @settings(max_examples=count, **options)
    @given(strategy)
    def check(case):
        test(case)

    check()


counted = pytest.mark.parametrize("share", [1, pytest.param(40, marks=pytest.mark.long)])
START = ["--dry-run", "--max-new-tokens", "8"]
READ_ALL = ["--eval-only", "--max-new-tokens", "1", "--eval-samples", "1", "--data", "HERE/q.json"]
ASKED = {"q.json": b'[{"prompt": "1+2=?"}]'}


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The embedded tokenizer with a model of 20 kB, so that its weights are read in no time."""
    folder = tmp_path_factory.mktemp("small")
    for path in TINY.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1,
             "num_hidden_layers": 1}  # fmt: skip
    write_model(folder, read(TINY / "config.json") | sizes)
    return folder


# ----------------------------------------------------------------------------------------------------------
# config.json

FIELDS = """head_dim rope_theta rope_scaling rope_parameters layer_types sliding_window use_sliding_window
    max_window_layers attention_bias mlp_bias torch_dtype quantization_config auto_map partial_rotary_factor
    num_labels id2label sub_configs text_config _attn_implementation pruned_heads architectures""".split()
ROPES = [
    {"rope_type": kind, "factor": factor, **more}
    for kind in ("linear", "dynamic", "yarn", "llama3")
    for factor in (2.0, 1e308, 5e-324, 10**400)
    for more in ({}, {"low_freq_factor": 1e-320, "high_freq_factor": 1e308}, {"beta_fast": 5e-324},
                 {"mscale": "x", "mscale_all_dim": 1}, {"mscale": 1, "mscale_all_dim": -14.426950408889635})
]  # fmt: skip


@counted
def test_config(door, small, share):
    """A model in a folder, and those of the paper on GPUs that are not here."""
    papers = list(read(ROOT / "docs" / "models.json").values())
    values = [*ROPES, "llama", "mistral", "ministral", "qwen3", ["sliding_attention"], 2**24 - 2]
    own = damaged(read(small / "config.json"), FIELDS, values).map(lambda text: (text, READ_ALL))
    plan = [*START, "--gpus", "8x80"]
    others = st.sampled_from(papers).flatmap(lambda config: damaged(config, FIELDS, values))
    drawn = st.one_of(own, others.map(lambda text: (text, plan)))
    cases(lambda case: door.ends_well(case[1], ASKED | {"config.json": case[0]}, small), drawn, 40 * share)


@pytest.mark.parametrize("changes", [
    {"num_labels": 2**31}, {"rope_theta": 1.0, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
    {"rope_theta": 10**400}, {"vocab_size": 2**24}, {"sub_configs": "x"}, {"rms_norm_eps": 10**400},
    dict.fromkeys(("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size"), 2**24),
    *({"rope_scaling": rope} for rope in ROPES if rope["rope_type"] == "yarn"),
], ids=str)  # fmt: skip
def test_config_that_broke_the_door(door, small, changes):
    config = json.dumps(read(small / "config.json") | changes).encode()
    door.ends_well(READ_ALL, ASKED | {"config.json": config}, small)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json", "q.json"])
@pytest.mark.parametrize("text", RAW.values(), ids=RAW)
def test_json_that_broke_the_door(door, small, file, text):
    """Thousands of nested brackets raise RecursionError."""
    files = ASKED | {file: text.encode()} | ({"model.safetensors": None} if "index" in file else {})
    assert "ttrl.py" in door.ends_well(READ_ALL, files, small)


# ----------------------------------------------------------------------------------------------------------
# weights


def parts_of(data):
    """(header, tensors) of a safetensors file."""
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


@st.composite
def weights(draw, data):
    header, tensors = parts_of(data)
    values = ["F16", "F8_E4M3", "F4", "C64", [2**62, 2**62], [0, 2**60], [-1], [5, 3], [0, 0]]
    text = draw(damaged(header, ["__metadata__", "lm_head.weight"], values))
    right = st.just(len(text))
    length = draw(st.one_of(right, right, st.sampled_from([0, 1, len(text) + 1, 10**8, 2**63, 2**64 - 1])))
    return struct.pack("<Q", length) + text + draw(bitten(tensors))


@counted
def test_safetensors(door, small, share):
    drawn = weights((small / "model.safetensors").read_bytes())
    cases(
        lambda data: door.ends_well(READ_ALL, ASKED | {"model.safetensors": data}, small), drawn, 50 * share
    )


PATHS = ["../model.safetensors", "/etc/passwd", "../../etc/passwd", "/dev/zero", "a\0.safetensors", ".", "..",
         "a/b.safetensors", "\ud800.safetensors", "a" * 5000 + ".safetensors", "\x1b[2J.safetensors",
         "config.json"]  # fmt: skip


@counted
def test_index(door, small, share):
    data = (small / "model.safetensors").read_bytes()
    names = [name for name in parts_of(data)[0] if name != "__metadata__"]
    files = ASKED | {"model.safetensors": None, "a.safetensors": data}
    document = {"metadata": {}, "weight_map": dict.fromkeys(names, "a.safetensors")}

    def check(index):
        door.ends_well(READ_ALL, files | {"model.safetensors.index.json": index}, small)

    cases(check, damaged(document, ["lm_head.weight"], PATHS), 20 * share)


@pytest.mark.parametrize("path", PATHS)
def test_an_index_stays_in_its_folder(door, small, path):
    """Even if the file is there, and good. The hub's cache links to other folders, but under plain names."""
    data = (small / "model.safetensors").read_bytes()
    (door.folder / "model.safetensors").write_bytes(data)
    files = ASKED | {"model.safetensors": None, "a.safetensors": data}
    placed = {name: "a.safetensors" for name in parts_of(data)[0] if name != "__metadata__"}
    for file, ending in ((path, "names a .safetensors file of this folder"), ("a.safetensors", "a start")):
        index = json.dumps({"weight_map": placed | {"model.norm.weight": file}}).encode()
        assert ending in door.ends_well(READ_ALL, files | {"model.safetensors.index.json": index}, small)


# ----------------------------------------------------------------------------------------------------------
# the tokenizer

TOKENIZER, SETTINGS = read(TINY / "tokenizer.json"), read(TINY / "tokenizer_config.json")
ADDED = {"single_word": False, "lstrip": True, "rstrip": True, "normalized": True, "special": True}


def split(regex):
    pattern = {"Regex": regex}
    return {"pre_tokenizer": {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}}


def replacing(pattern, content, times):
    one = {"type": "Replace", "pattern": pattern, "content": content}
    return {"normalizer": {"type": "Sequence", "normalizers": [one] * times}}


CRASHES = [  # parts of tokenizer.json that make the library panic, abort, hang or fill the memory
    split("((.*)*)*(.+)+x"), split("(([a-z ])+.)+[A-Z]([a-z])+$"), replacing({"String": "a"}, "a" * 10, 9),
    replacing({"String": ""}, "a", 1), {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    *({"normalizer": {"type": "Precompiled", "precompiled_charsmap": text}}
      for text in ("AAAA", "/" * 21 + "w==", "CAAAAP" + "/" * 17 + "w==")),
    {"post_processor": {"type": "TemplateProcessing", "pair": [], "special_tokens": {},
                        "single": [{"Sequence": {"id": "B", "type_id": 0}}]}},
    {"model": {"type": "Unigram", "unk_id": None, "vocab": [["a", -1.0]]}},
    {"model": {**TOKENIZER["model"], "type": "WordPiece", "unk_token": "[UNK]", "merges": None,
               "continuing_subword_prefix": "##", "max_input_chars_per_word": 10**18}},
    {"model": {**TOKENIZER["model"], "dropout": 0.5}},
]  # fmt: skip
LOADS = [  # others that look as bad and are not
    split(""), split("((a{0,1000}){0,1000}){0,1000}"), replacing({"Regex": "(a*)*b"}, "a", 1),
    {"padding": {"strategy": {"Fixed": 10**12}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                 "pad_type_id": 0, "pad_token": "a"}},
    {"decoder": {"type": "Strip", "content": " ", "start": 0, "stop": 0}},
]  # fmt: skip


@pytest.mark.parametrize("parts", CRASHES, ids=lambda parts: str(parts)[:60])
def test_tokenizer_that_crashes_the_library(door, parts):
    assert "ttrl.py" in door.ends_well(START, {"tokenizer.json": json.dumps(TOKENIZER | parts).encode()})


@pytest.mark.parametrize("name, key, values", [
    ("tokenizer.json", "", [ADDED | {"id": 331, "content": "q"}, ADDED | {"id": 2**32 - 1, "content": ""}]),
    ("tokenizer_config.json", "added_tokens_decoder", ["{{ messages }}"]),
    ("special_tokens_map.json", "additional_special_tokens", []),
    ("generation_config.json", "eos_token_id", [[[1]], ["a", 3], {"a": 3}, [True]]),
])  # fmt: skip
@counted
def test_tokenizer(door, name, key, values, share):
    """Each file beside the others, which are whole."""
    tokens = {"eos_token": "<|im_end|>", "bos_token": {"content": "<|im_start|>"}}
    document = tokens if name == "special_tokens_map.json" else read(TINY / name)
    keys = [
        key,
        *"eos_token pad_token bos_token chat_template tokenizer_class tokenizer_file auto_map".split(),
    ]
    count = 10
    if name == "tokenizer.json":
        values = [*values, *(value for part in (*CRASHES, *LOADS) for value in part.values())]
        count = 30
    cases(lambda text: door.ends_well(START, {name: text}), damaged(document, keys, values), count * share)


@pytest.mark.parametrize("name, text", [
    ("special_tokens_map.json", '{"bos_token": {"\\u001b[2J": "<|im_start|>"}}'),
    ("tokenizer_config.json", '{"bos_token": {"a\\nb": 1}}'),
    *((name, text) for name in ("generation_config.json", "special_tokens_map.json")
      for text in RAW.values()),
    *(("generation_config.json", f'{{"eos_token_id": {value}}}')
      for value in ("[[1]]", '["a", 3]', '{"a": 3}', "true", "-1", "1e308", "9" * 20)),
])  # fmt: skip
def test_file_beside_the_tokenizer_that_broke_the_door(door, name, text):
    assert "ttrl.py" in door.ends_well(START, {name: text.encode()})


TEMPLATES = [
    "{% for i in range(10**5) %}{% for j in range(10**5) %}{% endfor %}{% endfor %}", "{{ 3**(3**18) % 7 }}",
    "{% set n = namespace(x='aaa') %}{% for i in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
    "{{ 'a' * 3*10**9 }}", "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "{{ messages.append(1) }}",
    "{{ " + "(" * 5000 + "1" + ")" * 5000, "{% if 1 %}" * 3000 + "{% endif %}" * 3000, "{{ '\\ud800' }}",
    "{{ messages[0].content }}\ud800", "{{ '' }}", "{{ raise_exception('a\x1b[2J\r\x9b\u202eb') }}",
    "{{ '%03000000000d' % 1 }}", "{{ 'a'.center(10**10) }}", "{% include '/etc/passwd' %}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{% for i in range(10**9) %}{% endfor %}", [1, 2], 5,
    {"a": "b"}, [{"name": "default"}],
]  # fmt: skip


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda template: str(template)[:60])
def test_chat_template_that_misbehaves(door, template):
    settings = json.dumps(SETTINGS | {"chat_template": template}).encode()
    assert "ttrl.py" in door.ends_well(START, {"tokenizer_config.json": settings})


def test_a_chat_template_that_fails_can_be_done_without(door):
    settings = json.dumps(SETTINGS | {"chat_template": "{{ raise_exception('no') }}"}).encode()
    files = {"tokenizer_config.json": settings}
    assert "--template none" in door.ends_well(START, files)
    assert door.ends_well([*START, "--template", "none"], files) == "a start"


# ----------------------------------------------------------------------------------------------------------
# questions and flags


@counted
def test_questions(door, share):
    rows = [{"prompt": "1+2=?", "answer": "3", "id": "a"},
            {"question": [{"role": "user", "content": "2+2=?"}]},
            {"problem": "A) 1 B) 2", "answer": "B", "kind": "choice", "unique_id": 7}]  # fmt: skip
    keys = ["prompt", "answer", "id", "kind", "question", "role"]
    array = damaged(rows, keys).map(lambda text: ("q.json", text))
    lines = st.lists(st.sampled_from(rows).flatmap(lambda row: damaged(row, keys)), max_size=3)
    drawn = st.one_of(array, lines.map(lambda texts: ("q.jsonl", b"\n".join(texts))))
    cases(lambda case: door.ends_well([*START, "--data", f"HERE/{case[0]}"], dict([case])), drawn, 50 * share)


WORDS = ["0", "-1", "1", "2", "3.5", "64", "1e308", "1e-308", "nan", "inf", "-inf", "9" * 50, "9" * 5000,
         "1_0", "\u0663", "", " ", "x", "a\x1b[2J", "\u202ex.json", "\udcff", "../..", "/dev/null",
         "/dev/zero", "~", "a" * 300, "none", "auto", "cpu", "tiny", "8x80", "9999x999", "8x" + "9" * 400,
         "{}", "%s%n", "HERE", "HERE/config.json", "HERE/model.safetensors", "--votes", "-", "--", "=",
         "no/where", "a/b/c", "gold"]  # fmt: skip


@counted
def test_flags(door, share):
    from dataclasses import fields

    from support.config import Config, flag_name

    names = [flag_name(field.name) for field in fields(Config)]
    names += ["--no-offload", "--Votes", "--\x1b[2J", "-x", "--votes=", "--lr=nan", "--help=3"]
    pair = st.tuples(st.sampled_from(names), st.sampled_from(WORDS))
    drawn = st.lists(pair, min_size=1, max_size=3)
    cases(
        lambda pairs: door.ends_well([*START, *(word for pair in pairs for word in pair)]), drawn, 40 * share
    )


# ----------------------------------------------------------------------------------------------------------
# what bounds them


@pytest.mark.parametrize("action", [
    lambda: "x" * 2**31, lambda: os.kill(os.getpid(), 9), lambda: 3 ** (3**18) % 7, lambda: sys.exit(0),
    lambda: re.fullmatch("(a|aa)*b", "a" * 99),
], ids=["memory", "crash", "one long step", "exit", "search"])  # fmt: skip
def test_what_exceeds_its_limits_is_refused_and_leaves_us_alive(monkeypatch, capfd, action):
    monkeypatch.setattr(untrusted, "SECONDS", 1)
    with pytest.raises(ValueError, match=r"^the action crashes, or needs over 1 s or 1 GiB$"):
        untrusted.within_limits(action, "the action")
    assert "".join(capfd.readouterr()) == ""


def test_what_stays_within_its_limits_is_returned_and_its_reason_raised():
    assert untrusted.within_limits(lambda: [1, "\ud800"], "it") == [1, "\ud800"]
    with pytest.raises(ValueError, match=r"^invalid literal for int"):
        untrusted.within_limits(lambda: int("x"), "it")


def test_a_large_tokenizer_gets_more_time(monkeypatch):
    monkeypatch.setattr(untrusted, "SECONDS", 0)

    def spend():
        while time.process_time() < 1.3:  # of this process, which has just begun
            pass
        return 1

    assert untrusted.within_limits(spend, "it", 2**20) == 1


# ----------------------------------------------------------------------------------------------------------
# what reaches the terminal

CODES = ["\x1b[31mred\x1b[2J", "\x1b]0;title\x07", "\x9b1m\x90q\x9c", "a\rb\bc\x7f", "\u2028\u2029\x85",
         "\u202eevil\u202c\u2066\u200f", "\x00", "\ud800"]  # fmt: skip


@pytest.mark.parametrize("code", CODES)
def test_terminal_codes_in_texts_of_models_and_questions_are_shown_escaped(code):
    answer = record(0, 1, 4, prompt=f"1+1{code}?", response=f"it is {code} 2")
    answer |= {"majority": f"2{code}", "truth": f"2{code}"}
    shown = screen.responses([answer], [answer])
    assert shown.replace("\n", "").isprintable()
    assert all(text in shown for text in ("1+1", "it is", "majority 2", "truth 2"))
    assert untrusted.printable(code).isascii()


def test_an_ordinary_text_is_shown_as_it_is():
    text = "Let $x_1 \\neq \\frac{1}{2}$; 数学 naïve é, \U0001f600"
    assert untrusted.printable(text) == text == untrusted.shorten(text)
    assert untrusted.shorten("a" * 100 + "b" * 100) == "a" * 80 + " ... " + "b" * 80


# ----------------------------------------------------------------------------------------------------------
# what the sources never do

UNPICKLING = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
EVALUATING = {"eval", "exec", "compile", "__import__"}


def trusting(text):
    """Lines of a source that unpickle, evaluate text as code, or run code that came with a model."""
    found = []
    for node in ast.walk(ast.parse(text)):
        names = {alias.name.split(".")[0] for alias in node.names} if isinstance(node, ast.Import) else set()
        names |= {(node.module or "").split(".")[0]} if isinstance(node, ast.ImportFrom) else set()
        called = node.func if isinstance(node, ast.Call) else None
        evaluates = isinstance(called, ast.Name) and called.id in EVALUATING
        loads = isinstance(called, ast.Attribute) and ast.unparse(called) in ("torch.load", "torch.hub.load")
        remote = any(word.arg == "trust_remote_code" for word in node.keywords) if called else False
        found += [node.lineno] if names & UNPICKLING or evaluates or loads or remote else []
    return found


def test_nothing_is_unpickled_and_no_text_is_run():
    files = [ROOT / f"{name}.py" for name in ("ttrl", "rollout", "model", "rewards")]
    for folder in "distributed grading kernels report support".split():
        files += (ROOT / folder).glob("*.py")
    assert len(files) > 40
    assert [path for path in files if trusting(path.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize("line", [
    "import pickle", "from pickle import loads", "torch.load(path)", "eval('1')", "exec(text)",
    "__import__('os')", "AutoConfig.from_pretrained(folder, trust_remote_code=True)", "import os, dill",
])  # fmt: skip
def test_a_trusting_line_is_found(line):
    assert trusting(f"import torch\nmodel.eval()\ntorch.compile(f)\n{line}\n") == [4]
