"""Files of a run that survive a crash: lines are synced, files and folders appear whole or not at all.

A checkpoint is a folder out/checkpoint/step-000010 with weights.safetensors, optimizer.safetensors (fp32) and
state.json. It is written beside its place, brought to disk and then renamed, so the newest one that bears a
final name is complete.
"""

import contextlib
import json
import os
import re
import shutil
from collections import defaultdict

import torch
from safetensors.torch import load_file, save_file


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
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    fill(temporary)
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
    """Write root/step-NNNNNN from the fp32 policy, its AdamW and `state` (JSON); older ones go."""
    names = [name for name, _ in policy.named_parameters()]
    moments = optimizer.state_dict()["state"]  # {index of the parameter: {step, exp_avg, exp_avg_sq}}
    flat = {
        f"{key} {names[index]}": value.cpu()
        for index, entry in moments.items()
        for key, value in entry.items()
    }

    def fill(folder):
        save_file(
            {name: p.detach().cpu() for name, p in policy.named_parameters()}, folder / "weights.safetensors"
        )
        save_file(flat, folder / "optimizer.safetensors")
        (folder / "state.json").write_text(json.dumps(state, ensure_ascii=False), encoding="utf-8")

    target = root / f"step-{state['step']:06d}"
    replace_folder(target, fill)
    for older in folders(root):
        if older != target:
            shutil.rmtree(older)


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
    """Load a checkpoint's weights and moments in place. Raises ValueError if they are another model's."""
    parameters, weights = dict(policy.named_parameters()), load_file(folder / "weights.safetensors")
    if weights.keys() != parameters.keys():
        raise ValueError(f"{folder}: holds the parameters of another model; choose another --out")
    for name, parameter in parameters.items():
        parameter.copy_(weights[name])
    moments, index_of = defaultdict(dict), {name: index for index, name in enumerate(parameters)}
    for key_and_name, value in load_file(folder / "optimizer.safetensors").items():
        key, name = key_and_name.split(" ")
        moments[index_of[name]][key] = value.clone()  # load_file gives views of the mapped file
    optimizer.load_state_dict({**optimizer.state_dict(), "state": dict(moments)})
