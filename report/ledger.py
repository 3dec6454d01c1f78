"""Before and after training: the fate of each question, paired changes, and the best evaluation."""

import itertools
import math
from collections import Counter

import grading
from report.metrics import mean, standard_error

# The fate of a question, by whether its majority was right before and after. Sharpening is the easy part of
# TTRL, learning is the real gain, and corruption is the price (TTRL-Guard, arXiv 2605.19444).
FATES = {
    "learned": "majority wrong before, right after",
    "sharpened": "right before and after, with a larger lead",
    "still right": "right before and after, no significant change",
    "weakened": "right before and after, with a smaller lead",
    "still wrong": "majority wrong before and after",
    "corrupted": "majority right before, wrong after",
    "unsure": "majority changed, but not significantly",
}
SIGNIFICANCE = 0.05  # of the two-sided sign test


def lead_changes(before, after):
    """In how many samples the lead of the true answer (rose, fell), from two records of a question.

    A sample scores 1 for the true answer, -1 for the most frequent wrong answer of both evaluations together,
    and 0 otherwise. Both evaluations drew sample i with the same random numbers, so samples are compared in
    pairs.
    """
    right, answers = [*before["right"], *after["right"]], [*before["answers"], *after["answers"]]
    wrong = [None if r else answer for r, answer in zip(right, answers, strict=True)]
    rival = grading.majority(grading.classes(wrong, before["kind"]))
    score = [int(r) for r in right]
    for index in rival:
        score[index] = -1
    pairs = list(zip(score[: len(before["right"])], score[len(before["right"]) :], strict=True))
    return sum(a > b for b, a in pairs), sum(a < b for b, a in pairs)


def tail(count, total):
    """Probability of at least `count` heads in `total` tosses of a fair coin.

    >>> tail(9, 10)  # 11 of 1,024
    0.0107421875
    """
    return sum(math.comb(total, heads) for heads in range(count, total + 1)) / 2**total


def direction(rises, falls):
    """1 or -1 if the lead rose or fell significantly, else 0: a sign test over the samples that changed."""
    if tail(max(rises, falls), rises + falls) > SIGNIFICANCE / 2:
        return 0
    return 1 if rises > falls else -1


def false_alarms(changes):
    """Probability that this many changes, each up or down by a fair coin, test as a rise (or as a fall)."""
    for count in range(changes + 1):
        if tail(count, changes) <= SIGNIFICANCE / 2:
            return tail(count, changes)
    return 0.0  # too few changes for any to be significant


def fate(before, after):
    """The fate of a question, one of FATES, from its two evaluation records.

    >>> sure = {"kind": "math", "right": [1.0] * 8, "answers": ["7"] * 8, "majority_right": True}
    >>> wrong = {"kind": "math", "right": [0.0] * 8, "answers": ["5"] * 8, "majority_right": False}
    >>> fate(wrong, sure), fate(sure, wrong), fate(sure, sure)
    ('learned', 'corrupted', 'still right')
    """
    change = direction(*lead_changes(before, after))
    if not before["majority_right"] and not after["majority_right"]:
        return "still wrong"
    if before["majority_right"] and after["majority_right"]:
        return {1: "sharpened", 0: "still right", -1: "weakened"}[change]
    if change == (1 if after["majority_right"] else -1):
        return "learned" if after["majority_right"] else "corrupted"
    return "unsure"


def ledger(before, after):
    """A row for each question with a known answer: its fate, and pass@1 and majority before and after."""
    return [
        {
            "id": b["id"],
            "truth": b["truth"],
            "fate": fate(b, a),
            "false_alarms": false_alarms(sum(lead_changes(b, a))),
            "pass@1": [b["pass@1"], a["pass@1"]],
            "majority": [b["majority"], a["majority"]],
        }
        for b, a in zip(before, after, strict=True)
        if b["truth"] is not None
    ]


def paired_changes(before, after, names):
    """Mean change of metrics and its standard error, paired by question.

    names: {metric: field of the records}. Questions differ more from each other than from themselves before
    training, so this standard error is smaller than those of `before` and `after` suggest.
    """
    changes = {}
    for name, field in names.items():
        pairs = [
            (b[field], a[field]) for b, a in zip(before, after, strict=True) if field in b and field in a
        ]
        if pairs:
            differences = [float(a) - float(b) for b, a in pairs]
            changes.update({name: mean(differences), f"{name}_se": standard_error(differences)})
    return changes


def better(best, step, records):
    """The best evaluation so far: `best`, or this one. None without true answers, or with a single sample.

    The maximum of many noisy evaluations is biased upwards. So even samples choose the evaluation, and odd
    samples, which are independent of the choice, measure it.
    """
    known = [row["right"] for row in records if row["truth"] is not None and len(row["right"]) > 1]
    chosen_by = mean(mean(right[::2]) for right in known) if known else None
    if chosen_by is None or (best and chosen_by <= best["chosen_by"]):
        return best
    reported = [mean(right[1::2]) for right in known]
    return {
        "step": step,
        "pass@1": mean(reported),
        "pass@1_se": standard_error(reported),
        "chosen_by": chosen_by,
    }


def whole_passes(lines):
    """{epoch: its lines of metrics.jsonl}, of the passes that have as many as the first."""
    passes = {}
    for line in lines:
        passes.setdefault(line["epoch"], []).append(line)
    return {epoch: own for epoch, own in passes.items() if len(own) == len(next(iter(passes.values())))}


def collapse_step(lines):
    """The first step from which fewer votes are right than in the first pass: the model collapse step.

    lines: of metrics.jsonl; their label_accuracy is averaged over each whole pass. Fewer by more than 0.05,
    to the end, and in two passes at least; else None, as without true answers. (arXiv 2603.08660 has the step
    at which reward accuracy falls below 1 %. Here that returns to 1 when no response has an answer any more:
    then nothing is rewarded, and nothing is right.)

    >>> right = [0.7, 0.8, 0.6, 0.8, 0.6, 0.5]
    >>> collapse_step([{"step": i, "epoch": i, "train/label_accuracy": x} for i, x in enumerate(right, 1)])
    5
    """
    whole = list(whole_passes(line for line in lines if "train/label_accuracy" in line).values())
    means = [mean(line["train/label_accuracy"] for line in of_pass) for of_pass in whole]
    below = len(list(itertools.takewhile(lambda right: right < means[0] - 0.05, reversed(means))))
    return whole[-below][0]["step"] if below > 1 else None


def summarize(state, lines):
    """The contents of summary.json for a finished run, from its last state and the lines of metrics.jsonl."""
    before, after = state["before"], state["after"]
    rows = ledger(before["records"], after["records"])
    counts = Counter(row["fate"] for row in rows)
    samples = len(before["records"][0]["answers"])
    names = {name: name for name in before["metrics"] if name in before["records"][0]}  # per-question metrics
    names.update({f"maj@{samples}": "majority_right", f"pass@{samples}": "any_right"} if samples > 1 else {})
    return {
        "steps": state["step"],
        "before": before["metrics"],
        "after": after["metrics"],
        "change": paired_changes(before["records"], after["records"], names),
        "best": state["best"],
        "collapse_step": collapse_step(lines),
        "ledger": {name: counts[name] for name in FATES},
        "expected_by_chance": sum(row["false_alarms"] for row in rows),
        "questions": rows,
    }
