r"""The answer in a response: the last \boxed{...}, else what follows "the answer is", else the last number.

A response is hostile text until proven otherwise: every rule is linear in its length.
"""

import re

# Escaped braces belong to the answer, not the nesting.
BOX_OR_BRACE = re.compile(r"\\f?box(?:ed)?\s*\{|\\[{}]|[{}]")
BARE_BOX = re.compile(r"\\boxed\s*(-?[0-9A-Za-z][0-9A-Za-z.,/]*)(?=[^0-9A-Za-z.,/])")
EMPTY_BOX = re.compile(r"(?:\s|\\f?box(?:ed)?|\\text|\\q?quad|\\[,;:! ]|[{}$~])*")
ANSWER_IS = re.compile(
    r"answer\**\s*(?:is\b|:)[\s:*]*(?:(?:therefore|thus|hence|then|simply|just|equal to)\b[\s:,]*)?",
    re.IGNORECASE,
)
LABEL = re.compile(
    r"\s*(\\(?:text|mathrm)(?:bf)?\s*\{\s*)?(?:the )?(?:final )?ans(?:wer)?\s*(?:is\b:?|[:=.])\s*",
    re.IGNORECASE,
)
NUMBER = re.compile(r"(?<![\w.])-?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?:\.\d+|(?<=\d))(?:/\d+)?\\?%?")
LETTER = r"(?<![A-Za-z\\])([A-D])(?![A-Za-z0-9_^'])"
OR_ANOTHER = r"[)}\]*$.]{0,4}(?:\s{0,3}(?:,\s{0,3})?(?:(?i:or|and)|&|/)|,)[\s({\[*$]{0,5}[A-D](?![A-Za-z])"
CHOICE_IS = re.compile(
    r"(?i:(?:(?:answer|option|choice)\**\s{0,9}(?:is|:)|(?:choose|select|pick)\s)[\s:*]{0,9}"
    r"(?:(?:the\s)?(?:option|choice)\s?|\\(?:text|boxed|math)[a-z]{0,4})?)"
    rf"[\s*$({{\[]{{0,9}}{LETTER}(?P<another>{OR_ANOTHER}(?!\s(?:is|are|can|do|does|has|have)\b))?"
)
IS_CORRECT = re.compile(LETTER + r"[)}\]*$]{0,4}\s{1,3}is\s{1,3}(?:the\s)?(?i:correct|right|best|answer)")
# "A planet ..." begins with the article; "A is correct" with a choice.
LAST_LETTER = re.compile(LETTER + r"(?!(?<=A)\s+(?!is\b|and\b|or\b|because\b|since\b)[a-z])")
BOXED_LETTER = re.compile(
    r"[\s{(\[*$]*(?i:(?:the\s+)?(?:correct\s+|final\s+)?(?:answer|option|choice)\s*(?:is\b|:)?[\s:]*){0,2}"
    r"[\s{(\[*$]*([A-D])(?=\s*(?:[.,):;}\]*$]|$|(?i:or|and)\b)|\s+\{?\s*\()"
)
NOT_A_CHOICE = re.compile(rf"[\s}})]*[_^=]|{OR_ANOTHER}|[)}}\]\s,]+[({{\[]*[A-D][)}}\]\s]*$")


def extract_answer(text: str, kind: str = "math", truncated: bool = False) -> str | None:
    r"""The answer that a response gives, or None. Linear in the length of the text.

    The last complete \boxed{...} that is not empty (if all are empty there is no answer); else what follows
    the last "answer is" or "answer:"; else the last number, but not in a truncated response, where it is
    whatever was being written. Choices: the letter in the box; else "answer is (X)" after the box; else,
    without a box and unless truncated, the last capital A to D that stands alone. What follows the last
    </think> counts first; if it holds no answer, the box or the "answer is" of the thought does.

    >>> extract_answer(r"so \boxed{\frac{1}{2}} it is")
    '\\frac{1}{2}'
    >>> extract_answer("3 times 4 makes 12"), extract_answer("3 times 4 makes 1", truncated=True)
    ('12', None)
    >>> extract_answer("A hot star, so (B).", kind="choice")
    'B'
    """
    find = _choice if kind == "choice" else _answer
    thought, end_of_thought, conclusion = text.rpartition("</think>")
    found = find(conclusion, truncated)
    if found is None and end_of_thought:
        found = find(thought, True)  # its last number or letter is no answer either
    return found


def _answer(text: str, truncated: bool) -> str | None:
    box = _last_box(text)
    if box is not None:
        return _without_label(text[slice(*box)].strip()) or None
    answer = _phrase(text, truncated)
    if answer or truncated:
        return answer
    number = _last(NUMBER, text)
    return number.group() if number else None


def _choice(text: str, truncated: bool) -> str | None:
    box = _last_box(text)
    found = boxed_letter(_without_label(text[slice(*box)])) if box else None
    if found:
        return found
    phrase = _last(CHOICE_IS, text, box[1] if box else 0)
    if phrase:
        return None if phrase["another"] else phrase[1]
    if truncated or (box and box[0] < box[1]):
        return None
    letter = _last(IS_CORRECT, text) or _last(LAST_LETTER, text)
    return letter[1] if letter else None


def _last(pattern: re.Pattern, text: str, start: int = 0) -> re.Match | None:
    last = None
    for match in pattern.finditer(text, start):
        last = match
    return last


def _last_box(text: str) -> tuple[int, int] | None:
    r"""(start, end) of what stands in the last complete box that is not empty.

    If all boxes are empty, an empty span; None without a box. One pass, however deep the nesting.
    """
    last_start, answer, open_braces = -1, None, []
    for match in BOX_OR_BRACE.finditer(text):
        token = match.group()
        if token == "}":
            start, content_start = open_braces.pop() if open_braces else (-1, 0)
            if start > last_start:
                content = text[content_start : min(match.start(), content_start + 100)]
                if not EMPTY_BOX.fullmatch(content):
                    last_start, answer = start, (content_start, match.start())
                answer = answer or (match.start(), match.start())
        elif token[-1] == "{" and token != "\\{":
            open_braces.append((match.start() if token != "{" else -1, match.end()))
    for match in BARE_BOX.finditer(text, last_start + 1):
        answer = match.span(1)
    return answer


def _without_label(answer: str) -> str:
    r"""\text{Answer: }8 is 8."""
    label = LABEL.match(answer)
    if label is None:
        return answer
    rest = answer[label.end() :].strip()
    return (rest[1:] if rest.startswith("}") else rf"\text{{{rest}").strip() if label[1] else rest


def _phrase(text: str, truncated: bool) -> str | None:
    """What follows the last "answer is": a formula in dollars, a number, or the rest of the sentence."""
    match = _last(ANSWER_IS, text)
    if match is None:
        return None
    sentence = text[match.end() : match.end() + 300].strip("*").lstrip()
    formula = re.match(r"\$\$?([^$]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", sentence, re.DOTALL)
    if formula:
        return next(group for group in formula.groups() if group).strip() or None
    end = re.search(r"\n|\.(?=\s|$)|\*\*|\s(?:because|since|so|which|where|not)\b", sentence)
    if end is None and (truncated or len(sentence) > 100):
        return None
    sentence = sentence[: end.start() if end else None]
    formulas = re.findall(r"\$([^$]+)\$|\\\((.+?)\\\)", sentence)
    if len(formulas) == 1:  # Answer: the area is $\frac{5}{6}$
        return "".join(formulas[0]).strip()
    sentence = sentence.strip(" \t*$:,;")
    words_follow = re.fullmatch(rf"({NUMBER.pattern})[,;]?\s+[A-Za-z][A-Za-z ,']*", sentence)
    return (words_follow.group(1) if words_follow else sentence) or None


def boxed_letter(answer: str) -> str | None:
    r"""The choice that a boxed text names: "B", "(B)", "\text{B}", "B. The Sun"; not "A or B", "D_{3h}"."""
    answer = re.sub(r"\\[A-Za-z]+|\\.", " ", answer[:1000])
    match = BOXED_LETTER.match(answer)
    if match is None or NOT_A_CHOICE.match(answer, match.end()):
        return None
    return match[1]
