"""A run as a page, out/report.html: one file that needs no server, no network and hardly any script.

Questions, answers and responses are untrusted text. `text` escapes it, and the page's Content-Security-Policy
allows no script except the one that sorts the table.
"""

import base64
import hashlib
import re
from collections import defaultdict
from pathlib import Path
from string import Template
from typing import NamedTuple

from distributed.checkpoint import write_whole
from report import drawing
from report.drawing import LONGEST_TEXT, chart, code, marked, text
from report.ledger import FATES, collapse_step, summarize
from report.screen import CHANCE, cells_of, read_lines, read_metrics
from support.config import flag_name, papers_values
from support.schedule import Schedule

TEMPLATE = Path(__file__).with_name("page.html")
MOST_QUESTIONS = 500  # on a page; those that changed take precedence


class Row(NamedTuple):
    """A question on the page."""

    id: str
    prompt: str
    truth: str | None
    kind: str
    before: dict | None  # evaluation record; None for a question that is only trained on
    after: dict | None
    fate: str  # "" if unknown
    votes: list  # its lines of votes.jsonl


def write_page(out, state, c, train_set, about):
    """Write out/report.html from the run's files and state. about: {name: text}, the commit and versions."""
    out = Path(out)
    write_whole(out / "report.html", page(read_metrics(out), read_lines(out / "votes.jsonl"), state, c,
                                          train_set, about))  # fmt: skip


def page(lines, votes, state, c, train_set, about):
    """The HTML of the page, a pure function of its arguments: the same run gives the same bytes."""
    template = TEMPLATE.read_text(encoding="utf-8")
    summary = summarize(state, lines) if "after" in state else None
    rows = rows_of(state, summary, votes, None if c.data == c.eval_data else train_set)
    shown = most_interesting(rows)
    return Template(template).substitute(
        style_hash=hash_of(template, "style"),
        script_hash=hash_of(template, "script"),
        title=text(f"{Path(c.model).name} on {Path(c.data).name}"),
        subtitle=f"Test-time reinforcement learning (arXiv 2504.16084): {c.votes} responses per question, "
        f"rewarded by “{text(c.reward)}”.",
        facts=facts(state, c, train_set),
        warnings=warning_box(warnings(lines, c, state)),
        charts="\n".join(charts(lines, c)),
        metrics=metrics_table(state, summary),
        fates=fates(summary),
        about_ledger=about_ledger(len(rows), len(shown), c),
        ledger=ledger_table(shown, c),
        settings=settings_table(c),
        versions="".join(
            f"<tr><th scope=row>{text(k)}</th><td>{text(v)}</td></tr>" for k, v in about.items()
        ),
    )


def hash_of(template, tag):
    """The Content-Security-Policy source of the page's only <tag>."""
    content = re.search(rf"<{tag}>(.*?)</{tag}>", template, re.DOTALL)[1].encode()
    return f"'sha256-{base64.b64encode(hashlib.sha256(content).digest()).decode()}'"


# -----------------------------------------------------------------------------------------------------------
# above the curves


def facts(state, c, train_set):
    """The numbers that a reader looks for first."""
    newest = state.get("after", state["before"])
    pairs = [
        (f"{name}, before → after", f"{state['before']['metrics'][name]:.3f} → {value:.3f}")
        for name, value in newest["metrics"].items()
        if name == "pass@1" or re.fullmatch(r"maj@\d+", name)
    ]
    pairs.append(("steps", f"{state['step']} of {Schedule(c, len(train_set)).steps}"))
    pairs.append(("minutes", f"{state['seconds'] / 60:.1f}"))
    return "".join(f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in pairs)


def trend(lines, name):
    """A metric's means over the first and the last fifth of the steps; (0, 0) with fewer than 2 values."""
    values = [line[f"train/{name}"] for line in lines if f"train/{name}" in line]
    if len(values) < 2:
        return 0.0, 0.0
    count = max(1, len(values) // 5)
    return sum(values[:count]) / count, sum(values[-count:]) / count


def warnings(lines, c, state):
    """What a reader should know before trusting the numbers, one sentence each."""
    (agreed, agree), (was_right, right) = trend(lines, "majority_ratio"), trend(lines, "label_accuracy")
    (wide, narrow), (_, same) = trend(lines, "entropy"), trend(lines, "zero_variance_groups")
    (_, cut), (_, unanswered) = trend(lines, "truncated"), trend(lines, "no_answer")
    before, after = (
        state.get(when, state["before"])["metrics"].get("pass@1", 0) for when in ("before", "after")
    )
    gap = max((line.get("train/logprob_gap", 0) for line in lines), default=0)
    most_gap = 0.05 if c.device == "cuda" else 1e-4  # nats; see docs/metrics.md for usual values
    collapsed = collapse_step(lines)
    timeouts = max((line.get("train/grading_timeouts", 0) for line in lines), default=0)
    skipped, updates = state["skipped_updates"], state["updates"] + state["skipped_updates"]
    found = [
        (agree > agreed + 0.05 and right < was_right - 0.05,
         f"Collapse: the votes agree more (majority ratio {agreed:.2f} → {agree:.2f}) and are right less "
         f"often (label accuracy {was_right:.2f} → {right:.2f})."),
        (collapsed, f"Since step {collapsed} (collapse step) fewer votes are right than in the first pass."),
        (narrow < 0.2 * wide,
         f"Entropy fell from {wide:.3f} to {narrow:.3f} nats per token: samples hardly vary any more."),
        (after < before - 0.02, f"pass@1 fell from {before:.3f} to {after:.3f}."),
        (cut > 0.2, f"{cut:.0%} of the responses are truncated at --max-new-tokens {c.max_new_tokens}."),
        (unanswered > 0.2, f"No answer was found in {unanswered:.0%} of the responses."),
        (same > 0.8, f"{same:.0%} of the questions teach nothing: their samples all have the same reward."),
        (skipped, f"{skipped} of {updates} updates were skipped because their gradient was not finite."),
        (gap > most_gap,
         f"Sampler and learner differ: logprob_gap reaches {gap:.1e}; it should be below {most_gap:g}."),
        (timeouts, f"{timeouts} answers hit the time limit of grading."),
    ]  # fmt: skip
    return [sentence for holds, sentence in found if holds]


def warning_box(sentences):
    items = "".join(f"<li>{text(sentence)}</li>" for sentence in sentences)
    return f'<ul class="warnings" aria-label="warnings">{items}</ul>' if items else ""


# -----------------------------------------------------------------------------------------------------------
# curves and tables


# The charts: {title: {metric: label}}. Shares are drawn from 0 to 1, numbers from 0 to their maximum.
SHARES = {
    "training: is the vote right?": {
        "train/label_accuracy": "label right",
        "train/reward_accuracy": "reward right",
        "train/majority_ratio": "majority ratio",
        "train/ground_truth_ratio": "samples right",
    },
    "training: what is lost": {
        "train/truncated": "truncated responses",
        "train/no_answer": "responses without an answer",
        "train/zero_variance_groups": "questions that teach nothing",
    },
    "training: does the vote settle?": {
        "train/flip_rate": "label changed since last time",
        "train/locked_wrong": "label wrong and unchanged",
    },
}
NUMBERS = {
    "training: entropy of the policy": {"train/entropy": "nats per token"},
    "training: length of responses": {"train/response_tokens": "tokens"},
}


def charts(lines, c):
    """A chart with its legend for each group of metrics that the run has."""
    names = {"eval/pass@1": "pass@1", f"eval/maj@{c.eval_samples}": f"maj@{c.eval_samples}"}
    if not any("eval/pass@1" in line for line in lines):
        names = {"eval/majority_ratio": "agreement with the majority"}
    drawn = []
    for title, metrics in {"evaluation": names, **SHARES, **NUMBERS}.items():
        found = {label: [(line["step"], line[name]) for line in lines if name in line]
                 for name, label in metrics.items()}  # fmt: skip
        curves = {label: points for label, points in found.items() if points}
        errors = [
            (line["step"], line["eval/pass@1"], line["eval/pass@1_se"])
            for line in lines
            if "eval/pass@1" in metrics and "eval/pass@1_se" in line
        ]
        if curves:
            top = None if title in NUMBERS else 1
            drawn.append(chart(title, curves, top, lines[-1]["step"], errors))
    return drawn


def metrics_table(state, summary):
    """The columns before, after and change; only the first until there is a second evaluation."""
    columns = {"before": state["before"]["metrics"]}
    if summary:
        columns = {name: summary[name] for name in ("before", "after", "change")}
    head = "".join(f"<th scope=col>{name}</th>" for name in ("", *columns))
    rows = [f"<tr><th scope=row>{text(name)}</th>{''.join(f'<td>{text(cell)}</td>' for cell in cells)}</tr>"
            for name, *cells in cells_of(columns)]  # fmt: skip
    return f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"


def fates(summary):
    """The number of questions per fate, with what each fate means."""
    if not summary or not summary["questions"]:
        return ""
    items = "".join(
        f'<dt>{count}</dt><dt class="{name.replace(" ", "-")}">{name}</dt><dd class="soft">{FATES[name]}</dd>'
        for name, count in summary["ledger"].items()
    )
    chance = text(CHANCE.format(summary["expected_by_chance"]))
    return f'<dl class="fates">{items}</dl><p class="soft">{chance}</p>'


def settings_table(c):
    """Every flag with its value, and the paper's value if it differs."""
    paper = papers_values(c)
    rows = [
        f"<tr><th scope=row>{flag_name(name)}</th><td>{code(value, 200)}</td>"
        f"<td>{code(paper[name]) if name in paper else ''}</td></tr>"
        for name, value in vars(c).items()
    ]
    head = "".join(f"<th scope=col>{name}</th>" for name in ("flag", "here", "in the paper, if different"))
    return f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"


# -----------------------------------------------------------------------------------------------------------
# questions


def rows_of(state, summary, votes, trained_on):
    """A Row per question. trained_on: the training questions, None if evaluation uses the same ones."""
    by_question = defaultdict(list)
    for line in votes:
        by_question[line["question"]].append(line)
    fate = {row["id"]: row["fate"] for row in summary["questions"]} if summary else {}
    before = state["before"]["records"]
    after = state["after"]["records"] if summary else [None] * len(before)
    own_votes = by_question if trained_on is None else {}
    rows = [Row(b["id"], b["prompt"], b["truth"], b["kind"], b, a, fate.get(b["id"], ""),
                own_votes.get(b["id"], [])) for b, a in zip(before, after, strict=True)]  # fmt: skip
    rows += [Row(q.id, q.prompt, q.answer, q.kind, None, None, "trained on", by_question[q.id])
             for q in trained_on or []]  # fmt: skip
    return rows


def most_interesting(rows):
    """At most MOST_QUESTIONS rows, in their order; those that changed take precedence."""
    order = ["learned", "corrupted", "weakened", "sharpened", "unsure"]
    places = sorted(range(len(rows)), key=lambda i: order.index(rows[i].fate) if rows[i].fate in order else 9)
    return [rows[index] for index in sorted(places[:MOST_QUESTIONS])]


def about_ledger(count, shown, c):
    """What the table shows, and what it leaves out."""
    part = f" This page shows {shown} of {count} questions, preferring those that changed."
    part = part if shown < count else ""
    return (
        f'<p class="soft">Click a question to see its responses.{part} Each bar is one vote on the question: '
        "the true answer, if known, at the bottom, the others above it, and the empty rest for responses "
        "without an answer. The strip below has the color of the pseudo-label.</p>"
        '<ul class="key"><li><i class="t"></i>true answer</li><li><i class="a"></i><i class="b"></i>'
        '<i class="c"></i>three others, by frequency</li><li><i class="o"></i>the rest</li>'
        '<li><i class="n"></i>no answer</li></ul>'
    )


def ledger_table(rows, c):
    known = any(row.truth is not None for row in rows)
    heads = ["question", "what became of it", "truth"] if known else ["question"]
    score = "pass@1" if known else "agreement"
    heads += ["majority", f"{score} before", "after", "change", "votes over the steps"]
    right = ' class="r"'
    numbers = heads[-4:-1]
    head = "".join(f"<th scope=col{right if name in numbers else ''}>{name}</th>" for name in heads)
    bodies = (body(number, row, heads, c) for number, row in enumerate(rows))
    return f"<thead><tr>{head}</tr></thead>\n" + "\n".join(bodies)


def body(number, row, heads, c):
    """A question as a <tbody>: its row in the table, and the details below it."""
    score = "pass@1" if "truth" in heads else "majority_ratio"
    before, after = ((record or {}).get(score) for record in (row.before, row.after))
    records = [record for record in (row.before, row.after) if record]
    majority = " → ".join(code(record["majority"]) for record in records)
    change = "" if before is None or after is None else f"{after - before:+.2f}"
    small, large, key = drawing.votes(f"v{number}", row.votes, row.truth, row.kind, c.epochs)
    order = [*FATES, row.fate].index(row.fate) if row.fate else ""
    cells = {
        "question": f"<td>{code(row.id)}</td>",
        "what became of it": f'<td class="{row.fate.replace(" ", "-")}" data-v="{order}">{row.fate}</td>',
        "truth": f'<td data-l="truth">{"" if row.truth is None else code(row.truth)}</td>',
        "majority": f'<td data-l="majority">{majority}</td>',
        f"{heads[-4]}": number_cell("before", "" if before is None else f"{before:.2f}"),
        "after": number_cell("after", "" if after is None else f"{after:.2f}"),
        "change": number_cell("change", change),
        "votes over the steps": f'<td class="votes" data-v="{share_of_label(row.votes)}">{small}</td>',
    }
    return (
        f"<tbody><tr>{''.join(cells[name] for name in heads)}</tr><tr><td colspan={len(heads)}><details>"
        f"<summary>{text(' '.join(row.prompt.split()), 160)}</summary>{opened(row, large, key)}"
        "</details></td></tr></tbody>\n"
    )


def number_cell(label, shown):
    return f'<td class="r" data-l="{label}">{shown}</td>'


def share_of_label(votes):
    """The pseudo-label's share of the last vote, the sort key of the column; "" without votes."""
    if not votes:
        return ""
    line = votes[-1]
    return f"{max(line['votes'].values(), default=0) / max(1, drawing.size(line)):.3f}"


def opened(row, bars, key):
    """The details of a question: the whole prompt, large bars, the responses before and after."""
    parts = (
        [f"<pre>{text(row.prompt, LONGEST_TEXT)}</pre>"]
        if len(row.prompt) > 160 or "\n" in row.prompt
        else []
    )
    if row.votes:
        parts.append(bars + key)
    figures = [
        f"<figure><figcaption>{when}: {agreement(record)}</figcaption>"
        f"<pre>{marked(record['response'], record.get('answer'))}</pre></figure>"
        for when, record in (("Before", row.before), ("After", row.after))
        if record
    ]
    parts += [f'<div class="pair">{"".join(figures)}</div>'] if figures else []
    return f'<div class="open">{"".join(parts)}</div>'


def agreement(record):
    """The caption of a response: how many responses agree with it."""
    if record["majority"] is None:
        return "no response has an answer. Example:"
    count, of = round(record["majority_ratio"] * len(record["answers"])), len(record["answers"])
    verdict = "" if record["truth"] is None else " (right)" if record["majority_right"] else " (wrong)"
    return f"{count} of {of} responses say {code(record['majority'])}{verdict}. Example:"
