"""Unions of real intervals, sorted tuples of (low, low_closed, high, high_closed); linear inequalities.

Ends are Fraction, mpf or a float infinity; two ends are the same if their keys are.
"""

import math
from fractions import Fraction

from support import formula, numeric
from support.formula import NotFormula

INFINITY = math.inf
ALL = ((-INFINITY, False, INFINITY, False),)


def real(tree):
    """The number of a formula without letters, which has to be real."""
    if numeric.letters(tree):
        raise NotFormula("an end with letters")
    number = numeric.values(tree)[0]
    if isinstance(number, numeric.MP.mpc):
        raise NotFormula("a complex end")
    return number


def end_key(number):
    if number in (INFINITY, -INFINITY):
        return ("infinity", number < 0)
    return numeric.key((number,))


def _less(a, b) -> bool:
    return end_key(a) != end_key(b) and numeric.comparable(a) < numeric.comparable(b)


def interval(low, low_closed: bool, high, high_closed: bool) -> tuple:
    """One interval; raises NotFormula if its ends are not in order."""
    if _less(high, low) or (not _less(low, high) and not (low_closed and high_closed)):
        raise NotFormula("no interval")
    return ((low, low_closed and low != -INFINITY, high, high_closed and high != INFINITY),)


def intersection(*sets: tuple) -> tuple:
    result = ALL
    for pieces in sets:
        pairs = [(_later(a[:2], b[:2]), _earlier(a[2:], b[2:])) for a in result for b in pieces]
        result = tuple((*low, *high) for low, high in pairs if _less(low[0], high[0]) or _is_point(low, high))
    return union(result)


def _later(a, b):
    """The stricter of two lower ends (number, closed)."""
    if end_key(a[0]) == end_key(b[0]):
        return a[0], a[1] and b[1]
    return b if _less(a[0], b[0]) else a


def _earlier(a, b):
    if end_key(a[0]) == end_key(b[0]):
        return a[0], a[1] and b[1]
    return a if _less(a[0], b[0]) else b


def _is_point(low, high) -> bool:
    return end_key(low[0]) == end_key(high[0]) and low[1] and high[1]


def union(*sets: tuple) -> tuple:
    """All intervals in order, those merged that overlap or touch."""
    pieces = [piece for pieces in sets for piece in pieces]
    merged = []
    pieces.sort(key=lambda piece: (numeric.comparable(piece[0]), not piece[1]))
    for low, low_closed, high, high_closed in pieces:
        if merged and not _gap(merged[-1], low, low_closed):
            last = merged[-1]
            if end_key(high) == end_key(last[2]):
                merged[-1] = (*last[:3], last[3] or high_closed)
            elif _less(last[2], high):
                merged[-1] = (*last[:2], high, high_closed)
        else:
            merged.append((low, low_closed, high, high_closed))
    return tuple(merged)


def _gap(piece, low, low_closed) -> bool:
    if end_key(piece[2]) == end_key(low):
        return not (piece[3] or low_closed)
    return _less(piece[2], low)


def complement(pieces: tuple) -> tuple:
    result = ALL
    for low, low_closed, high, high_closed in pieces:
        outside = [(-INFINITY, False, low, not low_closed)] if low != -INFINITY else []
        outside += [(high, not high_closed, INFINITY, False)] if high != INFINITY else []
        result = intersection(result, tuple(outside))
    return result


# ----------------------------------------------------------------------------------------------------------
# inequalities in one letter


def line(tree) -> tuple | None:
    """(a, b) of a tree that is a x + b in its only letter, None if it is not linear."""
    try:
        at = [numeric.evaluate(tree, lambda _, x=x: Fraction(x)) for x in (0, 1, 2, -7)]
    except NotFormula:
        return None
    if any(isinstance(number, numeric.MP.mpc) for number in at):
        return None
    slope = numeric.add([at[1], -at[0]])
    line_at = [numeric.add([at[0], numeric.multiply([slope, Fraction(x)])]) for x in (2, -7)]
    straight = list(map(numeric.number_key, line_at)) == list(map(numeric.number_key, at[2:]))
    return (slope, at[0]) if straight and slope and "call" not in repr(tree) else None


def solve(left, sign: str, right) -> tuple | None:
    r"""The reals for which `left sign right` holds, None if it is not linear; \infty comes as text."""
    if isinstance(left, str) or isinstance(right, str):  # x < \infty excludes nothing
        return ALL
    if sign in (">", r"\ge"):
        return solve(right, {">": "<", r"\ge": r"\le"}[sign], left)
    for bound, inner, within in (right, left, True), (left, right, False):
        if inner[:2] == ("call", "abs") and not numeric.letters(bound):
            return _around(inner[2], real(bound), sign, within)
    slope_and_start = line(("sum", (left, formula.negative(right))))
    if slope_and_start is None:
        return None
    slope, start = slope_and_start
    root = numeric.divide(numeric.multiply([Fraction(-1), start]), slope)
    closed = sign == r"\le"
    if sign == r"\ne":
        return complement(interval(root, True, root, True))
    return interval(-INFINITY, False, root, closed) if slope > 0 else interval(root, closed, INFINITY, False)


def _around(inner, bound, sign: str, within: bool) -> tuple | None:
    """|a x + b| < bound (within), or bound < |a x + b|."""
    slope_and_start = line(inner)
    if slope_and_start is None or bound < 0 or sign == r"\ne":
        return None
    slope, start = slope_and_start
    ends = [numeric.divide(numeric.add([number, -start]), slope) for number in (-bound, bound)]
    low, high = ends if slope > 0 else ends[::-1]
    closed = (sign == r"\le") == within  # of the interval inside
    if not _less(low, high) and not closed:
        return () if within else ALL
    inside = interval(low, closed, high, closed)
    return inside if within else complement(inside)
