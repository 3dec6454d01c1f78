# ruff: noqa: RUF001
r"""One spelling for what is written in several ways, and the words of answers: clean(r"$\dfrac{1}{2}$.") -> r"\frac{1}{2}"."""

import re

from support.formula import FUNCTIONS

SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ", "0123456789-+n")
SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
UNICODE = {
    "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "÷": r"\div ", "π": r"\pi ", "∞": r"\infty ", "±": r"\pm ",
    "∓": r"\mp ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∅": r"\emptyset ", "∪": r"\cup ", "∩": r"\cap ",
    "∈": r"\in ", "ℝ": r"\mathbb{R}", "°": r"^\circ ", "√": r"\sqrt ", "∛": r"\sqrt[3]", "∠": r"\angle ", "θ": r"\theta ",
    "α": r"\alpha ", "β": r"\beta ", "λ": r"\lambda ", "φ": r"\phi ", "ω": r"\omega ", "½": r"\frac{1}{2}", "⅓": r"\frac{1}{3}",
    "⅔": r"\frac{2}{3}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "⅕": r"\frac{1}{5}", "⅖": r"\frac{2}{5}", "⅗": r"\frac{3}{5}",
    "⅘": r"\frac{4}{5}", "⅙": r"\frac{1}{6}", "⅚": r"\frac{5}{6}", "⅛": r"\frac{1}{8}", "⅜": r"\frac{3}{8}", "⅝": r"\frac{5}{8}",
    "⅞": r"\frac{7}{8}", "’": "'", "′": "'", "⟨": r"\langle ", "⟩": r"\rangle ", "€": "", "£": "", "％": "%",
}  # fmt: skip
PLAIN_FUNCTIONS = "|".join(sorted(FUNCTIONS | {"sqrt", "log", "pi"}, key=len, reverse=True))
REWRITES = [  # spelling, not meaning; in this order
    (
        re.compile(r"[\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]"),
        "",
    ),  # zero-width and right-to-left marks
    (re.compile("[" + "".join(UNICODE) + "]"), lambda m: UNICODE[m[0]]),
    (re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ]+"), lambda m: "^{" + m[0].translate(SUPERSCRIPTS) + "}"),
    (re.compile("[₀₁₂₃₄₅₆₇₈₉]+"), lambda m: "_{" + m[0].translate(SUBSCRIPTS) + "}"),
    (re.compile(r"\\[dtc]frac(?![a-z])"), r"\\frac"),
    (re.compile(r"\\[dt]binom(?![a-z])"), r"\\binom"),
    (
        re.compile(r"\\(?:left|right|[bB]igg?[lrm]?|displaystyle|limits|mathbf|boldsymbol|bm|f?box(?:ed)?)(?![A-Za-z])"),
        "",
    ),
    (
        re.compile(r"\\(?:text(?:bf|it|rm|sf|tt|sc|normal)|mbox|hbox|math(?:rm|it|sf|tt)|operatorname\*?)(?![a-z])"),
        r"\\text",
    ),
    (
        re.compile(rf"\\text\s*\{{\s*({PLAIN_FUNCTIONS}|[ei])\s*\}}"),
        lambda m: m[1] if len(m[1]) == 1 else f"\\{m[1]} ",
    ),
    (re.compile(r"(?<!\\)\\!\s*|(?<!\\)\\\$|\$|^\s*\\[(\[]|\\[)\]]\s*$"), ""),
    (re.compile(r"\\\\\s*\[[\d.]+[a-z]+\]"), r"\\\\"),
    (re.compile(r"(?<!\\)\\(?:[,;:> ]|q?quad(?![a-z])|enspace(?![a-z])|thinspace(?![a-z]))|~|\s+"), " "),
    (re.compile(r"\s*\{,\}\s*"), ","),
    (re.compile(r"\\lbrace(?![a-z])"), r"\\{"),
    (re.compile(r"\\rbrace(?![a-z])"), r"\\}"),
    (re.compile(r"\\l[vV]ert(?![a-z])|\\r[vV]ert(?![a-z])|\\vert(?![a-z])"), "|"),
    (re.compile(r"\\(?:leqslant|leqq|leq)(?![a-z])|<=|\\le(?![a-z])"), r"\\le "),
    (re.compile(r"\\(?:geqslant|geqq|geq)(?![a-z])|>=|\\ge(?![a-z])"), r"\\ge "),
    (re.compile(r"\\neq(?![a-z])|\\not\s*=|!="), r"\\ne "),
    (re.compile(r"\\lt(?![a-z])"), "<"),
    (re.compile(r"\\gt(?![a-z])"), ">"),
    (re.compile(r"\\varnothing(?![a-z])|^\s*\\\{\s*\\\}\s*$"), r"\\emptyset"),
    (re.compile(r"\\infin(?![a-z])|(?<![A-Za-z\\])infinity(?![A-Za-z])"), r"\\infty "),
    (re.compile(r"\\%|\s*(?:\\text\s*\{\s*(?:percent|pct|%)\s*\}|\b(?:percent|pct)\b)"), "%"),
    (re.compile(rf"(?<![A-Za-z\\])({PLAIN_FUNCTIONS})(?![A-Za-z])"), r"\\\1 "),
    (re.compile(r"\\colon(?![a-z])"), ":"),
    (re.compile(r"\*\*(?=[-\d({a-z])"), "^"),
]
THOUSANDS = re.compile(r"(?<![\d.,])(?<!\d )(\d{1,3})((?:,\d{3})+|(?: \d{3})+)(?![\d/]| ?/| \d|,\d)")


def clean(answer: str) -> str:
    r"""The answer with one spelling of spaces, fractions, brackets, fonts, signs and thousands.

    >>> clean(r"$\left(\dfrac{1}{2},\ \pi\right)$."), clean(r"\textbf{17}"), clean("62 000"), clean("14 25")
    ('(\\frac{1}{2}, \\pi)', '17', '62000', '14 25')
    """
    for pattern, replacement in REWRITES:
        answer = pattern.sub(replacement, answer)
    answer = re.sub(r"\\text\s*\{([^{}]*)\}", _unwrapped, answer)
    answer = THOUSANDS.sub(_joined, answer)
    return re.sub(r"^\s*=", "", answer.strip().rstrip(".,; ")).strip()


def _unwrapped(match: re.Match) -> str:
    r"""\text{17} is 17, \text{(B)} is B, \text{ or } is a word between formulas; other words keep their \text."""
    content = " ".join(match[1].split())
    single = re.fullmatch(r"\(?([A-Za-z])\)?", content)
    if single:
        return single[1] if len(content) > 1 or match.start() == 0 or match.end() == len(match.string) else match[0]
    if not re.search(r"[A-Za-z]", content) or content.casefold() in ("or", "and"):
        return f" {content.casefold()} "
    return rf"\text{{{content}}}"


def _joined(match: re.Match) -> str:
    """62,000 without its comma, but (12,102) is a pair."""
    before = match.string[: match.start()]
    pair = len(re.findall(r"[(\[]|\\\{", before)) > len(re.findall(r"[)\]]|\\\}", before))
    return match[0] if pair and "," in match[2] else match[1] + re.sub("[, ]", "", match[2])


# ----------------------------------------------------------------------------------------------------------------------
# words behind a number

MULTIPLIERS = {
    "hundred": 100,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
    "dozen": 12,
}
NO_UNIT = {
    "dollar",
    "degree",
    "deg",
    "unit",
    "usd",
}  # what is dropped without a trace, like the signs $ and the degree
UNITS = {  # unit: other words for it
    "mm": "millimeter millimetre", "cm": "centimeter centimetre", "m": "meter metre", "km": "kilometer kilometre",
    "in": "inch inches", "ft": "foot feet", "yd": "yard", "mi": "mile", "mg": "milligram", "g": "gram", "kg": "kilogram",
    "lb": "pound lbs", "oz": "ounce", "ml": "milliliter millilitre mL", "l": "liter litre L", "s": "sec second",
    "ms": "millisecond", "min": "minute mins", "h": "hr hour hrs", "day": "", "week": "", "month": "", "year": "yr", "cent": "¢",
    "rad": "radian", "acre": "", "gallon": "gal", "quart": "", "cup": "", "ton": "tonne", "hz": "hertz Hz", "n": "N newton", "j": "J joule",
    "kj": "kJ kilojoule", "w": "W watt", "kw": "kW kilowatt", "v": "V volt", "a": "A ampere amp",
    "pa": "Pa pascal", "k": "K kelvin", "c": "C celsius", "f": "F fahrenheit", "mol": "mole", "ev": "eV", "nm": "nanometer", 
    "ohm": "",
}  # fmt: skip
COUNTED = """
    people person student point coin way apple orange ball marble book boy girl child children man men woman women pair card
    game question problem page step time hand handshake side edge face vertex vertices vertice triangle square rectangle
    circle solution root integer number digit term value element subset arrangement permutation combination outcome
    possibility possibilities choice path route color colour ticket stamp bean candy candies cookie sticker pencil pen
    flower tree rose chair table seat team player member vote car bus buses trip lap round turn sock shirt tile cube block
    brick piece slice pizza pie egg penny pennies nickel dime quarter bill animal dog cat cow horse chicken pig bird fish
    duck rabbit goat sheep house room floor box bag bottle jar glass glasses pint serving calorie word letter sheet row column
    dot line region plane zero zeroes factor divisor multiple prime pound
""".split()
WORD_OF = {word: unit for unit, words in UNITS.items() for word in (unit, *words.split())}
WORD_OF |= {word: word for word in (*COUNTED, *NO_UNIT)}


def words_behind(text: str) -> tuple[str, str]:
    r"""Split a number from the words behind it: r"6\text{ cm}^2" -> ("6", "cm^2"), "6 cm" -> ("6", "cm"), else (text, "")."""
    exponent = r"(?:\s*\^\s*\{?\s*(-?[1-9])\s*\}?)?"
    match = re.fullmatch(r"(.*?\S)\s*\\text\{([^{}]*)\}" + exponent, text)
    match = match or re.fullmatch(r"(.*?[\d})!]) ?(?<![A-Za-z_])([A-Za-z]+(?:[ ./]+[A-Za-z]+)*\.?)" + exponent, text)
    if match is None or re.search(r"\\(?:begin|end|text)|[=<>]", match[1]):
        return text, ""
    return match[1], match[2].strip() + (f"^{match[3]}" if match[3] else "")


def known_words(words: str) -> tuple[int, str] | None:
    """(factor, unit) of words behind a number, None if a word is unknown: a.m., north and the like are no units.

    >>> known_words("million dollars"), known_words("square cm"), known_words("km/h"), known_words("north")
    ((1000000, ''), (1, 'cm^2'), (1, 'km h^-1'), None)
    """
    factor, units, sign, power = 1, [], 1, 1
    words = re.sub(r"\bmph\b", "mi/h", words.replace(r"\cdot", " "))
    for word in re.findall(r"[A-Za-z¢]+|\^-?\d|\S", words):
        lower = word.casefold()
        singular = lower[:-1] if lower.endswith("s") and len(lower) > 2 else lower
        if singular in MULTIPLIERS and not units:
            factor *= MULTIPLIERS[singular]
        elif lower in ("/", "per"):
            sign = -1
        elif lower in ("square", "sq", "cubic", "cu") and not words.casefold().endswith(word.casefold()):
            power = 2 if lower[0] == "s" else 3
        elif lower in ("squared", "cubed") or word[0] == "^":
            if not units:
                return None
            exponent = int(word[1:]) if word[0] == "^" else 2 if lower[0] == "s" else 3
            units[-1] = (units[-1][0], units[-1][1] * exponent)
        elif lower not in (".", "of"):
            unit = WORD_OF.get(word) or WORD_OF.get(lower) or WORD_OF.get(singular)
            if unit is None:
                return None
            units.append((unit, sign * power))
            power = 1
    kept = sorted((unit, exponent) for unit, exponent in units if unit not in NO_UNIT)
    return factor, " ".join(unit if exponent == 1 else f"{unit}^{exponent}" for unit, exponent in kept)


def plain_text(text: str) -> str:
    r"""Words without case, spacing and \text: what answers that are no formula are compared by."""
    words = re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", text)
    if not re.search(r"\\[A-Za-z]", words) and re.search(r"[A-Za-z]{2}|\b[ap]\. ?m\b", words):
        words = re.sub(r"\b([ap])\. ?m\b\.?", r"\1m", words.casefold())
    words = re.sub(r"(?<=\d) (?=[ap]m\b)", "", " ".join(words.split()))
    return re.sub(r"(?<![A-Za-z0-9]) | (?![A-Za-z0-9])", "", words).rstrip(".")
