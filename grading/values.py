r"""The value of an answer: a key that equal values share, and the keys of alternative readings.

`Value.key` identifies the value; `Value.also` has the keys of alternative readings of the same spelling: 50\%
may be 50 or 0.5, x = 5 may be 5, "1, 2" may be (1, 2). Two values are equal if their keys are equal, or if
the key of one is an alternative reading of the other. So x = 5 equals 5, but x = 5 does not equal y = 5.
"""

import math
import re
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, replace
from fractions import Fraction

from grading import formula, numeric
from grading.formula import NotFormula


@dataclass(frozen=True)
class Value:
    key: Hashable
    also: frozenset = frozenset()
    name: Hashable = None  # what has this value: x in x = 5
    plain: "Value | None" = None  # the value without the name
    reals: tuple | None = None  # a set of real numbers as (points, inside), see below
    second: Hashable = None  # a key matched only with readings: m=2, n=7 is the list 2, 7 but not p=2, q=7

    def equals(self, other: "Value") -> bool:
        if {self.key, self.second} & other.also or {other.key, other.second} & self.also:
            return True
        return self.key == other.key


def scalar(tree) -> Value:
    return Value(numeric.key(numeric.values(tree)))


def set_of(elements: list[Value]) -> Value:
    """A set; a single element may be written without braces."""
    keys = [element.key for element in elements]
    alone = keys if len(keys) == 1 and keys[0][0] != "set" else []
    return Value(("set", frozenset(Counter(keys).items())), frozenset(alone))


def tuple_key(elements: list[Value]) -> tuple:
    return ("tuple", *(element.key for element in elements))


def of_reals(reals: tuple) -> Value:
    """A union of intervals; an open interval may be read as a pair."""
    points, inside = reals
    keys = [numeric.key((point,)) for point in points]
    also = {("tuple", *keys)} if inside == (False, False, True, False, False) else set()
    key = set_of([]).key if reals == NONE else ("reals", *keys, inside)
    return Value(key, frozenset(also), reals=reals)


def named(name: Hashable, value: Value) -> Value:
    """name = value, or name in value: equals the value alone, or the same name with the same value."""
    also = {value.key, *value.also, *(("named", name, reading) for reading in value.also)}
    return Value(("named", name, value.key), frozenset(also), name, value, value.reals)


def label(tree) -> Hashable:
    return tree if tree[0] == "symbol" else scalar(tree).key


def equation(left, right) -> Value:
    """left = right, two formulas: x = 5 and y = 2x + 3 may lose their left side, and 2x = 10 is x = 5."""
    numbers = numeric.values(right)
    constant, simple = len(numbers) == 1, left[0] in ("symbol", "opaque")
    if constant and simple:
        return named(label(left), Value(numeric.key(numbers)))
    names, difference = numeric.letters(left), ("sum", (left, formula.negative(right)))
    if constant:  # 10p+q = 37 gives what was asked for, the curve x^2+y^2 = 9 does not
        is_curve = names & {"x", "y", "z"} and re.search(r"Fraction\((?!-?1, 1\))", repr(left))
        asked = numbers[0] != 0 and not is_curve
    else:
        asked = simple and right[0] != "symbol"
    also = frozenset([numeric.key(numbers)] if asked else [])
    line = line_of(difference) if constant and len(names) == 1 and "opaque" not in repr(left) else None
    if line and all(isinstance(number, Fraction) for number in line):  # 2x = 10
        root = scalar(("number", -line[1] / line[0]))
        return replace(named(("symbol", *names), root), also=also)
    differences = numeric.values(difference)
    if differences == (0,):  # x(x+1) = x^2+x
        return scalar(right)
    return Value(numeric.equation_key(differences), also)


def inequality(sides: list, signs: list[str]) -> Value:
    """Inequalities in one letter, linear or |linear|, as a set of reals; others by their own key."""
    trees = [side for side in sides if isinstance(side, tuple)]
    names = set().union(*map(numeric.letters, trees))
    if len(names) == 1:
        solved = [solve(*three) for three in zip(sides, signs, sides[1:], strict=False)]
        if None not in solved:
            return named(("symbol", names.pop()), of_reals(intersection(*solved)))
    if len(sides) != 2 or len(trees) != 2:
        raise NotFormula("a chain of inequalities")
    left, right = reversed(trees) if signs[0] in (">", r"\ge") else trees
    numbers = numeric.values(("sum", (left, formula.negative(right))))
    size = next((abs(number) for number in numbers if number), None)
    if size is None:
        raise NotFormula("two equal sides")
    scaled = tuple(None if number is None else numeric.divide(number, size) for number in numbers)
    return Value(("inequality", signs[0] in ("<", ">"), signs[0] == r"\ne", numeric.key(scaled)))


# A set of reals is (points, inside): its end points in order, and whether it contains what is below the
# first, the first itself, what is between it and the next, and so on:
# (1, 3] is ((1, 3), (False, False, True, True, False)).
INFINITY = math.inf
ALL, NONE = ((), (True,)), ((), (False,))


def _in_order(numbers) -> tuple:
    by_key = {numeric.number_key(number): number for number in numbers}
    return tuple(sorted(by_key.values(), key=numeric.inexact))


def interval(low, low_closed: bool, high, high_closed: bool) -> tuple:
    """One interval; raises NotFormula if its ends are not in order."""
    points = _in_order(end for end in (low, high) if end not in (INFINITY, -INFINITY))
    is_point = len(points) == 1 and low not in (INFINITY, -INFINITY) and high not in (INFINITY, -INFINITY)
    if numeric.inexact(low) > numeric.inexact(high) or (is_point and not (low_closed and high_closed)):
        raise NotFormula("no interval")
    if is_point:
        return points, (False, True, False)
    below = () if low == -INFINITY else (False, low_closed)
    above = () if high == INFINITY else (high_closed, False)
    return points, (*below, True, *above)


def _combined(rule, sets) -> tuple:
    """The union (rule any) or intersection (rule all) of sets."""
    points, inside = [], [rule(flags[0] for _, flags in sets)]
    for number in _in_order(point for points, _ in sets for point in points):
        at, above = (rule(_holds(one, number, above) for one in sets) for above in (False, True))
        if not inside[-1] == at == above:
            points.append(number)
            inside += [at, above]
    return tuple(points), tuple(inside)


def _holds(one: tuple, number, above: bool) -> bool:
    """Whether a set contains a number, or the numbers just above it."""
    points, inside = one
    below = sum(numeric.inexact(point) < numeric.inexact(number) for point in points)
    matches = [i for i, point in enumerate(points) if numeric.number_key(point) == numeric.number_key(number)]
    return inside[2 * matches[0] + 1 + above] if matches else inside[2 * below]


def union(*sets: tuple) -> tuple:
    return _combined(any, sets)


def intersection(*sets: tuple) -> tuple:
    return _combined(all, sets)


def line_of(tree) -> tuple | None:
    """(a, b) of a tree a x + b in its only letter; None if it is not linear."""
    try:
        at = [numeric.evaluate(tree, lambda _, x=x: Fraction(x)) for x in (0, 1, 2, -7)]
    except NotFormula:
        return None
    if any(isinstance(number, numeric.MP.mpc) for number in at):
        return None
    slope = numeric.add([at[1], -at[0]])
    line_at = [numeric.add([at[0], numeric.multiply([slope, Fraction(x)])]) for x in (2, -7)]
    straight = [*map(numeric.number_key, line_at)] == [*map(numeric.number_key, at[2:])]
    return (slope, at[0]) if straight and slope and "call" not in repr(tree) else None


SIGNS = {"<": (-1,), ">": (1,), r"\le": (-1, 0), r"\ge": (1, 0), r"\ne": (-1, 1)}  # of left - right


def solve(left, sign: str, right) -> tuple | None:
    r"""The reals that satisfy `left sign right`, both linear or one |ax+b|, else None; \infty is text."""
    if isinstance(left, str) or isinstance(right, str):  # x < \infty excludes nothing
        return ALL
    sides = [(left, formula.negative(right))]
    for inner, bound in (left, right), (right, left):
        if inner[:2] == ("call", "abs") and not numeric.letters(bound):
            sides = [(inner[2], bound), (inner[2], formula.negative(bound))]
    lines = [line_of(("sum", side)) for side in sides]
    if None in lines:
        return None
    negative = [(start, numeric.multiply([Fraction(-1), slope])) for slope, start in lines]
    roots = _in_order(numeric.divide(*line) for line in negative)
    outside = [numeric.add([roots[0], Fraction(-1)]), numeric.add([roots[-1], Fraction(1)])]
    between = [numeric.divide(numeric.add(list(roots)), Fraction(2)), roots[1]] if len(roots) == 2 else []
    samples = [outside[0], roots[0], *between, outside[1]]
    held = []
    for x in samples:
        difference = numeric.evaluate(("sum", (left, formula.negative(right))), lambda _, x=x: x)
        held.append(int(numeric.MP.sign(numeric.inexact(difference))) in SIGNS[sign])
    return _combined(all, [(roots, tuple(held))])
