"""Run ttrl.py with something broken: argv[1] is a folder, the rest are flags of ttrl.py.

RANKS_THAT_CANNOT_READ: those ranks fail to load the questions. BROKEN: the name of a function below, whose
fault is there from step FROM_STEP (1) on. Each rank leaves its last weights in the folder, rank-K.pt.
"""

import contextlib
import math
import os
import sys
from pathlib import Path

import fake_cuda
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import rollout
import ttrl
from model import Transformer
from support import questions

STEP = int(os.environ.get("FROM_STEP", 1))
LAST_RANK = int(os.environ.get("RANK", 0)) == int(os.environ.get("WORLD_SIZE", 1)) - 1


def norm(run):
    """Every gradient norm is nan."""
    torch.nn.utils.clip_grad_norm_ = lambda parameters, norm: torch.tensor(math.nan)


def weight(run):
    """A bit of a weight flips on all ranks: every logit is nan, and all responses are alike."""
    run.policy.norm.weight.data[0] = math.nan


def sampled(run):
    """A log-probability of the sampler is infinite, on the last rank only."""
    if LAST_RANK:
        change(ttrl, "generate", lambda rollout: rollout.logprob.view(-1)[:1].fill_(-math.inf))


def learned(run):
    """A log-probability of the learner is infinite, on the last rank only."""
    if LAST_RANK:
        change(run.learner, "forward", lambda output: output[0].data[0, :1].fill_(-math.inf))


def loss(run):
    """The loss is nan, on the last rank only."""
    if LAST_RANK:
        change(ttrl, "grpo_loss", lambda output: output[0].data.fill_(math.nan))


def gradient(run):
    """A number of a gradient is infinite, on the last rank only, before the ranks exchange theirs."""
    if LAST_RANK:
        run.policy.norm.weight.register_hook(lambda grad: grad.index_fill(0, torch.tensor([0]), math.inf))


def position(run):
    """The sampler's positions of response tokens are one too large for RoPE."""
    old, new = "backbone(token, position,", "backbone(token, position + 1,"
    fake_cuda.plant(pytest.MonkeyPatch(), rollout, "decode", old, new)


def slot(run):
    """The sampler writes the keys and values of a response over the last token of its prompt."""
    old, new = "num_generated - 1  # of that", "num_generated - 2  # of that"
    fake_cuda.plant(pytest.MonkeyPatch(), rollout.Engine, "step", old, new)


def half(run):
    """Nothing is broken: a sampler in bf16 beside a policy in fp32, as on a GPU."""
    run.sampler = Transformer.from_pretrained(run.folder, torch.bfloat16)
    run.refresh_sampler()


def one_answer(run):
    """Every response has the same answer."""
    ttrl.grading.extract_answer = lambda *_: "7"


def memory(run):
    """Decoding of more than 5 rows fails, and so do micro-batches of more than 4, on the last rank only."""
    if LAST_RANK:
        fail_above(5, 4)


def no_memory(run):
    """Not even a single row can be learned from."""
    fail_above(math.inf, 0)


def fail_above(decoded, learned):
    decode, forward = rollout.decode, Transformer.forward

    def failing_decode(model, cache, token, *rest):
        if len(token) > decoded:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return decode(model, cache, token, *rest)

    def failing_forward(self, rows, temperature):
        if len(rows) > learned:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")
        return forward(self, rows, temperature)

    rollout.decode, Transformer.forward = failing_decode, failing_forward


def change(owner, name, spoil):
    """Let spoil(result) change in place what a function returns."""
    function = getattr(owner, name)

    def spoiled(*arguments, **options):
        result = function(*arguments, **options)
        if torch.is_grad_enabled() or name == "generate":
            spoil(result)
        return result

    setattr(owner, name, spoiled)


def break_at(step, spoil, folder):
    """Let spoil(run) break a run before a step of it; returns what keeps the weights."""
    train_step, runs = ttrl.train_step, []

    def step_of_a_broken_run(run, number, labels):
        runs[:] = [run]
        if number == step:
            spoil(run)
        return train_step(run, number, labels)

    def keep():
        for run in runs:
            kept = {name: p.detach().clone() for name, p in run.policy.named_parameters()}
            torch.save(kept, Path(folder) / f"rank-{torch.distributed.get_rank()}.pt")

    ttrl.train_step = step_of_a_broken_run
    return keep


if __name__ == "__main__":
    failing, keep = os.environ.get("RANKS_THAT_CANNOT_READ", "").split(), contextlib.nullcontext
    if os.environ.get("RANK", "0") in failing:

        def load(name):
            raise OSError("the disk is gone")

        questions.load = load
    elif not failing:
        keep = break_at(STEP, globals()[os.environ.get("BROKEN", "norm")], sys.argv[1])
    try:
        ttrl.main(sys.argv[2:])
    finally:
        keep()
        torch.distributed.destroy_process_group()
