"""CUDA graphs: record a step once and replay it, instead of launching its kernels one by one."""

from functools import partial

import torch


class GraphCache:
    """One CUDA graph per tuple of arguments, for a function that uses tensors at fixed addresses.

    The graphs share a memory pool. That is safe because they run one at a time and nothing reads the pool
    between runs.
    """

    def __init__(self):
        self.graphs, self.pool = {}, torch.cuda.graph_pool_handle()

    def run(self, function, *args):
        """Call function(*args) for its effect: eagerly at first, then captured, then replayed."""
        if args not in self.graphs:  # an eager call warms up the libraries before the capture
            self.graphs[args] = None
            function(*args)
            return
        if self.graphs[args] is None:
            self.graphs[args] = capture(partial(function, *args), self.pool)
        self.graphs[args]()


def capture(function, pool):
    """Record the kernels of function() as a CUDA graph; returns a function that replays it."""
    graph = torch.cuda.CUDAGraph()
    mode = "thread_local"  # NCCL's watchdog thread may call CUDA during the capture
    with torch.cuda.graph(graph, pool=pool, capture_error_mode=mode):
        function()
    return graph.replay


def bucket(count, most):
    """Round a batch size up to limit the number of graphs: to 1, 2, 4, 8 or a multiple of 16.

    >>> bucket(3, most=64), bucket(17, most=64), bucket(17, most=20)
    (4, 32, 20)
    """
    return min(most, next(size for size in (1, 2, 4, 8, round_up(count, 16)) if size >= count))


def round_up(number, multiple):
    return -(-number // multiple) * multiple
