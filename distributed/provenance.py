"""What made a run, and whether a checkpoint goes on with the same: flags, questions, sources, machine."""

import dataclasses
import hashlib
import json
import os
import platform
import subprocess
from functools import cache
from pathlib import Path

import torch
import transformers

from distributed.ranks import print0, world_size
from kernels import native
from support.config import RESUME_MAY_CHANGE, flag_name

HERE = Path(__file__).resolve().parents[1]
PACKAGES = "distributed grading kernels report support".split()  # with the files beside ttrl.py, the program
FILES = [path for folder in ("", *PACKAGES) for path in (HERE / folder).glob("*.py")]
FILES += (HERE / "kernels" / "cpu").glob("*.[ch]")
# {file: SHA-256 of its content} at the start: what runs is what was read then, not what is edited meanwhile
SOURCES = {
    path.relative_to(HERE).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(FILES)
}


def made_with(inputs):
    """What has to be the same for a resumed run to be the run that was stopped."""
    return {
        "config": dataclasses.asdict(inputs.config),
        "questions": fingerprint(inputs),
        "sources": SOURCES,
        "environment": environment(inputs.config),
    }


def fingerprint(inputs):
    """SHA-256 of what is asked, in training and evaluation, and of the answers that reports compare with."""
    train = zip(inputs.train_set, inputs.train_prompts, strict=True)
    evaluation = zip(inputs.eval_set, inputs.eval_prompts, strict=True)
    asked = [[[q.id, ids] for q, ids in train], [[q.id, ids, q.answer] for q, ids in evaluation]]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


@cache  # the page asks at every evaluation, for the sources that run
def commit():
    """The commit of this program, with "-dirty" if files differ from it; "unknown" where git cannot tell."""
    command = ["git", "-C", HERE, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() or "unknown"


def environment(c):
    """Where a run is made: a run that goes on elsewhere is not bitwise the same."""
    cpu = f"{platform.machine()}, {os.cpu_count()} cores"
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "machine": torch.cuda.get_device_name() if c.device == "cuda" else cpu,
        "kernels/cpu": native.version() if c.device == "cpu" else "unused",
        "ranks": world_size(),
        "threads": native.threads(),
    }


def compare_with_checkpoint(inputs, then):
    """Raise ValueError if questions, flags or sources changed since the checkpoint; note a new machine."""
    c, now = inputs.config, made_with(inputs)
    if then["questions"] != now["questions"]:
        raise ValueError(
            f"{c.out} holds a run on other questions: ids, prompts or answers of {c.data} or {c.eval_data} "
            "changed since its checkpoint; restore them, or choose another --out"
        )
    changed = [
        f"{flag_name(name)} was {then['config'].get(name)} and is {value}"
        for name, value in now["config"].items()
        if value != then["config"].get(name) and name not in RESUME_MAY_CHANGE
    ]
    names = sorted(now["sources"].keys() | then["sources"].keys())
    edited = [name for name in names if now["sources"].get(name) != then["sources"].get(name)]
    for what, which in (("flags", changed), ("sources", edited)):
        if which and not c.allow_changed_flags:
            raise ValueError(
                f"{c.out} holds a run with other {what} ({', '.join(which)}): choose another --out, "
                "or add --allow-changed-flags to go on"
            )
    for name, value in now["environment"].items():
        before = then["environment"].get(name)
        if before != value and not c.dry_run:  # which is one process
            print0(f"note     {name} was {before} and is {value}: the run goes on, but not bitwise the same")
