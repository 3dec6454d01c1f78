r"""What an answer is: a value with a key that equal values share, and the keys of its other readings.

`Value.key` says what it is; `Value.also` are the keys of other readings of the same spelling: 50\% may be
read as 50 and as 0.5, x = 5 as 5, "1, 2" as (1, 2). Two values are equal if their keys are, or if the key of
one is among the other readings of the other. So x = 5 is 5, but x = 5 is not y = 5.
"""

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, replace
from fractions import Fraction

from support import formula, intervals, numeric
from support.formula import NotFormula


@dataclass(frozen=True)
class Value:
    key: Hashable
    also: frozenset = frozenset()
    name: Hashable = None  # of what it is the value: x in x = 5
    plain: "Value | None" = None  # the value without the name
    reals: tuple | None = None  # its intervals, if it is a set of real numbers

    def equals(self, other: "Value") -> bool:
        return self.key == other.key or self.key in other.also or other.key in self.also


def scalar(tree) -> Value:
    return Value(numeric.key(numeric.values(tree)))


def set_of(elements: list[Value]) -> Value:
    """A set; one element alone may stand without its braces."""
    keys = [element.key for element in elements]
    alone = keys if len(keys) == 1 and keys[0][0] != "set" else []
    return Value(("set", frozenset(Counter(keys).items())), frozenset(alone))


def tuple_key(elements: list[Value]) -> tuple:
    return ("tuple", *(element.key for element in elements))


def of_reals(pieces: tuple) -> Value:
    """A union of intervals; one that is open may be read as a pair."""
    end = intervals.end_key
    keys = tuple((end(a), a_closed, end(b), b_closed) for a, a_closed, b, b_closed in pieces)
    also = [("tuple", keys[0][0], keys[0][2])] if len(keys) == 1 and not (keys[0][1] or keys[0][3]) else []
    return Value(("reals", keys) if keys else set_of([]).key, frozenset(also), reals=pieces)


def named(name: Hashable, value: Value) -> Value:
    """name = value, or name in value: equal to the value alone, and to the same name with the same value."""
    also = {value.key, *value.also, *(("named", name, reading) for reading in value.also)}
    return Value(("named", name, value.key), frozenset(also), name, value, value.reals)


def label(tree) -> Hashable:
    return tree if tree[0] == "symbol" else scalar(tree).key


# ----------------------------------------------------------------------------------------------------------
# equations and inequalities


def equation(left, right) -> Value:
    """left = right, two formulas: the name may be left out of x = 5 and y = 2x + 3, and 2x = 10 is x = 5."""
    numbers = numeric.values(right)
    constant, simple = len(numbers) == 1, left[0] in ("symbol", "opaque")
    if constant and simple:
        return named(label(left), Value(numeric.key(numbers)))
    asked = is_asked(left, numbers[0]) if constant else simple and right[0] != "symbol"
    also = frozenset([numeric.key(numbers)] if asked else [])
    root = root_of(left, right) if constant else None
    if root is not None:
        name, value = root
        return replace(named(("symbol", name), scalar(("number", value))), also=also)
    difference = ("sum", (left, formula.negative(right)))
    return Value(numeric.equation_key(numeric.values(difference)), also)


def root_of(left, right) -> tuple[str, Fraction] | None:
    """(letter, value) of a linear equation in one letter with rational numbers, else None."""
    tree = ("sum", (left, formula.negative(right)))
    names = numeric.letters(tree)
    if len(names) != 1 or "opaque" in repr(tree):
        return None
    line = intervals.line(tree)
    if line is None or not all(isinstance(number, Fraction) for number in line):
        return None
    return names.pop(), -line[1] / line[0]


def is_asked(left, number) -> bool:
    """Whether `left = number` gives what was asked for, 10p+q = 37, not a curve, x^2+y^2 = 9."""
    coordinates = numeric.letters(left) & {"x", "y", "z"}
    return number != 0 and not (coordinates and _has_number(left))


def _has_number(tree) -> bool:
    return (tree[0] == "number" and abs(tree[1]) != 1) or any(map(_has_number, numeric.parts(tree)))


def inequality(sides: list, signs: list[str]) -> Value:
    """Inequalities in one letter, linear or |linear|, as a set of reals; another one as it stands."""
    trees = [side for side in sides if isinstance(side, tuple)]
    names = set().union(*map(numeric.letters, trees))
    if len(names) == 1:
        solved = [intervals.solve(*three) for three in zip(sides, signs, sides[1:], strict=False)]
        if None not in solved:
            return named(("symbol", names.pop()), of_reals(intervals.intersection(*solved)))
    if len(sides) != 2 or len(trees) != 2:
        raise NotFormula("a chain of inequalities")
    left, right = reversed(trees) if signs[0] in (">", r"\ge") else trees
    numbers = numeric.values(("sum", (left, formula.negative(right))))
    size = next((abs(number) for number in numbers if number), None)
    if size is None:
        raise NotFormula("two equal sides")
    scaled = tuple(None if number is None else numeric.divide(number, size) for number in numbers)
    return Value(("inequality", signs[0] in ("<", ">"), signs[0] == r"\ne", numeric.key(scaled)))
