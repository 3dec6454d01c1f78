r"""Parse an answer to a value: read(r"x = \pm 2") is the value of "x=2, x=-2".

An answer is split from the outside in: first at commas, "and" and "or", then into relations, brackets and
formulas.
"""

import itertools
import re
from collections.abc import Hashable
from dataclasses import replace
from fractions import Fraction

from grading import formula, numeric, spelling, values, words
from grading.formula import NotFormula
from grading.spelling import inside, signs, split, without_label
from grading.values import NONE, Value, interval, named, of_reals, scalar, set_of, tuple_key

MAX_LENGTH = 300  # characters of an answer
MAX_DEPTH, MAX_ELEMENTS = 6, 64  # for lists and matrices


def read(answer: str) -> Value:
    r"""The value of an answer; anything that is not a formula is text. Never raises.

    >>> read("5 1/2").equals(read(r"\frac{11}{2}")), read("(1,2)").equals(read("(2,1)"))
    (True, False)
    """
    if len(answer) > MAX_LENGTH:
        return Value(("text", " ".join(answer.split())))
    text = spelling.clean(answer)
    try:
        return read_list(text, 0)
    except Exception:  # only NotFormula is expected, but no answer may end a run
        return Value(("text", spelling.plain_text(text)))


def read_list(text: str, depth: int, bare: bool = True) -> Value:
    r"""Elements separated by commas, "and" or "or"; a single one is itself. `bare`: not in a set's braces."""
    if depth > MAX_DEPTH:
        raise NotFormula("nested too deep")
    compound = words.read_compound(text)
    if compound is not None:
        return compound
    text, label = without_label(text) if bare else (text, None)
    if label:
        text = re.sub(r"(?<=[^\s,;])\s*[,;]?\s*(?=\([b-e]\) )", ", ", text)  # (a) 2 (b) 7
    pieces = split(text, r"([,;]\s*(?:\b(?:and|or)\b)?|\b(?:and|or)\b|\\(?:lor|land|vee|wedge)(?![a-z]))")
    parts, joints = [part for part in pieces[::2]], {joint.strip(" ,;") for joint in pieces[1::2]}
    if len(parts) > MAX_ELEMENTS or (len(parts) > 1 and not all(parts)):
        raise NotFormula("a list with a gap")
    if label and len(parts) > 1 and all(without_label(part)[1] for part in parts[1:]):  # (a) 2, (b) 7
        labelled = [(text, label) for text, label in [(parts[0], label), *map(without_label, parts[1:])]]
        return system([named(("symbol", label), read_one(text, depth)) for text, label in labelled])
    expanded = [signs(part) for part in parts]
    elements = [read_one(part, depth) for part in itertools.chain(*expanded)]
    if len(elements) == 1 and bare:
        return elements[0]
    if joints and joints <= OR and all(element.equals(elements[0]) for element in elements):  # 1/2 or 0.5
        return elements[0]
    value = joined(elements, joints)
    if value.key[0] == "set" and bare and len(elements) == len(parts):
        also = {tuple_key(elements), ("in order", tuple_key(elements))}
        if re.fullmatch(r"-?\d{1,3}(?:, \d{3})+(?:\.\d+)?", text):  # 58, 500 may be 58,500
            also.add(read_one(text.replace(", ", ""), depth).key)
        value = replace(value, also=value.also | also)
    return value


OR, AND = {"or", r"\lor", r"\vee"}, {"and", r"\land", r"\wedge"}


def joined(elements: list[Value], joints: set) -> Value:
    """The value of several elements: reals joined by "or" or "and", values of a name, a system or a set."""
    name = elements[0].name
    if name is not None and all(e.name is None and e.key[0] in ("value", "tuple") for e in elements[1:]):
        elements = [elements[0], *(named(name, element) for element in elements[1:])]  # x = 2 or -2
    same_name = all(element.name == name for element in elements)
    if same_name and all(e.reals is not None and (name or e.key[0] == "reals") for e in elements):
        pieces = [element.reals for element in elements]
        both = values.intersection(*pieces)
        said = joints - {""}
        is_both = said <= AND and (said or both != NONE)  # 1 < x < 9, x \ne 5
        if joints and (name or (said and (said <= OR or said <= AND))):
            reals = of_reals(both if is_both else values.union(*pieces))
            return named(name, reals) if name else reals
    if same_name and name is not None and len({e.plain.key for e in elements}) == len(elements):
        return named(name, set_of([element.plain for element in elements]))
    if any(element.key[0] in ("named", "equation", "inequality") for element in elements):
        return system(elements)
    return set_of(elements)


def system(elements: list[Value]) -> Value:
    """Simultaneous equations or inequalities; x=2, y=3 may be read as (2, 3), x_1=2, x_2=3 as a set."""
    key = ("system", frozenset(element.key for element in elements))
    if not all(e.plain and e.plain.key[0] == "value" and e.name[0] == "symbol" for e in elements):
        return Value(key)
    plain = [element.plain for element in sorted(elements, key=lambda element: element.name)]
    same_letter = len({element.name[1].split("_")[0] for element in elements}) == 1
    also = {tuple_key(plain), *([set_of(plain).key] if same_letter else [])}
    return Value(key, frozenset(also), second=("in order", tuple_key(plain)))


RELATION = r"(\\(?:le|ge|ne|in|approx|equiv|sim|to|mid|propto|cong|perp|subset\w*)(?![a-z])|[=<>])"
REALS = re.compile(r"\\mathbb\{R\}|(?:\\text\{)?(?:the set of )?all reals?(?: numbers?| values?)?(?: x)?\}?")


def read_one(text: str, depth: int) -> Value:
    """The value of one element of a list. Raises NotFormula."""
    text = text.strip()
    while (content := inside(text, "{", "}")) is not None:
        text = content
        if split(text, "([,;])")[1:]:
            return read_list(text, depth + 1)
    sides = split(text, RELATION)
    if len(sides) > 1:
        return read_relation(sides[::2], sides[1::2], depth)
    for rule in read_reals, words.read_words, read_brackets, read_matrix, read_vector, words.read_number:
        value = rule(text, depth)
        if value is not None:
            return value
    return scalar(words.number_tree(text))


def read_brackets(text: str, depth: int) -> Value | None:
    """(1, 2), [1, 2) and {1, 2}; None for brackets inside a formula such as (a+1)(b+2) or (3)."""
    if text == r"\emptyset":
        return set_of([])
    braces, angles = inside(text, r"\{", r"\}"), inside(text, r"\langle", r"\rangle")
    if braces is not None:
        builder = split(braces, r"(\\mid(?![a-z])|:|\|)")
        if len(builder) == 3:
            condition = read_list(builder[2], depth + 1)
            return condition.plain if condition.plain is not None else Value(("builder", condition.key))
        return read_list(braces, depth + 1, bare=False) if braces else set_of([])
    opens, closes = text[:1], text[-1:]
    brackets = opens in ("(", "[") and closes in (")", "]")
    content = angles or (inside(text, opens, closes) if brackets else None)
    parts = split(content or "", "([,;])")[::2]
    if len(parts) < 2:
        return None
    rows = [split(part[1:-1], "(,)")[::2] for part in parts if re.fullmatch(r"\[.*\]", part)]
    if opens == "[" and len(rows) == len(parts):  # [[1, 2], [3, 4]]
        lines = r"\\".join(" & ".join(row) for row in rows)
        return read_matrix(rf"\begin{{pmatrix}}{lines}\end{{pmatrix}}", depth)
    pair = len(parts) == 2 and not angles
    try:
        reals = interval(end(parts[0]), opens == "[", end(parts[1]), closes == "]") if pair else None
    except NotFormula:
        reals = None
    if pair and (opens == "[" or closes == "]" or r"\infty" in content):
        if reals is not None:
            return of_reals(reals)
        return Value(("interval", opens, closes, *(read_one(part, 1).key for part in parts)))
    return Value(tuple_key([read_one(part, depth + 1) for part in parts]), reals=reals)


def end(text: str):
    r"""The end of an interval: a Fraction, an mpf or \infty."""
    if re.fullmatch(r"[+-]? ?\\infty", text.strip()):
        return -values.INFINITY if "-" in text else values.INFINITY
    tree = formula.parse(text)
    number = numeric.values(tree)[0]
    if numeric.letters(tree) or isinstance(number, numeric.MP.mpc):
        raise NotFormula("no real number")
    return number


def read_reals(text: str, depth: int) -> Value | None:
    r"""\infty, \mathbb{R}, unions and intersections of intervals, and sets without some points."""
    if re.fullmatch(r"[+-]? ?\\infty", text):
        return Value(("infinity", text[0] == "-"))
    if REALS.fullmatch(text.casefold().replace("{r}", "{R}")):
        return of_reals(values.ALL)
    pieces = split(text, r"(\\(?:cup|cap|setminus|backslash)(?![a-z]))")
    if len(pieces) == 1:
        return None
    result = real_set(pieces[0])
    for operator, part in zip(pieces[1::2], pieces[2::2], strict=True):
        points, held = real_set(part)
        if operator == r"\cup":
            result = values.union(result, (points, held))
        else:
            other = held if operator == r"\cap" else tuple(not inside for inside in held)
            result = values.intersection(result, (points, other))
    return of_reals(result)


def real_set(text: str) -> tuple:
    """The intervals of one part of a union."""
    if text.startswith(r"\{") and text.endswith(r"\}"):
        points = [end(part) for part in split(text[2:-2], "([,;])")[::2]]
        return values.union(*(interval(point, True, point, True) for point in points))
    value = read_one(text, 1)
    if value.reals is None:
        raise NotFormula("no set of real numbers")
    return value.reals


MATRIX = re.compile(  # factor, environment, entries
    r"(.*?)(?:\\cdot|\\times)?\s*[(\[]?\s*\\begin\{([pb]?matrix|array|smallmatrix)\}\s*(?:\{[lcr| ]*\})?"
    r"(.*?)\\end\{\2\}\s*[)\]]?"
)


def read_matrix(text: str, depth: int) -> Value | None:
    """A matrix, with an optional factor; a column may be read as a tuple."""
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


def read_vector(text: str, depth: int) -> Value | None:
    r"""2\hat{i} - 5\hat{j} is (2, -5); \hat, \vec or \mathbf marks a vector, not the imaginary unit."""
    axes = [rf"\hat {axis}" for axis in ("ijk" if r"\hat k" in text else "ij")]
    found = [axis for axis in axes if axis in text]
    if not found:
        return None
    tree = formula.parse(text)
    letter = [scalar(formula.parse(text.replace(r"\hat ", ""))).key] if len(found) == 1 else []
    units = [{axis: ("number", Fraction(axis == one)) for axis in axes} for one in axes]
    return Value(tuple_key([scalar(formula.substitute(tree, unit)) for unit in units]), frozenset(letter))


def read_relation(sides: list[str], signs: list[str], depth: int) -> Value:
    """Equations, memberships and inequalities."""
    if not all(sides):
        raise NotFormula("a relation with one side")
    if signs[-1] == r"\approx":  # 2\sqrt{2} \approx 2.83 is either
        if not letters_in(sides[0]) and len(sides) == 2:
            exact, rounded = (read_one(side, depth) for side in sides)
            return replace(exact, also=exact.also | {rounded.key})
        signs = [*signs[:-1], "="]
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
    """a = b, or a chain that starts with the quantity asked for and ends with its value."""
    left, right = sides[0], sides[-1]
    letters = [letters_in(side) for side in sides]
    if not any(letters) and None not in letters[:-1]:  # 91+9 = 100 means 100
        return read_one(right, depth)
    if letters[0] == set() and letters[-1]:
        left, right = right, left
    names, entries = (split(side[1:-1], "(,)")[::2] if side[:1] == "(" else [] for side in (left, right))
    if len(names) > 1 and len(names) == len(entries):  # (x, y) = (2, 3)
        pairs = [read_equation([name, value], depth + 1) for name, value in zip(names, entries, strict=True)]
        plain = read_brackets(right, depth)
        return replace(system(pairs), also=frozenset([plain.key]), name=("names", *names), plain=plain)
    if any(re.fullmatch(r"\\?[A-Za-z]", side) for side in sides[1:-1]):
        raise NotFormula("a chain of names")
    try:
        left_tree = left_side(left)
    except NotFormula:
        return named(name_of(left), read_one(right, depth))
    arguments = [part[1] for part in left_tree[2] if part[0] == "symbol"] if left_tree[0] == "opaque" else []
    in_right = letters_in(right)
    if in_right and in_right & set(arguments):  # f(t) = 3t-1 is f(x) = 3x-1
        tree = formula.parse(right)
        numbered = {name: ("symbol", str(number)) for number, name in enumerate(arguments)}
        key = ("function", left_tree[1], scalar(formula.substitute(tree, numbered)).key)
        return Value(key, frozenset([scalar(tree).key]))
    if in_right is not None and not right.endswith("%"):
        return values.equation(left_tree, formula.parse(right))
    value = named(values.label(left_tree), read_one(right, depth))
    if value.plain.key[0] == "unit":  # AB = 5 cm is AB = 5
        bare = read_equation([left, words.words_behind(right)[0]], depth)
        value = replace(value, also=value.also | {bare.key})
    return value


def left_side(text: str):
    """The tree of the left side of an equation, where f(5) and P(x) are functions of an argument."""
    match = re.fullmatch(r"([A-Za-z](?:_\{?\w+\}?)?'*(?:\^\{-1\})?)(\(.*\))", text)
    if match is None or inside(match[2], "(", ")") is None:
        return formula.parse(text)
    arguments = split(match[2][1:-1], "(,)")[::2]
    return ("opaque", match[1], tuple(formula.parse(argument) for argument in arguments))


def letters_in(text: str) -> set | None:
    """Names of the letters in a formula; None if the text is not a formula."""
    try:
        return numeric.letters(formula.parse(text.rstrip("%")))
    except NotFormula:
        return None


def name_of(text: str) -> Hashable:
    """A name for the left side of an equation: the value of its formula, or its spelling."""
    try:
        return values.label(formula.parse(text))
    except NotFormula:
        return re.sub(r"\\text\{([^{}]*)\}|\s", r"\1", text)
