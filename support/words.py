"""Numbers with words and words alone, to values: 12 cm, 6 million, 50%, 52_8, 4:15 p.m., Monday."""

import re
from dataclasses import replace
from fractions import Fraction

from support import formula, numeric, spelling
from support.formula import NotFormula
from support.values import Value, scalar

MULTIPLIERS = dict(hundred=100, thousand=10**3, million=10**6, billion=10**9, trillion=10**12, dozen=12)
# dropped without a trace, like the signs for dollars and degrees
NO_UNIT = set("dollar usd degree deg unit".split())
SYMBOLS = set("m g s h l L N J W V A K C F Hz Pa eV kJ kW kPa MPa mL mA mV".split())  # case counts
UNITS = """
    mm millimeter millimetre, cm centimeter centimetre, m meter metre, km kilometer kilometre, nm nanometer,
    in inch inches, ft foot feet, yd yard, mi mile, mg milligram, g gram, kg kilogram, lb lbs pound, oz
    ounce, mL ml milliliter millilitre, L l liter litre, s sec second, ms millisecond, min mins minute, h hr
    hrs hour, day, week, month, yr year, cent, rad radian, acre, hectare, gallon, quart, pint, cup, ton
    tonne, Hz hertz, N newton, J joule, kJ kilojoule, W watt, kW kilowatt, V volt, A amp ampere, Pa pascal,
    kPa, K kelvin, C celsius, F fahrenheit, mol mole, eV, ohm, calorie
"""
COUNTED = """
    people person student point coin way apple orange ball marble book boy girl child children man men woman
    women card game question problem page step time hand handshake side edge face vertex vertices triangle
    square rectangle circle solution root integer number digit term value element subset arrangement
    permutation combination outcome possibility possibilities choice path route color colour ticket stamp
    bean candy candies cookie sticker pencil pen flower tree rose chair table seat team player member vote
    car bus buses trip lap sock shirt tile cube block brick piece slice pizza pie egg penny pennies nickel
    dime bill animal dog cat cow horse chicken pig bird fish duck rabbit goat sheep house room floor box
    boxes bag bottle jar glass glasses serving word letter sheet row column dot line region plane zero zeros
    factor divisor kid guest worker friend family families toy truck shell muffin cake
    teacher meal possible distinct different total
"""
UNIT_OF = {word: words.split()[0] for words in UNITS.split(",") for word in words.split()}
COUNTED_WORDS = {word: word for word in (*COUNTED.split(), *NO_UNIT)}
EXPONENT = r"(?:\s*\^\s*\{?\s*(-?[1-9])\s*\}?)?"
WORDS_IN_TEXT = re.compile(r"(.*?\S)\s*\\text\{([^{}]*)\}" + EXPONENT)
BARE_WORDS = re.compile(r"(.*?(?:[\d})!]|\\pi))( *)([A-Za-z]+(?:[ ./]+[A-Za-z]+)*\.?)" + EXPONENT)


def words_behind(text: str) -> tuple[str, str]:
    r"""Split a number from the words behind it: "6\text{ cm}^2" is ("6", "cm^2"), "6x" is ("6x", "")."""
    match = WORDS_IN_TEXT.fullmatch(text)
    if match:
        head, words, exponent = match.groups()
    else:
        match = BARE_WORDS.fullmatch(text)
        head, space, words, exponent = match.groups() if match else (text, "", "", None)
        if len(words) == 1 and not (space and words in "mg"):  # 6 m may be meters, 6m and 6 n are products
            return text, ""
    if re.search(r"\\(?:begin|end|text)|[=<>]", head):
        return text, ""
    return head, words.strip() + (f"^{exponent}" if exponent else "")


def known_words(words: str) -> tuple[int, str] | None:
    """(factor, unit) of words behind a number, None if a word is unknown: north and the like are no units.

    >>> known_words("million dollars"), known_words("square cm"), known_words("km/h"), known_words("north")
    ((1000000, ''), (1, 'cm^2'), (1, 'h^-1 km'), None)
    """
    factor, units, sign, power = 1, [], 1, 1
    words = re.sub(r"(?<=[A-Za-z]{2})\.", " ", words.replace(r"\cdot", " ")).replace("mph", "mi/h")
    tokens = re.findall(r"[A-Za-z]+|\^-?\d|\S", words)
    for token, following in zip(tokens, [*tokens[1:], ""], strict=True):
        word = token.casefold()
        if (word if word in MULTIPLIERS else word[:-1]) in MULTIPLIERS and not units:
            factor *= MULTIPLIERS[word if word in MULTIPLIERS else word[:-1]]
        elif word in ("/", "per"):
            sign = -1
        elif word in ("square", "sq", "cubic", "cu") and following.isalpha():
            power = 2 if word[0] == "s" else 3
        elif (word in ("squared", "cubed") or word[0] == "^") and units:
            exponent = int(word[1:]) if word[0] == "^" else 2 if word[0] == "s" else 3
            units[-1] = (units[-1][0], units[-1][1] * exponent)
        elif _unit(token) is None:
            return None
        else:
            units.append((_unit(token), sign * power))
            power = 1
    kept = sorted(unit for unit in units if unit[0] not in NO_UNIT)
    return factor, " ".join(unit if exponent == 1 else f"{unit}^{exponent}" for unit, exponent in kept)


def _unit(word: str) -> str | None:
    """The unit or the counted thing that a word names, one name for all its forms."""
    if len(word) == 1 or word in SYMBOLS:
        return UNIT_OF.get(word) if word in SYMBOLS else None
    forms = (word, word.casefold(), word.casefold().removesuffix("s"))
    found = [table[form] for table in (UNIT_OF, COUNTED_WORDS) for form in forms[::-1] if form in table]
    return found[0] if found else None


# ----------------------------------------------------------------------------------------------------------
# values

SHORT_WORDS = set("yes no odd even all none true red sun one two six ten al bo ed jo ty".split())


def read_words(text: str, depth: int) -> Value | None:
    r"""Words: \text{No}, No, Monday. Two or three letters that do not look like a name are a product too."""
    match = re.fullmatch(r"\\text\{([^{}\\]*)\}", text)
    if match:
        return Value(("text", spelling.plain_text(match[1]).casefold()))
    if re.fullmatch(r"(?=.{4})[A-Za-z]{2,}(?:[ '-]+[A-Za-z']+)*", text):
        return Value(("text", spelling.plain_text(text)))
    if not re.fullmatch(r"[A-Za-z]{2,3}", text):
        return None
    word = Value(("text", text.casefold()))
    if text.casefold() in SHORT_WORDS and not text[1:].isupper():
        return word
    if re.fullmatch(r"[A-Z][a-z]{2}", text) and re.search("[aeiouy]", text.casefold()):
        return word
    return replace(scalar(formula.parse(text)), also=frozenset([word.key]))


RATIO = re.compile(r"\d+(?:\.\d+)?(?: ?: ?\d+(?:\.\d+)?)+")
BASED = re.compile(r"(-?)\(?(\d[0-9A-Z]*)\)? ?_ ?\{? ?(\d{1,2}) ?\}?")
SCIENTIFIC = re.compile(r"([+-]?)((?:\d+\.?\d*|\.\d+))[eE]([+-]?\d{1,4})")
DEGREE = r"\s*\^?\s*(?:\\circ|\{\s*\\circ\s*\}|\\degree)\s*"


def read_number(text: str, depth: int) -> Value | None:
    """Numbers with more than one reading or with words: percent, other bases, 3e6, 4:15, 6 million, 12 cm."""
    if re.fullmatch(RATIO, text):
        return Value(("ratio", *(Fraction(part) for part in text.replace(" ", "").split(":"))))
    based = BASED.fullmatch(text)
    if based:
        return in_base(*based.groups())
    scientific = SCIENTIFIC.fullmatch(text)
    if scientific:
        sign, digits, exponent = scientific.groups()
        value = scalar(("number", Fraction(f"{sign}{digits}e{exponent}")))
        if "." in digits or "E" in text or not exponent.startswith(("-", "+")):
            return value
        product = scalar(formula.parse(text))  # 3e-4 may be three times e, less four
        return replace(product, also=frozenset([value.key]))
    if text.endswith("%"):
        number = formula.parse(text[:-1])
        hundredth = ("quotient", number, ("number", Fraction(100)))
        return Value(("percent", scalar(number).key), frozenset([scalar(number).key, scalar(hundredth).key]))
    head, words = words_behind(text)
    return with_words(head, words, text) if words else None


def in_base(sign: str, digits: str, base: str) -> Value:
    """52_8 is 42, and may stand for 52 where everything is in base 8."""
    try:
        readings = [int(sign + digits, int(base)), *([int(sign + digits)] if digits.isdigit() else [])]
    except ValueError:
        raise NotFormula("no digits of this base") from None
    also = frozenset(scalar(("number", Fraction(reading))).key for reading in readings)
    return Value(("base", sign + digits, int(base)), also)


def with_words(head: str, words: str, text: str) -> Value | None:
    """A number and words: a factor multiplies, a unit may be left out, other words may not."""
    known, bare = known_words(words), r"\text" not in text
    if known is None:
        if bare and not re.search(r"^[^A-Za-z]* .*[A-Za-z]{4}", text):
            return None
        return Value(("words", scalar(formula.parse(head)).key, spelling.plain_text(words)))
    factor, unit = known
    if re.search(DEGREE + "$", head) and unit not in ("", "C", "F"):  # 30 degrees N is a place
        return Value(("words", scalar(formula.parse(head)).key, spelling.plain_text(words)))
    special = head.endswith("%") or BASED.fullmatch(head)
    tree = None if special else formula.parse(re.sub(DEGREE + "$", "", head))
    if bare and tree is not None and numeric.letters(tree):
        return None
    number = read_number(head, 0) if tree is None else scalar(tree)
    if factor != 1:
        number = scalar(("product", (("number", Fraction(factor)), tree or formula.parse(head))))
    if not unit:
        return number
    product = {scalar(formula.parse(text)).key} if bare and len(words) < 3 else set()  # 12 m may be one
    return Value(("unit", number.key, unit), frozenset({number.key, *number.also, *product}))
