"""out/report.html: its numbers by hand, escaping, size, and what a browser shows, hostile text included."""

import collections
import dataclasses
import html.parser
import itertools
import json
import math
import random
import re
import time

import browser
import pytest

from report import drawing, page
from support.config import configure
from support.questions import Question

ABOUT = {"commit": "0123456789ab", "torch": "2.13.0"}

# -----------------------------------------------------------------------------------------------------------
# runs made up


def record(number, wrong_first, samples, prompt="What is 2+2?", response=None):
    """Of `samples` responses to a question the first `wrong_first` say 34, the others the truth, 44."""
    answers = ["34"] * wrong_first + ["44"] * (samples - wrong_first)
    majority = max(sorted(set(answers)), key=answers.count)
    right = [float(answer == "44") for answer in answers]
    return {"id": f"q-{number}", "prompt": prompt, "kind": "math", "truth": "44", "answers": answers,
            "response": response or f"34 or 44? It is \\boxed{{{majority}}}.", "answer": majority,
            "majority": majority, "majority_ratio": answers.count(majority) / samples, "right": right,
            "pass@1": sum(right) / samples, "any_right": any(right), "majority_right": majority == "44",
            "reward_accuracy": 1.0}  # fmt: skip


def state_of(before, after, step=4):
    def evaluated(records, step):
        mean = sum(row["pass@1"] for row in records) / len(records)
        metrics = {"pass@1": mean, "pass@1_se": 0.02, "maj@8": mean}
        return {"step": step, "records": records, "metrics": metrics}

    return {"step": step, "seconds": 90.0, "updates": 8, "skipped_updates": 0, "best": None,
            "before": evaluated(before, 0), "after": evaluated(after, step)}  # fmt: skip


def metrics_of(steps, **courses):
    """Lines of metrics.jsonl; courses: {metric: (value at the first step, at the last)}."""
    usual = {"entropy": (0.5, 0.4), "majority_ratio": (0.5, 0.8), "label_accuracy": (0.5, 0.8),
             "truncated": (0, 0), "no_answer": (0, 0), "response_tokens": (40, 50),
             "logprob_gap": (1e-6, 1e-6), "zero_variance_groups": (0, 0.2),
             "grading_timeouts": (0, 0)}  # fmt: skip
    lines = [{"step": 0, "eval/pass@1": 0.25, "eval/pass@1_se": 0.02, "eval/maj@8": 0.3}]
    for step in range(1, steps + 1):
        share = (step - 1) / max(1, steps - 1)
        values = {name: a + (b - a) * share for name, (a, b) in {**usual, **courses}.items()}
        metrics = {f"train/{name}": value for name, value in values.items()}
        lines.append({"step": step, "epoch": math.ceil(step / 4), **metrics})
    lines[-1].update({"eval/pass@1": 0.75, "eval/pass@1_se": 0.02, "eval/maj@8": 0.8})
    return lines


def vote_line(step, question, votes, none=0, **more):
    return {"step": step, "question": question, "label": max(votes, key=votes.get, default=None),
            "votes": votes, "none": none, **more}  # fmt: skip


SETTINGS = configure({"eval_samples": 8, "votes": 8, "samples": 4})
SMALL_RUN = dict(
    lines=metrics_of(4),
    votes=[vote_line(1, "q-0", {"34": 6, "44": 1}, none=1), vote_line(3, "q-0", {"44": 7, "34": 1})],
    state=state_of([record(0, 8, 8), record(1, 0, 8), record(2, 5, 8)],
                   [record(0, 0, 8), record(1, 8, 8), record(2, 5, 8)]),
    c=SETTINGS, train_set=[Question('What is 2+2?', '44', f'q-{n}') for n in range(3)], about=ABOUT,
)  # fmt: skip


def large_run(count, times, samples=64):
    """Questions with long responses and a vote of many answers each time."""
    chance = random.Random(0)
    lorem = "Let x be the number of apples, so that $x < 2^{10} & y > 3$, and carry the one. " * 80
    before = [record(n, 50, samples, prompt=lorem[:400], response=lorem) for n in range(count)]
    after = [record(n, 10, samples, prompt=lorem[:400], response=lorem) for n in range(count)]
    votes = []
    for step, n in itertools.product(range(times), range(count)):
        ballots = (str(chance.choice([44, 34, 34, 17, chance.randrange(99)])) for _ in range(samples))
        counts = collections.Counter(ballots).most_common()
        other = sum(number for _, number in counts[20:])
        votes.append(vote_line(step + 1, f"q-{n}", dict(counts[:20]), other=other))
    return {**SMALL_RUN, "votes": votes, "state": state_of(before, after), "lines": metrics_of(times * 63),
            "c": dataclasses.replace(SETTINGS, epochs=times)}  # fmt: skip


class Reader(html.parser.HTMLParser):
    """Fails on a tag that is not closed in its order; collects tags and attributes."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


# -----------------------------------------------------------------------------------------------------------
# numbers by hand


def test_the_bars_are_the_votes_by_hand():
    """8 responses: at first 6 say 34, one 44 (the truth) and one nothing; then 7 say 44 and one 34."""
    small, large, key = drawing.votes("v0", SMALL_RUN["votes"], "44.0", "math", planned=2)
    # Painted from the ground up to 34's top, then 44's part over it; below each bar a box for its label.
    wrong = '<path class="a" d="M0 8V1h1V0h1V8zM0 9h1v1h-1z"/>'
    assert wrong + '<path class="t" d="M0 8V7h1V1h1V8zM1 9h1v1h-1z"/>' in small
    assert 'viewBox="0 0 2 10"' in small and '<use href="#v0"/>' in large
    shown = re.sub("<.*?>", "", key.replace("</li>", "|"))
    assert shown == "step 1 → 3:|44.0 (true) 1 → 7|34 6 → 1|no answer 1 → 0|"


def test_the_bars_without_a_true_answer_a_label_or_votes():
    lines = [vote_line(1, "q", {}, none=4), vote_line(2, "q", {"1/2": 2, "3": 1}, other=1)]
    lines.append(vote_line(3, "q", {"0.5": 3, "5": 1}))  # 0.5 is the class of 1/2
    small, _, key = drawing.votes("v", lines, None, "math", 3)
    assert '"t"' not in small and '<path class="a" d="M0 4V4h1V2h1V1h1V4zM1 5h2v1h-2z"/>' in small
    assert "no answer 4 → 0" in key and drawing.votes("v", [], "1", "math", 3) == ("", "", "")


def test_more_votes_than_bars_are_thinned_and_the_rest_is_one_class():
    lines = [vote_line(step, "q", {str(n): 9 - n for n in range(9)}) for step in range(1000)]
    small, _, _ = drawing.votes("v", lines, "0", "math", 1000)
    assert set(re.findall('class="(.)"', small)) == set("tabco") and 'H100"' in small


@pytest.mark.parametrize("courses, words", [
    ({}, []),
    ({"majority_ratio": (0.5, 0.9), "label_accuracy": (0.6, 0.3)}, ["Collapse", "Since step 5"]),
    ({"majority_ratio": (0.5, 0.9), "label_accuracy": (0.3, 0.6)}, []),
    ({"entropy": (0.5, 0.01)}, ["Entropy"]),
    ({"truncated": (0.1, 0.5), "no_answer": (0, 0.6)}, ["truncated at --max-new-tokens", "No answer"]),
    ({"zero_variance_groups": (0.1, 1)}, ["teach nothing"]),
    ({"logprob_gap": (1e-6, 1e-2)}, ["logprob_gap"]),
    ({"grading_timeouts": (0, 3)}, ["time limit"]),
])  # fmt: skip
def test_warnings(courses, words):
    found = page.warnings(metrics_of(20, **courses), SETTINGS, SMALL_RUN["state"])
    assert len(found) == len(words) and all(word in one for word, one in zip(words, found, strict=True))


def test_warnings_of_updates_and_of_accuracy():
    worse = state_of([record(0, 0, 8)], [record(0, 8, 8)])
    found = page.warnings(metrics_of(20), SETTINGS, {**worse, "skipped_updates": 2})
    skipped = "2 of 10 updates were skipped because their gradient was not finite."
    assert found == ["pass@1 fell from 1.000 to 0.000.", skipped]


@pytest.mark.parametrize("response, answer, marked", [
    (r"4 and 44, so \boxed{4}. 4?", "4", r"4 and 44, so \boxed{<mark>4</mark>}. 4?"),
    ("4, so the answer is 44, not 144", "44", "4, so the answer is <mark>44</mark>, not 144"),
    ("<4>", "<4>", "<mark>&lt;4&gt;</mark>"),
    ("4? 4? Yes, 4!", "4", "4? 4? Yes, <mark>4</mark>!"),
    ("nothing", None, "nothing"),
    ("one half", "1/2", "one half"),
])  # fmt: skip
def test_the_answer_is_marked_where_it_was_found(response, answer, marked):
    assert drawing.marked(response, answer) == marked


def test_a_long_response_loses_its_middle_and_says_so():
    shown = drawing.marked("a" * 900_000 + r"\boxed{7}", "7")
    assert len(shown) < 2100 and "898,009 characters left out" in shown and "<mark>7</mark>" in shown


def test_questions_of_evaluation_and_of_training_are_kept_apart():
    """With --eval-data, ids may coincide although the questions are others."""
    c = dataclasses.replace(SETTINGS, eval_data="other.json")
    trained_on = [Question("What is 1+1?", "2", "q-0")]
    run = {**SMALL_RUN, "c": c, "train_set": trained_on, "votes": [vote_line(1, "q-0", {"2": 8})]}
    rows = page.rows_of(run["state"], None, run["votes"], trained_on)
    assert [(row.prompt, len(row.votes)) for row in rows] == [("What is 2+2?", 0)] * 3 + [("What is 1+1?", 1)]
    Reader(page.page(**run))


def test_before_the_second_evaluation_and_without_true_answers():
    known = ("right", "pass@1", "majority_right")
    unknown = {name: value for name, value in record(0, 2, 8).items() if name not in known} | {"truth": None}
    state = {"step": 0, "seconds": 0.0, "updates": 0, "skipped_updates": 0, "best": None,
             "before": {"step": 0, "records": [unknown], "metrics": {"majority_ratio": 0.75}}}  # fmt: skip
    lines = [{"step": 0, "eval/majority_ratio": 0.75}]
    shown = page.page(lines, [], state, SETTINGS, [], ABOUT)
    Reader(shown)
    assert "agreement before" in shown and "pass@1" not in re.sub("(?s)<h2>Settings.*", "", shown)


# -----------------------------------------------------------------------------------------------------------
# the file

HOSTILE = [
    "<img src=x onerror=\"alert('hostile'); document.title='hostile'\">",
    "</script><script>alert('hostile'); document.title = 'hostile'</script>",
    "</pre></div></td></tr></table><h1>hostile</h1><style>body { display: none }</style><!--",
    "<svg onload=alert('hostile')><a href=javascript:alert('hostile')>hostile</a>",
    "\x1b[31mred\x1b[2J\x1b]0;hostile\x07\x00\x9b1m",
    "\u202ehostile\u202c \u2066\u2067 \u200f\u061c",
    "a\ud800b\ufeffc\u2028d\r\ne\rf",
    "W" * 1_000_000,
    "Z" + "\u0335\u0353\u030d" * 500,
    "$title ${script_hash} $$ %s {0}",
    '"quoted" \'id\' &amp; &lt; <b data-x="',
]


def hostile_run():
    """Every text of a run is hostile in turn: prompt, response, answer, truth, id, spelling of a vote."""
    rows, votes = [], []
    for number, text in enumerate(HOSTILE):
        row = record(number, 2, 8, prompt=text, response=text)
        row.update(id=f"{number} {text}", truth=text, majority=text, answer=text, answers=[text] * 8)
        rows.append(row)
        votes.append(vote_line(1, row["id"], {text: 5, "34": 2}, none=1))
    c = dataclasses.replace(SETTINGS, model=HOSTILE[0], out=HOSTILE[1])
    about = {"commit": HOSTILE[2]}
    return {**SMALL_RUN, "votes": votes, "state": state_of(rows, rows), "c": c, "about": about}


def test_hostile_text_adds_no_tag_and_no_attribute():
    shown = page.page(**hostile_run())
    tame = page.page(**{**hostile_run(), "c": SETTINGS, "about": {"commit": "0123456789ab"}})
    read = Reader(shown)
    assert {"img", "b", "a"} & set(read.tags) == set()
    assert [read.tags.count(tag) for tag in ("script", "style", "h1")] == [1, 1, 1]
    assert not [name for name, _ in read.attributes if name.startswith("on")]
    assert Reader(tame).tags == read.tags
    shown.encode("utf-8")  # a lone surrogate could not be written
    assert not page.drawing.HIDDEN.search(shown) and len(shown) < 400_000


def test_the_same_run_gives_the_same_bytes_in_a_file(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, SMALL_RUN["lines"])))
    (tmp_path / "votes.jsonl").write_text("\n".join(map(json.dumps, SMALL_RUN["votes"])))
    written = []
    for _ in range(2):
        page.write_page(tmp_path, SMALL_RUN["state"], SETTINGS, SMALL_RUN["train_set"], ABOUT)
        written.append((tmp_path / "report.html").read_bytes())
    assert written[0] == written[1] == page.page(**SMALL_RUN).encode()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "report.html", "votes.jsonl"]


def test_nothing_is_fetched_and_only_our_script_may_run():
    shown = page.page(**SMALL_RUN)
    read = Reader(shown)
    links = [value for name, value in read.attributes if name in ("src", "href", "srcset")]
    assert all(link.startswith("#") for link in links)
    assert "url(" not in shown and "@import" not in shown
    policy = next(value for name, value in read.attributes if name == "content" and "default-src" in value)
    assert "default-src 'none'" in policy and "unsafe" not in policy and policy.count("sha256-") == 2


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """The largest page: 500 questions, drawn 80 times each, with responses that have to be shortened."""
    run = large_run(500, 80)
    began = time.perf_counter()
    shown = page.page(**run)
    print(f"\n500 questions: {time.perf_counter() - began:.1f} s, {len(shown.encode()) / 1e6:.2f} MB")
    path = tmp_path_factory.mktemp("large") / "report.html"
    path.write_text(shown, encoding="utf-8")
    return path


def test_a_large_run_is_a_page_under_5_MB(large):
    assert large.stat().st_size < 5_000_000


def test_of_too_many_questions_the_page_shows_those_that_changed(monkeypatch):
    monkeypatch.setattr(page, "MOST_QUESTIONS", 2)
    shown = page.page(**SMALL_RUN)
    assert "2 of 3 questions" in shown and "q-0" in shown and "q-1" in shown and "q-2" not in shown


# -----------------------------------------------------------------------------------------------------------
# in a browser

IDS = "[...document.querySelectorAll('#ledger tbody')].map(body => body.rows[0].cells[0].textContent)"
WIDTH = "document.documentElement.scrollWidth"


@pytest.fixture
def shown(tmp_path):
    """shown(run): the run's page in a browser."""
    with browser.opened() as tab:

        def show(run):
            path = tmp_path / "report.html"
            path.write_text(page.page(**run), encoding="utf-8")
            tab.open(path)
            return tab

        yield show


def test_a_click_sorts(shown):
    tab = shown(SMALL_RUN)
    assert tab.evaluate(IDS) == ["q-0", "q-1", "q-2"] and tab.evaluate("document.title") == "tiny on tiny"
    column = "#ledger th:nth-child({}) button"
    tab.click(column.format(6))  # pass@1 after: 1, 0, 0.375
    assert tab.evaluate(IDS) == ["q-1", "q-2", "q-0"]
    tab.click(column.format(6))
    assert tab.evaluate(IDS) == ["q-0", "q-2", "q-1"]
    assert tab.count("[aria-sort]") == 1
    tab.click(column.format(2))  # fates in the order of the table above: learned, ..., still wrong, corrupted
    assert tab.evaluate(IDS) == ["q-0", "q-2", "q-1"]
    tab.click(column.format(8))  # votes: those without any stay last, however it is sorted
    first = tab.evaluate(IDS)
    tab.click(column.format(8))
    assert first[0] == "q-0" == tab.evaluate(IDS)[0]
    assert tab.complaints == []


def test_numbers_sort_as_numbers(shown):
    rows = [record(number, 4, 8) for number in (10, 9, 100)]
    tab = shown({**SMALL_RUN, "state": state_of(rows, rows)})
    tab.click("#ledger th button")
    assert tab.evaluate(IDS) == ["q-9", "q-10", "q-100"]


@pytest.mark.parametrize("width", [1280, 390])
def test_hostile_text_does_nothing_and_stays_in_its_place(shown, width):
    tab = shown(hostile_run())
    tab.resize(width)
    tab.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
    assert tab.evaluate("document.title").startswith("<img") or "characters" in tab.evaluate("document.title")
    assert tab.count("#ledger tbody") == len(HOSTILE)
    assert tab.count("h1") == 1
    assert tab.evaluate(WIDTH) <= width
    assert tab.evaluate("[...document.querySelectorAll('pre')].at(-1).textContent") == HOSTILE[-1]
    assert tab.complaints == []


def test_a_script_that_is_not_ours_is_refused(shown, tmp_path, monkeypatch):
    """Even if escaping were broken, the page's policy would stop the script."""
    monkeypatch.setattr(drawing.html, "escape", str)
    run = {**SMALL_RUN, "about": {"commit": "</td><script>document.title = 'hostile'</script><td>"}}
    tab = shown(run)
    assert tab.evaluate("document.title") == "tiny on tiny"
    assert any("Content Security Policy" in str(complaint) for complaint in tab.complaints)


def test_it_reads_without_a_script_on_a_phone_in_the_dark_and_on_paper(shown, tmp_path):
    tab = shown(SMALL_RUN)
    light = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    tab.dark()
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") != light
    tab.resize(390)
    assert tab.evaluate(WIDTH) == 390
    tab.call("Emulation.setScriptExecutionDisabled", value=True)
    tab.open(tmp_path / "report.html")
    tab.click("summary")
    assert tab.evaluate("document.querySelector('details').open")
    assert tab.evaluate("document.querySelector('pre').offsetHeight > 9")
    assert tab.count("#ledger button") == 0
    assert tab.pdf().startswith(b"%PDF") and tab.complaints == []


def test_a_large_page_opens_and_sorts_at_once(large):
    """Seconds of the page's own thread, which other jobs on the machine do not prolong."""
    with browser.opened() as tab:
        tab.call("Performance.enable", timeDomain="threadTicks")
        tab.open(large)
        tab.evaluate("document.body.offsetHeight")
        opened = tab.busy_seconds()
        tab.click("#ledger th:nth-child(2) button")
        tab.evaluate("document.body.offsetHeight")
        print(f"\nopened in {opened:.2f} s, sorted in {tab.busy_seconds() - opened:.2f} s")
        assert tab.complaints == []
        assert tab.count("#ledger tbody") == 500
        assert tab.busy_seconds() < 5
