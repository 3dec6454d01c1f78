"""The plan: responses and bytes by hand, and its memory against what a run on the CPU really allocates."""

import dataclasses
import gc
import json
import os
import re
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMALL, program
from fake_memory import made_up_rollout, peak_of_learning
from torch.profiler import ProfilerActivity, profile

import ttrl
from distributed import memory, plan, ranks
from distributed.layout import ENOUGH_ROWS, choose_layout
from distributed.machine import Machine, physical_memory
from model import ModelConfig, Transformer
from support import config, inputs, questions
from support.run import build_run
from support.schedule import Schedule

sys.path.append(str(ROOT / "docs"))
import models


def test_the_plan_counts_the_responses_of_evaluation():
    """MATH-500 by the paper: 160 steps, 81 evaluations of 500 x 16 responses, greedy before and after."""
    c = config.configure({"model": "Qwen2.5-Math-1.5B", "data": "math"})
    assert plan.planned_responses(Schedule(c, 500), 500) == {
        "train": 10 * 500 * 64,
        "eval": 81 * 500 * 16 + 2 * 500,
    }


# ----------------------------------------------------------------------------------------------------------
# bytes by part

MODELS = {"1.5B": "Qwen2.5-Math-1.5B", "3B": "Llama-3.2-3B-Instruct", "7B": "Qwen2.5-Math-7B",
          "8B": "Llama-3.1-8B-Instruct", "Qwen3": "Qwen3-8B", "12B": "Mistral-Nemo-Instruct-2407",
          "32B": "Qwen2.5-32B"}  # fmt: skip


@pytest.mark.parametrize(
    "model, gpus, split, state, sampler, reference, total, host",
    [
        ("1.5B", "8x80", (1, 1, False), 24.7, 3.1, 3.1, 33.6, 0),
        ("1.5B", "1x24", (1, 1, True), 0, 3.1, 0, 6.5, 28),
        ("1.5B", "2x24", (2, 1, False), 12.3, 3.1, 1.5, 19.4, 0),
        ("3B", "1x80", (1, 1, False), 51.4, 6.4, 6.4, 68.3, 0),
        ("7B", "8x80", (8, 1, False), 15.2, 15.2, 1.9, 39.8, 0),
        ("7B", "4x80", (4, 1, False), 30.5, 15.2, 3.8, 56.9, 0),
        ("7B", "1x80", (1, 1, True), 0, 15.2, 0, 24.3, 137),
        ("8B", "8x80", (8, 1, False), 16.1, 16.1, 2.0, 41.4, 0),
        ("Qwen3", "8x80", (8, 1, False), 16.4, 16.4, 2.0, 42.6, 0),
        ("12B", "8x80", (8, 1, False), 24.5, 24.5, 3.1, 61.0, 0),
        ("32B", "8x80", (8, 8, True), 0, 10.9, 0, 24.7, 590),
        ("32B", "16x80", (16, 8, False), 32.8, 10.9, 4.1, 61.1, 0),
    ],
)
def test_the_bytes_of_the_papers_models(model, gpus, split, state, sampler, reference, total, host):
    """In GB. By hand: parameters x 16 / shards, x 2 / sampler's ranks, x 2 / shards; the sum to 4 %."""
    shard, sampler_ranks, offload = split
    flags = dict(shard=shard, sampler_ranks=sampler_ranks, offload=offload, micro_batch_tokens=4096)
    layout = models.layout(MODELS[model], gpus, checkpointing=True, **flags)
    found = [layout.parts.get(part, 0) / 1e9 for part in ("state", "sampler", "reference")]
    assert found == pytest.approx([state, sampler, reference], abs=0.051)
    assert (sum(layout.parts.values()) - layout.parts["graphs"]) / 1e9 == pytest.approx(total, rel=0.04)
    assert layout.host / 1e9 == pytest.approx(host, abs=0.5)


def test_parameters_are_counted_as_the_model_has_them():
    """Of one layer times the layers; a sampler's rank has its heads and MLP, and the whole vocabulary."""
    for name in ("Qwen2.5-Math-1.5B", "Qwen3-8B", "Mistral-Nemo-Instruct-2407"):
        model_config = models.model_config(name)
        with torch.device("meta"):
            whole = Transformer(model_config)
        assert memory.count_parameters(model_config).total == sum(p.numel() for p in whole.parameters())
    block, vocabulary, total = memory.count_parameters(models.model_config("Qwen2.5-32B"))
    of_a_rank = memory.count_parameters(models.model_config("Qwen2.5-32B"), 8)
    assert of_a_rank.vocabulary == vocabulary and of_a_rank.block == pytest.approx(block / 8, rel=1e-3)
    assert of_a_rank.total == pytest.approx((total - 2 * vocabulary) / 8 + 2 * vocabulary, rel=1e-3)


def simulated_and_planned(model, ranks, checkpointing, **changed):
    """Bytes of learning from 4,252 tokens; 1 rank is DDP, more hold shards."""
    if torch.__version__ < (2, 11):
        pytest.skip(
            "torch before 2.11 cannot simulate what shards exchange, and its DDP simulates other sizes"
        )
    model_config = dataclasses.replace(models.model_config(MODELS[model]), **changed)
    model_config = dataclasses.replace(model_config, windows=(None,) * model_config.layers)
    simulated = peak_of_learning(model_config, made_up_rollout(256, 4, 1000), ranks, checkpointing)
    c = config.Config(shard=ranks, offload=False, checkpointing=checkpointing)
    planned = memory.learning_bytes(c, model_config, True, 256 + 4 * 999)
    return simulated, sum(planned.values())


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("model, ranks", [("1.5B", 1), ("1.5B", 8), ("7B", 8)])
def test_the_memory_of_learning_is_that_of_a_simulation(model, ranks, checkpointing):
    """Two layers of the real widths, with a tied head to 10 %, with an untied one at most 20 % too much."""
    simulated, planned = simulated_and_planned(model, ranks, checkpointing, layers=2)
    assert 0.95 < planned / simulated < (1.1 if model == "1.5B" else 1.2)


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("ranks", [1, 8])
def test_what_more_layers_take_is_that_of_a_simulation(ranks, checkpointing):
    """With checkpointing one width, fp32 under autocast, bf16 in shards; without, autocast's weights too."""
    few = simulated_and_planned("1.5B", ranks, checkpointing, layers=3, vocab_size=1024)
    many = simulated_and_planned("1.5B", ranks, checkpointing, layers=6, vocab_size=1024)
    simulated, planned = (after - before for before, after in zip(few, many, strict=True))
    assert planned == pytest.approx(simulated, rel=0.1)


# ----------------------------------------------------------------------------------------------------------
# what is chosen


@pytest.mark.parametrize("model, gpus, split, flags", [
    ("1.5B", "1x24", (1, 1, True), {}),
    ("1.5B", "1x80", (1, 1, False), {}),
    ("1.5B", "8x80", (1, 1, False), {}),
    ("1.5B", "4x4090", (4, 1, False), {}),
    ("3B", "1x80", (1, 1, False), {}),
    ("7B", "1x80", (1, 1, True), {}),
    ("7B", "8x80", (4, 1, False), {}),
    ("7B", "16x80", (4, 1, False), {}),
    ("8B", "8xA100", (8, 1, False), {}),
    ("Qwen3", "8xH100", (8, 1, False), {}),
    ("12B", "8x80", (8, 4, False), {}),
    ("32B", "8x80", (8, 4, True), {}),
    ("32B", "16x80", (16, 8, False), {}),
    ("32B", "8xH200", (8, 8, False), {}),
    ("32B", "8x80", (1, 2, False), {"eval_only": True}),
    ("1.5B", "8x80", (8, 1, False), {"shard": 8}),  # a flag decides what it names
    ("1.5B", "8x80", (1, 2, False), {"sampler_ranks": 2}),
    ("7B", "8x80", (8, 1, True), {"offload": True}),
])  # fmt: skip
def test_the_smallest_split_with_room_for_rows_is_chosen(model, gpus, split, flags):
    c = models.layout(MODELS[model], gpus, **flags).config
    assert (c.shard, c.sampler_ranks, c.offload) == split


def test_flags_decide_rows_and_micro_batches():
    layout = models.layout(MODELS["1.5B"], "8x80", rollout_tokens=9 * 4096, micro_batch_tokens=5000)
    c = layout.config
    assert (c.rollout_tokens, layout.rows, c.micro_batch_tokens) == (9 * 4096, 9, 5000)


def test_a_row_is_keys_values_and_logits():
    """32B: 64 layers of 8 heads of 128 numbers, twice, in bf16; each of 8 ranks has one of the heads.

    The logits lie in fp32, twice.
    """
    layout = models.layout(MODELS["32B"], "16x80", sampler_ranks=8)
    assert layout.row["rows"] == 4096 * 2 * 64 * 128 * 2 and layout.row["logits"] == 2 * 4 * 152064
    whole = models.layout(MODELS["32B"], "16xH200", sampler_ranks=1)
    assert whole.row["rows"] == 4096 * 2 * 64 * 1024 * 2
    row, limit = sum(layout.row.values()), 0.9 * 0.98 * 80 * 2**30
    assert limit - row < sum(layout.parts.values()) + layout.rows * row <= limit


def test_there_are_graphs_for_26_numbers_of_rows_up_to_350():
    """1, 2, 4, 8 and the multiples of 16, each for training, for evaluation and for greedy evaluation."""
    layout = models.layout(MODELS["1.5B"], "8xH200", rollout_tokens=350 * 4096)
    planned = layout.parts["graphs"] + 350 * layout.row["graphs"]
    computing = 350 * 2 * (4 * 8960 + 10 * 1536)
    assert planned - computing == pytest.approx(26 * 3 * 28 * memory.GRAPH_BYTES, rel=0.01)
    as_training = models.layout(MODELS["1.5B"], "8xH200", eval_temperature=1.0, eval_top_p=1.0)
    assert as_training.parts["graphs"] == layout.parts["graphs"]  # 0.6/0.95 is evaluated besides


def test_evaluation_holds_the_sampler_alone():
    layout = models.layout(MODELS["32B"], "8x80", eval_only=True)
    assert layout.parts.keys() == {"sampler", "graphs", "prefill"}
    one_layer = 8192 * 2 * (4 * 27648 + 10 * 5120)
    keys = 2 * 8192 * 2 * 64 * 4 * 128 * 2  # of half of the heads
    assert layout.parts["prefill"] == one_layer + keys


@pytest.mark.parametrize("model, gpus, checkpointing, least, most, flags", [
    ("1.5B", "1xH100", False, 4096, 5000, {}),
    ("1.5B", "8x80", False, 4096, 5000, {}),
    ("1.5B", "1xH200", False, 8192, 8192, {}),
    ("1.5B", "4x4090", True, 11000, 12000, {}),
    ("1.5B", "1x24", True, 17000, 19000, {}),  # with --offload
    ("7B", "1xH200", True, 32768, 32768, {}),  # so has this, where 4,096 tokens would fit
    ("3B", "1x80", True, 4096, 5000, {}),
    ("7B", "8x80", True, 9000, 10000, {}),
    ("32B", "16x80", True, 4096, 5000, {}),
    ("1.5B", "1xH100", True, 32768, 32768, {"checkpointing": True}),  # the flag forces either
    ("1.5B", "1x80", False, 4096, 8192, {"checkpointing": False, "offload": True}),
    ("1.5B", "1xH100", True, 5000, 5000, {"micro_batch_tokens": 5000}),  # 14.6 GB, more than a third
])  # fmt: skip
def test_memory_decides_checkpointing(model, gpus, checkpointing, least, most, flags):
    """Off where 4,096 tokens, or the longest row, take a third of what is left, and nothing is offloaded."""
    c = models.layout(MODELS[model], gpus, **flags).config
    assert c.checkpointing == checkpointing and least <= c.micro_batch_tokens <= most


def test_what_is_kept_without_checkpointing_by_hand():
    """1.5B: 0.10 MB of each token and layer, and the weights of all layers as autocast has cast them.

    4,096 tokens take 11.9 GB, of 41.1 that state, reference, sampler, graphs and these weights leave.
    """
    layout = models.layout(MODELS["1.5B"], "1xH100", micro_batch_tokens=4096)
    kept, at_work = 2 * (4 * 8960 + 10 * 1536), 2 * (6 * 8960 + 14 * 1536)
    assert layout.parts["activations"] == 4096 * (27 * kept + at_work)
    assert layout.parts["unsharded"] / 1e9 == pytest.approx(0.93 + 2.62, abs=0.1)
    assert not layout.config.checkpointing


def test_rows_are_left_where_checkpointing_is_off():
    layouts = [models.layout(name, gpus) for name in models.SHAPES for gpus in ("8x80", "8xH200")]
    off = [layout for layout in layouts if not layout.config.checkpointing]
    assert len(off) >= 4 and all(layout.rows_of_a_rank() >= ENOUGH_ROWS for layout in off)


@pytest.mark.parametrize("megabytes, checkpointing", [(1500, False), (500, True)])
def test_the_run_learns_as_the_plan_says(few_questions, monkeypatch, megabytes, checkpointing):
    """No flag says so, as a run may be resumed on other GPUs: the run has what memory decides here."""
    monkeypatch.setattr(plan, "print0", lambda *lines: None)
    asked = questions.load(str(few_questions))
    c = config.configure({"data": str(few_questions), "gpus": "1x24", "dry_run": True})
    machine = Machine(1, 1, memory=megabytes * 10**6, host=None, cuda=True)
    made = inputs.prepare(c, None, machine, {}, ROOT / "tiny" / "model", asked, asked)
    assert made.config.checkpointing == checkpointing and c.checkpointing is None
    assert config.configure({"data": str(few_questions), "device": "cpu"}).checkpointing is False


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", None])
def test_segments_grow_unless_the_user_has_configured_the_allocator(monkeypatch, name):
    told = []
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", told.append, raising=False)
    for variable in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "NCCL_GRAPH_REGISTER"):
        monkeypatch.delenv(variable, raising=False)
    if name:
        monkeypatch.setenv(name, "max_split_size_mb:512")
    ranks.let_segments_grow()
    assert told == ([] if name else ["expandable_segments:True"])
    assert os.environ.pop("NCCL_GRAPH_REGISTER") == "0"


def on(memory, host, gpus="1x80", model="7B", **flags):
    """A job on a machine with so many GB for a rank (None: those of the GPUs) and of host memory."""
    job = models.job(MODELS[model], gpus, **flags)
    if memory:
        machine = Machine(1, 1, memory * 10**9, host * 10**9, cuda=False)
        return job._replace(machine=machine).changed(checkpointing=False)
    return job._replace(machine=job.machine._replace(host=host * 10**9))


def on_eight(**flags):
    return models.job(MODELS["7B"], **{"gpus": "8x80", **flags})


@pytest.mark.parametrize("job, sentence", [
    (on_eight(shard=3), r"--shard 3: must divide the number of ranks, 8$"),
    (on_eight(sampler_ranks=3), r"--sampler-ranks 3: must divide the ranks of a node, 8$"),
    (on_eight(sampler_ranks=8), r"--sampler-ranks 8: must divide the key/value heads and the MLP width"),
    (on_eight(rollout_tokens=100),
     r"--rollout-tokens 100: must be at least 4096, the tokens of the longest"),
    (on_eight(shard=1, offload=False), r"state 121\.85, .* has 75\.8 GB; it would fit with --shard 4$"),
    (on_eight(shard=1, sampler_ranks=1, offload=False), r"it would fit with --shard 4$"),
    (on_eight(checkpointing=False, micro_batch_tokens=40000), r"it would fit with --checkpointing$"),
    (on_eight(gpus="8x12"), r"needs 1\d\.\d GB \(sampler .* to sample eight rows, and has 11\.4 GB$"),
    (on(None, 120),
     r"state 121\.85, .*with 2 more GPUs or 137 GB of host memory on each node for --offload, not 120$"),
    (on(None, 500, "8x80", "32B", offload=True),
     r"590 GB of host memory on each node for --offload, not 500; it would fit with 8 more GPUs$"),
    # one state over both nodes would do, though a state on each leaves more room for rows
    (on(None, 30, "16x80", offload=True, kl=0.0, max_new_tokens=64),
     r"it needs 61 GB of host memory on each node for --offload, not 30"),
    # a CPU: 16 bytes of each parameter and 4 for the reference
    (on(72, 72),
     r"needs \d+\.\d GB \(state 121\.85, reference 30\.46, unsharded 2\.18, .* and has 72\.0 GB"),
])  # fmt: skip
def test_what_does_not_fit_is_refused_in_a_sentence(job, sentence):
    with pytest.raises(ValueError, match=sentence):
        choose_layout(job)


def test_what_is_a_little_larger_fits():
    assert choose_layout(on(None, 140)).config.offload
    layout = choose_layout(on(72, 72, eval_only=True))  # 4 bytes of each parameter
    assert 32 * 4096 < layout.config.rollout_tokens < 64 * 4096


def test_a_shorter_response_is_the_last_advice():
    job = on(50, 50, model="1.5B", max_new_tokens=30000)
    with pytest.raises(ValueError, match=r"it would fit with --max-new-tokens (\d+)$") as refused:
        choose_layout(job)
    assert choose_layout(job.changed(max_new_tokens=int(str(refused.value).split()[-1])))


@pytest.mark.parametrize(
    "gpus, sentence",
    [
        ("8", "must be a number of GPUs, x, and the GB of each or H100, A100, H200, 4090: 8x80"),
        ("0x80", "must be a number of GPUs, x, and"),
        ("8xTPU", "must be a number of GPUs, x, and"),
        ("12x80", "more than 8 are planned as nodes of 8"),
    ],
)
def test_gpus_that_cannot_be_planned_for(gpus, sentence):
    with pytest.raises(ValueError, match=f"--gpus {gpus}: {sentence}"):
        config.configure({"gpus": gpus, "dry_run": True})


def test_gpus_go_with_a_dry_run():
    with pytest.raises(ValueError, match=r"--gpus 8x80: .* add --dry-run"):
        config.configure({"gpus": "8x80"})


# ----------------------------------------------------------------------------------------------------------
# what is printed


def test_the_least_hours_by_hand():
    """1.5B on one H100, 8 x 64 rows of 100 + 1,000 tokens at once, no KL.

    A decoding step reads 3.087 GB of weights and 512 x 600 x 28,672 bytes of keys and values: 11.90 GB at
    3.35 TB/s, 3.55 ms for 512 tokens. Learning: 1.54 G weights and 600 x 28 x 2 x 1,536 of attention, 2
    operations each, three passes, and a fourth with checkpointing.
    """
    job = models.job(MODELS["1.5B"], "1xH100", max_new_tokens=1000, kl=0.0)
    layout = choose_layout(job._replace(prompt_tokens=100, most_rows=512))
    hours = plan.least_hours(job, layout, 100, {"train": 5120, "eval": 512})
    assert hours["sampling"] == pytest.approx(5120 * 1000 / 512 * 0.00355 / 3600, rel=0.01)
    assert hours["evaluation"] == pytest.approx(hours["sampling"] / 10)
    operations = 2 * (1.5437e9 + 600 * 28 * 2 * 1536)
    assert hours["learning"] == pytest.approx(80 * 32100 * 3 * operations / 989e12 / 3600, rel=0.01)
    layout = layout._replace(config=dataclasses.replace(layout.config, checkpointing=True))
    longer = plan.least_hours(job, layout, 100, {"train": 5120, "eval": 512})
    assert longer["learning"] == pytest.approx(hours["learning"] * 4 / 3)


def dry_run(folder, data, shape):
    """Flags of a dry run of a model that has a tokenizer and config.json, but no weights."""
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(ROOT / "tiny" / "model" / file, folder / file)
    (folder / "config.json").write_text(json.dumps({**shape, "rms_norm_eps": 1e-6, "eos_token_id": 330}))
    return ["--dry-run", "--model", folder, "--data", data]


def test_a_plan_for_gpus_that_are_not_here(tmp_path, few_questions):
    """The real program, on config.json and a tokenizer alone."""
    flags = dry_run(tmp_path, few_questions, models.SHAPES["Qwen2.5-Math-7B"])
    printed = program(*flags, "--gpus", "8xH100").stdout
    assert "8 on cuda (H100)" in printed and "--shard 4 --sampler-ranks 1 --no-offload" in printed
    table = re.findall(r"^ +(\d+\.\d\d)  (\w+) ", printed, re.MULTILINE)
    assert ("30.46", "state") in table and ("15.23", "sampler") in table
    assert sum(float(size) for size, _ in table) == pytest.approx(75.8, abs=0.1)
    assert re.search(
        r"time +at least \d+\.\d hours .* vendor's peaks of H100: a bound, not a promise", printed
    )
    assert "with checkpointing: without it they would take over a third of what is left" in printed
    printed = program(*flags, "--gpus", "1x80").stdout
    assert "with checkpointing: fewer and larger ones copy less" in printed
    assert "137 GB of host memory on each node; chosen because nothing else fits" in printed
    refused = program(*flags, "--gpus", "1x80", "--no-offload", code=2).stderr
    assert refused.count("\n") == 1 and refused.endswith("it would fit with --offload\n")


@pytest.fixture
def half(tmp_path, few_questions):
    """The same for 0.5B."""
    size = dict(hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
                num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True,
                max_position_embeddings=9999)  # fmt: skip
    flags = dry_run(tmp_path, few_questions, {**models.SHAPES["Qwen2.5-Math-1.5B"], **size})
    return [*flags, "--max-new-tokens", "4000"]


def test_where_few_rows_fit_the_plan_says_what_offload_would_give(half):
    printed = program(*half, "--gpus", "1x13").stdout
    [fewer] = re.findall(r"keys and values of (\d+) rows", printed)
    [(more, instead)] = re.findall(r"--offload would give (\d+) rows on each rank instead of (\d+)", printed)
    offload = program(*half, "--gpus", "1x13", "--offload").stdout
    assert instead == fewer and f"keys and values of {more} rows" in offload and int(more) > 5 * int(fewer)
    for flags in ("1x13 --no-offload", "1x13 --offload", "1x16", "1x13 --rollout-tokens 65000"):
        assert "would give" not in program(*half, "--gpus", *flags.split()).stdout


def test_the_plan_of_an_evaluation_is_of_an_evaluation(half, tmp_path):
    """Of the questions that are evaluated: those of --data are not read, nor need they be there."""
    (tmp_path / "q.json").write_text('[{"prompt": "1+1=?"}]')
    evaluate = ["--eval-only", "--eval-data", tmp_path / "q.json", "--reward", "gold", "--lr", "1e-3"]
    lines = program(
        *half, *evaluate, "--gpus", "1x13", "--data", tmp_path / "nowhere.json"
    ).stdout.splitlines()
    assert [line.split()[0] for line in lines if not line.startswith(" ")] == [
        "model", "ranks", "data", "plan", "prompt", "memory", "differs", "out"]  # fmt: skip
    assert lines[2].startswith(f"data     {tmp_path / 'q.json'}: 1 questions")
    asked = "1 questions x 16 responses = 16, at temperature 0.6 and top-p 0.95"
    assert f"plan     evaluation only: {asked}" in lines
    assert "memory   GB on each rank, --sampler-ranks 1" in lines
    assert "differs  --max-new-tokens 4000 (paper 3072, given)" in lines
    printed = program(*half, *evaluate).stdout  # on a CPU
    assert "micro-batches" not in printed and "sampler up to" in printed


def test_a_plan_for_more_ranks_than_there_are(few_questions, monkeypatch):
    """As train.sh makes it, before it starts torchrun."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    printed = program("--dry-run", "--data", few_questions, "--shard", "2").stdout
    assert re.search(r"^ranks +4 on cpu", printed, re.MULTILINE)
    refused = program("--dry-run", "--data", few_questions, "--shard", "3", code=2).stderr
    assert refused == "ttrl.py: --shard 3: must divide the number of ranks, 4\n"


def test_the_table_of_models_is_what_the_plan_says():
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8").splitlines()
    assert [line for line in models.table() if line not in page] == []


# ----------------------------------------------------------------------------------------------------------
# what a run on the CPU really allocates


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
    gc.collect()  # what other tests have left is not to be freed below
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as build:
            run = build_run(inputs.plan_run(c, device, {}))
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
        torch.distributed.destroy_process_group()
    model_config = ModelConfig.from_pretrained(ROOT / "tiny" / "model")
    return run, memory.memory_parts(run.config, model_config, False, 300), sizes, outside


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


def test_the_plan_knows_the_peak_of_learning(measured):
    """Moments, the head's gradient and a micro-batch of activations, to 10 %."""
    _, parts, sizes, _ = measured
    planned = parts["state"] / 2 + parts["unsharded"] + parts["activations"]
    assert sizes["peak of learning"] == pytest.approx(planned, rel=0.1)


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
    found = physical_memory(tmp_path / "fs", tmp_path / "cgroup")
    whole = physical_memory(Path("/nowhere"), Path("/nowhere"))
    assert found == (limit or whole) and whole > 10**9
