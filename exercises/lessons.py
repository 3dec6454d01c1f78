"""Lessons 2 to 6: the real part in the place of each naive one of first_lesson.py, and what it gains.

    python exercises/lessons.py     # a few minutes on one core; prints the table of docs/lessons.md

Each lesson runs both parts on the same input and stops with an AssertionError unless their numbers are the
same. Seconds are CPU-seconds of one thread, bytes the most that torch held at a time beyond the input. For
ranks, both are those of the process that took most, and the bytes are all that it held.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
import weakref
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import ttrl  # noqa: E402
from exercises import first_lesson as naive  # noqa: E402
from kernels.logprob import linear_logprob  # noqa: E402
from kernels.sampler import row_keys, uniform  # noqa: E402
from model import Transformer  # noqa: E402
from rollout import generate  # noqa: E402
from support.pretrained import hf_tensors  # noqa: E402
from support.prompts import encode_prompt, load_tokenizer  # noqa: E402

FOLDER = ROOT / "tiny" / "model"
QUESTIONS, VOTES, MAX_NEW_TOKENS = 4, 16, 64
# Tokens, width and vocabulary of lesson 4: the embedded model's, and with a vocabulary like Llama 2's.
HEADS_OF_MODELS = {"331 words": (2048, 128, 331), "32,000 words": (2048, 128, 32_000)}
RANKS = """--votes 64 --samples 64 --questions-per-step 4 --questions-per-update 4 --epochs 1 --eval-samples 1
    --max-new-tokens 64""".split()
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def main():
    torch.set_num_threads(1)
    w, policy = load_file(FOLDER / "model.safetensors"), Transformer.from_pretrained(FOLDER)
    tokenizer, ends = load_tokenizer(FOLDER)
    asked = json.loads((ROOT / "tiny" / "questions.json").read_text())[:QUESTIONS]
    prompts = [encode_prompt(tokenizer, question["prompt"]) for question in asked]
    print("| lesson | part | CPU-seconds, naive | real | times | MB, naive | real |")
    print("|---|---|---|---|---|---|---|", flush=True)
    rollout = lesson_2_and_3(w, policy, prompts, ends)
    lesson_4()
    lesson_5(w, policy, prompts, rollout)
    lesson_6(asked)


# ----------------------------------------------------------------------------------------------------------
# the lessons


def lesson_2_and_3(w, policy, prompts, ends):
    """Sampling: without a cache; with a cache, a question at a time; all questions at a time. A Rollout."""
    options = dict(max_new_tokens=MAX_NEW_TOKENS, eos_ids=ends, seed=0, stream="train", step=1)

    def without_cache():
        return [naive.sample(w, prompt, numbers(i, options), ends) for i, prompt in enumerate(prompts)]

    def question_by_question():
        rows = [[(i, sample) for sample in range(VOTES)] for i in range(len(prompts))]
        return [generate(policy, prompts, some, **options) for some in rows]

    def all_at_once():
        return generate(policy, prompts, VOTES, **options)

    plain, cached, batched = measure(without_cache), measure(question_by_question), measure(all_at_once)
    for i, (tokens, length, logprob) in enumerate(plain.result):
        for rows in (cached.result[i], batched.result[batched.result.question == i]):
            for row, n in enumerate(length.tolist()):
                assert tokens[row, :n].tolist() == rows.response(row), "the tokens differ"
                assert close(logprob[row, :n], rows.logprob[row, :n]), "a log-probability differs"
    show("2", "KV cache", plain, cached)
    show("3", "batch and refill", cached, batched)
    return batched.result


def numbers(question, options):
    """The random numbers that `generate` uses, [R, N]: a hash of what each token is."""
    sample = torch.arange(VOTES)
    question = torch.full_like(sample, question)
    key = row_keys(options["seed"], options["stream"], options["step"], question, sample)
    return torch.stack([uniform(key, torch.full_like(key, position)) for position in range(MAX_NEW_TOKENS)])


def lesson_4():
    """The head: logits of all tokens and a log-softmax, or tiles of logits; forward and backward."""
    generator = torch.Generator().manual_seed(0)
    for name, (tokens, width, vocabulary) in HEADS_OF_MODELS.items():
        hidden = torch.randn(tokens, width, generator=generator).requires_grad_()
        weight = torch.randn(vocabulary, width, generator=generator).mul_(0.1).requires_grad_()
        targets = torch.randint(vocabulary, (tokens,), generator=generator)

        def plain(hidden=hidden, weight=weight, targets=targets):
            logprob = (hidden @ weight.T).log_softmax(-1)
            entropy = -(logprob.detach().exp() * logprob.detach()).sum(-1)
            logprob = logprob.gather(1, targets[:, None])[:, 0]
            return logprob.detach(), entropy, *torch.autograd.grad(logprob.sum(), (hidden, weight))

        def fused(hidden=hidden, weight=weight, targets=targets):
            logprob, entropy = linear_logprob(hidden, weight, targets)
            return logprob.detach(), entropy.detach(), *torch.autograd.grad(logprob.sum(), (hidden, weight))

        sides = measure(plain), measure(fused)
        for a, b in zip(*(side.result for side in sides), strict=True):
            assert close(a, b), "log-probability, entropy or a gradient differs"
        show("4", f"fused log-probability, {name}", *sides)


def lesson_5(w, policy, prompts, rollout):
    """The learner: the prompt in every row and padding behind, or each prompt once and no padding."""
    w = {name: weight.requires_grad_() for name, weight in w.items()}
    rows_of = [(rollout.question == i).nonzero()[:, 0] for i in range(len(prompts))]

    def padded(prompt, rows):
        start, width = len(prompt), int(rows.response_length.max())
        logprob = naive.response_logprob(w, prompt, rows.tokens[:, start : start + width])
        return logprob[rows.mask()].sum()

    def packed(prompt, rows):
        return policy(rows)[0].sum()

    def learn(loss_of, parameters):
        total = 0.0
        for parameter in parameters:
            parameter.grad = None
        for prompt, rows in zip(prompts, rows_of, strict=True):
            loss = loss_of(prompt, rollout[rows])
            loss.backward()
            total += loss.item()
        return total

    plain = measure(lambda: learn(padded, w.values()))
    real = measure(lambda: learn(packed, policy.parameters()))
    assert abs(plain.result - real.result) < 1e-5 * abs(plain.result), "the log-probabilities differ"
    gradients = hf_tensors(policy.config, {name: p.grad for name, p in policy.named_parameters()})
    assert all(close(w[name].grad, gradient) for name, gradient in gradients.items()), "a gradient differs"
    show("5", "packed prompts", plain, real)


def lesson_6(asked):
    """One process and two: the same weights after a step."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "asked.json"
        file.write_text(json.dumps(asked))
        one, two = (train(ranks, file, Path(folder) / f"{ranks}") for ranks in (1, 2))
    for name, weight in one.result.items():
        assert close(weight, two.result[name]), "the weights differ"
    show("6", "two ranks", one, two)


def train(ranks, file, out):
    """A step of ttrl.py on `ranks` processes: its weights, and the most seconds and bytes of a process."""
    launch = f"-m torch.distributed.run --standalone --local-addr 127.0.0.1 --nproc-per-node {ranks}".split()
    line = [sys.executable, *launch, __file__, "rank", "--data", file, "--out", out, *RANKS]
    subprocess.run(line, check=True, capture_output=True, env=ENVIRONMENT)
    seconds = max(float(path.read_text()) for path in out.glob("seconds-*"))
    size = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["train/peak_memory_gb"] * 1e9
    return Measured(load_file(out / "model" / "model.safetensors"), seconds, size)


def one_rank(arguments):
    """What each of those processes runs: ttrl.py, with a clock around its step."""
    untimed = ttrl.train_step

    def train_step(run, *others):
        start = time.process_time()
        result = untimed(run, *others)
        (Path(run.config.out) / f"seconds-{dist.get_rank()}").write_text(f"{time.process_time() - start}")
        return result

    ttrl.train_step = train_step
    ttrl.main(arguments)
    dist.destroy_process_group()


# ----------------------------------------------------------------------------------------------------------
# measured and shown


class Measured(NamedTuple):
    result: object
    seconds: float
    bytes: float


class Watch(TorchDispatchMode):
    """Counts the bytes of the tensors that operations create and that are still in use, and their peak."""

    def __init__(self):
        super().__init__()
        self.held = self.peak = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if has_storage(x)}
        for x in tree_leaves(result):
            # A view, or the result of an operation in place, has the storage of one of the arguments.
            if has_storage(x) and x.untyped_storage().data_ptr() not in given:
                storage = x.untyped_storage()
                self.add(storage.nbytes())
                weakref.finalize(storage, self.add, -storage.nbytes())
        return result

    def add(self, size):
        self.held += size
        self.peak = max(self.peak, self.held)


def has_storage(x):
    """A tensor, but not a sparse one: that consists of others, which have been counted."""
    return isinstance(x, torch.Tensor) and x.layout == torch.strided


def measure(action):
    """An action's result, CPU-seconds and peak memory. It runs twice: timed, then watched."""
    start = time.process_time()
    result = action()
    seconds = time.process_time() - start
    with Watch() as watch:
        action()
    return Measured(result, seconds, watch.peak)


def close(a, b, tolerance=1e-4):
    """Are two tensors equal up to the rounding of fp32?"""
    return bool((a - b).abs().max() <= tolerance * max(1.0, float(b.abs().max())))


def show(lesson, part, plain, real):
    times, sides = plain.seconds / real.seconds, (plain, real)
    seconds, sizes = [f"{x.seconds:.2f}" for x in sides], [f"{x.bytes / 1e6:.1f}" for x in sides]
    print("| " + " | ".join([lesson, part, *seconds, f"{times:.1f} x", *sizes]) + " |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["rank"]:
        one_rank(sys.argv[2:])
    else:
        main()
