"""Access to tensors that a rank holds whole, or as a shard of their rows (a DTensor, see parallel.shard)."""

import torch.distributed as dist
from torch.distributed.tensor import DTensor


def unshard(tensor, device=None, dtype=None):
    """The whole tensor, gathered from its shards if it is a DTensor. Every rank has to call it.

    Shards are first moved to `device` (they may be in host memory) and cast to `dtype`.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    return tensor.to(device or tensor.device, dtype or tensor.dtype).full_tensor()


def local(tensor):
    """This rank's shard of a tensor; it shares memory with the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_of(tensor):
    """(number, count): this rank holds shard `number` of `count`; (0, 1) for a whole tensor."""
    if not isinstance(tensor, DTensor):
        return 0, 1
    shards = tensor.device_mesh["shard"]
    return shards.get_local_rank(), shards.size()


def is_first_copy(tensor):
    """Is this the first of the ranks that hold the same shard?"""
    if not isinstance(tensor, DTensor):
        return dist.get_rank() == 0
    mesh = tensor.device_mesh
    return mesh.ndim == 1 or mesh["replicate"].get_local_rank() == 0


def rows_of_shard(rows, number, count):
    """The rows of a shard, cut as torch.chunk does: the last shards may be shorter, or empty.

    >>> [list(range(7))[rows_of_shard(7, number, 4)] for number in range(4)]
    [[0, 1], [2, 3], [4, 5], [6]]
    """
    size = -(-rows // count)
    return slice(min(number * size, rows), min((number + 1) * size, rows))
