"""The first minutes on a GPU: one command that checks and times everything, and keeps what it has seen.

    python bench/first_card.py --out card                          # all stages, about eight minutes
    python bench/first_card.py --out card --seconds 300 --until decode
    python bench/first_card.py --out card --seconds 300 --from learn --retry-failed
    python bench/first_card.py --out card --dry                    # the same stages on a CPU, with toy widths

A stage is a process with a time limit, and consists of parts (bench/first_card_stages.py). Whatever fails,
hangs or kills its process costs its own part: the stage goes on in a new process with the next part, and
after it the next stage runs. --out gets

    results.jsonl   a line per number, written to disk at once
    log.txt         everything that the stages print, tracebacks too
    summary.txt     what was seen beside what was expected; also printed at the end
    *.json.gz       traces of the profiler, for https://ui.perfetto.dev

The exit code is 0 if the stages were run, whatever they found; 2 for wrong arguments. docs/gpu.md says how to
read the summary. This file needs nothing but Python, so it reports even where torch cannot be imported.
"""

import argparse
import contextlib
import faulthandler
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
LOG_BYTES = 1 << 20  # of one process; what is above loses its middle, so that the log stays small
MORE_IS_BETTER = ("TB/s", "TFLOP/s", "tokens/s", "% of the floor's rate", "% MFU")
SLOW = 1.25  # times the expected number: marked with ~
SLACK = 4  # times the limits with --dry, whose machine may be busy


class Stage(NamedTuple):
    """A name, known to the program of the stages, and two times in seconds."""

    name: str
    limit: float
    least: float  # with less time left it is skipped


STAGES = [
    Stage("env", 40, 5),  # it takes 10, but a fresh machine first reads torch from a cold disk
    Stage("smoke", 60, 15),
    Stage("correct", 130, 40),
    Stage("decode", 110, 25),
    Stage("learn", 90, 30),
    Stage("profile", 40, 20),
    Stage("kernels", 40, 15),
    Stage("speed", 60, 15),
]

# ----------------------------------------------------------------------------------------------------------
# results.jsonl. A line is one of
#     {"stage", "part", "begun": limit in seconds}
#     {"stage", "part", "name", "seen", "expected", "unit", "ok", "note"}    a number
#     {"stage", "part", "state": "ok" or "failed", "seconds", "note"}        the part has ended
#     {"stage", "state": "ok", "failed", "cut off" or "skipped", "seconds", "note"}


def append_line(path, line):
    """Add a line that is on disk when this returns. JSON has no NaN: it becomes a string."""
    seen = line.get("seen")
    if isinstance(seen, float) and not math.isfinite(seen):
        line = {**line, "seen": str(seen)}
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_lines(path):
    """The lines of a file; [] if there is none. A line that was cut off is left out."""
    lines = []
    with contextlib.suppress(FileNotFoundError):
        for text in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                lines.append(json.loads(text))
    return lines


def parts_of(lines, stage):
    """{part: its lines since it last began}, in the order of their first beginnings."""
    parts = {}
    for line in lines:
        if line["stage"] == stage and "part" in line:
            if "begun" in line:
                parts[line["part"]] = []
            parts.setdefault(line["part"], []).append(line)
    return parts


def end_of(part):
    """The line that ends a part, or None; `part` as parts_of gives it."""
    return next((line for line in part if "state" in line), None)


def passed(lines, stage):
    """The parts whose last run was good."""
    ends = {name: end_of(part) for name, part in parts_of(lines, stage).items()}
    return [name for name, end in ends.items() if end and end["state"] == "ok"]


def last_state(lines, stage):
    """The last line about the stage as a whole, or None."""
    return next((line for line in reversed(lines) if line["stage"] == stage and "part" not in line), None)


# ----------------------------------------------------------------------------------------------------------
# inside the process of a stage

# Its exit codes. A process that ends in a part has any of the others, or AGAIN.
ALL_RUN, AGAIN, NO_TIME = 0, 1, 3


class Recorder:
    """What the parts of a stage record into. `dry`: on the CPU with toy widths."""

    def __init__(self, argv, stages):
        parser = argparse.ArgumentParser()
        parser.add_argument("stage", choices=stages)
        parser.add_argument("--out", type=Path, required=True)
        parser.add_argument("--deadline", type=float, required=True, help="by time.monotonic()")
        parser.add_argument("--done", type=json.loads, default=[], help="parts that are left out")
        parser.add_argument("--dry", action="store_true")
        args = parser.parse_args(argv)
        self.stage, self.out, self.dry = args.stage, args.out, args.dry
        self.path, self.done, self.deadline = args.out / "results.jsonl", args.done, args.deadline
        self.part, self.ok = None, True

    def left(self):
        """Seconds that this stage still has."""
        return self.deadline - time.monotonic()

    def append(self, **line):
        append_line(self.path, {"stage": self.stage, "part": self.part, **line})

    def record(self, name, seen, expected=None, unit="", ok=True, note=""):
        """Write down a number (or a text) that was seen. `ok` False fails the part, which goes on."""
        self.ok = self.ok and bool(ok)
        expected = expected if isinstance(expected, str) or not self.dry else None  # estimates are for a GPU
        self.append(name=name, seen=seen, expected=expected, unit=unit, ok=bool(ok), note=note)

    def check(self, name, error, allowed, note=""):
        """Record an error that has to be below `allowed`. NaN is not."""
        self.record(name, float(error), f"< {allowed:g}", ok=error < allowed, note=note)

    def earlier(self, stage, name):
        """The last number of this name that a stage has recorded, or None."""
        lines = (line for line in reversed(read_lines(self.path)) if line["stage"] == stage)
        return next((line["seen"] for line in lines if line.get("name") == name), None)

    def run(self, parts, healthy=lambda: True):
        """Call the parts {function: limit in seconds}, each with this recorder. Never returns.

        A part that raises is recorded as failed. One that exceeds its limit ends the process, with a
        traceback, and so does one after which the device is not healthy(): a CUDA error stays with its
        process. The driver then starts another process, for the parts behind it.
        """
        for function, limit in parts.items():
            self.part, self.ok = function.__name__.replace("_", " "), True
            if self.part in self.done:
                continue
            limit = min(limit * (SLACK if self.dry else 1), self.left() - 1)
            if limit < 2:
                leave(NO_TIME)
            self.append(begun=round(limit, 1))
            print(f"\n--- {self.stage}: {self.part}", flush=True)
            self.run_part(function, limit)
            if not (self.ok or healthy()):
                leave(AGAIN)
        leave(ALL_RUN)

    def run_part(self, function, limit):
        began, note = time.monotonic(), ""
        faulthandler.dump_traceback_later(limit, exit=True)
        try:
            function(self)
        except Exception as error:
            traceback.print_exc()
            self.ok, note = False, f"{type(error).__name__}: {error}"[:300]
        faulthandler.cancel_dump_traceback_later()
        seconds = round(time.monotonic() - began, 1)
        self.append(state="ok" if self.ok else "failed", seconds=seconds, note=note)


def leave(code):
    """End the process without destructors, which might wait for a device that does not answer."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


# Hooks of pytest, with `-p first_card`. FIRST_CARD in the environment says which part runs it.


def pytest_runtest_logreport(report):
    """Record a failure when it happens: what pytest prints at its end may be lost."""
    if report.failed:
        text = report.longreprtext.strip()
        crash = getattr(report.longrepr, "reprcrash", None)  # None: a worker has crashed
        note = [*(crash.message.splitlines() if crash else text.splitlines()[::-1]), ""]
        name = report.nodeid.split("::")[-1]
        record_of_pytest(
            f"\n{report.nodeid}\n{text}\n", name=name, seen="failed", ok=False, note=note[0][:200]
        )


def pytest_terminal_summary(terminalreporter):
    counts = {kind: len(reports) for kind, reports in terminalreporter.stats.items() if kind}
    seen = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    record_of_pytest(name="tests", seen=seen, ok=True, note="")


def record_of_pytest(text="", **line):
    """Add a line to results.jsonl, and text to the log, past pytest, which captures what tests print."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        return  # the process that started it hears of the same
    place = json.loads(os.environ["FIRST_CARD"])
    path = Path(place.pop("path"))
    append_line(path, {**place, "expected": None, "unit": "", **line})
    with open(path.with_name("log.txt"), "a", encoding="utf-8") as log:
        log.write(text)


# ----------------------------------------------------------------------------------------------------------
# the driver


SETTINGS = {"PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
STOPPED = "stopped from outside"


class Driver:
    """One call of this program: what it runs, where it writes, until when."""

    def __init__(self, out, seconds, program, dry=False):
        self.out, self.program, self.dry = out.resolve(), program, dry
        self.results, self.log = self.out / "results.jsonl", self.out / "log.txt"
        self.ends = time.monotonic() + seconds - 2  # for the summary

    def drive(self, stages, chosen):
        """Run the chosen stages {Stage: parts to leave out}; then, or when stopped, print the summary."""
        signal.signal(signal.SIGTERM, stop)
        try:
            for stage, done in chosen.items():
                left = self.ends - time.monotonic()
                if left < stage.least:
                    self.end_stage(stage, "skipped", note=f"{left:.0f} s left, it needs {stage.least}")
                else:
                    self.run_stage(stage, done)
                self.write_summary(stages)
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            print(self.write_summary(stages), flush=True)

    def run_stage(self, stage, done):
        """Run a stage: in one process, or where a part ends it, in another one from the next part on."""
        began, before, state, note = time.monotonic(), len(read_lines(self.results)), "cut off", STOPPED
        deadline = min(began + stage.limit * (SLACK if self.dry else 1), self.ends)
        try:
            while state == "cut off":
                code = self.run_process(stage, done, deadline)
                new = [name for name in self.close_parts(stage, before, code) if name not in done]
                done = [*done, *new]
                if code == ALL_RUN:
                    state, note = "ok", ""
                elif code in (None, NO_TIME) or time.monotonic() > deadline - 5:
                    note = "parts are missing: out of time"
                    break
                elif not new:
                    state, note = "failed", f"did not start: {last_line(self.log)}"
        finally:
            parts = self.close_parts(stage, before, STOPPED)
            if state == "ok" and any(end_of(part)["state"] != "ok" for part in parts.values()):
                state = "failed"
            self.end_stage(stage, state, note=note, seconds=round(time.monotonic() - began, 1))

    def run_process(self, stage, done, deadline):
        """One process of a stage: its exit code, None if it was killed at the deadline."""
        flags = ["--out", self.out, "--deadline", f"{deadline:.1f}", "--done", json.dumps(done)]
        command = [sys.executable, self.program, stage.name, *flags, *(["--dry"] if self.dry else [])]
        scratch, threads = scratch_folder(), {"OMP_NUM_THREADS": "1"} if self.dry else {}
        environment = {**os.environ, **SETTINGS, **threads, "TMPDIR": scratch}
        with open(self.log, "a", encoding="utf-8") as log:
            log.write(f"\n===== {stage.name}, {datetime.now(timezone.utc):%Y-%m-%d %H:%M:%S} UTC\n")
            log.flush()
            start = log.tell()
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                       env=environment, start_new_session=True)  # fmt: skip
        try:
            return process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            return None
        finally:
            kill_group(process)
            shutil.rmtree(scratch, ignore_errors=True)
            shorten(self.log, start)

    def close_parts(self, stage, before, code):
        """Write an end for the part in which a process ended: all parts {name: lines} of this stage."""
        parts = parts_of(read_lines(self.results)[before:], stage.name)
        for name, part in parts.items():
            if end_of(part) is None:
                note = death(code, part[0]["begun"])
                end = {"stage": stage.name, "part": name, "state": "failed", "note": note}
                append_line(self.results, end)
                part.append(end)
        return parts

    def end_stage(self, stage, state, **more):
        append_line(self.results, {"stage": stage.name, "state": state, **more})
        print(f"{stage.name}: {state}", flush=True)

    def write_summary(self, stages):
        text = summary(read_lines(self.results), stages)
        (self.out / "summary.txt").write_text(text + "\n", encoding="utf-8")
        return text


def death(code, limit):
    """Why a part has no end, given the exit code of its process."""
    if code is None:
        return "still running at the limit of its stage"
    if code == STOPPED:
        return STOPPED
    if code < 0:
        return f"its process was killed by {signal.Signals(-code).name}"
    return f"ended its process with exit code {code}, or ran for its limit of {limit} s: see log.txt"


def stop(number, frame):
    raise SystemExit(128 + number)


def scratch_folder():
    """A new folder for temporary files, in memory where a model of 6 GB fits there."""
    shared = Path("/dev/shm")
    fits = shared.is_dir() and os.access(shared, os.W_OK) and shutil.disk_usage(shared).free > 10e9
    return tempfile.mkdtemp(prefix="first_card", dir=shared if fits else None)


def kill_group(process):
    """End a process and all that it started, also those that are left over when it has ended by itself."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may hold it in the kernel for a while
        process.wait(10)


def shorten(path, start):
    """Cut the middle out of what is behind `start` if it is longer than LOG_BYTES."""
    text = path.read_bytes()
    new, half = text[start:], LOG_BYTES // 2
    if len(new) > LOG_BYTES:
        path.write_bytes(text[:start] + new[:half] + b"\n[...]\n" + new[-half:])


def last_line(path):
    return path.read_text(encoding="utf-8", errors="replace").rstrip().splitlines()[-1][:300]


# ----------------------------------------------------------------------------------------------------------
# the summary


def summary(lines, stages):
    """Stages with their states, then every number beside the one that was expected."""
    rows, sections = [], []
    for stage in stages:
        end, parts = last_state(lines, stage.name), parts_of(lines, stage.name)
        if end is None:
            rows.append(f"{stage.name:8}  not run")
            continue
        good = len(passed(lines, stage.name))
        took = f"{end['seconds']:.0f} of {stage.limit:.0f} s" if "seconds" in end else ""
        row = f"{stage.name:8}  {end['state']:8} {took:>12}  parts {good} of {len(parts)} good  {end['note']}"
        rows.append(row.rstrip())
        sections += ["", stage.name] * bool(parts)
        for name, part in parts.items():
            sections += section(name, part)
    head = f"first card, {datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC"
    legend = "! failed    ~ slower than expected"
    return "\n".join([head, legend, "", *rows, *sections])


def section(name, part):
    """A line for a part, then its numbers; of many good checks only the one that is nearest to failing."""
    numbers = {line["name"]: line for line in part if "name" in line}  # of two with one name the last counts
    good = [line for line in numbers.values() if line["ok"] and str(line["expected"]).startswith("<")]
    end = end_of(part) or {"state": "failed", "note": "not ended"}
    title = f"{' ' if end['state'] == 'ok' else '!'} {name}"
    title += f", {end['seconds']:.1f} s" if "seconds" in end else ""
    notes = [end["note"]] if end["note"] else []
    if len(good) > 2:
        nearest = max(line["seen"] / float(line["expected"][2:]) for line in good)
        notes.append(f"{len(good)} checks are good, the largest error is {nearest:.2g} of what is allowed")
        numbers = {key: line for key, line in numbers.items() if line not in good}
    return [": ".join([title, "; ".join(notes)] if notes else [title]), *map(number_line, numbers.values())]


def number_line(line):
    seen, expected, unit = line["seen"], line["expected"], line["unit"]
    mark, against = " ", ""
    if expected is not None:
        against = f"expected {shown(expected)}"
    if isinstance(seen, int | float) and isinstance(expected, int | float) and seen > 0 and expected > 0:
        ratio = seen / expected
        against += f", {ratio:.2f} x"
        mark = "~" if (1 / ratio if unit in MORE_IS_BETTER else ratio) > SLOW else " "
    mark = mark if line["ok"] else "!"
    return f"{mark}     {line['name']:36} {shown(seen):>12} {unit:9} {against:25} {line['note']}".rstrip()


def shown(value):
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# ----------------------------------------------------------------------------------------------------------


def parse(argv, stages):
    names = [stage.name for stage in stages]
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    files = "folder for results.jsonl, log.txt, summary.txt"
    parser.add_argument("--out", type=Path, required=True, help=files)
    parser.add_argument("--seconds", type=float, default=600, help="for everything [%(default)g]")
    parser.add_argument("--from", dest="start", choices=names, help="the first stage to run")
    parser.add_argument("--until", choices=names, help="the last stage to run")
    again = "also run the parts that did not end well, by an earlier results.jsonl [the one in --out]"
    parser.add_argument("--retry-failed", nargs="?", type=Path, const=Path(), metavar="FILE", help=again)
    parser.add_argument("--dry", action="store_true", help="on the CPU, with toy widths")
    args = parser.parse_args(argv)
    if args.start and args.until and names.index(args.start) > names.index(args.until):
        parser.error(f"--from {args.start} is behind --until {args.until}")
    return args


def choose(stages, args, earlier):
    """The stages to run, {Stage: parts to leave out}, given the lines of an earlier run (or []).

    The first one always runs: what it measures is what the others are compared with.
    """
    names = [stage.name for stage in stages]
    first, last = names.index(args.start or names[0]), names.index(args.until or names[-1])
    if args.retry_failed and not (args.start or args.until):
        last = -1  # nothing but the failed ones
    chosen = {}
    for index, stage in enumerate(stages):
        end = last_state(earlier, stage.name)
        if index == 0 or first <= index <= last:
            chosen[stage] = []
        elif end and end["state"] != "ok":
            chosen[stage] = passed(earlier, stage.name)
    return chosen


def earlier_lines(args):
    """What --retry-failed goes by. Lines of another folder are taken over, so the summary has them too."""
    if args.retry_failed is None:
        return []
    own = args.out / "results.jsonl"
    file = own if args.retry_failed == Path() else args.retry_failed
    if not file.exists():
        print(f"--retry-failed: no {file}, nothing to retry", flush=True)
    elif file != own:
        later = own.read_bytes() if own.exists() else b""
        own.write_bytes(file.read_bytes() + later)
    return read_lines(file)


def main(argv=None, stages=STAGES, program=HERE / "first_card_stages.py"):
    args = parse(argv, stages)
    args.out.mkdir(parents=True, exist_ok=True)
    chosen = choose(stages, args, earlier_lines(args))
    Driver(args.out, args.seconds, program, args.dry).drive(stages, chosen)


if __name__ == "__main__":
    main()
