"""How one model is spread over ranks. Each rank samples and learns from rows of its own; what else is shared?

    nothing      DDP: each rank holds all weights, gradients and moments             data_parallel
    the learner  FSDP2: a rank holds shards of all three, and gathers layers         shard
    the sampler  tensor parallelism: a rank holds some heads and a part of the MLP   rank_config, ...

A model that fits gets DDP. `shard` keeps the same numbers in shards (ZeRO stage 3, arXiv 1910.02054): a
parameter is a DTensor, cut by the rows of its matrix, and whole again only while its layer computes. With
fewer shards than ranks there are several sets of shards, as DDP has several copies. A sampler over several
ranks is the same Transformer with fewer heads and a narrower MLP (Megatron-LM, arXiv 1909.08053): the ranks
of a group decode the same responses, and add up what their heads and their parts of the MLP found. Embedding
and head stay whole.
"""

import contextlib
from dataclasses import replace

import torch
import torch.distributed as dist
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from distributed.ranks import mesh

# -----------------------------------------------------------------------------------------------------------
# the learner


def data_parallel(policy):
    """The policy as DDP wraps it: the last backward pass of an update averages the gradients of all ranks."""
    learner = DistributedDataParallel(policy, gradient_as_bucket_view=True)
    # The policy's one buffer is a constant. An attribute, since torch 2.13 has renamed the argument.
    learner.broadcast_buffers = False
    return learner


def shard_mesh(device, ranks):
    """The mesh over which `shard` cuts models, each into `ranks` shards. Every rank has to ask."""
    grid = mesh(device, ("replicate", "shard"), ranks)
    return grid if grid.size(0) > 1 else grid["shard"]


def shard(model, grid, *, device, compute_dtype, offload=False):
    """Cut each parameter of a model into shards of rows, over `grid`, a `shard_mesh`. Exchanges nothing.

    The model may still be on the meta device. It computes in compute_dtype; gradients are averaged in fp32.
    With `offload`, shards, gradients and moments lie in host memory, and the optimizer works there. Returns
    the device on which the shards have to be.
    """
    options = dict(
        mesh=grid,
        mp_policy=MixedPrecisionPolicy(
            param_dtype=compute_dtype,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,  # x is in compute_dtype as it is; cos and sin have to stay in fp32
        ),
        # Also what stands outside of the layers: without a backward pass it would stay gathered.
        reshard_after_forward=True,
        offload_policy=CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload else OffloadPolicy(),
    )
    # The head belongs to the model, whose forward takes its weight without calling it. So does an embedding
    # that is the head's weight.
    embedding = () if model.config.tie_word_embeddings else (model.embed_tokens,)
    for unit in (*embedding, *model.layers, model):
        fully_shard(unit, **options)
    return torch.device("cpu") if offload else device


def exchange_gradients(learner, is_last_pass):
    """The context of a forward and backward pass: does it exchange gradients between the ranks?

    Shards do in every pass, as no rank has room for a whole gradient. DDP does in the last pass of an update.
    It also does in the very first of a run: that makes gradients views of DDP's buckets, where autograd would
    otherwise hold them a second time.
    """
    if not isinstance(learner, DistributedDataParallel) or is_last_pass:
        return contextlib.nullcontext()
    has_gradients = next(learner.parameters()).grad is not None
    return learner.no_sync() if has_gradients else contextlib.nullcontext()


# ----------------------------------------------------------------------------------------------------------
# the sampler


def sampler_group(device, ranks):
    """The group of `ranks` neighbouring ranks that decode together; None if each decodes alone."""
    return mesh(device, ("group", "heads"), ranks)["heads"].get_group() if ranks > 1 else None


def rank_config(config, group):
    """The config of one rank's part of a sampler: its heads, and its share of the MLP's width."""
    ranks = 1 if group is None else group.size()
    return replace(
        config,
        heads=config.heads // ranks,
        kv_heads=config.kv_heads // ranks,
        intermediate_size=config.intermediate_size // ranks,
    )


def rank_weight(config, name, tensor, group):
    """This rank's part of a parameter of the whole model with `config`, as the model of `rank_config` has it.

    q, k and v lie in one matrix, gate and up in another: each of them is cut, and its part stacked again.
    """
    if group is None:
        return tensor
    rank, ranks = group.rank(), group.size()
    *_, module, kind = name.split(".")
    if module in ("o_proj", "down_proj"):
        # Inputs are cut, outputs added up over the ranks: so the first rank alone adds the bias.
        return tensor.chunk(ranks, 1)[rank] if kind == "weight" else tensor * (rank == 0)
    q_rows, kv_rows = config.heads * config.head_dim, config.kv_heads * config.head_dim
    stacked = {"qkv_proj": [q_rows, kv_rows, kv_rows], "gate_up_proj": [config.intermediate_size] * 2}
    if module not in stacked:
        return tensor
    return torch.cat([rows.chunk(ranks)[rank] for rows in tensor.split(stacked[module])])


def sum_over(group, x):
    """The sum of x over the ranks of a group, the same on each; x itself without a group."""
    if group is None:
        return x
    x = x.contiguous()
    dist.all_reduce(x, group=group)
    return x


def same_on_all(group, x):
    """x of the group's first rank, in place. Rounding must not let the ranks of a group sample apart."""
    if group is not None:
        dist.broadcast(x, group=group, group_src=0)
    return x
