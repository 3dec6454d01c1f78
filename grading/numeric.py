"""Evaluate the trees of formula.py to numbers, exact fractions or 130 digits, and to keys for comparison.

Fractions are compared exactly. Irrational numbers are equal if they agree to 90 digits, and formulas with
letters if they do so at six fixed points. That is not a proof, but formulas of at most 300 characters that
agree this far and still differ have to be constructed on purpose. Computer algebra would decide exactly, but
would need a time limit.
"""

import hashlib
import math
import re
from fractions import Fraction

import mpmath

from grading.formula import NotFormula

MP = mpmath.mp.clone()  # our own context leaves the precision of other users of mpmath alone
MP.dps = 130
NOISE = MP.mpf(10) ** -115  # a sum that is smaller than this relative to its terms is 0
KEY_DIGITS = 90
LOST = MP.mpf(10) ** -60
MAX_BITS = 40_000  # of an exact numerator or denominator: rejects 9999!, not 2^{9999}
MAX_EXPONENT = 10**8  # of an inexact power
EXACT_KEY = 10**30  # larger fractions are their own key, since 90 digits would not distinguish them
POINTS = 6
POSITIVE_POINTS = 2  # all letters are positive in the first of them


def letter(name: str, point: int):
    """The fixed value of a letter at a point. Sizes vary; half of the last four points are negative."""
    digest = hashlib.sha256(name.encode()).digest()
    noise = int.from_bytes(hashlib.sha512(f"{name} {point}".encode()).digest(), "big")
    size = MP.mpf((0.625, 3, 0.875, 30, 7, 500)[point]) * (1 + MP.mpf(noise) / 2**512)
    pairs = (2, 3), (2, 4), (2, 5), (3, 4), (3, 5), (4, 5)
    return -size if point in pairs[digest[0] % 6] else size


def values(tree) -> tuple:
    """A tree's number if it has no letters, else its numbers at the fixed points, None if not real."""
    if not letters(tree):
        return (evaluate(tree, lambda name: None, careful=True),)
    found, imaginary = [], bool(re.search("'i'|'cis'", repr(tree)))
    for point in range(POINTS):
        number = evaluate(tree, lambda name, point=point: letter(name, point), careful=point == 0)
        real = not isinstance(number, MP.mpc)
        found.append(number if real or imaginary or point < POSITIVE_POINTS else None)
    return (found[0],) if len(set(map(number_key, found))) == 1 else tuple(found)


def letters(tree) -> set:
    """Names of the letters (and of the functions f, g, h) in a tree."""
    if tree[0] in ("symbol", "opaque"):
        return {tree[1]}.union(*(letters(part) for part in tree[2:] for part in part))
    return set().union(*(letters(part) for part in parts(tree)))


def parts(tree) -> list:
    """The trees directly below a tree."""
    below = []
    for item in tree[1:]:
        if isinstance(item, tuple):
            below += [item] if item and isinstance(item[0], str) else item
    return below


def key(numbers: tuple):
    """A hashable key that equal formulas share."""
    return ("value", *map(number_key, numbers))


def equation_key(numbers: tuple):
    """A key shared by equations `tree = 0` whose trees differ only by a constant factor."""
    first = next((number for number in numbers if number), None)
    if first is None or len(numbers) == 1:
        raise NotFormula("an equation that always or never holds")
    return ("equation", *(number_key(number and divide(number, first)) for number in numbers))


def number_key(number):
    """The first 90 digits, so that a fraction of up to 30 digits and an inexact number equal to it agree."""
    if isinstance(number, Fraction) and max(abs(number.numerator), number.denominator) < EXACT_KEY:
        number = MP.mpf(number.numerator) / number.denominator
    if number is None or isinstance(number, Fraction):
        return number
    if isinstance(number, MP.mpc):
        return number_key(number.real), number_key(number.imag)
    rounded = MP.mpf(number, dps=KEY_DIGITS)
    return (int(MP.sign(rounded)), *map(int, rounded.man_exp))


def evaluate(tree, letter_value, careful: bool = False):
    """The number of a tree; letters are letter_value(name). Raises NotFormula for 1/0 and huge numbers."""
    try:
        return _evaluate(tree, letter_value, careful)
    except (ArithmeticError, ValueError, TypeError, MP.NoConvergence) as error:
        raise NotFormula(f"has no value ({error})") from None


def _evaluate(tree, letter_value, careful: bool):
    kind = tree[0]
    if kind == "number":
        return tree[1]
    if kind == "symbol":
        return letter_value(tree[1])
    if kind == "constant":
        return {"pi": +MP.pi, "e": +MP.e, "i": MP.mpc(0, 1)}[tree[1]]
    numbers = [_evaluate(part, letter_value, careful) for part in parts(tree)]
    if kind in ("quotient", "power", "binomial"):
        return {"quotient": divide, "power": power, "binomial": binomial}[kind](*numbers)
    if kind == "sum":
        sizes = [abs(inexact(number)) for number in numbers if number != 0]
        exact = all(isinstance(number, Fraction) for number in numbers)
        if careful and not exact and min(sizes) < LOST * max(sizes):
            raise NotFormula("a term that the digits of a key do not show beside the others")
        return add(numbers)
    if kind == "product":
        return multiply(numbers)
    if kind == "log":
        return divide(call("ln", numbers[1]), call("ln", numbers[0]))
    if kind == "opaque":  # f(2) is a letter named by its argument's value
        return letter_value(f"{tree[1]}({[number_key(number) for number in numbers]})")
    return call(tree[1], numbers[0])


def _checked(number):
    """Reject numbers that are too large; drop a real or imaginary part that is only rounding."""
    if isinstance(number, Fraction):
        if max(number.numerator.bit_length(), number.denominator.bit_length()) > MAX_BITS:
            raise NotFormula("a huge number")
        return number
    if not MP.isfinite(number):
        raise NotFormula("no finite number")
    if isinstance(number, MP.mpc):
        size = abs(number)
        if abs(number.imag) <= NOISE * size:
            return number.real
        if abs(number.real) <= NOISE * size:
            return MP.mpc(0, number.imag)
    return number


def inexact(number):
    """An mpf (or mpc, or a float infinity), comparable with any other number."""
    return MP.mpf(number.numerator) / number.denominator if isinstance(number, Fraction) else number


def add(numbers):
    if all(isinstance(number, Fraction) for number in numbers):
        return _checked(sum(numbers, Fraction(0)))
    terms = [inexact(number) for number in numbers]
    total = sum(terms[1:], terms[0])
    return Fraction(0) if abs(total) <= NOISE * max(map(abs, terms)) else _checked(total)


def multiply(numbers):
    if all(isinstance(number, Fraction) for number in numbers):
        return _checked(math.prod(numbers, start=Fraction(1)))
    if any(number == 0 for number in numbers):
        return Fraction(0)
    return _checked(math.prod(map(inexact, numbers)))


def divide(number, divisor):
    if divisor == 0:
        raise NotFormula("a division by 0")
    if isinstance(number, Fraction) and isinstance(divisor, Fraction):
        return _checked(number / divisor)
    return _checked(inexact(number) / inexact(divisor))


def power(base, exponent):
    """base ^ exponent. Odd roots of negative numbers are real: (-8)^{1/3} = -2."""
    if base == 0:
        if isinstance(exponent, Fraction) and exponent > 0:
            return Fraction(0)
        raise NotFormula("0 to a power that is not positive")
    if not isinstance(exponent, Fraction):
        return _checked(MP.exp(_small(inexact(exponent) * MP.log(inexact(base)))))
    top, index = exponent.numerator, exponent.denominator
    if isinstance(base, Fraction):
        bits = max(base.numerator.bit_length(), base.denominator.bit_length()) * abs(top)
        root = _exact_root(base, index)
        if root is not None:
            if bits > MAX_BITS * index:
                raise NotFormula("a huge power")
            return _checked(root**top)
    base = inexact(base)
    _small(abs(top / index * MP.log(base)))
    if index % 2 and index > 1 and not isinstance(base, MP.mpc) and base < 0:
        return _checked((-1) ** (top % 2) * MP.exp(MP.log(-base) * top / index))
    if index <= 2:
        return _checked(base**top if index == 1 else MP.sqrt(base) ** top)
    return _checked(MP.power(base, MP.mpf(top) / index))


def _small(number):
    if abs(number) > MAX_EXPONENT:
        raise NotFormula("a huge exponent")
    return number


def _exact_root(number: Fraction, index: int) -> Fraction | None:
    if index == 1:
        return number
    if index > 64 or (number < 0 and index % 2 == 0):
        return None
    roots = []
    for part in abs(number.numerator), number.denominator:
        if index > 2 and part.bit_length() > 400:  # beyond the precision of 130 digits
            return None
        roots.append(math.isqrt(part) if index == 2 else int(MP.nint(MP.root(part, index))))
        if roots[-1] ** index != part:
            return None
    return Fraction(-roots[0] if number < 0 else roots[0], roots[1])


def binomial(n, k):
    whole = all(isinstance(number, Fraction) and number.denominator == 1 for number in (n, k))
    if whole and 0 <= k <= 300 and n >= 0:
        if n.numerator.bit_length() * k > MAX_BITS:
            raise NotFormula("a huge binomial")
        return Fraction(math.comb(int(n), int(k)))
    for number in n, k:
        _small(inexact(number))
    return _checked(MP.binomial(inexact(n), inexact(k)))


UNKNOWN_BASE = MP.mpf(int.from_bytes(hashlib.sha512(b"log").digest(), "big")) / 2**511 + 7


def call(name: str, number):
    r"""An elementary function. The base of a bare \log is unknown: it is neither \ln nor \lg."""
    if name in ("floor", "ceil"):
        return _whole(name, number)
    if name == "abs":
        return abs(number)
    if name == "factorial":
        if isinstance(number, Fraction) and number.denominator == 1 and 0 <= number <= 3000:
            return _checked(Fraction(math.factorial(int(number))))
        if isinstance(number, Fraction) or abs(number) > 10**6:
            raise NotFormula("a huge factorial, or none")
        return _checked(MP.gamma(number + 1))
    if name in ("ln", "log", "lg"):
        if number == 1:
            return Fraction(0)
        base = {"ln": 1, "log": UNKNOWN_BASE, "lg": MP.log(10)}[name]
        return _snapped(MP.log(inexact(number)) / base)
    if name in ("exp", "sinh", "cosh", "tanh"):
        if number == 0:
            return Fraction(int(name in ("exp", "cosh")))
        return _checked(getattr(MP, name)(_small(inexact(number))))
    angle = inexact(number)
    if name.startswith("arc"):
        return _snapped(getattr(MP, "a" + name[3:])(angle))
    _small(angle)
    sin, cos = _snapped(MP.sin(angle)), _snapped(MP.cos(angle))
    if name == "cis":
        return add([cos, multiply([MP.mpc(0, 1), sin])])
    pairs = dict(sin=(sin, 1), cos=(cos, 1), tan=(sin, cos), cot=(cos, sin), sec=(1, cos), csc=(1, sin))
    return divide(*(Fraction(1) if number == 1 else number for number in pairs[name]))


def _snapped(number):
    """Round a number that is only rounding error to 0."""
    return Fraction(0) if abs(number) <= NOISE else _checked(number)


def _whole(name: str, number) -> Fraction:
    r"""\lfloor and \lceil; a number within rounding of an integer is that integer."""
    if isinstance(number, MP.mpc):
        raise NotFormula("a complex number is not rounded")
    if isinstance(number, Fraction):
        return Fraction(math.floor(number) if name == "floor" else math.ceil(number))
    _small(MP.log(1 + abs(number)))
    nearest = MP.nint(number)
    if abs(number - nearest) <= NOISE * max(1, abs(number)):
        return Fraction(int(nearest))
    return Fraction(int(MP.floor(number) if name == "floor" else MP.ceil(number)))
