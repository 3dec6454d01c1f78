# ruff: noqa: RUF001
r"""Find the answer in a response: the last \boxed{...}, else after "the answer is", else the last formula.

Responses are untrusted text, so each rule takes time linear in their length.
"""

import re
from collections import deque
from itertools import pairwise

LETTERS = "ABCDEFGHIJabcdefghij"  # that name a choice
NEXT_QUESTION = re.compile(
    r"(?i)\n\W{0,9}(?:Question|Problem|Q|Human|User)\s?\d{0,3}\W{0,3}:|\n#{1,6}\s(?:Question|Problem)\b"
)
# Escaped braces are part of the answer and do not nest.
BOX_OR_BRACE = re.compile(
    r"\\(?:f|frame)?box(?:ed)?\s*\{|\\[{}]|[{}]|\\boxed\s*(-?[0-9A-Za-z][0-9A-Za-z.,/]*)(?=[^0-9A-Za-z.,/])"
)
EMPTY_BOX = re.compile(r"(?:\s|\\f?box(?:ed)?|\\text|\\q?quad|\\[,;:! ]|[{}$~])*")
BETWEEN_BOXES = re.compile(
    r"(?s)(?=.*(?:[,;&]|\b(?:and|or|et|und)\b))(?:[\s$*,;&]|\\[()\[\],;:! ]|\\q?quad|(?:and|or|et|und)\b"
    r"|\\text\s*\{[\s,]*(?:and|or)\s*\}|[A-Za-z](?:_\{?\w{1,3}\}?)?\s*=)*"
)
TAGGED = re.compile(r"<answer>((?:(?!<answer>).)*)</answer>", re.DOTALL)
LABEL = r"(?i)^\s*(\\text\w*\s*\{\s*)?(?:the )?(?:final )?ans(?:wer)?\s*(?:is\b:?|[:=.])\s*"  # of a box
NAME = re.compile(r"(?<![A-Za-z\\])([A-Za-z](?:_\{?\w{1,3}\}?)?)\s*=[\s$]*$")

ANSWER_IS = (
    r"(?<!find the )(?<!check the )(?<!verify the )(?<!get the )"
    r"(?:\bans(?:wer)?s?|ответ|antwort|r[ée]ponse|respuesta|risposta|resposta|答案|答え)[\s*_]{0,5}"
    r"(?:to\s[^.:\n]{1,60}?\s|(?!choice|option|format|type|key|(?:is|we|you|they)\b)[^\W\d_]{1,12}\s)?"
    r"(?:[:：=]>?|[-–—]+>?\s|是|为|は|это|(?:is|are|equals?|est|ist|lautet|es|è|é|(?P<be>\w{4,6} be))\b)"
)
STATED = re.compile(ANSWER_IS, re.IGNORECASE)
FILLER = re.compile(
    r"(?i:\n\s*(?:[-•–]+|\d\.)\s+|[\s:：，*~=,≈`>]|\\approx(?![a-z])|(?:therefore|thus|hence|then|simply|just"
    r"|also|given by|equal to|approximately|around|roughly|exactly|now|as follows|donc|somit|daher"
    r"|about|indeed|(?:calculated|computed|expressed|written|found) (?:as|to be))\b)*"
)
# "is an integer", "is not 5", print("The answer is", x)
NOTHING = r"an?\s[a-z]{2}|(?:not|given|rounded|obtained|found|consistent|correct)\b|[\"')]\s*[,)]"
SENTENCE = re.compile(r"\n|[.。](?=\s|$)")
END = re.compile(rf"{SENTENCE.pattern}|\*\*|[,;]?\s(?:because|since|so|which|where|not|as|for)\b")
BEHIND_NUMBER = re.compile(  # a remark after a number, not part of it
    r",\s(?:or\s(?=about|approx|roughly)|(?=(?:[a-z]{2,}|I|QED)\b)(?!(?:and|or|pi|sqrt)\b))|(?<=%)\s\("
    r"|\s\((?=[a-z]{2})(?!mod)|\s[-–—](?=\s[A-Za-z]{2}|$)|[\u3040-\u9fff∎□]|\s(?:is|are|was|were|when|if)\b"
)
WORD = re.compile(r"(?!(?:sqrt|pi|sin|cos|tan|sec|csc|cot|log|ln|exp|arc\w+|infinity)\b)[A-Za-z]{2}")
MATH = re.compile(
    r"(?s)(?<!\\)\$\$(.{1,300}?)\$\$|(?<!\\)\$([^$\n]{1,300}?)\$(?!\d)|\\\((.{1,300}?)\\\)"
    r"|\\\[(.{1,300}?)\\\]|\\begin\{(?:align|equation|gather)[a-z]*\*?\}(.{1,300}?)\\end\{"
)
ATOM = (
    r"√?(?:\d{1,6} \d{1,6}/\d+|\d{1,3}(?:[ ,\u00a0\u202f]\d{3})+(?!\d)(?:\.\d+)?|\d+(?:[.,]\d+)*[½⅓⅔¼¾]?"
    r"|[½⅓⅔¼¾]|\.\d+)(?:[eE][-+−]?\d+)?(?:\^\{[-−]?\d+\}|[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+|√\d+|_\{?\d+\}?|[π%°]|\\%)*"
    r"(?:[A-Za-z]+(?![A-Za-z_])|\s(?:hundred|thousand|million|billion|trillion|dozen)\b)?"
)
SIGN = r"(?:±\s?|[-+−–])?"
ITEM = rf"(?:[a-z]\s?=\s?)?{SIGN}{ATOM}"
PLAIN = re.compile(
    rf"[(\[]\s?{SIGN}(?:{ATOM}|∞)(?:,\s?{SIGN}(?:{ATOM}|∞))+\s?[)\]]"
    rf"|(?<!between )(?<![A-Za-z0-9_.,^\\]){ITEM}(?:,\s{ITEM})*,?\s(?:and|or)\s{ITEM}"
    rf"|(?<![A-Za-z0-9_.,^\\]){SIGN}{ATOM}(?:\s?[-+*/×·÷^=−–±]\s?[-−]?{ATOM}|:{ATOM})*"
)
PIECE_BEFORE = (
    r"[\w)\]}](?:\s[+*/^×·]\s|[+*/^×·])$|[\w)\]}]\s[-−–]\s?$|\\[A-Za-z]*\s?\{?$|[A-Za-z√]\($|[<>≤≥≠]\s?$"
)
PIECE_BEHIND = r"\s?[*/^×·](?=[\w(\\√])|[_^√]|\((?=\w)|\s?\+\s?[\w(]|\s?\\(?:sqrt|frac|pi|cdot|times)"
MINUS = r"(?:[=≈:(]|\b(?:is|are|be|at|to|of|then|gets?|gives?|obtain|equals?))\s*[-−–]\s$|\s−\s$"
DECIMAL_COMMA = r"(?i)[а-яäöüßéèêàñãõ]|\b(?:ist|sind|est|sont|vaut|donc|sono|vale|jest|wynosi|het|und|der)\b"
LAST = r"(?:\W{0,3}\s(?:is|was) (?:the|our|my)[a-z ]{0,12} answer)?[\s.!*]*"
JOINT = re.compile(r"\s?(?:,|and\b|or\b|,\s(?:and|or)\b)\s?")


def extract_answer(text: str, kind: str = "math", truncated: bool = False, letters=LETTERS) -> str | None:
    r"""The answer of a response, or None. Linear in the length of the text.

    In this order: the last complete, non-empty \boxed{...}, together with those before it that are separated
    only by commas, "and" or "or" (a box after a sentence replaces earlier ones); the content of <answer>; the
    text after the last "answer is" or "answer:"; the last number with the whole formula around it, unless the
    response is truncated, where that is an arbitrary one. A line "#### 7" ends the response, and so does
    "Question:". For choices: the letter in the box; "answer is (X)" after the box; without a box and unless
    truncated, the last of the capital `letters` that stands alone. Text after the last </think> takes
    precedence; if it has no answer, the box or the "answer is" of the thought counts.

    >>> extract_answer(r"so \boxed{\frac{1}{2}} it is"), extract_answer(r"$\boxed{2}$ and $\boxed{6}$")
    ('\\frac{1}{2}', '2, 6')
    >>> extract_answer("3 times 4 makes 12"), extract_answer("3 times 4 makes 1", truncated=True)
    ('12', None)
    >>> extract_answer("A hot star, so (B).", kind="choice")
    'B'
    """
    thought, _, conclusion = text.rpartition("</think>")
    another = NEXT_QUESTION.search(conclusion)
    parts = [(conclusion[: another.start()], False)] if another else []
    parts += [(conclusion, truncated), (thought, True)]  # nor is the last number of a thought an answer
    for part, cut in parts:
        found = _choice(part, cut, letters) if kind == "choice" else _answer(part, cut)
        if found is not None:
            return found
    return None


def _answer(text: str, truncated: bool) -> str | None:
    boxes, end_of_empty, unclosed = _boxes(text if truncated else text + "\n")
    if boxes:
        return _joined(text, boxes) or None
    if unclosed is not None and not truncated:
        held = re.split(r"\$|\n|\\[\])]", text[unclosed : unclosed + 100])[0].strip().rstrip(".")
        return held if held and held.count("{") == held.count("}") else None
    text = text[end_of_empty:]  # what follows an instruction such as "put the answer within \boxed{}"
    for line in re.finditer(r"^####[ \t]*(\S[^\n]{0,80})$", text, re.MULTILINE):  # as in GSM8K
        is_heading = re.search(r"(?<![\\A-Za-z{])[^\W\d_]{2}|[.:]$|^\(?\d+\)$", line[1])
        if re.search(r"[\d\\]|\s[-+]\s", line[1]) and not is_heading:
            return line[1].strip()
    tagged = TAGGED.findall(text)
    if tagged:
        answer = _phrase(tagged[-1], False) or _statement(tagged[-1], False)
    else:
        answer = _phrase(text, truncated)
        if answer is None and not truncated:
            answer = _last_formula(text)
    if answer and re.search(DECIMAL_COMMA, text):  # 3,5 is 3.5
        answer = re.sub(r"^([-−–]?\d+),(?=(?:\d{1,2}|\d{4,})(?![\d,]))", r"\1.", answer)
    return answer or None


def _boxes(text: str) -> tuple[list, int, int | None]:
    """Boxes as [(start, content start, content end, end)], the end of the last empty one, an unclosed one."""
    boxes, end_of_empty, open_braces = [], 0, []
    for match in BOX_OR_BRACE.finditer(text):
        token = match.group()
        if match[1]:  # \\boxed 7
            boxes.append((match.start(), *match.span(1), match.end()))
        elif token == "}":
            start, content = open_braces.pop() if open_braces else (-1, 0)
            if start >= 0 and EMPTY_BOX.fullmatch(text[content : min(match.start(), content + 100)]):
                end_of_empty = match.end()
            elif start >= 0 and (not boxes or boxes[-1][0] < start):
                boxes.append((start, content, match.start(), match.end()))
        elif token[-1] == "{" and token != "\\{":
            open_braces.append((match.start() if token != "{" else -1, match.end()))
    return boxes, end_of_empty, next((content for start, content in open_braces[::-1] if start >= 0), None)


def _joined(text: str, boxes: list) -> str:
    r"""The last box with those that belong to it: x = \boxed{2} or x = \boxed{6} is "x=2 or x=6"."""
    first, joints = len(boxes) - 1, []
    for before, after in reversed(list(pairwise(boxes[-64:]))):
        gap = text[before[3] : after[0]]
        if len(gap) > 60 or not BETWEEN_BOXES.fullmatch(gap):
            break
        first -= 1
        joints.insert(0, " or " if re.search(r"\bor\b", gap) else ", ")
    parts = [re.sub(LABEL, lambda m: r"\text{" * bool(m[1]), text[box[1] : box[2]]) for box in boxes[first:]]
    parts = [part.removeprefix(r"\text{}").strip() for part in parts]
    names = [NAME.search(text[max(0, box[0] - 20) : box[0]]) for box in boxes[first:]]
    if all(names) and joints:
        parts = [f"{name[1]}={part}" for name, part in zip(names, parts, strict=True)]
    if len(set(parts)) == 1:
        return parts[0]
    return "".join(part + joint for part, joint in zip(parts, [*joints, ""], strict=True))


def _phrase(text: str, truncated: bool) -> str | None:
    """What follows the last "answer is"; "" if nothing does, None if there is no such phrase or no end."""
    last = None
    for match in reversed(deque(STATED.finditer(text), maxlen=5)):
        statement = _statement(text[match.end() : match.end() + 300], truncated)
        if statement and re.search(r"[\d\\+*/^=]| - ", statement):
            return statement
        if last is None and not match["be"]:  # "the answer should be positive" does not count
            last = statement
    return last


def _statement(text: str, truncated: bool) -> str | None:
    """The formulas, number or words of the first sentence; None if it has no end or no content."""
    text = re.sub(r"</?[a-z]{1,9}\s?/?>", "", text)
    start = FILLER.match(text).end()
    if re.match(r"[A-Z][a-z ]{2,30}:", text[start:]) and "\n" in text[:start]:  # Answer:\nConfidence: 15%
        return ""
    text = text[start:]
    if re.match(NOTHING, text):
        return None
    maths = _maths(text)
    if maths and maths[0][0] == 0 and not re.match(r"\s*(?:[-+*/=<>]|is\b)", text[maths[0][1] :]):
        return maths[0][2]
    if re.match(r"(?:written |expressed )?(?:in|of) the form\b", text):
        return _last_formula(SENTENCE.split(text)[0])
    end = END.search(text)
    if end is None and (truncated or len(text) > 100):
        return None
    text = text[: end.start() if end else None].strip(" \t*:,;`")
    if WORD.match(text) or text.startswith("$"):  # the area is 96
        return _last_formula(text) or text
    text = re.sub(r"(?<=[\d)])[!?]+\W*$", "", BEHIND_NUMBER.split(text)[0]).strip(' $"#')
    return text[:-1] if text.endswith(")") and "(" not in text else text


def _maths(text: str) -> list[tuple]:
    """[(start, end, content)] of the formulas in dollar signs and the like; lists of them are joined."""
    found, at = [], 0
    while match := MATH.search(text, at):
        start, content, at = match.start(), next(filter(None, match.groups())), match.end()
        words = re.search(r"(?<![\\A-Za-z])[a-z]{3}", re.sub(r"\\[A-Za-z]+\s*\{[^{}]*\}", "", content))
        if match[2] and (words or content[0].isspace() != content[-1].isspace()):  # $5 and $3
            at = start + 1
            continue
        gap = text[found[-1][1] : start] if found else ""
        if JOINT.fullmatch(gap):  # join 2 and 3, or x = 2 and x = 3, but not m = 3 and m + n = 7
            start, _, before = found.pop()
            names = [re.match(r"\s*(?:([A-Za-z])(?:_\w)?\s*=|[^=]*$)", side) for side in (before, content)]
            if all(names) and bool(names[0][1]) == bool(names[1][1]):
                content = f"{before}{' or ' if 'or' in gap else ', '}{content}"
        found.append((start, at, content.strip()))
    return found


def _last_formula(text: str) -> str | None:
    """The last number with the formula around it, or the end of an equation chain; None if it is unclear."""
    text, maths = text[-2000:], []
    for start, end, content in _maths(text):
        at_end = re.search(r"[-+*/^=]|\\[a-z]", content) and re.fullmatch(LAST, text[end:])
        is_unit = content[:1] == "^" or (content.startswith(r"\text") and re.search(r"\d\s?$", text[:start]))
        if not is_unit and (at_end or re.search(r"\d|\\(?:pi|infty|sqrt|frac)", content)):
            maths.append((start, content))
            text = text[:start] + "\0" * (end - start) + text[end:]
    last = next(iter(deque(PLAIN.finditer(text), maxlen=1)), None)
    if maths and (last is None or last.start() < maths[-1][0]):
        content = maths[-1][1]
        if re.search(r"&\s*=", content):
            content = re.sub(r"\\(?:begin|end)\{\w+\*?\}(?:\{[lcr]+\})?|\\\\|&", " ", content)
    elif last is None:
        return None
    else:
        before = text[max(0, last.start() - 20) : last.start()]
        minus = re.search(MINUS, before)
        if (re.search(PIECE_BEFORE, before) and not minus) or re.match(PIECE_BEHIND, text[last.end() :]):
            return None
        content = "-" * bool(minus) + last[0]
    sides = re.split(r"(?<![<>!\\])=", content)
    is_chain = len(sides) > 2 or not re.search("[A-Za-z]", sides[0])
    whole = re.search(r", | or | and |,\s*\\|\\begin", content) or not is_chain
    return (content if whole else sides[-1]).strip().rstrip(".,; ") or None


CAPITAL = r"(?<![A-Za-z\\])(?<!Let )[A-J](?![A-Za-z0-9_^']|-\w|\s?[=<>→]|(?<=I)(?:,|\s(?:and|or|only)\b))"
LETTER = rf"(?P<letter>{CAPITAL})"
OR_ANOTHER = r"[)}\]*$.]{0,4}(?:\s{0,3}(?:,\s{0,3})?(?:(?i:or|and)|&|/)|,)[\s({\[*$]{0,5}[A-J](?![A-Za-z])"
CHOICE_IS = re.compile(
    rf"(?i:(?:{ANSWER_IS}|(?:option|choice)\**\s{{0,9}}(?:is|:)|(?:choose|select|pick)\s)[\s:*]{{0,9}}"
    r"(?:(?:the\s)?(?:option|choice)\s?|\\(?:text|boxed|math)[a-z]{0,4})?)"
    rf"[\s*$({{\[]{{0,9}}(?P<letter>{CAPITAL}|(?<=\()[a-j](?=\)))"
    rf"(?P<another>{OR_ANOTHER}(?![)\]}}*]{{0,2}}\s(?:is|are|can|do|does|has|have|would|was|were)\b))?"
)
OPTION = re.compile(rf"(?i:option|choice)\s[(*$]{{0,3}}{LETTER}")
IS_CORRECT = re.compile(rf"{LETTER}[)}}\]*$]{{0,4}}\sis\s(?:the\s)?(?i:correct|right|best|answer)")
# "A planet ..." starts with an article, "I think" with a pronoun, "A is correct" with a choice.
ALONE = re.compile(
    rf"{LETTER}(?!(?<=[AI])\s+(?!is\b|and\b|or\b|because\b|since\b)[a-z])(?P<another>{OR_ANOTHER})?"
)
BOXED_LETTER = re.compile(
    r"[\s{(\[*$]*(?i:(?:the\s+)?(?:correct\s+|final\s+)?(?:answer|option|choice)\s*(?:is\b|:)?[\s:]*){0,2}"
    r"[\s{}(\[*$\"'_]*([A-Ja-j])(?=\s*(?:[.,):;}\]*$\"'_]|$|(?i:or|and)\b|[-–—]\s)|\s+(?:\{?\s*\(|\d|is\b))"
)
NOT_A_CHOICE = re.compile(rf"[\s}})]*[_^=]|{OR_ANOTHER}|[)}}\]\s,]+[({{\[]*[A-J][)}}\]\s]*$")


def _choice(text: str, truncated: bool, letters: str) -> str | None:
    boxes, _, _ = _boxes(text)
    tagged = [] if boxes else TAGGED.findall(text)
    letter = boxed_letter(_joined(text, boxes) if boxes else "".join(tagged[-1:]), letters)
    if letter or tagged:
        return letter
    tries = [(CHOICE_IS, text), *([] if truncated else [(IS_CORRECT, text), (ALONE, text)])]
    if boxes:  # with a value in the box, the letter is named after it, or else before
        behind = text[boxes[-1][2] :]
        tries = [(CHOICE_IS, behind), (OPTION, behind), (CHOICE_IS, text)]
    for pattern, where in tries:
        matches = pattern.finditer(where)
        for last in deque((match for match in matches if match["letter"] in letters), maxlen=1):
            another = (last.groupdict().get("another") or " ")[-1] in letters
            return None if another else last["letter"].upper()
    return None


def boxed_letter(answer: str, letters: str = LETTERS) -> str | None:
    r"""The choice that a boxed text names: "B", "(b)", "\text{B}", "B. The Sun"; not "A or B", "D_{3h}"."""
    answer = re.sub(r"\\(?:text)?color\s*\{\w+\}|\\[A-Za-z]+|\\.", " ", answer[:1000])
    match = BOXED_LETTER.match(answer)
    is_choice = match and match[1] in letters and not NOT_A_CHOICE.match(answer, match.end())
    return match[1].upper() if is_choice else None
