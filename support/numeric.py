"""Trees of formula.py to numbers, exact fractions or 130 digits, and to keys that equal values share.

Fractions are compared exactly. Roots, logarithms and the like are taken for equal if they agree to 90
digits, and formulas with letters if they do so at six fixed points. That is no proof. But formulas of at
most 300 characters that agree so far and still differ have to be built for it, and an exact decision by
computer algebra would need a limit of time.
"""

import hashlib
import math
from fractions import Fraction

import mpmath

from support.formula import NotFormula

MP = mpmath.mp.clone()  # a context of our own: the precision of other users of mpmath stays as it is
MP.dps = 130
NOISE = MP.mpf(10) ** -115  # a sum that is smaller than this beside its terms is 0
KEY_DIGITS = 90
LOST = MP.mpf(10) ** -60
MAX_BITS = 40_000  # of an exact numerator or denominator: 9999! is refused, 2^{9999} is not
MAX_EXPONENT = 10**8  # of an inexact power
EXACT_KEY = 10**30  # fractions beyond it are their own key, since 90 digits would not tell all of them apart
POINTS = 6
POSITIVE_POINTS = 2  # all letters are positive in the first of them


def letter(name: str, point: int):
    """The fixed value of a letter at a point, small and large; negative at half of the last four points."""
    digest = hashlib.sha256(name.encode()).digest()
    noise = int.from_bytes(hashlib.sha512(f"{name} {point}".encode()).digest(), "big")
    size = MP.mpf((0.625, 3, 0.875, 30, 7, 500)[point]) * (1 + MP.mpf(noise) / 2**512)
    pairs = (2, 3), (2, 4), (2, 5), (3, 4), (3, 5), (4, 5)
    return -size if point in pairs[digest[0] % 6] else size


def values(tree) -> tuple:
    """Its number if it has no letters, else its numbers at the fixed points; None where it is not real."""
    if not letters(tree):
        return (evaluate(tree, lambda name: None, careful=True),)
    found, imaginary = [], has_constant(tree, "i")
    for point in range(POINTS):
        number = evaluate(tree, lambda name, point=point: letter(name, point), careful=point == 0)
        real = not isinstance(number, MP.mpc)
        found.append(number if real or imaginary or point < POSITIVE_POINTS else None)
    keys = {number if number is None else number_key(number) for number in found}
    return (found[0],) if len(keys) == 1 else tuple(found)


def letters(tree) -> set:
    """Names of the letters (and of the functions f, g, h) in a tree."""
    if tree[0] in ("symbol", "opaque"):
        return {tree[1]}.union(*(letters(part) for part in tree[2:] for part in part))
    return set().union(*(letters(part) for part in parts(tree)))


def has_constant(tree, name: str) -> bool:
    return tree == ("constant", name) or any(has_constant(part, name) for part in parts(tree))


def parts(tree) -> list:
    """The trees directly below a tree."""
    below = []
    for item in tree[1:]:
        if isinstance(item, tuple):
            below += [item] if item and isinstance(item[0], str) else item
    return below


def key(numbers: tuple):
    """What equal formulas have in common, hashable."""
    return ("value", *(None if number is None else number_key(number) for number in numbers))


def equation_key(numbers: tuple):
    """What equations `tree = 0` have in common whose trees differ by a constant factor only."""
    first = next((number for number in numbers if number), None)
    if first is None or len(numbers) == 1:
        raise NotFormula("an equation that always or never holds")
    ratios = (None if number is None else number_key(divide(number, first)) for number in numbers)
    return ("equation", *ratios)


def number_key(number):
    """A fraction of up to 30 digits and a root or the like that equals it have one key: 90 digits of both."""
    if isinstance(number, Fraction):
        if max(abs(number.numerator), number.denominator) >= EXACT_KEY:
            return number
        number = MP.mpf(number.numerator) / number.denominator
    if isinstance(number, MP.mpc):
        return _digits(number.real), _digits(number.imag)
    return _digits(number)


def _digits(number) -> tuple:
    rounded = MP.mpf(number, dps=KEY_DIGITS)
    return (int(MP.sign(rounded)), *map(int, rounded.man_exp))


# ----------------------------------------------------------------------------------------------------------
# arithmetic on Fraction, mpf and mpc: exact as long as it can be, and what is 0 is exactly 0


def evaluate(tree, letter_value, careful: bool = False):
    """The number of a tree, letters by letter_value(name). Raises NotFormula for 1/0 and huge numbers."""
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
    if kind == "sum":
        if careful and _lost(numbers):
            raise NotFormula("a term that is lost beside the others")
        return add(numbers)
    if kind == "product":
        return multiply(numbers)
    if kind == "quotient":
        return divide(*numbers)
    if kind == "power":
        return power(*numbers)
    if kind == "binomial":
        return binomial(*numbers)
    if kind == "log":
        return divide(call("ln", numbers[1]), call("ln", numbers[0]))
    if kind == "opaque":  # f(2) is a letter that is named by its argument's value
        return letter_value(f"{tree[1]}({[number_key(number) for number in numbers]})")
    return call(tree[1], numbers[0])


def _checked(number):
    """Refuse what is too large; a complex number whose imaginary part is only rounding is real."""
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


def _inexact(number):
    return MP.mpf(number.numerator) / number.denominator if isinstance(number, Fraction) else number


def add(numbers):
    if all(isinstance(number, Fraction) for number in numbers):
        return _checked(sum(numbers, Fraction(0)))
    terms = [_inexact(number) for number in numbers]
    total = sum(terms[1:], terms[0])
    return Fraction(0) if abs(total) <= NOISE * max(map(abs, terms)) else _checked(total)


def _lost(numbers) -> bool:
    """Whether some term is so small beside another one that the digits of a key do not show it."""
    sizes = [abs(_inexact(number)) for number in numbers if number != 0]
    exact = all(isinstance(number, Fraction) for number in numbers)
    return not exact and min(sizes) < LOST * max(sizes)


def multiply(numbers):
    if all(isinstance(number, Fraction) for number in numbers):
        return _checked(math.prod(numbers, start=Fraction(1)))
    if any(number == 0 for number in numbers):
        return Fraction(0)
    return _checked(math.prod(map(_inexact, numbers)))


def divide(number, divisor):
    if divisor == 0:
        raise NotFormula("a division by 0")
    if isinstance(number, Fraction) and isinstance(divisor, Fraction):
        return _checked(number / divisor)
    return _checked(_inexact(number) / _inexact(divisor))


def power(base, exponent):
    """base ^ exponent; a negative number has real odd roots, (-8)^{1/3} = -2."""
    if base == 0:
        if isinstance(exponent, Fraction) and exponent > 0:
            return Fraction(0)
        raise NotFormula("0 to a power that is not positive")
    if not isinstance(exponent, Fraction):
        return _checked(MP.exp(_small(_inexact(exponent) * MP.log(_inexact(base)))))
    top, index = exponent.numerator, exponent.denominator
    if isinstance(base, Fraction):
        bits = max(base.numerator.bit_length(), base.denominator.bit_length()) * abs(top)
        root = _exact_root(base, index)
        if root is not None:
            if bits > MAX_BITS * index:
                raise NotFormula("a huge power")
            return _checked(root**top)
    base = _inexact(base)
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
    sign = -1 if number < 0 else 1
    tops = [_integer_root(part, index) for part in (abs(number.numerator), number.denominator)]
    return None if None in tops else Fraction(sign * tops[0], tops[1])


def _integer_root(number: int, index: int) -> int | None:
    if index == 2:
        root = math.isqrt(number)
    else:
        if number.bit_length() > 400:  # beyond what 130 digits hold
            return None
        root = int(MP.nint(MP.root(number, index)))
    return root if root**index == number else None


def binomial(n, k):
    largest = 300 if isinstance(n, Fraction) else 40
    if isinstance(k, Fraction) and k.denominator == 1 and 0 <= k <= largest:
        if isinstance(n, Fraction) and n.denominator == 1 and n >= 0:
            if n.numerator.bit_length() * k > MAX_BITS:
                raise NotFormula("a huge binomial")
            return Fraction(math.comb(int(n), int(k)))
        return divide(
            multiply([add([n, Fraction(-i)]) for i in range(int(k))] or [Fraction(1)]),
            Fraction(math.factorial(int(k))),
        )
    for number in n, k:
        _small(_inexact(number))
    return _checked(MP.binomial(_inexact(n), _inexact(k)))


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
        return _snapped(MP.log(_inexact(number)) / base)
    if name in ("exp", "sinh", "cosh", "tanh"):
        if number == 0:
            return Fraction(int(name in ("exp", "cosh")))
        return _checked(getattr(MP, name)(_small(_inexact(number))))
    angle = _inexact(number)
    if name.startswith("arc"):
        return _snapped(getattr(MP, "a" + name[3:])(angle))
    _small(angle)
    sin, cos = _snapped(MP.sin(angle)), _snapped(MP.cos(angle))
    one = Fraction(1)
    top, bottom = {
        "sin": (sin, one),
        "cos": (cos, one),
        "tan": (sin, cos),
        "cot": (cos, sin),
        "sec": (one, cos),
        "csc": (one, sin),
    }[name]
    return divide(top, bottom)


def _snapped(number):
    """0 where a function has a zero and only rounding is left."""
    return Fraction(0) if abs(number) <= NOISE else _checked(number)


def _whole(name: str, number) -> Fraction:
    r"""\lfloor and \lceil; what is whole but for rounding is whole."""
    if isinstance(number, MP.mpc):
        raise NotFormula("a complex number is not rounded")
    if isinstance(number, Fraction):
        return Fraction(math.floor(number) if name == "floor" else math.ceil(number))
    _small(MP.log(1 + abs(number)))
    nearest = MP.nint(number)
    if abs(number - nearest) <= NOISE * max(1, abs(number)):
        return Fraction(int(nearest))
    return Fraction(int(MP.floor(number) if name == "floor" else MP.ceil(number)))


def comparable(number):
    """A number that can be compared with any other end of an interval."""
    return number if number in (math.inf, -math.inf) else _inexact(number)
