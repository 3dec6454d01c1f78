r"""Find the answer in a response (`extract_answer`), and compare two answers (`same_answer`).

Each answer is parsed once into a value (reading.py). No text is evaluated as code. Expensive answers are
refused by deterministic limits of size; a refused answer equals only the same spelling.
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
grading_timeouts = 0  # answers that hit the time limit; the limits of size should prevent that


def extract_answer(text: str, kind: str = "math", truncated: bool = False, letters=LETTERS) -> str | None:
    """The answer of a response, or None; see extraction.py."""
    return _within_time_limit(lambda: extraction.extract_answer(text, kind, truncated, letters), None)


def same_answer(a: str, b: str, kind: str = "math") -> bool:
    r"""Whether two answers are mathematically equal, exactly: 0.333 is not 1/3. Symmetric; never raises.

    A percentage equals both of its readings (50% is 50 and 0.5), so equality is not transitive. A unit or a
    name may be missing ("x = 5" equals "5") but not different ("x = 5" is not "y = 5"). A list is a set:
    "1, 2" equals "2, 1". Words are compared case-insensitively.

    >>> same_answer(r"\frac{1}{2}", "0.50"), same_answer(r"\sqrt{8}", r"2\sqrt{2}"), same_answer("50%", "0.5")
    (True, True, True)
    >>> same_answer("50", "0.5"), same_answer("(1,2)", "(2,1)"), same_answer("(B)", "B", kind="choice")
    (False, False, True)
    """
    if a is None or b is None:
        return False
    return a == b or _value(str(a), kind).equals(_value(str(b), kind))


def classes(answers: Iterable[str | None], kind: str = "math") -> list[list[int]]:
    """Group equal answers as ttrl.vote does, for reports: lists of indices, ordered by first members.

    >>> classes(["1/2", "3", "0.5", None])
    [[0, 2], [1]]
    """
    groups = []
    for index, answer in enumerate(answers):
        if answer is not None:
            firsts = (members for members in groups if same_answer(answers[members[0]], answer, kind))
            members = next(firsts, None)
            if members is None:
                groups.append(members := [])
            members.append(index)
    return groups


def majority(classes: list[list[int]]) -> list[int]:
    """The largest class, the first of them in a tie; [] if there are no classes."""
    return max(classes, key=len, default=[])


def common_spelling(answers: list[str | None], members: list[int]) -> str | None:
    """The most frequent spelling among a class's members, the first in a tie; None without members.

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
    """A BaseException, so that no `except Exception` swallows it."""


def _within_time_limit(read, otherwise):
    """read(), or `otherwise` after TIME_LIMIT seconds. Counts timeouts and restores an outer timer."""
    global grading_timeouts
    if threading.current_thread() is not threading.main_thread():  # only the main thread gets signals
        return read()

    def stop(*_):
        raise _OutOfTime

    began, outer_handler = time.monotonic(), signal.signal(signal.SIGALRM, stop)
    # Repeat each second, since the first signal may be swallowed.
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
