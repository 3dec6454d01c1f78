"""What strangers wrote: JSON that may be anything, text with terminal codes, files that crash a library."""

import json
import os
import resource
import sys

SECONDS, BYTES = 5, 2**30  # of CPU time and of memory, for `within_limits`


def printable(text: str) -> str:
    r"""A text without effect on a terminal: control, format and other unprintable characters are escaped.

    >>> printable("\x1b[2J\r\u202e 数é")
    '\\x1b[2J\\r\\u202e 数é'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shorten(text: str, length: int = 160) -> str:
    """A text on one line, printable: its start and its end, where the answer of a response is."""
    text = " ".join(text.split())
    return printable(text if len(text) <= length else f"{text[: length // 2]} ... {text[-length // 2 :]}")


def quote(value) -> str:
    """A value of a file, for an error."""
    return shorten(repr(value))


def reason(error: BaseException) -> str:
    """The last line of an exception's message, which states the reason if it is wrapped."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return shorten(lines[-1], 300)


def parse_json(text: str, where, hook=None):
    """Any JSON value. Raises ValueError naming `where` it stands. hook: json's object_pairs_hook."""
    try:
        return json.loads(text, object_pairs_hook=hook)
    except (ValueError, RecursionError) as error:  # RecursionError: thousands of nested brackets
        raise ValueError(f"{where}: is not valid JSON ({reason(error)})") from None


def read_json(path) -> dict:
    """The JSON object in a file. Raises ValueError naming the file."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 text (byte {error.start})") from None

    def named(pairs):
        for name, _ in pairs:
            if not name.isprintable():  # libraries print the names that they do not know
                raise ValueError(f"the name {quote(name)} cannot be printed")
        return dict(pairs)

    value = parse_json(text, path, named)
    if not isinstance(value, dict):
        raise ValueError(f"{path}: is not a JSON object")
    return value


def within_limits(action, what, size=0):
    """action(), a JSON value, made in a process of its own with SECONDS and BYTES to spend.

    size: bytes of the files that it reads; each 2^20 may take 2 s more.

    A regular expression or a chat template of a stranger may run for ever, fill the memory, or crash the
    library that runs it, where no exception would tell. Raises ValueError, which begins with `what`. Only
    Linux limits the memory of a process; elsewhere it is just action().
    """
    if sys.platform != "linux":
        return action()
    seconds = SECONDS + 2 * (size >> 20)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            for number in (1, 2):  # a library that crashes prints a stack
                os.dup2(os.open(os.devnull, os.O_WRONLY), number)
            with open("/proc/self/statm") as file:
                space = int(file.read().split()[0]) * resource.getpagesize()
            for limit, most in (("AS", space + BYTES), ("CPU", seconds), ("CORE", 0)):
                resource.setrlimit(getattr(resource, f"RLIMIT_{limit}"), (most, most))
            try:
                answer = {"result": action()}
            except (ValueError, OSError) as error:
                answer = {"error": str(error)}
            with open(writing, "w") as pipe:
                json.dump(answer, pipe)
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    if not text:
        raise ValueError(f"{what} crashes, or needs over {seconds} s or {BYTES >> 30} GiB")
    answer = json.loads(text)
    if "error" in answer:
        raise ValueError(answer["error"])
    return answer["result"]
