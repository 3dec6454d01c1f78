"""Out of memory in the middle of a run: the same work again with half of a budget.

    repeat_rollout   --rollout-tokens      rows sampled at once; a response does not depend on its neighbours
    repeat_update    --micro-batch-tokens  tokens of a backward pass; gradients of micro-batches are summed

A rank that fails alone cannot repeat what it does together with others, who wait for it in an exchange. It
ends with a sentence, and torchrun ends the others.
"""

import dataclasses
import gc
import sys
from collections import Counter

import torch
import torch.distributed as dist
from tqdm import tqdm

from distributed import parallel
from distributed.interrupts import asked, leave
from kernels.packing import padded_tokens
from support.config import flag_name


def repeat_rollout(run, generate, prompts, rows, *, stream, step, **options):
    """What rollout.generate returns, from as many rows at once as memory holds."""
    longest = max(len(prompts[question]) for question, _ in rows) + options["max_new_tokens"]
    when = f"step {step}" if stream == "train" else "an evaluation"

    def attempt():
        with run.rollout_bar(when, len(rows)) as bar:

            def watch(finished, tokens):
                bar.update(finished, tokens)
                return asked()

            budget = dict(engine=run.engine, budget_tokens=run.config.rollout_tokens, watch=watch)
            return generate(run.sampler, prompts, rows, stream=stream, step=step, **options, **budget)

    def sizes():
        if run.engine:
            return run.engine.slots * run.engine.capacity, run.engine.capacity
        return len(rows) * longest, longest

    def restart():
        if run.engine:
            old, run.engine = run.engine, None
            kind, fixed = type(old), (old.capacity, old.max_new_tokens, old.eos_ids)
            del old
            free()
            run.engine = kind(run.sampler, run.config.rollout_tokens // fixed[0], *fixed)

    return repeat(run, "rollout_tokens", when, attempt, sizes, restart, run.config.sampler_ranks == 1)


def repeat_update(run, accumulate, rollout, rows, advantage, tally, *, step):
    """Let accumulate(run, ...) make the gradients of a mini-batch, from micro-batches that memory holds."""
    sums, gaps, gap_max = Counter(tally.sums), Counter(tally.gaps), tally.gap_max

    def sizes():
        own = rows if len(rows) else torch.arange(len(rollout))
        longest = (rollout.prompt_length + rollout.response_length)[own].max()
        return padded_tokens(rollout, own), int(longest)

    def restart():
        tally.sums, tally.gaps, tally.gap_max = Counter(sums), Counter(gaps), gap_max
        run.learner = None  # DDP cannot begin anew in the middle of a backward pass
        run.optimizer.zero_grad()
        free()
        run.learner = parallel.data_parallel(run.policy)

    def attempt():
        accumulate(run, rollout, rows, advantage, tally)

    alone = dist.get_world_size() == 1 and not run.config.sharded
    repeat(run, "micro_batch_tokens", f"step {step}", attempt, sizes, restart, alone)


def repeat(run, field, when, attempt, sizes, restart, alone):
    """attempt(), after each failure with half of the budget `field` of run.config, down to a single row.

    sizes() tells how many tokens an endless budget would hold, and how many a row has; restart() undoes what
    a failed attempt left. A rank that does not work `alone` ends.
    """
    while True:
        try:
            return attempt()
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        # The error is gone here, and with it the tensors of the failed attempt.
        (most, row), flag = sizes(), flag_name(field)
        budget = min(getattr(run.config, field), most)
        less = max(budget // 2, row)
        if budget <= row:
            leave(1, f"out of memory in {when} with a single row; see docs/troubleshooting.md", alone=True)
        if not alone:
            why = f"out of memory in {when} with {flag} {budget}: rerun the same command with {flag} {less}"
            leave(1, why, alone=True)
        run.config = dataclasses.replace(run.config, **{field: less})
        restart()
        free()
        say(f"out of memory in {when}: {flag} {budget} -> {less}")


def is_out_of_memory(error):
    """Of a GPU, of Python, or of torch on a CPU."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def free():
    """Give back what nothing refers to any more."""
    gc.collect()
    torch.cuda.empty_cache()


def say(text):
    rank = dist.get_rank()
    tqdm.write(f"ttrl.py: {f'rank {rank}: ' if rank else ''}{text}", file=sys.stderr)
