"""Run ttrl.py with a fault: argv[1] says which, the rest are flags of ttrl.py.

TERM@train:2, INT@eval:2, TERM@learn:1   this process gets the signal as it samples, evaluates or learns
HANG@learn:1                             it gets Ctrl-C and hangs
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

seen = {"step": 0}


def note_step(run, step, labels, train_step=ttrl.train_step):
    seen["step"] = step
    return train_step(run, step, labels)


def send(what, place, step):
    """Let the functions of a place send the signal, once, in a step."""

    def at(name, function):
        def wrapped(*args, **kwargs):
            stream, rank = kwargs.get("stream", "learn"), os.environ.get("RANK", "0")
            if (stream, seen["step"]) == (place, step) and (what != "STOP" or rank == "1"):
                seen["step"] = -1
                os.kill(os.getpid(), getattr(signal, "SIGINT" if what == "HANG" else f"SIG{what}"))
                time.sleep(99 * (what == "HANG"))
            return function(*args, **kwargs)

        setattr(ttrl, name, wrapped)

    at("generate", ttrl.generate)
    at("accumulate_gradients", ttrl.accumulate_gradients)
    interrupts.PATIENCE = 5


def fill_the_disk(step):
    """Let nothing be written in a step."""

    def full(function):
        def wrapped(path, *args, **kwargs):
            if seen["step"] == step:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            return function(path, *args, **kwargs)

        return wrapped

    checkpoint.append, checkpoint.sync = full(checkpoint.append), full(checkpoint.sync)


if __name__ == "__main__":
    what, _, where = sys.argv[1].partition("@")
    place, _, step = where.rpartition(":")
    ttrl.train_step = note_step
    if what == "full":
        fill_the_disk(int(step))
    else:
        send(what, place, int(step))
    ranks.run_and_leave(lambda: ttrl.main(sys.argv[2:]))
