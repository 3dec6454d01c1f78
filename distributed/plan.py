"""Print what a run is going to do: steps, responses, memory by part, and the least hours it takes.

All of it is arithmetic on the settings and on config.json: no weight has been read when the plan is printed.
"""

import contextlib
import math
import os
import shutil
from pathlib import Path

from distributed.checkpoint import nearest
from distributed.layout import first_that_fits, listed
from distributed.machine import USABLE
from distributed.memory import count_parameters, kv_bytes
from distributed.ranks import print0
from kernels import native
from support.config import differences, flags


def print_plan(inputs, job, layout, given, shown_prompt):
    """What is going to happen, on rank 0. given: the flags that the user set, {field: value}."""
    c, machine, count = job.config, job.machine, len(inputs.train_set)
    lines = [
        f"model    {c.model}: {count_parameters(job.model_config).total / 1e6:,.1f} M parameters",
        f"ranks    {ranks_line(machine)}",
        f"data     {c.eval_data if c.eval_only else c.data}: {count} questions, "
        f"prompts up to {job.prompt_tokens} tokens",
    ]
    if c.eval_only:
        work, time = [evaluation_line(c, len(inputs.eval_set))], []
    else:
        responses = planned_responses(inputs.schedule, len(inputs.eval_set))
        work = training_lines(c, inputs.schedule, responses)
        time = time_lines(job, layout, sum(map(len, inputs.train_prompts)) / count, responses)
    memory = memory_table(job, layout) if machine.cuda else memory_line(job, layout)
    differs = [f"differs  {line}" for line in differences(c, given)]
    print0(*lines, *work, f"prompt   {shown_prompt}", *memory, *time, *differs, f"out      {disk_line(job)}")


# ----------------------------------------------------------------------------------------------------------
# work


def ranks_line(machine):
    if not machine.cuda:
        return f"{machine.ranks} on cpu, {native.threads()} threads each"
    name = f" ({machine.card.name})" if machine.card else ""
    nodes = machine.ranks // machine.per_node
    return f"{machine.ranks} on cuda{name}" + (f", {machine.per_node} on each of {nodes} nodes" * (nodes > 1))


def planned_responses(schedule, eval_question_count):
    """Responses that the whole run samples, {"train": ..., "eval": ...}."""
    c = schedule.config
    evaluations = 2 + (schedule.steps - 1) // c.eval_every  # before the first step, after the last, between
    own, *others = (samples for samples, *_ in c.evaluations(lower_temperatures=True).values())
    responses = evaluations * own + 2 * sum(others)
    train = c.epochs * schedule.question_count * c.votes
    return {"train": train, "eval": responses * eval_question_count}


def training_lines(c, schedule, responses):
    """Steps and responses."""
    total = sum(responses.values())
    return [
        f"plan     {c.epochs} epochs, {schedule.steps} steps of {c.questions_per_step} questions x "
        f"{c.votes} votes at temperature {c.temperature}; {c.samples} are trained on, rewarded by {c.reward}",
        f"sampling {total:,} responses, {responses['eval'] / total:.0%} of them for evaluation "
        f"(--eval-every {c.eval_every}, --eval-samples {c.eval_samples})",
    ]


def evaluation_line(c, question_count):
    """What --eval-only samples."""
    return (
        f"plan     evaluation only: {question_count} questions x {c.eval_samples} responses = "
        f"{question_count * c.eval_samples:,}, at temperature {c.eval_temperature} and top-p {c.eval_top_p}"
    )


# ----------------------------------------------------------------------------------------------------------
# memory


def memory_line(job, layout):
    """On a CPU."""
    c, parts = layout.config, layout.parts
    learning = "" if c.eval_only else f", micro-batches {c.micro_batch_tokens:,}"
    return [
        f"memory   {sum(parts.values()) / 1e9:.2f} GB per rank of {job.machine.memory / 1e9:.1f} "
        f"({listed(parts)}), sampler up to "
        f"{c.rollout_tokens:,} tokens{learning}"
    ]


def memory_table(job, layout):
    """On GPUs: the flags of memory, bytes by part, and what lies in host memory."""
    c, memory, rows = layout.config, job.machine.memory, layout.rows
    parts, row = layout.parts, layout.row
    sizes = {name: parts.get(name, 0) + rows * row.get(name, 0) for name in parts | row}
    sizes["free"] = memory - sum(sizes.values())
    notes = {
        "state": "weights, gradients and two moments in fp32",
        "reference": "the initial weights in bf16",
        "sampler": "the weights in bf16",
        "unsharded": "weights, gradients and tiles of logits that are whole for a moment",
        "activations": f"of a micro-batch of {c.micro_batch_tokens:,} tokens, {checkpointing_note(job, c)}",
        "prefill": "activations of the prompts that are read at once",
        "rows": f"keys and values of {rows} rows of {job.longest:,} tokens",
        "logits": "of those rows in fp32, and the sampler's copy",
        "graphs": "CUDA graphs of decoding, and what they compute in",
        "free": f"of the {memory / 1e9:.1f} GB that a rank may use; "
        f"{(1 / USABLE - 1) * memory / 1e9:.1f} more are left to CUDA, NCCL and fragments",
    }
    table = [f"         {sizes[name] / 1e9:8.2f}  {name:12} {notes[name]}" for name in notes if name in sizes]
    chosen = flags(c, ["sampler_ranks"] if c.eval_only else ["shard", "sampler_ranks", "offload"])
    return [f"memory   GB on each rank, {chosen}", *table, *offload_lines(job, layout)]


def checkpointing_note(job, c):
    """With checkpointing or without, and why (layout.decide_learning)."""
    if job.config.checkpointing is not None:
        why = "given"
    elif not c.checkpointing:
        why = "they take at most a third of what is left"
    elif c.offload:
        why = "fewer and larger ones copy less"
    else:
        why = "without it they would take over a third of what is left"
    return f"with{'' if c.checkpointing else 'out'} checkpointing: {why}"


def offload_lines(job, layout):
    """What lies in host memory, and why; or, where few rows fit, what --offload would give."""
    c, host = job.config, job.machine.host
    if layout.host:
        there = "" if host is None else f" of {host / 1e9:.0f} that may be used"
        why = "" if c.offload else "; chosen because nothing else fits; updates are slower"
        return [f"offload  {layout.host / 1e9:.0f} GB of host memory on each node{there}{why}"]
    rows = layout.rows_of_a_rank()
    if c.eval_only or c.offload is not None or rows >= job.enough_rows:
        return []
    other = first_that_fits(job.changed(offload=True))
    if other is None or other.rows_of_a_rank() <= rows:
        return []
    return [
        f"offload  --offload would give {other.rows_of_a_rank():.0f} rows on each rank instead of "
        f"{rows:.0f}, with {other.host / 1e9:.0f} GB of host memory on each node; "
        "sampling would be faster, each update slower"
    ]


# ----------------------------------------------------------------------------------------------------------
# disk


def disk_line(job):
    """Where the run goes, and the bytes that it needs there. Raises ValueError if they are not free."""
    c = job.config
    if c.eval_only or c.gpus:
        return c.out
    out = Path(c.out).absolute()
    there = nearest(out)
    parameters = count_parameters(job.model_config).total
    needed = 2 * 12 * parameters + 4 * parameters  # two checkpoints: weights and two moments; the model
    held = 0
    with contextlib.suppress(OSError):  # another run may be at work there, which is refused later
        held = sum(file.stat().st_size for file in out.glob("checkpoint/step-*/*"))
    free = shutil.disk_usage(there).free
    if not os.access(there, os.W_OK | os.X_OK) or not there.is_dir():
        raise ValueError(f"--out {c.out}: cannot write in {there}")
    if needed > free + held:
        raise ValueError(
            f"--out {c.out}: two checkpoints and the model take {needed / 1e9:,.2f} GB, and {there} has "
            f"{free / 1e9:,.2f} free; make room, or choose another --out"
        )
    return f"{c.out}: two checkpoints and the model take {needed / 1e9:,.2f} GB of {free / 1e9:,.0f} free"


# ----------------------------------------------------------------------------------------------------------
# time


def time_lines(job, layout, prompt_tokens, responses):
    """Tokens, and the least hours; nothing for a CPU."""
    c = job.config
    hours = least_hours(job, layout, prompt_tokens, responses)
    if not hours:
        return []
    step = c.questions_per_step * c.max_new_tokens / 1e6
    tokens = sum(responses.values()) * c.max_new_tokens / 1e6
    parts = ", ".join(f"{name} {value:.1f}" for name, value in hours.items())
    return [
        f"tokens   a step samples up to {step * c.votes:.2f} M and trains on {step * c.samples:.2f} M; "
        f"the run samples up to {tokens:,.0f} M, with evaluation",
        f"time     at least {sum(hours.values()):.1f} hours ({parts}) for that many tokens, "
        f"by the vendor's peaks of {job.machine.card.name}: a bound, not a promise",
    ]


def least_hours(job, layout, prompt_tokens, responses):
    """{"sampling", "evaluation", "learning"}: hours by a roofline (Williams et al. 2009), or None for a CPU.

    What the vendor's peaks allow at best, if every response has --max-new-tokens. Decoding a token reads the
    sampler's weights and the keys and values of its rows, and computes 2 operations per weight and row;
    learning computes 6 per weight and token, 2 more with checkpointing and 2 for the reference. Exchange
    between ranks, voting and loading are left out. responses: as `planned_responses` counts them.
    """
    c, machine = layout.config, job.machine
    if machine.card is None or not machine.card.flops:
        return None
    context = prompt_tokens + c.max_new_tokens / 2  # on average
    rate = decoded_tokens_per_s(job, layout, context)
    tokens = {name: count * c.max_new_tokens for name, count in responses.items()}
    trained = responses["train"] / c.votes * (c.samples * c.max_new_tokens + prompt_tokens)
    passes = 3 + c.checkpointing + (c.kl > 0)  # a backward pass counts as two forward passes
    operations = trained * passes * forward_flops(job.model_config, context)
    learning = operations / (machine.card.flops * machine.ranks)
    seconds = {"sampling": tokens["train"] / rate, "evaluation": tokens["eval"] / rate, "learning": learning}
    return {name: value / 3600 for name, value in seconds.items()}


def decoded_tokens_per_s(job, layout, context):
    """Tokens a second that all samplers decode at best, all of their slots filled."""
    c, model, ranks, card = layout.config, job.model_config, job.machine.ranks, job.machine.card
    n = c.sampler_ranks
    rows = min(layout.rows, math.ceil(c.questions_per_step * c.votes * n / ranks))
    read = 2 * count_parameters(model, n).total + rows * context * kv_bytes(model, True, n)
    computed = rows * forward_flops(model, context) / n
    return rows * ranks / n / max(read / card.bandwidth, computed / card.flops)


def forward_flops(model_config, context):
    """Operations of a forward pass per token: 2 per weight, and 2 per number of the keys and values read."""
    _, vocabulary, total = count_parameters(model_config)
    products = total if model_config.tie_word_embeddings else total - vocabulary  # an embedding is looked up
    attention = 2 * model_config.layers * model_config.heads * model_config.head_dim * context
    return 2 * (products + attention)
