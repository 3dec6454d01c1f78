"""The settings of a run. Each field of Config is a flag of the same name; the defaults are the paper's."""

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
from support.untrusted import quote, shorten


def flag(default, text, *, type=None, choices=None):
    """A field of Config. `type` is required if the default is None."""
    kind = type or default.__class__
    return dataclasses.field(default=default, metadata={"help": text, "type": kind, "choices": choices})


@dataclass(frozen=True)
class Config:
    """All settings. None is a value that the model, the data or the machine decides (see `configure`)."""

    # what
    model: str = flag("tiny", "tiny, a folder in Hugging Face format, a hub id, or a name: Qwen2.5-Math-1.5B")
    data: str | None = flag(
        None,
        "tiny, aime, amc, math, math-l1 to -l5, gpqa, or a .json/.jsonl file [model tiny: tiny, else aime]",
        type=str,
    )
    template: str = flag(
        "auto", "auto: the tokenizer's chat template; none: prompts as they are", choices=("auto", "none")
    )
    prompt_suffix: str = flag(
        "auto", "text appended to each prompt; auto: ask for \\boxed{} if nothing else does; or none"
    )
    thinking: bool = flag(False, "turn on Qwen3's thinking mode")
    max_prompt_tokens: int = flag(1024, "skip questions whose prompts are longer, and list them")
    # sampling
    votes: int = flag(64, "responses sampled per question")
    questions_per_step: int | None = flag(None, "questions per rollout batch [8; math 32]", type=int)
    max_new_tokens: int = flag(3072, "maximum length of a response; longer ones are truncated")
    temperature: float | None = flag(
        None, "for sampling and for the loss [1.0 for REASONING_MODELS and --thinking, else 0.6]", type=float
    )
    # learning
    samples: int = flag(32, "train on the first SAMPLES of the votes")
    reward: str = flag("vote", "reward function")  # choices: REWARDS in ttrl.py
    epochs: int | None = flag(
        None, "passes over the questions [aime 80, amc 30, math 10, math-l* and gpqa 30, a file 10]", type=int
    )
    questions_per_update: int = flag(1, "questions per optimizer update")
    lr: float = flag(5e-7, "peak learning rate of AdamW, with cosine decay to 0")
    warmup: float = flag(0.03, "fraction of the updates that warm up the learning rate")
    clip: float = flag(0.2, "clip range of the probability ratio")
    kl: float = flag(0.001, "weight of the k3 KL to the initial policy; 0: no reference model is kept")
    weight_decay: float = flag(0.01, "weight decay of AdamW")
    grad_clip: float = flag(1.0, "maximum gradient norm")
    # evaluation
    eval_every: int = flag(2, "steps between evaluations; a run also starts and ends with one")
    eval_samples: int = flag(16, "responses sampled per question")
    eval_temperature: float = flag(0.6, "sampling temperature; 0 is greedy")
    eval_top_p: float = flag(0.95, "nucleus sampling (training samples from the whole softmax)")
    eval_data: str | None = flag(None, "questions for evaluation [those of --data]", type=str)
    eval_only: bool = flag(False, "evaluate and exit")
    # memory
    shard: int | None = flag(
        None, "ranks over which weights, gradients and moments are sharded; 1: DDP [by memory]", type=int
    )
    sampler_ranks: int | None = flag(
        None, "ranks over which the sampler's attention heads are split [by memory]", type=int
    )
    offload: bool | None = flag(
        None, "keep weights, gradients and moments in host memory [only if nothing else fits]", type=bool
    )
    rollout_tokens: int | None = flag(None, "tokens in the KV cache of a rank [by memory]", type=int)
    micro_batch_tokens: int | None = flag(None, "tokens per micro-batch of training [by memory]", type=int)
    checkpointing: bool | None = flag(
        None, "gradient checkpointing: less memory, a third more time [by memory; CPU: off]", type=bool
    )
    # the run
    out: str | None = flag(None, "folder of the run; resumes the run in it [runs/<model>-<data>]", type=str)
    seed: int = flag(0, "seed of sampling and of the order of the questions")
    device: str = flag("auto", "where to run", choices=("auto", "cpu", "cuda"))
    save_every: int = flag(10, "steps between checkpoints")
    stop_when_settled: int | None = flag(
        None, "end once samples agree no more in this many passes than in as many before [never]", type=int
    )
    max_minutes: float | None = flag(
        None, "stop after this many minutes, and one step at least; the same command resumes", type=float
    )
    allow_changed_flags: bool = flag(False, "resume even if flags or the program's files have changed")
    dry_run: bool = flag(False, "print the plan and exit")
    gpus: str | None = flag(
        None, "with --dry-run: plan for GPUs that are not here: 8x80 (GB), 16xH100, 4x4090", type=str
    )
    wandb: bool = flag(False, "also log to Weights & Biases")

    def evaluations(self, lower_temperatures):
        """{name: (samples per question, temperature, top-p)}, "" by the flags, others lower."""
        own = self.eval_samples, self.eval_temperature, self.eval_top_p
        others = LOWER_TEMPERATURES if lower_temperatures else {}
        return {"": own, **{name: how for name, how in others.items() if how[1:] != own[1:]}}

    @property
    def sharded(self):
        """Are weights, gradients and moments sharded (FSDP2)? If not, each rank holds all of them (DDP)."""
        return self.shard > 1 or self.offload


GROUPS = {"what": "model", "sampling": "votes", "learning": "samples", "evaluation": "eval_every",
          "memory": "shard", "the run": "out"}  # fmt: skip  # title: first field
# The embedded model learns in minutes with these; `differences` lists them in the plan.
TINY = dict(temperature=1.0, lr=5e-5, epochs=10, max_new_tokens=96, questions_per_update=2, kl=0.0,
            eval_every=16, eval_samples=64, eval_temperature=1.0, eval_top_p=1.0)  # fmt: skip
# Models with one of these in their name use temperature 1.0 (paper, 3.1).
REASONING_MODELS = ("qwen2.5-math", "deepseek-r1", "skywork-or1")
# These change nothing that is computed, except by rounding.
RESUME_MAY_CHANGE = {"out", "max_minutes", "stop_when_settled", "allow_changed_flags", "dry_run", "wandb",
                     "save_every", "shard", "sampler_ranks", "offload", "gpus", "rollout_tokens",
                     "micro_batch_tokens", "checkpointing"}  # fmt: skip
# Further evaluations before the first step and after the last: samples, temperature, top-p
LOWER_TEMPERATURES = {"greedy": (1, 0.0, 1.0), "pass@1 at 0.6/0.95": (16, 0.6, 0.95)}


class Parser(argparse.ArgumentParser):
    def error(self, message):
        """Exit with code 2 and one sentence, which argparse would bury under the usage of forty flags."""
        if message.startswith("unrecognized arguments: "):
            name = message.split(" ")[2]
            close = difflib.get_close_matches(name, self._option_string_actions, n=1)
            advice = f", did you mean {close[0]}?" if close else "; --help lists them all"
            message = f"unknown flag {name}{advice}"
        self.exit(2, f"ttrl.py: {shorten(message, 300)}\n")


def flag_name(field):
    return "--" + field.replace("_", "-")


def flags(c, fields):
    """The command-line flags that set `fields` to their values in `c`.

    >>> flags(Config(shard=8, offload=False), ["shard", "offload"])
    '--shard 8 --no-offload'
    """
    texts = []
    for field in fields:
        value = getattr(c, field)
        if isinstance(value, bool):
            texts.append(flag_name(field if value else f"no_{field}"))
        else:
            texts.append(f"{flag_name(field)} {value}")
    return " ".join(texts)


def parse(argv, rewards):
    """The flags that were given, {field: value}. rewards: the choices of --reward."""
    parser = Parser(
        description="Test-Time Reinforcement Learning (arXiv 2504.16084) from scratch.",
        epilog=f"REASONING_MODELS: names of models or folders that contain {', '.join(REASONING_MODELS)}.",
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
    """The Config of a run: the flags given, then presets, then values that the model and the data decide.

    Raises ValueError naming the flag and what was expected. Memory flags that were not given stay None: the
    plan decides them at each start, since a run may resume on another machine.

    >>> configure({"model": "Qwen2.5-Math-1.5B"}).epochs  # AIME 2024, 80 epochs
    80
    """
    preset = TINY if given.get("model", "tiny") == "tiny" else {}
    c = decide(Config(**{**preset, **given}))
    check(c)
    return c


def decide(c):
    """Fill in the fields that are None from the model, the data and the device, except memory flags."""
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
    """Hyperparameters that differ from the paper's, each with its reason.

    >>> differences(configure({"model": "Qwen2.5-Math-1.5B", "lr": 1e-6}), {"lr": 1e-6})
    ['--lr 1e-06 (paper 5e-07, given)']
    """
    return [
        f"{flag_name(name)} {getattr(c, name)} (paper {value}, "
        f"{'given' if name in given else 'preset of tiny'})"
        for name, value in papers_values(c).items()
    ]


def papers_values(c):
    """{field: the paper's value} for the hyperparameters that differ in `c`."""
    paper = decide(Config(model=c.model, data=c.data, thinking=c.thinking))
    names = [field.name for field in dataclasses.fields(Config)]
    names = names[names.index("votes") : names.index("eval_data")]  # sampling, learning, evaluation
    if c.eval_only:
        names = ["max_new_tokens", "eval_samples", "eval_temperature", "eval_top_p"]
    return {name: getattr(paper, name) for name in names if getattr(c, name) != getattr(paper, name)}


def check(c):
    """Raise ValueError for the first flag with an invalid value."""
    positive = """shard sampler_ranks votes samples questions_per_step questions_per_update epochs
        max_prompt_tokens max_new_tokens eval_every eval_samples save_every rollout_tokens
        micro_batch_tokens max_minutes stop_when_settled lr clip grad_clip"""
    rules = [(name, lambda v: 0 < v < math.inf, "must be above 0") for name in positive.split()]
    rules += [
        (name, lambda v: 0 <= v < math.inf, "must not be negative")
        for name in ("kl", "weight_decay", "eval_temperature")
    ]
    rules += [
        ("temperature", lambda v: 0 < v < math.inf, "must be above 0: greedy samples would all be the same"),
        ("eval_top_p", lambda v: 0 < v <= 1, "must be above 0 and at most 1"),
        ("warmup", lambda v: 0 <= v < 1, "must be a fraction of the updates, from 0 to below 1"),
        ("samples", lambda v: 2 <= v <= c.votes, f"must be at least 2 and at most --votes ({c.votes})"),
        ("seed", lambda v: 0 <= v < 2**32, f"must be a whole number from 0 to {2**32 - 1}"),
    ]
    for name, value in dataclasses.asdict(c).items():
        if isinstance(value, str) and questions.lone_surrogate(value):
            raise ValueError(f"{flag_name(name)} {quote(value)}: is not UTF-8 text")
        if isinstance(value, str) and name != "prompt_suffix" and not value.isprintable():
            raise ValueError(f"{flag_name(name)} {quote(value)}: has a character that cannot be printed")
    for name, holds, sentence in rules:
        value = getattr(c, name)
        if value is not None and not holds(value):
            raise ValueError(f"{flag_name(name)} {value}: {sentence}")
    if c.eval_only and c.max_minutes is not None:
        raise ValueError(f"--max-minutes {c.max_minutes}: --eval-only makes one evaluation, as a whole")
    if c.gpus:
        parse_gpus(c.gpus)
        if not c.dry_run:
            raise ValueError(f"--gpus {c.gpus}: plans for GPUs that are not here; add --dry-run")
    if c.wandb and importlib.util.find_spec("wandb") is None:
        raise ValueError(
            "--wandb: the package wandb is not installed; run `pip install wandb` or drop the flag"
        )
    if c.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device here")
