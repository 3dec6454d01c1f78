"""The machine of a run: its ranks, and the memory that each of them may use."""

import os
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from distributed.ranks import all_reduce
from support.gpus import NODE, Card, card_called, parse_gpus

USABLE = 0.9  # of a GPU or of the host's memory; the rest is for CUDA, NCCL, fragments and other programs


class Machine(NamedTuple):
    """Where a run is planned; the same on every rank."""

    ranks: int
    per_node: int  # ranks of a node
    memory: int  # bytes that a rank may use: of its GPU, or its share of the host's memory
    host: int | None  # bytes of host memory that the ranks of a node may use; None: not known
    cuda: bool
    card: Card | None = None  # None: a CPU, or a GPU that is not in the table


def find_machine(c, device):
    """The Machine of --gpus, or the one here, with the smallest numbers of any rank. Every rank has to ask.

    A dry run plans for the WORLD_SIZE and LOCAL_WORLD_SIZE of the environment, as torchrun names them.
    """
    if c.gpus:
        count, card = parse_gpus(c.gpus)
        return Machine(count, min(count, NODE), int(USABLE * card.memory()), None, True, card)
    told = os.environ if c.dry_run or "RANK" in os.environ else {}
    ranks = int(told.get("WORLD_SIZE", 1))
    per_node = int(told.get("LOCAL_WORLD_SIZE", ranks))
    host, card = physical_memory(), None
    memory = host // per_node
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        card = card_called(torch.cuda.get_device_name(device))
    mine = {"per_node": per_node, "memory": int(USABLE * memory), "host": int(USABLE * host)}
    least = {name: int(value) for name, value in all_reduce(mine, dist.ReduceOp.MIN).items()}
    return Machine(ranks, **least, cuda=device.type == "cuda", card=card)


def physical_memory(root="/sys/fs/cgroup", own="/proc/self/cgroup"):
    """Bytes of this machine's memory, or of the container's (its cgroup's limit) where that is less."""
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    lines = Path(own).read_text().splitlines() if Path(own).exists() else []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers == "":
            kind, name = "", "memory.max"  # cgroup version 2
        elif "memory" in controllers.split(","):
            kind, name = "memory", "memory.limit_in_bytes"  # version 1
        else:
            continue
        for folder in (Path(path), *Path(path).parents):  # the limit of a group above holds as well
            file = Path(root) / kind / folder.relative_to("/") / name
            text = file.read_text().strip() if file.is_file() else "max"
            sizes += [int(text)] if text.isdigit() else []
    return min(sizes)
