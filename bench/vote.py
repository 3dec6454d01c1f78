r"""Seconds of a vote: extraction from 64 responses with 64 different formulas, and their grouping by value.

    python bench/vote.py                # a few seconds on one core

All GPUs wait while rank 0 votes, so the worst case counts: every response gives another formula. Each kind
is read for the first time (the cache is emptied), with the answer at the end of an ordinary response. The
last row is what a step really looks like: 512 responses to 8 questions, mostly numbers that repeat. At the
end one line of JSON.
"""

import random

from common import arguments, clocked, last_line, say, table

import grading

TEXT = "Let us think step by step. " * 60
FORMULAS = {  # of a number from 2 to 65
    "radicals": lambda n: rf"\frac{{{n}\sqrt{{5}}+3\sqrt{{{n + 9}}}}}{{6}}",
    "polynomials": lambda n: rf"x^4 - {n}x^3 + 7x^2 - {2 * n + 1}x + 12",
    "trigonometric": lambda n: rf"\sin {n}x + \cos\left(\frac{{x}}{{{n}}}\right) - 2\tan x",
    "logarithmic": lambda n: rf"\ln({n}x+1) - \frac{{\log_2 {n + 1}}}{{3}}",
    "nested roots": lambda n: rf"\sqrt{{{n}+\sqrt{{7+\sqrt[3]{{{n}}}}}}}",
    "powers": lambda n: rf"2^{{{n}}} \cdot 3^{{{n}x}} - (x+{n})^{{12}}",
    "tuples": lambda n: rf"\left({n}, \frac{{\sqrt{{{n}}}}}{{2}}, -\frac{{\pi}}{{{n}}}\right)",
    "matrices": lambda n: rf"\begin{{pmatrix}} {n} & \frac{{1}}{{{n}}} \\ -\sqrt{{{n}}} & 3 \end{{pmatrix}}",
    "intervals": lambda n: rf"(-\infty, -\sqrt{{{n}}}) \cup \left[\frac{{{n}}}{{3}}, \infty\right)",
    "systems": lambda n: rf"{n}x + 3y = 7, \quad x - {n}y = 2",
    "conics": lambda n: rf"\frac{{(x-{n})^2}}{{16}} + \frac{{(y+3)^2}}{{{n}}} = 1",
    "inequalities": lambda n: rf"|{n}x - 5| \le {n + 2}",
    "plus and minus": lambda n: rf"x = \frac{{{n} \pm \sqrt{{{n + 5}}}}}{{4}}",
    "complex": lambda n: rf"\frac{{{n} - 3i}}{{2 + i}}",
}


def responses(formulas):
    return [f"{TEXT}So the answer is $\\boxed{{{formula}}}$." for formula in formulas]


def vote(groups):
    """(classes, CPU-seconds) of extraction and grouping, from an empty cache."""
    grading._read.cache_clear()

    def graded():
        return [grading.classes([*map(grading.extract_answer, group)]) for group in groups]

    found, _, seconds = clocked(graded)
    return sum(map(len, found)), seconds


def ordinary():
    """8 groups of 64 responses: one answer in eight is a formula, two thirds of the numbers are the same."""
    draw, formulas = random.Random(0), [*FORMULAS.values()]
    groups = []
    for question in range(8):
        answers = [str(17 * question if draw.random() < 2 / 3 else draw.randrange(40)) for _ in range(64)]
        answers[::8] = [draw.choice(formulas)(draw.randrange(2, 9)) for _ in answers[::8]]
        groups.append(responses(answers))
    return groups


def main():
    arguments(__doc__).parse_args()
    kinds = {kind: [responses(map(formula, range(2, 66)))] for kind, formula in FORMULAS.items()}
    kinds["ordinary responses"] = ordinary()
    found = {kind: vote(groups) for kind, groups in kinds.items()}
    counts = {kind: sum(map(len, groups)) for kind, groups in kinds.items()}
    rows = [(kind, counts[kind], classes, f"{seconds:.3f}") for kind, (classes, seconds) in found.items()]
    say(table(("kind", "answers", "classes", "seconds"), rows))
    last_line(
        **{kind: {"classes": classes, "seconds": seconds} for kind, (classes, seconds) in found.items()}
    )


if __name__ == "__main__":
    main()
