"""A run: what its steps share, how it is opened from the command line, resumed, and saved.

    policy      fp32 master weights, the ones that learn
    learner     the policy as DDP wraps it: its gradients are averaged over the ranks; or in shards
    sampler     the policy itself on a CPU; on a GPU, or beside shards, a copy, refreshed after every step
    reference   the initial policy, frozen, where --kl is above 0

The ranks share out the rows: responses to sample and to learn from. Where a model does not fit, they share
out the learner's state and the sampler as well: distributed/parallel.py.
"""

import contextlib
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
from safetensors import SafetensorError

from distributed import checkpoint, halving, interrupts, parallel, ranks, weights
from distributed.provenance import commit, environment, made_with
from distributed.ranks import is_rank0, on_every_rank, on_rank0, print0
from distributed.resume import FORMAT, LOGS, claim_folder, find_checkpoint, prepare_files, progress
from model import Transformer
from report import health, screen
from report.curves import draw_curves
from report.health import Health
from report.ledger import better, summarize
from report.page import write_page
from rollout import Engine
from support.config import configure, parse
from support.hub import TOKENIZER_FILES, fetch_weights
from support.inputs import Inputs, plan_run
from support.prompts import decode_response
from support.untrusted import shorten


@dataclass
class Run(Inputs):
    """What the steps of a run share. With --eval-only there is a sampler alone."""

    policy: Transformer | None
    learner: torch.nn.Module | None
    sampler: Transformer
    reference: Transformer | None  # None with --kl 0
    optimizer: torch.optim.Optimizer | None
    engine: Engine | None  # kept on a GPU for its CUDA graphs; a CPU gives the memory back to the learner
    lock: object = None  # of the run's folder, on rank 0
    bar: screen.Progress | None = None
    health: Health = dataclasses.field(default_factory=Health)
    saved: tuple | None = None  # `progress` of the newest checkpoint
    unwritten: dict = dataclasses.field(default_factory=lambda: {name: [] for name in LOGS})

    repeat_rollout, repeat_update = halving.repeat_rollout, halving.repeat_update
    rollout_bar = screen.RolloutBar

    def decode(self, ids):
        """The text of response token ids, for the grader and for people."""
        return decode_response(self.tokenizer, ids)

    def refresh_sampler(self):
        """Bring the sampler's weights up to date with the policy's, in place."""
        if self.sampler is not self.policy:
            weights.refresh(self.sampler, self.policy)

    def save_checkpoint(self, state):
        """Write out/checkpoint: weights, moments, and the state that `resume` reads. On all ranks.

        If that fails, the run goes on with the checkpoint before; returns whether it was written.
        """
        if not self.health.may_save(self.policy, state["step"], self.bar.write):
            return False
        root = Path(self.config.out) / "checkpoint"
        whole = {**state, "format": FORMAT, "made_with": made_with(self)}
        try:
            whole["logs"] = on_rank0(self.flush)
            checkpoint.save(root, self.policy, self.optimizer, whole)
        except ValueError as error:  # a full disk
            takes = 12 * sum(p.numel() for p in self.policy.parameters())
            free = shutil.disk_usage(checkpoint.nearest(root)).free
            self.bar.write(
                f"step {state['step']}: no checkpoint, because {error}; it takes {takes / 1e9:.3f} GB, and "
                f"{free / 1e9:.3f} are free; the run goes on, and the next is tried as usual"
            )
            return False
        self.saved = progress(state)
        return True

    def save_model(self):
        """Write out/model in Hugging Face format, with the tokenizer. All ranks have to call it."""
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

    @contextlib.contextmanager
    def training(self, state):
        """A context to train in. A signal or --max-minutes ends it after a whole step, which is saved."""
        self.bar = screen.Progress(state["step"], self.schedule.steps)
        interrupts.training(True)
        try:
            yield
        except interrupts.Stopped as stopped:
            saved = self.saved == progress(state) or self.save_checkpoint(state)
            self.bar.close()
            step, of = state["step"], f"of {self.schedule.steps}"
            where = f"after step {step} {of}, which is {'' if saved else 'not '}saved"
            if step == 0:
                where = "before the first step: nothing was learned, so nothing is lost"
            print0(f"stopped by {stopped.name} {where}; rerun the same command to resume")
            raise SystemExit(stopped.code if saved or step == 0 else 1) from None
        interrupts.training(False, saved=self.saved == progress(state))
        self.bar.close()

    def resume(self, folder, state):
        """Load a checkpoint, if there is one, and prepare the run's files for the steps after it."""
        if folder:
            on_every_rank(lambda: checkpoint.restore(folder, self.policy, self.optimizer))
            self.refresh_sampler()
            self.saved = progress(state)
        sizes = state.pop("logs")
        on_rank0(lambda: prepare_files(self.config, sizes))

    def stop_together(self):
        """Leave `training` on all ranks if any is to stop. Weights have to be those of a whole step."""
        interrupts.stop_together()

    def finish_step(self, state, step, labels, trained):
        """Bring `state` up to date with a step whose updates are made: what ttrl.train_step returned.

        `log` writes it to the run's files, when it is evaluated.
        """
        measured, groups, rewards = trained
        dtype = self.sampler.embed_tokens.weight.dtype
        self.health.compare(measured.get("logprob_gap"), step, dtype, self.saved)
        state["updates"] += measured["updates"]
        state["skipped_updates"] += measured["skipped_updates"]
        line = {f"train/{name}": value for name, value in measured.items()}
        shown, votes = screen.shown_responses(step, groups, rewards), screen.counted_votes(step, groups)
        unlogged = {"metrics.jsonl": [line], "rollouts.jsonl": shown, "votes.jsonl": votes}
        epoch = math.ceil(step / self.schedule.steps_per_epoch)
        health.note_agreement(state["agreement"], epoch, measured.get("majority_ratio", 0), len(groups))
        state.update(step=step, labels=labels, unlogged=unlogged)
        if self.config.max_minutes is not None:  # one step is made in any case, or a run might never end
            interrupts.stop_after(self.config.max_minutes)

    def log(self, state, evaluation=None):
        """Write a finished step to the run's files, with its evaluation (what ttrl.evaluate returns).

        After an evaluation, curves and page are redrawn.
        """
        step, lines = state["step"], state["unlogged"]
        line = {"step": step, "epoch": math.ceil(step / self.schedule.steps_per_epoch)}
        line.update(*lines["metrics.jsonl"])
        if evaluation:
            measured, records = evaluation
            line.update({f"eval/{name}": value for name, value in measured.items()})
            state["after" if step else "before"] = {"step": step, "metrics": measured, "records": records}
            state["best"] = better(state.get("best"), step, records)
        state["unlogged"] = None
        if is_rank0():
            finite = {name: value for name, value in line.items() if math.isfinite(value)}  # JSON has no nan
            self.write_step(state, {**lines, "metrics.jsonl": [finite]}, evaluation)
        self.bar.update(line, state, self.config)

    def write_step(self, state, lines, evaluation):
        """The part of `log` that touches the disk."""
        c, out = self.config, Path(self.config.out)
        for name in LOGS:
            self.unwritten[name] += lines.get(name, [])
        try:
            self.flush()
            if evaluation:
                draw_curves(out, c.eval_samples)
                self.draw_page(state)
        except (OSError, ValueError) as error:  # lines that are not written wait for the next time
            self.bar.write(f"step {state['step']}: {error}; the run goes on")
        if c.wandb:
            import wandb

            try:
                wandb.log(*lines["metrics.jsonl"], step=state["step"])
            except Exception as error:  # of the network, mostly
                self.bar.write(f"step {state['step']}: wandb: {error}; the run goes on")

    def flush(self):
        """Append to the logs the lines that they lack; returns {file: bytes}. On rank 0."""
        out, sizes = Path(self.config.out), {}
        out.mkdir(parents=True, exist_ok=True)  # somebody may have deleted it
        for name in LOGS:
            checkpoint.append(out / name, self.unwritten[name])
            self.unwritten[name] = []
            sizes[name] = (out / name).stat().st_size
        return sizes

    def draw_page(self, state):
        """Write out/report.html, the run as a page."""
        about = {"commit": commit(), **environment(self.config)}
        write_page(self.config.out, state, self.config, self.train_set, about)

    def finish(self, state):
        """Write model, summary.json and page; print the table of before and after, ledger and responses."""
        self.health.may_finish(self.policy, state, self.saved)
        try:
            self.save_model()
            summary = self.write_summary(state) if is_rank0() else None
        except (OSError, ValueError, SafetensorError) as error:  # a full disk
            interrupts.leave(1, f"{error}; make room, and rerun the same command for what is missing")
        if not is_rank0():
            return
        c = self.config
        print0(screen.render(summary, state))
        nothing = health.taught_nothing(screen.read_metrics(c.out)[1:], c)  # step 0 is an evaluation
        if nothing:
            print0(f"\n{nothing}")
        files = "report.html, curves.png, summary.json, metrics.jsonl, rollouts.jsonl, votes.jsonl, model/"
        print0(f"\n{c.out}: {files} ({state['seconds'] / 60:.1f} minutes)")

    def write_summary(self, state):
        """Write summary.json and the page, and lines that the logs lack: the summary. On rank 0."""
        c, out = self.config, Path(self.config.out)
        self.flush()
        summary = {**summarize(state, screen.read_metrics(out)), **screen.speeds(out)}
        summary.update(seconds=state["seconds"], environment=environment(c), config=dataclasses.asdict(c))
        checkpoint.write_whole(out / "summary.json", json.dumps(summary, indent=1, ensure_ascii=False))
        self.draw_page(state)
        return summary

    def save_evaluation(self, metrics):
        """Write what --eval-only leaves, evaluation.json, and print a table. On rank 0."""
        if not is_rank0():
            return
        c = self.config
        whole = {"evaluation": metrics, "environment": environment(c), "config": dataclasses.asdict(c)}
        checkpoint.write_whole(Path(c.out) / "evaluation.json", json.dumps(whole, indent=1))
        print(screen.table({"evaluation": metrics}))
        for text in health.first_doubts(metrics, c).values():
            print(f"\n{text}")


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
        if c.gpus:  # those are not here, and neither is the run
            raise SystemExit(0)
        lock = claim_folder(inputs)
        folder, state = find_checkpoint(inputs)
        if c.dry_run:
            raise SystemExit(0)
        interrupts.feel_pulse()
        run = build_run(fetch_model(inputs))
        run.lock = lock
        if not c.eval_only:
            run.resume(folder, state)
        return run, state
    except (ValueError, OSError) as error:
        if rank == 0 or not dist.is_initialized():  # once there is a group, all ranks raise the same
            print(f"ttrl.py: {f'rank {rank}: ' if rank else ''}{shorten(str(error), 900)}", file=sys.stderr)
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
