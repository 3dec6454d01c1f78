"""Test-only: the bytes that operations hold, and those of a forward and backward pass that allocates none.

torch's FakeTensorMode runs the real model on tensors without numbers; `parallel.shard` cuts it for a process
group that exchanges nothing.
"""

import contextlib
import gc
import weakref
from unittest import mock

import torch
import torch.distributed as dist
from conftest import rollout_of
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model as model_module
from distributed import parallel
from kernels.logprob import TILE
from model import Transformer


class Held(TorchDispatchMode):
    """Counts the bytes of the tensors that operations return, as long as these live, and their peak.

    only: count storages of just so many bytes.
    """

    def __init__(self, only=None):
        super().__init__()
        self.only, self.storages, self.peak = only, weakref.WeakSet(), 0

    def now(self):
        return sum(storage.nbytes() for storage in list(self.storages))

    def count(self, tensor):
        storage = getattr(tensor, "_local_tensor", tensor).untyped_storage()
        if self.only in (None, storage.nbytes()):
            self.storages.add(storage)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and not x.is_sparse:
                self.count(x)
        self.peak = max(self.peak, self.now())
        return out


def made_up_rollout(prompt, responses, length):
    """`responses` responses of `length` tokens to a prompt of `prompt` tokens."""
    return rollout_of([[1] * prompt], [(0, torch.ones(length, dtype=torch.int64))] * responses).trim()


class FusedNorm(torch.autograd.Function):
    """What a norm keeps where it is one kernel, as on a GPU: its input, and a number for each token."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight, x.new_empty(len(x), dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad):
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


def fused_norm(norm, x):
    return FusedNorm.apply(x.to(norm.weight.dtype), norm.weight)


def peak_of_learning(config, rows, ranks, checkpointing):
    """Bytes above weights and gradients in two micro-batches on one of `ranks` ranks; 1 is DDP, no exchange.

    The arithmetic is that of a GPU: bf16, norms in one kernel, tiles of a GPU's size.
    """
    pack = model_module.pack_responses

    def pack_for_real(*args):
        with unset_fake_temporarily():
            batch = pack(*args)
            assert all(group.padded for group in batch.groups)  # made when it is first asked for
        return batch

    dist.init_process_group("fake", rank=0, world_size=ranks)
    try:
        with (
            mock.patch.object(model_module, "pack_responses", pack_for_real),
            mock.patch.object(model_module.RMSNorm, "forward", fused_norm),
            mock.patch.dict(TILE, cpu=TILE["cuda"]),
            FakeTensorMode(allow_non_fake_inputs=True),
            Held() as held,
        ):
            learner = fake_learner(config, ranks, held)
            learner.checkpointing = checkpointing
            return run(learner, rows, ranks, held)
    finally:
        dist.destroy_process_group()


def fake_learner(config, ranks, held):
    """The model without numbers, in shards of `ranks` ranks or with gradients as DDP's buckets hold them."""
    with torch.device("meta" if ranks > 1 else "cpu"):
        learner = Transformer(config)
    if ranks > 1:
        with unset_fake_temporarily():  # the mesh is read, and the parameters are on the meta device
            cpu = torch.device("cpu")
            parallel.shard(learner, parallel.shard_mesh(cpu, ranks), device=cpu, compute_dtype=torch.bfloat16)
        frequency = learner.rope_frequency
        learner.to_empty(device="cpu")
        learner.rope_frequency = torch.empty(frequency.shape)
        if config.tie_word_embeddings:
            learner.lm_head.weight = learner.embed_tokens.weight
    for p in learner.parameters():
        p.grad = torch.zeros_like(p)
        held.count(p)
    return learner


def run(learner, rows, ranks, held):
    gc.collect()
    before, held.peak = held.now(), 0
    for _ in range(2):
        autocast = torch.autocast("cpu", torch.bfloat16, cache_enabled=False)
        with autocast if ranks == 1 else contextlib.nullcontext():
            logprob, _ = learner(rows)
        logprob.sum().backward()
        del logprob
    return held.peak - before
