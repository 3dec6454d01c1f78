r"""One answer, one value: read(r"x = \pm 2") is the value of "x=2, x=-2".

An answer is a number, a formula, words, a tuple, a set, an interval or a union of them, a matrix, an
equation or a system. It is taken apart from the outside: first commas, "and" and "or", then relations,
brackets, formulas.
"""

import itertools
import re
from collections.abc import Hashable
from dataclasses import replace

from support import formula, intervals, numeric, spelling, values, words
from support.formula import NotFormula
from support.values import Value, named, of_reals, scalar, set_of, tuple_key

MAX_LENGTH = 300  # characters of an answer
MAX_DEPTH, MAX_ELEMENTS = 6, 64  # of lists and matrices


def read(answer: str) -> Value:
    r"""The value of an answer; what is no formula is text. Raises nothing.

    >>> read("5 1/2").equals(read(r"\frac{11}{2}")), read("(1,2)").equals(read("(2,1)"))
    (True, False)
    """
    if len(answer) > MAX_LENGTH:
        return Value(("text", " ".join(answer.split())))
    text = spelling.clean(answer)
    try:
        return read_list(text, 0)
    except Exception:  # NotFormula, and nothing else that is known; but no answer may end a run
        return Value(("text", spelling.plain_text(text)))


# ----------------------------------------------------------------------------------------------------------
# lists, sets and systems

BRACKET = re.compile(r"\\\\|\\begin\{|\\end\{|\\langle(?![a-z])|\\rangle(?![a-z])|\\[{}]|[()\[\]{}]")


def split(text: str, separator: str) -> list[str]:
    """The parts of a text between separators outside of all brackets; the pattern's one group is kept."""
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


OR, AND = {"or", r"\lor", r"\vee"}, {"and", r"\land", r"\wedge"}
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
    """The value of several elements: reals joined by "or" or "and", values of one name, a system, a set."""
    name = elements[0].name
    if name is not None and all(e.name is None and e.key[0] == "value" for e in elements[1:]):
        elements = [elements[0], *(named(name, element) for element in elements[1:])]  # x = 2 or -2
    same_name = all(element.name == name for element in elements)
    if same_name and all(e.reals is not None and (name or e.key[0] == "reals") for e in elements):
        for words_between, join in (OR, intervals.union), (AND, intervals.intersection):
            if joints and joints <= words_between:
                reals = of_reals(join(*(element.reals for element in elements)))
                return named(name, reals) if name else reals
    if same_name and name is not None and len({e.plain.key for e in elements}) == len(elements):
        return named(name, set_of([element.plain for element in elements]))
    if any(element.key[0] in ("named", "equation", "inequality") for element in elements):
        return system(elements)
    return set_of(elements)


def system(elements: list[Value]) -> Value:
    """Equations or inequalities that hold together; x=2, y=3 may be read as (2, 3)."""
    names = [e.name for e in elements if e.plain and e.plain.key[0] == "value" and e.name[0] == "symbol"]
    in_order = len(names) == len(elements) and names == sorted(set(names))
    also = [tuple_key([element.plain for element in elements])] if in_order else []
    return Value(("system", frozenset(element.key for element in elements)), frozenset(also))


# ----------------------------------------------------------------------------------------------------------
# one element

RELATION = r"(\\(?:le|ge|ne|in|approx|equiv|sim|to|mid|propto|cong|perp|subset\w*)(?![a-z])|[=<>])"
REALS = {r"\mathbb{R}", r"\text{all real numbers}", "all real numbers", r"\text{all reals}"}


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
    for rule in words.read_words, read_reals, read_brackets, read_matrix, words.read_number:
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


# ----------------------------------------------------------------------------------------------------------
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


def read_reals(text: str, depth: int) -> Value | None:
    r"""\infty, \mathbb{R}, unions of intervals, and sets that points are taken from."""
    infinite = re.fullmatch(r"([+-]?) ?\\infty", text)
    if infinite:
        return Value(("infinity", infinite[1] == "-"))
    if text in REALS:
        return of_reals(intervals.ALL)
    pieces = split(text, r"(\\(?:cup|cap|setminus|backslash)(?![a-z]))")
    if len(pieces) == 1:
        return None
    result = real_set(pieces[0])
    for operator, part in zip(pieces[1::2], pieces[2::2], strict=True):
        if operator == r"\cup":
            result = intervals.union(result, real_set(part))
        elif operator == r"\cap":
            result = intervals.intersection(result, real_set(part))
        else:
            result = intervals.intersection(result, intervals.complement(real_set(part)))
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


MATRIX = re.compile(  # factor, environment, entries
    r"(.*?)(?:\\cdot|\\times)?\s*[(\[]?\s*\\begin\{([pb]?matrix|array|smallmatrix)\}\s*(?:\{[lcr| ]*\})?"
    r"(.*?)\\end\{\2\}\s*[)\]]?"
)


def read_matrix(text: str, depth: int) -> Value | None:
    """A matrix, with a factor before it; a column may be read as a tuple."""
    match = MATRIX.fullmatch(text)
    if match is None:
        return None
    factor = formula.parse({"": "1", "-": "-1"}.get(match[1].strip(), match[1]))
    rows = [row.split("&") for row in match[3].strip().removesuffix(r"\\").split(r"\\")]
    if len({len(row) for row in rows}) != 1 or sum(map(len, rows)) > MAX_ELEMENTS:
        raise NotFormula("rows of different lengths")
    keys = [[scalar(("product", (factor, formula.parse(entry)))).key for entry in row] for row in rows]
    column = {("tuple", *(row[0] for row in keys))} if len(keys[0]) == 1 and len(keys) > 1 else set()
    return Value(("matrix", *map(tuple, keys)), frozenset(column))


# ----------------------------------------------------------------------------------------------------------
# relations


def read_relation(sides: list[str], signs: list[str], depth: int) -> Value:
    """Equations, memberships and inequalities."""
    if not all(sides):
        raise NotFormula("a relation with one side")
    if set(signs) == {"="}:
        return read_equation(sides, depth)
    if signs == [r"\in"]:
        points = r"\{" in sides[1]
        members = read_one(sides[1], depth + 1) if points else of_reals(real_set(sides[1]))
        return named(name_of(sides[0]), members)
    if set(signs) <= {"<", ">", r"\le", r"\ge"} or signs == [r"\ne"]:
        trees = [side if "infty" in side else formula.parse(side) for side in sides]
        return values.inequality(trees, signs)
    raise NotFormula("an unknown relation")


def read_equation(sides: list[str], depth: int) -> Value:
    """a = b, or a chain that begins with what is asked for and ends with its value."""
    left, right = sides[0], sides[-1]
    letters = [letters_in(side) for side in sides]
    if not any(letters) and None not in letters[:-1]:  # 91+9 = 100 means 100
        return read_one(right, depth)
    if letters[0] == set() and letters[-1]:
        left, right = right, left
    names, entries = (split(side[1:-1], "(,)")[::2] if side[:1] == "(" else [] for side in (left, right))
    if len(names) > 1 and len(names) == len(entries):  # (x, y) = (2, 3)
        pairs = [read_equation([name, value], depth + 1) for name, value in zip(names, entries, strict=True)]
        return replace(joined(pairs, set()), also=frozenset([read_brackets(right, depth).key]))
    if any(re.fullmatch(r"\\?[A-Za-z]", side) for side in sides[1:-1]):
        raise NotFormula("a chain of names")
    try:
        left_tree = left_side(left)
    except NotFormula:
        return named(name_of(left), read_one(right, depth))
    if letters_in(right) is not None and not right.endswith("%"):
        return values.equation(left_tree, formula.parse(right))
    value = named(values.label(left_tree), read_one(right, depth))
    if value.plain.key[0] == "unit":  # AB = 5 cm is AB = 5
        bare = read_equation([left, words.words_behind(right)[0]], depth)
        value = replace(value, also=value.also | {bare.key})
    return value


def left_side(text: str):
    """The tree of the left side of an equation; what stands in the bracket of f(5), P(x) is an argument."""
    match = re.fullmatch(r"([A-Za-z](?:_\{?\w+\}?)?'*(?:\^\{-1\})?)(\(.*\))", text)
    if match is None or not _closes(match[2], ")"):
        return formula.parse(text)
    arguments = split(match[2][1:-1], "(,)")[::2]
    return ("opaque", match[1], tuple(formula.parse(argument) for argument in arguments))


def letters_in(text: str) -> set | None:
    """Names of the letters in a formula, None if it is none."""
    try:
        return numeric.letters(formula.parse(text.rstrip("%")))
    except NotFormula:
        return None


def name_of(text: str) -> Hashable:
    """A name for the left side of x = 5: the value of its formula, or its spelling."""
    try:
        return values.label(formula.parse(text))
    except NotFormula:
        return re.sub(r"\\text\{([^{}]*)\}|\s", r"\1", text)
