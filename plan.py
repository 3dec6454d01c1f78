"""What a run is going to do and to hold: steps, updates, responses, bytes by part; refused if it cannot fit.

All of it is arithmetic on the settings and on config.json: no weight has been read when the plan is printed.
"""

import math
import platform
import resource

import torch

from memory import count_parameters, listed
from support.config import LOWER_TEMPERATURES, differences
from support.ranks import print0

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


def peak_memory_gb():
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


# ----------------------------------------------------------------------------------------------------------
# what is printed


def print_plan(run, model_config, machine, layout, given, shown_prompt):
    """What is going to happen, on rank 0."""
    c, questions, parts = run.config, len(run.train_set), layout.parts
    count, place = count_parameters(model_config).total, "cuda" if machine.cuda else "cpu"
    responses = planned_responses(c, questions, len(run.eval_set))
    share = responses["eval"] / sum(responses.values())
    steps = c.epochs * steps_per_epoch(c, questions)
    print0(
        f"model    {c.model}: {count / 1e6:.1f} M parameters, {sum(parts.values()) / 1e9:.2f} GB per rank "
        f"({listed(parts)})",
        f"ranks    {machine.ranks} on {place}, {torch.get_num_threads()} threads each",
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
