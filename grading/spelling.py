# ruff: noqa: RUF001
r"""Normalize the spelling of answers: clean(r"$\dfrac{1}{2}$.") -> r"\frac{1}{2}"."""

import itertools
import re
import unicodedata

from grading.formula import FUNCTIONS, GREEK, NotFormula

COMMAND_OF = dict(zip("αβγδεζηθικλμνξρστυφχψωΓΔΘΛΞΠΣΦΨΩ", GREEK, strict=True)) | {
    "×": "times", "·": "cdot", "⋅": "cdot", "÷": "div", "π": "pi", "∞": "infty", "±": "pm", "∓": "mp",
    "≤": "le", "≥": "ge", "≠": "ne", "∅": "emptyset", "∪": "cup", "∩": "cap", "∈": "in", "√": "sqrt",
    "∠": "angle", "⟨": "langle", "⟩": "rangle", "≈": "approx",
}  # fmt: skip
UNICODE = {character: rf"\{name} " for character, name in COMMAND_OF.items()}
UNICODE |= {
    "−": "-", "–": "-", "—": "-", "ℝ": r"\mathbb{R}", "°": r"^\circ ", "∛": r"\sqrt[3]", "’": "'", "′": "'",
    "″": "''", "％": "%", "⁄": "/", "∕": "/", "“": "", "”": "", "…": "...", "。": ".", "、": ",",
    "Å": " angstrom", "<=": r"\le ", ">=": r"\ge ", "!=": r"\ne ", "{:}": ":",
}  # fmt: skip
# Each command with its synonyms; those of \relax are dropped.
NAMES = r"""
    \frac dfrac tfrac cfrac; \binom dbinom tbinom; \le leq leqq leqslant; \ge geq geqq geqslant; \ne neq;
    \emptyset varnothing; \infty infin; \cup bigcup; \cap bigcap; \{ lbrace; \} rbrace; < lt; > gt; : colon;
    \approx simeq thickapprox; | vert lvert rvert lVert rVert; ... dots ldots cdots dotsc dotsb; \text emph
    textbf textit textrm textsf texttt textsc textnormal hbox mbox mathrm mathit mathsf mathtt operatorname;
    \relax left right middle displaystyle textstyle limits mathbf boldsymbol bm box fbox framebox boxed
    underline bf rm it sf tt em large Large LARGE huge Huge small normalsize checkmark qed blacksquare
"""
RENAMED = {rf"\{old}": new for new, *olds in map(str.split, NAMES.split(";")) for old in olds}
FUNCTION = "|".join(sorted({*FUNCTIONS, "sqrt", "log", "pi"}, key=len, reverse=True))
BASES = dict(two=2, three=3, four=4, five=5, six=6, seven=7, eight=8, nine=9, ten=10, twelve=12, sixteen=16)


def as_ascii(match: re.Match) -> str:
    return unicodedata.normalize("NFKC", match[0])


REWRITES = [  # applied in this order; they change the spelling, not the meaning
    (r"[\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]", ""),  # zero-width and right-to-left marks
    (r"[\U0001f000-\U0001faff\u2600-\u27bf\ufe0f]|[€£¥₩₽₹]", ""),  # emoji, currencies
    (r"<su([bp])>(.*?)</su[bp]>", lambda m: f"{'_^'[m[1] == 'p']}{{{m[2]}}}"),
    (r"<([biup])>(.*?)</\1>", r"\2"),
    (r"</?(?:em|strong|br|span|div|code|center|font|answer|mark)(?:\s[a-z]+=[^<>]{0,60})?\s?/?>", ""),
    (r"^\s*([*_`\"]+)((?s:.*?))\1(\.?\s*)$|^\s*\*+|\*\*+\s*$", r"\2\3"),  # **8**, `8`, "8"
    ("[½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞]", lambda m: r"\frac{{{}}}{{{}}}".format(*as_ascii(m).split("⁄"))),
    ("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ]+", lambda m: f"^{{{as_ascii(m)}}}" if m[0][1:] else f"^{as_ascii(m)}"),
    ("[₀₁₂₃₄₅₆₇₈₉]+", lambda m: f"_{{{as_ascii(m)}}}"),
    ("|".join(map(re.escape, UNICODE)), lambda m: UNICODE[m[0]]),
    (r"^\s*(?:US|USD|Rs\.?|INR|EUR|GBP|AU|CA)\s*\\?\$?\s*(?=\d)", ""),
    (r"[^\0-\x7f]+", as_ascii),  # full-width digits, italic letters
    (r"(?<!\\)\\\\(?=[A-Za-z]{2})(?!.*\\begin|.*\\end)|(?<![A-Za-z\\])(?=[dt]?frac\s*\{)", r"\\"),  # slips
    (r"\\(?:mathbf|boldsymbol|bm|hat|vec|textbf)\s*\{?\\?([ijk])(?:math)?(?![A-Za-z])\s*\}?", r"\\hat \1"),
    (r"\\(?:left|right)\s*\.|\\(?:[hv]?phantom|tag|[hv]space)\*?\s*\{[^{}]*\}|\\[bB]igg?[lrm]?(?![a-z])", ""),
    (r"\\text\s*\{\s*\\AA\s*\}|\\AA(?![A-Za-z])", r"\\text{ angstrom}"),
    (r"(\\[A-Za-z]+)\*?", lambda m: RENAMED.get(m[1], m[0]).replace(r"\relax", "")),
    (rf"\\text\s*\{{\s*({FUNCTION}|[ei])\s*\}}", lambda m: m[1] if len(m[1]) == 1 else f"\\{m[1]} "),
    (r"\\text\s*\{\s*(\^?\s*\\circ|\\?[$°])\s*([CF]?)\s*\}", r"\1\2"),
    (r"(?<=[0-9A-F])\s*(?:\\text\s*\{)?\s*\(?\s*base\s*\}?\s*(\d{1,2})\s*\)?\s*\}?\s*$", r"_{\1}"),
    (r"\\text\s*\{\s*(\((?:[A-Za-z]|i{1,3}|iv)\))\s*[.:]?\s*\}", r"\1 "),
    (r"(?<!\\)\\!\s*|(?<!\\)\\\$|\$|^\s*\\[(\[]|\\[)\]]\s*$|\s*\\\\\s*$|\\(?:text)?color\s*\{[a-z]+\}", ""),
    (r"\\\\\s*\[[\d.]+[a-z]+\]", r"\\\\"),
    (r"(?<!\\)\\(?:[,;:> ]|q?quad(?![a-z])|enspace(?![a-z])|thinspace(?![a-z]))|~|\s+", " "),
    (r"\s*\{,\s*\}\s*", ","),
    (r"\\mathbb\s*([A-Z])", r"\\mathbb{\1}"),
    (r"\\not\s*=", r"\\ne "),
    (r"^\s*(?:\\\{)?\s*\\begin\{(cases|aligned|array)\}(?:\{[lcr]+\})?(.*)\\end\{\1\}\s*$",
     lambda m: re.sub(r"\s*\\\\\s*(?=.)", ", ", m[2].replace("&", ""))),
    (r"^\s*\\\{\s*\\\}\s*$", r"\\emptyset"),
    (r"(?<![A-Za-z\\])inf(?:inity|ty)?(?![A-Za-z])", r"\\infty "),
    (r"\+\s*/\s*-", r"\\pm "),
    (r"([+-])\s+-(?=\s*[\d.A-Za-z\\(])", lambda m: "-" if m[1] == "+" else "+"),
    (r"\^\s*\{?\s*(?:\*|\\ast|\\star)\s*\}?", "*"),
    (r"\\%|\s*(?:\\text\s*\{\s*(?:percent|pct|%)\s*\}|\b(?:percent|pct)\b)", "%"),
    (r"(?<=\d)\s*\^?\s*(?:\{\s*)?(?:\\text\s*\{\s*)?(?:st|nd|rd|th)(?![A-Za-z])\s*(?:\}\s*){0,2}", " "),
    (r"(?<=\d)\s*(?:''|\")", r"\\text{ inches}"),
    (r"(?<=\d)(?<!_\d)\s*'", r"\\text{ feet}"),
    (rf"_\s*\{{?\s*(?:\\text\s*\{{\s*)?({'|'.join(BASES)})(?![a-z])[\s}}]*", lambda m: f"_{{{BASES[m[1]]}}}"),
    (rf"(?<![A-Za-z\\])({FUNCTION})(?![A-Za-z])", r"\\\1 "),
    (r"(?<=\d)\s*(?:\\text\{\s*)?x(?:\s*\})?\s*(?=10\s*\^)", r"\\times "),
    (r"(\\circ\s*\}?)\s*(?:\\text\s*\{\s*)?([CF])(?:\s*\})?\s*$", r"\1\\text{\2}"),
    (r"\*\*(?=[-\d({a-z])", "^"),
    (r"(^|=|\\(?:cup|cap|in)(?![a-z]))(\s*)([\[\]])([^\[\]()]*[,;][^\[\]()]*)([\[\]])(?=\s*(?:$|\\))",
     lambda m: m[1] + m[2] + "[("[m[3] == "]"] + m[4] + "])"[m[5] == "["]),  # ]1, 6[ is (1, 6)
]  # fmt: skip
TIME_OF_DAY = re.compile(r"(?<=\d)\s*(?:\\text\s*\{\s*([AaPp])\.?\s?[Mm]\.?\s*\}|([AaPp])\.?\s?[Mm]\.?\s*$)")
THOUSANDS = re.compile(r"(?<![\d.,])(?<!\d )(\d{1,3})((?:,\d{3})+|(?: \d{3})+)(?![\d/]| ?/| \d|,\d)")
ABOUT = r"\\approx|(?:\\text\s*\{\s*)?(?:approximately|approx\.?|about|roughly)[\s}]+"
APPROXIMATELY = rf"^\s*(?:[=&]|{ABOUT})|(?:\\approx|\\text\s*\{{\s*\(approx[a-z.]*\)\s*\}})\s*$"


def clean(answer: str) -> str:
    r"""Normalize spaces, fractions, brackets, fonts, signs and thousands separators.

    >>> clean(r"$\left(\dfrac{1}{2},\ \pi\right)$."), clean(r"\textbf{17}"), clean("62 000"), clean("14 25")
    ('(\\frac{1}{2}, \\pi)', '17', '62000', '14 25')
    """
    for pattern, replacement in REWRITES:
        answer = re.sub(pattern, replacement, answer)
    answer = re.sub(r"\\text\s*\{([^{}]*)\}", _unwrapped, answer)
    answer = TIME_OF_DAY.sub(lambda m: rf"\text{{{m[1] or m[2]}m}}".lower(), answer)
    answer = THOUSANDS.sub(_joined, answer)
    return re.sub(APPROXIMATELY, "", re.sub(r"(?:(?<!\.)\.(?!\.)|[,;:\s])+$", "", answer)).strip()


def _unwrapped(match: re.Match) -> str:
    r"""\text{17} becomes 17, \text{(B)} becomes B, \text{ or } a word; other words keep their \text."""
    content = " ".join(match[1].split())
    if re.fullmatch("[A-Za-z]", content):
        unit = re.search(r"(?:[\d)}]|\\circ)\s*$", match.string[: match.start()])  # 3\text{ m}
        return match[0] if unit else content
    if not re.search(r"[A-Za-z]", content) or content.casefold() in ("or", "and"):
        return f" {content.casefold()} "
    if re.fullmatch(r"[A-Za-z]{2,}(?:, [A-Za-z]{2,})*,? (?:and|or) [A-Za-z]{2,}", content):
        return re.sub(r"\b(?!and\b|or\b)[A-Za-z]+", r"\\text{\g<0>}", content)
    formula = re.match(r"[-$]?\.?\d|.*=|[^ ]+ (?:and|or) [^ ]+$", content)
    if formula and not re.search("[A-Za-z]{2} (?:and|or)", content):
        return f" {content} "
    return rf"\text{{{content}}}"


def _joined(match: re.Match) -> str:
    """62,000 loses its comma, but (12,102) is a pair."""
    before = match.string[: match.start()]
    pair = len(re.findall(r"[(\[]|\\\{", before)) > len(re.findall(r"[)\]]|\\\}", before))
    return match[0] if pair and "," in match[2] else match[1] + re.sub("[, ]", "", match[2])


def plain_text(text: str) -> str:
    r"""Words without case, spacing and \text, for comparing answers that are not formulas."""
    words = re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", text)
    if not re.search(r"\\[A-Za-z]", words) and re.search(r"[A-Za-z]{3}|\b[ap]\.? ?m\b", words, re.I):
        words = re.sub(r"\b([ap])\.? ?m\b\.?", r"\1m", words.casefold())
    words = " ".join(re.sub(r"\{([A-Za-z0-9])\}", r" \1 ", words).split())
    return re.sub(r"(?<![A-Za-z0-9]) | (?![A-Za-z0-9])|(?<=\d) (?=[ap]m\b)", "", words).rstrip(".")


BRACKET = r"\\\\|\\(?:begin|end)\{|\\langle(?![a-z])|\\rangle(?![a-z])|\\[{}]|[()\[\]{}]"
# Change of depth; the 2 of \begin{ includes its own brace.
CHANGE = dict.fromkeys(["(", "[", "{", r"\{", r"\langle"], 1) | {r"\begin{": 2}
CHANGE |= dict.fromkeys([")", "]", "}", r"\}", r"\rangle"], -1)
SIGNS = r"\\(?:pm|mp)(?![a-z])"
LABEL = re.compile(
    r"(?:\(([A-Ja-j]|i{1,3}|iv)\)|([A-J])\))[.:]?(?: +(?=-\S|\()| *(?=[^\s()^*/+=<>,;_-]))(.+)"
    r"|([A-J])[.:] +(?=[\d\\(\[-]|[a-z](?![a-z]))(.+)"
)


def split(text: str, separator: str) -> list[str]:
    """Split a text at separators outside of all brackets; the pattern's only group is kept, as in re.split"""
    pieces, depth, start = [], 0, 0
    for match in re.finditer(rf"{separator}|{BRACKET}", text):
        if match[1] is None:
            depth += CHANGE.get(match.group(), 0)
        elif depth == 0:
            pieces += [text[start : match.start()].strip(), match[1]]
            start = match.end()
    return [*pieces, text[start:].strip()]


def inside(text: str, opening: str, closing: str) -> str | None:
    """The content of brackets that enclose the whole text; None if they do not, as in (1)(2)."""
    if not (text.startswith(opening) and text.endswith(closing)):
        return None
    depth = 0
    for match in re.finditer(BRACKET, text[: -len(closing)]):
        depth += CHANGE.get(match.group(), 0)
        if depth == 0:
            return None
    return text[len(opening) : -len(closing)].strip() if depth == 1 else None


def without_label(text: str) -> tuple[str, str | None]:
    r"""Split off the letter of a choice or a part: \textbf{(C)} 42 is ("42", "C")."""
    match = LABEL.fullmatch(text.strip())
    return (match[match.lastindex], match[1] or match[2] or match[4]) if match else (text, None)


def signs(text: str) -> list[str]:
    r"""The values of 1 \pm x. If there is a \mp, all signs change together, else each independently."""
    places = re.findall(SIGNS, text)
    if not places or r"\{" in text:
        return [text]
    if len(places) > 4:
        raise NotFormula("many signs")
    choices = itertools.product("+-", repeat=len(places))
    if r"\mp" in places:
        choices = [["+-"[(place == r"\mp") ^ minus] for place in places] for minus in (False, True)]
    parts = re.split(SIGNS, text)
    return ["".join(itertools.chain(*zip(parts, [*choice, ""], strict=True))) for choice in choices]
