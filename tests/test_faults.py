"""Faults injected into the real program: killed, asked to stop, a full disk, damaged files, a second run."""

import os
import random
import re
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import hypothesis
import pytest
import torch
from conftest import ROOT, SMALL, command, environment, execute, program
from hypothesis import strategies as st
from test_nodes import lose, processes_of
from test_run import measured

from distributed import checkpoint, interrupts, ranks, resume

FAULTY = "tests/faulty_run.py"
FILES = ["metrics.jsonl", "votes.jsonl", "rollouts.jsonl"]


def flags(data, out, *more):
    return ["--data", data, "--out", out, *SMALL, *more]


def assert_same(out, undisturbed):
    """The last checkpoint, bitwise, and every line of the logs, but for times and speeds."""
    last = {folder: list(checkpoint.folders(folder / "checkpoint"))[-1] for folder in (out, undisturbed)}
    for kind in ("weights", "optimizer"):
        one, other = (sorted(folder.glob(f"{kind}-*")) for folder in last.values())
        assert [path.read_bytes() for path in one] == [path.read_bytes() for path in other]
    assert measured(out) == measured(undisturbed)
    for name in FILES[1:]:
        assert (out / name).read_bytes() == (undisturbed / name).read_bytes()


@pytest.fixture(scope="module")
def undisturbed(few_questions, tmp_path_factory):
    """The folder of a run that nothing happened to: four steps, with a checkpoint after each."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    program(*flags(few_questions, out))
    return out


# ----------------------------------------------------------------------------------------------------------
# killed


class Killed(BaseException):
    """Nothing of ours catches it: what it leaves on disk is what SIGKILL leaves."""


@pytest.fixture
def alone():
    """A process group of one, a policy that has learned, and its optimizer."""
    ranks.start_processes("cpu")
    policy = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(policy.parameters())
    policy(torch.ones(3)).sum().backward()
    optimizer.step()
    yield policy, optimizer
    torch.distributed.destroy_process_group()


def kill_at(monkeypatch, number):
    """Replace what touches the disk: the call with this number, from 0, is cut off half-way."""
    calls = []

    def cut_off(module, name, half):
        whole = getattr(module, name)

        def wrapped(*args, **kwargs):
            calls.append(name)
            if len(calls) == number + 1:
                half(*args)
                raise Killed
            return whole(*args, **kwargs)

        monkeypatch.setattr(module, name, wrapped)

    def nothing(*_):
        pass

    def half_a_file(_, path):
        path.write_bytes(b"half")

    def half_deleted(folder, **_):
        files = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
        for name in files[: len(files) // 2 + 1]:
            os.unlink(os.path.join(folder, name))

    cut_off(checkpoint, "save_file", half_a_file)
    cut_off(checkpoint, "sync", nothing)
    cut_off(os, "rename", nothing)
    cut_off(shutil, "rmtree", half_deleted)
    return calls


def test_a_checkpoint_is_there_whenever_its_writing_is_killed(alone, tmp_path, monkeypatch):
    """At every one of its operations on the disk: the one before is whole, or the new one is."""
    policy, optimizer = alone
    for number in range(100):
        root = tmp_path / str(number)
        for step in (1, 2, 3):
            checkpoint.save(root, policy, optimizer, {"step": step})
        with monkeypatch.context() as patch:
            calls, killed = kill_at(patch, number), False
            try:
                checkpoint.save(root, policy, optimizer, {"step": 4})
            except Killed:
                killed = True
        found = checkpoint.newest_whole(root)
        assert checkpoint.read_state(found)["step"] in ((3, 4) if killed else (4,))
        checkpoint.restore(found, policy, optimizer)
        checkpoint.save(root, policy, optimizer, {"step": 5})
        kept = {path.name for path in root.iterdir()}
        assert kept == {found.name, "step-000005"} and checkpoint.newest_whole(root).name == "step-000005"
        if not killed:
            break
    assert len(calls) == number > 10 and {"save_file", "sync", "rename", "rmtree"} == set(calls)


def owner_of(out):
    """The process that a run's folder belongs to, or belonged to last."""
    return (out / ".owner").read_text() if (out / ".owner").exists() else ""


@pytest.mark.parametrize(
    ("count", "kills"),
    [
        pytest.param(1, 3),
        pytest.param(1, 40, marks=pytest.mark.long),
        pytest.param(2, 40, marks=pytest.mark.long),
    ],
)
def test_killed_at_any_moment_a_run_ends_as_if_it_had_not_been(few_questions, tmp_path, count, kills):
    dice, killed, finished = random.Random(kills), 0, 0
    more = [] if kills < 10 else ["--epochs", "5"]
    line = {out: command(*flags(few_questions, tmp_path / out, *more), ranks=count if count > 1 else None)
            for out in ("undisturbed", "killed")}  # fmt: skip
    execute(line["undisturbed"])
    out, seconds = tmp_path / "killed", 2.0 * count
    while killed < kills or not finished:
        owner = owner_of(out)
        process = subprocess.Popen(line["killed"], env=environment(), stdout=-3, stderr=-3, cwd="/")
        while process.poll() is None and owner_of(out) == owner:
            time.sleep(0.01)
        if killed < kills:
            with_luck = dice.uniform(0, seconds) if dice.random() < 0.9 else 3 * seconds
            try:
                process.wait(with_luck)
            except subprocess.TimeoutExpired:
                lose(process)
                killed += 1
        if process.wait() == 0:
            assert_same(out, tmp_path / "undisturbed")
            finished += 1
            shutil.rmtree(out)
    print(f"{count} ranks: {killed} kills, {finished} runs ended as the undisturbed one")


# ----------------------------------------------------------------------------------------------------------
# asked to stop


@pytest.mark.parametrize(
    ("fault", "code", "said"),
    [
        (
            "INT@eval:0",
            130,
            "stopped by Ctrl-C before the first step: nothing was learned, so nothing is lost",
        ),
        ("HUP@train:2", 129, "stopped by SIGHUP after step 1 of 4, which is saved"),
        ("TERM@learn:2", 143, "stopped by SIGTERM after step 2 of 4, which is saved"),
        ("TERM@eval:2", 143, "stopped by SIGTERM after step 2 of 4, which is saved"),
    ],
)
def test_a_signal_ends_a_run_after_a_whole_step(few_questions, undisturbed, tmp_path, fault, code, said):
    """In sampling it is dropped; once it learns it is finished, and its evaluation is made later."""
    out = tmp_path / "run"
    stopped = program(fault, *flags(few_questions, out, "--save-every", "9"), script=FAULTY, code=code)
    assert said in stopped.stdout and "Traceback" not in stopped.stderr
    program(*flags(few_questions, out))
    assert_same(out, undisturbed)


def test_a_second_ctrl_c_leaves_at_once(few_questions, tmp_path):
    """Also where the main thread never comes to a whole step."""
    line = command("HANG@learn:1", *flags(few_questions, tmp_path / "run"), script=FAULTY)
    process = subprocess.Popen(line, env=environment(), stdout=-3, stderr=subprocess.PIPE, cwd="/", text=True)
    said = iter(process.stderr.readline, "")
    assert any("Ctrl-C again leaves at once" in line for line in said)
    process.send_signal(signal.SIGINT)
    assert process.wait(5) == 130 and "stopped by Ctrl-C at once" in process.stderr.read()


def test_before_training_a_signal_leaves_at_once(few_questions, tmp_path):
    out = tmp_path / "run"
    line = command(*flags(few_questions, out))
    process = subprocess.Popen(line, env=environment(), stdout=-3, stderr=subprocess.PIPE, cwd="/", text=True)
    while not (out / ".lock").exists():
        time.sleep(0.01)
    process.terminate()
    error = process.stderr.read()
    assert process.wait(9) == 143 and "nothing was learned, so nothing is lost" in error
    assert "Traceback" not in error and not (out / "checkpoint").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_two_ranks_stop_together(few_questions, tmp_path, number, code):
    """A signal to train.sh, which torchrun hands to its ranks: one sentence, and no page of torchrun's."""
    out = tmp_path / "run"
    line = ["bash", ROOT / "train.sh", "--nproc", "2", *flags(few_questions, out, "--epochs", "99")]
    path = f"{os.path.dirname(command()[0])}:{os.environ['PATH']}"
    process = subprocess.Popen(list(map(str, line)), env={**environment(), "PATH": path}, text=True, cwd="/",
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    while not (out / "checkpoint" / "step-000001").exists() and process.poll() is None:
        time.sleep(0.05)
    start = time.monotonic()
    process.send_signal(number)
    printed, error = process.communicate(timeout=60)
    assert process.returncode == code and time.monotonic() - start < 30
    step = re.search(r"stopped by .* after step (\d+) of 198, which is saved", printed)
    assert list(checkpoint.folders(out / "checkpoint").values())[-1] == int(step[1])
    assert "Traceback" not in error and "FAILED" not in error


# ----------------------------------------------------------------------------------------------------------
# a full disk


def test_a_disk_that_is_full_for_a_while_costs_one_checkpoint(few_questions, undisturbed, tmp_path):
    out = tmp_path / "run"
    done = program("full@2", *flags(few_questions, out), script=FAULTY)
    assert "step 2: [Errno 28] No space left on device" in done.stderr + done.stdout
    assert re.search(r"step 2: no checkpoint, because .*\.jsonl", done.stderr + done.stdout)
    assert_same(out, undisturbed)


def limited(line, size, code):
    """Run a command line whose files may have `size` bytes at most."""
    return execute(line, code, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))


def test_what_a_quota_forbids_does_not_end_the_run(few_questions, undisturbed, tmp_path):
    """The moments are larger than a file may be; the run ends with its model, and says what it lacks."""
    out = tmp_path / "run"
    done = limited(command(*flags(few_questions, out)), 4 * 10**6, 0)
    said = re.findall(r"step (\d): no checkpoint, because .*/optimizer-1-of-1.safetensors.*File too large",
                      done.stdout + done.stderr)  # fmt: skip
    assert said == ["1", "2", "3", "4"] and not list((out / "checkpoint").iterdir())
    assert "it takes 0.008 GB" in done.stderr + done.stdout and measured(out) == measured(undisturbed)
    for name in ("model.safetensors", "tokenizer.json"):
        assert (out / "model" / name).read_bytes() == (undisturbed / "model" / name).read_bytes()


def test_a_stop_that_cannot_be_saved_is_no_success(few_questions, tmp_path):
    line = command(*flags(few_questions, tmp_path / "run", "--max-minutes", "0.0001"))
    assert "after step 1 of 4, which is not saved" in limited(line, 4 * 10**6, 1).stdout


def test_a_run_goes_on_without_its_terminal_and_its_folder(few_questions, undisturbed, tmp_path):
    """Nobody reads what it prints, nohup turns SIGHUP off, and somebody deletes what it has written."""
    out = tmp_path / "run"
    line = command("HUP@train:3", *flags(few_questions, out), script=FAULTY)
    with open(tmp_path / "error", "w") as file:
        process = subprocess.Popen(
            ["nohup", *line], env=environment(), stdout=subprocess.PIPE, stderr=file, cwd="/"
        )
    while not (out / "checkpoint" / "step-000001").exists() and process.poll() is None:
        time.sleep(0.01)
    process.stdout.close()
    shutil.rmtree(out)
    assert process.wait(99) == 0, (tmp_path / "error").read_text()
    assert "Traceback" not in (tmp_path / "error").read_text()
    weights = "checkpoint/step-000004/weights-1-of-1.safetensors"
    assert (out / weights).read_bytes() == (undisturbed / weights).read_bytes()


def test_a_log_that_lost_its_end_is_cut_to_whole_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    checkpoint.append(path, [{"step": 0}, {"step": 1}, {"step": 2}])
    size = path.stat().st_size
    assert checkpoint.cut(path, size - 12) == 0 and path.read_text() == '{"step": 0}\n{"step": 1}\n'
    os.truncate(path, 20)
    assert checkpoint.cut(path, size - 12) == 4 and path.read_text() == '{"step": 0}\n'


def test_a_model_that_cannot_be_written_is_one_sentence(few_questions, undisturbed, tmp_path):
    out = shutil.copytree(undisturbed, tmp_path / "run")
    error = limited(command(*flags(few_questions, out)), 10**6, 1).stderr
    assert "Traceback" not in error and "rerun the same command for what is missing" in error
    assert (out / "model" / "model.safetensors").read_bytes()  # that of before is untouched


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system")
def test_a_disk_that_is_too_small_is_refused(few_questions, tmp_path):
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=9m", "tmpfs", tmp_path], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("may not mount")
    try:
        error = program(*flags(few_questions, tmp_path / "run"), code=2).stderr
        assert "two checkpoints and the model take 0.02 GB" in error and "0.01 free" in error
        subprocess.run(["mount", "-o", "remount,ro", tmp_path], check=True)
        assert "cannot write in" in program(*flags(few_questions, tmp_path / "run"), code=2).stderr
    finally:
        subprocess.run(["umount", tmp_path], check=True)


# ----------------------------------------------------------------------------------------------------------
# damaged files


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


DAMAGES = {
    "a flipped bit in the weights": lambda folder: flip_a_bit(folder / "weights-1-of-1.safetensors"),
    "a flipped bit in the state": lambda folder: flip_a_bit(folder / "state.json"),
    "a truncated file": lambda folder: os.truncate(folder / "optimizer-1-of-1.safetensors", 99),
    "a missing file": lambda folder: (folder / "optimizer-1-of-1.safetensors").unlink(),
    "no sums": lambda folder: (folder / "SHA256SUMS").unlink(),
    "a sum too few": lambda folder: os.truncate(
        folder / "SHA256SUMS", (folder / "SHA256SUMS").read_text().index("\n") + 1
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_checkpoint_before_a_damaged_one_is_used(alone, tmp_path, capsys, damage):
    policy, optimizer = alone
    for step in (1, 2):
        checkpoint.save(tmp_path, policy, optimizer, {"step": step})
    DAMAGES[damage](tmp_path / "step-000002")
    assert checkpoint.newest_whole(tmp_path).name == "step-000001"
    assert re.search(r"step-000002 is damaged \(.*\); the run goes on from the one before, step-000001",
                     capsys.readouterr().out)  # fmt: skip
    checkpoint.save(tmp_path, policy, optimizer, {"step": 2})
    assert checkpoint.newest_whole(tmp_path).name == "step-000002"


def test_a_flipped_bit_is_not_trained_on(few_questions, undisturbed, tmp_path):
    out = shutil.copytree(undisturbed, tmp_path / "run")
    four, three = (out / "checkpoint" / f"step-00000{step}" for step in (4, 3))
    flip_a_bit(four / "weights-1-of-1.safetensors")
    printed = program(*flags(few_questions, out)).stdout
    assert "step-000004 is damaged (weights-1-of-1.safetensors is not what was written" in printed
    assert "resume   from step 3" in printed
    assert_same(out, undisturbed)
    for folder in (four, three):
        flip_a_bit(folder / "optimizer-1-of-1.safetensors")
    error = program(*flags(few_questions, out), code=2).stderr
    assert error.count("\n") == 1 and error.count("is damaged") == 2 and "choose another --out" in error


def test_a_model_without_its_checkpoint_is_not_trained_over(few_questions, undisturbed, tmp_path):
    out = shutil.copytree(undisturbed, tmp_path / "run")
    shutil.rmtree(out / "checkpoint")
    assert "holds a model, but not its checkpoint" in program(*flags(few_questions, out), code=2).stderr


@pytest.mark.parametrize("cases", [60, pytest.param(2000, marks=pytest.mark.long)])
def test_any_damage_to_a_folder_is_found_or_a_sentence(alone, tmp_path, cases):
    """What is read is what was written, or it is not used."""
    for step in (1, 2):
        checkpoint.save(tmp_path / "whole", *alone, {"step": step, "labels": {"a": "7"}})
    names = [
        path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*") if path.is_file()
    ]
    damage = st.tuples(st.sampled_from(names), st.integers(0, 10**6), st.binary(max_size=9), st.booleans())
    damages = st.lists(damage, min_size=1, max_size=3)

    @hypothesis.settings(max_examples=cases, derandomize=True, deadline=None, database=None)
    @hypothesis.given(damages)
    def check(damages):
        root = tmp_path / "run"
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(tmp_path / "whole", root)
        for name, place, inserted, rest in damages:
            data = (root / name).read_bytes()
            place %= len(data) + 1
            (root / name).write_bytes(data[:place] + inserted + data[place + len(inserted) :] * rest)
        try:
            found = checkpoint.newest_whole(root)
        except ValueError as error:
            assert "is damaged" in str(error)
            return
        for path in found.iterdir():
            assert path.read_bytes() == (tmp_path / "whole" / found.name / path.name).read_bytes()

    check()


# ----------------------------------------------------------------------------------------------------------
# two runs, lost ranks


def test_a_second_run_in_a_folder_is_refused_until_the_first_is_gone(few_questions, undisturbed, tmp_path):
    out = tmp_path / "run"
    line = command(*flags(few_questions, out))
    first = subprocess.Popen(line, env=environment(), stdout=-3, stderr=-3, cwd="/")
    while not (out / "checkpoint" / "step-000001").exists():
        time.sleep(0.02)
    first.send_signal(signal.SIGSTOP)
    error = program(*flags(few_questions, out), code=2).stderr
    assert error.count("\n") == 1 and f"pid {first.pid}" in error and os.uname().nodename in error
    assert f"pid {first.pid}" in program(*flags(few_questions, out, "--dry-run"), code=2).stderr
    first.kill()
    first.wait()
    program(*flags(few_questions, out))
    assert_same(out, undisturbed)


def test_a_network_file_system_promises_less(tmp_path, monkeypatch, capsys, alone):
    real = subprocess.run
    monkeypatch.setattr(resume.subprocess, "run", lambda line, **options: real(["echo", "nfs"], **options))
    resume.hold(tmp_path)
    assert "is on nfs, which may not keep a run on another machine out" in capsys.readouterr().out


def lose_a_rank(few_questions, out, *options):
    """Start two ranks, kill the second after a step: the launcher."""
    line = command(*flags(few_questions, out), ranks=2)
    line[3:3] = options
    agent = subprocess.Popen(line, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                             text=True, cwd="/")  # fmt: skip
    while not (out / "checkpoint" / "step-000001").exists() and agent.poll() is None:
        time.sleep(0.02)
    os.kill(processes_of(agent)[1], signal.SIGKILL)
    return agent


def test_a_rank_that_dies_is_named_and_the_same_command_goes_on(few_questions, tmp_path):
    out = tmp_path / "run"
    agent, start = lose_a_rank(few_questions, out), time.monotonic()
    printed, _ = agent.communicate(timeout=99)
    assert time.monotonic() - start < 45 and agent.returncode == 1
    assert "ttrl.py: rank 0: no sign of life of rank 1 for 4 s; rerun the same command to resume" in printed
    program(*flags(few_questions, tmp_path / "undisturbed"), ranks=2)
    program(*flags(few_questions, out), ranks=2)
    assert_same(out, tmp_path / "undisturbed")


def test_signs_of_life_end_before_python_does(tmp_path):
    """A thread that comes back from torch's C++ while Python ends is aborted, and the process with it."""
    script = tmp_path / "ending.py"
    script.write_text(f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from distributed import interrupts, ranks
interrupts.SECOND = 0  # no pause between two signs
ranks.start_processes("cpu")
for _ in range(8):
    interrupts.feel_pulse()
""")
    program(ranks=2, script=script)


def test_a_rank_that_is_behind_is_named():
    pulse = object.__new__(interrupts.Pulse)
    pulse.missed, pulse.seen, pulse.place = [0, 0], [b"9 3", b"9 2"], 3
    assert pulse.gone(4) == "rank 1 does not come along"
    pulse.seen[1] = b"9 3"
    assert pulse.gone(4) is None


@pytest.mark.long
def test_torchrun_heals_by_itself(few_questions, tmp_path):
    out = tmp_path / "run"
    printed, _ = lose_a_rank(few_questions, out, "--max-restarts", "2").communicate(timeout=300)
    assert "resume   from step" in printed
    program(*flags(few_questions, tmp_path / "undisturbed"), ranks=2)
    assert_same(out, tmp_path / "undisturbed")


@pytest.mark.long
def test_a_rank_that_stands_still_is_named(few_questions, tmp_path):
    done = program("STOP@train:2", *flags(few_questions, tmp_path / "run"), ranks=2, script=FAULTY, code=1)
    assert "ttrl.py: rank 0: no sign of life of rank 1 for 5 s" in done.stderr


# ----------------------------------------------------------------------------------------------------------
# for a long time


def grown(pid):
    """(resident MB, open files, seconds of CPU) of a process."""
    status, fields = (Path(f"/proc/{pid}/{name}").read_text() for name in ("status", "stat"))
    ticks = sum(map(int, fields.rpartition(")")[2].split()[11:13]))
    resident = int(re.search(r"VmRSS:\s*(\d+)", status)[1]) / 1e3
    return resident, len(os.listdir(f"/proc/{pid}/fd")), ticks / os.sysconf("SC_CLK_TCK")


@pytest.mark.long
def test_two_thousand_steps_do_not_grow(few_questions, tmp_path):
    """Between the steps 500 and 1,900: memory, open files and the CPU time of a step.

    Without evaluations between: each makes the page anew from all logs, which do grow. What is left of growth
    is the grader's cache, of at most 100,000 pairs.
    """
    out, seen = tmp_path / "run", {}
    more = "--epochs 1000 --max-new-tokens 24 --eval-every 9999 --save-every 10 --lr 1e-6".split()
    process = subprocess.Popen(command(*flags(few_questions, out, *more)), env=environment(), stdout=-3,
                               stderr=-3, cwd="/")  # fmt: skip
    path = out / "metrics.jsonl"
    while process.poll() is None:
        step = path.read_text().count("\n") - 1 if path.exists() else 0
        if 500 <= step < 2000 and step // 100 not in seen:
            seen[step // 100] = grown(process.pid)
        time.sleep(0.2)
    assert path.read_text().count("\n") == 2001 and process.returncode == 0
    (first, files, start), (last, files_last, end) = seen[5], seen[19]
    early, late = (seen[6][2] - start) / 100, (end - seen[18][2]) / 100
    print(f"{first:.1f} to {last:.1f} MB, {files} to {files_last} files, {early:.3f} to {late:.3f} s a step")
    assert last < 1.02 * first and files_last <= files and late < 1.3 * early
