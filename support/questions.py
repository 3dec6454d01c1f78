"""Load questions: load("aime") -> list[Question]. A benchmark is downloaded once, checked and cached."""

import functools
import hashlib
import http.client
import json
import math
import os
import re
import tempfile
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from grading.extraction import LETTERS, boxed_letter
from support.untrusted import parse_json, quote, shorten


@dataclass(frozen=True)
class Question:
    """A question. `answer` is the true one, for reports only; `kind` is "math" or "choice"."""

    prompt: str
    answer: str | None = None
    id: str = ""
    kind: str = "math"

    @functools.cached_property
    def letters(self) -> str:
        """Letters that may name a choice: the capitals that the prompt lists, or A to J if it lists none.

        Lower-case letters count too, unless the prompt uses them for a list of its own, a), b).

        >>> Question("Which star? A) the Sun B) Vega C) Rigel", kind="choice").letters
        'ABCabc'
        """
        capitals = _listed(self.prompt, LETTERS[:10]) or LETTERS[:10]
        return capitals if _listed(self.prompt, LETTERS[10:]) else capitals + capitals.lower()


@dataclass(frozen=True)
class Benchmark:
    """The settings of one of the paper's question sets (section 3.1)."""

    folder: str  # under verl/data/ of the authors' repository
    sha256: str
    epochs: int = 30
    questions_per_step: int = 8
    kind: str = "math"


BENCHMARKS = {
    "aime": Benchmark(
        "AIME-TTT", "f52c531f6919731115b491d056be701e760e115d4b1cd5b57f48de2251a85d66", epochs=80
    ),
    "amc": Benchmark("AMC-TTT", "c343f64e98b46c19f74e5c9991c3ed390da3acffe29b84d6c2b5b5b01e497eea"),
    "math": Benchmark("MATH-TTT", "c1680e2e2e034486ad1b7f5aa6dec7ce47ec801769d011cc5d6934ac139fcd46", 10, 32),
    "math-l1": Benchmark("MATH-L1-TTT", "ea08037b069f66c632855fbdcf529a981164da29d0073f60c9dc9df95c9494af"),
    "math-l2": Benchmark("MATH-L2-TTT", "7a071bfb35f518a890ce2f7f5436baf874c1fa9c7c345a3397b2eb9e653c96ff"),
    "math-l3": Benchmark("MATH-L3-TTT", "36885c8c6fb3484abda81760129e8856551a4e1a52f43b053e8fddb1048125f9"),
    "math-l4": Benchmark("MATH-L4-TTT", "013f29732266f5fe7fe1e8b748c3e5f63c6246d1671bac0f32aaf38733ddfda7"),
    "math-l5": Benchmark("MATH-L5-TTT", "6fe7c3d8cbd7c0500a988def00e960f1ea5784f0a92478a0b18bbf9837e34efd"),
    "gpqa": Benchmark(
        "GPQA-TTT", "b57fd28a487e5ae1cbf7155f50e3e35254940250c7c46874de407a84bda3a9b5", kind="choice"
    ),
}
USER_FILE_EPOCHS = 10
PROMPT_KEYS = ("prompt", "question", "problem")  # the first one in a row counts
SOURCE = "https://raw.githubusercontent.com/PRIME-RL/TTRL/3e2cc9376dc7486256f6021b37c4353d0e1abe2b/verl/data"


def _listed(prompt: str, letters: str) -> str:
    """The first of these letters, as many as a prompt lists, A) B) C); "" if it lists none."""
    count = 0
    for match in re.finditer(r"(?:^|[\s(])([A-Ja-j])[).:]", prompt):
        count += match[1] == letters[count : count + 1]
    return letters[:count] if count > 1 else ""


def load(name_or_file: str) -> list[Question]:
    """Load the questions of a benchmark (a name in BENCHMARKS), of "tiny", or of a local file.

    A file is a .json array or .jsonl lines of objects with "prompt" and optional "answer", "id" and "kind"
    ("math" or "choice"). The prompt may use any key in PROMPT_KEYS, and may be a chat of one user turn. Of an
    answer such as GSM8K's, "2+2=4 #### 4", only the part after the last "####" counts. Raises ValueError or
    FileNotFoundError with one sentence: the file, the place and what would be right.
    """
    benchmark = BENCHMARKS.get(name_or_file)
    if benchmark:
        return _read(_download(name_or_file, benchmark), f"{benchmark.folder}/train.json", benchmark.kind)
    path = (
        Path(__file__).parents[1] / "tiny" / "questions.json"
        if name_or_file == "tiny"
        else _local(name_or_file)
    )
    if path.suffix.lower() not in (".json", ".jsonl"):
        raise ValueError(
            f"{path}: a question file ends in .json or .jsonl; known names: tiny, {', '.join(BENCHMARKS)}"
        )
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; give a .json or .jsonl file")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such question file")
    benchmark = benchmark_of(name_or_file)
    return _read(path.read_bytes(), str(path), benchmark.kind if benchmark else "math")


def benchmark_of(name_or_file: str) -> Benchmark | None:
    """The settings of a benchmark, by its name, or by the SHA-256 of a local copy; None for other files.

    >>> benchmark_of("aime").epochs
    80
    """
    if name_or_file in BENCHMARKS or name_or_file == "tiny" or not _local(name_or_file).is_file():
        return BENCHMARKS.get(name_or_file)
    sha256 = hashlib.sha256(_local(name_or_file).read_bytes()).hexdigest()
    return next((benchmark for benchmark in BENCHMARKS.values() if benchmark.sha256 == sha256), None)


def _local(file: str) -> Path:
    return Path(file).expanduser()


def _download(name: str, benchmark: Benchmark) -> bytes:
    """The benchmark's bytes, from the cache or from GitHub at the pinned commit, checked against SHA-256."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cached, url = root / "ttrl" / f"{name}.json", f"{SOURCE}/{benchmark.folder}/train.json"
    try:
        data = cached.read_bytes() if cached.is_file() else b""
    except OSError:
        data = b""  # if the cache is not writable either, writing it below raises
    try:
        if hashlib.sha256(data).hexdigest() == benchmark.sha256:
            return data
        with urllib.request.urlopen(url, timeout=30) as response:
            data = response.read()
        if hashlib.sha256(data).hexdigest() != benchmark.sha256:
            raise OSError(f"the SHA-256 of the {len(data)} bytes received is not {benchmark.sha256}")
    except (OSError, http.client.HTTPException) as error:
        raise FileNotFoundError(
            f"{name}: cannot fetch {url} ({error}); save that file yourself and pass --data FILE"
        ) from error
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        # Written aside and renamed, so that readers such as other ranks see the whole file or none.
        with tempfile.NamedTemporaryFile(dir=cached.parent, delete=False) as file:
            file.write(data)
        os.replace(file.name, cached)
        return data
    except OSError as error:
        raise ValueError(
            f"{name}: cannot write to {cached.parent} ({error}); set XDG_CACHE_HOME to a writable folder"
        ) from None


def _read(data: bytes, where: str, kind: str) -> list[Question]:
    """Parse the bytes of a question file; `kind` is the default of its rows."""
    try:
        text = data.decode("utf-8-sig")  # with or without a byte-order mark
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: is not UTF-8 text (byte {error.start})") from None
    if where.lower().endswith(".jsonl"):
        lines = enumerate(text.split("\n"), 1)  # not splitlines: a JSON string may contain U+2028
        places = [(f"{where}, line {i}", line) for i, line in lines if line.strip()]
        rows = [(place, parse_json(line, place)) for place, line in places]
    else:
        rows = parse_json(text, where) if text.strip() else []
        if not isinstance(rows, list):
            raise ValueError(f'{where}: a .json file holds one array of {{"prompt": ...}} objects')
        rows = [(f"{where}, row {i}", row) for i, row in enumerate(rows, 1)]
    if not rows:
        raise ValueError(f'{where}: has no questions; at least one {{"prompt": ...}} is needed')
    questions, seen = [], {}
    for index, (place, row) in enumerate(rows):
        question = _question(row, place, index, kind)
        if question.id in seen:
            raise ValueError(
                f'{place}: "id" {quote(question.id)} is also that of {seen[question.id]}; ids must differ'
            )
        seen[question.id] = place
        questions.append(question)
    return questions


def _question(row, place: str, index: int, kind: str) -> Question:
    """Check a row and turn it into a Question. The default id is the row's index."""
    if not isinstance(row, dict):
        raise ValueError(f'{place}: is not an object like {{"prompt": ..., "answer": ...}}')
    prompt, kind = _prompt(row, place), row.get("kind", kind)
    if kind not in ("math", "choice"):
        raise ValueError(f'{place}: "kind" must be "math" or "choice", not {quote(kind)}')
    answer, identity = row.get("answer"), row.get("id", row.get("unique_id"))  # as in MATH
    for key, value in ("answer", answer), ("id", identity):
        plain = isinstance(value, (str, int, float, type(None))) and not isinstance(value, bool)
        if not plain or (isinstance(value, float) and not math.isfinite(value)):
            raise ValueError(f'{place}: "{key}" must be a string or a finite number, not {quote(value)}')
    answer = None if answer is None else str(answer).rpartition("####")[2].strip() or None
    identity = str(index) if identity in (None, "") else str(identity)
    for key, value in ("prompt", prompt), ("answer", answer or ""), ("id", identity):
        if lone := lone_surrogate(value):
            raise ValueError(f"{place}: the {key} holds {lone!r}, half of a surrogate pair; write both")
    question = Question(prompt, answer, identity, kind)
    if kind == "choice" and answer is not None and boxed_letter(answer, question.letters) is None:
        last = max(filter(str.isupper, question.letters))
        raise ValueError(
            f'{place}: "answer" of a choice must be a letter from A to {last}, not {quote(answer)}'
        )
    return question


def _prompt(row: dict, place: str) -> str:
    """The prompt of a row, under one of PROMPT_KEYS: a string, or a chat of one user turn."""
    key = next((key for key in PROMPT_KEYS if key in row), None)
    if key is None:
        there = ", ".join(map(json.dumps, row)) or "none"
        raise ValueError(f'{place}: has no "prompt" (or "question", "problem"); its keys: {shorten(there)}')
    prompt = row[key]
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], dict):
        prompt = prompt[0].get("content") if prompt[0].get("role") == "user" else None
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f'{place}: "{key}" must be a non-empty string, or a chat of one user turn')
    return prompt


def lone_surrogate(text: str) -> str | None:
    """The first lone surrogate in a text, which cannot be tokenized or written to a file; or None."""
    return next((character for character in text if "\ud800" <= character <= "\udfff"), None)
