"""What a model takes in memory, how ranks may split it, and the smallest split that fits.

    state       fp32 weights, gradients and two moments: 16 bytes per parameter, over --shard ranks; with
                --offload in host memory
    sampler     bf16 copy of the weights, over --sampler-ranks ranks
    reference   bf16 copy, split as the state is
    unsharded   what learning makes whole for a moment: weights, the head's gradient, tiles of logits
    activations of a micro-batch
    rows        keys, values, logits and CUDA graphs of the rows that are sampled at once: the rest

All of it is arithmetic on config.json: no weight has been read. On a CPU every number is fp32, and the
sampler is the policy itself unless that is split.
"""

import dataclasses
import itertools
import os
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from distributed.ranks import all_reduce
from kernels.logprob import TILE
from kernels.packing import PREFILL_TOKENS
from support.config import LOWER_TEMPERATURES
from support.gpus import NODE, Card, card_called, parse_gpus

USABLE = 0.9  # of a GPU or of the host's memory; the rest is for CUDA, NCCL, fragments and other programs
FEWEST_ROWS = 8  # sampled at once; with fewer a run does not start
ENOUGH_ROWS = 32  # a rank; a larger split that gives no more than these is not worth its exchange
LARGEST_MICRO_BATCH = {True: 32768, False: 1024}  # tokens on a GPU, on a CPU: more only takes memory
# Tokens of a micro-batch without checkpointing: the fewest that keep a GPU busy, the most that gain anything.
KEPT_MICRO_BATCH = 4096, 8192
GRAPH_BYTES = 500_000  # of a CUDA graph, per layer; the logs of vLLM show 0.4 MB, for 16 and for 64 layers

# -----------------------------------------------------------------------------------------------------------
# the machine


class Machine(NamedTuple):
    """Where a run is planned; the same on every rank."""

    ranks: int
    per_node: int  # ranks of a node
    memory: int  # bytes that a rank may use: of its GPU, or of the host's memory its share
    host: int | None  # bytes of host memory that the ranks of a node may use; None: not known
    cuda: bool
    card: Card | None = None  # None: a CPU, or a GPU that is not in the table


def find_machine(c, device):
    """The Machine of all ranks, the smallest numbers of any; or the one of --gpus. Every rank has to ask.

    A dry run plans for the WORLD_SIZE and LOCAL_WORLD_SIZE that it is told, as torchrun names them.
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


# -----------------------------------------------------------------------------------------------------------
# bytes by part


class Split(NamedTuple):
    """What ranks share out beside the rows."""

    shard: int = 1  # ranks that hold one set of weights, gradients and moments; 1 is DDP
    sampler_ranks: int = 1  # ranks that hold one sampler
    offload: bool = False  # the set lies in host memory

    @property
    def sharded(self):
        return self.shard > 1 or self.offload


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


def memory_parts(c, model_config, split, cuda, tokens):
    """{part: bytes of it on each rank} with micro-batches of `tokens`; "host" is what offload moves there."""
    half, total = 2 if cuda else 4, count_parameters(model_config).total
    sampler = {"sampler": half * count_parameters(model_config, split.sampler_ranks).total}
    if cuda:
        sampler["graphs"] = 4 * graphs_bytes(c, model_config)  # of 1, 2, 4 and 8 rows
    if c.eval_only and cuda:
        computed, _ = layer_bytes(model_config, half)
        keys = 2 * kv_bytes(model_config, cuda, split.sampler_ranks)  # those of a prompt, and all stacked
        sampler["prefill"] = PREFILL_TOKENS * (computed + keys)  # learning takes more, at another time
    if c.eval_only:
        return sampler
    parts = {"state": 16 * total // split.shard}
    if c.kl > 0:
        parts["reference"] = half * total // split.shard
    if split.offload and cuda:
        parts = {"host": sum(parts.values())}
    if cuda or split != Split():
        parts |= sampler
    return parts | learning_bytes(model_config, split, c.checkpointing, cuda, tokens)


def learning_bytes(model_config, split, checkpointing, cuda, tokens):
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
    half, sharded = 2 if cuda else 4, split.sharded
    kept, layer = (tokens * size for size in layer_bytes(model_config, half))
    block, vocabulary, _ = count_parameters(model_config)
    matrices = 1 if model_config.tie_word_embeddings else 2
    at_head = at_layer = 4 * vocabulary
    if sharded:
        at_head = (matrices + 1) * half * vocabulary + 4 * vocabulary
        at_layer = (matrices + 1) * half * vocabulary + 4 * half * block
    elif cuda and not checkpointing:
        at_head = at_layer = 4 * vocabulary + half * model_config.layers * block
    if checkpointing:
        kept = (half if sharded else 4) * tokens * model_config.hidden_size
    if split.offload:  # fp32 shards on their way from the host and back
        at_head += 4 * vocabulary // split.shard
        at_layer += 8 * block // split.shard
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


def row_bytes(c, model_config, cuda, split, longest):
    """{"rows", "logits", "graphs"}: bytes of a row that is sampled, on each of the ranks of a sampler.

    On a GPU a step computes in the memory that its CUDA graphs share, which nothing else may use. There the
    logits lie in fp32, and once more as the sampler changes them.
    """
    keys = longest * kv_bytes(model_config, cuda, split.sampler_ranks)
    logits = 4 * model_config.vocab_size
    if not cuda:
        return {"rows": keys, "logits": logits}
    computed, _ = layer_bytes(model_config, 2)
    graphs = graphs_bytes(c, model_config) // 16  # above 8 rows their number is rounded up to 16
    return {"rows": keys, "logits": 2 * logits, "graphs": graphs + computed}


def graphs_bytes(c, model_config):
    """Bytes of the CUDA graphs of one number of rows: one for each way of sampling."""
    ways = {(c.temperature, 1.0), (c.eval_temperature, c.eval_top_p)}
    ways |= {(temperature, top_p) for _, temperature, top_p in LOWER_TEMPERATURES.values()}
    return len(ways) * model_config.layers * GRAPH_BYTES


# -----------------------------------------------------------------------------------------------------------
# what fits


class Layout(NamedTuple):
    """A split, and what it leaves room for."""

    split: Split
    parts: dict  # {part: bytes on each rank}, activations included
    host: int  # bytes of host memory on each node
    row: dict  # {part: bytes of a row on each rank}, as long as the longest
    rows: int  # that a sampler holds at once
    rollout_tokens: int  # the tokens of those rows
    micro_batch_tokens: int
    checkpointing: bool
    missing: int  # bytes that each rank lacks to sample FEWEST_ROWS

    def fits(self, machine):
        return not self.missing and (machine.host is None or self.host <= machine.host)

    def rows_of_a_rank(self):
        return self.rows / self.split.sampler_ranks


def lay_out(c, model_config, machine, split, longest):
    """The Layout of a split. longest: tokens of the longest prompt and response."""
    cuda = machine.cuda
    if c.checkpointing is None:
        checkpointing = cuda and not keeps_activations(c, model_config, machine, split, longest)
        c = dataclasses.replace(c, checkpointing=checkpointing)
    tokens = micro_batch_tokens(c, model_config, machine, split, longest)
    parts = memory_parts(c, model_config, split, cuda, max(tokens, longest))  # at least one row
    host = machine.per_node * parts.pop("host", 0)
    left = machine.memory - sum(parts.values())
    if not cuda:
        left //= 2  # other programs use this memory too
    row = row_bytes(c, model_config, cuda, split, longest)
    of_row = sum(row.values())
    rows = c.rollout_tokens // longest if c.rollout_tokens else max(0, left // of_row)
    needed = of_row * (min(FEWEST_ROWS, rows) if c.rollout_tokens else FEWEST_ROWS)
    rollout_tokens, missing = c.rollout_tokens or rows * longest, max(0, needed - left)
    return Layout(split, parts, host, row, rows, rollout_tokens, tokens, c.checkpointing, missing)


def keeps_activations(c, model_config, machine, split, longest):
    """Is checkpointing off where no flag decides it?

    Yes, if the activations of a micro-batch that keeps the GPU busy, or of the longest row, take at most a
    third of the memory that is left: learning takes a quarter less time, and sampling keeps most of its rows.
    No with offload: each micro-batch copies all weights, so a few large ones are better.
    """
    if c.eval_only or split.offload:
        return False
    c = dataclasses.replace(c, checkpointing=False)
    tokens = max(longest, c.micro_batch_tokens or KEPT_MICRO_BATCH[0])
    left = memory_left(c, model_config, machine, split, 0)
    return left - memory_left(c, model_config, machine, split, tokens) <= left // 3


def micro_batch_tokens(c, model_config, machine, split, longest):
    """--micro-batch-tokens, or what takes a quarter of the memory that is left; a GB keeps a CPU busy.

    On a GPU without checkpointing a third, as `keeps_activations` has it.
    """
    if c.micro_batch_tokens or c.eval_only:
        return c.micro_batch_tokens or longest
    left = memory_left(c, model_config, machine, split, 0)
    each = (left - memory_left(c, model_config, machine, split, 10**6)) // 10**6  # bytes
    room, most = left // 4, LARGEST_MICRO_BATCH[machine.cuda]
    if not machine.cuda:
        room = min(room, 10**9)
    elif not c.checkpointing:
        room, most = left // 3, KEPT_MICRO_BATCH[1]
    return max(longest, min(most, room // each))


def memory_left(c, model_config, machine, split, tokens):
    """Bytes of a rank's memory that no part takes, with micro-batches of `tokens`; may be negative."""
    parts = memory_parts(c, model_config, split, machine.cuda, tokens)
    return machine.memory - sum(size for part, size in parts.items() if part != "host")


def splits(c, model_config, machine):
    """The splits to try, the least exchange first.

    A state over the ranks of a node before one over several nodes, a whole sampler before a split one, few
    shards before many. Offload comes last, and splits the state over a node at least: what its ranks hold
    more than once takes its memory more than once.
    """
    per_node, heads, inner = machine.per_node, model_config.kv_heads, model_config.intermediate_size
    shards = [n for n in divisors(machine.ranks) if per_node % n == 0 or n % per_node == 0]
    samplers = [n for n in divisors(per_node) if heads % n == 0 == inner % n]
    offloads = [False, True] if machine.cuda else [False]
    if c.eval_only:
        shards, offloads = [1], [False]
    tried = itertools.product(
        [c.shard] if c.shard else shards,
        [c.sampler_ranks] if c.sampler_ranks else samplers,
        offloads if c.offload is None else [c.offload],
    )
    worth = [Split(*flags) for flags in tried if c.shard or flags[0] >= per_node or not flags[2]]
    return sorted(worth, key=lambda s: (s.offload, -(-s.shard // per_node), s.sampler_ranks, s.shard))


def divisors(number):
    return [n for n in range(1, number + 1) if number % n == 0]


def choose_layout(c, model_config, machine, longest, most_rows):
    """The Layout of the flags; where they are silent, of the smallest split that fits.

    most_rows: of the largest rollout, over all ranks. Raises ValueError for flags that cannot work, and if
    nothing fits, with the bytes and the smallest changes that would make it fit.
    """
    check_split(c, model_config, machine)
    if c.rollout_tokens and c.rollout_tokens < longest:
        raise ValueError(
            f"--rollout-tokens {c.rollout_tokens}: must be at least {longest}, "
            "the tokens of the longest prompt and response"
        )
    layout = smallest_that_fits(c, model_config, machine, longest, most_rows)
    if layout is None:
        raise ValueError(refusal(c, model_config, machine, longest, most_rows))
    return layout


def enough_rows(machine, most_rows):
    """Rows that each rank should sample at once: ENOUGH_ROWS, or all that it has."""
    return min(ENOUGH_ROWS, -(-most_rows // machine.ranks))


def smallest_that_fits(c, model_config, machine, longest, most_rows):
    """The Layout of the first split with room for ENOUGH_ROWS on each rank, or for all that the rank has.

    If none has that, the one with the most rows; with offload only where nothing else fits. None: no fit.
    """
    enough, best = enough_rows(machine, most_rows), None
    for split in splits(c, model_config, machine):
        if best and split.offload > best.split.offload:
            break
        layout = lay_out(c, model_config, machine, split, longest)
        if not layout.fits(machine):
            continue
        if layout.rows_of_a_rank() >= enough:
            return layout
        if best is None or layout.rows_of_a_rank() > best.rows_of_a_rank():
            best = layout
    return best


def check_split(c, model_config, machine):
    """Raise ValueError for a split that does not go with these ranks or this model."""
    n, per_node = c.sampler_ranks or 1, machine.per_node
    if machine.ranks % (c.shard or 1):
        raise ValueError(f"--shard {c.shard}: must divide the number of ranks, {machine.ranks}")
    if per_node % n:
        raise ValueError(f"--sampler-ranks {n}: must divide the ranks of a node, {per_node}")
    if model_config.kv_heads % n or model_config.intermediate_size % n:
        raise ValueError(
            f"--sampler-ranks {n}: must divide the key/value heads and the MLP width of {c.model}, "
            f"which are {model_config.kv_heads} and {model_config.intermediate_size}"
        )


# -----------------------------------------------------------------------------------------------------------
# what does not fit


def refusal(*where):
    """Why nothing fits, in the split that lacks least, and the smallest changes with which it would.

    where: c, model_config, machine, longest, most_rows, as all functions below.
    """
    c, model_config, machine, longest, _ = where
    tried = [lay_out(c, model_config, machine, split, longest) for split in splits(c, model_config, machine)]
    short = [layout for layout in tried if layout.missing]
    flags, host = other_flags(*where), more_host_memory(*where)
    would = [flags] if flags else [change for change in (more_gpus(*where), host) if change]
    if c.offload and host:
        reason, would = f"it needs {host}", [change for change in would if change != host]
    else:
        nearest = min(short, key=lambda layout: layout.missing)
        reason = (
            f"each rank needs {sum(nearest.parts.values()) / 1e9:.1f} GB ({listed(nearest.parts)}) and "
            f"{FEWEST_ROWS * sum(nearest.row.values()) / 1e9:.2f} GB to sample eight rows, "
            f"and has {machine.memory / 1e9:.1f} GB"
        )
    would = " or ".join(would) or shorter_responses(*where)
    return f"{c.model} does not fit: {reason}" + (f"; it would fit with {would}" if would else "")


def listed(parts):
    return ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items())


def other_flags(c, *where):
    """The flags of memory that were given and stand in the way, as they would fit: one, else all; or None."""
    flags = {"checkpointing": True, "micro_batch_tokens": None, "shard": None, "sampler_ranks": None,
             "offload": None}  # fmt: skip
    given = {name: value for name, value in flags.items() if getattr(c, name) not in (value, None)}
    for freed in (*({name: value} for name, value in given.items()), given):
        layout = smallest_that_fits(dataclasses.replace(c, **freed), *where)
        if layout:
            of_split = {name: value for name, value in layout.split._asdict().items() if name in freed}
            texts = {
                "checkpointing": "--checkpointing",
                "micro_batch_tokens": f"--micro-batch-tokens {layout.micro_batch_tokens}",
                **split_flags(of_split),
            }
            return " ".join(texts[name] for name in freed)
    return None


def split_flags(split):
    """{field: its flag} of a Split's fields.

    >>> " ".join(split_flags({"shard": 8, "offload": False}).values())
    '--shard 8 --no-offload'
    """
    texts = {}
    for name, value in split.items():
        flag = name.replace("_", "-")
        texts[name] = f"--{'' if value else 'no-'}{flag}" if isinstance(value, bool) else f"--{flag} {value}"
    return texts


def more_gpus(c, model_config, machine, *rest):
    """ "3 more GPUs", of the same kind, up to eight nodes; or None."""
    larger = [*range(machine.ranks + 1, NODE), *range(NODE, 8 * NODE + 1, NODE)] if machine.cuda else []
    for ranks in larger:
        more = machine._replace(ranks=ranks, per_node=min(ranks, NODE))
        if ranks > machine.ranks and smallest_that_fits(c, model_config, more, *rest):
            count = ranks - machine.ranks
            return f"{count} more GPU{'s' * (count > 1)}"
    return None


def more_host_memory(c, model_config, machine, longest, _):
    """What --offload would take if the host had it; or None."""
    tried = [lay_out(c, model_config, machine, split, longest) for split in splits(c, model_config, machine)]
    hosts = [layout.host for layout in tried if layout.host and not layout.missing]
    if not hosts:
        return None
    return (
        f"{min(hosts) / 1e9:.0f} GB of host memory on each node for --offload, not {machine.host / 1e9:.0f}"
    )


def shorter_responses(c, model_config, machine, longest, most_rows):
    """The largest --max-new-tokens that fits, a multiple of 256; or None."""
    for tokens in range((c.max_new_tokens - 1) // 256 * 256, 0, -256):
        shorter = longest - c.max_new_tokens + tokens
        if smallest_that_fits(c, model_config, machine, shorter, most_rows):
            return f"--max-new-tokens {tokens}"
    return None
