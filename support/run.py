"""A run: what its steps share, how it is opened from the flags, resumed from a checkpoint, and saved.

    policy      fp32 master weights, the ones that learn
    learner     the policy as DDP wraps it: its gradients are averaged over the ranks; or in shards
    sampler     the policy itself on a CPU; on a GPU, or beside shards, a copy, refreshed after every step
    reference   the initial policy, frozen, where --kl is above 0

What the ranks share out is the rows: responses to sample and to learn from. Where a model does not fit, also
the learner's state and the sampler: distributed/parallel.py.
"""

import dataclasses
import hashlib
import json
import math
import os
import platform
import shutil
import subprocess
from collections import deque
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
import transformers

from distributed import checkpoint, parallel
from distributed.memory import Split, choose_layout, find_machine
from distributed.plan import most_rows, print_plan, steps_per_epoch
from distributed.ranks import (
    check_same,
    check_shared,
    first_on_node,
    is_rank0,
    on_every_rank,
    on_rank0,
    print0,
    world_size,
)
from model import ModelConfig, Transformer
from report import screen
from report.curves import draw_curves
from report.ledger import summarize
from report.page import write_page
from rollout import Engine
from support import questions
from support.config import RESUME_MAY_CHANGE, Config, flag_name
from support.hub import TOKENIZER_FILES, fetch_config, fetch_weights
from support.pretrained import check_vocabulary
from support.prompts import encode_prompt, load_tokenizer, show_prompt

HERE = Path(__file__).resolve().parents[1]
PACKAGES = "distributed grading kernels report support".split()  # with the files beside ttrl.py, the program


@dataclass
class Run:
    config: Config
    device: torch.device
    folder: Path  # of the model
    tokenizer: object
    eos_ids: list
    train_set: list  # of Question
    train_prompts: list  # of token ids
    eval_set: list
    eval_prompts: list
    longest: int  # tokens of the longest prompt and response
    rollout_tokens: int  # --rollout-tokens, or what memory allows
    micro_batch_tokens: int  # --micro-batch-tokens, or what memory allows
    checkpointing: bool  # --checkpointing, or whether memory asks for it
    split: Split  # what the ranks share out beside the rows
    policy: Transformer | None = None
    learner: torch.nn.Module | None = None
    sampler: Transformer | None = None
    reference: Transformer | None = None
    optimizer: torch.optim.Optimizer | None = None
    # Kept on a GPU for its CUDA graphs; a CPU gives the memory back to the learner.
    engine: Engine | None = None


# ----------------------------------------------------------------------------------------------------------
# opened


def open_run(c, device, given):
    """Load questions and tokenizer, print the plan, then build the models.

    given: the flags that the user set. The weights are fetched last, when all else is known to work. Raises
    ValueError for what cannot work.
    """
    check_same({"flags": dataclasses.asdict(c), "sources": SOURCES})
    folder = HERE / "tiny" / "model" if c.model == "tiny" else first_on_node(lambda: fetch_config(c.model))
    eval_set = first_on_node(lambda: questions.load(c.eval_data))
    train_set = eval_set
    if c.data != c.eval_data and not c.eval_only:
        train_set = first_on_node(lambda: questions.load(c.data))
    machine = find_machine(c, device)
    run = on_every_rank(lambda: prepare(c, device, machine, given, folder, train_set, eval_set))
    check_same({"questions": fingerprint(run)})
    if not c.dry_run:
        if c.model != "tiny":
            run.folder = first_on_node(lambda: fetch_weights(c.model))
            check_same({"revisions of the model": run.folder.name})
        build_models(run, device)
    return run


def prepare(c, device, machine, given, folder, train_set, eval_set):
    """The run without its models: tokenizer, prompts and memory budgets. Prints the plan."""
    model_config = ModelConfig.from_pretrained(folder)
    tokenizer, eos_ids = load_tokenizer(folder)
    check_vocabulary(model_config, tokenizer)
    evaluation = load_prompts(c, tokenizer, c.eval_data, eval_set)
    train = evaluation if train_set is eval_set else load_prompts(c, tokenizer, c.data, train_set)
    longest = max(map(len, train[1] + evaluation[1])) + c.max_new_tokens
    check_against_data(c, model_config, machine, train[0], longest)
    layout = choose_layout(c, model_config, machine, longest, most_rows(c, len(evaluation[0])))
    budgets = layout.rollout_tokens, layout.micro_batch_tokens, layout.checkpointing
    run = Run(c, device, folder, tokenizer, eos_ids, *train, *evaluation, longest, *budgets, layout.split)
    print_plan(run, model_config, machine, layout, given, show_prompt(tokenizer, run.train_prompts[0]))
    return run


def load_prompts(c, tokenizer, name, loaded):
    """(questions, prompts) of a question set. Prompts that are too long are named and left out, never cut."""
    kept, prompts, dropped = [], [], []
    options = dict(template=c.template, suffix=c.prompt_suffix, thinking=c.thinking)
    for question in loaded:
        ids = encode_prompt(tokenizer, question.prompt, kind=question.kind, **options)
        if len(ids) > c.max_prompt_tokens:
            dropped.append(question.id)
        else:
            kept.append(question)
            prompts.append(ids)
    limit = f"--max-prompt-tokens {c.max_prompt_tokens}"
    if dropped:
        print0(f"left out of {name}: {len(dropped)} prompts over {limit}: {', '.join(dropped)}")
    if not kept:
        raise ValueError(f"{name}: every prompt is longer than {limit}")
    return kept, prompts


def check_against_data(c, model_config, machine, train_set, longest):
    """Raise ValueError for settings that do not go with these questions, this model or this many ranks."""
    if longest > model_config.max_positions:
        raise ValueError(
            f"--max-new-tokens {c.max_new_tokens}: with the longest prompt that is {longest} tokens, "
            f"but {c.model} takes {model_config.max_positions} (max_position_embeddings)"
        )
    if c.eval_only:
        return
    if c.reward == "gold" and any(question.answer is None for question in train_set):
        raise ValueError(f"--reward gold: {c.data} has questions without an answer")
    if machine.ranks > c.votes:
        raise ValueError(
            f"--votes {c.votes}: fewer than the {machine.ranks} ranks, each needs a response to learn from"
        )


def build_models(run, device):
    """Fill in policy, sampler, learner, reference and optimizer."""
    c = run.config
    # Before any weight is read: a rank whose files are damaged would leave the others waiting for a group.
    group = parallel.sampler_group(device, run.split.sampler_ranks)
    grid = parallel.shard_mesh(device, run.split.shard) if run.split.sharded and not c.eval_only else None
    on_every_rank(lambda: load_models(run, device, group, grid))
    if device.type == "cuda":
        # Of the fullest group: the ranks that have a row more than others may all be in one.
        rows = math.ceil(most_rows(c, len(run.eval_set)) / world_size()) * run.split.sampler_ranks
        slots = min(run.rollout_tokens // run.longest, rows)
        run.engine = Engine(run.sampler, slots, run.longest, c.max_new_tokens, run.eos_ids)
    if c.eval_only:
        return
    run.policy.checkpointing = run.checkpointing
    run.learner = run.policy if run.split.sharded else parallel.data_parallel(run.policy)
    run.optimizer = torch.optim.AdamW(
        run.policy.parameters(), lr=c.lr, weight_decay=c.weight_decay, fused=True
    )


def load_models(run, device, group, grid):
    """Read the weights of the sampler, and for training of policy and reference, each once or in shards.

    group: the ranks of this sampler, or None. grid: the mesh of the shards, or None. Exchanges nothing.
    """
    c, split = run.config, run.split
    compute_dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shard = None
    if grid is not None:
        shard = partial(
            parallel.shard,
            grid=grid,
            device=device,
            compute_dtype=compute_dtype,
            offload=split.offload,
        )
    if not c.eval_only:
        run.policy = Transformer.from_pretrained(run.folder, torch.float32, device, shard)
    shared = device.type == "cpu" and group is None and not split.sharded
    if shared and run.policy:
        run.sampler = run.policy
    else:
        run.sampler = Transformer.from_pretrained(run.folder, compute_dtype, device, group=group)
    if c.kl > 0 and not c.eval_only:
        run.reference = Transformer.from_pretrained(run.folder, compute_dtype, device, shard)
        run.reference.requires_grad_(False)


def refresh_sampler(run):
    """Bring the sampler's weights up to date with the policy's, in place."""
    if run.sampler is not run.policy:
        run.sampler.copy_from(run.policy)


# ----------------------------------------------------------------------------------------------------------
# resumed


def open_out(run):
    """Make the run's folder, or find a run in it and resume it: the state that `train` starts from.

    Rank 0 alone decides what is resumed: another node may see a file of the shared folder later.
    """
    out = Path(run.config.out)
    if run.config.eval_only:
        on_rank0(lambda: out.mkdir(parents=True, exist_ok=True))
        return {}
    check_shared(out)
    folder, state = on_rank0(lambda: find_checkpoint(run, out))
    if folder:
        on_every_rank(lambda: checkpoint.restore(folder, run.policy, run.optimizer))
        refresh_sampler(run)
    on_rank0(lambda: prepare_files(run, out, state["step"] if folder else -1))
    return state


def find_checkpoint(run, out):
    """(folder, state) of the newest checkpoint; (None, the state of a new run) if there is none."""
    c, folder = run.config, checkpoint.newest(out / "checkpoint")
    # labels: {question id: label of its last vote in training}
    state = {"step": 0, "seconds": 0.0, "updates": 0, "skipped_updates": 0, "empty_steps": 0, "labels": {}}
    if folder is None:
        return None, state
    state.update(checkpoint.read_state(folder))
    compare_with_checkpoint(run, state.pop("made_with", None))
    last = c.epochs * steps_per_epoch(c, len(run.train_set))
    if state["step"] < last:
        print0(f"resume   from step {state['step']}")
    else:
        print0(f"finished {c.out} has all its {last} steps: nothing is trained; another --out starts anew")
    return folder, state


def prepare_files(run, out, step):
    """Drop the lines of steps after `step`, which are made again, and note the settings."""
    c = run.config
    for name in ("metrics.jsonl", "rollouts.jsonl", "votes.jsonl"):
        checkpoint.forget_after(out / name, step)
    checkpoint.write_whole(out / "config.json", json.dumps(dataclasses.asdict(c), indent=1))
    if c.wandb:
        import wandb

        wandb.init(project="ttrl", name=out.name, config=dataclasses.asdict(c), resume="allow", id=out.name)


def made_with(run):
    """What has to be the same for a resumed run to be the run that was stopped."""
    return {
        "config": dataclasses.asdict(run.config),
        "questions": fingerprint(run),
        "sources": SOURCES,
        "environment": environment(run.config),
    }


def fingerprint(run):
    """SHA-256 of what is asked, in training and evaluation, and of the answers that reports compare with."""
    train = [[q.id, ids] for q, ids in zip(run.train_set, run.train_prompts, strict=True)]
    evaluation = [[q.id, ids, q.answer] for q, ids in zip(run.eval_set, run.eval_prompts, strict=True)]
    return hashlib.sha256(json.dumps([train, evaluation]).encode()).hexdigest()


def source_hashes():
    """{file of this program: SHA-256 of its content}."""
    files = [*HERE.glob("*.py"), *(path for folder in PACKAGES for path in HERE.glob(f"{folder}/*.py"))]
    return {
        path.relative_to(HERE).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(files)
    }


SOURCES = source_hashes()  # at the start: what runs is what was read then, not what is edited meanwhile


@cache  # the page asks at every evaluation, for the sources that run
def commit():
    """The commit of this program, with "-dirty" if files differ from it; "unknown" where git cannot tell."""
    command = ["git", "-C", HERE, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() or "unknown"


def environment(c):
    """Where a run is made: a run that goes on elsewhere is not bitwise the same."""
    cpu = f"{platform.machine()}, {os.cpu_count()} cores"
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "machine": torch.cuda.get_device_name() if c.device == "cuda" else cpu,
        "ranks": world_size(),
        "threads": torch.get_num_threads(),
    }


def compare_with_checkpoint(run, then):
    """Raise ValueError if questions, flags or sources changed since the checkpoint; note a new machine."""
    c, now = run.config, made_with(run)
    if then is None:
        raise ValueError(f"{c.out} holds a run of an older version of this program; choose another --out")
    if then["questions"] != now["questions"]:
        raise ValueError(
            f"{c.out} holds a run on other questions: ids, prompts or answers of {c.data} or {c.eval_data} "
            "changed since its checkpoint; restore them, or choose another --out"
        )
    changed = [
        f"{flag_name(name)} was {then['config'].get(name)} and is {value}"
        for name, value in now["config"].items()
        if value != then["config"].get(name) and name not in RESUME_MAY_CHANGE
    ]
    names = sorted(now["sources"].keys() | then["sources"].keys())
    edited = [name for name in names if now["sources"].get(name) != then["sources"].get(name)]
    for what, which in (("flags", changed), ("sources", edited)):
        if which and not c.allow_changed_flags:
            raise ValueError(
                f"{c.out} holds a run with other {what} ({', '.join(which)}): choose another --out, "
                "or add --allow-changed-flags to go on"
            )
    for name, value in now["environment"].items():
        before = then["environment"].get(name)
        if before != value:
            print0(f"note     {name} was {before} and is {value}: the run goes on, but not bitwise the same")


# ----------------------------------------------------------------------------------------------------------
# saved


def save_checkpoint(run, state):
    """Write out/checkpoint: weights, moments, and the state that `open_out` reads. On all ranks."""
    whole = {**state, "made_with": made_with(run)}
    checkpoint.save(Path(run.config.out) / "checkpoint", run.policy, run.optimizer, whole)


def save_model(run):
    """On all ranks: write out/model in Hugging Face format, with the tokenizer, for transformers or vLLM."""
    if not is_rank0():
        deque(run.policy.whole_parameters(), maxlen=0)  # rank 0 may need this rank's shards
        return

    def fill(folder):
        run.policy.save_pretrained(folder)
        for pattern in TOKENIZER_FILES:
            for path in run.folder.glob(pattern):
                copy = shutil.copytree if path.is_dir() else shutil.copyfile
                copy(path, folder / path.name)

    checkpoint.replace_folder(Path(run.config.out) / "model", fill)


def log(run, line, others, state):
    """Append a step to metrics.jsonl and to the other files; after an evaluation redraw curves and page.

    others: {"rollouts.jsonl": lines, "votes.jsonl": lines}, or {}.
    """
    if not is_rank0():
        return
    out = Path(run.config.out)
    finite = {name: value for name, value in line.items() if math.isfinite(value)}  # JSON has no nan
    checkpoint.append(out / "metrics.jsonl", [finite])
    for name, lines in others.items():
        checkpoint.append(out / name, lines)
    if any(name.startswith("eval/") for name in line):
        draw_curves(out, run.config.eval_samples)
        draw_page(run, state)
    if run.config.wandb:
        import wandb

        wandb.log(line, step=line["step"])


def draw_page(run, state):
    """Write out/report.html, the run as a page."""
    about = {"commit": commit(), **environment(run.config)}
    write_page(run.config.out, state, run.config, run.train_set, about)


def finish(run, state):
    """The model, summary.json, the page, and on the screen before/after table, ledger and a few responses."""
    save_model(run)
    if not is_rank0():
        return
    c = run.config
    summary = {**summarize(state), "seconds": state["seconds"], **screen.speeds(Path(c.out))}
    summary.update(environment=environment(c), config=dataclasses.asdict(c))
    checkpoint.write_whole(Path(c.out) / "summary.json", json.dumps(summary, indent=1, ensure_ascii=False))
    draw_page(run, state)
    print(screen.render(summary, state))
    nothing = screen.taught_nothing(screen.read_metrics(c.out)[1:], c)  # step 0 is an evaluation
    if nothing:
        print(f"\n{nothing}")
    minutes = f"{state['seconds'] / 60:.1f} minutes"
    files = "report.html, curves.png, summary.json, metrics.jsonl, rollouts.jsonl, votes.jsonl, model/"
    print(f"\n{c.out}: {files} ({minutes})")


def save_evaluation(run, metrics):
    """What --eval-only leaves: evaluation.json, and a table on the screen."""
    c = run.config
    whole = {"evaluation": metrics, "environment": environment(c), "config": dataclasses.asdict(c)}
    checkpoint.write_whole(Path(c.out) / "evaluation.json", json.dumps(whole, indent=1))
    print(screen.table({"evaluation": metrics}))
    unanswered = screen.unanswered(metrics["no_answer"], metrics["truncated"], c)
    if unanswered:
        print(f"\n{unanswered}")
