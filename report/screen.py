"""What a run shows: the progress line, the before/after table, the ledger, a few responses, its speed."""

import json
from pathlib import Path

import grading
from report.ledger import FATES, fate
from report.metrics import mean

MOST_CLASSES = 20  # of a question in votes.jsonl

# -----------------------------------------------------------------------------------------------------------
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


def unanswered(no_answer, truncated, c):
    """Why most responses have no answer, and what to try, from two shares of them; None if most have one."""
    if no_answer <= 0.5:
        return None
    if truncated > 0.5:
        limit = f"--max-new-tokens {c.max_new_tokens}"
        return f"{truncated:.0%} of the responses were cut at {limit}; try a larger one"
    ask = "the prompt in the plan should ask for \\boxed{} (--prompt-suffix, --template)"
    return f"no answer was found in {no_answer:.0%} of the responses; {ask}"


def taught_nothing(lines, c):
    """Which of these steps (lines of metrics.jsonl) taught nothing, and why; None if it is not most of them.

    A step teaches nothing if the trained samples of each question have equal rewards: all advantages are 0.
    """
    empty = [line for line in lines if line["train/zero_variance_groups"] == 1]
    if 2 * len(empty) <= len(lines):
        return None
    which = f"{len(empty)} of {len(lines)} steps" if len(lines) > 1 else f"step {lines[0]['step']}"
    shares = [mean(line[f"train/{name}"] for line in empty) for name in ("no_answer", "truncated")]
    alike = "all samples of a question have the same reward; try other questions, or a higher --temperature"
    return f"{which} taught nothing: {unanswered(*shares, c) or alike}"


def table(columns):
    """Metrics side by side as text: columns is {heading: metrics}.

    `name_se` is the standard error of `name`. The column "change" holds differences, shown
    with their sign.

    >>> after, change = {"pass@1": 0.5, "pass@1_se": 0.04}, {"pass@1": 0.25, "pass@1_se": 0.03}
    >>> print(table({"after": after, "change": change}))
                                  after           change
    pass@1                0.500 ± 0.040   +0.250 ± 0.030
    """

    lines = [" " * 18 + "".join(f"{heading:>17}" for heading in columns)]
    lines += [f"{name:<18}" + "".join(f"{cell:>17}" for cell in cells) for name, *cells in cells_of(columns)]
    return "\n".join(line.rstrip() for line in lines)


def cells_of(columns):
    """The rows of `table`: for each metric its name, and a cell of text per column, "" where it has none."""

    def rank(name):  # accuracies first, pass@1 before all
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


CHANCE = """A change counts if the true answer's lead over the most frequent wrong one changed beyond chance
(sign test over paired samples, 5 %). If nothing had changed, chance would be expected to show up to {:.1f}
questions as learned or sharpened, and as many as corrupted or weakened."""


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
        parts.append(CHANCE.format(summary["expected_by_chance"]))
    parts.append(responses(state["before"]["records"], state["after"]["records"]))
    return "\n".join(parts)


def responses(before, after, how_many=3):
    """The majority's response to a few questions, before and after; a learned and a corrupted one first."""

    def interest(pair):
        order = ["learned", "corrupted", "sharpened"]
        what = fate(*pair) if pair[0]["truth"] is not None else ""
        return order.index(what) if what in order else len(order)

    pairs = sorted(zip(before, after, strict=True), key=interest)
    firsts = {interest(pair): pair for pair in reversed(pairs)}  # one of each kind, then whatever is left
    chosen = list(firsts.values())[::-1] + [pair for pair in pairs if pair not in firsts.values()]
    blocks = []
    for b, a in chosen[:how_many]:
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


# ----------------------------------------------------------------------------------------------------------
# from a run's files


def read_lines(path):
    """The lines of a .jsonl file, a dict each; [] if there is no such file."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.split("\n") if line]


def read_metrics(out):
    """The lines of out/metrics.jsonl."""
    return read_lines(Path(out) / "metrics.jsonl")


def speeds(out):
    """Means over the steps of a run for summary.json; {} if it made none."""
    lines = [line for line in read_metrics(out) if "train/rollout_tokens_per_s" in line]
    if not lines:
        return {}
    means = {
        name: sum(line[f"train/{name}"] for line in lines) / len(lines)
        for name in ("rollout_tokens_per_s", "train_tokens_per_s")
    }
    return {**means, "peak_memory_gb": max(line["train/peak_memory_gb"] for line in lines)}


def shown_responses(step, asked, responses, votes, rewards, how_many=4):
    """A response to each of a few questions, for rollouts.jsonl."""
    shown, rows = [], list(zip(asked, responses, votes, rewards, strict=True))
    for question, group, (label, _), row in rows[:how_many]:
        line = {"step": step, "id": question.id, "prompt": question.prompt, "response": group[0].text}
        shown.append({**line, "answer": group[0].answer, "label": label, "reward": row[0]})
    return shown


def counted_votes(step, asked, responses, votes):
    """How the responses to each question voted, for votes.jsonl: a line per question.

    "votes" holds the size of each class by its most frequent spelling, the largest first: so the first is the
    label. Classes beyond the MOST_CLASSES largest are summed up as "other", a key that is there only then;
    "none" counts responses without an answer. Both stand beside "votes", so no answer can be taken for them.
    """
    lines = []
    for question, group, (label, classes) in zip(asked, responses, votes, strict=True):
        answers = [response.answer for response in group]
        ordered = sorted(classes, key=len, reverse=True)  # of equally large ones the first stays first
        counts = {
            grading.common_spelling(answers, members): len(members) for members in ordered[:MOST_CLASSES]
        }
        line = {"step": step, "question": question.id, "label": label, "votes": counts}
        line["none"] = answers.count(None)
        if len(ordered) > MOST_CLASSES:
            line["other"] = sum(map(len, ordered[MOST_CLASSES:]))
        lines.append(line)
    return lines
