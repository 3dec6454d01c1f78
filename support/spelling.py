# ruff: noqa: RUF001
r"""One spelling for what is written in several ways: clean(r"$\dfrac{1}{2}$.") -> r"\frac{1}{2}"."""

import re
import unicodedata

from support.formula import FUNCTIONS

SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ", "0123456789-+n")
SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
UNICODE = {
    "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "÷": r"\div ", "π": r"\pi ", "∞": r"\infty ",
    "±": r"\pm ", "∓": r"\mp ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∅": r"\emptyset ", "∪": r"\cup ",
    "∩": r"\cap ", "∈": r"\in ", "ℝ": r"\mathbb{R}", "°": r"^\circ ", "√": r"\sqrt ", "∛": r"\sqrt[3]",
    "∠": r"\angle ", "½": r"\frac{1}{2}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}", "¼": r"\frac{1}{4}",
    "¾": r"\frac{3}{4}", "⅕": r"\frac{1}{5}", "⅖": r"\frac{2}{5}", "⅗": r"\frac{3}{5}", "⅘": r"\frac{4}{5}",
    "⅙": r"\frac{1}{6}", "⅚": r"\frac{5}{6}", "⅛": r"\frac{1}{8}", "⅜": r"\frac{3}{8}", "⅝": r"\frac{5}{8}",
    "⅞": r"\frac{7}{8}", "’": "'", "′": "'", "⟨": r"\langle ", "⟩": r"\rangle ", "€": "", "£": "", "％": "%",
    "⁄": "/", "∕": "/", "⋅": r"\cdot ", "“": "", "”": "", "≈": r"\approx ",
}  # fmt: skip
GREEK_LETTERS = "αβγδεζηθικλμνξρστυφχψωΓΔΘΛΞΠΣΦΨΩ"
GREEK_NAMES = """alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau
    upsilon phi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega""".split()
UNICODE |= {character: rf"\{name} " for character, name in zip(GREEK_LETTERS, GREEK_NAMES, strict=True)}
PLAIN_FUNCTIONS = "|".join(sorted(FUNCTIONS | {"sqrt", "log", "pi"}, key=len, reverse=True))
REWRITES = [  # spelling, not meaning; in this order
    (
        re.compile(r"[\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]"),
        "",
    ),  # zero-width and right-to-left marks
    (re.compile("[" + "".join(UNICODE) + "]"), lambda m: UNICODE[m[0]]),
    (re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ]+"), lambda m: "^{" + m[0].translate(SUPERSCRIPTS) + "}"),
    (re.compile("[₀₁₂₃₄₅₆₇₈₉]+"), lambda m: "_{" + m[0].translate(SUBSCRIPTS) + "}"),
    (
        re.compile("[^\0-\x7f]+"),
        lambda m: unicodedata.normalize("NFKC", m[0]),
    ),  # full-width digits, italic letters
    (re.compile(r"\\[dtc]frac(?![a-z])"), r"\\frac"),
    (re.compile(r"\\[dt]binom(?![a-z])"), r"\\binom"),
    (
        re.compile(
            r"\\(?:left|right|[bB]igg?[lrm]?|middle|displaystyle|limits|mathbf|boldsymbol|bm|f?box(?:ed)?)"
            r"(?![A-Za-z])"
        ),
        "",
    ),
    (
        re.compile(r"\\(?:emph|text(?:bf|it|rm|sf|tt|sc|normal)|[mh]box|math(?:rm|it|sf|tt))(?![a-z])"),
        r"\\text",
    ),
    (re.compile(r"\\operatorname\*?(?![a-z])"), r"\\text"),
    (
        re.compile(rf"\\text\s*\{{\s*({PLAIN_FUNCTIONS}|[ei])\s*\}}"),
        lambda m: m[1] if len(m[1]) == 1 else f"\\{m[1]} ",
    ),
    (re.compile(r"(?<!\\)\\!\s*|(?<!\\)\\\$|\$|^\s*\\[(\[]|\\[)\]]\s*$"), ""),
    (re.compile(r"\\\\\s*\[[\d.]+[a-z]+\]"), r"\\\\"),
    (re.compile(r"(?<!\\)\\(?:[,;:> ]|q?quad(?![a-z])|enspace(?![a-z])|thinspace(?![a-z]))|~|\s+"), " "),
    (re.compile(r"\s*\{,\}\s*"), ","),
    (re.compile(r"\\(?:text)?color\s*\{[a-z]+\}"), ""),
    (re.compile(r"\\(?:[lL]arge|LARGE|[hH]uge|small|normalsize)(?![A-Za-z])"), ""),
    (re.compile(r"\\big(cup|cap)(?![a-z])"), r"\\\1"),
    (re.compile(r"\\mathbb\s*([A-Z])"), r"\\mathbb{\1}"),
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
    (re.compile(r"\\colon(?![a-z])|\{:\}"), ":"),
    (re.compile(r"(?<=\d)\s*(?:\\text\{\s*)?x(?:\s*\})?\s*(?=10\s*\^)"), r"\\times "),
    (re.compile(r"(\\circ\s*\}?)\s*(?:\\text\s*\{\s*)?([CF])(?:\s*\})?\s*$"), r"\1\\text{\2}"),
    (re.compile(r"\*\*(?=[-\d({a-z])"), "^"),
]
TIME_OF_DAY = re.compile(r"(?<=\d)\s*(?:\\text\s*\{\s*([AaPp])\.?\s?[Mm]\.?\s*\}|([AaPp])\.?\s?[Mm]\.?\s*$)")
THOUSANDS = re.compile(r"(?<![\d.,])(?<!\d )(\d{1,3})((?:,\d{3})+|(?: \d{3})+)(?![\d/]| ?/| \d|,\d)")


def clean(answer: str) -> str:
    r"""The answer with one spelling of spaces, fractions, brackets, fonts, signs and thousands.

    >>> clean(r"$\left(\dfrac{1}{2},\ \pi\right)$."), clean(r"\textbf{17}"), clean("62 000"), clean("14 25")
    ('(\\frac{1}{2}, \\pi)', '17', '62000', '14 25')
    """
    for pattern, replacement in REWRITES:
        answer = pattern.sub(replacement, answer)
    answer = re.sub(r"\\text\s*\{([^{}]*)\}", _unwrapped, answer)
    answer = TIME_OF_DAY.sub(lambda m: rf"\text{{{m[1] or m[2]}m}}".lower(), answer)
    answer = THOUSANDS.sub(_joined, answer)
    return re.sub(r"^\s*=", "", answer.strip('"* ').rstrip(".,; ")).strip()


def _unwrapped(match: re.Match) -> str:
    r"""\text{17} is 17, \text{(B)} is B, \text{ or } is a word; other words keep their \text."""
    content = " ".join(match[1].split())
    single = re.fullmatch(r"\(?([A-Za-z])\)?", content)
    if single:
        unit = re.search(r"(?:[\d)}]|\\circ)\s*$", match.string[: match.start()])  # 3\text{ m}
        return match[0] if unit and len(content) == 1 else single[1]
    if not re.search(r"[A-Za-z]", content) or content.casefold() in ("or", "and"):
        return f" {content.casefold()} "
    formula = re.match(r"[-$]?\.?\d|.*=|[^ ]+ (?:and|or) [^ ]+$", content)
    if formula and not re.search("[A-Za-z]{2} (?:and|or)", content):
        return f" {content} "
    return rf"\text{{{content}}}"


def _joined(match: re.Match) -> str:
    """62,000 without its comma, but (12,102) is a pair."""
    before = match.string[: match.start()]
    pair = len(re.findall(r"[(\[]|\\\{", before)) > len(re.findall(r"[)\]]|\\\}", before))
    return match[0] if pair and "," in match[2] else match[1] + re.sub("[, ]", "", match[2])


def plain_text(text: str) -> str:
    r"""Words without case, spacing and \text: what answers that are no formula are compared by."""
    words = re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", text)
    if not re.search(r"\\[A-Za-z]", words) and re.search(r"[A-Za-z]{3}|\b[ap]\.? ?m\b", words, re.I):
        words = re.sub(r"\b([ap])\.? ?m\b\.?", r"\1m", words.casefold())
    words = " ".join(re.sub(r"\{([A-Za-z0-9])\}", r" \1 ", words).split())
    words = re.sub(r"(?<=\d) (?=[ap]m\b)", "", words)
    return re.sub(r"(?<![A-Za-z0-9]) | (?![A-Za-z0-9])", "", words).rstrip(".")
