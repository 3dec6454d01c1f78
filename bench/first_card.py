"""The first minutes on a GPU: one command that checks and times everything, and keeps what it has seen.

    python bench/first_card.py --out card                          # all stages, about ten minutes
    python bench/first_card.py --out card --seconds 300 --until decode
    python bench/first_card.py --out card --seconds 300 --from learn --retry-failed
    python bench/first_card.py --out card --dry                    # the same stages on a CPU, with toy widths

A stage consists of parts (bench/first_card_parts.py). A part is a process with a time limit: if it fails,
hangs or crashes, the next part still runs. --out gets

    results.jsonl   a line per number, written to disk at once
    log.txt         everything that the parts print, tracebacks too
    summary.txt     what was seen beside what was expected; also printed at the end
    *.json.gz       traces of the profiler, for https://ui.perfetto.dev

The exit code is 0 if the stages were run, whatever they found; 2 for wrong arguments. docs/gpu.md says how to
read the summary. This file needs nothing but Python, so it reports even where torch cannot be imported.
"""

import argparse
import contextlib
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

HERE = Path(__file__).resolve().parent
LOG_BYTES = 1 << 20  # of one part; a longer log loses its middle
MORE_IS_BETTER = ("TB/s", "TFLOP/s", "tokens/s", "% MFU")
SLOW = 1.25  # times the expected number: marked with ~
SLACK = 4  # times the limits with --dry, whose machine may be busy
SETTINGS = {"PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
WRONG = 3  # exit code of a part that ran to its end, but recorded something that is not ok

STAGES = {  # {stage: {part: limit in seconds}}
    "env": {"the machine": 40},  # a fresh machine first reads torch from a cold disk
    "smoke": {"tests of the kernels": 60, "a small model": 30, "nan probe": 20, "tied gradient": 20},
    "correct": {"tests": 100, "the embedded pair": 130},
    "decode": {"steps of decoding": 80, "a rollout": 50, "generate of transformers": 50},
    "learn": {"learning": 60, "learning with checkpointing": 50},
    "profile": {"kernels of decoding and learning": 50},
    "kernels": {"kernels beside their bounds": 50},
    "speed": {"speeds of the tests": 60},
    "real": {"a public model": 240},  # if it was carried there: docs/gpu.md
}

# ----------------------------------------------------------------------------------------------------------
# results.jsonl. A line is one of
#     {"stage", "part", "begun": limit in seconds}
#     {"stage", "part", "name", "seen", "expected", "unit", "ok", "note"}    a number
#     {"stage", "part", "state", "seconds", "note"}    the end: "ok", "failed", "cut off" or "skipped"


def append_line(path, **line):
    """Add a line that is on disk when this returns. JSON has no NaN: it becomes a string."""
    seen = line.get("seen")
    if isinstance(seen, float) and not math.isfinite(seen):
        line["seen"] = str(seen)
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


def last_run(lines, stage, part):
    """The lines of a part since it last began."""
    found = [line for line in lines if line["stage"] == stage and line["part"] == part]
    begins = [index for index, line in enumerate(found) if "begun" in line]
    return found[begins[-1] :] if begins else found


def state_of(lines, stage, part):
    """How the last run of a part ended, "" if it never began."""
    run = last_run(lines, stage, part)
    return next((line["state"] for line in run if "state" in line), "failed" if run else "")


# ----------------------------------------------------------------------------------------------------------
# the process of a part


class Recorder:
    """What a part records into. `dry`: on the CPU with toy widths."""

    def __init__(self, out, stage, part, dry):
        self.out, self.stage, self.part, self.dry = out, stage, part, dry
        self.path, self.ok = out / "results.jsonl", True

    def record(self, name, seen, expected=None, unit="", ok=True, note=""):
        """Write down a number (or a text) that was seen. `ok` False fails the part, which goes on."""
        self.ok = self.ok and bool(ok)
        expected = expected if isinstance(expected, str) or not self.dry else None  # estimates are for a GPU
        append_line(self.path, stage=self.stage, part=self.part, name=name, seen=seen, expected=expected,
                    unit=unit, ok=bool(ok), note=note)  # fmt: skip

    def check(self, name, error, allowed, note=""):
        """Record an error that has to be below `allowed`. NaN is not."""
        self.record(name, float(error), f"< {allowed:g}", ok=error < allowed, note=note)

    def earlier(self, name):
        """The last number of this name that any part has recorded, or None."""
        lines = reversed(read_lines(self.path))
        return next((line["seen"] for line in lines if line.get("name") == name), None)

    def run_pytest(self, *arguments):
        """Run tests in this process; a failure is recorded when it happens, in case pytest does not end."""
        import pytest

        os.chdir(HERE.parent)
        code = pytest.main([*map(str, arguments), "-s"], plugins=[Failures(self)])
        assert code == 0, f"pytest ended with {code!r}"


class Failures:
    """A plugin of pytest that records failed tests, and how many of each kind there were."""

    def __init__(self, card):
        self.card = card

    def pytest_runtest_logreport(self, report):
        if report.failed:
            print(f"\n{report.nodeid}\n{report.longreprtext}", flush=True)
            crash = getattr(report.longrepr, "reprcrash", None)  # None: a worker has crashed
            note = crash.message if crash else report.longreprtext
            self.card.record(
                report.nodeid.split("::")[-1], "failed", ok=False, note=note[:200].split("\n")[0]
            )

    def pytest_terminal_summary(self, terminalreporter):
        counts = {kind: len(reports) for kind, reports in terminalreporter.stats.items() if kind}
        self.card.record("tests", ", ".join(f"{count} {kind}" for kind, count in counts.items()))


def run_here(functions):
    """Run the part that the command line names, one of `functions`, and end the process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("stage")
    parser.add_argument("part")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dry", action="store_true")
    args = parser.parse_args()
    card = Recorder(args.out.resolve(), args.stage, args.part, args.dry)
    try:
        functions[args.part.replace(" ", "_")](card)
        code = 0 if card.ok else WRONG
    except Exception:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    os._exit(code)  # without destructors, which might wait for a device that does not answer


# ----------------------------------------------------------------------------------------------------------
# the driver


def run_part(args, program, stage, part, limit, ends):
    """Run a part in a process of its own, and write down how it ended. ends: by time.monotonic()."""
    results, log = args.out / "results.jsonl", args.out / "log.txt"
    limit, left = limit * (SLACK if args.dry else 1), ends - time.monotonic()
    if left < limit / 4:
        note = f"{left:.0f} s left, it needs {limit / 4:.0f}"
        return append_line(results, stage=stage, part=part, state="skipped", note=note)
    append_line(results, stage=stage, part=part, begun=limit)
    began, state, note = time.monotonic(), "cut off", "stopped from outside"
    try:
        code = run_process(args, program, stage, part, min(limit, left))
        state, note = judge(code, log, limit)
        if code is None and left < limit:
            state, note = "cut off", f"--seconds ended after {left:.0f} s"
    finally:
        seconds = round(time.monotonic() - began, 1)
        append_line(results, stage=stage, part=part, state=state, seconds=seconds, note=note)
        print(f"{stage}, {part}: {state}", flush=True)


def run_process(args, program, stage, part, limit):
    """The exit code of the process of a part, None if it was killed at its limit."""
    command = [sys.executable, "-X", "faulthandler", program, stage, part, "--out", args.out]
    scratch, threads = scratch_folder(), {"OMP_NUM_THREADS": "1"} if args.dry else {}
    environment = {**os.environ, **SETTINGS, **threads, "TMPDIR": scratch}
    path = args.out / "log.txt"
    with open(path, "a", encoding="utf-8") as log:
        log.write(f"\n===== {stage}, {part}, {datetime.now(timezone.utc):%Y-%m-%d %H:%M:%S} UTC\n")
        log.flush()
        start = log.tell()
        process = subprocess.Popen([*command, *["--dry"] * args.dry], stdin=subprocess.DEVNULL, stdout=log,
                                   stderr=log, env=environment, start_new_session=True)  # fmt: skip
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)  # which makes Python print where it is
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(2)
        return None
    finally:
        kill_group(process)
        shutil.rmtree(scratch, ignore_errors=True)
        shorten(path, start)


def judge(code, log, limit):
    """(state, note) of a part whose process ended with this exit code."""
    if code is None:
        return "failed", f"still running at its limit of {limit:.0f} s: see log.txt"
    if code in (0, WRONG):
        return ("failed" if code else "ok"), ""
    if code < 0:
        return "failed", f"killed by {signal.Signals(-code).name}"
    last = log.read_text(encoding="utf-8", errors="replace").rstrip().splitlines()[-1][:300]
    return "failed", last if code == 1 else f"exit code {code}: {last}"


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


# ----------------------------------------------------------------------------------------------------------
# the summary


def summary(lines, stages):
    """Stages with their states, then every number beside the one that was expected."""
    rows, sections = [], []
    for stage, parts in stages.items():
        states = [state_of(lines, stage, part) for part in parts]
        if not any(states):
            rows.append(f"{stage:8}  not run")
            continue
        state = next((state for state in ("failed", "cut off", "skipped", "") if state in states), "ok")
        runs = {part: last_run(lines, stage, part) for part in parts}
        seconds = sum(line.get("seconds", 0) for run in runs.values() for line in run)
        good = f"parts {states.count('ok')} of {len(parts)} good"
        rows.append(f"{stage:8}  {state or 'not all':8} {seconds:5.0f} s  {good}")
        sections += ["", stage, *(row for part, run in runs.items() if run for row in section(part, run))]
    head = f"first card, {datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC"
    return "\n".join([head, "! failed    ~ slower than expected", "", *rows, *sections])


def section(part, run):
    """A line for a part, then its numbers."""
    end = next((line for line in run if "state" in line), {"state": "failed", "note": "not ended"})
    title = f"{' ' if end['state'] == 'ok' else '!'} {part}"
    title += f", {end['seconds']:.1f} s" if "seconds" in end else ""
    title += f": {end['note']}" if end["note"] else ""
    return [title, *(number_line(line) for line in run if "name" in line)]


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
    names = list(stages)
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    files = "folder for results.jsonl, log.txt, summary.txt"
    parser.add_argument("--out", type=Path, required=True, help=files)
    parser.add_argument("--seconds", type=float, default=900, help="for everything [%(default)g]")
    parser.add_argument("--from", dest="start", choices=names, help="the first stage to run")
    parser.add_argument("--until", choices=names, help="the last stage to run")
    again = "also run the parts that did not end well, by an earlier results.jsonl [the one in --out]"
    parser.add_argument("--retry-failed", nargs="?", type=Path, const=Path(), metavar="FILE", help=again)
    parser.add_argument("--dry", action="store_true", help="on the CPU, with toy widths")
    args = parser.parse_args(argv)
    if args.start and args.until and names.index(args.start) > names.index(args.until):
        parser.error(f"--from {args.start} is behind --until {args.until}")
    args.out = args.out.resolve()
    return args


def choose(stages, args, earlier):
    """The parts to run, [(stage, part)], given the lines of an earlier run (or []).

    The first stage always runs: what it measures is what the others are compared with.
    """
    names = list(stages)
    first, last = names.index(args.start or names[0]), names.index(args.until or names[-1])
    if args.retry_failed and not (args.start or args.until):
        last = -1  # nothing but the failed ones
    asked = {names[0], *names[first : last + 1]}
    every = [(stage, part) for stage, parts in stages.items() for part in parts]
    return [(stage, part) for stage, part in every
            if stage in asked or state_of(earlier, stage, part) not in ("", "ok")]  # fmt: skip


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


def main(argv=None, stages=STAGES, program=HERE / "first_card_parts.py"):
    args = parse(argv, stages)
    args.out.mkdir(parents=True, exist_ok=True)
    chosen, ends = choose(stages, args, earlier_lines(args)), time.monotonic() + args.seconds - 2
    signal.signal(signal.SIGTERM, stop)
    try:
        for stage, part in chosen:
            run_part(args, program, stage, part, stages[stage][part], ends)
            write_summary(args.out, stages)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print(write_summary(args.out, stages), flush=True)


def write_summary(out, stages):
    text = summary(read_lines(out / "results.jsonl"), stages)
    (out / "summary.txt").write_text(text + "\n", encoding="utf-8")
    return text


if __name__ == "__main__":
    main()
