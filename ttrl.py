r"""TTRL, Test-Time Reinforcement Learning (arXiv 2504.16084), from scratch: learning on questions without answers.

    python ttrl.py                                                    # the embedded tiny model, a few minutes on a CPU
    torchrun --nproc-per-node 8 ttrl.py --model Qwen2.5-Math-1.5B     # AIME 2024, as in the paper's quick start

One step of the loop (`train`, at the bottom of this file):

    draw       P questions                                    draw
    sample     N responses to each                            rollout.generate
    extract    the answer in each response, or None           grading.extract_answer
    vote       the most frequent answer is the pseudo-label   vote
    reward     1 for the responses that agree with it         vote
    advantage  (r - mean) / std over the first M of the N     advantages
    learn      clipped policy gradient on those M             grpo_loss, learn

What differs from the authors' code (PRIME-RL/TTRL at 3e2cc93), and why:
  - Answers are counted by mathematical value, not by spelling: 1/2 and 0.5 are one candidate.
  - A response without an answer never votes and is never rewarded (there, the empty answer could win the vote).
  - Ties go to the candidate seen first by sample index, and M of N are the first M: neither depends on the GPU count.
  - The loss is divided by the response tokens of the mini-batch over all ranks, not averaged over pairs of responses,
    so neither micro-batches nor the number of ranks change the update.
  - The learning rate moves once an update, and already at the first (there, once a rollout batch, the first at 0).
  - The last, smaller batch of an epoch is used, not dropped.
  - label_accuracy grades the label itself (there, the label is parsed as if it were a response and often lost).
"""

import argparse
import contextlib
import dataclasses
import datetime
import difflib
import hashlib
import importlib.util
import json
import math
import os
import platform
import resource
import shutil
import socket
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import transformers
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import checkpoint
import questions
import report
from engine import Engine
from model import ModelConfig, Transformer
from rollout import generate
from support import grading
from support.hub import TOKENIZER_FILES, fetch_weights
from support.pretrained import check_vocabulary
from support.prompts import decode_response, encode_prompt, load_tokenizer, show_prompt

# ----------------------------------------------------------------------------------------------------------------------
# Config: every field is a flag of the same name


def flag(default, text, choices=None):
    return dataclasses.field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True)
class Config:
    """The defaults are the paper's. None stands for a value that the model or the data decide, see `configure`."""

    model: str = flag(
        "tiny", "tiny, a folder in Hugging Face format, a hub id, or a bare name such as Qwen2.5-Math-1.5B"
    )
    data: str | None = flag(
        None,
        "tiny, aime, amc, math, math-l1 to math-l5, gpqa, or a .json/.jsonl file [tiny for tiny, else aime]",
    )
    votes: int = flag(64, "responses sampled per question")
    samples: int = flag(32, "of those, the first so many are trained on")
    questions_per_step: int | None = flag(None, "questions in one rollout batch [8; math: 32]")
    questions_per_update: int = flag(1, "questions in one optimizer update")
    epochs: int | None = flag(
        None, "passes over the questions [aime 80, amc 30, math 10, math-l* and gpqa 30, a file 10]"
    )
    max_prompt_tokens: int = flag(1024, "questions with longer prompts are listed and left out")
    max_new_tokens: int = flag(3072, "longest response; it is cut there")
    temperature: float | None = flag(
        None, "of sampling in training, and in the loss [1.0 for REASONING_MODELS and --thinking, else 0.6]"
    )
    template: str = flag(
        "auto", "auto: the tokenizer's chat template; none: the prompt is taken verbatim", ("auto", "none")
    )
    prompt_suffix: str = flag(
        "auto", "appended to each prompt; auto: asks for \\boxed{} where nothing else does; none: nothing"
    )
    thinking: bool = flag(False, "Qwen3's thinking switch")
    lr: float = flag(5e-7, "peak learning rate of AdamW, cosine decay to 0")
    warmup: float = flag(0.03, "share of the updates in which the learning rate rises")
    clip: float = flag(0.2, "clip range of the ratio")
    kl: float = flag(0.001, "weight of the k3 KL to the initial policy; 0 holds no reference model")
    weight_decay: float = flag(0.01, "of AdamW")
    grad_clip: float = flag(1.0, "largest gradient norm")
    reward: str = flag(
        "vote", "vote, or gold: trains on the true answers, the upper bound of the paper", ("vote", "gold")
    )
    eval_every: int = flag(
        2, "steps between evaluations; always also before the first step and after the last"
    )
    eval_samples: int = flag(16, "responses sampled per question in evaluation")
    eval_temperature: float = flag(0.6, "of sampling in evaluation; 0 is greedy")
    eval_top_p: float = flag(
        0.95, "nucleus sampling in evaluation (training always samples from the whole softmax)"
    )
    eval_data: str | None = flag(None, "evaluate on other questions than --data [the same]")
    eval_only: bool = flag(False, "evaluate and exit")
    rollout_tokens: int | None = flag(
        None, "tokens whose keys and values a rank's sampler may hold [by memory]"
    )
    micro_batch_tokens: int | None = flag(None, "tokens of a learner's micro-batch [by memory]")
    checkpointing: bool | None = flag(
        None, "gradient checkpointing: less memory, a third more time [on for CUDA]"
    )
    out: str | None = flag(None, "folder of the run; a run found there is resumed [runs/<model>-<data>]")
    seed: int = flag(0, "of sampling and of the order of the questions")
    device: str = flag("auto", "auto, cpu or cuda", ("auto", "cpu", "cuda"))
    save_every: int = flag(10, "steps between checkpoints")
    max_minutes: float | None = flag(None, "stop cleanly after so many minutes; the same command goes on")
    allow_changed_flags: bool = flag(False, "resume although flags differ from those of the checkpoint")
    dry_run: bool = flag(False, "print the plan and exit")
    wandb: bool = flag(False, "log to Weights & Biases too")


LOWER_TEMPERATURES = {
    "greedy": (1, 0.0, 1.0),
    "pass@1 at 0.6/0.95": (16, 0.6, 0.95),
}  # samples, temperature, top-p
TINY = dict(temperature=1.0, lr=5e-5, epochs=5, max_new_tokens=96, questions_per_update=2, kl=0.0,
            eval_every=8, eval_samples=64, eval_temperature=1.0, eval_top_p=1.0)  # fmt: skip
REASONING_MODELS = (
    "qwen2.5-math",
    "deepseek-r1",
    "skywork-or1",
)  # in the model's name: temperature 1.0, as in the paper
RESUME_MAY_CHANGE = {"out", "max_minutes", "allow_changed_flags", "dry_run", "wandb", "save_every"}


class Parser(argparse.ArgumentParser):
    def error(self, message):
        """One sentence, exit code 2; the usage of forty flags would bury it."""
        if message.startswith("unrecognized arguments: "):
            name = message.split()[2]
            close = difflib.get_close_matches(name, self._option_string_actions, n=1)
            message = f"unknown flag {name}" + (
                f", did you mean {close[0]}?" if close else "; --help lists them all"
            )
        self.exit(2, f"ttrl.py: {message}\n")


def parse(argv):
    """Only the flags that were given, {field: value}."""
    parser = Parser(
        description="Test-Time Reinforcement Learning (arXiv 2504.16084) from scratch.",
        epilog=f"REASONING_MODELS: {', '.join(REASONING_MODELS)} (by name; of a local folder, the folder's name).",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    for field in dataclasses.fields(Config):
        kind = (
            field.type
            if isinstance(field.type, type)
            else next(t for t in field.type.__args__ if t is not type(None))
        )
        shown = "" if field.default is None else f" [{field.default}]"
        how = (
            dict(action=argparse.BooleanOptionalAction)
            if kind is bool
            else dict(type=kind, choices=field.metadata["choices"])
        )
        name = "--" + field.name.replace("_", "-")
        parser.add_argument(name, help=(field.metadata["help"] + shown).replace("%", "%%"), **how)
    return vars(parser.parse_args(argv))


def configure(given):
    """The whole Config of a run from the flags given: presets, then what the model and the data decide.

    Raises ValueError naming the flag and what was expected. Memory budgets stay open (None) unless given: they depend on
    the ranks too, and a run may be resumed by another number of them.

    >>> configure({"model": "Qwen2.5-Math-1.5B"}).epochs  # AIME 2024, 80 epochs
    80
    """
    c = Config(**({**TINY, **given} if given.get("model", "tiny") == "tiny" else given))
    data = c.data or ("tiny" if c.model == "tiny" else "aime")
    benchmark = questions.benchmark_of(data)
    reasons = c.thinking or any(model in Path(c.model).name.lower() for model in REASONING_MODELS)
    device = c.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    c = dataclasses.replace(
        c,
        data=data,
        eval_data=c.eval_data or data,
        questions_per_step=c.questions_per_step or (benchmark.questions_per_step if benchmark else 8),
        epochs=c.epochs
        if c.epochs is not None
        else (benchmark.epochs if benchmark else questions.USER_FILE_EPOCHS),
        temperature=c.temperature if c.temperature is not None else 1.0 if reasons else 0.6,
        checkpointing=c.checkpointing if c.checkpointing is not None else device == "cuda",
        device=device,
        out=c.out or f"runs/{Path(c.model).name}-{Path(data).stem}",
    )
    check(c)
    return c


def check(c):
    """Raise ValueError for the first flag whose value cannot work."""
    positive = """votes samples questions_per_step questions_per_update epochs max_prompt_tokens max_new_tokens eval_every
        eval_samples save_every rollout_tokens micro_batch_tokens max_minutes lr clip grad_clip"""
    for name in positive.split():
        value = getattr(c, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} {value}: must be above 0")
    for name in ("kl", "weight_decay", "eval_temperature"):
        if not 0 <= getattr(c, name) < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(c, name)}: must not be negative")
    if not 0 < c.temperature < math.inf:
        raise ValueError(
            f"--temperature {c.temperature}: must be above 0 in training, where a greedy group would be all alike"
        )
    if not 0 < c.eval_top_p <= 1:
        raise ValueError(f"--eval-top-p {c.eval_top_p}: must be above 0 and at most 1")
    if not 0 <= c.warmup < 1:
        raise ValueError(f"--warmup {c.warmup}: is a share of the updates, from 0 to below 1")
    if not 2 <= c.samples <= c.votes:
        raise ValueError(f"--samples {c.samples}: must be at least 2 and at most --votes ({c.votes})")
    if not 0 <= c.seed < 2**32:
        raise ValueError(f"--seed {c.seed}: must be a whole number from 0 to {2**32 - 1}")
    if c.wandb and importlib.util.find_spec("wandb") is None:
        raise ValueError(
            "--wandb: the package wandb is not installed; `pip install wandb`, or leave the flag out"
        )
    if c.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device here")


# ----------------------------------------------------------------------------------------------------------------------
# the algorithm: vote, advantage, loss


def vote(answers, kind="math"):
    """Majority vote over the answers to one question: (pseudo-label, rewards in {0, 1}). Paper, section 2.1 and 2.2.

    Equality is mathematical but not transitive (50% equals 0.5 and 50, yet 0.5 is not 50), so an answer joins the first
    class whose *first member* it equals, and the reward is membership in the largest class, of equals the earliest one.
    The label is that class's most frequent spelling. None is no answer: it never votes and its reward is 0.

    >>> vote(["1/2", "3", "0.5", None])
    ('1/2', [1.0, 0.0, 1.0, 0.0])
    """
    classes = grading.classes(answers, kind)  # lists of indices, in the order of their first members
    if not classes:
        return None, [0.0] * len(answers)
    winner = max(classes, key=len)  # max takes the first of equals
    label = Counter(answers[index] for index in winner).most_common(1)[0][0]
    return label, [float(index in winner) for index in range(len(answers))]


def advantages(rewards):
    """Group-relative advantages, [P, M] -> [P, M]: (r - mean) / (std + 1e-6) in each group, std with ddof 1 (GRPO, 2402.03300).

    A unanimous group has advantage 0, and so has a group of one.

    >>> [round(a, 3) for a in advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))[0].tolist()]
    [1.5, -0.5, -0.5, -0.5]
    """
    if rewards.shape[1] < 2:
        return torch.zeros_like(rewards)
    return (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-6)


def grpo_loss(
    logprob,
    old_logprob,
    advantage,
    mask,
    *,
    clip=0.2,
    dual_clip=3.0,
    ref_logprob=None,
    kl=0.0,
    token_count=None,
):
    """Clipped policy-gradient loss of some response tokens, and what to report of them: (loss, {name: sum over tokens}).

    All tensors [B, R] (advantage may be [B, 1]); mask is True at response tokens. The loss is a sum divided by
    token_count, by default the mask's; with several micro-batches or ranks it has to be the count of the whole mini-batch.
    Clipping: PPO (1707.06347, eq. 7), and for a negative advantage at most -dual_clip * A (dual clip, 1912.09729).
    KL to a reference policy: the k3 estimator exp(d) - d - 1 with d = ref - new, clamped to 10 (GRPO, eq. 4).

    >>> one = torch.ones(1, 1)
    >>> loss, _ = grpo_loss(one * 0.5, one * 0.0, one, one.bool())  # the ratio e^0.5 = 1.65 is clipped to 1.2
    >>> round(loss.item(), 4)
    -1.2
    """
    # Both exponents are bounded far outside of what the clips leave alone: the gradient of an infinite exp is NaN, not 0.
    log_ratio = torch.where(mask, logprob - old_logprob, 0.0).clamp(-20, 20)
    ratio = log_ratio.exp()
    unclipped, clipped = -ratio * advantage, -ratio.clamp(1 - clip, 1 + clip) * advantage
    per_token = torch.maximum(unclipped, clipped)
    per_token = torch.where(advantage < 0, torch.minimum(per_token, -dual_clip * advantage), per_token)
    sums = {
        "clip_fraction": ((clipped > unclipped) & mask).sum(),
        "kl_old_new": (ratio - 1 - log_ratio).sum(),
    }
    if ref_logprob is not None:
        d = torch.where(mask, ref_logprob - logprob, 0.0).clamp(-20, 20)
        k3 = (d.exp() - d - 1).clamp(max=10)
        per_token = per_token + kl * k3
        sums["kl"] = k3.sum()
    loss = torch.where(mask, per_token, 0.0).sum() / (mask.sum() if token_count is None else token_count)
    return loss, {name: value.detach() for name, value in sums.items()}


# ----------------------------------------------------------------------------------------------------------------------
# processes: everything below runs on every rank alike; a single process is a group of one


def start_processes(device):
    """Join the process group of torchrun, or found one of a single process. Returns this rank's device."""
    if "RANK" in os.environ:
        where = {}
    else:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", socket.if_nameindex()[0][1])  # loopback: needs no network
        where = dict(store=dist.HashStore(), rank=0, world_size=1)
    # A rank may have to wait for the slowest one's rollout, or for rank 0's checkpoint: hours for a large model.
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", timeout=datetime.timedelta(hours=4), **where
    )
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def is_main():
    return dist.get_rank() == 0


def say(*lines):
    if is_main():
        print(*lines, sep="\n", flush=True)


def my_share(rows):
    """This rank's rows: every world-size-th one, so that long and short questions fall to all ranks alike."""
    return rows[dist.get_rank() :: dist.get_world_size()]


def collect(items):
    """On rank 0 the items of all ranks in the order that `my_share` split them from; None elsewhere."""
    parts = [None] * dist.get_world_size() if is_main() else None
    dist.gather_object(items, parts)
    if parts is None:
        return None
    whole = [None] * sum(map(len, parts))
    for rank, part in enumerate(parts):
        whole[rank :: dist.get_world_size()] = part
    return whole


def broadcast(value):
    """Rank 0's value (any picklable object) on every rank."""
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def reduce(values, op=dist.ReduceOp.SUM):
    """Sum (or maximum) of each number of a dict over all ranks; the keys are the same everywhere."""
    tensor = torch.tensor([values[name] for name in sorted(values)], dtype=torch.float64)
    dist.all_reduce(tensor, op)
    return dict(zip(sorted(values), tensor.tolist(), strict=True))


# ----------------------------------------------------------------------------------------------------------------------
# a run: what the steps share


@dataclass
class Run:
    config: Config
    rollout_tokens: int  # --rollout-tokens, or what memory allows
    micro_batch_tokens: int  # --micro-batch-tokens, or what memory allows
    longest: int  # tokens of the longest prompt and response
    folder: Path  # of the model
    tokenizer: object
    eos_ids: list
    train_set: list  # of Question
    train_prompts: list  # of token ids
    eval_set: list
    eval_prompts: list
    policy: Transformer  # fp32 master weights, the ones that learn
    learner: DistributedDataParallel | None  # the policy, wrapped: its gradients are averaged over ranks
    sampler: Transformer  # the policy itself on the CPU, a copy in bf16 on a GPU
    reference: Transformer | None  # the initial policy, frozen, when --kl is above 0
    optimizer: torch.optim.Optimizer | None
    engine: Engine | None  # kept on a GPU for its CUDA graphs; a CPU gives the memory back to the learner


def ask(c, tokenizer, name, loaded):
    """The questions of a set and their prompts; prompts over --max-prompt-tokens are named and left out, never cut."""
    kept, prompts, dropped = [], [], []
    for question in loaded:
        ids = encode_prompt(
            tokenizer,
            question.prompt,
            template=c.template,
            suffix=c.prompt_suffix,
            thinking=c.thinking,
            kind=question.kind,
        )
        if len(ids) > c.max_prompt_tokens:
            dropped.append(question.id)
        else:
            kept.append(question)
            prompts.append(ids)
    if dropped:
        say(
            f"left out of {name}: {len(dropped)} prompts over --max-prompt-tokens {c.max_prompt_tokens}: {', '.join(dropped)}"
        )
    if not kept:
        raise ValueError(f"{name}: every prompt is longer than --max-prompt-tokens {c.max_prompt_tokens}")
    return kept, prompts


def open_run(c, device):
    """Load model, tokenizer and questions, print the plan, and build the learner. Raises for whatever cannot work."""
    folder = (
        Path(__file__).parent / "tiny" / "model"
        if c.model == "tiny"
        else first_on_node(lambda: fetch_weights(c.model))
    )
    train_set = first_on_node(lambda: questions.load(c.data))
    eval_set = train_set if c.eval_data == c.data else first_on_node(lambda: questions.load(c.eval_data))
    run = on_every_rank(lambda: prepare(c, device, folder, train_set, eval_set))
    if not c.dry_run:
        build_models(run, device)
    return run


def prepare(c, device, folder, train_set, eval_set):
    """The run without its models: tokenizer, prompts and memory budgets; prints the plan, and refuses what cannot work."""
    model_config = ModelConfig.from_pretrained(folder)
    tokenizer, eos_ids = load_tokenizer(folder)
    check_vocabulary(model_config, tokenizer)
    same = eval_set is train_set
    train_set, train_prompts = ask(c, tokenizer, c.data, train_set)
    eval_set, eval_prompts = (train_set, train_prompts) if same else ask(c, tokenizer, c.eval_data, eval_set)
    if c.reward == "gold" and any(q.answer is None for q in train_set):
        raise ValueError(f"--reward gold: {c.data} has questions without an answer")
    longest = max(map(len, train_prompts + eval_prompts)) + c.max_new_tokens
    if longest > model_config.max_positions:
        raise ValueError(f"--max-new-tokens {c.max_new_tokens}: with the longest prompt that is {longest} tokens, "
                         f"but {c.model} takes {model_config.max_positions} (max_position_embeddings)")  # fmt: skip
    if dist.get_world_size() > c.votes:
        raise ValueError(
            f"--votes {c.votes}: fewer than the {dist.get_world_size()} processes, each needs a response to learn from"
        )
    budgets = plan(c, model_config, device, longest, len(train_set), len(eval_set))
    say(f"prompt   {show_prompt(tokenizer, train_prompts[0])}")
    asked = (train_set, train_prompts, eval_set, eval_prompts)
    return Run(c, *budgets, longest, folder, tokenizer, eos_ids, *asked, None, None, None, None, None, None)


def on_every_rank(action):
    """action() on every rank. If it fails on some, all raise ValueError with the reason of each rank that failed.

    action must not communicate: a rank that fails would leave the others waiting.
    """
    result = failure = None
    try:
        result = action()
    except (ValueError, OSError) as error:
        failure = str(error)
    failures = [None] * dist.get_world_size()
    dist.all_gather_object(failures, failure)
    if len(set(failures)) == 1 and failure:
        raise ValueError(failure)  # the same everywhere
    if any(failures):
        raise ValueError(
            "; ".join(f"rank {rank}: {failed}" for rank, failed in enumerate(failures) if failed)
        )
    return result


def first_on_node(action):
    """action() on the first rank of each node, then on the others, which find in the cache what it downloaded."""
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    result = on_every_rank(lambda: action() if first else None)
    return on_every_rank(lambda: result if first else action())


def build_models(run, device):
    """Fill in policy, sampler, learner, reference and optimizer."""
    c = run.config
    on_every_rank(lambda: load_models(run, device))
    if device.type == "cuda":
        most_rows = max(c.questions_per_step * c.votes, len(run.eval_set) * c.eval_samples)
        slots = min(run.rollout_tokens // run.longest, math.ceil(most_rows / dist.get_world_size()))
        run.engine = Engine(run.sampler, slots, run.longest, c.max_new_tokens, run.eos_ids)
    if c.eval_only:
        return
    run.policy.checkpointing = c.checkpointing
    run.learner = DistributedDataParallel(run.policy, gradient_as_bucket_view=True)
    run.optimizer = torch.optim.AdamW(
        run.policy.parameters(), lr=c.lr, weight_decay=c.weight_decay, fused=True
    )


def load_models(run, device):
    """Read the weights: the policy's, on a GPU the sampler's copy in bf16, and with --kl the reference's."""
    c, cuda = run.config, device.type == "cuda"
    half = torch.bfloat16 if cuda else torch.float32
    run.policy = run.sampler = Transformer.from_pretrained(
        run.folder, half if c.eval_only else torch.float32, device
    )
    if cuda and not c.eval_only:
        run.sampler = Transformer.from_pretrained(run.folder, half, device)
    if c.kl > 0 and not c.eval_only:
        run.reference = Transformer.from_pretrained(run.folder, half, device).requires_grad_(False)


def plan(c, model_config, device, longest, question_count, eval_question_count):
    """Print what is going to happen, and refuse what cannot fit: the token budgets of (sampler, micro-batch).

    Budgets come from the machine's total memory, not from what happens to be free, so that a restart gets the same ones.
    """
    cuda, neighbours = device.type == "cuda", int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    total = torch.cuda.get_device_properties(device).total_memory if cuda else physical_memory() // neighbours
    parameters, parts = memory_parts(c, model_config, cuda)
    fixed = sum(parts.values())
    # of the sampler: a token's keys and values; a row of them, and its logits in fp32
    a_token = 2 * model_config.layers * model_config.kv_heads * model_config.head_dim * (2 if cuda else 4)
    row = longest * a_token + 4 * model_config.vocab_size
    available = int(0.9 * total) - fixed
    what = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items())
    if available < 8 * row:
        raise ValueError(
            f"{c.model} does not fit: each rank needs {fixed / 1e9:.1f} GB ({what}) and {8 * row / 1e9:.2f} GB "
            f"to sample eight rows, and has {0.9 * total / 1e9:.1f} GB"
        )
    rollout_tokens = c.rollout_tokens or available // 2 // row * longest
    if rollout_tokens < longest:
        raise ValueError(
            f"--rollout-tokens {c.rollout_tokens}: must be at least {longest}, the tokens of the longest prompt and response"
        )
    active = activation_bytes(model_config, c.checkpointing)
    # a CPU is at full speed with a thousand tokens or a gigabyte of activations; more would only take memory
    largest, room = (32768, available // 4) if cuda else (1024, min(available // 4, 10**9))
    micro_batch_tokens = c.micro_batch_tokens or max(longest, min(largest, room // active))
    steps = c.epochs * math.ceil(question_count / c.questions_per_step)
    sampled = responses_sampled(c, question_count, eval_question_count)
    say(
        f"model    {c.model}: {parameters / 1e6:.1f} M parameters, {fixed / 1e9:.2f} GB a rank ({what})",
        f"ranks    {dist.get_world_size()} on {device.type}, {torch.get_num_threads()} threads each",
        f"data     {c.data}: {question_count} questions, prompts up to {longest - c.max_new_tokens} tokens",
        f"plan     {c.epochs} epochs, {steps} steps of {c.questions_per_step} questions x {c.votes} votes "
        f"at temperature {c.temperature}; {c.samples} are trained on, rewarded by {c.reward}",
        f"sampling {sum(sampled.values()):,} responses, {sampled['eval'] / sum(sampled.values()):.0%} of them for evaluation "
        f"(--eval-every {c.eval_every}, --eval-samples {c.eval_samples})",
        f"memory   sampler up to {rollout_tokens:,} tokens, learner up to {micro_batch_tokens:,} tokens at a time",
        f"out      {c.out}",
    )
    return rollout_tokens, micro_batch_tokens


def memory_parts(c, model_config, cuda):
    """(number of parameters, {part: bytes that a rank holds whatever it samples, and while it learns})."""
    with torch.device("meta"):
        model = Transformer(model_config)
    count = sum(p.numel() for p in model.parameters())
    half = 2 if cuda else 4  # bytes of a weight in compute precision
    if c.eval_only:
        return count, {"weights": half * count}
    parts = {"weights": 4 * count, "gradients": 4 * count, "moments": 8 * count}  # fp32
    parts["head's gradient"] = (
        4 * model.lm_head.weight.numel()
    )  # of one micro-batch, before it is added to the others'
    if cuda:
        block = sum(p.numel() for p in model.layers[0].parameters())
        parts["sampler"] = half * count
        parts["autocast"] = (
            half * block * (1 if c.checkpointing else len(model.layers))
        )  # kept for the backward pass
    if c.kl > 0:
        parts["reference"] = half * count
    return count, parts


def activation_bytes(model_config, checkpointing):
    """Bytes that learning holds per token: some 16 widths and 5 MLP widths a layer; with checkpointing a width, and one layer."""
    layer = 4 * (16 * model_config.hidden_size + 5 * model_config.intermediate_size)
    return (
        model_config.layers * 4 * model_config.hidden_size + layer
        if checkpointing
        else model_config.layers * layer
    )


def responses_sampled(c, question_count, eval_question_count):
    """Responses that the whole run samples, {"train": ..., "eval": ...}."""
    steps = c.epochs * steps_an_epoch(c, question_count)
    lower = [
        s
        for s, *setting in LOWER_TEMPERATURES.values()
        if tuple(setting) != (c.eval_temperature, c.eval_top_p)
    ]
    evaluations = 2 + (steps - 1) // c.eval_every  # before the first step, after the last, and between
    responses = evaluations * c.eval_samples + 2 * sum(lower)
    return {"train": c.epochs * question_count * c.votes, "eval": responses * eval_question_count}


def physical_memory(root="/sys/fs/cgroup", own="/proc/self/cgroup"):
    """Bytes of this machine's memory, or of the container's (its cgroup's limit) where that is less."""
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    lines = Path(own).read_text().splitlines() if Path(own).exists() else []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers not in ("", "memory"):
            continue
        kind, name = (
            ("", "memory.max") if controllers == "" else ("memory", "memory.limit_in_bytes")
        )  # version 2, version 1
        for folder in (Path(path), *Path(path).parents):  # a limit of any group above holds as well
            file = Path(root) / kind / folder.relative_to("/") / name
            text = file.read_text().strip() if file.is_file() else "max"
            sizes += [int(text)] if text.isdigit() else []
    return min(sizes)


def peak_memory_gb():
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        * (1 if platform.system() == "Darwin" else 1024)
        / 1e9
    )


# ----------------------------------------------------------------------------------------------------------------------
# the stages of a step


def draw(step, count, per_step, seed):
    """The questions of a step (counted from 0), as indices below `count`: each once an epoch, in a new order every epoch.

    A pure function of its arguments, so that a resumed run needs no state of a sampler. The last batch may be smaller.

    >>> sorted(draw(0, 5, 3, seed=0) + draw(1, 5, 3, seed=0))
    [0, 1, 2, 3, 4]
    """
    epoch, batch = divmod(step, math.ceil(count / per_step))
    order = torch.randperm(count, generator=torch.Generator().manual_seed((seed << 20) + epoch))
    return order[batch * per_step : (batch + 1) * per_step].tolist()


class Response(NamedTuple):
    """What a rank reports of one sampled response."""

    answer: str | None
    text: str
    tokens: int
    finished: bool  # False: truncated at --max-new-tokens


def sample_responses(run, asked, prompts, samples, *, stream, step, temperature, top_p=1.0):
    """Sample and extract: (this rank's Rollout or None, on rank 0 a list of Response for each question).

    The rows are split over ranks, each extracts the answers of its own, rank 0 gathers them.
    """
    c = run.config
    rows = my_share([(question, sample) for question in range(len(prompts)) for sample in range(samples)])
    rollout, responses = None, []
    if rows:  # an evaluation may have fewer rows than there are ranks
        rollout = generate(
            run.sampler,
            prompts,
            rows,
            max_new_tokens=c.max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            eos_ids=run.eos_ids,
            seed=c.seed,
            stream=stream,
            step=step,
            budget_tokens=run.rollout_tokens,
            engine=run.engine,
        )
    for row, (question, _) in enumerate(rows):
        ids, finished = rollout.response(row), bool(rollout.finished[row])
        text = decode_response(run.tokenizer, ids)
        answer = grading.extract_answer(text, asked[question].kind, truncated=not finished)
        responses.append(Response(answer, text, len(ids), finished))
    everything = collect(responses)
    return rollout, everything and [everything[q * samples : (q + 1) * samples] for q in range(len(prompts))]


def vote_on(asked, groups):
    """(label, rewards) of each question, from its responses."""
    return [
        vote([r.answer for r in group], question.kind) for question, group in zip(asked, groups, strict=True)
    ]


def judge(c, asked, groups):
    """On rank 0: labels, rewards [P, N] and metrics of the responses [P][N]. With --reward vote no true answer is looked at."""
    votes = vote_on(asked, groups)
    labels, rewards = (list(column) for column in zip(*votes, strict=True))
    records = [report.record(*row) for row in zip(asked, groups, votes, strict=True)]
    metrics = {**report.training_metrics(records, c.votes), **report.describe(groups)}
    if c.reward == "gold":
        labels = [question.answer for question in asked]
        rewards = [report.correct(question, group) for question, group in zip(asked, groups, strict=True)]
    metrics["reward"] = report.mean(map(report.mean, rewards))
    metrics["zero_variance_groups"] = report.mean(len(set(row[: c.samples])) == 1 for row in rewards)
    return labels, rewards, metrics


def micro_batches(rollout, rows, budget):
    """Cut rows (indices into a Rollout) into lists of at most `budget` tokens, a question's prompt counted once in each.

    Tokens are counted as attention computes them without flash-attn: prompts padded to the longest prompt of the
    micro-batch, responses to the longest response. Rows of a question stay together, its short responses first, so that
    little is padding. A row alone may exceed the budget.
    """
    batches = []
    for row in sorted(rows, key=lambda r: (int(rollout.question[r]), int(rollout.response_length[r]))):
        if not batches or padded_tokens(rollout, [*batches[-1], row]) > budget:
            batches.append([])
        batches[-1].append(row)
    return batches


def padded_tokens(rollout, rows):
    """Tokens of a micro-batch: its prompts, each question's once, and its responses, both padded to their longest."""
    prompts = len(set(rollout.question[rows].tolist())) * int(rollout.prompt_length[rows].max())
    return prompts + len(rows) * int(rollout.response_length[rows].max())


def learning_rate(c, update, updates):
    """Linear warm-up, then a cosine to 0; `update` counts from 0, and already the first one moves."""
    warmup = max(1, round(c.warmup * updates))
    if update < warmup:
        return c.lr * (update + 1) / warmup
    return c.lr * 0.5 * (1 + math.cos(math.pi * (update - warmup) / (updates - warmup)))


def learn(run, rollout, advantage, update, updates):
    """The optimizer updates of one step from this rank's rows of the rollout, advantage [P, M] -> metrics.

    `update` is the number of the first of them among `updates` in the whole run. A mini-batch is the first M responses to
    --questions-per-update questions. The ranks hold different rows of it, and may hold more or fewer micro-batches or none,
    but all have to make the same number of backward passes: a rank that has no more repeats a row with all of it masked.
    """
    c, sums, norms, skipped, on_policy = run.config, Counter(), [], 0, True
    parameters = list(run.policy.parameters())
    gap_max = torch.zeros((), device=parameters[0].device)
    for number, start in enumerate(range(0, len(advantage), c.questions_per_update)):
        mini = range(start, min(start + c.questions_per_update, len(advantage)))
        if c.kl == 0 and not advantage[mini.start : mini.stop].any():
            continue  # nothing to learn, and momentum and weight decay alone must not move the weights
        rows = [
            r
            for r in range(len(rollout))
            if int(rollout.question[r]) in mini and int(rollout.sample[r]) < c.samples
        ]
        batches = micro_batches(rollout, rows, run.micro_batch_tokens)
        token_count = int(reduce({"tokens": int(rollout.response_length[rows].sum())})["tokens"])
        passes = int(reduce({"passes": len(batches)}, dist.ReduceOp.MAX)["passes"])
        for index in range(passes):
            real = index < len(batches)
            mb = rollout[torch.tensor(batches[index] if real else [0])]
            # Gradients are exchanged once an update, with its last backward pass. The very first exchange makes them views of
            # DDP's buckets; without it, at the first pass, no_sync would let autograd hold them a second time.
            exchange = index == passes - 1 or parameters[0].grad is None
            with contextlib.nullcontext() if exchange else run.learner.no_sync():
                loss, mb_sums, mb_gap_max = micro_batch_loss(
                    run, mb, mb.mask() & real, advantage, token_count
                )
                (
                    loss * dist.get_world_size()
                ).backward()  # DDP averages over ranks, but each loss is a share of one sum
            sums.update(
                {name: value for name, value in mb_sums.items() if on_policy or not name.startswith("gap")}
            )
            gap_max = torch.maximum(gap_max, mb_gap_max) if on_policy else gap_max
        (norm,) = read(torch.nn.utils.clip_grad_norm_(parameters, c.grad_clip))
        if math.isfinite(norm):
            run.optimizer.param_groups[0]["lr"] = learning_rate(c, update + number, updates)
            run.optimizer.step()
            norms.append(norm)
            on_policy = False
        else:
            skipped += 1
        run.optimizer.zero_grad(set_to_none=False)  # they stay views of the buckets
    if run.sampler is not run.policy:
        run.sampler.copy_from(run.policy)
    return {**learning_metrics(run, sums, gap_max, norms), "updates": len(norms), "skipped_updates": skipped}


def micro_batch_loss(run, mb, mask, advantage, token_count):
    """One forward pass: (loss, {name: sum over tokens}, largest gap between sampler and learner). mask [B, R] of mb's tokens."""
    c, device = run.config, next(run.policy.parameters()).device
    mask = mask.to(
        device, non_blocking=True
    )  # here and below: queued, the GPU may still be busy with the last micro-batch
    old_logprob = mb.logprob[:, : mask.shape[1]].to(device, non_blocking=True)  # [B, R]
    sample = mb.sample.clamp(
        max=c.samples - 1
    )  # a masked row may be any of the N, advantages there are only of the M
    mb_advantage = advantage[mb.question, sample][:, None].to(device, non_blocking=True)  # [B, 1]
    # No weight cache: each weight is used once a pass, and the cache would hold a bf16 copy of all of them.
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda", cache_enabled=False):
        logprob, entropy = run.learner(mb, c.temperature)
        with torch.no_grad():
            ref_logprob = run.reference(mb, c.temperature)[0] if run.reference else None
    options = dict(clip=c.clip, ref_logprob=ref_logprob, kl=c.kl, token_count=token_count)
    loss, sums = grpo_loss(logprob, old_logprob, mb_advantage, mask, **options)
    gap = torch.where(mask, logprob.detach() - old_logprob, 0.0).abs()
    tokens = mask.sum()
    sums.update(
        tokens=tokens,
        entropy=torch.where(mask, entropy.detach(), 0.0).sum(),
        gap=gap.sum(),
        gap_tokens=tokens,
    )
    return loss, sums, gap.max()


def read(*numbers):
    """Device numbers as floats. Nowhere else does learning wait for a GPU: once an update, and once a step."""
    return torch.stack([number.double() for number in numbers]).tolist()


def learning_metrics(run, sums, gap_max, norms):
    """Sums over this rank's tokens -> means over all ranks' tokens. Empty if no mini-batch had anything to learn."""
    if not sums:
        return {}
    gap_max, *values = read(gap_max, *sums.values())
    sums = reduce(dict(zip(sums, values, strict=True)))
    tokens, gap, gap_tokens = sums.pop("tokens"), sums.pop("gap"), sums.pop("gap_tokens")
    metrics = {name: value / tokens for name, value in sums.items()}  # entropy, clip_fraction, kl_old_new, kl
    metrics.update(
        logprob_gap=gap / gap_tokens, logprob_gap_max=reduce({"max": gap_max}, dist.ReduceOp.MAX)["max"]
    )
    if norms:
        metrics.update(
            grad_norm=report.mean(norms), grad_norm_max=max(norms), lr=run.optimizer.param_groups[0]["lr"]
        )
    return {**metrics, "trained_tokens": tokens}


def train_step(run, step):
    """One step of the algorithm (counted from 1): its metrics, on rank 0 also a few responses to show."""
    c = run.config
    batch = draw(step - 1, len(run.train_set), c.questions_per_step, c.seed)  # P questions
    asked, prompts = [run.train_set[i] for i in batch], [run.train_prompts[i] for i in batch]

    began = time.perf_counter()
    rollout, groups = sample_responses(
        run, asked, prompts, c.votes, stream="train", step=step, temperature=c.temperature
    )
    sampled = time.perf_counter()
    labels, rewards, metrics = judge(c, asked, groups) if is_main() else (None, None, {})
    rewards = torch.tensor(broadcast(rewards))  # [P, N]; rank 0 decides, so the ranks cannot disagree
    judged = time.perf_counter()
    per_epoch = updates_of(c, len(run.train_set))
    epoch, batch_in_epoch = divmod(step - 1, steps_an_epoch(c, len(run.train_set)))
    first_update = epoch * per_epoch + batch_in_epoch * math.ceil(
        c.questions_per_step / c.questions_per_update
    )
    metrics.update(
        learn(run, rollout, advantages(rewards[:, : c.samples]), first_update, c.epochs * per_epoch)
    )
    learned = time.perf_counter()

    metrics["grading_timeouts"] = grading.grading_timeouts
    metrics["peak_memory_gb"] = peak_memory_gb()
    metrics.update(
        seconds_sampling=sampled - began, seconds_voting=judged - sampled, seconds_learning=learned - judged
    )
    metrics["train_tokens_per_s"] = metrics.pop("trained_tokens", 0) / (learned - judged)
    shown = []  # a few responses for rollouts.jsonl
    if is_main():
        metrics["rollout_tokens_per_s"] = sum(r.tokens for group in groups for r in group) / (sampled - began)
        for q, group, label, row in list(zip(asked, groups, labels, rewards.tolist(), strict=True))[:4]:
            response = {
                "response": group[0].text,
                "answer": group[0].answer,
                "label": label,
                "reward": row[0],
            }
            shown.append({"step": step, "id": q.id, "prompt": q.prompt, **response})
    return {f"train/{name}": value for name, value in metrics.items()}, shown


def steps_an_epoch(c, question_count):
    return math.ceil(question_count / c.questions_per_step)


def updates_of(c, question_count):
    """Optimizer updates in an epoch; the last batch of an epoch may be smaller."""
    full, rest = divmod(question_count, c.questions_per_step)
    return full * math.ceil(c.questions_per_step / c.questions_per_update) + math.ceil(
        rest / c.questions_per_update
    )


# ----------------------------------------------------------------------------------------------------------------------
# evaluation


def evaluate(run, sampling=None):
    """Sample every evaluation question and grade it: on rank 0 (metrics, a record a question).

    sampling: (samples a question, temperature, top-p), by default what the flags say. Every evaluation of a run draws
    with the same random numbers (step 0), so two of them differ by what was learned in between, not by luck: weights
    that did not move give the same responses, and the difference of two evaluations is a difference of pairs.
    """
    c = run.config
    samples, temperature, top_p = sampling or (c.eval_samples, c.eval_temperature, c.eval_top_p)
    how = dict(stream="eval", step=0, temperature=temperature, top_p=top_p)
    _, groups = sample_responses(run, run.eval_set, run.eval_prompts, samples, **how)
    if not is_main():
        return {}, []
    records = [
        report.record(*row) for row in zip(run.eval_set, groups, vote_on(run.eval_set, groups), strict=True)
    ]
    return {**report.evaluation_metrics(records, samples), **report.describe(groups)}, records


def evaluate_fully(run):
    """The evaluation of the flags, and for the before/after table what a lower temperature alone would give."""
    c = run.config
    metrics, records = evaluate(run)
    for name, sampling in LOWER_TEMPERATURES.items():
        if sampling[1:] != (c.eval_temperature, c.eval_top_p):
            other, other_records = evaluate(run, sampling)
            metrics.update(
                {name: other["pass@1"], f"{name}_se": other["pass@1_se"]} if "pass@1" in other else {}
            )
            for row, other_row in zip(records, other_records, strict=True):
                row.update({name: other_row["pass@1"]} if "pass@1" in other_row else {})
    return metrics, records


# ----------------------------------------------------------------------------------------------------------------------
# the loop


def train(run, state):
    """From `state` (step 0, or a checkpoint's) to the last step; returns the state, None if --max-minutes ran out first."""
    c, entered, seconds_before = run.config, time.monotonic(), state["seconds"]
    steps = c.epochs * steps_an_epoch(c, len(run.train_set))
    if state["step"] == 0:
        metrics, records = evaluate_fully(run)
        state["before"] = {"step": 0, "metrics": metrics, "records": records}
        state["best"] = report.better(None, 0, records)
        log(run, {"step": 0, "epoch": 0, **{f"eval/{k}": v for k, v in metrics.items()}}, [])
    bar = tqdm(total=steps, initial=state["step"], disable=not is_main(), unit="step", dynamic_ncols=True)
    for step in range(state["step"] + 1, steps + 1):
        metrics, shown = train_step(run, step)
        line = {"step": step, "epoch": math.ceil(step / steps_an_epoch(c, len(run.train_set))), **metrics}
        last = step == steps
        if last or step % c.eval_every == 0:
            bar.set_description("evaluating")
            metrics, records = evaluate_fully(run) if last else evaluate(run)
            line.update({f"eval/{name}": value for name, value in metrics.items()})
            state["after"] = {"step": step, "metrics": metrics, "records": records}
            state["best"] = report.better(state["best"], step, records)
        state["step"], state["seconds"] = step, seconds_before + time.monotonic() - entered
        state["updates"] += line["train/updates"]
        state["skipped_updates"] += line["train/skipped_updates"]
        if line["train/skipped_updates"]:
            bar.write(
                f"step {step}: {line['train/skipped_updates']} updates skipped, their gradient was not finite"
            )
        log(run, line, shown)
        bar.update()
        bar.set_description("")
        bar.set_postfix_str(
            report.progress(
                line, state["after"]["metrics"] if "after" in state else state["before"]["metrics"]
            )
        )
        out_of_time = broadcast(c.max_minutes is not None and time.monotonic() - entered > 60 * c.max_minutes)
        if is_main() and (last or out_of_time or step % c.save_every == 0):
            whole = {
                **state,
                "config": dataclasses.asdict(c),
                "environment": environment(c),
                "questions": fingerprint(run),
            }
            checkpoint.save(Path(c.out) / "checkpoint", run.policy, run.optimizer, whole)
        if out_of_time and not last:
            bar.close()
            say(f"stopped after {c.max_minutes} minutes at step {step} of {steps}; the same command goes on")
            return None
    bar.close()
    return state


def log(run, line, shown):
    """Write a step's line to metrics.jsonl, some responses to rollouts.jsonl, and redraw the curves if there are new points."""
    if not is_main():
        return
    out = Path(run.config.out)
    finite = {name: value for name, value in line.items() if math.isfinite(value)}  # JSON has no nan
    checkpoint.append(out / "metrics.jsonl", [finite])
    checkpoint.append(out / "rollouts.jsonl", shown)
    if any(name.startswith("eval/") for name in line):
        report.draw_curves(out, run.config.eval_samples)
    if run.config.wandb:
        import wandb

        wandb.log(line, step=line["step"])


def environment(c):
    """What has to stay the same for a resumed run to be bitwise the same as one that was never stopped."""
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "machine": torch.cuda.get_device_name()
        if c.device == "cuda"
        else f"{platform.machine()}, {os.cpu_count()} cores",
        "ranks": dist.get_world_size(),
        "threads": torch.get_num_threads(),
    }


def save_model(run):
    """out/model: the policy in Hugging Face format with its tokenizer; transformers and vLLM load it, and so do we."""

    def fill(folder):
        run.policy.save_pretrained(folder)
        for path in (path for pattern in TOKENIZER_FILES for path in run.folder.glob(pattern)):
            shutil.copyfile(path, folder / path.name)

    checkpoint.replace_folder(Path(run.config.out) / "model", fill)


def finish(run, state):
    """The model, summary.json, and on the screen the before/after table, the ledger and a few responses."""
    save_model(run)
    c = run.config
    summary = {
        **report.summarize(state),
        "seconds": state["seconds"],
        **report.speeds(Path(c.out)),
        "environment": environment(c),
        "config": dataclasses.asdict(c),
    }
    checkpoint.write_whole(Path(c.out) / "summary.json", json.dumps(summary, indent=1, ensure_ascii=False))
    print(report.render(summary, state))
    print(
        f"\n{c.out}: curves.png, summary.json, metrics.jsonl, rollouts.jsonl, model/ ({state['seconds'] / 60:.1f} minutes)"
    )


def main(argv=None):
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers.logging.set_verbosity_error()
    given = parse(argv)
    rank = int(os.environ.get("RANK", 0))
    try:  # the door: whatever is wrong with flags, files or memory is said in a sentence, before any work
        c = configure(given)
        device = start_processes(c.device)
        run = open_run(c, device)
        if run.config.dry_run:
            return
        state = on_every_rank(lambda: open_out(run))
    except (ValueError, OSError) as error:
        if rank == 0 or not dist.is_initialized():  # once there is a group, all ranks raise the same
            print(f"ttrl.py: {f'rank {rank}: ' if rank else ''}{error}", file=sys.stderr)
        raise SystemExit(2) from None
    if run.config.eval_only:
        metrics, _ = evaluate_fully(run)
        if is_main():
            whole = {
                "evaluation": metrics,
                "environment": environment(run.config),
                "config": dataclasses.asdict(run.config),
            }
            checkpoint.write_whole(Path(run.config.out) / "evaluation.json", json.dumps(whole, indent=1))
            print(report.table({"evaluation": metrics}))
    elif train(run, state):
        if state["skipped_updates"] and not state["updates"]:
            reason = f"ttrl.py: the gradient of all {state['skipped_updates']} updates was not finite, nothing was learned"
            raise SystemExit(reason if is_main() else 1)
        if is_main():
            finish(run, state)


def open_out(run):
    """Make the run's folder, or find a run in it and go on from its checkpoint: the state that `train` starts from."""
    c, out = run.config, Path(run.config.out)
    if is_main():
        out.mkdir(parents=True, exist_ok=True)
    state = {"step": 0, "seconds": 0.0, "updates": 0, "skipped_updates": 0}
    folder = checkpoint.newest(out / "checkpoint")
    if folder and not c.eval_only:
        state = checkpoint.read_state(folder)
        compare_with_checkpoint(c, state.pop("config"), state.pop("environment"))
        if state.pop("questions") != fingerprint(run):
            raise ValueError(f"{c.out} holds a run on other questions: ids, prompts or answers of {c.data} or {c.eval_data} "
                             "changed since its checkpoint; restore them, or choose another --out")  # fmt: skip
        checkpoint.restore(folder, run.policy, run.optimizer)
        if run.sampler is not run.policy:
            run.sampler.copy_from(run.policy)
        say(f"resume   from step {state['step']}")
    if is_main() and not c.eval_only:
        for name in ("metrics.jsonl", "rollouts.jsonl"):
            checkpoint.forget_after(out / name, state["step"] if folder else -1)
        checkpoint.write_whole(out / "config.json", json.dumps(dataclasses.asdict(c), indent=1))
        if c.wandb:
            import wandb

            wandb.init(
                project="ttrl", name=out.name, config=dataclasses.asdict(c), resume="allow", id=out.name
            )
    return state


def fingerprint(run):
    """SHA-256 of what is asked, in training and evaluation, and of the answers that the report compares with."""
    train = [[q.id, ids] for q, ids in zip(run.train_set, run.train_prompts, strict=True)]
    evaluation = [[q.id, ids, q.answer] for q, ids in zip(run.eval_set, run.eval_prompts, strict=True)]
    return hashlib.sha256(json.dumps([train, evaluation]).encode()).hexdigest()


def compare_with_checkpoint(c, then, environment_then):
    """Raise ValueError if the flags that matter changed since the checkpoint; say so if the machine or versions did."""
    now = dataclasses.asdict(c)
    changed = [name for name in now if now[name] != then.get(name) and name not in RESUME_MAY_CHANGE]
    if changed and not c.allow_changed_flags:
        what = ", ".join(
            f"--{name.replace('_', '-')} was {then.get(name)} and is {now[name]}" for name in changed
        )
        raise ValueError(
            f"{c.out} holds a run with other flags ({what}): choose another --out, or add --allow-changed-flags"
        )
    for name, value in environment(c).items():
        if environment_then.get(name) != value:
            say(
                f"note     {name} was {environment_then.get(name)} and is {value}: the run goes on, but not bitwise the same"
            )


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # prompts hold what not every terminal can show
    torch.use_deterministic_algorithms(not torch.cuda.is_available())
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that costs time
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("interrupted; the same command goes on from the last checkpoint") from None
    finally:
        if dist.is_initialized():
            # gloo's thread needs the GIL to drop the tensors of its last operation, and the end of the group waits for that
            # thread without giving the GIL away: a deadlock, unless the thread gets its turn before
            time.sleep(0.05)
            dist.destroy_process_group()
