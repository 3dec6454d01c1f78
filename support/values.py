r"""One answer, one value: read(r"x = \pm 2") is the value of "x=2, x=-2", with a key that all its spellings share.

A value is a number, a formula, text, a tuple, a set, an interval or a union of them, a matrix, an equation or a system.
Each answer is read once. `Value.key` says what it is; `Value.also` are keys of the other readings of its spelling: 50\%
may be read as 50 and as 0.5, x = 5 as 5, "1, 2" as (1, 2). Two answers are equal if their keys are, or if the key of
one is among the other readings of the other. So x = 5 is 5, but x = 5 is not y = 5.
"""

import itertools
import re
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, replace
from fractions import Fraction

from support import formula, intervals, numeric, spelling
from support.formula import NotFormula

MAX_LENGTH, MAX_DEPTH, MAX_ELEMENTS = (
    300,
    6,
    64,
)  # characters of an answer, nested brackets of lists, elements of a list


@dataclass(frozen=True)
class Value:
    key: Hashable
    also: frozenset = frozenset()
    name: Hashable = None  # of what it is the value: x in x = 5
    plain: "Value | None" = None  # the value without the name
    reals: tuple | None = None  # its intervals, if it is a set of real numbers

    def equals(self, other: "Value") -> bool:
        return self.key == other.key or self.key in other.also or other.key in self.also


def read(answer: str) -> Value:
    r"""The value of an answer; what is no formula is text. Raises nothing.

    >>> read("5 1/2").equals(read(r"\frac{11}{2}")), read("50%").equals(read("0.5")), read("(1,2)").equals(read("(2,1)"))
    (True, True, False)
    """
    if len(answer) > MAX_LENGTH:
        return Value(("text", " ".join(answer.split())))
    text = spelling.clean(answer)
    try:
        return read_list(text, 0)
    except Exception:  # NotFormula, and nothing else that is known; but no answer may end a run
        return Value(("text", spelling.plain_text(text)))


# ----------------------------------------------------------------------------------------------------------------------
# lists, sets and systems

BRACKET = re.compile(r"\\\\|\\begin\{|\\end\{|\\langle(?![a-z])|\\rangle(?![a-z])|\\[{}]|[()\[\]{}]")


def split(text: str, separator: str) -> list[str]:
    """The parts of a text between separators (a pattern with one group, which is kept) outside of all brackets."""
    pieces, depth, start = [], 0, 0
    for match in re.finditer(rf"{separator}|{BRACKET.pattern}", text):
        token = match.group()
        if match[1] is not None:
            if depth == 0:
                pieces += [text[start : match.start()].strip(), match[1]]
                start = match.end()
        elif token in ("(", "[", "{", r"\{", r"\begin{", r"\langle"):
            depth += 1 if token != r"\begin{" else 2  # its own brace closes again
        elif token != r"\\":
            depth -= 1 if token != r"\end{" else 0
    return [*pieces, text[start:].strip()]


def read_list(text: str, depth: int, bare: bool = True) -> Value:
    r"""Elements between commas, "and" or "or"; one element is itself. `bare`: not in the braces of a set."""
    if depth > MAX_DEPTH:
        raise NotFormula("nested too deep")
    cases = re.fullmatch(
        r"(?:\\\{)?\s*\\begin\{(?:cases|aligned|array)\}(?:\{[lcr]+\})?(.*)\\end\{(?:cases|aligned|array)\}",
        text,
    )
    if cases and bare:
        text = ",".join(part.replace("&", "") for part in cases[1].split(r"\\") if part.strip())
    pieces = split(text, r"([,;]\s*(?:\b(?:and|or)\b)?|\b(?:and|or)\b|\\(?:lor|land|vee|wedge)(?![a-z]))")
    parts, joints = [part for part in pieces[::2]], {joint.strip(" ,;") for joint in pieces[1::2]}
    if len(parts) > MAX_ELEMENTS or (len(parts) > 1 and not all(parts)):
        raise NotFormula("a list with a gap")
    expanded = [signs(part) for part in parts]
    elements = [read_one(part, depth) for part in itertools.chain(*expanded)]
    if len(elements) == 1 and bare:
        return elements[0]
    value = joined(elements, joints)
    if value.key[0] == "set" and bare and len(elements) == len(parts):
        also = {tuple_key(elements)}
        if re.fullmatch(r"-?\d{1,3}(?:, \d{3})+(?:\.\d+)?", text):  # 58, 500 may be 58,500
            also.add(read_one(text.replace(", ", ""), depth).key)
        value = replace(value, also=value.also | also)
    return value


SIGNS = r"\\(?:pm|mp)(?![a-z])"


def signs(text: str) -> list[str]:
    r"""1 \pm x as its two values; with \mp all signs change together, else each on its own."""
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


def joined(elements: list[Value], joints: set) -> Value:
    """The value of several elements: a union or intersection of inequalities, the values of one name, a system or a set."""
    first = elements[0]
    if first.name is not None and all(e.name is None and e.key[0] == "value" for e in elements[1:]):
        elements = [first, *(named(first.name, element) for element in elements[1:])]  # x = 2 or -2
    names = {element.name for element in elements}
    if names == {None} and "or" in joints and all(e.reals is not None for e in elements) and elements[0].key[0] == "reals":
        return of_reals(intervals.union(*(element.reals for element in elements)))
    if len(names) == 1 and None not in names:
        if all(element.reals is not None for element in elements) and joints & {"or", r"\lor", r"\vee"}:
            return named(first.name, of_reals(intervals.union(*(element.reals for element in elements))))
        if all(element.reals is not None for element in elements) and joints & {"and", r"\land", r"\wedge"}:
            return named(first.name, of_reals(intervals.intersection(*(element.reals for element in elements))))
        if len({element.plain.key for element in elements}) == len(elements):
            return named(first.name, set_of([element.plain for element in elements]))
    if any(element.key[0] in ("named", "equation", "inequality") for element in elements):
        order = [element.name for element in elements]
        known = all(e.plain and e.plain.key[0] == "value" and e.name[0] == "symbol" for e in elements)
        also = {tuple_key([e.plain for e in elements])} if known and order == sorted(set(order)) else ()
        return Value(("system", frozenset(element.key for element in elements)), frozenset(also))
    return set_of(elements)


def set_of(elements: list[Value]) -> Value:
    """A set; one element alone may stand without its braces."""
    counted = frozenset(Counter(element.key for element in elements).items())
    return Value(("set", counted), frozenset(element.key for element in elements if len(elements) == 1 and element.key[0] != "set"))


def tuple_key(elements: list[Value]) -> tuple:
    return ("tuple", *(element.key for element in elements))


# ----------------------------------------------------------------------------------------------------------------------
# one element

RELATION = r"(\\(?:le|ge|ne|in|approx|equiv|sim|to|mid|propto|cong|perp|subset\w*)(?![a-z])|[=<>])"
REALS = {r"\mathbb{R}", r"\text{all real numbers}", "all real numbers", r"\text{all reals}", "R"}


def read_one(text: str, depth: int) -> Value:
    """The value of one element of a list. Raises NotFormula."""
    text = text.strip()
    while text.startswith("{") and text.endswith("}") and _closes(text, "}"):
        text = text[1:-1].strip()
        if split(text, "([,;])")[1:]:
            return read_list(text, depth + 1)
    sides = split(text, RELATION)
    if len(sides) > 1:
        return read_relation(sides[::2], sides[1::2], depth)
    for rule in read_words, read_reals, read_brackets, read_matrix, read_number:
        value = rule(text, depth)
        if value is not None:
            return value
    return scalar(formula.parse(text))


def _closes(text: str, closing: str) -> bool:
    """Whether the bracket that opens the text is closed by its end and not before."""
    inner = text[: -len(closing)]
    depth = 0
    for match in BRACKET.finditer(inner):
        token = match.group()
        depth += (token in ("(", "[", "{", r"\{", r"\langle")) - (token in (")", "]", "}", r"\}", r"\rangle"))
        depth += token in (r"\begin{", r"\end{")
        if depth == 0:
            return False
    return depth == 1


def scalar(tree) -> Value:
    return Value(numeric.key(numeric.values(tree)))


SHORT_WORDS = {
    "yes",
    "no",
    "odd",
    "even",
    "all",
    "none",
    "true",
    "false",
    "red",
    "blue",
    "both",
    "sun",
    "one",
    "two",
    "six",
    "ten",
}


def read_words(text: str, depth: int) -> Value | None:
    r"""Words: \text{No}, No, no, Monday. Two or three bare letters may be a product too, unless they look like a name."""
    match = re.fullmatch(r"\\text\{([^{}\\]*)\}", text)
    if match:
        return Value(("text", spelling.plain_text(match[1])))
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
        return replace(scalar(formula.parse(text)), also=frozenset([value.key]))  # 3e-4 may be three times e, less four
    if text.endswith("%"):
        number = formula.parse(text[:-1])
        hundredth = ("quotient", number, ("number", Fraction(100)))
        return Value(("percent", scalar(number).key), frozenset([scalar(number).key, scalar(hundredth).key]))
    head, words = spelling.words_behind(text)
    return with_words(head, words, text) if words else None


def in_base(sign: str, digits: str, base: str) -> Value:
    """52_8 is 42, and may stand for 52 where everything is in base 8."""
    try:
        value = scalar(("number", Fraction(int(sign + digits, int(base)))))
    except ValueError:
        raise NotFormula("no digits of this base") from None
    also = {value.key} | ({scalar(("number", Fraction(int(sign + digits)))).key} if digits.isdigit() else set())
    return Value(("base", sign + digits, int(base)), frozenset(also))


def with_words(head: str, words: str, text: str) -> Value | None:
    """A number and words: a factor multiplies, a unit may be left out, other words may not; None if it is a formula."""
    if RATIO.fullmatch(head):
        raise NotFormula("a time of day")
    known, bare = spelling.known_words(words), r"\text" not in text
    if known is None:
        if bare and not re.search(r"^[^A-Za-z]* .*[A-Za-z]{4}", text):
            return None
        return Value(("words", scalar(formula.parse(head)).key, spelling.plain_text(words)))
    factor, unit = known
    tree = None if head.endswith("%") or BASED.fullmatch(head) else formula.parse(re.sub(DEGREE + "$", "", head))
    if bare and tree is not None and numeric.letters(tree):
        return None
    number = read_number(head, 0) if tree is None else scalar(tree)
    if factor != 1:
        number = scalar(("product", (("number", Fraction(factor)), tree or formula.parse(head))))
    if not unit:
        return number
    product = {scalar(formula.parse(text)).key} if bare and len(words) < 3 else set()  # 12 m, 12cm may be products
    return Value(("unit", number.key, unit), frozenset({number.key, *number.also, *product}))


# ----------------------------------------------------------------------------------------------------------------------
# brackets: tuples, intervals, sets, matrices


def read_brackets(text: str, depth: int) -> Value | None:
    """(1, 2), [1, 2), {1, 2}; None for brackets of a formula such as (a+1)(b+2) or (3)."""
    if text == r"\emptyset":
        return set_of([])
    braces = text.startswith(r"\{") and text.endswith(r"\}") and _closes(text, r"\}")
    if braces:
        inside = text[2:-2].strip()
        builder = split(inside, r"(\\mid(?![a-z])|:|\|)")
        if len(builder) == 3:
            condition = read_list(builder[2], depth + 1)
            return condition.plain if condition.plain is not None else Value(("builder", condition.key))
        return read_list(inside, depth + 1, bare=False) if inside else set_of([])
    angles = text.startswith(r"\langle") and text.endswith(r"\rangle") and _closes(text, r"\rangle")
    if not angles and not (text[:1] in ("(", "[") and text[-1:] in (")", "]") and _closes(text, text[-1])):
        return None
    inside = text[7:-7] if angles else text[1:-1]
    parts = split(inside, "([,;])")[::2]
    if len(parts) < 2:
        return None
    if not angles and len(parts) == 2 and (text[0] == "[" or text[-1] == "]" or r"\infty" in inside):
        return read_interval(text)
    elements = [read_one(part, depth + 1) for part in parts]
    return Value(tuple_key(elements), reals=None if len(parts) != 2 or angles else _pieces_or_none(text))


def read_interval(text: str) -> Value:
    pieces = _pieces_or_none(text)
    if pieces is not None:
        return of_reals(pieces)
    parts = split(text[1:-1], "([,;])")[::2]
    return Value(("interval", text[0], text[-1], *(read_one(part, 1).key for part in parts)))


def _pieces_or_none(text: str):
    """The interval that a pair in brackets is, if its ends are real numbers in order."""
    low, high = split(text[1:-1], "([,;])")[::2]
    try:
        return intervals.interval(end(low), text[0] == "[", end(high), text[-1] == "]")
    except NotFormula:
        return None


def end(text: str):
    r"""The number of an end of an interval, a Fraction, mpf or \infty."""
    match = re.fullmatch(r"([+-]?) ?\\infty", text.strip())
    if match:
        return -intervals.INFINITY if match[1] == "-" else intervals.INFINITY
    return intervals.real(formula.parse(text))


def of_reals(pieces: tuple) -> Value:
    """A union of intervals; an open one may be read as a pair, and a point as its number."""
    keys = tuple((intervals.end_key(a), closed_a, intervals.end_key(b), closed_b) for a, closed_a, b, closed_b in pieces)
    also = set()
    if len(keys) == 1 and not keys[0][1] and not keys[0][3]:
        also.add(("tuple", keys[0][0], keys[0][2]))
    if not keys:
        also.add(set_of([]).key)
    return Value(("reals", keys), frozenset(also), reals=pieces)


def read_reals(text: str, depth: int) -> Value | None:
    r"""\infty, \mathbb{R}, unions of intervals, and sets that points are taken from."""
    infinite = re.fullmatch(r"([+-]?) ?\\infty", text)
    if infinite:
        return Value(("infinity", infinite[1] == "-"))
    if text in REALS and text != "R":
        return of_reals(intervals.ALL)
    pieces = split(text, r"(\\cup(?![a-z])|\\setminus(?![a-z])|\\backslash(?![a-z]))")
    if len(pieces) == 1:
        return None
    result = real_set(pieces[0])
    for operator, part in zip(pieces[1::2], pieces[2::2], strict=True):
        other = real_set(part)
        result = (
            intervals.union(result, other) if operator == r"\cup" else intervals.intersection(result, intervals.complement(other))
        )
    return of_reals(result)


def real_set(text: str) -> tuple:
    """The intervals of one part of a union."""
    if text.startswith(r"\{") and text.endswith(r"\}"):
        points = [end(part) for part in split(text[2:-2], "([,;])")[::2]]
        return intervals.union(*(intervals.interval(point, True, point, True) for point in points))
    value = read_one(text, 1)
    if value.reals is None:
        raise NotFormula("no set of real numbers")
    return value.reals


MATRIX = re.compile(r"([(\[])?\s*\\begin\{([pb]matrix|matrix|array|smallmatrix)\}\s*(?:\{[lcr| ]*\})?(.*?)\\end\{\2\}\s*([)\]])?")


def read_matrix(text: str, depth: int) -> Value | None:
    """A matrix, with a factor before it; a column may be read as a tuple."""
    match = re.fullmatch(r"(.*?)(?:\\cdot|\\times)?\s*" + MATRIX.pattern.replace(r"\2", r"\3"), text)
    if match is None:
        return None
    factor = {"": "1", "-": "-1"}.get(match[1].strip(), match[1])
    factor = formula.parse(factor)
    rows = [row.split("&") for row in match[4].strip().removesuffix(r"\\").split(r"\\")]
    if len({len(row) for row in rows}) != 1 or sum(map(len, rows)) > MAX_ELEMENTS:
        raise NotFormula("rows of different lengths")
    keys = [[scalar(("product", (factor, formula.parse(entry)))).key for entry in row] for row in rows]
    column = {("tuple", *(row[0] for row in keys))} if len(keys[0]) == 1 and len(keys) > 1 else set()
    return Value(("matrix", *map(tuple, keys)), frozenset(column))


# ----------------------------------------------------------------------------------------------------------------------
# relations


def named(name: Hashable, value: Value) -> Value:
    """name = value, or name in value: equal to the value alone, and to the same name with the same value."""
    also = {value.key, *value.also, *(("named", name, reading) for reading in value.also)}
    return Value(("named", name, value.key), frozenset(also), name, value, value.reals)


def name_of(text: str) -> Hashable:
    """A name for the left side of x = 5: the value of its formula, or its spelling."""
    try:
        return label(formula.parse(text))
    except NotFormula:
        return re.sub(r"\\text\{([^{}]*)\}|\s", r"\1", text)


def read_relation(sides: list[str], signs: list[str], depth: int) -> Value:
    """Equations, memberships and inequalities."""
    if not all(sides):
        raise NotFormula("a relation with one side")
    if set(signs) == {"="}:
        return read_equation(sides, depth)
    if signs == [r"\in"]:
        return named(
            name_of(sides[0]),
            of_reals(real_set(sides[1])) if "\\{" not in sides[1] else read_one(sides[1], depth + 1),
        )
    if set(signs) <= {"<", ">", r"\le", r"\ge"} or signs == [r"\ne"]:
        return read_inequality([formula.parse(side) if "infty" not in side else side for side in sides], signs)
    raise NotFormula("an unknown relation")


def read_equation(sides: list[str], depth: int) -> Value:
    """a = b, or a chain that begins with what is asked for and ends with its value."""
    left, right = sides[0], sides[-1]
    letters = [letters_in(side) for side in sides]
    if not any(letters) and None not in letters[:-1]:  # 91+9 = 100 means 100
        return read_one(right, depth)
    if letters[0] == set() and letters[-1]:
        left, right = right, left
    names, values = (split(side[1:-1], "(,)")[::2] if side[:1] == "(" else [] for side in (left, right))
    if len(names) > 1 and len(names) == len(values):  # (x, y) = (2, 3)
        pairs = [read_equation([name, value], depth + 1) for name, value in zip(names, values, strict=True)]
        return replace(joined(pairs, set()), also=frozenset([read_brackets(right, depth).key]))
    if any(re.fullmatch(r"\\?[A-Za-z]", side) for side in sides[1:-1]):
        raise NotFormula("a chain of names")
    try:
        left_tree = left_side(left)
    except NotFormula:
        return named(name_of(left), read_one(right, depth))
    try:
        right_tree = formula.parse(right)
        right_values = numeric.values(right_tree)
    except NotFormula:
        value = named(label(left_tree), read_one(right, depth))
        number = spelling.words_behind(right)[0]
        if value.plain.key[0] == "unit":  # AB = 5 cm is AB = 5
            bare = read_equation([left, number], depth)
            value = replace(value, also=value.also | {bare.key})
        return value
    return equation(left_tree, right_tree, right_values)


def equation(left, right, right_values) -> Value:
    """left = right, two formulas; x = 5 and 2x = 10 are named values, and a name may be left out."""
    simple = left[0] in ("symbol", "opaque")
    right_key = numeric.key(right_values)
    if len(right_values) == 1:
        if simple:
            return named(label(left), Value(right_key))
        root = root_of(left, right)
        if root is not None:
            name, value = root
            solved = named(("symbol", name), scalar(("number", value)))
            return (
                replace(solved, also=frozenset([right_key]))
                if is_asked(left, right_values)
                else replace(solved, also=frozenset())
            )
    difference = ("sum", (left, formula.negative(right)))
    also = (
        {right_key} if (simple and right[0] != "symbol") or (len(right_values) == 1 and is_asked(left, right_values)) else set()
    )
    return Value(numeric.equation_key(numeric.values(difference)), frozenset(also))


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


def label(tree) -> Hashable:
    return tree if tree[0] == "symbol" else scalar(tree).key


def left_side(text: str):
    """The tree of the left side of an equation; what stands in the bracket of f(5), P(x) is an argument."""
    if not re.fullmatch(r"[A-Za-z](?:_\{?\w+\}?)?'*\([^()]*\)", text):
        return formula.parse(text)
    function, argument = text[:-1].split("(")
    return ("opaque", function, tuple(formula.parse(part) for part in argument.split(",")))


def letters_in(text: str) -> set | None:
    """Names of the letters in a formula, None if it is none."""
    try:
        return numeric.letters(formula.parse(text.rstrip("%")))
    except NotFormula:
        return None


def is_asked(left, right_values) -> bool:
    """Whether `left = number` names what was asked for, 10p+q = 37, rather than a curve, 2x+z = 5 or x^2+y^2 = 9."""
    if right_values[0] == 0:
        return False
    coordinates = numeric.letters(left) & {"x", "y", "z"}
    return not coordinates or not _has_number(left)


def _has_number(tree) -> bool:
    return (tree[0] == "number" and abs(tree[1]) != 1) or any(map(_has_number, numeric.parts(tree)))


def read_inequality(sides: list, signs: list[str]) -> Value:
    """A chain of inequalities in one letter, linear or the absolute value of such, as a set; another one as it stands."""
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
