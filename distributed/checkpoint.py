"""Files of a run that survive a crash: lines are synced, files and folders appear whole or not at all.

A checkpoint is a folder out/checkpoint/step-000010 with weights-1-of-1.safetensors, AdamW's moments in
optimizer-1-of-1.safetensors (both fp32), state.json, and SHA256SUMS of these three, in the format of
`sha256sum -c`. If parameters are sharded over N ranks, each writes its own shard: 1-of-N to N-of-N. A
checkpoint of N shards can be read into any other number of shards.

The folder is written under a temporary name, synced to disk and then renamed. The two newest are kept: if a
file of one is damaged, a run goes on from the other.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from distributed.ranks import all_gather, on_every_rank, on_rank0, print0
from distributed.shards import is_first_copy, local, rows_of_shard, shard_of

SUMS = "SHA256SUMS"


def append(path, lines):
    """Append JSON objects to a file, one per line, and sync it to disk. If that fails, none is appended."""
    with open(path, "ab") as file:
        before = file.tell()
        try:
            file.writelines((json.dumps(line, ensure_ascii=False) + "\n").encode() for line in lines)
            file.flush()
            os.fsync(file.fileno())
        except OSError:
            with contextlib.suppress(OSError):  # closing writes what is buffered, which fails again
                file.close()
            os.truncate(path, before)
            raise


def cut(path, size):
    """Cut a file to the size that it had, and make it if it is missing; returns the bytes that it lacks."""
    with open(path, "a+b") as file:
        lacking = max(0, size - file.tell())
        file.seek(0)
        whole = size if not lacking else file.read().rfind(b"\n") + 1  # no half of a line
        file.truncate(whole)
    sync(path)
    return lacking


def write_whole(path, text):
    """Replace a file atomically: a reader finds the old one or the new one, even after a crash."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def replace_folder(folder, fill):
    """Let fill(temporary) write a folder, then replace `folder` with it."""
    temporary = make_temporary(folder)
    fill(temporary)
    put_in_place(temporary, folder)


def make_temporary(folder):
    """An empty folder next to `folder`."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary


def put_in_place(temporary, folder):
    """Sync a folder's files to disk, then rename it to `folder`."""
    for path in [*temporary.iterdir(), temporary]:
        sync(path)
    half = put_away(folder)
    os.rename(temporary, folder)
    sync(folder.parent)
    shutil.rmtree(half, ignore_errors=True)


def put_away(folder):
    """Give a folder, if there is one, a name to be deleted under: half deleted, it must not have its own."""
    half = folder.with_name(folder.name + ".old")
    shutil.rmtree(half, ignore_errors=True)
    if folder.exists():
        os.rename(folder, half)
    return half


def nearest(folder):
    """A folder, or the nearest above it that exists."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def sync(path):
    """Sync a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path):
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


# ----------------------------------------------------------------------------------------------------------
# saved


def save(root, policy, optimizer, state):
    """Write root/step-NNNNNN from the fp32 policy, its AdamW and `state` (JSON); keep the one before it.

    All ranks have to call it, and need to see the same disk. Raises ValueError on all ranks if it cannot be
    written; then the one before is as it was.
    """
    target = root / f"step-{state['step']:06d}"

    def make_room():
        earlier = [folder for folder, step in folders(root).items() if step < state["step"]]
        for folder in folders(root, unfinished=True):
            if folder not in (*earlier[-1:], target):
                shutil.rmtree(put_away(folder), ignore_errors=True)
        return make_temporary(target)

    def finish(sums):
        (temporary / "state.json").write_text(json.dumps(state, ensure_ascii=False), encoding="utf-8")
        sums["state.json"] = sha256(temporary / "state.json")
        lines = [f"{digest}  {name}\n" for name, digest in sums.items()]
        (temporary / SUMS).write_text("".join(lines), encoding="utf-8")
        put_in_place(temporary, target)

    temporary = on_rank0(make_room)
    try:
        written = all_gather(on_every_rank(lambda: save_shards(temporary, policy, optimizer)))
        on_rank0(lambda: finish({name: digest for sums in written for name, digest in sums.items()}))
    except ValueError:
        on_rank0(lambda: shutil.rmtree(temporary, ignore_errors=True))
        raise


def save_shards(folder, policy, optimizer):
    """Write this rank's shard of the weights and moments, unless an earlier rank holds the same.

    Returns {file: SHA-256}.
    """
    parameters = dict(policy.named_parameters())
    if not is_first_copy(next(iter(parameters.values()))):
        return {}
    number, count = shard_of(next(iter(parameters.values())))
    weights = {name: local(p.detach()).cpu() for name, p in parameters.items()}
    moments = {
        f"{key} {name}": local(value).cpu()
        for name, p in parameters.items()
        for key, value in optimizer.state.get(p, {}).items()
    }
    sums = {}
    for kind, tensors in (("weights", weights), ("optimizer", moments)):
        path = folder / f"{kind}-{number + 1}-of-{count}.safetensors"
        try:
            save_file(tensors, path)
        except SafetensorError as error:  # a full disk, for example
            raise OSError(f"{path}: {error}") from None
        sync(path)
        sums[path.name] = sha256(path)
    return sums


# ----------------------------------------------------------------------------------------------------------
# read


def folders(root, unfinished=False):
    """{folder: step} of the checkpoints in `root`, oldest first; unfinished: what a killed run left, too."""
    ends = r"(\.tmp|\.old)*" if unfinished else ""
    named = {path: re.fullmatch(rf"step-(\d+){ends}", path.name) for path in root.glob("step-*")}
    steps = {path: int(match[1]) for path, match in named.items() if match and path.is_dir()}
    return dict(sorted(steps.items(), key=lambda item: item[1]))


def newest_whole(root):
    """The newest checkpoint of which no file is damaged; None if there is none at all.

    All ranks have to call it; they share the reading. Raises ValueError if all checkpoints are damaged.
    """
    found = on_rank0(lambda: list(folders(root)))  # another node may see a file of the shared folder later
    faults = []
    for folder in reversed(found):
        try:
            on_every_rank(lambda folder=folder: check_files(folder))
        except ValueError as error:
            faults.append(f"{folder} is damaged ({error})")
            continue
        for fault in faults:
            print0(f"note     {fault}; the run goes on from the one before, {folder.name}")
        return folder
    if faults:
        raise ValueError("; ".join(faults) + "; no other checkpoint is left: choose another --out")
    return None


def check_files(folder):
    """Raise ValueError or OSError if a file is missing, or is not what was written: this rank's share."""
    if not (folder / SUMS).is_file():
        raise ValueError(f"it has no {SUMS}, as those of an older version of this program")
    lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
    parsed = [re.fullmatch(r"([0-9a-f]{64})  ([\w.-]+)", line) for line in lines]
    sums = {match[2]: match[1] for match in parsed if match}
    held = {path.name for path in folder.iterdir()} - {SUMS}
    if not all(parsed) or sums.keys() != held or "state.json" not in held:
        raise ValueError(f"{SUMS} does not list the files that are there")
    for name in sorted(sums)[dist.get_rank() :: dist.get_world_size()]:
        if sha256(folder / name) != sums[name]:
            raise ValueError(f"{name} is not what was written, by its SHA-256")


def read_state(folder):
    """The `state` that `save` wrote."""
    return json.loads((folder / "state.json").read_text(encoding="utf-8"))


@torch.no_grad()
def restore(folder, policy, optimizer):
    """Load the weights and moments of a whole checkpoint in place, on each rank its shard.

    Raises ValueError if they belong to another model.
    """
    parameters = dict(policy.named_parameters())
    weights, moments = ShardFiles(folder, "weights"), ShardFiles(folder, "optimizer")
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    if weights.names != parameters.keys() or any(weights.shape(name) != shapes[name] for name in shapes):
        raise ValueError(f"{folder}: holds the parameters of another model; choose another --out")
    for name, parameter in parameters.items():
        weights.read(name, parameter)
        if f"step {name}" in moments.names:  # absent before the first update
            state = optimizer.state[parameter]
            state["step"] = moments.scalar(f"step {name}").to(parameter.device)
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = torch.zeros_like(parameter, requires_grad=False)
                moments.read(f"{key} {name}", state[key])


class ShardFiles:
    """A checkpoint's files of one kind ("weights" or "optimizer"): tensors in N shards of their rows."""

    def __init__(self, folder, kind):
        paths = list(folder.glob(f"{kind}-*-of-*.safetensors"))
        count = int(paths[0].stem.split("-")[-1]) if paths else 1
        paths = [folder / f"{kind}-{number}-of-{count}.safetensors" for number in range(1, count + 1)]
        self.files = [safe_open(path, framework="pt") for path in paths]
        self.names = set(self.files[0].keys())

    def shape(self, name):
        rows = [tuple(file.get_slice(name).get_shape()) for file in self.files]
        return (sum(shape[0] for shape in rows), *rows[0][1:])

    def scalar(self, name):
        return self.files[0].get_tensor(name).clone()

    def read(self, name, tensor):
        """Copy this rank's rows of `tensor` from the files that hold some of them."""
        wanted, target = rows_of_shard(len(tensor), *shard_of(tensor)), local(tensor)
        for index, file in enumerate(self.files):
            held = rows_of_shard(len(tensor), index, len(self.files))
            start, stop = max(wanted.start, held.start), min(wanted.stop, held.stop)
            if start < stop:
                rows = file.get_slice(name)[start - held.start : stop - held.start]
                target[start - wanted.start : stop - wanted.start] = rows
