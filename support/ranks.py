"""Processes and what they exchange. A single process is a group of one, so one and many share one path.

shard(rows)     this rank's rows        gather(items)       rank 0 gets the items of all ranks
print0(text)    on rank 0 only          broadcast(value)    all ranks get rank 0's value
"""

import datetime
import os
import socket

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

# A rank may wait for the slowest rollout, or for rank 0 to write a checkpoint: hours for a large model.
TIMEOUT = datetime.timedelta(hours=4)


def start_processes(device):
    """Join the process group of torchrun, or found one of a single process. Returns this rank's device."""
    by_torchrun = "RANK" in os.environ
    where = {} if by_torchrun else dict(store=dist.HashStore(), rank=0, world_size=1)
    if not by_torchrun or os.environ["LOCAL_WORLD_SIZE"] == os.environ["WORLD_SIZE"]:  # a single machine
        loopback = socket.if_nameindex()[0][1]  # needs no network and no host name
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=TIMEOUT, **where)
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def world_size():
    return dist.get_world_size()


def is_rank0():
    return dist.get_rank() == 0


def print0(*lines):
    """Print lines on rank 0."""
    if is_rank0():
        print(*lines, sep="\n", flush=True)


def mesh(device, names, inner):
    """All ranks as a grid, world size / inner by inner, with a name for each axis: neighbours share a row."""
    return init_device_mesh(device.type, (world_size() // inner, inner), mesh_dim_names=names)


def shard(rows, group_size=1):
    """This rank's rows: every world-size-th one, so that long and short questions fall to all ranks alike.

    Returns the rows of the `group_size` neighbouring ranks that sample together, and the indices of its own
    among them.
    """
    rank, size = dist.get_rank(), world_size()
    together = [index for index in range(len(rows)) if index % size // group_size == rank // group_size]
    own = [place for place, index in enumerate(together) if index % size == rank]
    return [rows[index] for index in together], own


def gather(items):
    """On rank 0 the items of all ranks, in the order that `shard` split them from; None on the others."""
    parts = [None] * world_size() if is_rank0() else None
    dist.gather_object(items, parts)
    if parts is None:
        return None
    whole = [None] * sum(map(len, parts))
    for rank, part in enumerate(parts):
        whole[rank :: world_size()] = part
    return whole


def broadcast(value):
    """Rank 0's value (any picklable object) on every rank."""
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def all_reduce(values, op=dist.ReduceOp.SUM):
    """Sum (or maximum) over all ranks of each number of a dict, whose keys are the same everywhere."""
    tensor = torch.tensor([values[name] for name in sorted(values)], dtype=torch.float64)
    dist.all_reduce(tensor, op)
    return dict(zip(sorted(values), tensor.tolist(), strict=True))


def on_every_rank(action):
    """action() on every rank. If it fails on some, all raise ValueError with the reason of each that failed.

    action must not communicate: a rank that fails would leave the others waiting.
    """
    result = failure = None
    try:
        result = action()
    except (ValueError, OSError) as error:
        failure = str(error)
    failures = [None] * world_size()
    dist.all_gather_object(failures, failure)
    if failure and len(set(failures)) == 1:
        raise ValueError(failure)  # the same everywhere
    if any(failures):
        reasons = [f"rank {rank}: {reason}" for rank, reason in enumerate(failures) if reason]
        raise ValueError("; ".join(reasons))
    return result


def first_on_node(action):
    """action() on the first rank of each node, then on the others, which find what it fetched."""
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    result = on_every_rank(lambda: action() if first else None)
    return on_every_rank(lambda: result if first else action())
