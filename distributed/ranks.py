"""Processes and their communication. A single process is a group of one, so there is only one code path.

split_rows(rows)    this rank's rows        gather(items)       rank 0 gets the items of all ranks
print0(text)        on rank 0 only          broadcast(value)    all ranks get rank 0's value
mesh(...)           ranks in a grid
"""

import contextlib
import datetime
import fcntl
import gc
import os
import platform
import socket
import struct
import sys
import threading
import time
import traceback
import uuid

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from distributed import interrupts
from kernels import native

# A rank may wait for the slowest rollout, or for rank 0 to write a checkpoint: hours for a large model.
TIMEOUT = datetime.timedelta(hours=4)
# How late NFS may show a new file on another machine (its acdirmax).
SECONDS_TO_SEE = 60
SECONDS_TO_MEET = 600
# The terminal, or the program at the other end of a pipe, may be gone. A run goes on without.
QUIETLY = contextlib.suppress(OSError)


def start_processes(device):
    """Join torchrun's process group, or create one of a single process. Returns this rank's device."""
    if device == "cuda":
        let_segments_grow()
    else:
        native.share_threads()
    by_torchrun = "RANK" in os.environ
    where = {} if by_torchrun else dict(store=dist.HashStore(), rank=0, world_size=1)
    if "GLOO_SOCKET_IFNAME" not in os.environ:
        os.environ["GLOO_SOCKET_IFNAME"] = network_interface()
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    lost = [1, f"the ranks did not find each other in {SECONDS_TO_MEET // 60} minutes; try again"]
    limit = threading.Timer(SECONDS_TO_MEET, interrupts.leave, lost)
    limit.daemon = True
    limit.start()
    try:
        dist.init_process_group(backend, timeout=TIMEOUT, **where)
    finally:
        limit.cancel()
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def let_segments_grow():
    """Turn on expandable segments in CUDA's allocator, against fragmentation, unless the user configured it.

    Call it before the first allocation. torch has no public function for it, and the environment variable
    does not work from here: some versions read it when torch is imported, 2.8 knows only the old name, 2.9
    ignores the new one (pytorch issue 183387), and later ones warn about the old one.
    """
    # If NCCL registers such memory while a CUDA graph captures a collective, memory accesses are illegal
    # (Megatron-LM's arguments.py, TensorRT-LLM).
    os.environ.setdefault("NCCL_GRAPH_REGISTER", "0")
    if any(name in os.environ for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")):
        return
    configure = getattr(torch._C, "_accelerator_setAllocatorSettings", None)  # missing in torch 2.8
    configure = configure or getattr(torch.cuda.memory, "_set_allocator_settings", None)
    if configure:
        configure("expandable_segments:True")


def run_and_leave(main):
    """Run main(), which joins a process group, then leave the group and exit. Never returns.

    If main returns or raises SystemExit, it does so on all ranks, and they leave the group together. Any
    other exception is raised by this rank alone. It must not destroy the group: NCCL would wait for ranks
    that wait for this one in a collective, and torchrun would not see the failure before TIMEOUT.
    """
    interrupts.listen()
    sys.stdout.reconfigure(errors="backslashreplace")  # a prompt may hold characters the terminal cannot show
    torch.use_deterministic_algorithms(not torch.cuda.is_available())
    torch.utils.deterministic.fill_uninitialized_memory = False  # a slow debugging aid
    code = None
    try:
        main()
    except SystemExit as stopped:
        code = stopped.code  # do not keep the exception: its traceback holds main's locals, CUDA graphs too
    except BaseException as error:
        why = interrupts.explain(error)
        if why:
            interrupts.leave(1, f"{why}; rerun the same command to resume", alone=True)
        with QUIETLY:
            traceback.print_exc()
            sys.stderr.flush()
            sys.stdout.flush()
        os._exit(1)  # skips destructors, which would wait for other ranks
    if dist.is_initialized():
        # NCCL waits until no CUDA graph holds one of its collectives (pytorch issue 115388).
        gc.collect()
        # gloo's thread needs the GIL to release the tensors of its last operation, and destroying the group
        # waits for that thread while holding the GIL. Let the thread run first to avoid the deadlock.
        time.sleep(0.05)
        dist.destroy_process_group()
    try:
        sys.stdout.flush()
    except OSError:  # or Python would end with 120
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise SystemExit(code)


def network_interface():
    """The name of the network interface that connects the ranks.

    On one node it is the loopback, which needs no network and no host name. On several it is the interface
    that routes to rank 0. gloo would choose the address of the host's name, which on Debian is 127.0.1.1.
    """
    loopback = socket.if_nameindex()[0][1]
    if "RANK" not in os.environ or os.environ["LOCAL_WORLD_SIZE"] == os.environ["WORLD_SIZE"]:
        return loopback
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        # Connecting a UDP socket sends nothing; it only looks up the route, and so this node's address.
        probe.connect((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])))
        own = probe.getsockname()[0]
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # an interface without an address
                request = struct.pack("256s", name.encode())
                answer = fcntl.ioctl(probe, 0x8915, request)  # SIOCGIFADDR of Linux
                if socket.inet_ntoa(answer[20:24]) == own:
                    return name
    return loopback  # another address of 127.0.0.0/8; the interface itself has 127.0.0.1 only


def mesh(device, names, inner):
    """A DeviceMesh of all ranks, [world size / inner, inner], with a name for each axis.

    Its groups have the timeout TIMEOUT; those of torch's init_device_mesh would time out after 10 minutes
    (NCCL) or 30 (gloo).
    """
    grid, groups = torch.arange(world_size()).view(-1, inner), []
    for lines in (grid.T.tolist(), grid.tolist()):
        if len(lines) == 1:
            groups.append(dist.group.WORLD)
        else:
            groups.append(dist.new_subgroups_by_enumeration(lines, timeout=TIMEOUT)[0])
    return DeviceMesh.from_group(groups, device.type, grid, mesh_dim_names=names)


def world_size():
    return dist.get_world_size()


def is_rank0():
    return dist.get_rank() == 0


def print0(*lines):
    """Print lines on rank 0."""
    if is_rank0():
        with QUIETLY:
            print(*lines, sep="\n", flush=True)


def split_rows(rows, group_size=1):
    """Deal out rows to ranks in turn, so that long and short questions are spread evenly.

    Returns the rows of the `group_size` neighbouring ranks that sample together, and the indices of this
    rank's own rows among them.
    """
    rank, size = dist.get_rank(), world_size()
    together = [index for index in range(len(rows)) if index % size // group_size == rank // group_size]
    own = [place for place, index in enumerate(together) if index % size == rank]
    return [rows[index] for index in together], own


def gather(items):
    """On rank 0, the items of all ranks in the order before `split_rows`; [] on the others."""
    parts = [None] * world_size() if is_rank0() else None
    dist.gather_object(items, parts)
    if parts is None:
        return []
    whole = [None] * sum(map(len, parts))
    for rank, part in enumerate(parts):
        whole[rank :: world_size()] = part
    return whole


def broadcast(value):
    """Rank 0's value (any picklable object) on every rank."""
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def all_gather(value):
    """The values (any picklable objects) of all ranks, by rank, on every rank."""
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def all_reduce(values, op=dist.ReduceOp.SUM):
    """Sum (or another `op`) over all ranks of each number in a dict. All ranks need the same keys."""
    tensor = torch.tensor([values[name] for name in sorted(values)], dtype=torch.float64)
    dist.all_reduce(tensor, op)
    return dict(zip(sorted(values), tensor.tolist(), strict=True))


def on_every_rank(action):
    """Run action() on every rank. If any fails, all ranks raise ValueError with the reasons.

    action must not communicate: a rank that fails would leave the others waiting.
    """
    result = failure = None
    try:
        result = action()
    except (ValueError, OSError) as error:
        failure = str(error)
    failures = all_gather(failure)
    if failure and len(set(failures)) == 1:
        raise ValueError(failure)  # the same everywhere
    if any(failures):
        reasons = [f"rank {rank}: {reason}" for rank, reason in enumerate(failures) if reason]
        raise ValueError("; ".join(reasons))
    return result


def is_first_on_node():
    return int(os.environ.get("LOCAL_RANK", 0)) == 0


def first_on_node(action):
    """Run action() on the first rank of each node, then on the others, which find what it fetched."""
    first = is_first_on_node()
    result = on_every_rank(lambda: action() if first else None)
    return on_every_rank(lambda: result if first else action())


def on_rank0(action):
    """Run action() on rank 0 and return its result on every rank; if it fails, all raise ValueError."""
    return broadcast(on_every_rank(lambda: action() if is_rank0() else None))


def check_same(things):
    """Raise ValueError, naming the things that differ, unless {name: value} is the same on every node."""
    of_rank0 = broadcast(things)
    other = [name for name in things if things[name] != of_rank0[name]]

    def compare():
        if other and is_first_on_node():
            raise ValueError(
                f"node {platform.node()} has other {' and '.join(other)} than the node of rank 0; "
                "all nodes need the same files and the same command"
            )

    on_every_rank(compare)


def check_shared(folder):
    """Create `folder` on rank 0, and raise ValueError unless all nodes see what rank 0 writes there."""
    mark = folder / broadcast(f".seen-{uuid.uuid4().hex}")

    def leave():
        folder.mkdir(parents=True, exist_ok=True)
        mark.touch()

    def look():
        deadline = time.monotonic() + SECONDS_TO_SEE
        while is_first_on_node() and not mark.exists():
            if time.monotonic() > deadline:
                raise ValueError(
                    f"{folder.absolute()} on node {platform.node()} is not the folder that rank 0 writes to; "
                    "--out must be on a file system that all nodes share, under the same path"
                )
            time.sleep(0.1)

    on_rank0(leave)
    try:
        on_every_rank(look)
    finally:
        if is_rank0():
            for path in folder.glob(".seen-*"):  # a killed run may have left some
                path.unlink(missing_ok=True)
