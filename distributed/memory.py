"""Bytes of memory by part, from the settings and config.json alone: no weight has been read.

    state       fp32 weights, gradients and two moments: 16 bytes per parameter, over --shard ranks; with
                --offload in host memory
    sampler     bf16 copy of the weights, over --sampler-ranks ranks
    reference   bf16 copy, sharded as the state is
    unsharded   what learning makes whole for a moment: weights, the head's gradient, tiles of logits
    activations of a micro-batch
    rows        keys, values, logits and CUDA graphs of the rows that are sampled at once: the rest

On a CPU every number is fp32, and the policy itself samples unless it is sharded. In all functions `c` is a
Config in which nothing of memory is left to decide (distributed/layout.py).
"""

from typing import NamedTuple

from kernels.logprob import TILE
from kernels.packing import PREFILL_TOKENS

GRAPH_BYTES = 500_000  # of a CUDA graph, per layer; the logs of vLLM show 0.4 MB, for 16 and for 64 layers


class Parameters(NamedTuple):
    """Numbers of parameters."""

    block: int  # of one
    vocabulary: int  # of the embedding, and of the head
    total: int


def count_parameters(model_config, sampler_ranks=1):
    """Parameters of the model, or of what one of `sampler_ranks` ranks samples with."""
    c, n = model_config, sampler_ranks
    width, heads, inner = c.hidden_size, c.heads // n * c.head_dim, c.intermediate_size // n
    qkv = heads + 2 * (c.kv_heads // n) * c.head_dim
    block = width * (qkv + heads + 3 * inner) + 2 * width  # and the two norms
    block += c.qkv_bias * qkv + c.o_bias * width + c.mlp_bias * (2 * inner + width)
    block += c.qk_norm * 2 * c.head_dim
    vocabulary = c.vocab_size * width
    matrices = 1 if c.tie_word_embeddings else 2
    return Parameters(block, vocabulary, c.layers * block + matrices * vocabulary + width)


def memory_parts(c, model_config, cuda, tokens):
    """{part: bytes on each rank} with micro-batches of `tokens`; "host" is what offload moves there."""
    half, total = 2 if cuda else 4, count_parameters(model_config).total
    sampler = {"sampler": half * count_parameters(model_config, c.sampler_ranks).total}
    if cuda:
        sampler["graphs"] = 4 * graphs_bytes(c, model_config)  # of 1, 2, 4 and 8 rows
    if c.eval_only and cuda:
        computed, _ = layer_bytes(model_config, half)
        keys = 2 * kv_bytes(model_config, cuda, c.sampler_ranks)  # those of a prompt, and all stacked
        sampler["prefill"] = PREFILL_TOKENS * (computed + keys)  # learning takes more, at another time
    if c.eval_only:
        return sampler
    parts = {"state": 16 * total // c.shard}
    if c.kl > 0:
        parts["reference"] = half * total // c.shard
    if c.offload and cuda:
        parts = {"host": sum(parts.values())}
    if cuda or c.sharded or c.sampler_ranks > 1:
        parts |= sampler
    return parts | learning_bytes(c, model_config, cuda, tokens)


def learning_bytes(c, model_config, cuda, tokens):
    """{"unsharded", "activations"}: the peak of a forward and backward pass.

    Autograd keeps `layer_bytes` of each layer, or with checkpointing one width, and of one layer what it
    takes at work. With autocast the residual stream is fp32, and the weights that each layer has cast are
    kept as well.

    There is a peak at each layer and one at the head: no layer is at work yet, but tiles of its logits and of
    their gradients are. The fp32 gradient of the head is whole at both; the bf16 copy of its weight, which
    is half of that, is gone before. In a sharded model weight and gradient of the head (and embedding) are
    whole, the gradient in fp32 too, and wait in half precision at each layer, where the weights and gradients
    of two layers are whole. Fitted to a simulation of learning (tests/test_plan.py).
    """
    half = 2 if cuda else 4
    kept, layer = (tokens * size for size in layer_bytes(model_config, half))
    block, vocabulary, _ = count_parameters(model_config)
    matrices = 1 if model_config.tie_word_embeddings else 2
    at_head = at_layer = 4 * vocabulary
    if c.sharded:
        at_head = (matrices + 1) * half * vocabulary + 4 * vocabulary
        at_layer = (matrices + 1) * half * vocabulary + 4 * half * block
    elif cuda and not c.checkpointing:
        at_head = at_layer = 4 * vocabulary + half * model_config.layers * block
    if c.checkpointing:
        kept = (half if c.sharded else 4) * tokens * model_config.hidden_size
    if c.offload:  # fp32 shards on their way from the host and back
        at_head += 4 * vocabulary // c.shard
        at_layer += 8 * block // c.shard
    if cuda:  # the tiles of a CPU are small
        rows, columns = min(tokens, TILE["cuda"][0]), TILE["cuda"][1]
        # logits in fp32 and their gradient in bf16; its products with weight and hidden states in fp32
        at_head += kept + rows * columns * 6 + 4 * (rows + columns) * model_config.hidden_size
    unsharded = max(at_layer, at_head - layer)
    return {"unsharded": unsharded, "activations": (model_config.layers - 1) * kept + layer}


def layer_bytes(model_config, half):
    """Bytes of a layer's activations per token: (what the forward pass leaves, its backward's peak)."""
    width, inner = model_config.hidden_size, model_config.intermediate_size
    norms = 5 * width if model_config.qk_norm else 0
    return half * (4 * inner + 10 * width + norms), half * (6 * inner + 14 * width + norms)


def kv_bytes(model_config, cuda, sampler_ranks=1):
    """Bytes of the keys and values of a token, on each of the ranks of a sampler."""
    kv_heads = model_config.kv_heads // sampler_ranks
    return 2 * model_config.layers * kv_heads * model_config.head_dim * (2 if cuda else 4)


def row_bytes(c, model_config, cuda, longest):
    """{"rows", "logits", "graphs"}: bytes of a sampled row of `longest` tokens, on each rank of a sampler.

    On a GPU a step computes in the memory that its CUDA graphs share, which nothing else may use. There the
    logits lie in fp32, and once more as the sampler changes them.
    """
    keys = longest * kv_bytes(model_config, cuda, c.sampler_ranks)
    logits = 4 * model_config.vocab_size
    if not cuda:
        return {"rows": keys, "logits": logits}
    computed, _ = layer_bytes(model_config, 2)
    graphs = graphs_bytes(c, model_config) // 16  # above 8 rows their number is rounded up to 16
    return {"rows": keys, "logits": 2 * logits, "graphs": graphs + computed}


def graphs_bytes(c, model_config):
    """Bytes of the CUDA graphs of one number of rows: one for each way of sampling."""
    evaluations = c.evaluations(lower_temperatures=not c.eval_only)
    ways = {(temperature, top_p) for _, temperature, top_p in evaluations.values()}
    ways.add((c.temperature, 1.0))
    return len(ways) * model_config.layers * GRAPH_BYTES
