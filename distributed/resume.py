"""The run's folder: locked, searched for a checkpoint to go on from, and its logs cut back to it."""

import contextlib
import dataclasses
import json
import os
import platform
import subprocess
from pathlib import Path

from filelock import FileLock, Timeout

from distributed import checkpoint, ranks
from distributed.provenance import compare_with_checkpoint
from distributed.ranks import is_rank0, on_every_rank, on_rank0, print0

LOGS = ("metrics.jsonl", "rollouts.jsonl", "votes.jsonl")
FORMAT = 2  # of a checkpoint
# File systems of several machines, as `stat` names them
NETWORK = {"nfs", "smb", "smb2", "cifs", "lustre", "fuseblk", "fuse", "fhgfs", "ceph", "gpfs", "afs", "v9fs"}


def progress(state):
    """How far a run is: its step, and whether that is logged."""
    return state["step"], state["unlogged"] is None


def claim_folder(inputs):
    """Make the run's folder and lock it on rank 0, so that a second run in it is refused: the lock.

    A dry run makes nothing.
    """
    c, out = inputs.config, Path(inputs.config.out)
    if c.eval_only:
        return on_rank0(lambda: c.dry_run or out.mkdir(parents=True, exist_ok=True))
    if not c.dry_run:
        ranks.check_shared(out)
    elif not (out / ".lock").exists():
        return None
    lock = on_every_rank(lambda: hold(out, c.dry_run) if is_rank0() else None)
    return None if c.dry_run else lock


def hold(folder, only_try=False):
    """Lock a run's folder as long as the result is alive, and no longer than this process.

    only_try: leave no trace. Raises ValueError naming the process that holds it.
    """
    lock, owner = FileLock(folder / ".lock", timeout=1), folder / ".owner"
    try:
        lock.acquire()
    except Timeout:
        who = owner.read_text() if owner.is_file() else "of an unknown process"
        raise ValueError(
            f"{folder} is held by a run {who}; wait for its end, or choose another --out"
        ) from None
    if only_try:
        return lock
    owner.write_text(f"on {platform.node()}, pid {os.getpid()}")
    command = ["stat", "--file-system", "--format=%T", folder]  # of Linux; elsewhere nothing is said
    kind = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    if kind in NETWORK:
        print0(f"note     {folder} is on {kind}, which may not keep a run on another machine out of it")
    return lock


def find_checkpoint(inputs):
    """(folder, state) of the checkpoint to go on from; (None, a new run's state) if there is none."""
    if inputs.config.eval_only:
        return None, {}
    out = Path(inputs.config.out)
    if inputs.config.dry_run:  # reads no weights: files are checked when the run starts
        found = list(checkpoint.folders(out / "checkpoint"))
        with contextlib.suppress(OSError, json.JSONDecodeError, KeyError):
            read_state(inputs, out, found[-1] if found else None)
        return None, {}
    folder = checkpoint.newest_whole(out / "checkpoint")
    return folder, on_rank0(lambda: read_state(inputs, out, folder))


def read_state(inputs, out, folder):
    """The state in the checkpoint `folder`; if there is none, that of a new run."""
    c = inputs.config
    # labels: {question id: label of its last vote}; logs: {file: its bytes}
    # agreement: of health.note_agreement; settled: has --stop-when-settled ended the run?
    # unlogged: {file: lines} of a step that is finished but not logged; a run begins so
    state = {"step": 0, "seconds": 0.0, "updates": 0, "skipped_updates": 0, "empty_steps": 0, "labels": {},
             "agreement": {}, "settled": False, "unlogged": {"metrics.jsonl": [{}]}, "logs": {}}  # fmt: skip
    if folder is None:
        if (out / "model").exists():
            raise ValueError(f"{c.out} holds a model, but not its checkpoint; choose another --out")
        return state
    saved = checkpoint.read_state(folder)
    if saved.pop("format", 1) != FORMAT:
        raise ValueError(f"{folder} is of another version of this program; choose another --out")
    compare_with_checkpoint(inputs, saved.pop("made_with"))
    last = inputs.schedule.steps
    if progress(saved) == (last, True):
        print0(f"finished {c.out} has all its {last} steps: nothing is trained; another --out starts anew")
    else:
        print0(f"resume   from step {saved['step']}")
    return {**state, **saved}


def prepare_files(c, sizes):
    """Drop the lines of steps that are made again, and note the settings."""
    out = Path(c.out)
    for name in LOGS:
        lacking = checkpoint.cut(out / name, sizes.get(name, 0))
        if lacking:
            print0(f"note     {c.out}/{name} has lost {lacking:,} of its {sizes[name]:,} bytes")
    checkpoint.write_whole(out / "config.json", json.dumps(dataclasses.asdict(c), indent=1))
    if c.wandb:
        import wandb

        try:
            wandb.init(project="ttrl", name=out.name, config=vars(c), resume="allow", id=out.name)
        except Exception as error:
            raise ValueError(f"--wandb: {error}") from None
