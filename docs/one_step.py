"""Draw docs/one_step.png: what a training step does with one question, from its samples to their advantages.

    python docs/one_step.py                    # seconds on a CPU
    python docs/one_step.py --out step.png     # write to another file

These are the samples of the first step of `python ttrl.py --seed 0`: random numbers depend on seed, step,
question and sample only.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

import torch
from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import grading  # noqa: E402
from model import Transformer  # noqa: E402
from rewards import Group  # noqa: E402
from rollout import generate  # noqa: E402
from support import questions  # noqa: E402
from support.config import configure  # noqa: E402
from support.prompts import decode_response, encode_prompt, load_tokenizer  # noqa: E402
from ttrl import advantages, draw_questions, vote, vote_reward  # noqa: E402

QUESTION = 6  # of the eight of this step: the majority is right, but only half of the samples agree with it
AGREES, DIFFERS = "#2a9d5c", "#c9c9c9"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=HERE / "one_step.png", help="the picture [%(default)s]")
    out = parser.parse_args().out
    torch.set_num_threads(1)
    c = configure({})  # the embedded pair, seed 0
    question, texts, answers = sample_responses(c)
    label, classes = vote(answers, question.kind)
    rewards = vote_reward(Group(answers=answers, classes=classes))
    advantage = advantages(torch.tensor([rewards])[:, : c.samples])[0].tolist()

    figure = Figure(figsize=(12, 5.6), layout="constrained")
    panels = figure.subplot_mosaic(
        [["responses", "votes"], ["advantages", "advantages"]], width_ratios=(1, 1.2)
    )
    show_responses(panels["responses"], question, texts, answers, label)
    draw_votes(panels["votes"], question, answers, label, rewards)
    draw_advantages(panels["advantages"], answers, rewards, advantage)
    figure.savefig(out, dpi=100)
    print(f"{out}: {question.prompt} {sum(rewards):.0f} of {c.votes} samples agree on {label}")


def sample_responses(c):
    """(the question, its N responses as text, their N answers)."""
    folder = HERE.parent / "tiny" / "model"
    tokenizer, eos_ids = load_tokenizer(folder)
    loaded = questions.load(c.data)
    drawn = [loaded[index] for index in draw_questions(0, len(loaded), c.questions_per_step, c.seed)]
    prompts = [encode_prompt(tokenizer, question.prompt) for question in drawn]
    rows = [(QUESTION, sample) for sample in range(c.votes)]
    options = dict(max_new_tokens=c.max_new_tokens, temperature=c.temperature, eos_ids=eos_ids)
    policy = Transformer.from_pretrained(folder)
    rollout = generate(policy, prompts, rows, seed=c.seed, stream="train", step=1, **options)
    texts = [decode_response(tokenizer, rollout.response(row)) for row in range(c.votes)]
    answers = [
        grading.extract_answer(text, truncated=not finished)
        for text, finished in zip(texts, rollout.finished.tolist(), strict=True)
    ]
    return drawn[QUESTION], texts, answers


def show_responses(axes, question, texts, answers, label, how_many=5):
    """The question and its first responses as text, green where they agree with the label."""
    axes.axis("off")
    axes.set_title("1 draw, 2 sample, 3 extract the answers", loc="left", weight="bold")
    options = dict(va="top", transform=axes.transAxes)
    axes.text(0, 0.95, question.prompt, fontsize=13, **options)
    for row in range(how_many):
        color = AGREES if answers[row] == label else "0.4"
        line = " ".join(texts[row].split())
        axes.text(0, 0.76 - 0.12 * row, line, fontsize=10, family="monospace", color=color, **options)
    axes.text(0, 0.76 - 0.12 * how_many, f"... {len(texts)} responses in all", fontsize=11, **options)


def draw_votes(axes, question, answers, label, rewards):
    """A bar for each answer, the most frequent first, and one for the samples without an answer."""
    counts = Counter(answer for answer in answers if answer is not None).most_common()
    names = [*(name for name, _ in counts), "no\nanswer"]
    heights = [*(count for _, count in counts), answers.count(None)]
    bars = axes.bar(names, heights, color=[AGREES if name == label else DIFFERS for name in names])
    axes.bar_label(bars)
    axes.set_title(
        f"4 vote: the most frequent answer is the pseudo-label, {label}", loc="left", weight="bold"
    )
    agree = sum(rewards)
    text = f"reward 1: the {agree:.0f} samples that agree with it\n"
    text += f"reward 0: the other {len(answers) - agree:.0f}\n"
    text += f"The true answer, {question.answer}, is not read."
    axes.text(0.98, 0.9, text, fontsize=12, ha="right", va="top", transform=axes.transAxes)
    axes.set_ylabel("samples")
    axes.margins(y=0.12)
    axes.spines[["top", "right"]].set_visible(False)


def draw_advantages(axes, answers, rewards, advantage):
    """The trained samples in their order: answer, reward and advantage of each."""
    count = len(advantage)
    colors = [AGREES if reward else DIFFERS for reward in rewards[:count]]
    axes.bar(range(count), advantage, color=colors)
    axes.axhline(0, color="black", lw=0.8)
    labels = [f"{answer or '-'}\n{reward:.0f}" for answer, reward in zip(answers, rewards, strict=True)]
    axes.set_xticks(range(count), labels[:count])
    axes.tick_params(axis="x", length=0)
    title = f"5 advantage = (reward - mean) / std over the first {count} samples;   "
    axes.set_title(title + "6 learn: green becomes more probable, grey less", loc="left", weight="bold")
    axes.set(ylabel="advantage", xlabel="answer and reward of each sample", xlim=(-0.7, count - 0.3))
    axes.spines[["top", "right", "bottom"]].set_visible(False)


if __name__ == "__main__":
    main()
