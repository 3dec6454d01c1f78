r"""What is asked and how it is graded: load questions, build prompts, extract answers, decide equality.

Four sections, in the order in which a step uses them:

1. Questions:  load("aime") -> list[Question]; a benchmark is downloaded once, checked and cached.
2. Prompts:    in support/prompts.py.
3. Extraction: extract_answer(response) -> "the last \boxed{...}", a phrase, or the last number; None is no answer.
4. Equality:   same_answer("1/2", "0.5") -> True. Plain numbers are compared here, the rest by math-verify.

Every response of a language model is hostile text until proven otherwise. So extraction is linear in the length, and
what sympy could take long over is refused *before* it is parsed, by rules that do not depend on time: a refused answer
equals only the same spelling. No text is ever evaluated as Python code: math-verify's own `parse` would hand some of
it to sympy's `parse_expr`, which uses `eval`, so only its LaTeX parser and its `verify` are used.
"""

import hashlib
import http.client
import json
import logging
import math
import os
import re
import signal
import tempfile
import threading
import time
import urllib.request
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

# ---------------------------------------------------------------------------------------------------------------------
# 1. Questions


@dataclass(frozen=True)
class Question:
    """One question; `answer` is only ever read for reports, `kind` ("math" or "choice") says how answers look."""

    prompt: str
    answer: str | None = None
    id: str = ""
    kind: str = "math"


@dataclass(frozen=True)
class Benchmark:
    """The settings that come with a question set of the paper (paper, section 3.1; SPEC.md, section 0)."""

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
SOURCE = "https://raw.githubusercontent.com/PRIME-RL/TTRL/3e2cc9376dc7486256f6021b37c4353d0e1abe2b/verl/data"


def load(name_or_file: str) -> list[Question]:
    """Questions of a benchmark ("aime", "amc", "math", "math-l1".."math-l5", "gpqa"), of "tiny", or of a local file.

    A file is a .json array or .jsonl lines of {"prompt", optional "answer", "id", "kind" ("math" or "choice")}.
    Raises ValueError or FileNotFoundError, one sentence that names the file, the place and what would be right.
    """
    benchmark = BENCHMARKS.get(name_or_file)
    if benchmark:
        return _read(_download(name_or_file, benchmark), f"{benchmark.folder}/train.json", benchmark.kind)
    path = (
        Path(__file__).parent / "tiny" / "questions.json" if name_or_file == "tiny" else _local(name_or_file)
    )
    if path.suffix.lower() not in (".json", ".jsonl"):
        raise ValueError(
            f"{path}: a question file ends in .json or .jsonl; known names: tiny, {', '.join(BENCHMARKS)}"
        )
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; a .json or .jsonl file is needed")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such question file")
    benchmark = benchmark_of(name_or_file)
    return _read(path.read_bytes(), str(path), benchmark.kind if benchmark else "math")


def benchmark_of(name_or_file: str) -> Benchmark | None:
    """Settings of a benchmark, by its name or for a local copy by its SHA-256; None for any other file.

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
    """The benchmark's bytes from the cache, else from GitHub at the pinned commit; checked both times."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cached, url = root / "ttrl" / f"{name}.json", f"{SOURCE}/{benchmark.folder}/train.json"
    try:
        data = cached.read_bytes() if cached.is_file() else b""
    except OSError:
        data = b""  # a cache that cannot be read cannot be written either, which is said below
    try:
        if hashlib.sha256(data).hexdigest() == benchmark.sha256:
            return data
        with urllib.request.urlopen(url, timeout=30) as response:
            data = response.read()
        if hashlib.sha256(data).hexdigest() != benchmark.sha256:
            raise OSError(f"{len(data)} bytes came whose SHA-256 is not {benchmark.sha256}")
    except (OSError, http.client.HTTPException) as error:
        raise FileNotFoundError(
            f"{name}: cannot fetch {url} ({error}); save that file yourself and pass --data FILE"
        ) from error
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        # Written aside and renamed: a reader, another rank for one, sees the whole file or none.
        with tempfile.NamedTemporaryFile(dir=cached.parent, delete=False) as file:
            file.write(data)
        os.replace(file.name, cached)
        return data
    except OSError as error:
        raise ValueError(
            f"{name}: cannot write to {cached.parent} ({error}); set XDG_CACHE_HOME to a folder that can be written"
        ) from None


def _read(data: bytes, where: str, kind: str) -> list[Question]:
    """Parse the bytes of a question file; `kind` holds for rows that do not name their own."""
    try:
        text = data.decode("utf-8-sig")  # with or without a byte-order mark
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: is not UTF-8 text (byte {error.start})") from None
    if where.lower().endswith(".jsonl"):
        lines = enumerate(text.split("\n"), 1)  # not splitlines: U+2028 may stand inside a JSON string
        rows = [
            (f"{where}, line {i}", _json(line, f"{where}, line {i}")) for i, line in lines if line.strip()
        ]
    else:
        rows = _json(text, where) if text.strip() else []
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
                f'{place}: "id" {question.id!r} is that of {seen[question.id]} too; ids must differ'
            )
        seen[question.id] = place
        questions.append(question)
    return questions


def _json(text: str, where: str):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # RecursionError: thousands of nested brackets
        raise ValueError(f"{where}: is not valid JSON ({error})") from None


def _question(row, place: str, index: int, kind: str) -> Question:
    """Check one row and turn it into a Question; a missing id becomes the row's index."""
    if not isinstance(row, dict):
        raise ValueError(f'{place}: is not an object like {{"prompt": ..., "answer": ...}}')
    prompt, kind = row.get("prompt"), row.get("kind", kind)
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f'{place}: "prompt" must be a text that is not empty')
    if kind not in ("math", "choice"):
        raise ValueError(f'{place}: "kind" must be "math" or "choice", not {kind!r}')
    identity = row.get("id", row.get("unique_id"))  # the MATH level files say unique_id
    for key, value in ("answer", row.get("answer")), ("id", identity):
        plain = isinstance(value, (str, int, float, type(None))) and not isinstance(value, bool)
        if not plain or (isinstance(value, float) and not math.isfinite(value)):
            raise ValueError(f'{place}: "{key}" must be a text or a finite number, not {value!r}')
    answer = None if row.get("answer") is None else str(row["answer"]).strip() or None
    return Question(prompt, answer, str(index) if identity in (None, "") else str(identity), kind)


# ---------------------------------------------------------------------------------------------------------------------
# 3. Extraction

BOX_OR_BRACE = re.compile(
    r"\\f?box(?:ed)?\s*\{|\\[{}]|[{}]"
)  # escaped braces belong to the answer, not the nesting
BARE_BOX = re.compile(r"\\boxed\s*(-?[0-9A-Za-z][0-9A-Za-z.,/]*)(?=[^0-9A-Za-z.,/])")
ANSWER_IS = re.compile(r"answer\s+is\b[\s:]*", re.IGNORECASE)
NUMBER = re.compile(r"(?<![\w.])-?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?:\.\d+|(?<=\d))(?:/\d+)?\\?%?")
LETTER = r"(?<![A-Za-z\\])([A-D])(?![A-Za-z'])"
CHOICE_IS = re.compile(
    r"(?i:answer\s{0,9}(?:is|:)[\s:]{0,9}(?:\\text|option|choice)?)[\s*$({\[]{0,9}" + LETTER
)
# "A planet ..." begins with the article; "A is correct" with a choice.
LAST_LETTER = re.compile(LETTER + r"(?!(?<=A)\s+(?!is\b|and\b|or\b|because\b|since\b)[a-z])")


def extract_answer(text: str, kind: str = "math", truncated: bool = False) -> str | None:
    r"""The answer that a response gives, or None. Linear in the length of the text.

    The last complete \boxed{...} (an empty one is no answer); else what follows the last "answer is"; else the last
    number, but not in a truncated response, where it is whatever was being written. Choices: the letter in the box;
    else "answer is (X)"; else, unless truncated, the last capital A to D that stands alone. (SPEC.md, section 0.)

    >>> extract_answer(r"so \boxed{\frac{1}{2}} it is")
    '\\frac{1}{2}'
    >>> extract_answer("3 times 4 makes 12"), extract_answer("3 times 4 makes 1", truncated=True)
    ('12', None)
    >>> extract_answer("A hot star, so (B).", kind="choice")
    'B'
    """
    box = _last_box(text)
    if kind == "choice":
        found = _letter(box) if box else None
        patterns = [CHOICE_IS] if truncated else [CHOICE_IS, LAST_LETTER]
        return found or next((m[-1].upper() for m in (p.findall(text) for p in patterns) if m), None)
    if box is not None:
        return box or None
    answer = _phrase(text, truncated)
    if answer or truncated:
        return answer
    number = _last(NUMBER, text)
    return number.group() if number else None


def _last(pattern: re.Pattern, text: str) -> re.Match | None:
    last = None
    for match in pattern.finditer(text):
        last = match
    return last


def _last_box(text: str) -> str | None:
    r"""Content of the complete box that begins last, None without one; one pass, however deep the nesting."""
    last_start, answer, open_braces = -1, None, []
    for match in BOX_OR_BRACE.finditer(text):
        token = match.group()
        if token == "}":
            start, content_start = open_braces.pop() if open_braces else (-1, 0)
            if start > last_start:
                last_start, answer = start, (content_start, match.start())
        elif token[-1] == "{" and token != "\\{":
            open_braces.append((match.start() if token != "{" else -1, match.end()))
    for match in BARE_BOX.finditer(text, last_start + 1):
        answer = match.span(1)
    return text[slice(*answer)].strip() if answer else None


def _phrase(text: str, truncated: bool) -> str | None:
    """What follows the last "answer is": the formula in dollars, else the number, else the rest of the sentence."""
    match = _last(ANSWER_IS, text)
    if match is None:
        return None
    sentence = text[match.end() : match.end() + 300].strip("*").lstrip()
    formula = re.match(r"\$\$?([^$]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", sentence, re.DOTALL)
    if formula:
        return next(group for group in formula.groups() if group).strip() or None
    end = re.search(r"\n|\.(?=\s|$)|\*\*|\s(?:because|since|so|which|where)\b", sentence)
    if end is None and (truncated or len(sentence) > 100):
        return None
    sentence = sentence[: end.start() if end else None].strip(" \t*$:,;")
    words_follow = re.fullmatch(rf"({NUMBER.pattern})[,;]?\s+[A-Za-z][A-Za-z ,']*", sentence)
    return (words_follow.group(1) if words_follow else sentence) or None


def _letter(answer: str) -> str | None:
    r"""The choice that a boxed text names: "B", "(B)", "\text{B}", "B. The Sun", but not "A or B"."""
    answer = re.sub(r"\\[A-Za-z]+", " ", answer[:1000])
    leading = re.match(r"[\s{(\[*]*([A-D])\s*(?:[.):}\]]|$)", answer)
    letters = {leading.group(1)} if leading else set(LAST_LETTER.findall(answer))
    return letters.pop() if len(letters) == 1 else None


# ---------------------------------------------------------------------------------------------------------------------
# 4. Equality

MAX_NUMBER, MAX_LATEX, MAX_NESTING = (
    300,
    200,
    8,
)  # characters of a plain number, of a formula; depth of its brackets
TIME_LIMIT = 5.0  # seconds for one comparison
grading_timeouts = 0  # comparisons that ran into the limit, which the rules below should make impossible

REWRITES = [  # spelling, not meaning; in this order
    (
        re.compile(r"[\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]"),
        "",
    ),  # zero-width and right-to-left marks
    (re.compile(r"[\u2212\u2013]"), "-"),
    (re.compile("\u03c0"), r"\\pi "),
    (re.compile("\u00d7"), r"\\times "),
    (re.compile("\u221e|\\binfinity\\b"), r"\\infty "),
    (re.compile(r"\\[dtc]frac(?![a-z])"), r"\\frac"),
    (re.compile(r"\\(?:left|right|displaystyle|mathbf|boldsymbol)(?![a-z])"), ""),
    (re.compile(r"\\text(?:bf|it|rm|normal)(?![a-z])|\\mbox(?![a-z])|\\math(?:rm|it)(?![a-z])"), r"\\text"),
    (re.compile(r"(?<!\\)\\!\s*|(?<!\\)\\\$|\$|^\\[(\[]|\\[)\]]$"), ""),
    (re.compile(r"(?<!\\)\\[,;: ]|~|\s+"), " "),
    (re.compile(r"\s*\{,\}\s*"), ","),
    (re.compile(r"\\%|\s*(?:\\text\{\s*)?\b(?:percent|pct)\b(?:\s*\})?"), "%"),
    (re.compile(r"\s*(?:\^\s*\{?\s*\\circ\s*\}?|\u00b0|\\degree)"), ""),
]
ASSIGNMENT = re.compile(
    r"([A-Za-z]{1,2}(?:\([a-z]\))?) ?(?:=|\\in(?![a-z])) ?(?!.*(?:=|[<>]|\\[lgn]eq?(?![a-z])))"
)
UNIT_WORD = (
    "(?:(?:square|sq|cubic|cu|per) )*(?:[cmk]?m|mm|inch(?:es)?|in|feet|foot|ft|yards?|miles?|[cmk]?g|pounds?|grams?"
    "|(?:centi|milli|kilo)?(?:meter|metre|gram|liter)s?|units?|degrees?|deg|radians?|seconds?|minutes?|hours?|days?"
    "|weeks?|months?|years?|dollars?|cents?|mph|ways?|people|students?|points?|coins?)"
)
UNIT = re.compile(rf"(?<=[\d}}])(?: ?\\text\{{[^{{}}]*\}}| {UNIT_WORD})(?:\^\s*\{{?[23]\}}?)?$")
PLAIN_NUMBER = re.compile(
    r"(?P<sign>[-+]?) ?(?:\\frac ?(?:\{ ?(?P<a>-?\d+) ?\}|(?P<a1>\d)) ?(?:\{ ?(?P<b>\d+) ?\}|(?P<b1>\d))"
    r"|(?P<n>\d+) ?/ ?(?P<d>\d+)|(?P<number>\d{1,3}(?:, ?\d{3})+(?:\.\d*)?|\d+\.?\d*|\.\d+)"
    r"(?:_\{?(?P<base>\d+)\}?)?) ?(?P<pct>%?)"
)


def same_answer(a: str, b: str, kind: str = "math") -> bool:
    r"""Whether two answers are mathematically equal: exactly, so 0.333 is not 1/3. Symmetric; raises nothing.

    A percent equals both of its readings (50% is 50 and 0.5), so equality is not transitive. Units and degree marks are
    dropped. "x = 5" equals "5", and a list is a set: "1, 2" equals "2, 1". Text is compared without case.

    >>> same_answer(r"\frac{1}{2}", "0.50"), same_answer(r"\sqrt{12}", r"2\sqrt{3}"), same_answer("50%", "0.5")
    (True, True, True)
    >>> same_answer("50", "0.5"), same_answer("(1,2)", "(2,1)"), same_answer("(B)", "B", kind="choice")
    (False, False, True)
    """
    if kind == "choice":
        return (_letter(a.upper()) or a.strip()) == (_letter(b.upper()) or b.strip())
    if a == b:
        return True
    if max(len(a), len(b)) > MAX_NUMBER:  # too long for a number or a formula, or for the cache
        return a.split() == b.split()
    return _same(*sorted((a, b)))


@lru_cache(maxsize=100_000)
def _same(a: str, b: str) -> bool:
    a, b = _clean(a), _clean(b)
    if a.replace(" ", "") == b.replace(" ", ""):
        return True
    left_a, left_b = ASSIGNMENT.match(a), ASSIGNMENT.match(b)
    if left_a and left_b and left_a[1] != left_b[1]:
        return False
    if left_a and (
        left_b or not RELATION.search(b)
    ):  # x = 5 against 5, but y = 2x against 2x - y = 0 stays whole
        a = a[left_a.end() :]
    if left_b and (left_a or not RELATION.search(a)):
        b = b[left_b.end() :]
    values_a, values_b = _values(a), _values(b)
    if values_a and values_b:
        return values_a <= values_b or values_b <= values_a
    words_a, words_b = _words(a), _words(b)
    if words_a or words_b:
        return words_a == words_b
    return _same_formula(a, b)


@lru_cache(maxsize=10_000)
def _clean(answer: str) -> str:
    r"""One spelling for what is often spelled in several ways: spaces, \left, \dfrac, $, degrees, units, full stop."""
    for pattern, replacement in REWRITES:
        answer = pattern.sub(replacement, answer)
    answer = UNIT.sub("", answer.strip().rstrip(".").rstrip()).strip()
    single = re.fullmatch(r"(?:\\text ?\{ ?)?\(?([A-Za-z])\)? ?\}?", answer)  # \text{(B)} is B
    return single.group(1) if single else answer


@lru_cache(maxsize=10_000)
def _values(answer: str) -> frozenset[Fraction]:
    """Exact values that a plain number may stand for; empty if it is none. 50% is {50, 1/2} and 11_2 is {11, 3}."""
    match = PLAIN_NUMBER.fullmatch(answer)
    if match is None:
        return frozenset()
    group = match.groupdict()
    number = (group["number"] or "").replace(",", "").replace(" ", "")
    numerator, denominator = group["a"] or group["a1"] or group["n"], group["b"] or group["b1"] or group["d"]
    if denominator and int(denominator) == 0:
        return frozenset()
    value = Fraction(number) if number else Fraction(int(numerator), int(denominator))
    values = {value, value / 100} if group["pct"] else {value}
    if group["base"] and number.isdigit() and int(max(number)) < int(group["base"]) <= 36:
        values.add(Fraction(int(number, int(group["base"]))))
    return frozenset(-value if group["sign"] == "-" else value for value in values)


def _words(answer: str) -> str:
    r"""An answer in words, without case or the \text around it; empty if it is a formula (xyz may be a product)."""
    match = re.fullmatch(r"\\text ?\{([^{}\\]*)\}|(?=.{4})([A-Za-z]{2,}(?: [A-Za-z']+)*)", answer)
    return " ".join((match[1] or match[2] or "").casefold().split()) if match else ""


# What the parser gets must be built of these alone; integrals, sums, limits, determinants and the like are refused.
COMMAND_NAMES = """
    frac sqrt pi cdot times div pm mp infty cup cap setminus in text begin end pmatrix bmatrix matrix vmatrix sin
    cos tan cot sec csc arcsin arccos arctan log ln exp binom le leq ge geq lt gt ne neq to emptyset varnothing
    mathbb alpha beta gamma delta epsilon theta lambda mu nu rho sigma tau phi varphi psi omega lfloor rfloor
    lceil rceil lvert rvert quad langle rangle
"""
COMMANDS = set(re.findall("[a-z]+", COMMAND_NAMES))
INTERVAL_END = re.compile(r"(?:^|(?<=[(\[,<=eqtn])) ?[-+]? ?\\infty ?(?=[,)\]<]|\\le|$)")
TRIGONOMETRY = {"sin", "cos", "tan", "cot", "sec", "csc"}
ALLOWED = re.compile(r"[0-9A-Za-z\s+\-*/=<>^_{}()\[\]|!.,;:\\&%]*")
SMALL_POWER = re.compile(r"\^ ?(?:\{(?:[^{}^!]|\{[^{}^!]*\}){1,24}\}|-?\d+|\\?[A-Za-z]+)")
SMALL_BINOMIAL = re.compile(r"\\binom ?\{\d{1,3}\} ?\{\d{1,3}\}")
PLAIN_COMMANDS = re.compile(
    r"\\(?:frac|cdot|times|pi|leq?|geq?|in|cup|cap|infty|pm|text|(?:begin|end)\{[a-z]+\})(?![a-z])"
)
RELATION = re.compile(r"[=<>]|\\(?:leq?|geq?|lt|gt|neq?)(?![a-z])")
HARD_TO_SOLVE = re.compile(
    r"\\(?:sqrt|sin|cos|tan|cot|sec|csc|arc\w+|log|ln|exp|binom)(?![a-z])|[!|]|\^ ?(?:\{ ?)?(?:[^\d{ ]|\d\d|[5-9])"
)
SMALL_FACTORIAL = re.compile(r"(?<!\d)\d{1,3}!(?!\s*!)")
DECIMAL = re.compile(r"(?<![\d,.])(\d+)\.(\d+)(?![\d.])")


def _refused(latex: str) -> bool:
    """Whether a formula is outside of what sympy surely handles fast. Worked over by fuzzing; no rule uses time."""
    depth = deepest = 0
    for character in latex:
        depth += (character in "{([") - (character in "})]")
        deepest = max(deepest, depth)
    names = re.findall(r"\\([A-Za-z]+)", latex)
    if (
        len(latex) > MAX_LATEX
        or deepest > MAX_NESTING
        or not ALLOWED.fullmatch(latex)
        or set(names) - COMMANDS
    ):
        return True
    powers = SMALL_POWER.findall(latex)
    exponents = [math.prod(map(int, re.findall(r"[1-9]\d*", power))) for power in powers]
    symbolic = bool(re.search(r"[A-Za-z]", PLAIN_COMMANDS.sub("", latex)))
    roots = [int(index or 2) for index in re.findall(r"\\sqrt ?(?:\[ ?(\d) ?\])?", latex)]
    numbers = math.prod(map(int, re.findall(r"[1-9]\d*", latex)))
    rules = (
        re.search(
            r"\^|# ?#", SMALL_POWER.sub("#", latex)
        ),  # a tower, or an exponent that is a formula of its own
        max(exponents, default=0) > (60 if symbolic else 9999),
        re.search(r"[)}\]|] ?\^", latex)
        and math.prod(exponents) > (20 if symbolic else 9999),  # (x^9+y)^9 expands
        math.prod(roots) > 16
        or re.search(r"\\sqrt ?\[(?! ?\d ?\])", latex),  # the degree of an algebraic number
        re.search(r"\^ ?\{[^{}]*(?:/|\\frac)[^^]*?\d\d", latex),  # a root in another dress
        "!" in SMALL_FACTORIAL.sub("", latex) or "binom" in SMALL_BINOMIAL.sub("", latex),
        "\\infty" in INTERVAL_END.sub("", latex),
        re.search(r"[)}\]|]\s*_|\d[eE][-+]?\d|\* ?\*|matrix\} ?\^|\d{41}", latex),
        TRIGONOMETRY.intersection(names)
        and re.search(r"\d{5}|\^ ?\{?\d\d", latex),  # cos(3^{60} x) is expanded
        # n log m becomes log(m^n) on the way, so n has to be small, however it is written
        {"log", "ln"}.intersection(names) and (re.search(r"\d ?\^|!|binom", latex) or numbers > 10**6),
        RELATION.search(latex) and HARD_TO_SOLVE.search(latex),
    )
    return any(rules)


@lru_cache(maxsize=10_000)
def _formula(answer: str):
    """The sympy object of an answer, or None if it is refused or is no LaTeX formula."""
    from latex2sympy2_extended import NormalizationConfig, latex2sympy, normalize_latex
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig

    if len(answer) > MAX_LATEX:
        return None
    latex = normalize_latex(answer, NormalizationConfig(malformed_operators=True, nits=True, boxed="none"))
    # Decimals become fractions, so that nothing is rounded; i is the imaginary unit, which the parser writes I.
    latex = DECIMAL.sub(lambda m: rf"\frac{{{m[1]}{m[2]}}}{{1{'0' * len(m[2])}}}", latex)
    latex = re.sub(r"\\(?:begin|end)\{\w+\}|\\[A-Za-z]+|i", lambda m: "I" if m[0] == "i" else m[0], latex)
    if _refused(latex):
        return None
    config = ConversionConfig(lowercase_symbols=False)
    try:
        return latex2sympy(latex, is_real=True, normalization_config=None, conversion_config=config)
    except Exception:  # the parser and sympy raise anything at all on what is not a formula
        return None


def _same_formula(a: str, b: str) -> bool:
    """Equality by math-verify, asked both ways round since it is not symmetric (x = 5 against 5, sets, relations)."""
    from math_verify import verify

    logging.getLogger("math_verify").setLevel(
        logging.ERROR
    )  # it warns that its own time limit is off: ours is on
    options = {"strict": True, "allow_set_relation_comp": True, "timeout_seconds": None}

    def compare() -> bool:
        first = _formula(a)
        second = _formula(b) if first is not None else None
        return second is not None and verify(first, second, **options) and verify(second, first, **options)

    try:
        return _within_time_limit(compare)
    except Exception:  # what slips through verify's own net, such as a RecursionError
        return False


class _OutOfTime(BaseException):
    """Not an Exception, so that no `except Exception` inside sympy swallows it."""


def _within_time_limit(compare) -> bool:
    """compare(), or False after TIME_LIMIT seconds, which is counted. A timer that was already running goes on."""
    global grading_timeouts
    if threading.current_thread() is not threading.main_thread():  # signals reach the main thread only
        return compare()

    def stop(*_):
        raise _OutOfTime

    began, outer_handler = time.monotonic(), signal.signal(signal.SIGALRM, stop)
    outer_delay, outer_interval = signal.setitimer(
        signal.ITIMER_REAL, TIME_LIMIT, 1.0
    )  # again each second: see above
    try:
        return compare()
    except _OutOfTime:
        grading_timeouts += 1
        return False
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, outer_handler)
        if outer_delay:
            left = outer_delay - (time.monotonic() - began)
            signal.setitimer(signal.ITIMER_REAL, max(left, 1e-3), outer_interval)


def classes(answers: list[str | None], kind: str = "math") -> list[list[int]]:
    """Indices of equal answers, a list for each class, in the order of their first members; None is in no class.

    >>> classes(["1/2", "3", "0.5", None])
    [[0, 2], [1]]
    """
    found, class_of = [], {}  # lists of indices; spelling -> its class
    for index, answer in enumerate(answers):
        if answer is None:
            continue
        if answer not in class_of:
            class_of[answer] = next((c for c in found if same_answer(answers[c[0]], answer, kind)), None)
            if class_of[answer] is None:
                class_of[answer] = []
                found.append(class_of[answer])
        class_of[answer].append(index)
    return found
