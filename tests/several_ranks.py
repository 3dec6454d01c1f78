"""Test-only: small runs of the program's own functions, on one rank or on several, and what each rank saw.

    python tests/several_ranks.py FOLDER RANK COUNT     one of the COUNT processes of test_parallel.py

Models are built by run.build_run, sampled by ttrl.sample, learned from by ttrl.learn, refreshed by
run.refresh_sampler, saved and resumed by distributed/checkpoint.py. A process takes longer to start than all
of its cases take, so it runs one after another and leaves rank-K.pt in FOLDER: {case: what it saw}.
"""

import contextlib
import dataclasses
import datetime
import os
import sys
import weakref
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parents[1]))
import fake_cuda
import parity

import rewards
import ttrl
from distributed import checkpoint, parallel, weights
from distributed.shards import local, unshard
from model import Transformer
from support import pretrained
from support import run as run_module
from support.config import Config, configure
from support.inputs import Inputs
from support.questions import Question

CPU = torch.device("cpu")
TIMEOUT = datetime.timedelta(minutes=5)  # of a case that hangs
ENDS = list(range(3, 331, 9))  # many: responses differ in length
PROMPTS = [[11, 12, 13, 14, 15], [21, 22], [31] * 9]
SIZE = {  # 331 does not divide by any number of ranks
    "vocab_size": 331, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64, "rms_norm_eps": 1e-6,
}  # fmt: skip
MODELS = {  # with the names that say what is particular
    "tied, biases": dict(model_type="qwen2", tie_word_embeddings=True, num_key_value_heads=2),
    "untied, biases": dict(model_type="qwen2", tie_word_embeddings=False),
    "tied, q/k norm": dict(model_type="qwen3", tie_word_embeddings=True, head_dim=8),
    "untied, all biases": dict(
        model_type="llama", tie_word_embeddings=False, attention_bias=True, mlp_bias=True
    ),
    "even": dict(model_type="qwen2", tie_word_embeddings=False, vocab_size=332),
    "deep": dict(model_type="llama", tie_word_embeddings=False, attention_bias=True, num_hidden_layers=12),
}


class Split(NamedTuple):
    """Flags of what the ranks share out beside the rows."""

    shard: int = 1
    sampler_ranks: int = 1
    offload: bool = False


class InSlices(Split):
    """Shards even where a rank holds all of them: fully_shard on a mesh (ranks, 1)."""


class AlwaysSharded(Config):
    sharded = True


class Case(NamedTuple):
    model: str
    split: Split = Split()
    kl: float = 0.05
    questions_per_update: int = 1
    samples: int = 4  # of 6 votes; with 1, one rank has the only row of a mini-batch
    checkpointing: bool = False
    micro_batch_tokens: int = 60  # several micro-batches, not the same number on each rank
    grad_clip: float = 1.0
    planted: str | None = None  # a key of PLANTED

    def alone(self):
        """The same on one rank."""
        return self._replace(split=Split(), planted=None)


TIED, UNTIED, NORMS, BIASES = list(MODELS)[:4]
TWO = {  # cases of two ranks
    "DDP": Case(TIED),
    "DDP, without KL, two questions": Case(NORMS, kl=0.0, questions_per_update=2),
    "DDP, a rank without rows": Case(UNTIED, samples=1),
    "shards": Case(TIED, Split(2)),
    "shards, untied, checkpointing": Case(UNTIED, Split(2), checkpointing=True),
    "shards, two questions": Case(NORMS, Split(2), questions_per_update=2),
    "shards, all biases, without KL": Case(BIASES, Split(2), kl=0.0),
    "shards, a rank without rows": Case(UNTIED, Split(2), samples=1),
    "shards in host memory": Case(NORMS, Split(2, offload=True)),
    "shards in host memory, two copies, without KL": Case(BIASES, Split(1, offload=True), kl=0.0),
    "shards, one micro-batch": Case(TIED, Split(2), micro_batch_tokens=5000, grad_clip=1e9),
    "DDP, one micro-batch": Case(TIED, micro_batch_tokens=5000, grad_clip=1e9),
    "whole shards": Case(TIED, InSlices()),
    "a sampler on two ranks": Case(TIED, Split(1, 2)),
    "a sampler on two ranks, untied": Case(UNTIED, Split(1, 2), samples=1),
    "shards and a sampler on two ranks": Case(NORMS, Split(2, 2)),
    "shards in host memory, a sampler on two ranks": Case(BIASES, Split(2, 2, True), questions_per_update=2),
}
FOUR = {
    "DDP": Case(TIED),
    "shards on four ranks": Case(NORMS, Split(4)),
    "shards on two ranks, two copies": Case(TIED, Split(2)),
    "shards on two ranks, two ranks without rows": Case(BIASES, Split(2), samples=2),
    "a sampler on four ranks": Case(UNTIED, Split(1, 4)),
    "two samplers on two ranks": Case(TIED, Split(4, 2)),
    "all of it": Case(BIASES, Split(2, 4, True), questions_per_update=2),
}
FAULTS = {  # two ranks again: which part of the result a planted mistake has to change
    "gradients are averaged": (Case(TIED, Split(2)), "norms"),
    "gradients of copies are averaged": (Case(TIED), "norms"),
    "the norm of a rank's own shard clips": (Case(UNTIED, Split(2)), "norms"),
    "the tied head moves on one rank only": (Case(TIED, Split(2)), "weights"),
    "the tied head of one copy moves": (Case(TIED), "copies"),
    "one rank's sampler is stale": (Case(TIED, Split(2, 2)), "sampler"),
    "gate and up are mixed": (Case(TIED, Split(1, 2)), "tokens"),
    "query heads are cut as one with keys": (Case(TIED, Split(1, 2)), "tokens"),
    "each rank adds the bias": (Case(BIASES, Split(1, 2)), "tokens"),
}


# ----------------------------------------------------------------------------------------------------------
# a case


def write_models(folder):
    for name, changes in MODELS.items():
        (folder / name).mkdir(parents=True)
        parity.write_model(folder / name, {**SIZE, **changes})


def open_case(case, models):
    """A Run of the case with its models built, its first rollout not yet sampled."""
    c = configure(dict(
        model=str(models / case.model), data="amc", device="cpu", votes=6, questions_per_step=3,
        questions_per_update=case.questions_per_update, samples=4, max_new_tokens=12, temperature=1.0,
        kl=case.kl, lr=1e-2, warmup=0.0, checkpointing=case.checkpointing, grad_clip=case.grad_clip,
        micro_batch_tokens=case.micro_batch_tokens, **case.split._asdict(),
        rollout_tokens=5 * 21,  # five rows at a time: finished ones are replaced
    ))  # fmt: skip
    c = dataclasses.replace(c, samples=case.samples)
    if isinstance(case.split, InSlices):
        c = AlwaysSharded(**dataclasses.asdict(c))
    asked = [Question("", id=str(index)) for index in range(3)]
    run = run_module.build_run(
        Inputs(c, CPU, models / case.model, None, ENDS, asked, PROMPTS, asked, PROMPTS)
    )
    # Adam divides a gradient by its own size. Where that is nothing but rounding, so would the update be.
    run.optimizer.param_groups[0]["eps"] = 1e-4
    return run


def begin(case, models):
    """(run, this rank's rows of the rollout of step 1)."""
    run = open_case(case, models)
    return run, ttrl.sample(run, PROMPTS, 6, stream="train", step=1, temperature=1.0)


def learn(run, rollout, step):
    advantage = torch.tensor([[1.0, -1.5, 0.5, -0.7], [-0.6, 1.2, -1.0, 0.4], [0.9, 0.3, -1.1, 0.8]])
    return ttrl.learn(run, rollout, advantage[:, : run.config.samples], step)


def train(case, models):
    """What a rank sees of two steps on one rollout: its tokens, the norms, the weights, its sampler."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        norms = record_norms(monkeypatch)
        if isinstance(case.split, InSlices):
            monkeypatch.setattr(parallel, "exchange_gradients", exchange_as_ddp)
        undo_late = PLANTED[case.planted](monkeypatch) if case.planted else None
        run, rollout = begin(case, models)
        if undo_late:
            undo_late(run)
        addresses = [p.data_ptr() for p in run.sampler.parameters()]
        measures = measure(run, rollout)
        metrics = [learn(run, rollout, step) for step in (1, 2)]
    learned = dict(weights.whole_parameters(run.policy))
    return {
        "tokens": {pair: rollout.response(row) for row, pair in enumerate(pairs(rollout))},
        "measures": dict(zip(pairs(rollout), measures, strict=True)),
        "norms": torch.stack(norms),
        "metrics": metrics,
        "weights": {name: tensor.clone() for name, tensor in learned.items()},
        "sampler": stale(run.sampler, learned),
        "moved": addresses != [p.data_ptr() for p in run.sampler.parameters()],
    }


def measure(run, rollout):
    asked, run.config = run.config, dataclasses.replace(run.config, reward="self_certainty")
    measures, run.config = rewards.measure(run, rollout), asked
    return measures


def pairs(rollout):
    return list(zip(rollout.question.tolist(), rollout.sample.tolist(), strict=True))


def stale(sampler, learned):
    """Names of the sampler's parameters that are not the part of the policy's that this rank holds."""
    config, group = sampler.whole_config, sampler.group
    return [
        name
        for name, held in sampler.named_parameters()
        if not held.equal(parallel.rank_weight(config, name, learned[name], group))
    ]


def record_norms(monkeypatch):
    norms, clip = [], torch.nn.utils.clip_grad_norm_

    def recording(*arguments):
        norm = clip(*arguments)
        norms.append(unshard(norm).clone())
        return norm

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", recording)
    return norms


@contextlib.contextmanager
def exchange_as_ddp(learner, is_last_pass):
    """Shards that a rank holds whole may wait for the last pass, as DDP does."""
    learner.set_requires_gradient_sync(is_last_pass)
    yield


# ----------------------------------------------------------------------------------------------------------
# planted mistakes: function(monkeypatch) -> None, or what to do to the Run once its models are built


def plant(*change):
    return lambda monkeypatch: fake_cuda.plant(monkeypatch, *change)


def clip_by_own_norm(monkeypatch):
    recording = torch.nn.utils.clip_grad_norm_  # of record_norms

    def clip(parameters, limit):
        parameters = list(parameters)
        own = torch.stack([local(p.grad).norm() for p in parameters]).norm()
        recording([p for p in parameters], float("inf"))
        with torch.no_grad():
            for p in parameters:
                p.grad.mul_(min(1.0, limit / float(own)))
        return own

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)


def tied_head_stays_on_rank_1(monkeypatch):
    def keep(run):
        weight = local(run.policy.embed_tokens.weight.detach())
        before = weight.clone()
        if dist.get_rank() == 1:
            run.optimizer.register_step_post_hook(lambda *_: weight.copy_(before))

    return keep


def no_refresh_on_rank_1(monkeypatch):
    def keep(run):
        fill = weights.fill
        monkeypatch.setattr(weights, "fill", lambda *a: None if dist.get_rank() == 1 else fill(*a))

    return keep


ACCUMULATE = (ttrl, "accumulate_gradients", "ranks.world_size() *", "1 *")
PLANTED = {
    "gradients are averaged": plant(*ACCUMULATE),
    "gradients of copies are averaged": plant(*ACCUMULATE),
    "the norm of a rank's own shard clips": clip_by_own_norm,
    "the tied head moves on one rank only": tied_head_stays_on_rank_1,
    "the tied head of one copy moves": tied_head_stays_on_rank_1,
    "one rank's sampler is stale": no_refresh_on_rank_1,
    "gate and up are mixed": plant(
        parallel, "rank_weight", "[config.intermediate_size] * 2", "[2 * config.intermediate_size]"
    ),
    "query heads are cut as one with keys": plant(
        parallel, "rank_weight", "[q_rows, kv_rows, kv_rows]", "[q_rows + kv_rows, kv_rows]"
    ),
    "each rank adds the bias": plant(parallel, "rank_weight", "tensor * (rank == 0)", "tensor"),
}


# ----------------------------------------------------------------------------------------------------------
# sampling only


def next_logits(models, name, group):
    """Next-token logits of fixed tokens, [B, T, V], by this rank's part of a sampler."""
    sampler = Transformer.from_pretrained(models / name, torch.float32, CPU, group=group)
    tokens = torch.randint(331, (4, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return sampler.logits(tokens)


def evaluate_few(models, split):
    """An evaluation of one question, one sample: on rank 0 the gathered responses, and this rank's rows."""
    run = open_case(Case(UNTIED, split), models)
    rollout = ttrl.sample(run, PROMPTS[:1], 1, stream="eval", step=0, temperature=0.6, top_p=0.95)
    run.tokenizer = SimpleNamespace(
        bos_token_id=None, eos_token_id=None, pad_token_id=None, decode=lambda ids, **_: str(ids)
    )
    return {"unsharded": ttrl.extract(run, rollout, run.eval_set, 1), "rows": len(rollout) if rollout else 0}


# ----------------------------------------------------------------------------------------------------------
# saved and resumed

SPLITS = {"DDP": Split(1), "shards": Split(2), "host": Split(2, 1, True)}


def whole_state(run):
    """{name: tensor} of all weights and moments."""
    state = {f"weight {name}": tensor.clone() for name, tensor in weights.whole_parameters(run.policy)}
    for name, parameter in run.policy.named_parameters():
        for key, value in run.optimizer.state[parameter].items():
            state[f"{key} {name}"] = unshard(value).clone()
    return state


def save_after_a_step(models, root, split):
    """Train a step, save, train another: the state at the checkpoint, and at the end."""
    run, rollout = begin(Case("even", split), models)
    learn(run, rollout, 1)
    checkpoint.save(root, run.policy, run.optimizer, {"step": 1})
    saved = whole_state(run)
    learn(run, rollout, 2)
    return {"saved": saved, "end": whole_state(run)}


def resume(models, root, split):
    """Restore into models just built, train the second step: the state before and after."""
    run, rollout = begin(Case("even", split), models)  # the rollout is of the weights that step 1 began with
    checkpoint.restore(checkpoint.newest_whole(root), run.policy, run.optimizer)
    run.refresh_sampler()
    saved = whole_state(run)
    learn(run, rollout, 2)
    return {"saved": saved, "end": whole_state(run)}


def resume_swapped(models, root):
    """The moments of each shard go to the other one."""
    opened = 'ShardFiles(folder, "optimizer")'
    with pytest.MonkeyPatch.context() as monkeypatch:
        swapped = f"{opened}; moments.files = moments.files[::-1]"
        fake_cuda.plant(monkeypatch, checkpoint, "restore", opened, swapped)
        return resume(models, root, SPLITS["shards"])


# ----------------------------------------------------------------------------------------------------------
# bytes held, and files written


class Held(TorchDispatchMode):
    """Counts the bytes of storages that operations have made and that are still alive: now, and the peak."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if type(leaf) in (torch.Tensor, torch.nn.Parameter) and leaf.device.type == "cpu":
                self.note(leaf.untyped_storage())
        return result

    def note(self, storage):
        if storage not in self.known:
            self.known[storage] = True
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.drop, storage.nbytes())

    def drop(self, size):
        self.now -= size


def load_and_export(models, out, split):
    """Load the policy, write out/model in small files: the bytes held meanwhile, and what is whole."""
    run = open_case(Case("deep", split), models)  # mesh and groups exist from here on
    grid = parallel.shard_mesh(CPU, split.shard)
    cut = partial(parallel.shard, grid=grid, device=CPU, compute_dtype=torch.float32)
    shard = cut if run.config.sharded else None
    with Held() as loading:
        policy = Transformer.from_pretrained(run.folder, torch.float32, CPU, shard)
    sizes = [p.numel() * 4 for p in Transformer.from_pretrained(run.folder).parameters()]
    own = sum(local(p).numel() * 4 for p in policy.parameters())
    run.config = dataclasses.replace(run.config, out=str(out))
    with pytest.MonkeyPatch.context() as monkeypatch, Held() as exporting:
        monkeypatch.setattr(pretrained, "FILE_SIZE", FILE_SIZE)
        run.save_model()
    return {
        "own": own, "whole": sum(sizes), "largest": max(sizes), "loading": loading.peak,
        "exporting": exporting.peak,
    }  # fmt: skip


FILE_SIZE = 60_000  # bytes


# ----------------------------------------------------------------------------------------------------------
# a process


def run_all(folder, count):
    """Every case of `count` ranks, in the same order on each: {name: what this rank saw}."""
    models, results = folder / "models", {}
    for name, case in {2: TWO, 4: FOUR}[count].items():
        results[name] = train(case, models)
    for heads in (2, 4)[: count // 2]:
        group = parallel.sampler_group(CPU, heads)
        results[f"logits {heads}"] = {
            name: next_logits(models, name, group) for name in MODELS if heads == 2 or name != TIED
        }
        results[f"few {heads}"] = evaluate_few(models, Split(1, heads))
    if count == 2:
        results["few 1"] = evaluate_few(models, Split())
        for name, (case, _) in FAULTS.items():
            results[f"planted: {name}"] = train(case._replace(planted=name), models)
        for name in ("DDP", "shards"):
            results[f"export {name}"] = load_and_export(models, folder / f"export {name}", SPLITS[name])
    for name, split in SPLITS.items():
        results[f"saved by {name}"] = save_after_a_step(models, folder / f"saved by {name}", split)
    for source in ("one rank", *SPLITS):
        for name, split in SPLITS.items():
            results[f"{source} to {name}"] = resume(models, folder / f"saved by {source}", split)
    results["moments in the wrong shard"] = resume_swapped(models, folder / "saved by shards")
    return results


def main(folder, rank, count):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    store = dist.FileStore(str(folder / "store"), count)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=TIMEOUT)
    results = run_all(folder, count)
    torch.save(results, folder / f"rank-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
