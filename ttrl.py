r"""TTRL, Test-Time Reinforcement Learning (arXiv 2504.16084), from scratch: learning on questions without answers.

    python ttrl.py                                                    # the embedded tiny model, a few minutes on a CPU
    torchrun --nproc-per-node 8 ttrl.py --model Qwen2.5-Math-1.5B     # AIME 2024, as in the paper's quick start

One step of the loop (`train`, at the bottom of this file):

    draw       P questions                                    draw
    sample     N responses to each                            rollout.generate
    extract    the answer in each response, or None           questions.extract_answer
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
from model import TOKENIZER_FILES, Transformer, check_vocabulary, read_config, resolve
from rollout import Engine, generate

# ----------------------------------------------------------------------------------------------------------------------
# Config: every field is a flag of the same name


def flag(default, text, choices=None):
    return dataclasses.field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True)
class Config:
    """The defaults are the paper's. None stands for a value that the model or the data decide, see `configure`."""

    model: str = flag("tiny", "tiny, a folder in Hugging Face format, a hub id, or a bare name such as Qwen2.5-Math-1.5B")
    data: str | None = flag(
        None, "tiny, aime, amc, math, math-l1 to math-l5, gpqa, or a .json/.jsonl file [tiny for tiny, else aime]"
    )
    votes: int = flag(64, "responses sampled per question")
    samples: int = flag(32, "of those, the first so many are trained on")
    questions_per_step: int | None = flag(None, "questions in one rollout batch [8; math: 32]")
    questions_per_update: int = flag(1, "questions in one optimizer update")
    epochs: int | None = flag(None, "passes over the questions [aime 80, amc 30, math 10, math-l* and gpqa 30, a file 10]")
    max_prompt_tokens: int = flag(1024, "questions with longer prompts are listed and left out")
    max_new_tokens: int = flag(3072, "longest response; it is cut there")
    temperature: float | None = flag(
        None, "of sampling in training, and in the loss [1.0 for REASONING_MODELS and --thinking, else 0.6]"
    )
    template: str = flag("auto", "auto: the tokenizer's chat template; none: the prompt is taken verbatim", ("auto", "none"))
    prompt_suffix: str = flag("auto", "appended to each prompt; auto: asks for \\boxed{} where nothing else does; none: nothing")
    thinking: bool = flag(False, "Qwen3's thinking switch")
    lr: float = flag(5e-7, "peak learning rate of AdamW, cosine decay to 0")
    warmup: float = flag(0.03, "share of the updates in which the learning rate rises")
    clip: float = flag(0.2, "clip range of the ratio")
    kl: float = flag(0.001, "weight of the k3 KL to the initial policy; 0 holds no reference model")
    weight_decay: float = flag(0.01, "of AdamW")
    grad_clip: float = flag(1.0, "largest gradient norm")
    reward: str = flag("vote", "vote, or gold: trains on the true answers, the upper bound of the paper", ("vote", "gold"))
    eval_every: int = flag(2, "steps between evaluations; always also before the first step and after the last")
    eval_samples: int = flag(16, "responses sampled per question in evaluation")
    eval_temperature: float = flag(0.6, "of sampling in evaluation; 0 is greedy")
    eval_top_p: float = flag(0.95, "nucleus sampling in evaluation (training always samples from the whole softmax)")
    eval_data: str | None = flag(None, "evaluate on other questions than --data [the same]")
    eval_only: bool = flag(False, "evaluate and exit")
    rollout_tokens: int | None = flag(None, "tokens whose keys and values a rank's sampler may hold [by memory]")
    micro_batch_tokens: int | None = flag(None, "tokens of a learner's micro-batch [by memory]")
    checkpointing: bool | None = flag(None, "gradient checkpointing: less memory, a third more time [on for CUDA]")
    out: str | None = flag(None, "folder of the run; a run found there is resumed [runs/<model>-<data>]")
    seed: int = flag(0, "of sampling and of the order of the questions")
    device: str = flag("auto", "auto, cpu or cuda", ("auto", "cpu", "cuda"))
    save_every: int = flag(10, "steps between checkpoints")
    max_minutes: float | None = flag(None, "stop cleanly after so many minutes; the same command goes on")
    allow_changed_flags: bool = flag(False, "resume although flags differ from those of the checkpoint")
    dry_run: bool = flag(False, "print the plan and exit")
    wandb: bool = flag(False, "log to Weights & Biases too")


TINY = dict(lr=5e-5, epochs=5, max_new_tokens=96, questions_per_update=2, kl=0.0,
            eval_every=8, eval_samples=64, eval_temperature=1.0, eval_top_p=1.0)  # fmt: skip
REASONING_MODELS = ("tiny", "qwen2.5-math", "deepseek-r1", "skywork-or1")  # in the model's name: temperature 1.0, as in the paper
RESUME_MAY_CHANGE = {"out", "max_minutes", "allow_changed_flags", "dry_run", "wandb", "save_every"}


class Parser(argparse.ArgumentParser):
    def error(self, message):
        """One sentence, exit code 2; the usage of forty flags would bury it."""
        if message.startswith("unrecognized arguments: "):
            name = message.split()[2]
            close = difflib.get_close_matches(name, self._option_string_actions, n=1)
            message = f"unknown flag {name}" + (f", did you mean {close[0]}?" if close else "; --help lists them all")
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
        kind = field.type if isinstance(field.type, type) else next(t for t in field.type.__args__ if t is not type(None))
        shown = "" if field.default is None else f" [{field.default}]"
        how = dict(action=argparse.BooleanOptionalAction) if kind is bool else dict(type=kind, choices=field.metadata["choices"])
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
        epochs=c.epochs if c.epochs is not None else (benchmark.epochs if benchmark else questions.USER_FILE_EPOCHS),
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
        raise ValueError(f"--temperature {c.temperature}: must be above 0 in training, where a greedy group would be all alike")
    if not 0 < c.eval_top_p <= 1:
        raise ValueError(f"--eval-top-p {c.eval_top_p}: must be above 0 and at most 1")
    if not 0 <= c.warmup < 1:
        raise ValueError(f"--warmup {c.warmup}: is a share of the updates, from 0 to below 1")
    if not 2 <= c.samples <= c.votes:
        raise ValueError(f"--samples {c.samples}: must be at least 2 and at most --votes ({c.votes})")
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
    classes, class_of = [], {}  # lists of indices; spelling -> its class
    for index, answer in enumerate(answers):
        if answer is None:
            continue
        if answer not in class_of:
            class_of[answer] = next((c for c in classes if questions.same_answer(answers[c[0]], answer, kind)), None)
            if class_of[answer] is None:
                class_of[answer] = []
                classes.append(class_of[answer])
        class_of[answer].append(index)
    if not classes:
        return None, [0.0] * len(answers)
    winner = max(classes, key=len)  # max takes the first of equals, and classes stand in the order of their first members
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


def grpo_loss(logprob, old_logprob, advantage, mask, *, clip=0.2, dual_clip=3.0, ref_logprob=None, kl=0.0, token_count=None):
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
    log_ratio = torch.where(mask, logprob - old_logprob, 0.0)
    ratio = log_ratio.exp()
    unclipped, clipped = -ratio * advantage, -ratio.clamp(1 - clip, 1 + clip) * advantage
    per_token = torch.maximum(unclipped, clipped)
    per_token = torch.where(advantage < 0, torch.minimum(per_token, -dual_clip * advantage), per_token)
    sums = {"clip_fraction": ((clipped > unclipped) & mask).sum(), "kl_old_new": (ratio - 1 - log_ratio).sum()}
    if ref_logprob is not None:
        d = torch.where(mask, ref_logprob - logprob, 0.0)
        k3 = (d.exp() - d - 1).clamp(max=10)
        per_token = per_token + kl * k3
        sums["kl"] = k3.sum()
    loss = torch.where(mask, per_token, 0.0).sum() / (mask.sum() if token_count is None else token_count)
    return loss, {name: value.detach() for name, value in sums.items()}


# ----------------------------------------------------------------------------------------------------------------------
# processes: everything below runs on every rank alike; a single process is a group of one


def start_processes(device):
    """Join the process group of torchrun, or found one of a single process. Returns this rank's device."""
    torchrun = "RANK" in os.environ
    where = {} if torchrun else dict(store=dist.HashStore(), rank=0, world_size=1)
    if not torchrun or os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE"):  # a single machine
        os.environ.setdefault("GLOO_SOCKET_IFNAME", socket.if_nameindex()[0][1])  # loopback: no network, no host name
    # A rank may have to wait for the slowest one's rollout, or for rank 0's checkpoint: hours for a large model.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", timeout=datetime.timedelta(hours=4), **where)
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


def ask(c, tokenizer, name):
    """Load a question set and its prompts; prompts over --max-prompt-tokens are named and left out, never cut."""
    kept, prompts, dropped = [], [], []
    for question in questions.load(name):
        ids = questions.encode_prompt(
            tokenizer, question.prompt, template=c.template, suffix=c.prompt_suffix, thinking=c.thinking, kind=question.kind
        )
        if len(ids) > c.max_prompt_tokens:
            dropped.append(question.id)
        else:
            kept.append(question)
            prompts.append(ids)
    if dropped:
        say(f"left out of {name}: {len(dropped)} prompts over --max-prompt-tokens {c.max_prompt_tokens}: {', '.join(dropped)}")
    if not kept:
        raise ValueError(f"{name}: every prompt is longer than --max-prompt-tokens {c.max_prompt_tokens}")
    return kept, prompts


def open_run(c, device):
    """Load model, tokenizer and questions, print the plan, and build the learner. Raises for whatever cannot work."""
    folder = Path(__file__).parent / "tiny" / "model" if c.model == "tiny" else Path(first_on_main(lambda: resolve(c.model)))
    model_config = read_config(folder)
    tokenizer, eos_ids = questions.load_tokenizer(folder)
    check_vocabulary(model_config, tokenizer)
    train_set, train_prompts = ask(c, tokenizer, c.data)
    eval_set, eval_prompts = (train_set, train_prompts) if c.eval_data == c.data else ask(c, tokenizer, c.eval_data)
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
    budgets = plan(c, model_config, device, longest, len(train_set))
    asked = (train_set, train_prompts, eval_set, eval_prompts)
    run = Run(c, *budgets, longest, folder, tokenizer, eos_ids, *asked, None, None, None, None, None, None)
    if not c.dry_run:
        build_models(run, device)
    return run


def first_on_main(action):
    """action() on rank 0, then on the others, which find in the cache what it downloaded; its failure is everyone's."""
    result = failure = None
    if is_main():
        try:
            result = action()
        except (ValueError, OSError) as error:
            failure = error
    failure = broadcast(failure)
    if failure:
        raise failure
    return result if is_main() else action()


def build_models(run, device):
    """Fill in policy, sampler, learner, reference and optimizer."""
    c, cuda = run.config, device.type == "cuda"
    half = torch.bfloat16 if cuda else torch.float32
    run.policy = run.sampler = Transformer.from_pretrained(run.folder, half if c.eval_only else torch.float32, device)
    if cuda and not c.eval_only:
        run.sampler = Transformer.from_pretrained(run.folder, half, device)
    if cuda:
        most_rows = max(c.questions_per_step * c.votes, len(run.eval_set) * c.eval_samples)
        slots = min(run.rollout_tokens // run.longest, math.ceil(most_rows / dist.get_world_size()))
        run.engine = Engine(run.sampler, slots, run.longest, c.max_new_tokens, run.eos_ids)
    if c.eval_only:
        return
    run.policy.checkpointing = c.checkpointing
    if c.kl > 0:
        run.reference = Transformer.from_pretrained(run.folder, half, device).requires_grad_(False)
    run.learner = DistributedDataParallel(run.policy, gradient_as_bucket_view=True)
    run.optimizer = torch.optim.AdamW(run.policy.parameters(), lr=c.lr, weight_decay=c.weight_decay, fused=True)


def plan(c, model_config, device, longest, question_count):
    """Print what is going to happen, and refuse what cannot fit: the token budgets of (sampler, micro-batch).

    Budgets come from the machine's total memory, not from what happens to be free, so that a restart gets the same ones.
    """
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Transformer(model_config).parameters())
    cuda, neighbours = device.type == "cuda", int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    total = torch.cuda.get_device_properties(device).total_memory if cuda else physical_memory() // neighbours
    half = 2 if cuda else 4  # bytes of a weight in compute precision
    # fp32 master, gradient and two moments; on CUDA the sampler's copy; with --kl the reference
    a_weight = half if c.eval_only else 16 + half * cuda + half * (c.kl > 0)
    fixed, what = parameters * a_weight, "weights" if c.eval_only else "weights, gradients and moments"
    # of the sampler: a token's keys and values; a row of them, and its logits in fp32
    a_token = 2 * model_config.layers * model_config.kv_heads * model_config.head_dim * half
    row = longest * a_token + 4 * model_config.vocab_size
    available = int(0.9 * total) - fixed
    if available < 8 * row:
        raise ValueError(
            f"{c.model} does not fit: each rank needs {fixed / 1e9:.1f} GB for {what} and {8 * row / 1e9:.2f} GB "
            f"to sample eight rows, and has {0.9 * total / 1e9:.1f} GB"
        )
    rollout_tokens = c.rollout_tokens or available // 2 // row * longest
    # of the learner: a token's activations, some 16 widths and 5 MLP widths a layer; with checkpointing a width, and one layer
    layer = 4 * (16 * model_config.hidden_size + 5 * model_config.intermediate_size)
    active = model_config.layers * 4 * model_config.hidden_size + layer if c.checkpointing else model_config.layers * layer
    # a CPU is at full speed with a thousand tokens or a gigabyte of activations; more would only take memory
    largest, room = (32768, available // 4) if cuda else (1024, min(available // 4, 10**9))
    micro_batch_tokens = c.micro_batch_tokens or max(longest, min(largest, room // active))
    steps = c.epochs * math.ceil(question_count / c.questions_per_step)
    say(
        f"model    {c.model}: {parameters / 1e6:.1f} M parameters, {fixed / 1e9:.2f} GB for {what}",
        f"ranks    {dist.get_world_size()} on {device.type}, {torch.get_num_threads()} threads each",
        f"data     {c.data}: {question_count} questions, prompts up to {longest - c.max_new_tokens} tokens",
        f"plan     {c.epochs} epochs, {steps} steps of {c.questions_per_step} questions x {c.votes} votes "
        f"at temperature {c.temperature}; {c.samples} are trained on, rewarded by {c.reward}",
        f"memory   sampler up to {rollout_tokens:,} tokens, learner up to {micro_batch_tokens:,} tokens at a time",
        f"out      {c.out}",
    )
    return rollout_tokens, micro_batch_tokens


def physical_memory():
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peak_memory_gb():
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024) / 1e9


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
        text = questions.decode_response(run.tokenizer, ids)
        answer = questions.extract_answer(text, asked[question].kind, truncated=not finished)
        responses.append(Response(answer, text, len(ids), finished))
    everything = collect(responses)
    return rollout, everything and [everything[q * samples : (q + 1) * samples] for q in range(len(prompts))]


def vote_on(asked, groups):
    """(label, rewards) of each question, from its responses."""
    return [vote([r.answer for r in group], question.kind) for question, group in zip(asked, groups, strict=True)]


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

    Rows of a question stay together, its short responses first, so that little of a micro-batch is padding.
    """
    batches, tokens, before = [], math.inf, None
    for row in sorted(rows, key=lambda r: (int(rollout.question[r]), int(rollout.response_length[r]))):
        question, prompt, response = (int(x[row]) for x in (rollout.question, rollout.prompt_length, rollout.response_length))
        tokens += response + (prompt if question != before else 0)
        if tokens > budget:
            batches.append([])
            tokens = prompt + response
        batches[-1].append(row)
        before = question
    return batches


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
    c, sums, norms, on_policy = run.config, Counter(), [], True
    parameters = list(run.policy.parameters())
    gap_max = torch.zeros((), device=parameters[0].device)
    for number, start in enumerate(range(0, len(advantage), c.questions_per_update)):
        mini = range(start, min(start + c.questions_per_update, len(advantage)))
        if c.kl == 0 and not advantage[mini.start : mini.stop].any():
            continue  # nothing to learn, and momentum and weight decay alone must not move the weights
        rows = [r for r in range(len(rollout)) if int(rollout.question[r]) in mini and int(rollout.sample[r]) < c.samples]
        batches = micro_batches(rollout, rows, run.micro_batch_tokens)
        token_count = int(reduce({"tokens": int(rollout.response_length[rows].sum())})["tokens"])
        passes = int(reduce({"passes": len(batches)}, dist.ReduceOp.MAX)["passes"])
        for index in range(passes):
            real = index < len(batches)
            mb = rollout[torch.tensor(batches[index] if real else [0])]
            exchange = index == passes - 1  # gradients are exchanged once an update, with its last backward pass
            with contextlib.nullcontext() if exchange else run.learner.no_sync():
                loss, mb_sums, mb_gap_max = micro_batch_loss(run, mb, mb.mask() & real, advantage, token_count)
                (loss * dist.get_world_size()).backward()  # DDP averages over ranks, but each loss is a share of one sum
            sums.update({name: value for name, value in mb_sums.items() if on_policy or not name.startswith("gap")})
            gap_max = torch.maximum(gap_max, mb_gap_max) if on_policy else gap_max
        (norm,) = read(torch.nn.utils.clip_grad_norm_(parameters, c.grad_clip))
        if math.isfinite(norm):
            run.optimizer.param_groups[0]["lr"] = learning_rate(c, update + number, updates)
            run.optimizer.step()
            norms.append(norm)
            on_policy = False
        run.optimizer.zero_grad()
    if run.sampler is not run.policy:
        run.sampler.copy_from(run.policy)
    return learning_metrics(run, sums, gap_max, norms)


def micro_batch_loss(run, mb, mask, advantage, token_count):
    """One forward pass: (loss, {name: sum over tokens}, largest gap between sampler and learner). mask [B, R] of mb's tokens."""
    c, device = run.config, next(run.policy.parameters()).device
    mask = mask.to(device, non_blocking=True)  # here and below: queued, the GPU may still be busy with the last micro-batch
    old_logprob = mb.logprob[:, : mask.shape[1]].to(device, non_blocking=True)  # [B, R]
    sample = mb.sample.clamp(max=c.samples - 1)  # a masked row may be any of the N, advantages there are only of the M
    mb_advantage = advantage[mb.question, sample][:, None].to(device, non_blocking=True)  # [B, 1]
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        logprob, entropy = run.learner(mb, c.temperature)
        with torch.no_grad():
            ref_logprob = run.reference(mb, c.temperature)[0] if run.reference else None
    options = dict(clip=c.clip, ref_logprob=ref_logprob, kl=c.kl, token_count=token_count)
    loss, sums = grpo_loss(logprob, old_logprob, mb_advantage, mask, **options)
    gap = torch.where(mask, logprob.detach() - old_logprob, 0.0).abs()
    tokens = mask.sum()
    sums.update(tokens=tokens, entropy=torch.where(mask, entropy.detach(), 0.0).sum(), gap=gap.sum(), gap_tokens=tokens)
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
    metrics.update(logprob_gap=gap / gap_tokens, logprob_gap_max=reduce({"max": gap_max}, dist.ReduceOp.MAX)["max"])
    if norms:
        metrics.update(grad_norm=report.mean(norms), grad_norm_max=max(norms), lr=run.optimizer.param_groups[0]["lr"])
    return {**metrics, "updates": len(norms), "trained_tokens": tokens}


def train_step(run, step):
    """One step of the algorithm (counted from 1): its metrics, on rank 0 also a few responses to show."""
    c = run.config
    batch = draw(step - 1, len(run.train_set), c.questions_per_step, c.seed)  # P questions
    asked, prompts = [run.train_set[i] for i in batch], [run.train_prompts[i] for i in batch]

    began = time.perf_counter()
    rollout, groups = sample_responses(run, asked, prompts, c.votes, stream="train", step=step, temperature=c.temperature)
    sampled = time.perf_counter()
    labels, rewards, metrics = judge(c, asked, groups) if is_main() else (None, None, {})
    rewards = torch.tensor(broadcast(rewards))  # [P, N]; rank 0 decides, so the ranks cannot disagree
    judged = time.perf_counter()
    per_epoch = updates_of(c, len(run.train_set))
    epoch, batch_in_epoch = divmod(step - 1, steps_an_epoch(c, len(run.train_set)))
    first_update = epoch * per_epoch + batch_in_epoch * math.ceil(c.questions_per_step / c.questions_per_update)
    metrics.update(learn(run, rollout, advantages(rewards[:, : c.samples]), first_update, c.epochs * per_epoch))
    learned = time.perf_counter()

    metrics["grading_timeouts"] = questions.grading_timeouts
    metrics["peak_memory_gb"] = peak_memory_gb()
    metrics.update(seconds_sampling=sampled - began, seconds_voting=judged - sampled, seconds_learning=learned - judged)
    metrics["train_tokens_per_s"] = metrics.pop("trained_tokens", 0) / (learned - judged)
    shown = []  # a few responses for rollouts.jsonl
    if is_main():
        metrics["rollout_tokens_per_s"] = sum(r.tokens for group in groups for r in group) / (sampled - began)
        for q, group, label, row in list(zip(asked, groups, labels, rewards.tolist(), strict=True))[:4]:
            response = {"response": group[0].text, "answer": group[0].answer, "label": label, "reward": row[0]}
            shown.append({"step": step, "id": q.id, "prompt": q.prompt, **response})
    return {f"train/{name}": value for name, value in metrics.items()}, shown


def steps_an_epoch(c, question_count):
    return math.ceil(question_count / c.questions_per_step)


def updates_of(c, question_count):
    """Optimizer updates in an epoch; the last batch of an epoch may be smaller."""
    full, rest = divmod(question_count, c.questions_per_step)
    return full * math.ceil(c.questions_per_step / c.questions_per_update) + math.ceil(rest / c.questions_per_update)


# ----------------------------------------------------------------------------------------------------------------------
# evaluation


def evaluate(run, step, sampling=None):
    """Sample every evaluation question and grade it: on rank 0 (metrics, a record a question).

    sampling: (samples a question, temperature, top-p), by default what the flags say.
    """
    c = run.config
    samples, temperature, top_p = sampling or (c.eval_samples, c.eval_temperature, c.eval_top_p)
    how = dict(stream="eval", step=step, temperature=temperature, top_p=top_p)
    _, groups = sample_responses(run, run.eval_set, run.eval_prompts, samples, **how)
    if not is_main():
        return {}, []
    records = [report.record(*row) for row in zip(run.eval_set, groups, vote_on(run.eval_set, groups), strict=True)]
    return {**report.evaluation_metrics(records, samples), **report.describe(groups)}, records


def evaluate_fully(run, step):
    """The evaluation of the flags, and for the before/after table what a lower temperature alone would give."""
    c = run.config
    metrics, records = evaluate(run, step)
    for name, samples, temperature, top_p in (("greedy", 1, 0.0, 1.0), ("pass@1 at 0.6/0.95", 16, 0.6, 0.95)):
        if (temperature, top_p) != (c.eval_temperature, c.eval_top_p):
            other, _ = evaluate(run, step, (samples, temperature, top_p))
            metrics.update({name: other["pass@1"], f"{name}_se": other["pass@1_se"]} if "pass@1" in other else {})
    return metrics, records


# ----------------------------------------------------------------------------------------------------------------------
# the loop


def train(run, state):
    """From `state` (step 0, or a checkpoint's) to the last step; returns the state, None if --max-minutes ran out first."""
    c, entered, seconds_before = run.config, time.monotonic(), state["seconds"]
    steps = c.epochs * steps_an_epoch(c, len(run.train_set))
    if state["step"] == 0:
        metrics, records = evaluate_fully(run, 0)
        state["before"] = state["best"] = {"step": 0, "metrics": metrics, "records": records}
        log(run, {"step": 0, "epoch": 0, **{f"eval/{k}": v for k, v in metrics.items()}}, [])
    bar = tqdm(total=steps, initial=state["step"], disable=not is_main(), unit="step", dynamic_ncols=True)
    for step in range(state["step"] + 1, steps + 1):
        metrics, shown = train_step(run, step)
        line = {"step": step, "epoch": math.ceil(step / steps_an_epoch(c, len(run.train_set))), **metrics}
        last = step == steps
        if last or step % c.eval_every == 0:
            bar.set_description("evaluating")
            metrics, records = evaluate_fully(run, step) if last else evaluate(run, step)
            line.update({f"eval/{name}": value for name, value in metrics.items()})
            state["after"] = {"step": step, "metrics": metrics, "records": records}
            if metrics.get("pass@1", 0) > state["best"]["metrics"].get("pass@1", 0):
                state["best"] = {"step": step, "metrics": metrics, "records": []}
        state["step"], state["seconds"] = step, seconds_before + time.monotonic() - entered
        log(run, line, shown)
        bar.update()
        bar.set_description("")
        bar.set_postfix_str(report.progress(line, state["after"]["metrics"] if "after" in state else state["before"]["metrics"]))
        out_of_time = broadcast(c.max_minutes is not None and time.monotonic() - entered > 60 * c.max_minutes)
        if is_main() and (last or out_of_time or step % c.save_every == 0):
            whole = {**state, "config": dataclasses.asdict(c), "environment": environment(c)}
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
        "machine": torch.cuda.get_device_name() if c.device == "cuda" else f"{platform.machine()}, {os.cpu_count()} cores",
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
    print(f"\n{c.out}: curves.png, summary.json, metrics.jsonl, rollouts.jsonl, model/ ({state['seconds'] / 60:.1f} minutes)")


def main(argv=None):
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers.logging.set_verbosity_error()
    given = parse(argv)
    try:  # the door: whatever is wrong with flags, files or memory is said in a sentence, before any work
        c = configure(given)
        device = start_processes(c.device)
        run = open_run(c, device)
        if run.config.dry_run:
            return
        state = open_out(run)
    except (ValueError, OSError) as error:
        if not dist.is_initialized() or is_main():
            print(f"ttrl.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    if run.config.eval_only:
        metrics, _ = evaluate_fully(run, 0)
        if is_main():
            whole = {"evaluation": metrics, "environment": environment(run.config), "config": dataclasses.asdict(run.config)}
            checkpoint.write_whole(Path(run.config.out) / "evaluation.json", json.dumps(whole, indent=1))
            print(report.table({"evaluation": metrics}))
    elif train(run, state) and is_main():
        finish(run, state)


def open_out(run):
    """Make the run's folder, or find a run in it and go on from its checkpoint: the state that `train` starts from."""
    c, out = run.config, Path(run.config.out)
    if is_main():
        out.mkdir(parents=True, exist_ok=True)
    state = {"step": 0, "seconds": 0.0}
    folder = checkpoint.newest(out / "checkpoint")
    if folder and not c.eval_only:
        state = checkpoint.read_state(folder)
        compare_with_checkpoint(c, state.pop("config"), state.pop("environment"))
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

            wandb.init(project="ttrl", name=out.name, config=dataclasses.asdict(c), resume="allow", id=out.name)
    dist.barrier()
    return state


def compare_with_checkpoint(c, then, environment_then):
    """Raise ValueError if the flags that matter changed since the checkpoint; say so if the machine or versions did."""
    now = dataclasses.asdict(c)
    changed = [name for name in now if now[name] != then.get(name) and name not in RESUME_MAY_CHANGE]
    if changed and not c.allow_changed_flags:
        what = ", ".join(f"--{name.replace('_', '-')} was {then.get(name)} and is {now[name]}" for name in changed)
        raise ValueError(f"{c.out} holds a run with other flags ({what}): choose another --out, or add --allow-changed-flags")
    for name, value in environment(c).items():
        if environment_then.get(name) != value:
            say(f"note     {name} was {environment_then.get(name)} and is {value}: the run goes on, but not bitwise the same")


if __name__ == "__main__":
    torch.use_deterministic_algorithms(not torch.cuda.is_available())
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that costs time
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("interrupted; the same command goes on from the last checkpoint") from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
