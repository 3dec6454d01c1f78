"""Decide the flags of memory that were not given: the layout with the least exchange that fits.

A layout is a Config in which --shard, --sampler-ranks, --offload, --checkpointing, --micro-batch-tokens and
--rollout-tokens have values. `choose_layout` tries them in order, and says what would help if none fits.
"""

import dataclasses
import itertools
import math
from typing import NamedTuple

from distributed.machine import Machine
from distributed.memory import memory_parts, row_bytes
from support.config import Config, flags
from support.gpus import NODE

FEWEST_ROWS = 8  # sampled at once; with fewer a run does not start
ENOUGH_ROWS = 32  # per rank; more rows than these do not justify more communication
# Tokens of a micro-batch: more only takes memory. Without checkpointing it should have at least FEWEST_KEPT,
# which keep a GPU busy, and more than MOST_KEPT gain nothing.
MOST_TOKENS, MOST_TOKENS_CPU = 32768, 1024
FEWEST_KEPT, MOST_KEPT = 4096, 8192


class Job(NamedTuple):
    """What has to fit where. In the Config, None is left to decide."""

    config: Config
    model_config: object
    machine: Machine
    prompt_tokens: int  # of the longest prompt
    most_rows: int  # of the largest rollout, over all ranks

    @property
    def longest(self):
        """Tokens of the longest prompt and response."""
        return self.prompt_tokens + self.config.max_new_tokens

    @property
    def enough_rows(self):
        """Rows that each rank should sample at once: ENOUGH_ROWS, or all that it has."""
        return min(ENOUGH_ROWS, math.ceil(self.most_rows / self.machine.ranks))

    def changed(self, **values):
        """The same with other flags."""
        return self._replace(config=dataclasses.replace(self.config, **values))

    def parts(self, tokens):
        """{part: bytes} with micro-batches of `tokens`."""
        return memory_parts(self.config, self.model_config, self.machine.cuda, tokens)

    def left(self, tokens):
        """Bytes of a rank's memory that no part takes; may be negative."""
        parts = self.parts(tokens)
        return self.machine.memory - sum(parts.values()) + parts.get("host", 0)


class Layout(NamedTuple):
    """A Config with all flags of memory decided, and what it takes."""

    config: Config
    parts: dict  # {part: bytes on each rank}, activations included
    host: int  # bytes of host memory on each node
    row: dict  # {part: bytes of a row on each rank}, as long as the longest
    rows: int  # that a sampler holds at once
    missing: int  # bytes that each rank lacks to sample FEWEST_ROWS

    def fits(self, machine):
        return not self.missing and (machine.host is None or self.host <= machine.host)

    def rows_of_a_rank(self):
        return self.rows / self.config.sampler_ranks


def choose_layout(job):
    """The Layout that the flags ask for; what they leave open gets the least communication that fits.

    Raises ValueError for flags that cannot work, and if nothing fits, with the bytes and the smallest changes
    that would make it fit.
    """
    check_flags(job)
    layout = first_that_fits(job)
    if layout is None:
        raise ValueError(refusal(job))
    return layout


def first_that_fits(job):
    """The first Layout with enough rows per rank; else the fitting one with the most rows; else None.

    Offload is tried only if nothing fits without it.
    """
    best = None
    for layout in layouts(job):
        if best and layout.config.offload > best.config.offload:
            break
        if not layout.fits(job.machine):
            continue
        if layout.rows_of_a_rank() >= job.enough_rows:
            return layout
        if best is None or layout.rows_of_a_rank() > best.rows_of_a_rank():
            best = layout
    return best


def layouts(job):
    """The Layouts to try, the least exchange first.

    A state over the ranks of a node comes before one over several nodes, a whole sampler before one over
    several ranks, few shards before many. Offload comes last, with at least a node's ranks sharing a state:
    each copy of it would take the node's memory again.
    """
    c, machine, model = job.config, job.machine, job.model_config
    per_node = machine.per_node
    counts = [n for n in range(1, machine.ranks + 1) if machine.ranks % n == 0]
    shards = [n for n in counts if per_node % n == 0 or n % per_node == 0]
    samplers = [n for n in counts if per_node % n == model.kv_heads % n == model.intermediate_size % n == 0]
    offloads = [False, True] if machine.cuda else [False]
    if c.eval_only:
        shards, offloads = [1], [False]
    tried = itertools.product(
        offloads if c.offload is None else [c.offload],
        [c.shard] if c.shard else shards,
        [c.sampler_ranks] if c.sampler_ranks else samplers,
    )
    for offload, shard, sampler_ranks in sorted(
        tried, key=lambda t: (t[0], -(-t[1] // per_node), t[2], t[1])
    ):
        if c.shard or shard >= per_node or not offload:
            yield lay_out(job.changed(shard=shard, sampler_ranks=sampler_ranks, offload=offload))


def lay_out(job):
    """The Layout of a job that says what is sharded, split and offloaded."""
    job = decide_learning(job)
    c, machine = job.config, job.machine
    parts = job.parts(max(c.micro_batch_tokens, job.longest))  # at least one row
    host = machine.per_node * parts.pop("host", 0)
    left = machine.memory - sum(parts.values())
    if not machine.cuda:
        left //= 2  # other programs use this memory too
    row = row_bytes(c, job.model_config, machine.cuda, job.longest)
    of_row = sum(row.values())
    if c.rollout_tokens:
        rows = c.rollout_tokens // job.longest
        missing = min(FEWEST_ROWS, rows) * of_row - left
    else:
        rows = max(0, left // of_row)
        missing = FEWEST_ROWS * of_row - left
        c = dataclasses.replace(c, rollout_tokens=rows * job.longest)
    return Layout(c, parts, host, row, rows, max(0, missing))


def decide_learning(job):
    """The job with --checkpointing and --micro-batch-tokens, from the memory that is left.

    Without checkpointing, learning takes a quarter less time. It is off if the activations of a micro-batch
    that keeps the GPU busy, or of the longest row, take at most a third of the memory left, so that sampling
    keeps most of its rows. With offload it is on: each micro-batch copies all weights, so a few large ones
    are better.

    A micro-batch may take a quarter of the memory left, without checkpointing a third. A GB keeps a CPU busy.
    """
    c, cuda = job.config, job.machine.cuda
    if c.eval_only:
        return job.changed(
            checkpointing=bool(c.checkpointing), micro_batch_tokens=c.micro_batch_tokens or job.longest
        )
    if c.checkpointing is None:
        kept = job.changed(checkpointing=False)
        left, tokens = kept.left(0), max(job.longest, c.micro_batch_tokens or FEWEST_KEPT)
        off = not cuda or (not c.offload and left - kept.left(tokens) <= left // 3)
        job = job.changed(checkpointing=not off)
    if c.micro_batch_tokens:
        return job
    left = job.left(0)
    of_token = (left - job.left(10**6)) // 10**6
    if not cuda:
        room, most = min(left // 4, 10**9), MOST_TOKENS_CPU
    elif job.config.checkpointing:
        room, most = left // 4, MOST_TOKENS
    else:
        room, most = left // 3, MOST_KEPT
    return job.changed(micro_batch_tokens=max(job.longest, min(most, room // of_token)))


def check_flags(job):
    """Raise ValueError for flags of memory that do not go with these ranks, model or prompts."""
    c, machine, model = job.config, job.machine, job.model_config
    n = c.sampler_ranks or 1
    if machine.ranks % (c.shard or 1):
        raise ValueError(f"--shard {c.shard}: must divide the number of ranks, {machine.ranks}")
    if machine.per_node % n:
        raise ValueError(f"--sampler-ranks {n}: must divide the ranks of a node, {machine.per_node}")
    if model.kv_heads % n or model.intermediate_size % n:
        raise ValueError(
            f"--sampler-ranks {n}: must divide the key/value heads and the MLP width of {c.model}, "
            f"which are {model.kv_heads} and {model.intermediate_size}"
        )
    if c.rollout_tokens and c.rollout_tokens < job.longest:
        raise ValueError(
            f"--rollout-tokens {c.rollout_tokens}: must be at least {job.longest}, "
            "the tokens of the longest prompt and response"
        )


# -----------------------------------------------------------------------------------------------------------
# what would fit


def refusal(job):
    """Why nothing fits, in the layout that lacks least, and the smallest changes with which it would."""
    c = job.config
    flags, gpus, host, shorter = changes(job)
    flags, gpus, host = (first_change(job, jobs) for jobs in (flags, gpus, host))
    if c.offload and host:
        reason, host = f"it needs {host}", None
    else:
        short = [layout for layout in layouts(job) if layout.missing]
        nearest = min(short, key=lambda layout: layout.missing)
        reason = (
            f"each rank needs {sum(nearest.parts.values()) / 1e9:.1f} GB ({listed(nearest.parts)}) and "
            f"{FEWEST_ROWS * sum(nearest.row.values()) / 1e9:.2f} GB to sample eight rows, "
            f"and has {job.machine.memory / 1e9:.1f} GB"
        )
    would = flags or " or ".join(filter(None, (gpus, host))) or first_change(job, shorter)
    return f"{c.model} does not fit: {reason}" + (f"; it would fit with {would}" if would else "")


def listed(parts):
    return ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items())


def first_change(job, jobs):
    """What is different in the first of `jobs` that fits, in words; or None."""
    for changed in jobs:
        layout = first_that_fits(changed)
        if layout is None:
            continue
        before, after = dataclasses.asdict(job.config), dataclasses.asdict(changed.config)
        names = [name for name in before if before[name] != after[name]]
        if names:
            return flags(layout.config, names)
        count = changed.machine.ranks - job.machine.ranks
        if count:
            return f"{count} more GPU{'s' * (count > 1)}"
        needed = min(layout.host for layout in layouts(changed) if layout.host and not layout.missing)
        return (
            f"{needed / 1e9:.0f} GB of host memory on each node for --offload, "
            f"not {job.machine.host / 1e9:.0f}"
        )
    return None


def changes(job):
    """Jobs that take less or have more room, the smallest change first, in four lists.

    Without a flag of memory that was given (each alone, then all of them); with more GPUs, up to eight nodes;
    with as much host memory as --offload takes; with fewer --max-new-tokens.
    """
    c, machine = job.config, job.machine
    freed = {"checkpointing": True, "micro_batch_tokens": None, "shard": None, "sampler_ranks": None,
             "offload": None}  # fmt: skip
    given = {name: value for name, value in freed.items() if getattr(c, name) not in (value, None)}
    flags = [{name: value} for name, value in given.items()] + [given]
    gpus = [*range(1, NODE), *range(NODE, 8 * NODE + 1, NODE)] if machine.cuda else []
    machines = [machine._replace(ranks=n, per_node=min(n, NODE)) for n in gpus if n > machine.ranks]
    tokens = range((c.max_new_tokens - 1) // 256 * 256, 0, -256)
    return (
        [job.changed(**values) for values in flags],
        [job._replace(machine=larger) for larger in machines],
        [job._replace(machine=machine._replace(host=None))],
        [job.changed(max_new_tokens=n) for n in tokens],
    )
