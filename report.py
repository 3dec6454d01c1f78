"""What a run measures and shows: metrics, the progress line, curves.png, the before/after table, the ledger, responses.

The true answers are read here and nowhere else (but for --reward gold): training cannot look at them by accident.
"""

import json
import math
from collections import Counter
from pathlib import Path

from support import grading

# ----------------------------------------------------------------------------------------------------------------------
# metrics


def standard_error(values):
    """Of the mean of independent values: sqrt(variance / n), the variance with ddof 1; 0 for a single one.

    >>> round(standard_error([0.0, 1.0, 1.0, 0.0]), 4)
    0.2887
    """
    if len(values) < 2:
        return 0.0
    center = mean(values)
    return math.sqrt(sum((v - center) ** 2 for v in values) / (len(values) - 1) / len(values))


def describe(groups):
    """Metrics of responses that need neither a vote nor a true answer."""
    flat = [response for group in groups for response in group]
    return {
        "response_tokens": mean(r.tokens for r in flat),
        "truncated": mean(not r.finished for r in flat),
        "no_answer": mean(r.answer is None for r in flat),
    }


def correct(question, group):
    """1.0 or 0.0 for each response to a question whose true answer is known."""
    return [float(right(question, response.answer)) for response in group]


def right(question, answer):
    return answer is not None and grading.same_answer(question.answer, answer, question.kind)


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def record(question, group, voted):
    """What was found on one question, from its responses and (label, rewards) of their vote."""
    label, rewards = voted
    typical = group[rewards.index(max(rewards))]  # the first that the majority agrees with
    row = {"id": question.id, "prompt": question.prompt, "kind": question.kind, "truth": question.answer}
    row.update({"response": typical.text, "answers": [r.answer for r in group]})
    row.update({"majority": label, "majority_ratio": mean(rewards)})
    if question.answer is not None:
        truth = correct(question, group)
        row.update({"right": truth, "pass@1": mean(truth)})
        row.update({"majority_right": right(question, label), "any_right": any(truth)})
        row["reward_accuracy"] = mean(r == t for r, t in zip(rewards, truth, strict=True))
    return row


def training_metrics(records, votes):
    """Metrics of a step's vote from its records, by their names in training; see `evaluation_metrics`."""
    metrics = {"majority_ratio": mean(row["majority_ratio"] for row in records)}
    known = [row for row in records if row["truth"] is not None]
    names = {"ground_truth_ratio": "pass@1", "label_accuracy": "majority_right", "reward_accuracy": "reward_accuracy",
             f"pass@{votes}": "any_right"}  # fmt: skip
    return {**metrics, **{name: mean(row[field] for row in known) for name, field in names.items() if known}}


def evaluation_metrics(records, samples):
    """Metrics of an evaluation from its records; those that need the truth over the questions where it is known.

    pass@1 is the mean over samples (the paper's avg@16), its standard error is clustered by question: the questions
    vary, not the samples of one question. maj@N is the plain vote over the N samples, pass@N whether any is right.
    """
    metrics = {"majority_ratio": mean(row["majority_ratio"] for row in records)}
    known = [row for row in records if row["truth"] is not None]
    if known:
        each = [row["pass@1"] for row in known]
        metrics.update({"pass@1": mean(each), "pass@1_se": standard_error(each)})
    if known and samples > 1:
        metrics[f"maj@{samples}"] = mean(row["majority_right"] for row in known)
        metrics[f"pass@{samples}"] = mean(row["any_right"] for row in known)
    return metrics


# ----------------------------------------------------------------------------------------------------------------------
# before and after

# What became of a question, by whether its majority was right before and after. Sharpening is the cheap part of TTRL,
# learning the real one, corruption its price (TTRL-Guard, arXiv 2605.19444, asks for this).
FATES = {
    "learned": "majority wrong, then right",
    "sharpened": "right before and after, with a larger lead",
    "held": "right before and after, no change beyond chance",
    "weakened": "right before and after, with a smaller lead",
    "missed": "majority wrong before and after",
    "corrupted": "majority right, then wrong",
    "unsure": "majority changed, but within chance",
}
SIGNIFICANCE = 0.05  # of the sign test, both directions together


def lead_changes(before, after):
    """(rises, falls): in how many samples the lead of the true answer rose or fell, from two records of a question.

    A sample counts 1 for the true answer, -1 for the most frequent wrong answer of both evaluations, 0 for any other or
    none. Sample i of both evaluations was drawn with the same random numbers, so they are compared in pairs.
    """
    right, answers = [*before["right"], *after["right"]], [*before["answers"], *after["answers"]]
    wrong = [None if r else answer for r, answer in zip(right, answers, strict=True)]
    rival = max(grading.classes(wrong, before["kind"]), key=len, default=[])
    score = [int(r) for r in right]
    for index in rival:
        score[index] = -1
    pairs = list(zip(score[: len(before["right"])], score[len(before["right"]) :], strict=True))
    return sum(a > b for b, a in pairs), sum(a < b for b, a in pairs)


def tail(count, total):
    """Probability of at least `count` heads in `total` throws of a fair coin.

    >>> tail(9, 10)  # 11 of 1,024
    0.0107421875
    """
    return sum(math.comb(total, heads) for heads in range(count, total + 1)) / 2**total


def direction(rises, falls):
    """1 or -1 where the lead rose or fell beyond chance, else 0: the sign test over the samples whose score changed."""
    if tail(max(rises, falls), rises + falls) > SIGNIFICANCE / 2:
        return 0
    return 1 if rises > falls else -1


def false_alarms(changes):
    """Probability that `changes` changed samples, each up or down by a fair coin, are taken for a rise (or for a fall)."""
    return next(
        (p for p in (tail(count, changes) for count in range(changes + 1)) if p <= SIGNIFICANCE / 2), 0.0
    )


def fate(before, after):
    """What became of a question, one of FATES, from its two evaluation records. No change is claimed within chance.

    >>> sure = {"kind": "math", "right": [1.0] * 8, "answers": ["7"] * 8, "majority_right": True}
    >>> wrong = {"kind": "math", "right": [0.0] * 8, "answers": ["5"] * 8, "majority_right": False}
    >>> fate(wrong, sure), fate(sure, wrong), fate(sure, sure)
    ('learned', 'corrupted', 'held')
    """
    change = direction(*lead_changes(before, after))
    if not before["majority_right"] and not after["majority_right"]:
        return "missed"
    if before["majority_right"] and after["majority_right"]:
        return {1: "sharpened", 0: "held", -1: "weakened"}[change]
    if change == (1 if after["majority_right"] else -1):
        return "learned" if after["majority_right"] else "corrupted"
    return "unsure"


def ledger(before, after):
    """A row for each question whose answer is known: its fate, pass@1 and majority before and after."""
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
    """Mean difference of each metric that has a value per question, and its standard error: the questions are paired.

    names: {metric: field of the records}. The standard error of a difference of pairs leaves out what the questions
    have in common, so it is smaller than those of `before` and `after` suggest.
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

    The largest of many noisy evaluations is too large. So the even samples choose, and the odd ones, which had no part
    in the choice, are reported.
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


def summarize(state):
    """The numbers of a finished run for summary.json: metrics before and after, their change, the best, the ledger."""
    before, after = state["before"], state["after"]
    rows = ledger(before["records"], after["records"])
    counts = Counter(row["fate"] for row in rows)
    samples = len(before["records"][0]["answers"])
    names = {name: name for name in before["metrics"] if name in before["records"][0]}  # a value per question
    names.update({f"maj@{samples}": "majority_right", f"pass@{samples}": "any_right"} if samples > 1 else {})
    return {
        "steps": state["step"],
        "before": before["metrics"],
        "after": after["metrics"],
        "change": paired_changes(before["records"], after["records"], names),
        "best": state["best"],
        "ledger": {name: counts[name] for name in FATES},
        "expected_by_chance": sum(row["false_alarms"] for row in rows),
        "questions": rows,
    }


def read_metrics(out):
    return [
        json.loads(line)
        for line in (Path(out) / "metrics.jsonl").read_text(encoding="utf-8").split("\n")
        if line
    ]


def speeds(out):
    """Means over the steps of a run for summary.json; {} if it made none."""
    lines = [line for line in read_metrics(out) if "train/rollout_tokens_per_s" in line]
    names = ("rollout_tokens_per_s", "train_tokens_per_s")
    means = {name: sum(line[f"train/{name}"] for line in lines) / len(lines) for name in names if lines}
    return {
        **means,
        **({"peak_memory_gb": max(line["train/peak_memory_gb"] for line in lines)} if lines else {}),
    }


# ----------------------------------------------------------------------------------------------------------------------
# on the screen


def progress(line, evaluation):
    """The end of the progress bar: newest pass@1, and majority ratio, reward and speed of this step."""
    parts = [f"pass@1 {evaluation['pass@1']:.3f}"] if "pass@1" in evaluation else []
    parts.append(f"majority {line['train/majority_ratio']:.2f}" if "train/majority_ratio" in line else "")
    parts.append(f"reward {line['train/reward']:.2f}" if "train/reward" in line else "")
    parts.append(
        f"{line['train/rollout_tokens_per_s']:,.0f} tok/s" if "train/rollout_tokens_per_s" in line else ""
    )
    return ", ".join(part for part in parts if part)


def table(columns):
    """Metrics side by side as text: columns is {heading: metrics}; a metric's `name_se` is its standard error.

    The column "change" holds differences, which are shown with their sign.

    >>> print(table({"after": {"pass@1": 0.5, "pass@1_se": 0.04}, "change": {"pass@1": 0.25, "pass@1_se": 0.03}}))
                                  after           change
    pass@1                0.500 ± 0.040   +0.250 ± 0.030
    """
    names = dict.fromkeys(
        name for metrics in columns.values() for name in metrics if not name.endswith("_se")
    )
    lines = [" " * 18 + "".join(f"{heading:>17}" for heading in columns)]
    for name in sorted(
        names, key=lambda n: (not n.startswith(("pass@1", "maj", "pass", "greedy")), n != "pass@1")
    ):
        cells = []
        for heading, metrics in columns.items():
            error = f" ± {metrics[name + '_se']:.3f}" if name + "_se" in metrics else ""
            digits = 1 if name == "response_tokens" else 3
            sign = "+" if heading == "change" else ""
            cells.append(f"{metrics[name]:{sign}.{digits}f}{error}" if name in metrics else "")
        lines.append(f"{name:<18}" + "".join(f"{cell:>17}" for cell in cells))
    return "\n".join(line.rstrip() for line in lines)


def render(summary, state):
    """All that is printed at the end of a run: table, ledger, three responses before and after."""
    parts = ["", table({heading: summary[heading] for heading in ("before", "after", "change")})]
    if summary["best"]:
        best = summary["best"]
        parts.append(
            f"\nBest evaluation: step {best['step']}, pass@1 {best['pass@1']:.3f} ± {best['pass@1_se']:.3f} "
            "(chosen by the even samples, measured on the odd ones)"
        )
    if summary["questions"]:
        parts += ["", f"What became of the {len(summary['questions'])} questions:"]
        parts += [f"  {count:4d} {name:<10} {FATES[name]}" for name, count in summary["ledger"].items()]
        parts.append(
            "A change is claimed where the lead of the true answer over the most frequent wrong one changed beyond chance\n"
            f"(sign test over paired samples, 5 %). Had nothing changed, chance alone would show up to "
            f"{summary['expected_by_chance']:.1f} questions\nas learned or sharpened, and as many as corrupted or weakened."
        )
    parts.append(responses(state["before"]["records"], state["after"]["records"]))
    return "\n".join(parts)


def responses(before, after, how_many=3):
    """A response of the majority to a few questions, before and after: a learned and a corrupted one if there are any."""

    def interest(pair):
        order = ["learned", "corrupted", "sharpened"]
        what = fate(*pair) if pair[0]["truth"] is not None else ""
        return order.index(what) if what in order else len(order)

    pairs = sorted(zip(before, after, strict=True), key=interest)
    firsts = {interest(pair): pair for pair in reversed(pairs)}  # one of each kind, then whatever is left
    chosen = (list(firsts.values())[::-1] + [pair for pair in pairs if pair not in firsts.values()])[
        :how_many
    ]
    blocks = []
    for b, a in chosen:
        truth = f", truth {b['truth']}" if b["truth"] is not None else ""
        what = f" ({fate(b, a)})" if b["truth"] is not None else ""
        blocks.append(f"\n{shorten(b['prompt'])}{truth}{what}")
        blocks += [
            f"  {when} (majority {r['majority']}): {shorten(r['response'])}"
            for when, r in (("before", b), ("after", a))
        ]
    return "\n".join(blocks)


def shorten(text, length=160):
    """One line of a text: its start and, since the answer stands there, its end."""
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[: length // 2]} ... {text[-length // 2 :]}"


# ----------------------------------------------------------------------------------------------------------------------
# curves.png


def draw_curves(out, eval_samples):
    """Redraw out/curves.png from out/metrics.jsonl."""
    lines = read_metrics(out)
    from matplotlib.figure import (
        Figure,
    )  # here: the import takes a second, which the start of a run need not wait for

    figure = Figure(figsize=(15, 4.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    draw_accuracy(left, lines, f"eval/maj@{eval_samples}")
    draw_labels(middle, lines)
    draw_policy(right, lines)
    for axes in (left, middle, right):
        axes.set_xlabel("step")
        axes.grid(alpha=0.25)
    temporary = Path(out) / "curves.tmp.png"
    figure.savefig(temporary, dpi=110)
    temporary.replace(Path(out) / "curves.png")


def series(lines, name):
    """(steps, values) of a metric over the lines that have it."""
    points = [(line["step"], line[name]) for line in lines if name in line]
    return [step for step, _ in points], [value for _, value in points]


def draw_accuracy(axes, lines, maj):
    steps, values = series(lines, "eval/pass@1")
    axes.set_title("accuracy in evaluation" if steps else "no true answers: agreement in evaluation")
    if not steps:
        axes.plot(*series(lines, "eval/majority_ratio"), "o-", label="majority ratio")
    else:
        _, errors = series(lines, "eval/pass@1_se")
        low, high = ([v + sign * e for v, e in zip(values, errors, strict=True)] for sign in (-1, 1))
        axes.fill_between(steps, low, high, alpha=0.2, color="C0", label="± standard error over questions")
        axes.plot(steps, values, "o-", color="C0", label="pass@1")
        majority = series(lines, maj)
        if majority[1]:
            axes.plot(*majority, "s-", color="C1", label=maj.removeprefix("eval/"))
            axes.axhline(majority[1][0], ls="--", color="C1", label=f"initial {maj.removeprefix('eval/')}")
    axes.set_ylim(0, 1.02)
    axes.legend(loc="lower right")


def draw_labels(axes, lines):
    axes.set_title("training: is the vote right?")
    names = {"label_accuracy": "label accuracy", "reward_accuracy": "reward accuracy", "majority_ratio": "majority ratio",
             "ground_truth_ratio": "share of right samples"}  # fmt: skip
    for name, label in names.items():
        steps, values = series(lines, f"train/{name}")
        if steps:
            axes.plot(steps, values, label=label)
    axes.set_ylim(0, 1.02)
    if axes.lines:
        axes.legend(loc="lower right")


def draw_policy(axes, lines):
    axes.set_title("training: policy")
    drawn = []
    for name, color in (("reward", "C2"), ("entropy", "C3")):
        steps, values = series(lines, f"train/{name}")
        drawn += axes.plot(
            steps, values, color=color, label=name + (" (nats a token)" if name == "entropy" else "")
        )
    axes.set_ylim(bottom=0)
    lengths = axes.twinx()
    steps, values = series(lines, "train/response_tokens")
    drawn += lengths.plot(steps, values, color="C4", ls=":", label="response tokens (right axis)")
    lengths.set_ylim(0, 1.2 * max(values, default=1))  # a constant length must not hide in the frame
    axes.legend(handles=drawn, loc="best")
