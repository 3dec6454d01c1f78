"""What a run is going to do: steps, updates, responses, the least hours it takes, and what it prints of that.

All of it is arithmetic on the settings and on config.json: no weight has been read when the plan is printed.
"""

import dataclasses
import math
import platform
import resource

import torch

from distributed.memory import (
    USABLE,
    count_parameters,
    enough_rows,
    kv_bytes,
    listed,
    smallest_that_fits,
    split_flags,
)
from distributed.ranks import print0
from support.config import LOWER_TEMPERATURES, differences

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


def most_rows(c, eval_question_count):
    """Rows of the largest rollout, in training or evaluation, over all ranks."""
    return max(c.questions_per_step * c.votes, eval_question_count * c.eval_samples)


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
# time


def least_hours(c, model_config, machine, layout, prompt_tokens, responses):
    """{"sampling", "evaluation", "learning"}: hours by a roofline (Williams et al. 2009), or None for a CPU.

    What the vendor's peaks allow at best, if every response has --max-new-tokens. Decoding a token reads the
    sampler's weights and the keys and values of its rows, and computes 2 operations per weight and row;
    learning computes 6 per weight and token, 2 more with checkpointing and 2 for the reference. Exchange
    between ranks, voting and loading are left out. responses: as `planned_responses` counts them.
    """
    card = machine.card
    if card is None or not card.flops:
        return None
    context = prompt_tokens + c.max_new_tokens / 2  # on average
    rate = decoded_tokens_per_s(c, model_config, machine, layout, context)
    tokens = {name: count * c.max_new_tokens for name, count in responses.items()}
    trained = responses["train"] / c.votes * (c.samples * c.max_new_tokens + prompt_tokens)
    passes = 3 + layout.checkpointing + (c.kl > 0)  # a backward pass counts as two forward passes
    learning = trained * passes * forward_flops(model_config, context) / (card.flops * machine.ranks)
    seconds = {"sampling": tokens["train"] / rate, "evaluation": tokens["eval"] / rate, "learning": learning}
    return {name: value / 3600 for name, value in seconds.items()}


def decoded_tokens_per_s(c, model_config, machine, layout, context):
    """Tokens a second that all samplers decode at best, all of their slots filled."""
    n, card = layout.split.sampler_ranks, machine.card
    rows = min(layout.rows, math.ceil(c.questions_per_step * c.votes * n / machine.ranks))
    read = 2 * count_parameters(model_config, n).total + rows * context * kv_bytes(model_config, True, n)
    computed = rows * forward_flops(model_config, context) / n
    return rows * machine.ranks / n / max(read / card.bandwidth, computed / card.flops)


def forward_flops(model_config, context):
    """Operations of a forward pass per token: 2 per weight, and 2 per number of the keys and values read."""
    _, vocabulary, total = count_parameters(model_config)
    products = total if model_config.tie_word_embeddings else total - vocabulary  # an embedding is looked up
    attention = 2 * model_config.layers * model_config.heads * model_config.head_dim * context
    return 2 * (products + attention)


# ----------------------------------------------------------------------------------------------------------
# what is printed


def peak_memory_gb():
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def print_plan(run, model_config, machine, layout, given, shown_prompt):
    """What is going to happen, on rank 0."""
    c, questions = run.config, len(run.train_set)
    print0(
        f"model    {c.model}: {count_parameters(model_config).total / 1e6:,.1f} M parameters",
        f"ranks    {ranks_line(machine)}",
        f"data     {c.eval_data if c.eval_only else c.data}: {questions} questions, "
        f"prompts up to {run.longest - c.max_new_tokens} tokens",
        *(evaluation_lines(c) if c.eval_only else training_lines(run)),
        f"prompt   {shown_prompt}",
        *memory_lines(run, model_config, machine, layout),
        *(() if c.eval_only else time_lines(run, model_config, machine, layout)),
        *(f"differs  {line}" for line in differences(c, given)),
        f"out      {c.out}",
    )


def ranks_line(machine):
    if not machine.cuda:
        return f"{machine.ranks} on cpu, {torch.get_num_threads()} threads each"
    name = f" ({machine.card.name})" if machine.card else ""
    nodes = machine.ranks // machine.per_node
    return f"{machine.ranks} on cuda{name}" + (f", {machine.per_node} on each of {nodes} nodes" * (nodes > 1))


def training_lines(run):
    """Steps and responses."""
    c, questions = run.config, len(run.train_set)
    responses, steps = planned_responses(c, questions, len(run.eval_set)), steps_per_epoch(c, questions)
    share = responses["eval"] / sum(responses.values())
    return [
        f"plan     {c.epochs} epochs, {c.epochs * steps} steps of {c.questions_per_step} questions x "
        f"{c.votes} votes at temperature {c.temperature}; {c.samples} are trained on, rewarded by {c.reward}",
        f"sampling {sum(responses.values()):,} responses, {share:.0%} of them for evaluation "
        f"(--eval-every {c.eval_every}, --eval-samples {c.eval_samples})",
    ]


def evaluation_lines(c):
    """What --eval-only samples."""
    flags = c.eval_temperature, c.eval_top_p
    others = [f"{n} for {name}" for name, (n, *how) in LOWER_TEMPERATURES.items() if tuple(how) != flags]
    each = f"{c.eval_samples} responses to each question at temperature {flags[0]} and top-p {flags[1]}"
    return [f"plan     evaluation only: {', '.join([each, *others])}"]


def memory_lines(run, model_config, machine, layout):
    """A line for a CPU; for GPUs the split and a table of bytes by part."""
    c, longest = run.config, run.longest
    parts, used = layout.parts, sum(layout.parts.values())
    if not machine.cuda:
        learning = "" if c.eval_only else f", micro-batches {layout.micro_batch_tokens:,}"
        return [
            f"memory   {used / 1e9:.2f} GB per rank ({listed(parts)}), sampler up to "
            f"{layout.rollout_tokens:,} tokens{learning}"
        ]
    sizes = {name: parts.get(name, 0) + layout.rows * layout.row.get(name, 0) for name in parts | layout.row}
    sizes["free"] = machine.memory - sum(sizes.values())
    notes = {
        "state": "weights, gradients and two moments in fp32",
        "reference": "the initial weights in bf16",
        "sampler": "the weights in bf16",
        "unsharded": "weights, gradients and tiles of logits that are whole for a moment",
        "activations": f"of a micro-batch of {layout.micro_batch_tokens:,} tokens, {kept_line(c, layout)}",
        "prefill": "activations of the prompts that are read at once",
        "rows": f"keys and values of {layout.rows} rows of {longest:,} tokens",
        "logits": "of those rows in fp32, and the sampler's copy",
        "graphs": "CUDA graphs of decoding, and what they compute in",
        "free": f"of the {machine.memory / 1e9:.1f} GB that a rank may use; "
        f"{(1 / USABLE - 1) * machine.memory / 1e9:.1f} more are left to CUDA, NCCL and fragments",
    }
    table = [f"         {sizes[name] / 1e9:8.2f}  {name:12} {notes[name]}" for name in notes if name in sizes]
    flags = split_flags(layout.split._asdict())
    flags = flags["sampler_ranks"] if c.eval_only else " ".join(flags.values())
    host = host_lines(c, machine, layout) or offload_lines(run, model_config, machine, layout)
    return [f"memory   GB on each rank, {flags}", *table, *host]


def kept_line(c, layout):
    """With checkpointing or without, and why (memory.keeps_activations)."""
    if not layout.checkpointing:
        why = "they take at most a third of what is left"
    elif layout.split.offload:
        why = "fewer and larger ones copy less"
    else:
        why = "without it they would take over a third of what is left"
    if c.checkpointing is not None:
        why = "given"
    return f"with{'' if layout.checkpointing else 'out'} checkpointing: {why}"


def host_lines(c, machine, layout):
    """What lies in host memory, if anything does, and why."""
    if not layout.host:
        return []
    there = "" if machine.host is None else f" of {machine.host / 1e9:.0f} that may be used"
    why = "" if c.offload else "; chosen because nothing else fits, each update is slower"
    return [f"offload  {layout.host / 1e9:.0f} GB of host memory on each node{there}{why}"]


def offload_lines(run, model_config, machine, layout):
    """Where few rows fit without it: how many --offload would give, if more."""
    c, most = run.config, most_rows(run.config, len(run.eval_set))
    if c.eval_only or c.offload is not None or layout.rows_of_a_rank() >= enough_rows(machine, most):
        return []
    offloaded = dataclasses.replace(c, offload=True)
    other = smallest_that_fits(offloaded, model_config, machine, run.longest, most)
    if other is None or other.rows_of_a_rank() <= layout.rows_of_a_rank():
        return []
    return [
        f"offload  --offload would give {other.rows_of_a_rank():.0f} rows on each rank instead of "
        f"{layout.rows_of_a_rank():.0f}, with {other.host / 1e9:.0f} GB of host memory on each node; "
        "sampling would be faster, each update slower"
    ]


def time_lines(run, model_config, machine, layout):
    """Tokens, and the least hours; nothing for a CPU."""
    c, questions = run.config, len(run.train_set)
    responses = planned_responses(c, questions, len(run.eval_set))
    prompt_tokens = sum(map(len, run.train_prompts)) / questions
    hours = least_hours(c, model_config, machine, layout, prompt_tokens, responses)
    if not hours:
        return []
    step = c.questions_per_step * c.max_new_tokens / 1e6
    tokens = sum(responses.values()) * c.max_new_tokens / 1e6
    parts = ", ".join(f"{name} {value:.1f}" for name, value in hours.items())
    return [
        f"tokens   a step samples up to {step * c.votes:.2f} M and trains on {step * c.samples:.2f} M; "
        f"the run samples up to {tokens:,.0f} M, with evaluation",
        f"time     at least {sum(hours.values()):.1f} hours ({parts}) for so many, by the vendor's peaks of "
        f"{machine.card.name}: a bound, not a promise",
    ]
