"""What a run hears while it works: signals such as Ctrl-C, and signs of life of the other ranks.

Two threads listen, because Python runs signal handlers only between two bytecodes, and a rank may wait in a
collective for hours. A signal does not stop a training run where it is: `asked` tells sampling to end early,
and all ranks leave in `stop_together`, where the weights are those of a finished step. Outside training
nothing can be lost, so the thread leaves at once; so it does at a second Ctrl-C.

With several ranks, each counts up a number in torchrun's store once a second. A rank whose number stands
still is gone.
"""

import atexit
import contextlib
import datetime
import math
import os
import signal
import socket
import sys
import threading
import time

import torch
import torch.distributed as dist

SIGNALS = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM", signal.SIGHUP: "SIGHUP"}
TIME = 1000  # a reason to stop that is no signal: --max-minutes
SECOND = 1.0  # between two signs of life
PATIENCE = 600  # missed signs of life: Python may not run for a while, as a large file is written
FEW = 4  # missed signs that suffice once a collective has failed

_asked = 0  # 0, or why this rank is to stop: a signal, or TIME
_outside = "before the first step: nothing was learned, so nothing is lost"  # None while training
_begin, _deadline = 0.0, math.inf
_pulse = None


class Stopped(Exception):
    """All ranks stop here, for this `reason`: the number of a signal, or TIME."""

    def __init__(self, reason):
        self.reason, self.name = reason, SIGNALS.get(reason, "--max-minutes")
        self.code = 0 if reason == TIME else 128 + reason


def listen():
    """Begin to hear signals. The program calls it once, before anything that takes long."""
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    signal.set_wakeup_fd(writer.detach(), warn_on_full_buffer=False)
    for number in SIGNALS:
        if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
            continue  # nohup
        signal.signal(number, lambda *_: None)  # without a handler Python would not write its number

    def hear():
        while True:
            for number in reader.recv(64):  # signals of other handlers arrive, too
                if number in SIGNALS:
                    _hear(number)

    threading.Thread(target=hear, daemon=True).start()


def _hear(number):
    global _asked
    if _outside or _asked == signal.SIGINT:  # torchrun turns a second Ctrl-C into SIGTERM
        leave(128 + number, f"stopped by {SIGNALS[number]} {_outside or 'at once'}")
    _asked = number
    if number == signal.SIGINT:
        _say("Ctrl-C: the run stops after a whole step and saves it; Ctrl-C again leaves at once")


def leave(code, why, alone=False):
    """Exit this process from any thread, while others may be in a collective.

    Rank 0 says why; or this rank, if the others do not leave for the same reason.
    """
    threading.Timer(1, os._exit, [code]).start()  # printing may block
    _say(why, alone)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(code)


def _say(text, alone=False):
    rank = os.environ.get("RANK")  # None without torchrun
    who = f"rank {rank}: " if alone and rank else ""
    if alone or rank in (None, "0"):
        with contextlib.suppress(OSError):  # the terminal may be gone
            print(f"\nttrl.py: {who}{text}", file=sys.stderr, flush=True)


def training(now, saved=True):
    """Say that training begins (True) or ends (False), and whether its last step is saved."""
    global _outside, _begin, _deadline
    _begin, _deadline = time.monotonic(), math.inf
    where = f"after the last step, which is {'' if saved else 'not '}saved"
    _outside = None if now else f"{where}; the same command makes what is missing"


def stop_after(minutes):
    """Ask this rank to stop so many minutes after training began."""
    global _deadline
    _deadline = _begin + 60 * minutes


def asked():
    """Why this rank is to stop, or 0."""
    return _asked or TIME * (time.monotonic() > _deadline)


def stop_together():
    """Raise Stopped on all ranks if any of them is to stop. All ranks have to call it."""
    if _pulse:
        _pulse.place += 1
    reason = torch.tensor(asked())
    dist.all_reduce(reason, dist.ReduceOp.MAX)
    if reason:
        raise Stopped(int(reason))


# ----------------------------------------------------------------------------------------------------------
# signs of life


class Pulse:
    """The signs of life of all ranks. A missed one is counted in own ones, so a machine may sleep."""

    def __init__(self):
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self.rank, self.count, self.place = dist.get_rank(), 0, 0  # place: calls of stop_together
        # A connection of its own: that of the process group may be busy while a new group is made.
        self.store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False)
        self.store.set_timeout(datetime.timedelta(seconds=3))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
        self.keys = [f"alive/{attempt}/{rank}" for rank in range(dist.get_world_size())]
        self.store.set(self.keys[self.rank], "0 0")
        self.seen, self.missed = [b"0 0"] * len(self.keys), [0] * len(self.keys)
        dist.all_reduce(torch.zeros(1))  # all have set theirs
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.go_on, daemon=True)
        self.thread.start()
        atexit.register(self.end)

    def go_on(self):
        while not self.ended.wait(SECOND):
            self.beat()
            if not _outside and max(self.missed) >= PATIENCE:  # a rank that has done its part may leave
                leave(1, self.gone(PATIENCE), alone=True)

    def end(self):
        """Wait for the thread: if it comes back from torch's C++ as Python ends, the process is aborted."""
        self.ended.set()
        self.thread.join()

    def beat(self):
        """Give a sign of life, and look for those of the others."""
        self.count += 1
        try:
            self.store.set(self.keys[self.rank], f"{self.count} {self.place}")
            now = self.store.multi_get(self.keys)
        except RuntimeError:  # the store is gone with rank 0, or with the torchrun that keeps it
            self.missed[0] += self.rank > 0
            return
        ages = zip(self.missed, self.seen, now, strict=True)
        self.missed = [missed + 1 if before == after else 0 for missed, before, after in ages]
        self.seen = now

    def gone(self, signs):
        """The ranks that missed so many signs of life, or that are behind this one, in words; or None."""
        gone = [rank for rank, missed in enumerate(self.missed) if missed >= signs]
        if gone:
            return f"no sign of life of rank {', '.join(map(str, gone))} for {signs * SECOND:.0f} s"
        behind = [rank for rank, seen in enumerate(self.seen) if int(seen.split()[1]) < self.place]
        return f"rank {', '.join(map(str, behind))} does not come along" if behind else None


def feel_pulse():
    """Begin to exchange signs of life, where there are other ranks. Every rank has to call it."""
    global _pulse
    if dist.get_world_size() > 1:
        _pulse = Pulse()


def explain(error):
    """Why an exchange between ranks failed: the ranks that are gone, in words; None if all are there."""
    if _pulse is None or not any(backend in str(error) for backend in ("gloo", "NCCL")):
        return None
    time.sleep((FEW + 2) * SECOND)
    return _pulse.gone(FEW)
