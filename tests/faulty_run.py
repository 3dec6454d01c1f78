"""Run ttrl.py with a fault: argv[1] says which, the rest are flags of ttrl.py.

TERM@train:2, INT@eval:2, TERM@learn:1   this process gets the signal as it samples, evaluates or learns
STOP@train:2                             rank 1 stands still, and is missed after five seconds
full@2                                   nothing can be written as checkpoint and logs of step 2
"""

import errno
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import ttrl
from distributed import checkpoint, interrupts, ranks

what, _, where = sys.argv[1].partition("@")
place, _, step = where.partition(":")
seen = {"step": 0}


def note_step(run, step, labels, train_step=ttrl.train_step):
    seen["step"] = step
    return train_step(run, step, labels)


def at(name, function):
    """`function`, which at its first call in that place and step sends the signal."""

    def wrapped(*args, **kwargs):
        stream = kwargs.get("stream", "learn")
        rank = os.environ.get("RANK", "0")
        if (stream, seen["step"]) == (place, int(step)) and (what != "STOP" or rank == "1"):
            seen["step"] = -1
            os.kill(os.getpid(), getattr(signal, "SIGINT" if what == "HANG" else f"SIG{what}"))
            time.sleep(99 * (what == "HANG"))
        return function(*args, **kwargs)

    setattr(ttrl, name, wrapped)


def full(function):
    def wrapped(path, *args, **kwargs):
        if seen["step"] == int(where):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return function(path, *args, **kwargs)

    return wrapped


ttrl.train_step = note_step
if what == "full":
    checkpoint.append, checkpoint.sync = full(checkpoint.append), full(checkpoint.sync)
else:
    at("generate", ttrl.generate)
    at("accumulate_gradients", ttrl.accumulate_gradients)
    interrupts.PATIENCE = 5
if __name__ == "__main__":
    ranks.run_and_leave(lambda: ttrl.main(sys.argv[2:]))
