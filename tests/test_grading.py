"""grading/__init__.py: extraction, equality, classes; hostile text in a process that is killed after 10 s."""
# ruff: noqa: RUF001

import itertools
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1]))
import grading
from grading import classes, extract_answer, formula, reading, same_answer, spelling
from grading.extraction import LETTERS
from support.questions import load

ROOT = Path(__file__).parents[1]
DATA = Path(__file__).parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the benchmark files are not at hand")

# -----------------------------------------------------------------------------------------------------------
# Equality


def rows(name):
    return list(map(json.loads, (ROOT / "tests" / name).read_text("utf-8").splitlines()))


def pairs(table):
    return [tuple(part.strip() for part in line.split(" | ")) for line in table.splitlines() if line]


ANSWER_PAIRS, RESPONSES = rows("answer_pairs.jsonl"), rows("responses.jsonl")
KINDS = sorted({pair["kind"] for pair in ANSWER_PAIRS})


def test_there_are_enough_pairs():
    spelled = {frozenset((pair["a"], pair["b"])) for pair in ANSWER_PAIRS}
    assert len(spelled) == len(ANSWER_PAIRS) >= 2000 and len(KINDS) >= 50
    both = {(pair["kind"], pair["equal"]) for pair in ANSWER_PAIRS}
    assert both == set(itertools.product(KINDS, (True, False)))


@pytest.mark.parametrize("kind", KINDS)
def test_pairs_as_language_models_write_them(kind):
    """In both orders, and without the net that catches what a reader of answers should not raise."""
    wrong = []
    for pair in (pair for pair in ANSWER_PAIRS if pair["kind"] == kind):
        a, b, equal = pair["a"], pair["b"], pair["equal"]
        of = "choice" if pair.get("choice") else "math"
        if not (same_answer(a, b, of) is same_answer(b, a, of) is equal):
            wrong.append((a, b, "wrongly different" if equal else "wrongly equal"))
        understood(a), understood(b)
    assert not wrong


def understood(answer):
    """Whether an answer is more than its spelling; any exception but NotFormula is a defect."""
    try:
        reading.read_list(spelling.clean(answer), 0)
        return True
    except formula.NotFormula:
        return False


def test_classes_are_those_of_pairwise_comparison():
    """`classes` looks keys up, and finds what comparing with all first members finds, transitive or not."""
    generator = random.Random(5)
    answers = [pair[side] for pair in ANSWER_PAIRS for side in "ab"]
    some = "50%|5000%|5000|0.5|50|x=5|5|y=5|52_8|42|52|1, 2|(1,2)|2, 1|6 cm|6|6 m|2,1".split("|")
    for _ in range(30):
        votes = [*generator.choices(answers, k=30), *generator.choices(some, k=30), None]
        generator.shuffle(votes)
        assert classes(votes) == pairwise(votes)


def test_true_sums_do_not_elect_one_another():
    assert classes(["31+6=37", "90+5=95", "17+1=18", "52", "52"]) == [[0], [1], [2], [3, 4]]


def test_classes_are_the_same_in_every_process():
    """Hashes of texts differ from one process to the next; the classes of a vote must not."""
    answers = json.dumps([pair[side] for pair in ANSWER_PAIRS for side in "ab"])
    code = "import json, sys; from grading import classes; print(classes(json.load(sys.stdin)))"
    first, second = (
        subprocess.run([sys.executable, "-c", code], input=answers, text=True, capture_output=True, cwd=ROOT,
                       env={**os.environ, "PYTHONHASHSEED": number}, check=True).stdout
        for number in "12"
    )  # fmt: skip
    assert first == second != ""


def test_a_vote_over_different_formulas_is_over_in_a_second():
    """64 responses with 64 different formulas, of each kind; all GPUs wait for it."""
    bench = subprocess.run(
        [sys.executable, ROOT / "bench" / "vote.py"], capture_output=True, text=True, check=True, timeout=300
    )
    found = json.loads(bench.stdout.splitlines()[-1])
    kinds = {kind: row for kind, row in found.items() if isinstance(row, dict)}
    assert len(kinds) == 15 and all(row["seconds"] < 1 for row in kinds.values()), kinds
    assert kinds.pop("ordinary responses")["seconds"] < 0.5
    assert all(row["classes"] == 64 for row in kinds.values()), kinds


def test_numbers_are_read_by_their_spelling_and_no_answer_equals_none():
    assert same_answer("1/3", 0.333) is False and same_answer(0.5, "1/2") is True
    assert same_answer(None, None) is same_answer(None, "None") is False


def test_equality_does_not_depend_on_the_cache():
    for a, b in [(pair["a"], pair["b"]) for pair in ANSWER_PAIRS if not pair.get("choice")][::10]:
        first, second = reading.read(a), reading.read(b)
        assert first.equals(second) == second.equals(first) == same_answer(a, b), (a, b)


@needs_data
@pytest.mark.parametrize("name", ["aime", "amc", "math", "gpqa"])
def test_gold_answers_equal_themselves(name):
    """All of them, as they stand, in a box, and respelled, so that string equality does not hide a defect."""
    for question in load(str(DATA / f"{name}.json")):
        gold, kind = question.answer, question.kind
        assert same_answer(gold, gold, kind)
        boxed = extract_answer(f"We get 7, then $\\boxed{{{gold}}}$. Done with 3", kind)
        assert boxed is not None and same_answer(boxed, gold, kind), gold
        respelled = gold.replace(r"\frac", r"\dfrac").replace(",", ", ")
        assert same_answer(f"$ {respelled} $.", gold, kind), gold


@needs_data
def test_gold_formulas_are_understood_rather_than_only_spelled():
    for question in load(str(DATA / "math.json")):
        gold = question.answer
        assert reading.read(gold).key[0] != "text" or gold.startswith(r"\text"), gold


# Every pair of differently spelled gold answers of MATH-500 that counts as equal. A percent, based numeral or
# degree stands for both its readings; a point may be written without its brackets, and a list is a set.
SAME_GOLD = r"""
(-2,1) | -2,1
-2,1 | 1,-2
10,\!080 | 10080
120 | 120^\circ
15 | 15\mbox{ cm}^2
2 \sqrt{5} | 2\sqrt{5}
204_5 | 54
30 | 30^\circ
36 | 36^\circ
36 | 40_9
36 | \$36
36^\circ | 40_9
36^\circ | \$36
40 | 40_9
40_9 | \$36
42 | 52_8
5 | x=5
90 | 90^\circ
\frac14 | \frac{1}{4}
"""


@needs_data
def test_different_gold_answers_differ():
    """All 45,150 pairs of MATH-500."""
    gold = sorted({question.answer for question in load(str(DATA / "math.json"))})
    equal = [pair for pair in itertools.combinations(gold, 2) if same_answer(*pair)]
    assert equal == pairs(SAME_GOLD)


def pairwise(answers):
    """The plain form of what `classes` does in one pass."""
    groups = []
    for index, answer in enumerate(answers):
        group = next((g for g in groups if answer is not None and same_answer(answers[g[0]], answer)), None)
        if group is not None:
            group.append(index)
        elif answer is not None:
            groups.append([index])
    return groups


def test_512_ordinary_responses_are_graded_in_time():
    """In CPU seconds of one core: the time that the GPUs would wait."""
    generator = random.Random(1)
    latex = r"\frac{\sqrt{3}}{2}|\frac{1}{2}\sqrt{3}|\frac{\pi}{6}|x^2+1|(1,2)|2\sqrt{3}|1+x^2".split("|")
    answers = [generator.choice(latex) if i % 8 == 0 else str(generator.randrange(40)) for i in range(512)]
    text = "Let us think step by step. " * 60
    same_answer("x+1", "1+x")  # the imports, 0.5 s once a run, are not on the clock
    grading._read.cache_clear()
    began = time.process_time()
    found = [extract_answer(f"{text} So the answer is $\\boxed{{{answer}}}$.") for answer in answers]
    groups = classes(found)
    seconds = time.process_time() - began
    print(f"512 responses, {len(groups)} classes: {seconds:.2f} s")
    assert found == answers and seconds < 0.5
    assert groups == pairwise(found)


# ----------------------------------------------------------------------------------------------------------
# Extraction


@pytest.mark.parametrize("kind", sorted({row["kind"] for row in RESPONSES}))
def test_responses_as_language_models_write_them(kind):
    wrong = []
    for row in (row for row in RESPONSES if row["kind"] == kind):
        of, truncated = "choice" if row.get("choice") else "math", row.get("truncated", False)
        found = extract_answer(row["text"], of, truncated, row.get("letters", LETTERS))
        right = found == row["answer"]
        if not right and row.get("respelled"):  # what counts is the value
            right = found is not None and same_answer(found, row["answer"], of)
        if not right:
            wrong.append((row["text"], found, row["answer"]))
    assert not wrong


def test_a_box_is_found_as_it_stands():
    assert extract_answer(r"\boxed{ \left\{1, \frac{2}{3}\right\} }") == r"\left\{1, \frac{2}{3}\right\}"


# ----------------------------------------------------------------------------------------------------------
# Hostile text

HOSTILE = [
    "9^{9^{9^9}}", "10^{10^{10}}", "9^9^9^9", "(9^{9999})^{9999}", "9**9**9**9", "2^{99999999}",
    "1e999999999", "999999999!", "(((5!)!)!)!", "(99999999)_{5}", r"\binom{99999999}{5000000}",
    r"\binom{x}{100}", "9!!!!!!!!", r"[0, 9^{9^{9^9}}]", r"\sqrt[999999999]{2}", r"\sum_{i=1}^{10^9} i!",
    r"\int e^{x^2}\sin(x^3) dx", r"\det{(1)}", r"\lim_{x \to 0} x^{x^x}", r"\operatorname{eye}(100000)",
    r"\prod_{i=1}^{999999} i", r"(x+y+z+1)^{9999}", r"(x^{60}+y)^{60}",
    r"\begin{pmatrix} 1 & x \\ x & 1 \end{pmatrix}^{9999}", "2^{x}+3^{y}=x^{y}", "x^5-x+1=\\sin x",
    '__import__("os").system("touch /tmp/ttrl-was-here")',
    r"\text{__import__('os').system('touch /tmp/ttrl-was-here')}", "__import__('os')._exit(3)",
    "exec(open(0).read())", r"\variable{__import__('os')}", "exit()", "quit()", "lambda: 0",
    "{" * 10_000 + "}" * 10_000, "\\boxed{" * 10_000 + "1" + "}" * 10_000, "(" * 90 + "1" + ")" * 90,
    "-" * 190 + "1", r"\frac{1}{" * 20 + "2" + "}" * 20, r"\frac" * 39 + "1", r"\sqrt" * 39 + "2",
    r"\frac{2024}{\pi} \pm \sqrt{\sqrt[7]{\sqrt{5}}}", r"\cos(\sqrt{\frac{\infty+97}{x+1}})",
    r"10001000\log10001000", r"17^{17}\log 99", r"9!9!\ln 5", r"(999)(999)(999)\ln 5", r"9^9999^9999",
    r"2^{1/97}+3^{1/89}", "{{{{{{{{1", "|" * 150, "[(" * 100, "\x00", "1\x002", "7" * 1_000_000,
    "1," * 500_000, "\\boxed{" + "7" * 1_000_000 + "}", "\\boxed{" * 140_000, "\\boxed" * 160_000,
    "answer is " * 100_000, "the answer is " + " " * 1_000_000, "A" * 1_000_000, "A " * 500_000,
    "$" * 1_000_000, "\\(" * 500_000, "," * 1_000_000, "1/" * 500_000, "-" * 1_000_000, "\\" * 1_000_000,
    "}" * 1_000_000, "\u202e42\u202c", "\u200b\u200f", "\ud800", "\U0001f600" * 300, "٣٤", "１２", "²",
    "½", "", " ", "\n" * 100_000, "%", "$", "\\", r"\text{" * 30, r"\text{}", r"\text{ }", r"\boxed{\text{}}",
    "142.%", "1,000_0", "9_1", r"\frac{}{}", r"\frac{1}{0}", "0/0", "1/0", r"\infty-\infty", "0^0", "0^{-1}",
    r"\log 0", r"\tan(\pi/2)", r"\cos(\frac{(2^{60})x}{|n|})",
    r"\sqrt{2+\sqrt{3+\sqrt{5+\sqrt{7+\sqrt{11}}}}}", "x" * 200, "1+" * 99 + "1", "x^" * 99 + "x",
    r"\boxed{}" * 100_000, r"\boxed{\boxed{}}" * 50_000, "\\boxed{" * 100_000 + "}" * 100_000,
    "answer:" * 140_000, "answer" + "*" * 1_000_000, "</think>" * 120_000, "<think>" * 140_000,
    r"\boxed{\text{answer " + ":" * 1_000_000 + "}}", "option is (A) or " * 60_000, "(A) is " * 140_000,
    r"\boxed{" + "(" * 1_000_000 + "A}", "answer is $" * 90_000, "the answer is " * 70_000, "1 2" * 90,
    "1 000 " * 45, "1,000," * 45, r"\pm 1" * 50, r"\frac" * 50, "0." + r"\dot{1}" * 30, r"\overline{1}" * 20,
    "9" * 299, "9" * 140 + "^{" + "9" * 140 + "}", r"\binom{x}{300}" * 20, "x!" * 100, r"e^{e^{e^{9}}}",
    r"\sin" * 70 + "x", "|" * 299, "|x" * 99, r"\{" * 100, "(1,2)," * 49 + "(1,2)", r"\cup" * 70,
    r"(1,2)\cup" * 30 + "(3,4)", "x<" * 99 + "x", "x=" * 99 + "1", r"x\ne" * 50 + "1", "f(" * 99 + ")" * 99,
    r"\text{" * 40 + "}" * 40, "1 cm " * 60, "1 million " * 29, "%" * 299, "5" + " per cm" * 40,
    r"\mathbb{R}\setminus" * 14 + r"\{1\}", "(-1)^{1/3}" * 29, r"(10^{99}+1)" * 20, r"2^{2^{20}}",
    r"3000!" * 9, r"\lfloor 10^{99}\pi\rfloor", r"\begin{pmatrix}" + "1&" * 80 + r"1\end{pmatrix}",
    r"\{" + "1," * 90 + r"1\}", r"1 \pm 2" * 20, "a=b=" * 40, "1<" * 90 + "2",
]  # fmt: skip


def grade_everywhere(text):
    """All that a response meets on its way through the grader."""
    for kind, truncated in itertools.product(("math", "choice"), (False, True)):
        for found in extract_answer(text, kind, truncated), text:
            for other in "5", r"\sqrt{2}", "x=1", text + " ", text + "+1":
                if found is not None:
                    assert same_answer(found, other, kind) in (True, False)
    assert same_answer(text, text)
    if len(text) <= reading.MAX_LENGTH:
        understood(text)


def _worker(pipe):
    grade_everywhere("5")  # the imports are not on the clock
    while True:
        text, began = pipe.recv(), time.perf_counter()
        try:
            grade_everywhere(text)
            error = None
        except BaseException as problem:  # reported to the test, whatever it is
            error = repr(problem)[:200]
        pipe.send((time.perf_counter() - began, error, grading.grading_timeouts))


class Grader:
    """A process that grades one text at a time and is killed when one takes over 10 s."""

    limit = 70  # the first text waits for the process to start

    def __enter__(self):
        self.pipe, end = multiprocessing.Pipe()
        self.process = multiprocessing.get_context("spawn").Process(target=_worker, args=(end,), daemon=True)
        self.process.start()
        end.close()
        return self

    def grade(self, text):
        self.pipe.send(text)
        try:
            assert self.pipe.poll(self.limit), f"over {self.limit} s: {text[:80]!r}"
            seconds, error, timeouts = self.pipe.recv()
        except EOFError:
            raise AssertionError(f"the grader died of {text[:80]!r}") from None
        self.limit = 10
        assert error is None and seconds < self.limit and timeouts == 0, (text[:80], error, seconds, timeouts)
        return seconds

    def __exit__(self, *_):
        self.process.kill()
        self.process.join()


def test_hostile_text_neither_runs_nor_raises_nor_hangs():
    marker = Path("/tmp/ttrl-was-here")
    marker.unlink(missing_ok=True)
    with Grader() as grader:
        took = {text: grader.grade(text) for text in HOSTILE}
    slowest = sorted(took, key=took.get)[-3:]
    print("slowest:", [(text[:40], round(took[text], 2)) for text in slowest])
    assert not marker.exists()


LATEX_WORDS = (
    r"\frac{1}{2} \frac \sqrt{ \sqrt[3]{ \boxed{ } { ^ _ ( ) [ ] | ! , ; : = < > + - * / % $ & \\ . "
    r"0 1 2 9 17 99 1000 0.5 x y i e n"
    r" \pi \infty \pm \cup \in \le \cdot \times \text{ \left( \right) \{ \} ^\circ \% \sin \log \ln "
    r"\begin{pmatrix} \end{pmatrix}"
    r" \binom{5}{2} 2^{10} answer\ is A B (C) and or cm eval __import__ \operatorname \int \sum \lim \det \!"
).split()
ANY_TEXT = st.one_of(st.text(max_size=60), st.lists(st.sampled_from(LATEX_WORDS), max_size=24).map("".join))


@pytest.mark.parametrize("count, number", [(1_000, 1), pytest.param(20_000, 2, marks=pytest.mark.long)])
def test_random_strings(count, number):
    with Grader() as grader:

        @seed(number)
        @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(ANY_TEXT)
        def check(text):
            grader.grade(text)

        check()


def test_no_text_reaches_a_parser_that_could_evaluate_it():
    """Neither sympy nor a LaTeX parser that ends in it is even imported, whatever is graded."""
    code = (
        "import json, sys; from grading import same_answer\n"
        "for text in json.load(sys.stdin): same_answer(text, '5')\n"
        "assert not {'sympy', 'latex2sympy2_extended', 'math_verify'} & set(sys.modules)"
    )
    texts = json.dumps([text for text in HOSTILE if len(text) < 1000])
    subprocess.run([sys.executable, "-c", code], input=texts, text=True, cwd=ROOT, check=True, timeout=60)


# ----------------------------------------------------------------------------------------------------------
# The time limit


@pytest.fixture
def slow_formula(monkeypatch):
    """Reading a sum that begins with x takes 20 s, in pieces that a signal can interrupt."""
    parse = formula.parse

    def slow(text):
        return [time.sleep(0.01) for _ in range(2000)] if text.startswith("x+") else parse(text)

    monkeypatch.setattr(formula, "parse", slow)
    monkeypatch.setattr(grading, "TIME_LIMIT", 0.3)
    grading._read.cache_clear()
    yield
    grading._read.cache_clear()


def test_time_limit_stops_and_counts(slow_formula):
    before, began = grading.grading_timeouts, time.monotonic()
    assert same_answer("x+1", "1+x") is False
    assert time.monotonic() - began < 3 and grading.grading_timeouts == before + 1
    assert same_answer("1+x", "x+1") is False and grading.grading_timeouts == before + 1  # remembered


def test_time_limit_leaves_an_outer_alarm_alone(slow_formula):
    rang = []
    outer = signal.signal(signal.SIGALRM, lambda *_: rang.append(time.monotonic()))
    try:
        began = time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, 0.8)
        same_answer("x+2", "2+x")
        assert not rang and signal.getitimer(signal.ITIMER_REAL)[0] > 0
        time.sleep(0.8)  # interrupted sleeps go on, so the alarm has rung when this returns
        assert len(rang) == 1 and 0.7 < rang[0] - began < 1.2
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, outer)


def test_grading_works_in_another_thread():
    results = []
    thread = threading.Thread(target=lambda: results.append(same_answer(r"\sqrt{99}", r"3\sqrt{11}")))
    thread.start()
    thread.join()
    assert results == [True]
