"""What ranks on several nodes agree on. NODE is the name of this node, argv[1] a folder.

Without more arguments there is no model: each rank notes in rank-K.json of the folder what it fetched, how
long the groups of a mesh wait, and what is refused. The cache of a node is the folder of its name.

With flags of ttrl.py behind it, runs that: no rank but 0 sees a checkpoint, and none waits long for --out.
"""

import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))
from distributed import ranks


def fetch(cache):
    """Like a hub's download: what is not in the node's cache is fetched, which takes a while."""
    cache.mkdir(exist_ok=True)
    if not (cache / "weights").exists():
        with open(cache / "log", "a") as log:
            log.write(f"{os.environ['LOCAL_RANK']}\n")
        time.sleep(0.5)
        (cache / "weights").write_text(os.environ["NODE"])
    return (cache / "weights").read_text()


def refusal(check, *arguments):
    try:
        check(*arguments)
    except ValueError as error:
        return str(error)


def seconds(group):
    """How long an operation of the group waits for the slowest rank."""
    return group._get_backend(torch.device("cpu")).options._timeout.total_seconds()


def show_late(folder):
    """Let the second node see what is in the folder only after a while, as NFS may."""
    exists, start = Path.exists, time.monotonic()
    late = os.environ["NODE"] == "b"
    Path.exists = lambda path: exists(path) and (not late or time.monotonic() > start + 1)
    refused = refusal(ranks.check_shared, folder)
    Path.exists = exists
    return refused


def note(folder):
    device, node, names = ranks.start_processes("cpu"), os.environ["NODE"], ("replicate", "shard")
    noted = {"node": node, "found": ranks.first_on_node(lambda: fetch(folder / node))}
    meshes = {"grid": ranks.mesh(device, names, 2), "line": ranks.mesh(device, names, 4)}
    for shape, mesh in meshes.items():
        groups = [mesh[name].get_group() for name in names]
        noted[shape] = [dist.get_process_group_ranks(group) for group in groups]
        noted[f"seconds of {shape}"] = [seconds(group) for group in groups]
    noted["same flags"] = refusal(ranks.check_same, {"flags": {"seed": 0}, "sources": 1})
    noted["other flags"] = refusal(ranks.check_same, {"flags": {"seed": node}, "sources": 1})
    noted["seen late"] = show_late(folder / "runs" / "out")
    ranks.SECONDS_TO_SEE = 0.5
    noted["not shared"] = refusal(ranks.check_shared, folder / node / "out")
    (folder / f"rank-{dist.get_rank()}.json").write_text(json.dumps(noted))
    dist.barrier()
    dist.destroy_process_group()


def run_impatiently(flags):
    import ttrl
    from distributed import checkpoint

    ranks.SECONDS_TO_SEE = 0.5
    if os.environ["RANK"] != "0":
        checkpoint.folders = lambda root: {}
    try:
        ttrl.main(flags)
    finally:
        time.sleep(0.05)
        dist.destroy_process_group()


if __name__ == "__main__":
    if len(sys.argv) > 2:
        run_impatiently(sys.argv[2:])
    else:
        note(Path(sys.argv[1]))
