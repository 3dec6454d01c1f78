"""Draw out/curves.png: accuracy, labels and policy by step."""

from pathlib import Path

from report.screen import read_metrics


def draw_curves(out, eval_samples):
    """Redraw out/curves.png from out/metrics.jsonl."""
    from matplotlib.figure import Figure  # imported here, since it takes a second

    lines = read_metrics(out)
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
    """(steps, values) of a metric, from the lines that have it."""
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
    names = {"label_accuracy": "label accuracy", "reward_accuracy": "reward accuracy",
             "majority_ratio": "majority ratio", "ground_truth_ratio": "right samples"}  # fmt: skip
    for name, label in names.items():
        steps, values = series(lines, f"train/{name}")
        if steps:
            axes.plot(steps, values, label=label)
    axes.set_ylim(0, 1.02)
    if axes.lines:
        axes.legend(loc="lower right")


def draw_policy(axes, lines):
    axes.set_title("training: policy")
    drawn, lowest = [], 0.0
    for name, color in (("reward", "C2"), ("entropy", "C3")):
        steps, values = series(lines, f"train/{name}")
        lowest = min([lowest, *values])
        drawn += axes.plot(
            steps, values, color=color, label=name + (" (nats per token)" if name == "entropy" else "")
        )
    axes.set_ylim(bottom=1.05 * lowest)  # below 0 only if a mean reward is negative
    lengths = axes.twinx()
    steps, values = series(lines, "train/response_tokens")
    drawn += lengths.plot(steps, values, color="C4", ls=":", label="response tokens (right axis)")
    lengths.set_ylim(0, 1.2 * max(values, default=1))  # keeps a constant length off the frame
    axes.legend(handles=drawn, loc="best")
