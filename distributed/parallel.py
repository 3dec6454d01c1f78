"""How one model is spread over ranks. Each rank samples and learns from its own rows; what is split?

    nothing      DDP: each rank holds all weights, gradients and moments             data_parallel
    the learner  FSDP2: a rank holds a shard of all three, and gathers layers        shard
    the sampler  tensor parallelism: a rank holds some heads and a part of the MLP   rank_config, ...

A model that fits in memory uses DDP. `shard` keeps the same numbers in shards (ZeRO stage 3, arXiv
1910.02054): a parameter is a DTensor, sharded over its rows, and gathered only while its layer computes. With
fewer shards than ranks, each shard is replicated on several ranks. A sampler over several ranks is the same
Transformer with fewer heads and a narrower MLP (Megatron-LM, arXiv 1909.08053): the ranks of a group decode
the same responses and sum the outputs of their heads and their parts of the MLP. The embedding and the head
are not split.
"""

import contextlib
from dataclasses import replace

import torch
import torch.distributed as dist
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from distributed.ranks import all_reduce, mesh
from distributed.shards import unshard
from kernels import packing

# -----------------------------------------------------------------------------------------------------------
# the learner


def data_parallel(policy):
    """Wrap the policy in DDP: the last backward pass of an update averages the gradients over all ranks."""
    learner = DistributedDataParallel(policy, gradient_as_bucket_view=True)
    # The policy's only buffer is constant. Set as an attribute, because torch 2.13 renamed the argument.
    learner.broadcast_buffers = False
    return learner


def shard_mesh(device, ranks):
    """The mesh over which `shard` splits a model into `ranks` shards. Every rank has to call it."""
    grid = mesh(device, ("replicate", "shard"), ranks)
    return grid if grid.size(0) > 1 else grid["shard"]


def shard(model, grid, *, device, compute_dtype, offload=False):
    """Split each parameter of a model into shards of its rows, over `grid`, a `shard_mesh`.

    It does not communicate, and the model may still be on the meta device. The model computes in
    compute_dtype; gradients are averaged in fp32. With `offload`, shards, gradients and moments are in host
    memory, and the optimizer runs there. Returns the device that the shards must be on.
    """
    options = dict(
        mesh=grid,
        mp_policy=MixedPrecisionPolicy(
            param_dtype=compute_dtype,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,  # x is in compute_dtype already; cos and sin must stay in fp32
        ),
        # The root too: by default it would stay gathered after a forward pass without a backward pass.
        reshard_after_forward=True,
        offload_policy=CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload else OffloadPolicy(),
    )
    # The head is sharded with the root, whose forward uses its weight without calling it. So is a tied
    # embedding.
    embedding = () if model.config.tie_word_embeddings else (model.embed_tokens,)
    for unit in (*embedding, *model.layers, model):
        fully_shard(unit, **options)
    return torch.device("cpu") if offload else device


def mixed_precision(device, sharded):
    """A context for forward passes of the fp32 policy, in which a GPU computes in bf16; shards do anyway."""
    enabled = device.type == "cuda" and not sharded
    # No weight cache: it would keep bf16 copies of all weights.
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled, cache_enabled=False)


def exchange_gradients(learner, is_last_pass):
    """A context for a forward and backward pass that decides whether ranks exchange gradients in it.

    FSDP does in every pass, since no rank has room for a whole gradient. DDP does in the last pass of an
    update. It also does in the first pass of a run, which makes gradients views of DDP's buckets; otherwise
    autograd would hold them a second time.
    """
    if not isinstance(learner, DistributedDataParallel) or is_last_pass:
        return contextlib.nullcontext()
    has_gradients = next(learner.parameters()).grad is not None
    return learner.no_sync() if has_gradients else contextlib.nullcontext()


def micro_batches(rollout, rows, budget):
    """Split this rank's `rows` of a rollout into micro-batches: yields (Rollout, mask [B, R], is_last).

    Ranks may have different numbers of micro-batches, or none, but have to make the same number of backward
    passes. A rank with fewer pads them with its shortest row, all of it masked.
    """
    batches = packing.split_by_tokens(rollout, rows.tolist(), budget)
    passes = int(all_reduce({"passes": len(batches)}, dist.ReduceOp.MAX)["passes"])
    shortest = int((rollout.prompt_length + rollout.response_length).argmin())
    for index in range(passes):
        is_real = index < len(batches)
        micro_batch = rollout[torch.tensor(batches[index] if is_real else [shortest])]
        yield micro_batch, micro_batch.mask() & is_real, index == passes - 1


def clip_gradients(policy, largest):
    """Scale all gradients so that their norm is at most `largest`; returns the norm before scaling."""
    norm = unshard(torch.nn.utils.clip_grad_norm_(policy.parameters(), largest))
    return packing.to_host(norm)[0]


# ----------------------------------------------------------------------------------------------------------
# the sampler


def sampler_group(device, ranks):
    """The process group of `ranks` neighbouring ranks that decode together; None if each decodes alone."""
    return mesh(device, ("group", "heads"), ranks)["heads"].get_group() if ranks > 1 else None


def rank_config(config, group):
    """The config of one rank's part of a sampler, with its number of heads and its width of the MLP."""
    ranks = 1 if group is None else group.size()
    return replace(
        config,
        heads=config.heads // ranks,
        kv_heads=config.kv_heads // ranks,
        intermediate_size=config.intermediate_size // ranks,
    )


def rank_weight(config, name, tensor, group):
    """This rank's part, for a model of `rank_config`, of a parameter of the whole model with `config`.

    q, k and v are stacked in one matrix, gate and up in another: each is split, and the parts are stacked.
    """
    if group is None:
        return tensor
    rank, ranks = group.rank(), group.size()
    *_, module, kind = name.split(".")
    if module in ("o_proj", "down_proj"):
        # Inputs are split and outputs are summed over the ranks, so only the first rank adds the bias.
        return tensor.chunk(ranks, 1)[rank] if kind == "weight" else tensor * (rank == 0)
    q_rows, kv_rows = config.heads * config.head_dim, config.kv_heads * config.head_dim
    stacked = {"qkv_proj": [q_rows, kv_rows, kv_rows], "gate_up_proj": [config.intermediate_size] * 2}
    if module not in stacked:
        return tensor
    return torch.cat([rows.chunk(ranks)[rank] for rows in tensor.split(stacked[module])])


def sum_over(group, x):
    """The sum of x over the ranks of a group; x itself without a group."""
    if group is None:
        return x
    x = x.contiguous()
    dist.all_reduce(x, group=group)
    return x


def same_on_all(group, x):
    """Broadcast x of the group's first rank in place, so that rounding cannot make its ranks sample apart."""
    if group is not None:
        dist.broadcast(x, group=group, group_src=0)
    return x
