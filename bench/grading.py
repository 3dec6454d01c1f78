r"""Equality of answers beside math-verify's own parse and verify, on the pairs of tests/answer_pairs.jsonl.

    python bench/grading.py             # about two minutes on one core

math-verify is asked as its README recommends for answers: parse("$...$") with its LaTeX and expression
extraction, then verify(gold, answer); a pair is equal only if it says so in both orders, as a vote does not
know which of two is the truth. Wrongly equal is the worse mistake: it makes the class of a wrong label
larger. At the end one line of JSON.
"""

import json
import logging
import time

from common import ROOT, arguments, last_line, peer, say, table

import grading

LINES = (ROOT / "tests" / "answer_pairs.jsonl").read_text("utf-8").splitlines()
PAIRS = [pair for pair in map(json.loads, LINES) if not pair.get("choice")]
RESULTS = ("right", "wrongly equal", "wrongly different")


def math_verify_equal():
    """math-verify as a function of two answers."""
    library = peer("math_verify")
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    targets = [library.LatexExtractionConfig(), library.ExprExtractionConfig()]

    def equal(a, b):
        first, second = (library.parse(f"${answer}$", extraction_config=targets) for answer in (a, b))
        return library.verify(first, second) and library.verify(second, first)

    return equal


def both_orders(a, b):
    return grading.same_answer(a, b) and grading.same_answer(b, a)


def judged(equal):
    """{kind: {right, wrongly equal, wrongly different, seconds}} of a function of two answers."""
    equal("1", "2")  # the imports are not on the clock
    found = {}
    for pair in PAIRS:
        row = found.setdefault(pair["kind"], dict.fromkeys((*RESULTS, "seconds"), 0))
        began = time.process_time()
        try:
            said = bool(equal(pair["a"], pair["b"]))
        except Exception:  # counted as "different", which is what a user would make of it
            said = False
        row["seconds"] += time.process_time() - began
        row["right" if said == pair["equal"] else "wrongly equal" if said else "wrongly different"] += 1
    found["all"] = {column: sum(row[column] for row in found.values()) for column in (*RESULTS, "seconds")}
    return found


def main():
    arguments(__doc__).parse_args()
    sides = {"ours": judged(both_orders), "math-verify": judged(math_verify_equal())}
    header = ["kind", "pairs", *("right", "=", "/=", "s") * 2]
    rows = []
    for kind in sides["ours"]:
        pairs = sum(sides["ours"][kind][column] for column in RESULTS)
        cells = ([*(row[kind][c] for c in RESULTS), f"{row[kind]['seconds']:.2f}"] for row in sides.values())
        rows.append([kind, pairs, *(cell for side in cells for cell in side)])
    say(table(header, rows))
    say("\nours, then math-verify; = is wrongly equal, /= is wrongly different\n")
    last_line(pairs=len(PAIRS), **{side.replace("-", "_"): kinds for side, kinds in sides.items()})


if __name__ == "__main__":
    main()
