"""Files of a run that survive a crash: lines are synced, files and folders appear whole or not at all.

A checkpoint is a folder out/checkpoint/step-000010 with weights-1-of-1.safetensors, AdamW's moments in
optimizer-1-of-1.safetensors (both fp32), and state.json. If parameters are sharded over N ranks, each writes
its own shard: 1-of-N to N-of-N. A checkpoint of N shards can be read into any other number of shards. The
folder is written under a temporary name, synced to disk and then renamed, so a folder with a final name is
complete.
"""

import contextlib
import json
import os
import re
import shutil

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from distributed.ranks import on_every_rank, on_rank0
from distributed.shards import is_first_copy, local, rows_of_shard, shard_of


def append(path, lines):
    """Append JSON objects to a file, one per line, and sync it to disk."""
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())


def forget_after(path, step):
    """Drop lines of steps after `step`, which a resumed run repeats, and a line that a crash truncated."""
    kept = []
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    for line in text.split("\n"):  # not splitlines: a line may contain U+2028
        with contextlib.suppress(json.JSONDecodeError):
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
    write_whole(path, "".join(kept))


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
    if folder.exists():
        shutil.rmtree(folder)
    os.rename(temporary, folder)
    sync(folder.parent)


def sync(path):
    """Sync a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def save(root, policy, optimizer, state):
    """Write root/step-NNNNNN from the fp32 policy, its AdamW and `state` (JSON), and delete older ones.

    All ranks have to call it, and need to see the same disk.
    """
    target = root / f"step-{state['step']:06d}"
    temporary = on_rank0(lambda: make_temporary(target))
    on_every_rank(lambda: save_shards(temporary, policy, optimizer))

    def complete():
        (temporary / "state.json").write_text(json.dumps(state, ensure_ascii=False), encoding="utf-8")
        put_in_place(temporary, target)
        for older in folders(root):
            if older != target:
                shutil.rmtree(older)

    on_rank0(complete)


def save_shards(folder, policy, optimizer):
    """Write this rank's shard of the weights and moments, unless an earlier rank holds the same."""
    parameters = dict(policy.named_parameters())
    if not is_first_copy(next(iter(parameters.values()))):
        return
    number, count = shard_of(next(iter(parameters.values())))
    weights = {name: local(p.detach()).cpu() for name, p in parameters.items()}
    moments = {
        f"{key} {name}": local(value).cpu()
        for name, p in parameters.items()
        for key, value in optimizer.state.get(p, {}).items()
    }
    for kind, tensors in (("weights", weights), ("optimizer", moments)):
        save_file(tensors, folder / f"{kind}-{number + 1}-of-{count}.safetensors")
        sync(folder / f"{kind}-{number + 1}-of-{count}.safetensors")


def folders(root):
    """The checkpoints in `root`, oldest first, including incomplete ones (.tmp)."""
    named = [
        (re.fullmatch(r"step-(\d+)(\.tmp)?", path.name), path)
        for path in root.glob("step-*")
        if path.is_dir()
    ]
    return [path for _, path in sorted((int(match[1]), path) for match, path in named if match)]


def newest(root):
    """The folder of the newest complete checkpoint, or None."""
    return next((path for path in reversed(folders(root)) if path.suffix != ".tmp"), None)


def read_state(folder):
    """The `state` that `save` wrote."""
    return json.loads((folder / "state.json").read_text(encoding="utf-8"))


@torch.no_grad()
def restore(folder, policy, optimizer):
    """Load a checkpoint's weights and moments in place, on each rank its shard.

    Raises ValueError if they belong to another model, or a file is missing or damaged.
    """
    parameters = dict(policy.named_parameters())
    weights, moments = ShardFiles(folder, "weights"), ShardFiles(folder, "optimizer")
    if weights.names != parameters.keys():
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
        self.folder = folder
        paths = list(folder.glob(f"{kind}-*-of-*.safetensors"))
        count = int(paths[0].stem.split("-")[-1]) if paths else 1
        paths = [folder / f"{kind}-{number}-of-{count}.safetensors" for number in range(1, count + 1)]
        try:
            self.files = [safe_open(path, framework="pt") for path in paths]
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{folder}: a checkpoint with a missing or damaged file ({error})") from None
        self.names = set(self.files[0].keys())

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
