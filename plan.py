"""What a run is going to do and to hold: steps, updates, responses, bytes by part; refused if it cannot fit.

All of it is arithmetic on the settings and on config.json: no weight has been read when the plan is printed.
"""

import math
import os
import platform
import resource
from pathlib import Path
from typing import NamedTuple

import torch

from model import Transformer
from support.config import LOWER_TEMPERATURES, differences
from support.ranks import print0, world_size

# -----------------------------------------------------------------------------------------------------------
# work


def steps_per_epoch(c, question_count):
    return math.ceil(question_count / c.questions_per_step)


def planned_updates(c, question_count, steps):
    """Optimizer updates in the first `steps` steps. The last step of an epoch may have fewer questions.

    >>> from support.config import Config
    >>> planned_updates(Config(questions_per_step=8, questions_per_update=2), question_count=10, steps=3)
    9
    """
    epochs, rest = divmod(steps, steps_per_epoch(c, question_count))
    full, last = divmod(question_count, c.questions_per_step)
    per_step = math.ceil(c.questions_per_step / c.questions_per_update)
    per_epoch = full * per_step + math.ceil(last / c.questions_per_update)
    return epochs * per_epoch + rest * per_step


def planned_responses(c, question_count, eval_question_count):
    """Responses that the whole run samples, {"train": ..., "eval": ...}."""
    steps = c.epochs * steps_per_epoch(c, question_count)
    evaluations = 2 + (steps - 1) // c.eval_every  # before the first step, after the last, and between
    responses = evaluations * c.eval_samples
    for samples, temperature, top_p in LOWER_TEMPERATURES.values():
        if (temperature, top_p) != (c.eval_temperature, c.eval_top_p):
            responses += 2 * samples
    return {"train": c.epochs * question_count * c.votes, "eval": responses * eval_question_count}


# ----------------------------------------------------------------------------------------------------------
# bytes


class Split(NamedTuple):
    """What ranks share out beside the rows."""

    shard: int = 1  # ranks that hold one set of weights, gradients and moments; 1 is DDP
    sampler_ranks: int = 1  # ranks that hold one sampler
    offload: bool = False  # the set lies in host memory

    @property
    def in_slices(self):
        return self.shard > 1 or self.offload


def choose_split(c):
    """The split of the flags; where they are silent, the smallest that fits."""
    return Split(c.shard or 1, c.sampler_ranks or 1, bool(c.offload))


def memory_parts(c, model_config, cuda):
    """(number of parameters, {part: bytes of it on each rank}); keys, values and activations come on top."""
    with torch.device("meta"):
        model = Transformer(model_config)
    count = sum(p.numel() for p in model.parameters())
    block = sum(p.numel() for p in model.layers[0].parameters())
    half = 2 if cuda else 4  # bytes of a number in compute precision
    if c.eval_only:
        return count, {"weights": half * count}
    parts = {"weights": 4 * count, "gradients": 4 * count, "moments": 8 * count}  # fp32
    parts["head's gradient"] = 4 * model.lm_head.weight.numel()  # one micro-batch's, before it is added
    if cuda:
        kept = (
            1 if c.checkpointing else len(model.layers)
        )  # blocks whose bf16 copies wait for the backward pass
        parts["sampler"] = half * count
        parts["autocast"] = half * kept * block
    if c.kl > 0:
        parts["reference"] = half * count
    return count, parts


def kv_bytes(model_config, cuda):
    """Bytes of the keys and values of a token."""
    return 2 * model_config.layers * model_config.kv_heads * model_config.head_dim * (2 if cuda else 4)


def activation_bytes(model_config, checkpointing):
    """Bytes that learning holds per token.

    Each layer keeps about 16 widths and 5 MLP widths; with checkpointing one width, and all of one layer.
    """
    layer = 4 * (16 * model_config.hidden_size + 5 * model_config.intermediate_size)
    if checkpointing:
        return model_config.layers * 4 * model_config.hidden_size + layer
    return model_config.layers * layer


def usable_memory(device):
    """Bytes that this rank may use: a share of the machine's total, so that a restart gets the same."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
    else:
        total = physical_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return int(0.9 * total)


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


def peak_memory_gb():
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def budgets(c, model_config, device, longest):
    """How many tokens the sampler may hold and a micro-batch may have: (rollout_tokens, micro_batch_tokens).

    longest: tokens of the longest prompt and response. Raises ValueError, with the bytes, if nothing fits.
    """
    cuda = device.type == "cuda"
    usable = usable_memory(device)
    _, parts = memory_parts(c, model_config, cuda)
    row = longest * kv_bytes(model_config, cuda) + 4 * model_config.vocab_size  # and its logits in fp32
    available = usable - sum(parts.values())
    if available < 8 * row:
        raise ValueError(
            f"{c.model} does not fit: each rank needs {sum(parts.values()) / 1e9:.1f} GB ({listed(parts)}) "
            f"and {8 * row / 1e9:.2f} GB to sample eight rows, and has {usable / 1e9:.1f} GB"
        )
    bytes_for_sampling = available // 2
    rollout_tokens = c.rollout_tokens or bytes_for_sampling // row * longest
    if rollout_tokens < longest:
        raise ValueError(
            f"--rollout-tokens {rollout_tokens}: must be at least {longest}, "
            "the tokens of the longest prompt and response"
        )
    # A CPU is at full speed with a thousand tokens or a gigabyte of activations; more only takes memory.
    largest, room = (32768, available // 4) if cuda else (1024, min(available // 4, 10**9))
    affordable = room // activation_bytes(model_config, c.checkpointing)
    return rollout_tokens, c.micro_batch_tokens or max(longest, min(largest, affordable))


def listed(parts):
    return ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items())


# ----------------------------------------------------------------------------------------------------------
# what is printed


def print_plan(run, model_config, device, given, shown_prompt):
    """What is going to happen, on rank 0."""
    c, questions = run.config, len(run.train_set)
    count, parts = memory_parts(c, model_config, device.type == "cuda")
    responses = planned_responses(c, questions, len(run.eval_set))
    share = responses["eval"] / sum(responses.values())
    steps = c.epochs * steps_per_epoch(c, questions)
    print0(
        f"model    {c.model}: {count / 1e6:.1f} M parameters, {sum(parts.values()) / 1e9:.2f} GB per rank "
        f"({listed(parts)})",
        f"ranks    {world_size()} on {device.type}, {torch.get_num_threads()} threads each",
        f"data     {c.data}: {questions} questions, prompts up to {run.longest - c.max_new_tokens} tokens",
        f"plan     {c.epochs} epochs, {steps} steps of {c.questions_per_step} questions x {c.votes} votes at "
        f"temperature {c.temperature}; {c.samples} are trained on, rewarded by {c.reward}",
        f"sampling {sum(responses.values()):,} responses, {share:.0%} of them for evaluation "
        f"(--eval-every {c.eval_every}, --eval-samples {c.eval_samples})",
        f"prompt   {shown_prompt}",
        f"memory   sampler up to {run.rollout_tokens:,} tokens, micro-batches {run.micro_batch_tokens:,}",
        *(f"differs  {line}" for line in differences(c, given)),
        f"out      {c.out}",
    )
