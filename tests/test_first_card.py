"""bench/first_card.py: what it keeps of stages that fail, hang or are killed; the real stages on a CPU."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, environment

BENCH = ROOT / "bench"
PLANTED = f"""
import os, signal, subprocess, sys, tempfile, time
sys.path.insert(0, {str(BENCH)!r})
from first_card import run_here

def good(card):
    card.record("process", os.getpid())
    card.record("time", 1.5, 1.0, "ms")

def better(card):
    card.record("another process", os.getpid())

def raises(card):
    card.record("before", 1)
    raise ValueError("planted")

def nan(card):
    card.check("error", float("nan"), 0.1)
    card.check("other error", 0.05, 0.1)

def hangs(card):
    card.record("scratch", tempfile.mkdtemp())
    child = subprocess.Popen(["sleep", "1000"])
    card.record("child", child.pid)
    time.sleep(1000)

def dies(card):
    card.record("before", 1)
    os.kill(os.getpid(), signal.SIGKILL)

def fails_a_test(card):
    card.run_pytest(card.out.parent / "test_planted.py", "-p", "no:cacheprovider")

if sys.argv[1] == "absent":
    raise ImportError("no torch here")
if sys.argv[1] == "frozen":
    time.sleep(1000)
print("x" * 3_000_000 if sys.argv[1] == "loud" else "hello")
run_here(globals())
"""
STAGES = {  # limits in seconds; only those of what hangs are to be reached
    "first": {"good": 9},
    "raising": {"raises": 9, "good": 9},
    "wrong": {"nan": 9},
    "hanging": {"hangs": 3, "good": 9},
    "dying": {"dies": 9, "good": 9},
    "stuck": {"hangs": 20},
    "frozen": {"good": 3, "better": 3},
    "absent": {"good": 9},
    "loud": {"good": 9},
    "testing": {"fails a test": 60, "good": 9},
    "mixed": {"good": 9, "raises": 9, "better": 9},
    "last": {"good": 9, "better": 9},
}


@pytest.fixture
def start(tmp_path):
    """Start the driver with planted stages: start("first", "stuck", flags=[...]) -> the process."""
    (tmp_path / "planted.py").write_text(PLANTED)

    def start(*names, flags=(), out=tmp_path / "out"):
        stages = {name: STAGES[name] for name in names}
        argv = ["--out", str(out), *flags]
        code = (
            f"import sys; sys.path.insert(0, {str(BENCH)!r}); import first_card as f; "
            f"f.main({argv!r}, {stages!r}, {str(tmp_path / 'planted.py')!r})"
        )
        return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)

    return start


@pytest.fixture
def drive(start, tmp_path):
    """Drive planted stages to the end: (lines of results.jsonl, what was printed)."""

    def drive(*names, code=0, out=tmp_path / "out", **options):
        process = start(*names, out=out, **options)
        printed, _ = process.communicate(timeout=120)
        assert process.returncode == code, printed
        assert (out / "summary.txt").read_text().strip() in printed
        return read(out / "results.jsonl"), printed

    return drive


def states(lines):
    """{stage: the worst state of its parts}"""
    worst = ["failed", "cut off", "skipped", "ok"]
    stages = dict.fromkeys(line["stage"] for line in lines)
    return {stage: min(parts(lines, stage).values(), key=worst.index) for stage in stages}


def parts(lines, stage):
    return {line["part"]: line["state"] for line in lines if line["stage"] == stage and "state" in line}


def seen(lines, stage):
    return {line["name"]: line["seen"] for line in lines if line["stage"] == stage and "name" in line}


def read(path):
    """The lines of results.jsonl, without those that were cut off."""
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def gone(pid):
    """Has a process ended? It may still wait to be collected."""
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] == "Z"


def test_no_failure_stops_what_comes_behind(drive, tmp_path):
    lines, printed = drive("first", "raising", "wrong", "dying", "absent", "last")
    assert states(lines) == {"first": "ok", "raising": "failed", "wrong": "failed", "dying": "failed",
                             "absent": "failed", "last": "ok"}  # fmt: skip
    assert parts(lines, "raising") == {"raises": "failed", "good": "ok"}
    assert parts(lines, "dying") == {"dies": "failed", "good": "ok"} and seen(lines, "dying")["before"] == 1
    assert seen(lines, "wrong") == {"error": "nan", "other error": 0.05}
    for words in ("ValueError: planted", "killed by SIGKILL", "ImportError: no torch here"):
        assert words in printed
    assert "!     error " in printed and "~     time " in printed and "1.50 x" in printed
    assert "in raises" in (tmp_path / "out" / "log.txt").read_text()  # its traceback


def test_what_hangs_is_killed_with_its_children(drive, tmp_path):
    lines, printed = drive("first", "hanging", "frozen", "last")
    assert states(lines) == {"first": "ok", "hanging": "failed", "frozen": "failed", "last": "ok"}
    assert parts(lines, "hanging") == {"hangs": "failed", "good": "ok"}
    assert gone(seen(lines, "hanging")["child"]) and not Path(seen(lines, "hanging")["scratch"]).exists()
    assert "its limit of 3 s" in printed
    assert "in hangs" in (tmp_path / "out" / "log.txt").read_text()  # where it was


def test_what_runs_when_the_time_is_over_is_cut_off(drive):
    lines, printed = drive("stuck", "last", flags=["--seconds", "9"])
    assert states(lines) == {"stuck": "cut off", "last": "skipped"} and "--seconds ended" in printed
    assert gone(seen(lines, "stuck")["child"])


def test_every_part_has_a_process_of_its_own(drive):
    """After a CUDA error no call of its process succeeds."""
    lines, printed = drive("first", "mixed")
    assert parts(lines, "mixed") == {"good": "ok", "raises": "failed", "better": "ok"}
    begun = [line["part"] for line in lines if line["stage"] == "mixed" and "begun" in line]
    assert begun == ["good", "raises", "better"]
    numbers = seen(lines, "mixed")
    assert numbers["process"] != numbers["another process"] and "ValueError: planted" in printed


def test_from_and_until(drive):
    lines, _ = drive("first", "last", "raising", flags=["--from", "last", "--until", "last"])
    assert states(lines) == {"first": "ok", "last": "ok"}


def test_failed_parts_are_run_again_on_another_machine(drive, tmp_path):
    """The results of the first come along as a file: what passed there is not repeated, but is summarised."""
    names = ("first", "loud", "mixed", "wrong", "last", "raising")
    drive(*names, flags=["--until", "wrong"])
    earlier = tmp_path / "earlier.jsonl"
    cut = '{"stage": "last", "pa'  # as a machine that was taken away may leave it
    earlier.write_text((tmp_path / "out" / "results.jsonl").read_text() + cut + "\n")
    flags = ["--retry-failed", str(earlier), "--from", "last", "--until", "last"]
    lines, printed = drive(*names, out=tmp_path / "again", flags=flags)
    count = len(read(tmp_path / "out" / "results.jsonl"))
    new = lines[count:]
    assert states(new) == {"first": "ok", "mixed": "failed", "wrong": "failed", "last": "ok"}
    assert parts(new, "mixed") == {"raises": "failed"}
    assert "parts 2 of 3 good" in printed and "raising   not run" in printed


def test_retry_alone_runs_nothing_else(drive, tmp_path):
    drive("first", "wrong", "last", flags=["--until", "wrong"])
    before = len(read(tmp_path / "out" / "results.jsonl"))
    lines, _ = drive("first", "wrong", "last", flags=["--retry-failed"])
    assert states(lines[before:]) == {"first": "ok", "wrong": "failed"}
    lines, printed = drive("first", "last", flags=["--retry-failed", "nowhere"], out=tmp_path / "other")
    assert states(lines) == {"first": "ok"} and "no nowhere, nothing to retry" in printed


def test_a_stage_without_time_is_skipped(drive):
    lines, printed = drive("first", "last", flags=["--seconds", "3.9"])
    assert states(lines) == {"first": "skipped", "last": "skipped"} and "it needs 2" in printed


def test_a_stopped_driver_leaves_a_summary_and_no_process(start, tmp_path):
    process, results = start("first", "stuck"), tmp_path / "out" / "results.jsonl"
    while not results.exists() or '"child"' not in results.read_text():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    lines = read(results)
    assert process.returncode == 128 + signal.SIGTERM and "stopped from outside" in printed
    assert states(lines) == {"first": "ok", "stuck": "cut off"} and gone(seen(lines, "stuck")["child"])


def test_the_log_stays_small(drive, tmp_path):
    drive("loud")
    assert 500_000 < (tmp_path / "out" / "log.txt").stat().st_size < 1_500_000


def test_failing_tests_are_recorded_one_by_one(drive, tmp_path):
    """By the plugin that pytest gets; the last test ends the process, without a report."""
    failing = "import os\ndef test_wrong(): assert 1 == 2, 'not two'\ndef test_last(): os._exit(9)\n"
    (tmp_path / "test_planted.py").write_text(failing)
    lines, printed = drive("testing")
    assert parts(lines, "testing") == {"fails a test": "failed", "good": "ok"} and "exit code 9" in printed
    line = next(line for line in lines if "name" in line)
    assert (line["part"], line["name"], line["ok"]) == ("fails a test", "test_wrong", False)
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "not two" in line["note"] and "test_planted.py:2: AssertionError" in log


def test_it_reports_where_torch_cannot_be_imported(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart is missing')")
    command = [sys.executable, BENCH / "first_card.py", "--out", tmp_path / "out", "--until", "correct"]
    here = {**environment(), "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, env=here, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    lines = read(tmp_path / "out" / "results.jsonl")
    assert states(lines) == dict.fromkeys(("env", "smoke", "correct"), "failed")
    ends = [line for line in lines if "state" in line]
    assert len(ends) == 7 == done.stdout.count(": ImportError: libcudart is missing")


def test_all_stages_on_a_cpu(tmp_path):
    """--dry: the real stages, every part of them good, and the files that a lease brings back."""
    command = [sys.executable, BENCH / "first_card.py", "--dry", "--out", tmp_path / "out"]
    command += ["--seconds", "1500"]  # a minute on an idle machine
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=1500)
    log = (tmp_path / "out" / "log.txt").read_text()
    assert done.returncode == 0, done.stderr
    lines = read(tmp_path / "out" / "results.jsonl")
    named = "env smoke correct decode learn profile kernels speed real".split()
    assert states(lines) == dict.fromkeys(named, "ok"), done.stdout + log
    assert all(f"\n{name}\n" in done.stdout for name in named)
    files = [path.name for path in (tmp_path / "out").iterdir()]
    traces = ["decode-step.json.gz", "micro-batch.json.gz"]
    assert sorted(files) == sorted(["results.jsonl", "log.txt", "summary.txt", *traces])
