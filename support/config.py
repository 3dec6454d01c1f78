"""The settings of a run: every field of Config is a flag of the same name. The defaults are the paper's."""

import argparse
import dataclasses
import difflib
import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from support import questions
from support.gpus import parse_gpus


def flag(default, text, *, type=None, choices=None):
    """A field of Config. `type` is needed where the default is None: the model or the data decide it."""
    kind = type or default.__class__
    return dataclasses.field(default=default, metadata={"help": text, "type": kind, "choices": choices})


@dataclass(frozen=True)
class Config:
    """All settings. None stands for a value that the model, the data or the machine decide (`configure`)."""

    # what
    model: str = flag("tiny", "tiny, a folder in Hugging Face format, a hub id, or a name: Qwen2.5-Math-1.5B")
    data: str | None = flag(
        None,
        "tiny, aime, amc, math, math-l1 to -l5, gpqa, or a .json/.jsonl file [tiny: tiny, else aime]",
        type=str,
    )
    template: str = flag(
        "auto", "the tokenizer's chat template, or none: verbatim prompts", choices=("auto", "none")
    )
    prompt_suffix: str = flag(
        "auto", "appended to prompts; auto asks for \\boxed{} where nothing does; or none"
    )
    thinking: bool = flag(False, "Qwen3's thinking switch")
    max_prompt_tokens: int = flag(1024, "questions with longer prompts are listed and left out")
    # sampling
    votes: int = flag(64, "responses sampled per question")
    questions_per_step: int | None = flag(None, "questions in one rollout batch [8; math 32]", type=int)
    max_new_tokens: int = flag(3072, "longest response; it is cut there")
    temperature: float | None = flag(
        None, "of sampling and of the loss [1.0 for REASONING_MODELS and --thinking, else 0.6]", type=float
    )
    # learning
    samples: int = flag(32, "of the votes, the first so many are trained on")
    reward: str = flag("vote", "what responses are rewarded by")  # choices: REWARDS in rewards.py
    epochs: int | None = flag(
        None, "passes over the questions [aime 80, amc 30, math 10, math-l* and gpqa 30, a file 10]", type=int
    )
    questions_per_update: int = flag(1, "questions in one optimizer update")
    lr: float = flag(5e-7, "peak learning rate of AdamW, cosine decay to 0")
    warmup: float = flag(0.03, "share of the updates in which the learning rate rises")
    clip: float = flag(0.2, "clip range of the ratio")
    kl: float = flag(0.001, "weight of the k3 KL to the initial policy; 0 holds no reference model")
    weight_decay: float = flag(0.01, "AdamW's")
    grad_clip: float = flag(1.0, "largest gradient norm")
    # evaluation
    eval_every: int = flag(2, "steps between evaluations; also before the first step and after the last")
    eval_samples: int = flag(16, "responses sampled per question")
    eval_temperature: float = flag(0.6, "0 is greedy")
    eval_top_p: float = flag(0.95, "nucleus sampling (training samples from the whole softmax)")
    eval_data: str | None = flag(None, "evaluate on other questions than --data [the same]", type=str)
    eval_only: bool = flag(False, "evaluate and exit")
    # memory
    shard: int | None = flag(
        None, "ranks that split weights, gradients and moments; 1: each holds all (DDP) [by memory]", type=int
    )
    sampler_ranks: int | None = flag(
        None, "ranks that split the sampler's copy by attention heads [by memory]", type=int
    )
    offload: bool | None = flag(
        None, "weights, gradients and moments lie in host memory [where nothing else fits]", type=bool
    )
    rollout_tokens: int | None = flag(None, "tokens in the KV cache of a rank [by memory]", type=int)
    micro_batch_tokens: int | None = flag(None, "tokens of a micro-batch of learning [by memory]", type=int)
    checkpointing: bool | None = flag(
        None, "gradient checkpointing: less memory, a third more time [by memory; CPU: off]", type=bool
    )
    # the run
    out: str | None = flag(None, "folder of the run, resumed if it holds one [runs/<model>-<data>]", type=str)
    seed: int = flag(0, "of sampling and of the order of the questions")
    device: str = flag("auto", "where to run", choices=("auto", "cpu", "cuda"))
    save_every: int = flag(10, "steps between checkpoints")
    max_minutes: float | None = flag(
        None, "stop cleanly after so many minutes; the same command goes on", type=float
    )
    allow_changed_flags: bool = flag(False, "resume although flags or the program's files have changed")
    dry_run: bool = flag(False, "print the plan and exit")
    gpus: str | None = flag(
        None, "with --dry-run: plan for GPUs that are not here: 8x80 (GB), 16xH100, 4x4090", type=str
    )
    wandb: bool = flag(False, "log to Weights & Biases too")


GROUPS = {"what": "model", "sampling": "votes", "learning": "samples", "evaluation": "eval_every",
          "memory": "shard", "the run": "out"}  # fmt: skip  # each begins with this field
# The embedded pair learns in minutes with these; `differences` lists them in the plan.
TINY = dict(temperature=1.0, lr=5e-5, epochs=10, max_new_tokens=96, questions_per_update=2, kl=0.0,
            eval_every=16, eval_samples=64, eval_temperature=1.0, eval_top_p=1.0)  # fmt: skip
# Part of the name: temperature 1.0 (paper, 3.1)
REASONING_MODELS = ("qwen2.5-math", "deepseek-r1", "skywork-or1")
# None of these changes what is computed, but for rounding.
RESUME_MAY_CHANGE = {"out", "max_minutes", "allow_changed_flags", "dry_run", "wandb", "save_every",
                     "shard", "sampler_ranks", "offload", "gpus", "rollout_tokens", "micro_batch_tokens",
                     "checkpointing"}  # fmt: skip
# What is evaluated before the first step and after the last besides: samples, temperature, top-p
LOWER_TEMPERATURES = {"greedy": (1, 0.0, 1.0), "pass@1 at 0.6/0.95": (16, 0.6, 0.95)}


class Parser(argparse.ArgumentParser):
    def error(self, message):
        """One sentence and exit code 2; the usage of forty flags would bury it."""
        if message.startswith("unrecognized arguments: "):
            name = message.split()[2]
            close = difflib.get_close_matches(name, self._option_string_actions, n=1)
            advice = f", did you mean {close[0]}?" if close else "; --help lists them all"
            message = f"unknown flag {name}{advice}"
        self.exit(2, f"ttrl.py: {message}\n")


def flag_name(field):
    return "--" + field.replace("_", "-")


def parse(argv, rewards):
    """Only the flags that were given, {field: value}. rewards: the names that --reward takes."""
    parser = Parser(
        description="Test-Time Reinforcement Learning (arXiv 2504.16084) from scratch.",
        epilog=f"REASONING_MODELS: {', '.join(REASONING_MODELS)} (part of the model's or the folder's name).",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    starts = {field: title for title, field in GROUPS.items()}
    group = parser
    for field in dataclasses.fields(Config):
        if field.name in starts:
            group = parser.add_argument_group(starts[field.name])
        options = {"type": field.metadata["type"], "choices": field.metadata["choices"]}
        if field.metadata["type"] is bool:
            options = {"action": argparse.BooleanOptionalAction}
        if field.name == "reward":
            options["choices"] = tuple(rewards)
        default = "" if field.default is None else f" [{field.default}]"
        text = (field.metadata["help"] + default).replace("%", "%%")
        group.add_argument(flag_name(field.name), help=text, **options)
    return vars(parser.parse_args(argv))


def configure(given):
    """The whole Config of a run from the flags given: presets, then what the model and the data decide.

    Raises ValueError naming the flag and what was expected. Memory budgets stay None unless given: they
    depend on the number of ranks, and a run may be resumed by another number.

    >>> configure({"model": "Qwen2.5-Math-1.5B"}).epochs  # AIME 2024, 80 epochs
    80
    """
    preset = TINY if given.get("model", "tiny") == "tiny" else {}
    c = decide(Config(**{**preset, **given}))
    check(c)
    return c


def decide(c):
    """Fill in the fields that are None by model, data and machine; the memory budgets come later."""
    data = c.data or ("tiny" if c.model == "tiny" else "aime")
    benchmark = questions.benchmark_of(data)
    name = Path(c.model).name.lower()
    device = c.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    decided = {
        "data": data,
        "eval_data": data,
        "questions_per_step": benchmark.questions_per_step if benchmark else 8,
        "epochs": benchmark.epochs if benchmark else questions.USER_FILE_EPOCHS,
        "temperature": 1.0 if c.thinking or any(part in name for part in REASONING_MODELS) else 0.6,
        "checkpointing": None if device == "cuda" or c.gpus else False,
        "out": f"runs/{Path(c.model).name}-{Path(data).stem}",
    }
    missing = {field: value for field, value in decided.items() if getattr(c, field) is None}
    return dataclasses.replace(c, device=device, **missing)


def differences(c, given):
    """Hyperparameters that are not the paper's, each with its reason.

    >>> differences(configure({"model": "Qwen2.5-Math-1.5B", "lr": 1e-6}), {"lr": 1e-6})
    ['--lr 1e-06 (paper 5e-07, given)']
    """
    return [
        f"{flag_name(name)} {getattr(c, name)} (paper {value}, "
        f"{'given' if name in given else 'preset of tiny'})"
        for name, value in papers_values(c).items()
    ]


def papers_values(c):
    """{field: the paper's value} of the hyperparameters that have another value in `c`."""
    paper = decide(Config(model=c.model, data=c.data, thinking=c.thinking))
    names = [field.name for field in dataclasses.fields(Config)]
    names = names[names.index("votes") : names.index("eval_data")]  # sampling, learning, evaluation
    if c.eval_only:
        names = ["max_new_tokens", "eval_samples", "eval_temperature", "eval_top_p"]
    return {name: getattr(paper, name) for name in names if getattr(c, name) != getattr(paper, name)}


def check(c):
    """Raise ValueError for the first flag whose value cannot work."""
    positive = """shard sampler_ranks votes samples questions_per_step questions_per_update epochs
        max_prompt_tokens max_new_tokens eval_every eval_samples save_every rollout_tokens
        micro_batch_tokens max_minutes lr clip grad_clip"""
    rules = [(name, lambda v: 0 < v < math.inf, "must be above 0") for name in positive.split()]
    rules += [
        (name, lambda v: 0 <= v < math.inf, "must not be negative")
        for name in ("kl", "weight_decay", "eval_temperature")
    ]
    rules += [
        ("temperature", lambda v: 0 < v < math.inf, "must be above 0: greedy samples would all be alike"),
        ("eval_top_p", lambda v: 0 < v <= 1, "must be above 0 and at most 1"),
        ("warmup", lambda v: 0 <= v < 1, "is a share of the updates, from 0 to below 1"),
        ("samples", lambda v: 2 <= v <= c.votes, f"must be at least 2 and at most --votes ({c.votes})"),
        ("seed", lambda v: 0 <= v < 2**32, f"must be a whole number from 0 to {2**32 - 1}"),
    ]
    for name, value in dataclasses.asdict(c).items():
        if isinstance(value, str) and questions.lone_surrogate(value):
            raise ValueError(f"{flag_name(name)} {value!r}: is not UTF-8 text")
    for name, holds, sentence in rules:
        value = getattr(c, name)
        if value is not None and not holds(value):
            raise ValueError(f"{flag_name(name)} {value}: {sentence}")
    if c.gpus:
        parse_gpus(c.gpus)
        if not c.dry_run:
            raise ValueError(f"--gpus {c.gpus}: plans for GPUs that are not here, so --dry-run goes with it")
    if c.wandb and importlib.util.find_spec("wandb") is None:
        raise ValueError(
            "--wandb: the package wandb is not installed; `pip install wandb`, or leave the flag out"
        )
    if c.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device here")
