"""Files of a run that survive a crash: lines are synced, files and folders appear whole or not at all.

A checkpoint is a folder out/checkpoint/step-000010 with weights-1-of-1.safetensors, the moments beside it in
optimizer-1-of-1.safetensors (both fp32), and state.json. Where N ranks hold a shard of each parameter, each
writes its own: 1-of-N to N-of-N. What was written in N shards is read in any other number, or whole. The
folder is written beside its place, brought to disk and then renamed, so the newest one that bears a final
name is complete.
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
    """Append JSON objects to a file, a line each, and bring them to disk."""
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())


def forget_after(path, step):
    """Drop the lines of steps that a resumed run makes again, and a line that a crash cut in two."""
    kept = []
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    for line in text.split("\n"):  # not splitlines: U+2028 may stand inside a line
        with contextlib.suppress(json.JSONDecodeError):
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
    write_whole(path, "".join(kept))


def write_whole(path, text):
    """Replace a file so that a reader, or a crash, finds the old one or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def replace_folder(folder, fill):
    """Let fill(temporary) write a folder, bring it to disk, and put it in the place of `folder`."""
    temporary = make_temporary(folder)
    fill(temporary)
    put_in_place(temporary, folder)


def make_temporary(folder):
    """An empty folder beside `folder`."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary


def put_in_place(temporary, folder):
    """Bring a folder's files to disk, and rename it."""
    for path in [*temporary.iterdir(), temporary]:
        sync(path)
    if folder.exists():
        shutil.rmtree(folder)
    os.rename(temporary, folder)
    sync(folder.parent)


def sync(path):
    """Bring a file's or folder's content to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def save(root, policy, optimizer, state):
    """Write root/step-NNNNNN from the fp32 policy, its AdamW and `state` (JSON); older ones go.

    All ranks have to call it, and have to see the same disk.
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
    """Write what this rank holds of the weights and moments, unless another rank holds the same."""
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
    """The checkpoints in `root`, oldest first, also half-written ones (.tmp). Other files are not ours."""
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
    """The `state` that was saved."""
    return json.loads((folder / "state.json").read_text(encoding="utf-8"))


@torch.no_grad()
def restore(folder, policy, optimizer):
    """Load a checkpoint's weights and moments in place, each rank what it holds.

    Raises ValueError if they are another model's, or a file is missing or damaged.
    """
    parameters = dict(policy.named_parameters())
    weights, moments = ShardFiles(folder, "weights"), ShardFiles(folder, "optimizer")
    if weights.names != parameters.keys():
        raise ValueError(f"{folder}: holds the parameters of another model; choose another --out")
    for name, parameter in parameters.items():
        weights.read(name, parameter)
        if f"step {name}" in moments.names:  # it has been updated
            state = optimizer.state[parameter]
            state["step"] = moments.scalar(f"step {name}").to(parameter.device)
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = torch.zeros_like(parameter, requires_grad=False)
                moments.read(f"{key} {name}", state[key])


class ShardFiles:
    """The files of a kind ("weights" or "optimizer") in a checkpoint: tensors cut by rows into N shards."""

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
        """Copy the rows that this rank holds of `tensor` out of the files, as many as they overlap with."""
        wanted, target = rows_of_shard(len(tensor), *shard_of(tensor)), local(tensor)
        for index, file in enumerate(self.files):
            held = rows_of_shard(len(tensor), index, len(self.files))
            start, stop = max(wanted.start, held.start), min(wanted.stop, held.stop)
            if start < stop:
                rows = file.get_slice(name)[start - held.start : stop - held.start]
                target[start - wanted.start : stop - wanted.start] = rows
