"""The plan: responses and bytes by hand, and its memory against what a run on the CPU really allocates."""

import dataclasses
import gc
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMALL
from torch.profiler import ProfilerActivity, profile

import memory
import plan
import ttrl
from model import ModelConfig
from run import open_run
from support import config, ranks


def test_the_plan_counts_the_responses_of_evaluation():
    """MATH-500 by the paper: 160 steps, 81 evaluations of 500 x 16 responses, greedy before and after."""
    c = config.configure({"model": "Qwen2.5-Math-1.5B", "data": "math"})
    assert plan.planned_responses(c, 500, 500) == {"train": 10 * 500 * 64, "eval": 81 * 500 * 16 + 2 * 500}


def test_a_model_that_does_not_fit_is_refused_with_the_bytes(tmp_path):
    """7B parameters on 80 GB: 16 bytes each and 4 for the reference do not fit, the 4 of evaluation do."""
    widths = {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "max_position_embeddings": 4096,
    }
    shape = {
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    }
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2", **widths, **shape}))
    c = config.configure({"model": "Qwen2.5-Math-7B", "device": "cpu"})
    machine = memory.Machine(1, 1, memory=72 * 10**9, host=72 * 10**9, cuda=False)
    options = (ModelConfig.from_pretrained(tmp_path), machine, 4096, 512)
    needs = r"224\.3 GB \(state 121\.85, reference 30\.46, gathered 2\.18, activations 69\.76\) .* 72\.0 GB"
    with pytest.raises(ValueError, match=needs):
        memory.choose_layout(c, *options)
    layout = memory.choose_layout(dataclasses.replace(c, eval_only=True), *options)
    assert 32 * 4096 < layout.rollout_tokens < 64 * 4096


@pytest.fixture(scope="module")
def measured(tmp_path_factory, few_questions):
    """Build a run and make one step of learning, in this process.

    Returns (run, plan's parts, bytes held at each stage, gradients).
    """
    flags = ["--data", str(few_questions), "--out", str(tmp_path_factory.mktemp("memory")), *SMALL,
             "--kl", "0.1", "--micro-batch-tokens", "300", "--questions-per-update", "2"]  # fmt: skip
    c = config.configure(config.parse(flags, ttrl.REWARDS))
    device = ranks.start_processes("cpu")
    sizes, monkeypatch = {}, pytest.MonkeyPatch()
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as build:
            run = open_run(c, device, {})
            gc.collect()
        sizes["built"] = held(build)[0]
        prompts = run.train_prompts[:3]
        rollout = ttrl.sample(run, prompts, 8, stream="train", step=1, temperature=1.0)
        advantage = torch.randn(3, c.samples, generator=torch.Generator().manual_seed(0))
        outside, loss_of = [], ttrl.micro_batch_loss

        def recording(run, *arguments):
            """Before each micro-batch but the first: what the ones before it have left in the gradients."""
            if run.policy.norm.weight.grad is not None:
                outside.append(gradients_outside_the_buckets(run))
            return loss_of(run, *arguments)

        monkeypatch.setattr(ttrl, "micro_batch_loss", recording)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as learning:
            ttrl.learn(run, rollout, advantage, 1)
            gc.collect()
        sizes["learned"], sizes["peak of learning"] = held(learning)
    finally:
        monkeypatch.undo()
        run.learner = None  # before the group: its end would wait for gloo's thread with the GIL held
        ttrl.dist.destroy_process_group()
    with_model = ModelConfig.from_pretrained(ROOT / "tiny" / "model")
    return run, memory.memory_parts(c, with_model, memory.Split(), False), sizes, outside


def held(profiled):
    """(bytes allocated and not freed, their peak) over a profiled piece of the program."""
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return total, peak


def gradients_outside_the_buckets(run):
    """Bytes of gradients in storage of their own; a bucket of DDP holds those of several parameters."""
    storages = Counter(p.grad.untyped_storage().data_ptr() for p in run.policy.parameters())
    return sum(
        p.grad.nbytes for p in run.policy.parameters() if storages[p.grad.untyped_storage().data_ptr()] == 1
    )


def test_gradients_are_views_of_the_buckets_from_the_first_update_on(measured):
    _, _, _, outside = measured
    assert len(outside) >= 4 and not any(outside)


def test_the_plan_counts_what_is_held(measured):
    """Weights, reference and the buckets of gradients when built, the moments with the first update."""
    _, parts, sizes, _ = measured
    half = parts["state"] / 2
    assert sizes["built"] == pytest.approx(half + parts["reference"], rel=0.02)
    assert sizes["learned"] == pytest.approx(half, rel=0.02)


def test_the_plan_bounds_the_peak_of_learning(measured):
    """Moments, the head's gradient and a micro-batch of activations are bounded, by less than twice."""
    run, parts, sizes, _ = measured
    active = memory.activation_bytes(run.policy.config, run.config.checkpointing, memory.Split(), False)
    planned = parts["state"] / 2 + parts["gathered"] + run.micro_batch_tokens * active
    assert 0.5 * planned < sizes["peak of learning"] < planned


@pytest.mark.parametrize(
    "own, files, limit",
    [
        ("0::/\n", {"memory.max": "1000"}, 1000),
        # the group above limits as well
        ("0::/a/b\n", {"a/memory.max": "500", "a/b/memory.max": "max"}, 500),
        # version 1, seen from inside
        ("4:memory:/docker/x\n0::/\n", {"memory/memory.limit_in_bytes": "700"}, 700),
        # version 1 without a limit
        ("4:memory:/y\n", {"memory/y/memory.limit_in_bytes": "9223372036854771712"}, None),
        ("3:cpu,cpuacct:/y\n", {"y/memory.max": "5"}, None),  # of another controller
        ("", {}, None),
    ],
)
def test_a_containers_limit_counts(tmp_path, own, files, limit):
    (tmp_path / "cgroup").write_text(own)
    for name, text in files.items():
        path = tmp_path / "fs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    found = memory.physical_memory(tmp_path / "fs", tmp_path / "cgroup")
    whole = memory.physical_memory(Path("/nowhere"), Path("/nowhere"))
    assert found == (limit or whole) and whole > 10**9
