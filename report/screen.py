"""The screen output of a run (progress, table, ledger, responses), and the lines of its .jsonl files."""

import json
import math
import sys
import time
from pathlib import Path

from tqdm import tqdm

import grading
from distributed.ranks import QUIETLY, is_rank0, world_size
from report import health
from report.ledger import FATES, fate
from support.untrusted import shorten

BAR_AFTER, LINE_AFTER = 3, 60  # seconds of a rollout until it shows a bar, or a line in a log; and the next
MOST_CLASSES = 20  # answer classes per question in votes.jsonl

# ------------------------------------------------------------------------------------------------------------
# on the screen


class Progress:
    """The progress bar of training, on rank 0."""

    def __init__(self, step, steps):
        self.bar = tqdm(total=steps, initial=step, disable=not is_rank0(), unit="step", dynamic_ncols=True)

    def say(self, what):
        with QUIETLY:
            self.bar.set_description(what)

    def update(self, line, state, c):
        """Advance by a step: its line of metrics.jsonl, and the state after it, which notes what was said."""
        if not is_rank0():
            return
        newest = state.get("after", state["before"])
        for text in health.warnings(line, state, c):
            self.write(text)
        self.say("")
        with QUIETLY:
            self.bar.update(min(line["step"], 1))
            self.bar.set_postfix_str(progress(line, newest["metrics"]))

    def write(self, text):
        """Print a line above the bar, on rank 0."""
        if is_rank0():
            with QUIETLY:
                self.bar.write(text)

    def close(self):
        with QUIETLY:
            self.bar.close()


class RolloutBar:
    """A context in which one rollout is sampled: on rank 0 a bar of its responses, if it takes a while.

    Where standard error is a file, a line now and then instead.
    """

    def __init__(self, what, rows):
        self.what = what if world_size() == 1 else f"{what}, rank 0's share"
        self.rows, self.begin = rows, time.monotonic()
        terminal = sys.stderr is not None and sys.stderr.isatty()
        self.next_line = self.begin + LINE_AFTER if is_rank0() and not terminal else math.inf
        hidden = not (is_rank0() and terminal)
        self.bar = tqdm(total=rows, desc=self.what, unit="response", leave=False, disable=hidden,
                        delay=BAR_AFTER, mininterval=0.5, miniters=0, dynamic_ncols=True)  # fmt: skip

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with QUIETLY:
            self.bar.close()

    def update(self, finished, tokens):
        """Show how many responses are finished, and how many tokens were sampled in all."""
        now = time.monotonic()
        speed = f"{tokens / max(now - self.begin, 1e-9):,.0f} tokens/s"
        with QUIETLY:
            self.bar.set_postfix_str(speed, refresh=False)
            self.bar.update(finished - self.bar.n)
            if now > self.next_line:
                self.next_line = now + LINE_AFTER
                tqdm.write(f"{self.what}: {finished} of {self.rows} responses, {speed}", file=sys.stderr)


def progress(line, evaluation):
    """The end of the progress bar: the newest pass@1, and this step's majority ratio, reward and speed."""
    parts = {
        "pass@1 {:.3f}": evaluation.get("pass@1"),
        "majority {:.2f}": line.get("train/majority_ratio"),
        "reward {:.2f}": line.get("train/reward"),
        "{:,.0f} tok/s": line.get("train/rollout_tokens_per_s"),
    }
    return ", ".join(text.format(value) for text, value in parts.items() if value is not None)


def table(columns):
    """Metrics side by side as text; columns is {heading: metrics}.

    `name_se` is the standard error of `name`. Values in the column "change" have a sign.

    >>> after, change = {"pass@1": 0.5, "pass@1_se": 0.04}, {"pass@1": 0.25, "pass@1_se": 0.03}
    >>> print(table({"after": after, "change": change}))
                                  after           change
    pass@1                0.500 ± 0.040   +0.250 ± 0.030
    """

    lines = [" " * 18 + "".join(f"{heading:>17}" for heading in columns)]
    lines += [f"{name:<18}" + "".join(f"{cell:>17}" for cell in cells) for name, *cells in cells_of(columns)]
    return "\n".join(line.rstrip() for line in lines)


def cells_of(columns):
    """The rows of `table`: each metric's name and one cell of text per column, "" if it has no value."""

    def rank(name):  # accuracies first, pass@1 before the others
        return not name.startswith(("pass@1", "maj", "pass", "greedy")), name != "pass@1"

    names = dict.fromkeys(name for metrics in columns.values() for name in metrics)
    rows = []
    for name in sorted((name for name in names if not name.endswith("_se")), key=rank):
        cells = []
        for heading, metrics in columns.items():
            error = f" ± {metrics[name + '_se']:.3f}" if name + "_se" in metrics else ""
            digits = 1 if name == "response_tokens" else 3
            sign = "+" if heading == "change" else ""
            cells.append(f"{metrics[name]:{sign}.{digits}f}{error}" if name in metrics else "")
        rows.append([name, *cells])
    return rows


CHANCE = """A change counts only if the true answer's lead over the most frequent wrong one changed
significantly (sign test over paired samples, 5 %). If nothing had changed, up to {:.1f} questions would be
expected to show as learned or sharpened by chance, and as many as corrupted or weakened."""


def render(summary, state):
    """The output at the end of a run: table, ledger, three responses before and after."""
    parts = ["", table({heading: summary[heading] for heading in ("before", "after", "change")})]
    if summary["best"]:
        best = summary["best"]
        parts.append(
            f"\nBest evaluation: step {best['step']}, pass@1 {best['pass@1']:.3f} ± {best['pass@1_se']:.3f} "
            "(chosen on the even samples, measured on the odd ones)"
        )
    if summary["collapse_step"]:
        parts.append(f"Since step {summary['collapse_step']} fewer votes are right than in the first pass.")
    if summary["questions"]:
        parts += ["", f"What became of the {len(summary['questions'])} questions:"]
        parts += [f"  {count:4d} {name:<12} {FATES[name]}" for name, count in summary["ledger"].items()]
        parts.append(CHANCE.format(summary["expected_by_chance"]))
    parts.append(responses(state["before"]["records"], state["after"]["records"]))
    return "\n".join(parts)


def responses(before, after, how_many=3):
    """The majority's response to a few questions before and after; first a learned and a corrupted one."""

    def interest(pair):
        order = ["learned", "corrupted", "sharpened"]
        what = fate(*pair) if pair[0]["truth"] is not None else ""
        return order.index(what) if what in order else len(order)

    pairs = sorted(zip(before, after, strict=True), key=interest)
    firsts = {interest(pair): pair for pair in reversed(pairs)}  # one of each kind, then the others
    chosen = list(firsts.values())[::-1] + [pair for pair in pairs if pair not in firsts.values()]
    blocks = []
    for b, a in chosen[:how_many]:
        truth = f", truth {shorten(b['truth'])}" if b["truth"] is not None else ""
        what = f" ({fate(b, a)})" if b["truth"] is not None else ""
        blocks.append(f"\n{shorten(b['prompt'])}{truth}{what}")
        blocks += [
            f"  {when} (majority {shorten(str(r['majority']))}): {shorten(r['response'])}"
            for when, r in (("before", b), ("after", a))
        ]
    return "\n".join(blocks)


# ----------------------------------------------------------------------------------------------------------
# a run's files


def read_lines(path):
    """The lines of a .jsonl file as dicts; [] if there is no such file."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.split("\n") if line]


def read_metrics(out):
    """The lines of out/metrics.jsonl."""
    return read_lines(Path(out) / "metrics.jsonl")


def speeds(out):
    """A run's mean speeds and peak memory for summary.json; {} if it has no steps."""
    lines = [line for line in read_metrics(out) if "train/rollout_tokens_per_s" in line]
    if not lines:
        return {}
    means = {
        name: sum(line[f"train/{name}"] for line in lines) / len(lines)
        for name in ("rollout_tokens_per_s", "train_tokens_per_s")
    }
    return {**means, "peak_memory_gb": max(line["train/peak_memory_gb"] for line in lines)}


def shown_responses(step, groups, rewards, how_many=4):
    """One response to each of a few questions, for rollouts.jsonl."""
    lines = []
    for group, reward in list(zip(groups, rewards, strict=True))[:how_many]:
        line = {"step": step, "id": group.question.id, "prompt": group.question.prompt}
        line.update(response=group.responses[0].text, answer=group.answers[0])
        shown = reward[0] if math.isfinite(reward[0]) else None  # JSON has no nan
        lines.append({**line, "label": group.label, "reward": shown})
    return lines


def counted_votes(step, groups):
    """The votes on each question, for votes.jsonl: a line per question.

    "votes" maps the most frequent spelling of each class to its size, largest first, so the first is the
    label. "none" counts responses without an answer. "other" is the sum of the classes beyond the
    MOST_CLASSES largest, and present only if there are any. Both are outside "votes", so they cannot collide
    with an answer.
    """
    lines = []
    for group in groups:
        answers, classes = group.answers, group.classes
        ordered = sorted(classes, key=len, reverse=True)  # stable: ties keep their order
        counts = {
            grading.common_spelling(answers, members): len(members) for members in ordered[:MOST_CLASSES]
        }
        line = {"step": step, "question": group.question.id, "label": group.label, "votes": counts}
        line["none"] = answers.count(None)
        if len(ordered) > MOST_CLASSES:
            line["other"] = sum(map(len, ordered[MOST_CLASSES:]))
        lines.append(line)
    return lines
