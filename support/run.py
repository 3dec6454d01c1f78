"""A run: what its steps share, how it is opened from the command line, resumed, and saved.

    policy      fp32 master weights, the ones that learn
    learner     the policy as DDP wraps it: its gradients are averaged over the ranks; or in shards
    sampler     the policy itself on a CPU; on a GPU, or beside shards, a copy, refreshed after every step
    reference   the initial policy, frozen, where --kl is above 0

The ranks share out the rows: responses to sample and to learn from. Where a model does not fit, they share
out the learner's state and the sampler as well: distributed/parallel.py.
"""

import dataclasses
import json
import math
import os
import shutil
import sys
from collections import deque
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import transformers

from distributed import checkpoint, parallel, ranks, weights
from distributed.provenance import commit, compare_with_checkpoint, environment, made_with
from distributed.ranks import is_rank0, on_every_rank, on_rank0, print0
from model import Transformer
from report import screen
from report.curves import draw_curves
from report.ledger import better, summarize
from report.page import write_page
from rollout import Engine
from support.config import configure, parse
from support.hub import TOKENIZER_FILES, fetch_weights
from support.inputs import Inputs, plan_run
from support.prompts import decode_response


@dataclass
class Run(Inputs):
    """What the steps of a run share. With --eval-only there is a sampler alone."""

    policy: Transformer | None
    learner: torch.nn.Module | None
    sampler: Transformer
    reference: Transformer | None  # None with --kl 0
    optimizer: torch.optim.Optimizer | None
    engine: Engine | None  # kept on a GPU for its CUDA graphs; a CPU gives the memory back to the learner

    def decode(self, ids):
        """The text of response token ids, for the grader and for people."""
        return decode_response(self.tokenizer, ids)

    def refresh_sampler(self):
        """Bring the sampler's weights up to date with the policy's, in place."""
        if self.sampler is not self.policy:
            weights.refresh(self.sampler, self.policy)

    def save_checkpoint(self, state):
        """Write out/checkpoint: weights, moments, and the state that `resume` reads. On all ranks."""
        whole = {**state, "made_with": made_with(self)}
        checkpoint.save(Path(self.config.out) / "checkpoint", self.policy, self.optimizer, whole)

    def save_model(self):
        """Write out/model in Hugging Face format, with the tokenizer, for transformers or vLLM.

        On all ranks.
        """
        if not is_rank0():
            deque(weights.whole_parameters(self.policy), maxlen=0)  # rank 0 may need this rank's shards
            return

        def fill(folder):
            self.policy.save_pretrained(folder)
            for pattern in TOKENIZER_FILES:
                for path in self.folder.glob(pattern):
                    copy = shutil.copytree if path.is_dir() else shutil.copyfile
                    copy(path, folder / path.name)

        checkpoint.replace_folder(Path(self.config.out) / "model", fill)

    def log(self, state, training=None, evaluation=None):
        """Bring `state` and the run's files up to date with a step: the line of metrics.jsonl.

        training: what ttrl.train_step returns; evaluation: what ttrl.evaluate returns. After an evaluation,
        curves and page are redrawn.
        """
        step, files = state["step"], {}
        line = {"step": step, "epoch": math.ceil(step / self.schedule.steps_per_epoch)}
        if training:
            measured, groups, rewards = training
            line.update({f"train/{name}": value for name, value in measured.items()})
            state["updates"] += measured["updates"]
            state["skipped_updates"] += measured["skipped_updates"]
            files["rollouts.jsonl"] = screen.shown_responses(step, groups, rewards)
            files["votes.jsonl"] = screen.counted_votes(step, groups)
        if evaluation:
            measured, records = evaluation
            line.update({f"eval/{name}": value for name, value in measured.items()})
            state["after" if step else "before"] = {"step": step, "metrics": measured, "records": records}
            state["best"] = better(state.get("best"), step, records)
        if is_rank0():
            self.write_step(state, line, files, evaluation)
        return line

    def progress_bar(self, state):
        """The progress bar of training, on rank 0; it also says when a step taught nothing."""
        return screen.Progress(state["step"], self.schedule.steps)

    def write_step(self, state, line, files, evaluation):
        """The part of `log` that touches the disk."""
        c, out = self.config, Path(self.config.out)
        finite = {name: value for name, value in line.items() if math.isfinite(value)}  # JSON has no nan
        checkpoint.append(out / "metrics.jsonl", [finite])
        for name, lines in files.items():
            checkpoint.append(out / name, lines)
        if evaluation:
            draw_curves(out, c.eval_samples)
            self.draw_page(state)
        if c.wandb:
            import wandb

            wandb.log(line, step=line["step"])

    def draw_page(self, state):
        """Write out/report.html, the run as a page."""
        about = {"commit": commit(), **environment(self.config)}
        write_page(self.config.out, state, self.config, self.train_set, about)

    def finish(self, state):
        """Write model, summary.json and page; print the table of before and after, ledger and responses."""
        if state["skipped_updates"] and not state["updates"]:
            count = state["skipped_updates"]
            reason = f"ttrl.py: the gradient of all {count} updates was not finite, nothing was learned"
            raise SystemExit(reason if is_rank0() else 1)
        self.save_model()
        if not is_rank0():
            return
        c, out = self.config, Path(self.config.out)
        summary = {**summarize(state), "seconds": state["seconds"], **screen.speeds(out)}
        summary.update(environment=environment(c), config=dataclasses.asdict(c))
        checkpoint.write_whole(out / "summary.json", json.dumps(summary, indent=1, ensure_ascii=False))
        self.draw_page(state)
        print(screen.render(summary, state))
        nothing = screen.taught_nothing(screen.read_metrics(out)[1:], c)  # step 0 is an evaluation
        if nothing:
            print(f"\n{nothing}")
        minutes = f"{state['seconds'] / 60:.1f} minutes"
        files = "report.html, curves.png, summary.json, metrics.jsonl, rollouts.jsonl, votes.jsonl, model/"
        print(f"\n{c.out}: {files} ({minutes})")

    def save_evaluation(self, metrics):
        """Write what --eval-only leaves, evaluation.json, and print a table. On rank 0."""
        if not is_rank0():
            return
        c = self.config
        whole = {"evaluation": metrics, "environment": environment(c), "config": dataclasses.asdict(c)}
        checkpoint.write_whole(Path(c.out) / "evaluation.json", json.dumps(whole, indent=1))
        print(screen.table({"evaluation": metrics}))
        unanswered = screen.unanswered(metrics["no_answer"], metrics["truncated"], c)
        if unanswered:
            print(f"\n{unanswered}")


# ----------------------------------------------------------------------------------------------------------
# opened


def open_run(argv, rewards):
    """(run, state) from the command line: the plan is printed, models are built, a checkpoint is resumed.

    argv: the flags, None for those of this process. rewards: the names that --reward takes. Whatever is wrong
    with flags, files or memory is one sentence and exit code 2, before any work. A dry run exits after the
    plan.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers.logging.set_verbosity_error()
    given = parse(argv, rewards)
    rank = int(os.environ.get("RANK", 0))
    try:
        c = configure(given)
        inputs = plan_run(c, ranks.start_processes(c.device), given)
        if c.dry_run:
            raise SystemExit(0)
        run = build_run(fetch_model(inputs))
        return run, resume(run)
    except (ValueError, OSError) as error:
        if rank == 0 or not dist.is_initialized():  # once there is a group, all ranks raise the same
            print(f"ttrl.py: {f'rank {rank}: ' if rank else ''}{error}", file=sys.stderr)
        raise SystemExit(2) from None


def fetch_model(inputs):
    """The Inputs with the weights in their folder. They are fetched last, when all else is known to work."""
    if inputs.config.model == "tiny":
        return inputs
    folder = ranks.first_on_node(lambda: fetch_weights(inputs.config.model))
    ranks.check_same({"revisions of the model": folder.name})
    return dataclasses.replace(inputs, folder=folder)


def build_run(inputs):
    """Read the weights, and build what learns and samples: the Run."""
    c, device = inputs.config, inputs.device
    # Before any weight is read: a rank whose files are damaged would leave the others waiting for a group.
    group = parallel.sampler_group(device, c.sampler_ranks)
    grid = parallel.shard_mesh(device, c.shard) if c.sharded and not c.eval_only else None
    policy, sampler, reference = on_every_rank(lambda: load_models(inputs, group, grid))
    engine = learner = optimizer = None
    if device.type == "cuda":
        # Rows of the fullest group: all ranks with one extra row may be in the same group.
        rows = math.ceil(inputs.most_rows / ranks.world_size()) * c.sampler_ranks
        slots = min(c.rollout_tokens // inputs.longest, rows)
        engine = Engine(sampler, slots, inputs.longest, c.max_new_tokens, inputs.eos_ids)
    if policy:
        policy.checkpointing = c.checkpointing
        learner = policy if c.sharded else parallel.data_parallel(policy)
        optimizer = torch.optim.AdamW(policy.parameters(), lr=c.lr, weight_decay=c.weight_decay, fused=True)
    return Run(**vars(inputs), policy=policy, learner=learner, sampler=sampler, reference=reference,
               optimizer=optimizer, engine=engine)  # fmt: skip


def load_models(inputs, group, grid):
    """(policy, sampler, reference), None for those that the run does not have. Exchanges nothing.

    group: the ranks of this sampler, or None. grid: the mesh of the shards, or None.
    """
    c, folder, device = inputs.config, inputs.folder, inputs.device
    compute_dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    policy = reference = shard = None
    if grid is not None:
        options = dict(device=device, compute_dtype=compute_dtype, offload=c.offload)
        shard = partial(parallel.shard, grid=grid, **options)
    if not c.eval_only:
        policy = Transformer.from_pretrained(folder, torch.float32, device, shard)
    sampler = policy
    if c.eval_only or c.sharded or group or device.type == "cuda":
        sampler = Transformer.from_pretrained(folder, compute_dtype, device, group=group)
    if c.kl > 0 and not c.eval_only:
        reference = Transformer.from_pretrained(folder, compute_dtype, device, shard)
        reference.requires_grad_(False)
    return policy, sampler, reference


# ----------------------------------------------------------------------------------------------------------
# resumed


def resume(run):
    """Make the run's folder, or go on with the run in it: the state that `train` starts from.

    Rank 0 alone decides what is resumed: another node may see a file of the shared folder later.
    """
    out = Path(run.config.out)
    if run.config.eval_only:
        on_rank0(lambda: out.mkdir(parents=True, exist_ok=True))
        return {}
    ranks.check_shared(out)
    folder, state = on_rank0(lambda: find_checkpoint(run, out))
    if folder:
        on_every_rank(lambda: checkpoint.restore(folder, run.policy, run.optimizer))
        run.refresh_sampler()
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
    last = run.schedule.steps
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
