"""Values of words, with or without numbers: 12 cm, 6 million, 50%, 52_8, 4:15 p.m., Monday."""

import re
from dataclasses import replace
from fractions import Fraction

from grading import formula, numeric, spelling
from grading.formula import GREEK, NotFormula
from grading.values import Value, scalar

FACTORS = """
    half 1/2, halve 1/2, third 1/3, fourth 1/4, fifth 1/5, sixth 1/6, seventh 1/7, eighth 1/8, ninth 1/9,
    tenth 1/10, hundredth 1/100, thousandth 1/1000, dozen 12, score 20, hundred 100, gross 144,
    thousand 1000, million 1000000, billion 1000000000, trillion 1000000000000
"""
MULTIPLIERS = {word: Fraction(factor) for word, factor in map(str.split, FACTORS.split(","))}
# Dropped, like the signs for dollars and degrees.
NO_UNIT = set("dollar usd degree deg unit".split())
SYMBOLS = set("m g s h l L N J W V A K C F Hz Pa eV kJ kW kPa MPa mL mA mV".split())  # case-sensitive
UNITS = """
    mm millimeter millimetre, cm centimeter centimetre, m meter metre, km kilometer kilometre, nm nanometer,
    in inch inches, ft foot feet, yd yard, mi mile, mg milligram, g gram, kg kilogram, lb lbs pound, oz
    ounce, mL ml milliliter millilitre, L l liter litre, s sec second, ms millisecond, min mins minute, h hr
    hrs hour, day, week, month, yr year, cent, rad radian, acre, hectare, gallon, quart, pint, cup, ton
    tonne, Hz hertz, N newton, J joule, kJ kilojoule, W watt, kW kilowatt, V volt, A amp ampere, Pa pascal,
    kPa, K kelvin, C celsius, F fahrenheit, mol mole, eV, ohm, calorie
"""
# After a number, these words do not name what is counted.
OTHER_WORDS = set(
    """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
    seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety lakh crore quadrillion
    quintillion up down above below before after past ago more less fewer least most am pm noon bc ad and or
    mod modulo squared cubed doubled tripled base factorial root power point dot cross choose negative plus
    minus over remainder quarter quarters tens to in is are""".split()
    + [name.casefold() for name in GREEK]
)
# Unit: (next smaller unit, how many of them)
SMALLER = dict(week=("day", 7), day=("h", 24), h=("min", 60), min=("s", 60), yd=("ft", 3), ft=("in", 12))
SMALLER |= dict(lb=("oz", 16), yr=("month", 12), km=("m", 1000), m=("cm", 100), kg=("g", 1000))
UNIT_OF = {word: words.split()[0] for words in UNITS.split(",") for word in words.split()}
EXPONENT = r"(?:\s*\^\s*\{?\s*(-?[1-9])\s*\}?)?"
WORDS_IN_TEXT = re.compile(r"(.*?\S)\s*\\text\{([^{}]*)\}" + EXPONENT)
BARE_WORDS = re.compile(r"(.*?(?:[\d})!%]|\\pi))( *)([^\W\d_]+(?:[ ./]+[^\W\d_]+)*\.?)" + EXPONENT)


def words_behind(text: str) -> tuple[str, str]:
    r"""Split a number from the words after it: "6\text{ cm}^2" is ("6", "cm^2"), "6x" is ("6x", "")."""
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


def known_words(words: str) -> tuple[Fraction, str] | None:
    """(factor, unit) of the words after a number; None if a word is not a unit, such as north.

    >>> known_words("square centimeters"), known_words("kilometers per hour")[1], known_words("north")
    ((Fraction(1, 1), 'cm^2'), 'km/h', None)
    """
    cups_of_flour = r"(?:^|(?<=\w\w) )(?:of|(?<= )(?:left|remaining|in total|altogether))\b(.*)"
    rest = re.search(cups_of_flour, words)
    if rest and OTHER_WORDS & set(rest[1].casefold().split()):  # groups of four
        return None
    words = words[: rest.start()] if rest else words
    words = re.sub(r"(?<=[A-Za-z]{2})\.", "", words).replace("mph", "mi/h").replace(r"\cdot", " ")
    words = re.sub(r"\s*(?:/|\bper\b)\s*", "/", words)
    for power, before, behind in ("2", "(?:square|sq)", "squared"), ("3", "(?:cubic|cu)", "cubed"):
        words = re.sub(rf"\b{before} ([a-z]+)|([a-z]+) {behind}\b", rf"\1\2^{power}", words)
    factor, tokens = Fraction(1), re.findall(r"[^\W\d_]+|[\d^/-]+|\S", words)
    while tokens and (factors := {tokens[0].casefold(), tokens[0].casefold()[:-1]} & set(MULTIPLIERS)):
        factor, tokens = factor * MULTIPLIERS[factors.pop()], tokens[1:]
    units = [_unit(token) if token.isalpha() else token for token in tokens]
    if None in units or (units and factor < 1):  # five third graders
        return None
    return factor, re.sub(" ?([/^]) ?", r"\1", " ".join(unit for unit in units if unit not in NO_UNIT))


def _unit(word: str) -> str | None:
    """One name for all forms of the unit or counted thing that a word names; None if it names neither."""
    if len(word) == 1 or word in SYMBOLS:
        return UNIT_OF.get(word) if word in SYMBOLS else None
    forms = (word, word.casefold(), word.casefold().removesuffix("s"))
    known = [UNIT_OF[form] for form in forms[::-1] if form in UNIT_OF]
    direction = re.match("north|south|east|west|left|right", forms[1])
    is_none = not word.isalpha() or forms[1] in OTHER_WORDS or direction
    return known[0] if known else None if is_none else forms[2]


SHORT_WORDS = set("yes no odd even all none true red sun one two six ten al bo ed jo ty".split())


def text_value(words: str) -> Value:
    """Words, case-insensitively, with synonyms such as DNE and plurals such as "no solutions" merged."""
    words = re.sub(r"^(?:there (?:is|are) )?(no .*)s$", r"\1", spelling.plain_text(words).casefold())
    return Value(("text", "does not exist" if words == "dne" else words))


def read_words(text: str, depth: int) -> Value | None:
    r"""Words: \text{No}, No, Monday. Two or three letters that do not look like a name may be a product."""
    named = r"DNE|(?=.{4})[A-Za-z]{2,}(?:[ -]+[A-Za-z']+|'[A-Za-z]+)*"
    match = re.fullmatch(rf"\\text\{{([^{{}}\\]*)\}}|({named})", text)
    if match:
        return text_value(match[1] or match[2] or "")
    if not re.fullmatch(r"[A-Za-z]{2,3}", text):
        return None
    word = text_value(text)
    is_short = text.casefold() in SHORT_WORDS and not text[1:].isupper()
    if is_short or (re.fullmatch(r"[A-Z][a-z]{2}", text) and re.search("[aeiouyAEIOUY]", text)):
        return word
    return replace(scalar(formula.parse(text)), also=frozenset([word.key]))


DECIMAL = r"\d+(?:\.\d+)?"
RATIO = re.compile(rf"{DECIMAL}(?: ?: ?{DECIMAL})+")
RANGE_OR_DATE = re.compile(rf"({DECIMAL}) ?- ?({DECIMAL})|\d+ ?- ?\d+ ?- ?\d+|\d\d?/\d\d?/\d{{4}}")
BASED = re.compile(r"(-?)\(?(?:\\text\{)?(\d[0-9A-Z]*|[0-9A-Z]{2,})[)}]? ?_ ?\{? ?\(?(\d{1,2})\)? ?\}?")
SCIENTIFIC = re.compile(r"([+-]?)((?:\d+\.?\d*|\.\d+))[eE]([+-]?\d{1,4})")
DEGREE = r"\s*\^?\s*(?:\\circ|\{\s*\\circ\s*\}|\\degree)\s*"
PART = rf"({DECIMAL}) ?(?:\\text\{{)? ?([A-Za-z]+)\.? ?\}}?"
AND = r",? ?(?:(?:\\text\{ ?)?and ?\}?)? ?"
COMPOUND = re.compile(rf"{PART}{AND}{PART}(?:{AND}{PART})?")


def number_tree(text: str):
    """formula.parse, but rejects the range 20-35 and the date 2023-10-14. Raises NotFormula."""
    match = RANGE_OR_DATE.fullmatch(text.strip())
    if match and not (match[1] and float(match[1]) >= float(match[2])):
        raise NotFormula("a range or a date")
    return formula.parse(text)


def read_compound(text: str) -> Value | None:
    """3 hours 20 minutes is 200 minutes; 5 feet 8 inches is 68 inches."""
    match = COMPOUND.fullmatch(text)
    if match is None:
        return None
    counts, units = match.groups()[::2], [_unit(word) for word in match.groups()[1::2] if word]
    total, unit = Fraction(counts[0]), units[0]
    for count, smaller in zip(counts[1:], units[1:], strict=False):
        if unit not in SMALLER or SMALLER[unit][0] != smaller:
            return None
        total, unit = total * SMALLER[unit][1] + Fraction(count), smaller
    key = scalar(("number", total)).key
    return Value(("unit", key, unit), frozenset([key]))


def read_number(text: str, depth: int) -> Value | None:
    """Numbers with several readings or with words: percent, other bases, 3e6, 4:15, 6 million, 12 cm."""
    if re.fullmatch(RATIO, text):
        return Value(("ratio", *(Fraction(part) for part in text.replace(" ", "").split(":"))))
    based = BASED.fullmatch(text)
    if based and (based[2][0].isdigit() or int(based[3]) > 10):
        sign, digits, base = based.groups()
        try:
            readings = [int(sign + digits, int(base)), *([int(sign + digits)] if digits.isdigit() else [])]
        except ValueError:
            raise NotFormula("no digits of this base") from None
        # If the question names the base, answers may omit it: 52_8 is 42, and may be 52.
        also = frozenset(scalar(("number", Fraction(reading))).key for reading in readings)
        return Value(("base", sign + digits, int(base)), also)
    scientific = SCIENTIFIC.fullmatch(text)
    if scientific:
        sign, digits, exponent = scientific.groups()
        value = scalar(("number", Fraction(f"{sign}{digits}e{exponent}")))
        if "." in digits or "E" in text or not exponent.startswith(("-", "+")):
            return value
        product = scalar(formula.parse(text))  # 3e-4 may be three times e, minus four
        return replace(product, also=frozenset([value.key]))
    if text.endswith("%"):
        number = number_tree(text[:-1])
        hundredth = ("quotient", number, ("number", Fraction(100)))
        return Value(("percent", scalar(number).key), frozenset([scalar(number).key, scalar(hundredth).key]))
    head, words = words_behind(text)
    return with_words(head, words, text) if words else None


def with_words(head: str, words: str, text: str) -> Value | None:
    """A number and words: factors multiply, units may be omitted, words such as north may not."""
    bare, known = r"\text" not in text, known_words(words)
    strange = known is None or not set(re.findall(r"[^\W\d_]+", known[1])) <= set(UNIT_OF)
    if bare and strange and not re.match(r" .*[^\W\d_]{4}| *[^\0-\x7f]", text[len(head) :]):
        return None  # 6 abc is a product
    degrees = re.search(DEGREE + "$", head) and known and known[1] not in ("", "C", "F")
    if known is None or degrees:  # 30 degrees N is a place
        return Value(("words", scalar(number_tree(head)).key, spelling.plain_text(words)))
    factor, unit = known
    special = head.endswith("%") or BASED.fullmatch(head) or SCIENTIFIC.fullmatch(head)
    tree = None if special else number_tree(re.sub(DEGREE + "$", "", head))
    if bare and tree is not None and numeric.letters(tree):
        return None
    number = read_number(head, 0) if tree is None else scalar(tree)
    if factor != 1:
        number = scalar(("product", (("number", factor), tree or formula.parse(head))))
    if not unit:
        return number
    product = {scalar(formula.parse(text)).key} if bare and len(words) < 3 and tree else set()  # 12 m
    return Value(("unit", number.key, unit), frozenset({number.key, *number.also, *product}))
