"""The tasks of bench/real.py: unlabelled questions, the model that is asked, and the flags of ttrl.py.

The prompts of SmolLM2's tasks are taken verbatim. Most begin with two worked examples, which show a model of
135 M parameters the form of the answer; number-after begins the answer instead. The word problems of
Qwen2.5-Coder follow one worked example, which shows it to be brief. The questions carry their true answers
for the report alone: the vote never sees them.
"""

import json
import random
from dataclasses import dataclass

OPPOSITES = (  # whose answers are one token each, so that six tokens are enough for the box
    "big small, fast slow, light dark, young old, rich poor, hard soft, wet dry, full empty, "
    "open closed, early late, strong weak, high low, good bad, near far, left right, "
    "day night, war peace, begin end"
)
PAIRS = [tuple(pair.split()) for pair in OPPOSITES.split(", ")]


def opposites():
    examples = "The opposite of hot is \\boxed{cold}.\nThe opposite of up is \\boxed{down}.\n"
    return [(word, f"{examples}The opposite of {word} is", answer) for word, answer in PAIRS]


def subtraction():
    examples = "58 - 23 = \\boxed{35}.\n91 - 47 = \\boxed{44}.\n"
    draw = random.Random(0)
    sums = [sorted(draw.sample(range(10, 100), 2), reverse=True) for _ in range(12)]
    return [(f"{a}-{b}", f"{examples}{a} - {b} =", f"{a - b}") for a, b in sums]


def turn(question, reply):
    """A question and its reply, or the beginning of one, in the chat template."""
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{reply}"


def sentences():
    """Opposites again, as turns of the chat template; the response is a whole sentence and ends by itself."""

    def ask(word):
        return f"What is the opposite of {word}?"

    def reply(word, answer):
        return f"The opposite of {word} is {answer}, so the answer is \\boxed{{{answer}}}.<|im_end|>\n"

    examples = "".join(
        turn(ask(word), reply(word, answer)) for word, answer in (("hot", "cold"), ("up", "down"))
    )
    return [(word, examples + turn(ask(word), ""), answer) for word, answer in PAIRS[:12]]


def sums():
    """Three digits added in two written steps, as turns of the chat template, below three examples."""

    def ask(a, b, c):
        return f"What is {a} + {b} + {c}?"

    def reply(a, b, c):
        boxed = f"\\boxed{{{a + b + c}}}"
        return f"{a} + {b} = {a + b}, then {a + b} + {c} = {a + b + c}. {boxed}<|im_end|>\n"

    shown, draw, asked = [(3, 9, 2), (6, 4, 7), (8, 5, 5)], random.Random(1), []
    while len(asked) < 24:
        terms = tuple(draw.randint(2, 9) for _ in range(3))
        asked += [terms] if terms not in (*shown, *asked) else []
    examples = "".join(turn(ask(*terms), reply(*terms)) for terms in shown)
    return [("+".join(map(str, t)), examples + turn(ask(*t), ""), f"{sum(t)}") for t in asked]


SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"  # the chat template's own
NUMBERS = random.Random(0).sample(range(11, 99), 80)


def number_after(numbers):
    """What comes after a number, without examples; the response is the number and a full stop."""

    def prompt(number):
        question, begun = f"What number comes right after {number}?", f"The number after {number} is "
        return f"<|im_start|>system\n{SYSTEM}<|im_end|>\n{turn(question, begun)}"

    return [(f"{number}", prompt(number), f"{number + 1}") for number in numbers]


NAMES = "Anna Ben Clara David Emma Felix Grace Hugo Ida Jonas".split()
THINGS = "apples books cards coins eggs flowers marbles oranges pens shells stamps tickets".split()
SHOWN = (
    "A garden has 3 rows with 14 trees each. 12 trees fall in a storm, and 5 are planted. "
    "How many trees are there then?",
    "3 rows with 14 trees each are 3 * 14 = 42 trees. After the storm there are 42 - 12 = 30 trees. "
    "With the 5 new ones there are 30 + 5 = 35 trees. \\boxed{35}<|im_end|>\n",
)
TEMPLATES = (  # of two and three steps: the text, its answer, the ranges of a, b, c, d
    (
        "{who} packs {a} boxes with {b} {what} each and {c} boxes with {d} {what} each. "
        "How many {what} are packed in all?",
        lambda a, b, c, d: a * b + c * d,
        ((3, 9), (12, 29), (3, 9), (12, 29)),
    ),
    (
        "{who} has {a} bags with {b} {what} each. {c} {what} are given away, and the rest is shared equally "
        "by {d} children. How many {what} does each child get?",
        lambda a, b, c, d: (a * b - c) / d,
        ((4, 9), (11, 25), (5, 40), (3, 6)),
    ),
    (
        "A train has {a} wagons with {b} seats each. {c} seats are taken when it leaves, and at the first "
        "stop {d} people get off. How many seats are free then?",
        lambda a, b, c, d: a * b - c + d,
        ((4, 9), (22, 48), (40, 85), (11, 35)),
    ),
    (
        "{who} works {a} hours a day for {b} days and earns {c} dollars an hour. "
        "How many dollars does {who} earn in all?",
        lambda a, b, c, d: a * b * c,
        ((4, 8), (3, 6), (11, 19), (0, 0)),
    ),
    (
        "{who} buys {a} tickets for {b} dollars each and {c} drinks for {d} dollars each, and pays with a "
        "500 dollar note. How many dollars come back?",
        lambda a, b, c, d: 500 - a * b - c * d,
        ((4, 9), (13, 28), (5, 9), (3, 9)),
    ),
    (
        "A shop sells {a} boxes with {b} {what} each and {c} single {what}. "
        "How many {what} does it sell in all?",
        lambda a, b, c, d: a * b + c,
        ((4, 9), (13, 29), (11, 48), (0, 0)),
    ),
)


def word_problems(seed, count):
    """Word problems of two and three steps, as many of each template; a seed has questions of its own."""
    draw, problems = random.Random(seed), []
    while len(problems) < count:
        text, answer, ranges = TEMPLATES[len(problems) % len(TEMPLATES)]
        numbers = [draw.randint(*bounds) for bounds in ranges]
        value = answer(*numbers)
        if value > 0 and value % 1 == 0:
            words = dict(zip("abcd", numbers, strict=True), who=draw.choice(NAMES), what=draw.choice(THINGS))
            prompt = turn(*SHOWN) + turn(text.format(**words), "")
            problems.append((f"{seed}-{len(problems)}", prompt, f"{value:.0f}"))
    return problems


# ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    model: str  # of wheels.MODELS
    questions: object  # () -> list of (id, prompt, true answer)
    flags: str  # of ttrl.py
    held_out: object = None  # questions of the same kind that training never sees


def write_questions(questions, path):
    """A question file for --data, of (id, prompt, true answer)."""
    rows = [{"id": key, "prompt": prompt, "answer": answer} for key, prompt, answer in questions]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


COUNTING = (
    "--template none --temperature 1.0 --votes 32 --samples 16 --kl 0 "
    "--eval-samples 32 --eval-temperature 1.0 --eval-top-p 1.0 "
)
LONG = COUNTING + "--questions-per-step 6 --lr 1e-5"
NUMBER_AFTER = COUNTING + "--questions-per-step 8 --lr 5e-6 --epochs 2 --max-new-tokens 4 --eval-every 3"
WORD_PROBLEMS = (  # temperature 0.6 and the evaluation are the paper's for this model
    "--template none --votes 16 --samples 8 --kl 0 --questions-per-step 6 --lr 2e-6 --epochs 1 "
    "--max-new-tokens 128 --eval-every 3"
)
SMOL, QWEN = "smollm2-135m", "qwen2.5-coder-0.5b"
TASKS = {
    "opposites": Task(SMOL, opposites, f"{LONG} --epochs 3 --max-new-tokens 6 --eval-every 5"),
    "sentences": Task(SMOL, sentences, f"{LONG} --epochs 2 --max-new-tokens 24 --eval-every 4"),
    "subtraction": Task(SMOL, subtraction, f"{LONG} --epochs 3 --max-new-tokens 7 --eval-every 3"),
    "sums": Task(SMOL, sums, f"{LONG} --epochs 2 --max-new-tokens 32 --eval-every 4"),
    "number-after": Task(
        SMOL, lambda: number_after(NUMBERS[:40]), NUMBER_AFTER, held_out=lambda: number_after(NUMBERS[40:])
    ),
    "word-problems": Task(
        QWEN, lambda: word_problems(4, 18), WORD_PROBLEMS, held_out=lambda: word_problems(5, 18)
    ),
}
