r"""How answers are graded: extract_answer finds one, same_answer compares two by value, classes groups many.

Each answer is read once into a value (reading.py). No text is evaluated as code, and what could take long is
refused by rules that do not depend on time: a refused answer equals only the same spelling.
"""

import signal
import threading
import time
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache

from grading import extraction, reading
from grading.extraction import LETTERS, boxed_letter
from grading.values import Value

TIME_LIMIT = 5.0  # seconds for reading one answer
grading_timeouts = 0  # answers that ran into the limit, which the rules of size should make impossible


def extract_answer(text: str, kind: str = "math", truncated: bool = False, letters=LETTERS) -> str | None:
    """The answer that a response gives, or None: see extraction.py."""
    return _within_time_limit(lambda: extraction.extract_answer(text, kind, truncated, letters), None)


def same_answer(a: str, b: str, kind: str = "math") -> bool:
    r"""Whether two answers are mathematically equal: exactly, so 0.333 is not 1/3. Symmetric; raises nothing.

    A percent equals both of its readings (50% is 50 and 0.5), so equality is not transitive. A unit or a
    name may be left out ("x = 5" equals "5"), but not exchanged ("x = 5" is not "y = 5"). A list is a set:
    "1, 2" equals "2, 1". Words are compared without case.

    >>> same_answer(r"\frac{1}{2}", "0.50"), same_answer(r"\sqrt{8}", r"2\sqrt{2}"), same_answer("50%", "0.5")
    (True, True, True)
    >>> same_answer("50", "0.5"), same_answer("(1,2)", "(2,1)"), same_answer("(B)", "B", kind="choice")
    (False, False, True)
    """
    if a is None or b is None:
        return False
    return a == b or _value(str(a), kind).equals(_value(str(b), kind))


def classes(answers: Iterable[str | None], kind: str = "math") -> list[list[int]]:
    """Group equal answers: lists of indices, in the order of their first members; None is in no class.

    Equality is not transitive (50% equals 0.5 and 50, yet 0.5 is not 50), so an answer joins the first class
    whose *first member* it equals. One pass: tables say which class is the first whose first member has a
    key or a reading.

    >>> classes(["1/2", "3", "0.5", None])
    [[0, 2], [1]]
    """
    groups, by_key, by_reading = [], {}, {}
    for index, answer in enumerate(answers):
        if answer is None:
            continue
        value = _value(answer, kind)
        equal = [by_key[key] for key in (value.key, *value.also) if key in by_key]
        equal += [by_reading[key] for key in (value.key, value.second) if key in by_reading]
        if equal:
            groups[min(equal)].append(index)
            continue
        by_key.setdefault(value.second, by_key.setdefault(value.key, len(groups)))
        for key in value.also:
            by_reading.setdefault(key, len(groups))
        groups.append([index])
    return groups


def majority(classes: list[list[int]]) -> list[int]:
    """The largest class; of several the first. [] if there is none."""
    return max(classes, key=len, default=[])


def common_spelling(answers: list[str | None], members: list[int]) -> str | None:
    """The most frequent spelling among the members of a class, of several the first; None without members.

    >>> common_spelling(["0.5", "1/2", "1/2"], [0, 1, 2])
    '1/2'
    """
    spellings = Counter(answers[index] for index in members)
    return max(spellings, key=spellings.get, default=None)


def _value(answer: str, kind: str) -> Value:
    if kind == "choice":
        return Value(boxed_letter(answer) or answer.strip())
    return _read(answer) if len(answer) <= reading.MAX_LENGTH else reading.read(answer)


@lru_cache(maxsize=100_000)
def _read(answer: str) -> Value:
    return _within_time_limit(lambda: reading.read(answer), Value(("unread", answer)))


class _OutOfTime(BaseException):
    """Not an Exception, so that no `except Exception` on the way swallows it."""


def _within_time_limit(read, otherwise):
    """read(), or `otherwise` after TIME_LIMIT seconds, which is counted. A timer that was running goes on."""
    global grading_timeouts
    if threading.current_thread() is not threading.main_thread():  # signals reach the main thread only
        return read()

    def stop(*_):
        raise _OutOfTime

    began, outer_handler = time.monotonic(), signal.signal(signal.SIGALRM, stop)
    # Again each second, since the first signal may be swallowed.
    outer_delay, outer_interval = signal.setitimer(signal.ITIMER_REAL, TIME_LIMIT, 1.0)
    try:
        return read()
    except _OutOfTime:
        grading_timeouts += 1
        return otherwise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, outer_handler)
        if outer_delay:
            left = outer_delay - (time.monotonic() - began)
            signal.setitimer(signal.ITIMER_REAL, max(left, 1e-3), outer_interval)
