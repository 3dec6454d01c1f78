"""questions.py: loading, prompts."""

import hashlib
import io
import json
import sys
import urllib.error
import urllib.request
from http.client import IncompleteRead
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from grading.extraction import LETTERS
from support import questions
from support.questions import BENCHMARKS, Question, benchmark_of, load

DATA = Path(__file__).parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the benchmark files are not at hand")

# -----------------------------------------------------------------------------------------------------------
# Loading


def write(tmp_path, content, name="q.json"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


@pytest.mark.parametrize("name, content, wanted", [
    ("q.json", json.dumps([{"prompt": "1+1?", "answer": 2, "id": 7},
                           {"prompt": "Which?", "kind": "choice", "answer": "B"}, {"prompt": "?"}]),
     [Question("1+1?", "2", "7", "math"), Question("Which?", "B", "1", "choice"),
      Question("?", None, "2", "math")]),
    ("q.JSONL",
     '\ufeff{"prompt": "a\u2028b", "answer": 142.0}\r\n\r\n{"prompt": "c", "unique_id": "t/1"}\r\n',
     [Question("a\u2028b", "142.0", "0"), Question("c", None, "t/1")]),
    ("q.json", '\ufeff[\r\n{"prompt": "p", "answer": " "}]', [Question("p", None, "0")]),
    # GSM8K, MATH-500, a chat of one turn, a surrogate pair; the first name of a prompt is taken
    ("q.json", json.dumps([{"question": "2+2?", "answer": "2 #### and\n2 are 4\n#### 1,004"},
                           {"problem": "1+1?", "solution": "...", "answer": "2", "unique_id": "m/1"},
                           {"prompt": [{"role": "user", "content": "3+3?"}], "question": "another"},
                           {"prompt": "\U0001f600\0", "answer": "####"}]),
     [Question("2+2?", "1,004", "0"), Question("1+1?", "2", "m/1"), Question("3+3?", None, "2"),
      Question("\U0001f600\0", None, "3")]),
    ("q.json", json.dumps([{"prompt": "x" * 1_000_000}]), [Question("x" * 1_000_000, None, "0")]),
], ids=["json", "jsonl", "marks", "other data sets", "long"])  # fmt: skip
def test_load(tmp_path, name, content, wanted):
    assert load(write(tmp_path, content, name)) == wanted


@pytest.mark.parametrize(
    "prompt,letters",
    [
        ("Which?\nA. one\nB. two\nC. three\nD. four\nE. five", "ABCDEabcde"),
        ("Which? (A) 1 (B) 2 (C) 3", "ABCabc"),
        ("Densest?\na) the first\nb) the second\n\nA. b\nB. a", "AB"),
        ("Which star of type A. Vega?", LETTERS),
    ],
)
def test_letters_of_choices(tmp_path, prompt, letters):
    """And a truth that none of them can match is refused."""
    assert Question(prompt, kind="choice").letters == letters
    row = {"prompt": prompt, "kind": "choice", "answer": letters[0]}
    assert load(write(tmp_path, json.dumps([row])))[0].answer == "A"
    for answer in ("K", "7", chr(ord(max(filter(str.isupper, letters))) + 1)):
        with pytest.raises(ValueError, match=f"row 1: .*must be a letter from A to .*, not '{answer}'"):
            load(write(tmp_path, json.dumps([{**row, "answer": answer}])))


BAD = [
    ("[]", "q.json", "has no questions"),
    ("", "q.json", "has no questions"),
    ("", "q.jsonl", "has no questions"),
    ('{"prompt": "x"}', "q.json", "one array"),
    ("[{]", "q.json", "not valid JSON"),
    ("[" * 100_000, "q.json", "not valid JSON"),
    ('{"prompt": "x"}\nnot json\n', "q.jsonl", "line 2: is not valid JSON"),
    ("[3]", "q.json", "row 1: is not an object"),
    ('[{"prompt": "x"}, {"Problem": "y", "answer": "1"}]', "q.json",
     'row 2: has no "prompt" (or "question", "problem"); its keys: "Problem", "answer"'),
    ("[{}]", "q.json", 'row 1: has no "prompt" (or "question", "problem"); its keys: none'),
    ('[{"problem": null}]', "q.json",
     'row 1: "problem" must be a non-empty string, or a chat of one user'),
    ('[{"prompt": []}]', "q.json", 'row 1: "prompt" must be'),
    ('[{"prompt": [{"role": "system", "content": "x"}]}]', "q.json", 'row 1: "prompt" must be'),
    ('[{"prompt": [{"role": "user", "content": "x"}, {"role": "user", "content": "y"}]}]', "q.json",
     'row 1: "prompt" must be'),
    ('[{"prompt": [{"role": "user", "content": ["x"]}]}]', "q.json", 'row 1: "prompt" must be'),
    ('[{"prompt": ["x"]}]', "q.json", 'row 1: "prompt" must be'),
    (r'{"prompt": "\ud800 2+2"}', "q.jsonl",
     r"line 1: the prompt holds '\ud800', half of a surrogate pair; write both"),
    (r'[{"prompt": "x"}, {"prompt": "x", "answer": "4 \udfff"}]', "q.json", "row 2: the answer holds"),
    (r'[{"prompt": "x", "id": "\ud83d\ud83d"}]', "q.json", "row 1: the id holds"),
    ('[{"prompt": " \\n"}]', "q.json", 'row 1: "prompt" must be'),
    ('[{"prompt": 5}]', "q.json", 'row 1: "prompt" must be'),
    ('{"prompt": "x"}\n{"prompt": ""}', "q.jsonl", 'line 2: "prompt" must be'),
    ('[{"prompt": "x", "id": "a"}, {"prompt": "y", "id": "a"}]', "q.json", "row 2: \"id\" 'a' is also that"),
    ('[{"prompt": "x", "id": 1}, {"prompt": "y"}]', "q.json", "row 2: \"id\" '1' is also that"),
    ('[{"prompt": "x", "answer": ["1"]}]', "q.json", 'row 1: "answer" must be'),
    ('[{"prompt": "x", "id": {}}]', "q.json", 'row 1: "id" must be'),
    ('[{"prompt": "x", "kind": "essay"}]', "q.json", 'row 1: "kind" must be'),
    (b"\xff\xfe[\x00", "q.json", "not UTF-8"),
    ("x", "q.csv", "ends in .json or .jsonl"),
    *((f'{{"prompt": "1+1=?", "{key}": {value}}}\n', "odd.jsonl",
       f'line 1: "{key}" must be a string or a finite number')
      for key in ("answer", "id") for value in ("NaN", "Infinity", "1e999", "true", "[1]")),
]  # fmt: skip


@pytest.mark.parametrize("content,name,message", BAD)
def test_bad_files_are_refused_in_one_sentence(tmp_path, content, name, message):
    file = write(tmp_path, content, name)
    with pytest.raises(ValueError) as error:
        load(file)
    assert message in str(error.value) and file in str(error.value) and "\n" not in str(error.value)


def test_missing_file_folder_and_unknown_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such question file"):
        load(str(tmp_path / "none.json"))
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(ValueError, match="is a folder"):
        load(str(tmp_path / "folder.json"))
    with pytest.raises(ValueError, match="known names: tiny, aime"):
        load("aim")


def test_settings():
    settings = {name: (row.epochs, row.questions_per_step) for name, row in BENCHMARKS.items()}
    assert [settings[name] for name in ("aime", "amc", "math", "gpqa")] == [
        (80, 8),
        (30, 8),
        (10, 32),
        (30, 8),
    ]
    assert settings["math-l3"][0] == 30 and settings["math-l1"][1] == 8
    assert benchmark_of("tiny") is None and benchmark_of("nothing.json") is None


@needs_data
def test_local_copy_of_a_benchmark_is_known_by_its_bytes(tmp_path):
    copy = write(tmp_path, (DATA / "gpqa.json").read_bytes(), "mine.json")
    assert benchmark_of(copy) is BENCHMARKS["gpqa"]
    assert {question.kind for question in load(copy)} == {"choice"}
    assert benchmark_of(write(tmp_path, (DATA / "gpqa.json").read_bytes() + b"\n", "other.json")) is None
    assert {name: len(load(str(DATA / f"{name}.json"))) for name in ("aime", "amc", "math", "gpqa")} == {
        "aime": 30, "amc": 83, "math": 500, "gpqa": 198
    }  # fmt: skip


@pytest.fixture
def web(tmp_path, monkeypatch):
    """A cache folder of its own, a benchmark of two questions, a network that serves or raises web.data."""

    class Web:
        data = b'[{"prompt": "one", "answer": "1"}, {"prompt": "two", "id": "b"}]'
        cached = tmp_path / "cache" / "ttrl" / "aime.json"

        def urlopen(self, url, timeout):
            self.calls.append(url)
            if isinstance(self.data, Exception):
                raise self.data
            return self.data if hasattr(self.data, "read") else io.BytesIO(self.data)

    web = Web()
    web.calls = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(urllib.request, "urlopen", web.urlopen)
    fake = questions.Benchmark("AIME-TTT", hashlib.sha256(web.data).hexdigest())
    monkeypatch.setitem(BENCHMARKS, "aime", fake)
    return web


def test_download_is_checked_cached_and_repaired(web):
    wanted = [Question("one", "1", "0"), Question("two", None, "b")]
    assert load("aime") == wanted and web.cached.read_bytes() == web.data
    assert web.calls == [
        "https://raw.githubusercontent.com/PRIME-RL/TTRL/3e2cc9376dc7486256f6021b37c4353d0e1abe2b"
        "/verl/data/AIME-TTT/train.json"
    ]
    assert load("aime") == wanted and len(web.calls) == 1  # from the cache
    web.cached.write_bytes(web.data[:20])
    assert load("aime") == wanted and len(web.calls) == 2 and web.cached.read_bytes() == web.data
    assert list(web.cached.parent.iterdir()) == [web.cached]  # nothing half-written is left


class Broken:
    """A connection that breaks in the middle of the file."""

    __enter__ = lambda self: self  # noqa: E731
    __exit__ = lambda self, *_: None  # noqa: E731

    def read(self):
        raise IncompleteRead(b"[", 100)


@pytest.mark.parametrize(
    "data", [urllib.error.URLError("no network"), TimeoutError("slow"), b"<html>", b"", Broken()]
)
def test_failed_download_says_what_to_do(web, data):
    web.data = data
    with pytest.raises(FileNotFoundError) as error:
        load("aime")
    message = str(error.value)
    assert "aime" in message and "--data FILE" in message and "https://" in message and "\n" not in message
    assert not web.cached.exists()


def test_questions_that_cannot_be_cached_say_where(web):
    """The network answers, the disk does not."""
    web.cached.parent.parent.mkdir()
    web.cached.parent.write_text("a file where the folder should be")
    with pytest.raises(ValueError, match=r"aime: cannot write to .*ttrl .*set XDG_CACHE_HOME"):
        load("aime")
