"""Draw the pictures of docs/theory.md and docs/lessons.md from what the real functions return.

python docs/figures.py                   # under a minute on a CPU: writes the PNG files beside this one
python docs/figures.py --out folder      # writes them elsewhere; also prints the numbers of docs/theory.md

shapes.png     one step, P = 2 questions, N = 4 votes, M = 3 trained: [P][N] -> [P, N] -> [P, M] -> [B, R]
refill.png     which row runs in which slot while 24 rows are sampled in 8 slots
packing.png    a packed micro-batch and its attention mask, the example of packing.pack_responses
majority.png   when a majority helps: the embedded pair before training
"""

import argparse
import sys
from collections import Counter
from itertools import zip_longest
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import grading  # noqa: E402
import rollout  # noqa: E402
from kernels.packing import pack_responses  # noqa: E402
from model import Transformer  # noqa: E402
from support import questions  # noqa: E402
from support.prompts import decode_response, encode_prompt, load_tokenizer  # noqa: E402
from ttrl import advantages, vote  # noqa: E402

GREEN, GREY, LIGHT, RED = "#2a9d5c", "#c9c9c9", "#f2f2f2", "#c8553d"
COLORS = ["#8ecae6", "#ffb703", "#a3c585", "#e5989b"]  # of questions
FOLDER = HERE.parent / "tiny" / "model"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=HERE, help="the folder of the pictures [%(default)s]")
    out = parser.parse_args().out
    torch.set_num_threads(1)
    policy, (tokenizer, eos_ids) = Transformer.from_pretrained(FOLDER), load_tokenizer(FOLDER)
    loaded = questions.load("tiny")
    prompts = [encode_prompt(tokenizer, question.prompt) for question in loaded]
    options = dict(max_new_tokens=96, eos_ids=eos_ids, seed=0, stream="eval", step=0)
    save(draw_shapes(), out / "shapes.png")
    save(draw_packing(), out / "packing.png")
    save(draw_refill(policy, [prompts[i] for i in (0, 1, 9, 3)], options), out / "refill.png")
    save(draw_majority(policy, tokenizer, loaded, prompts, options), out / "majority.png")


def save(figure, path):
    figure.savefig(path, dpi=90, facecolor="white")
    print(path)


def title(ax, text, size=10):
    ax.set_title(text, loc="left", fontsize=size, weight="bold")


def cell(ax, x, y, color, text="", size=0.9):
    ax.add_patch(Rectangle((x, y), size, 0.8, facecolor=color, edgecolor="white"))
    ax.text(x + size / 2, y + 0.4, text, ha="center", va="center", fontsize=8.5)


def cells(ax, y, colors, texts="", note=""):
    """A row of cells from x = 0, and behind it a note."""
    for x, (color, text) in enumerate(zip_longest(colors, texts, fillvalue="")):
        cell(ax, x, y, color, text)
    ax.text(len(colors) + 0.3, y + 0.4, note, fontsize=9, va="center")


# ----------------------------------------------------------------------------------------------------------
# one step


def draw_shapes():
    """Answers, rewards, advantages and the masked rows of a mini-batch, for two questions."""
    asked = ["1+2=?", "9+4=?"]
    answers = [["3", "3", "4", "3"], ["3", "13", None, "13"]]
    lengths = [[6, 5, 6, 7], [6, 8, 9, 7]]
    trained = 3
    votes = [vote(group) for group in answers]
    rewards = [[float(a == label) for a in group] for group, (label, _) in zip(answers, votes, strict=True)]
    advantage = advantages(torch.tensor(rewards)[:, :trained]).tolist()

    figure = Figure(figsize=(13, 3.9), layout="constrained")
    axes = figure.subplots(1, 5, width_ratios=(1.5, 1, 1, 0.85, 1.35))
    titles = [
        "2 sample: responses [P][N]\nlists of tokens, each as long as it is",
        "3 extract: answers [P, N]\n4 vote: a label per question",
        "4 reward [P, N]\n1 if it agrees with the label",
        "5 advantage [P, M]\n(r - mean) / std",
        "6 learn: mini-batch [B, R]\none advantage for all tokens of a row",
    ]
    for ax, text in zip(axes, titles, strict=True):
        title(ax, text, 9.5)
        ax.axis("off")
    show_responses(axes[0], asked, lengths, answers, votes)
    show_grid(
        axes[1], [[a or "none" for a in row] for row in answers], rewards, [f"label {v[0]}" for v in votes]
    )
    show_grid(axes[2], [[f"{r:.0f}" for r in row] for row in rewards], rewards)
    show_grid(axes[3], [[f"{a:+.2f}" for a in row] for row in advantage], rewards)
    show_mini_batch(axes[4], lengths, advantage, trained)
    return figure


def show_responses(ax, asked, lengths, answers, votes):
    """A bar for each response, as long as the response."""
    for p, group in enumerate(lengths):
        ax.text(0, 10.2 - 5.5 * p, f"{asked[p]}", fontsize=10, weight="bold")
        for n, length in enumerate(group):
            color = GREEN if answers[p][n] == votes[p][0] else GREY
            cells(ax, 9.1 - 5.5 * p - n, [color] * length, note=answers[p][n] or "no answer")
    ax.set(xlim=(0, 13), ylim=(0, 11))


def show_grid(ax, texts, rewards, notes=("", "")):
    """A table with a line for each question, green where the response agrees with the label."""
    for p, row in enumerate(texts):
        cells(ax, 7.5 - 5.5 * p, [GREEN if r else GREY for r in rewards[p][: len(row)]], row)
        ax.text(0, 6.6 - 5.5 * p, notes[p], fontsize=10, weight="bold")
    ax.set(xlim=(0, 4.1), ylim=(0, 11))


def show_mini_batch(ax, lengths, advantage, trained):
    """The rows of both questions that are trained on; white is behind the end of a response."""
    width = max(max(group[:trained]) for group in lengths)
    for p, group in enumerate(lengths):
        for m in range(trained):
            a, length = advantage[p][m], group[m]
            colors = [GREEN if a > 0 else RED] * length + [LIGHT] * (width - length)
            cells(ax, 8.1 - 5.5 * p - m, colors)
            ax.text(width + 0.2, 8.5 - 5.5 * p - m, f"{a:+.2f}", fontsize=9, va="center")
    ax.text(0, 10.2, "B = 6 rows, R = 9 tokens", fontsize=10)
    ax.text(0, -0.4, "green: more probable, red: less probable,\nlight: masked", fontsize=9, va="top")
    ax.set(xlim=(0, 12), ylim=(0, 11))


# ----------------------------------------------------------------------------------------------------------
# packing


def draw_packing():
    """The flat tokens, what each predicts, and which token sees which."""
    batch, letters = packed_example()
    flat = [letters[token] for token in batch.tokens.tolist()]
    predicts = {index: [] for index in range(len(flat))}
    for index, target in zip(batch.logit_positions.tolist(), batch.targets.tolist(), strict=True):
        predicts[index].append(letters[target])
    colors = [COLORS[0]] * 3 + [COLORS[1]] + [COLORS[2]] * 2
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.45, 1))
    for ax in (left, right):
        ax.axis("off")
        ax.set_aspect("equal")
    title(left, "two rows of one question: padded, and packed")
    for row, text in enumerate(("abcde ", "abcfgh")):
        own = [COLORS[0]] * 3 + [COLORS[1 + row] if letter != " " else LIGHT for letter in text[3:]]
        cells(left, 5.2 - row, own, text)
    cells(left, 2, colors, flat)
    for index in range(len(flat)):
        left.text(index + 0.45, 3.0, index, ha="center", fontsize=8, color="0.4")
        left.text(index + 0.45, 1.6, " ".join(predicts[index]) or "-", ha="center", va="top", fontsize=9.5)
    notes = {
        5.1: "12 places: the prompt a b c twice,\none place of padding",
        2.4: "6 places: the prompt once, no padding,\nno last token (it predicts nothing)",
        1.4: "what the logits there predict",
    }
    for y, text in notes.items():
        left.text(6.3, y, text, fontsize=9.5, va="center")
    left.set(xlim=(0, 13), ylim=(0.6, 6.4))
    show_mask(right, who_sees(batch), flat, colors)
    return figure


def packed_example():
    """The PackedBatch of the docstring of pack_responses, and its letters by token id."""
    letters = " abcdefgh"
    rows = rollout.empty_rollout([[1, 2, 3]], [(0, 0), (0, 1)], max_new_tokens=3)
    for row, response in enumerate(([4, 5], [6, 7, 8])):
        rows.fill(row, torch.tensor(response), torch.zeros(len(response)), eos_ids=[])
    return pack_responses(rows, windows=[None]), letters


def who_sees(batch):
    """Which flat tokens each one attends to, over all groups of the batch: [T, T] of bool."""
    sees = torch.zeros(len(batch.tokens), len(batch.tokens), dtype=torch.bool)
    for group in batch.groups:
        mask = group.mask(None).expand(len(group.query), -1, -1, -1)[:, 0].flatten(0, 1)[group.real]
        keys = group.key.repeat_interleave(group.query.shape[1], 0)[group.real]
        for query, key, allowed in zip(group.query.flatten()[group.real], keys, mask, strict=True):
            sees[query, key[allowed]] = True
    return sees


def show_mask(ax, sees, flat, colors):
    """A square for each (query, key), coloured where the query sees the key."""
    title(ax, "who sees whom: a query in each line,\na key in each column")
    for query, letter in enumerate(flat):
        ax.text(-0.3, 5.4 - query, letter, ha="right", va="center", fontsize=10)
        ax.text(query + 0.45, 6.05, letter, ha="center", fontsize=10)
        cells(ax, 5 - query, [colors[query] if seen else LIGHT for seen in sees[query]])
    ax.set(xlim=(-0.8, 6.1), ylim=(-0.2, 6.6))


# ----------------------------------------------------------------------------------------------------------
# refill


def draw_refill(policy, prompts, options, slots=8, votes=6):
    """Slots over time: in batches that wait for their longest row, and as the scheduler refilled them."""
    history = []

    class Recorder(rollout.Scheduler):
        def decode(self):
            history.append(list(self.running))
            super().decode()

    longest = max(map(len, prompts)) + options["max_new_tokens"]
    original, rollout.Scheduler = rollout.Scheduler, Recorder
    try:
        rows = rollout.generate(policy, prompts, votes, budget_tokens=slots * longest, **options)
    finally:
        rollout.Scheduler = original
    lengths = rows.response_length.tolist()
    waiting = []  # for each step the rows that still run, None where a row of the batch has ended
    for start in range(0, len(lengths), slots):
        batch = range(start, start + slots)
        for step in range(1, max(lengths[row] for row in batch)):
            waiting.append([row if step < lengths[row] else None for row in batch])
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    title(above, f"batches of {slots} that wait for their longest row: {len(waiting)} steps")
    show_slots(above, waiting, rows.question.tolist(), slots)
    title(below, f"rollout.py: a row that ends makes room for the next: {len(history)} steps")
    show_slots(below, history, rows.question.tolist(), slots)
    below.set_xlim(0, max(len(waiting), len(history)))
    below.set_xlabel(
        f"decoding step; {len(lengths)} rows, a colour for each question, its number where a row starts"
    )
    print(f"refill: {len(waiting)} steps in batches, {len(history)} with refill")
    return figure


def show_slots(ax, history, question_of, slots):
    """A line for each slot, a bar for each stretch of steps that a row spends in it."""
    started = set()
    for start, running in enumerate(history):
        for slot, row in enumerate(running):
            if row is None or (start and history[start - 1][slot : slot + 1] == [row]):
                continue
            end = start + 1
            while end < len(history) and history[end][slot : slot + 1] == [row]:
                end += 1
            color = COLORS[question_of[row]]
            ax.add_patch(Rectangle((start, slot), end - start, 0.9, facecolor=color, edgecolor="white"))
            if row not in started:
                ax.text(start + 0.6, slot + 0.45, row, fontsize=8, va="center")
            started.add(row)
    ax.set(ylim=(slots, 0), ylabel="slot")
    ax.spines[["top", "right"]].set_visible(False)


# ----------------------------------------------------------------------------------------------------------
# majority


def draw_majority(policy, tokenizer, loaded, prompts, options, votes=64):
    """The share of the right answer against that of its strongest rival, and the vote by its size."""
    rows = rollout.generate(policy, prompts, votes, budget_tokens=256 * 150, **options)
    texts = [decode_response(tokenizer, rows.response(row)) for row in range(len(rows))]
    answers = [grading.extract_answer(text) for text in texts]
    counts = [Counter(answers[start : start + votes]) for start in range(0, len(answers), votes)]
    shares = []
    for question, count in zip(loaded, counts, strict=True):
        count.pop(None, None)
        rival = max((n for answer, n in count.items() if answer != question.answer), default=0)
        shares.append((count[question.answer] / votes, rival / votes))
    report(loaded, counts, shares, votes)
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    title(left, f"{len(loaded)} questions, {votes} samples each")
    show_shares(left, shares)
    title(right, "more votes enlarge the lead, whoever has it")
    show_votes(right, [q.answer for q in loaded], counts, [own > rival for own, rival in shares])
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
    return figure


def show_shares(ax, shares, top=0.85):
    """A point for each question, green where the right answer leads."""
    colors = [GREEN if own > rival else RED for own, rival in shares]
    ax.plot([0, top], [0, top], color="black", lw=0.8)
    ax.axvline(0.5, color="0.6", lw=0.8, ls=":")
    ax.text(0.51, 0.72, "more than half", fontsize=9, color="0.4")
    ax.scatter(*zip(*shares, strict=True), c=colors, s=28)
    ax.set(xlim=(0, top), ylim=(0, top))
    ax.set(xlabel="share of the right answer", ylabel="share of the most frequent wrong answer")


def show_votes(ax, truths, counts, leads):
    """The probability that a vote is right by its size, for questions where the right answer leads or not."""
    sizes = [1, 2, 4, 8, 16, 32, 64]
    for name, lead, color in (("right answer leads", True, GREEN), ("a wrong answer leads", False, RED)):
        group = [
            (count, truth)
            for count, truth, leading in zip(counts, truths, leads, strict=True)
            if leading == lead
        ]
        means = [sum(vote_is_right(count, truth, n) for count, truth in group) / len(group) for n in sizes]
        ax.plot(sizes, means, "o-", color=color, label=name)
    ax.set(xscale="log", xlabel="votes drawn", ylabel="probability that the vote is right", ylim=(0, 1.02))
    ax.set_xticks(sizes, sizes)
    ax.minorticks_off()
    ax.legend(frameon=False, loc="upper left")


def vote_is_right(count, truth, votes, trials=400):
    """How often a vote of so many samples, drawn anew from the answers counted, is right."""
    names = list(count)
    generator = torch.Generator().manual_seed(0)
    weights = torch.tensor([float(count[name]) for name in names])
    drawn = torch.multinomial(weights, trials * votes, replacement=True, generator=generator).view(
        trials, votes
    )
    tally = torch.nn.functional.one_hot(drawn, len(names)).sum(1).float()
    tally += torch.rand(tally.shape, generator=generator) * 0.5  # a tie is broken at random
    return float((tally.argmax(1) == names.index(truth)).float().mean()) if truth in names else 0.0


def report(loaded, counts, shares, votes):
    """The numbers of docs/theory.md."""
    lead = [right > rival for right, rival in shares]
    few = sum(right > rival and right <= 0.5 for right, rival in shares)
    mean = sum(right for right, _ in shares) / len(shares)
    print(f"majority: pass@1 {mean:.3f}; the right answer leads in {sum(lead)} of {len(loaded)} questions,")
    print(f"majority: in {few} of these with no more than half of the samples")
    for question, count in zip(loaded, counts, strict=True):
        if question.id in ("tiny-04", "tiny-06"):
            print(f"majority: {question.prompt} {count.most_common(3)} of {votes}")


if __name__ == "__main__":
    main()
