"""What only a GPU can show: each twin against the other, graphs against plain steps, and speeds.

Run it first on a machine with a GPU; -s shows the speeds:    python -m pytest tests/test_gpu.py -s

Each test takes its device as an argument and also runs on the CPU, on small shapes: there most comparisons
are trivial, but the comparing code has run.
"""

import copy
import importlib
import inspect
import math
import time
from functools import partial

import flash_attention
import pytest
import torch
from conftest import ROOT, SMALL, lines_of, program, rollout_of
from safetensors.torch import load_file
from test_flash_attention import (
    TORCH,
    check_decoding,
    check_learning,
    check_rows,
    check_same_but_for_ties,
    small_config,
    small_model,
    use_flash,
)
from test_logprob import plain, results
from test_sampler import check_sampled, nucleus_by_sort

import ttrl
from distributed import weights
from distributed.ranks import start_processes
from kernels import attention, cuda_graph, fused, logprob, packing, sampler
from kernels.attention import attend_cached_triton, sdpa_one_query
from kernels.cuda_graph import GraphCache
from model import Transformer, rope_cos_sin
from report import metrics
from rollout import Engine, generate, prefill
from support.config import configure
from support.inputs import plan_run
from support.run import build_run

flash_attn = attention.flash_attn_varlen_func and importlib.import_module("flash_attn")
HAS_GPU = torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="no CUDA device: run tests/test_gpu.py where there is one")
needs_flash = pytest.mark.skipif(not HAS_GPU or flash_attn is None, reason="no CUDA device with flash-attn")
BOTH = ["cpu", pytest.param("cuda", marks=needs_gpu)]
on_both = pytest.mark.parametrize("device", BOTH)
EOS = [1, 2, 3, 4]
PROMPTS = [[5, 17, 3, 88, 41], [7, 7, 9], [60, 2, 2, 31, 14, 55, 90, 8], [12]]


def wait(device):
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(action, device, repeats=10):
    """The mean of some repeats, after two to warm up."""
    action(), action()
    wait(device)
    began = time.perf_counter()
    for _ in range(repeats):
        action()
    wait(device)
    return (time.perf_counter() - began) / repeats


def say(capsys, *lines):
    with capsys.disabled():
        print("", *lines, sep="\n    ")


@pytest.fixture(autouse=True)
def exact_fp32():
    """No tf32 in what is compared."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


# ----------------------------------------------------------------------------------------------------------
# the two kernels and their twins


def logprob_inputs(device, tokens, width, vocabulary, dtype):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator)
    weight = torch.randn(vocabulary, width, generator=generator) / width**0.5 * 3
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    grads = torch.randn(2, tokens, generator=generator)
    return hidden.to(device, dtype), weight.to(device, dtype), targets.to(device), grads.to(device)


SHAPES = [(1, 8, 11), (37, 24, 101), (200, 128, 3000), (257, 896, 151936)]  # the last is Qwen2.5-0.5B's


@on_both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.6, 0.1])
def test_log_probabilities(device, shape, dtype, temperature, monkeypatch):
    """Against float64 the kernel errs no more than its twin in torch, forward and backward."""
    if device == "cpu" and shape[2] > 1000:
        shape = (3, 8, 1000)
    hidden, weight, targets, grads = logprob_inputs(device, *shape, dtype)
    rest = hidden, weight, targets, grads, temperature
    exact = results(plain, torch.float64, *rest)
    kernel = results(logprob.linear_logprob, dtype, *rest)
    monkeypatch.setattr(logprob, "on_gpu", lambda x: False)
    twin = results(logprob.linear_logprob, dtype, *rest)
    names = "logprob", "entropy", "grad hidden", "grad weight"
    for name, a, b, c in zip(names, exact, kernel, twin, strict=True):
        scale = a.abs().max().clamp(min=1e-3)
        kernel_error, twin_error = ((x - a).abs().max() / scale for x in (b, c))
        # Backward, the logits are cuBLAS's, which rounds their sums otherwise than the kernel forward: each
        # of D additions loses up to 2^-24 of a sum that is about as large as the logit.
        logits = (hidden.double() @ weight.double().T).abs().max().item()
        rounding = 2e-3 if dtype != torch.float32 else 1e-5 + shape[1] ** 0.5 * 2**-24 * logits / temperature
        assert kernel_error <= 1.5 * twin_error + rounding, name


@on_both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_self_certainty(device, dtype):
    hidden, weight, targets, _ = logprob_inputs(device, 37, 24, 101, dtype)
    of_targets, _ = logprob.linear_logprob(hidden, weight, targets, 0.6)
    logits = hidden.double() @ weight.double().T / 0.6
    exact = logits.logsumexp(-1) - logits.mean(-1) - math.log(101)
    got = logprob.self_certainty(hidden, weight, targets, of_targets, 0.6)
    # A CPU rounds the logits of linear_logprob to their dtype. A GPU sums them in fp32.
    rounding = torch.finfo(dtype if device == "cpu" else torch.float32).eps * logits.abs().max().item()
    assert (got - exact).abs().max().item() < 1e-5 + 4 * rounding


@on_both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows, vocabulary", [(1, 5), (64, 1000), (33, 32000), (16, 151936)])
@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.6, 1.0), (1.0, 0.95), (0.6, 0.8)])
def test_drawing(device, rows, vocabulary, dtype, temperature, top_p):
    """The kernels draw the tokens of the twin, but where the uniform number lies on an edge of the CDF."""
    vocabulary = min(vocabulary, 2000) if device == "cpu" else vocabulary
    logits = 3 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(1))
    logits = logits.to(device, dtype)
    key, position = torch.arange(rows, device=device) * 7919, torch.arange(rows, device=device) % 5
    u = sampler.uniform(key, position)
    token, logp = sampler.sample_tokens(logits, key, position, temperature, top_p)
    twin, twin_logp = sampler.sample_inverse_cdf(logits, u, temperature, top_p)
    p, _, _ = nucleus_by_sort(logits, temperature, top_p)
    edge = (p.cumsum(-1) - u[:, None]).abs().amin(-1) < 1e-5
    assert edge.float().mean() < 0.6  # with 152k tokens edges are dense
    sure = check_sampled(logits, u, temperature, top_p, token, logp) & ~edge
    assert check_sampled(logits, u, temperature, top_p, twin, twin_logp)[sure].all()
    assert token[sure].equal(twin[sure])


def fused_steps(tokens, heads, head_dim, width, device, dtype):
    """{name: (function of one tensor, that tensor)}: rotation and SwiGLU as the model calls them."""
    generator = torch.Generator().manual_seed(0)
    qkv, gate_up = (
        torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()
        for shape in ((tokens, heads + 2, head_dim), (tokens, 2 * width))
    )
    frequency = 1e4 ** -torch.linspace(0, 1, head_dim // 2)
    cos_sin = [x.to(device) for x in rope_cos_sin(torch.arange(tokens), frequency, 1.0)]
    rotate = partial(fused.rotate, cos=cos_sin[0], signed_sin=cos_sin[1])
    return {
        "rotation": (lambda qkv: rotate(qkv[:, :heads], dtype=qkv.dtype), qkv),
        "SwiGLU": (fused.swiglu, gate_up),
    }


def value_and_gradient(function, x, dtype=None):
    x = x.detach().to(dtype or x.dtype).requires_grad_()
    out = function(x)
    grad = torch.linspace(-1, 1, out.numel(), device=x.device).view(out.shape)
    return [y.detach().double() for y in (out, *torch.autograd.grad(out, x, grad.to(out.dtype)))]


@on_both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 14, 128, 8960), (333, 5, 80, 1500), (70001, 3, 64, 1100)], ids=str)
def test_rotation_and_swiglu(device, shape, dtype, monkeypatch):
    """Against float64 the kernels err no more than their twins, forward and backward."""
    if device == "cpu":
        shape = (min(shape[0], 9), *shape[1:])
    steps = fused_steps(*shape, device, dtype)
    kernels = {name: value_and_gradient(*step) for name, step in steps.items()}
    monkeypatch.setattr(fused, "on_gpu", lambda x: False)
    for name, (function, x) in steps.items():
        exact, twin = value_and_gradient(function, x, torch.float64), value_and_gradient(function, x)
        for a, b, c in zip(exact, kernels[name], twin, strict=True):
            kernel_error, twin_error = ((y - a).abs().max() for y in (b, c))
            assert kernel_error <= twin_error + 2e-6 * a.abs().max(), name


@needs_gpu
def test_rotation_and_swiglu_of_more_than_2_31_numbers(monkeypatch):
    """The last tokens of a product of 4.6 GB, whose offsets do not fit into 32 bits."""
    if torch.cuda.mem_get_info()[0] < 14e9:
        pytest.skip("less than 14 GB free")
    tokens, rows = 128_000, slice(-2, None)
    gate_up = torch.randn(tokens, 18_000, device="cuda", dtype=torch.bfloat16)
    heads, angles = gate_up.unflatten(1, (150, 120)), torch.rand(2, tokens, 1, 60, device="cuda")
    angles = [torch.cat((x * sign, x), -1) for x, sign in zip(angles, (1, -1), strict=True)]
    ends = fused.swiglu(gate_up)[rows], fused.rotate(heads, *angles, torch.bfloat16)[rows]
    monkeypatch.setattr(fused, "on_gpu", lambda x: False)
    twins = fused.swiglu(gate_up[rows]), fused.rotate(heads[rows], *(x[rows] for x in angles), torch.bfloat16)
    for kernel, twin in zip(ends, twins, strict=True):
        assert torch.allclose(kernel.float(), twin.float(), rtol=0.02, atol=0.02)


@on_both
@torch.no_grad()
def test_the_head_of_a_bf16_model_does_not_round_its_sums(device):
    """The logits that the sampler draws from, against float64.

    On a GPU they have the error of fp32, where bf16 would make steps of 1/8 at 16.
    """
    whole = small_model(torch.bfloat16).to(device)
    hidden = 20 * torch.randn(9, 64, generator=torch.Generator().manual_seed(0)).to(device, torch.bfloat16)
    logits = whole.next_token_logits(hidden)
    exact = hidden.double() @ whole.lm_head.weight.double().T
    assert exact.abs().max() > 16
    if device == "cuda":
        assert logits.dtype == torch.float32 and (logits - exact).abs().max() < 1e-3
    else:
        assert logits.equal(whole.lm_head(hidden)) and (logits - exact).abs().max() < 1


# ----------------------------------------------------------------------------------------------------------
# flash attention: torch's operator, and the package itself


HEADS_AND_WIDTHS = [((14, 2), 64), ((4, 4), 80), ((16, 2), 96), ((12, 2), 128)]
BOTH_WAYS = [pytest.param(TORCH, id="torch"), pytest.param(flash_attn, id="package", marks=needs_flash)]


@on_both
@pytest.mark.parametrize("package", BOTH_WAYS)
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("heads, width", HEADS_AND_WIDTHS)
def test_flash_attention_over_rows(device, heads, width, window, package, monkeypatch):
    """Forward and backward: long and short rows behind long and short prompts, and rows of one token."""
    long, short = (400, 150) if device == "cuda" else (7, 3)
    mixed = [long, 5], [(0, short), (0, 1), (0, 2), (1, long), (1, short)]
    for shape in (mixed, ([4, 6], [(0, 1), (0, 2), (1, 2)])):
        check_rows(monkeypatch, package, shape, window, heads, width, device)


@on_both
@pytest.mark.parametrize("score", [-150.0, 150.0])
def test_gradients_at_704_keys_are_finite(device, score, monkeypatch):
    """Where cuDNN gives NaN: 704 keys, all scores of a query far below 0. By flash attention and by SDPA."""
    prompt, response = (640, 65) if device == "cuda" else (6, 3)
    shape = [prompt, prompt + 64], [(0, response), (0, 1), (1, 2)]
    check_rows(monkeypatch, TORCH, shape, None, (4, 2), 64, device, score=score)


@needs_gpu
def test_torch_has_flash_attention():
    """Else rows are padded: slower, and not what the first person with a GPU should time."""
    assert attention.torch_has_flash(torch.device("cuda"))


@on_both
def test_learning_by_the_flash_attention_of_torch(device, monkeypatch):
    check_learning(monkeypatch, device, TORCH)


@needs_flash
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_flash_attn_is_as_good_as_sdpa(dtype, monkeypatch):
    """What test_flash_attention.py proves of the CPU reference, of the package."""
    check_decoding(monkeypatch, dtype, "cuda", flash_attn)
    check_learning(monkeypatch, "cuda", flash_attn)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_kernel_over_a_cache_is_as_good_as_sdpa(dtype, monkeypatch):
    check_decoding(monkeypatch, dtype, "cuda", package=None, triton=True)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("heads, kv_heads, width, window", [
    (12, 2, 128, None), (14, 2, 64, None), (8, 8, 80, 300), (32, 8, 96, None), (28, 4, 128, 1),
])  # fmt: skip
def test_attention_over_a_long_cache(heads, kv_heads, width, window, dtype):
    """Against float64: rows of many lengths, the rest of the cache NaN, and few and many splits."""
    for lengths in ([0, 1, 63, 64, 65, 700, 2047], [1500] * 80):
        generator = torch.Generator("cuda").manual_seed(0)
        rows, options = len(lengths), dict(device="cuda", generator=generator)
        q, k, v = (torch.randn(rows, n, width, **options).to(dtype) for n in (heads, kv_heads, kv_heads))
        cache = torch.randn(2, rows, kv_heads, 2048, width, **options).to(dtype)
        length = torch.tensor(lengths, device="cuda", dtype=torch.int32)
        at = torch.arange(2048, device="cuda")
        unwritten = (at >= length[:, None])[:, None, :, None]
        keys, values = cache.masked_fill(unwritten, torch.nan)
        got = attend_cached_triton(q, k, v, keys, values, length, window)
        here = (torch.arange(rows, device="cuda"), slice(None), length.long())
        assert keys[here].equal(k) and values[here].equal(v)
        seen = (at <= length[:, None]) & (at > length[:, None] - (window or 2048))
        bias = torch.zeros(seen.shape, device="cuda", dtype=torch.float64).masked_fill(~seen, -torch.inf)
        cached = (x.nan_to_num(0).double() for x in (keys, values))
        exact = sdpa_one_query(q.double(), *cached, bias[:, None, None])
        tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
        assert (got - exact).abs().max() < tolerance


@needs_flash
@pytest.mark.parametrize("name", flash_attention.SIGNATURES)
def test_flash_attn_has_the_signature_that_we_tested_with(name):
    """Names and defaults of what we pass; a newer version may have more behind them."""
    theirs = inspect.signature(getattr(flash_attn, name)).parameters
    for ours in inspect.signature(getattr(flash_attention, name)).parameters.values():
        if ours.name in theirs:
            assert theirs[ours.name].default == ours.default, ours.name
    used = {"q", "k", "v", "causal", "window_size", "cache_seqlens" if "cache" in name else "cu_seqlens_q"}
    assert used <= theirs.keys()


@needs_gpu
def test_the_learner_attends_by_a_fused_kernel(monkeypatch):
    """Packed rows with a mask and shared heads: torch's fallback would write out the scores of all heads."""
    use_flash(monkeypatch, None)
    whole = small_model(torch.bfloat16).cuda()
    fused = torch.nn.attention.SDPBackend
    with torch.nn.attention.sdpa_kernel([fused.FLASH_ATTENTION, fused.EFFICIENT_ATTENTION]):
        whole.logits(torch.randint(101, (3, 40))).sum().backward()


# ----------------------------------------------------------------------------------------------------------
# the engine


def sampled(whole, **changes):
    options = dict(max_new_tokens=40, eos_ids=EOS, seed=92, stream="train", step=2)
    return generate(whole, PROMPTS, 16, **{**options, **changes})


@on_both
@pytest.mark.parametrize("flash", [False, pytest.param(True, marks=needs_flash)], ids=["sdpa", "flash"])
def test_graphs_draw_what_plain_steps_draw(device, flash, monkeypatch):
    """Replayed graphs against the same steps run one by one, refills and moves included: the same bits."""
    use_flash(monkeypatch, flash_attn if flash else None)
    whole = small_model(torch.bfloat16).to(device)
    replayed = sampled(whole, engine=Engine(whole, 20, 48, 40, EOS))
    monkeypatch.setattr(cuda_graph, "capture", lambda function, pool: function)
    stepped = sampled(whole, engine=Engine(whole, 20, 48, 40, EOS))
    assert replayed.tokens.equal(stepped.tokens) and replayed.logprob.equal(stepped.logprob)
    assert len(set(replayed.response_length.tolist())) > 5


@on_both
def test_graphs_follow_weights_refreshed_in_place(device):
    whole, other = (small_model(torch.bfloat16, seed=seed).to(device) for seed in (0, 1))
    engine = Engine(whole, 20, 48, 40, EOS)
    before = sampled(whole, engine=engine)
    weights.refresh(whole, other)
    after, fresh = sampled(whole, engine=engine), sampled(other, engine=Engine(other, 20, 48, 40, EOS))
    assert after.tokens.equal(fresh.tokens) and not after.tokens.equal(before.tokens)


@on_both
def test_the_engine_on_a_gpu_is_that_on_a_cpu(device, random_model):
    """fp32, greedy: other kernels, other batches, the same tokens but for ties."""
    greedy, moved = dict(stream="eval", temperature=0.0), copy.deepcopy(random_model).to(device)
    here, there = sampled(moved, budget_tokens=9 * 48, **greedy), sampled(random_model, **greedy)
    assert check_same_but_for_ties(random_model, here, there, tie=1e-3) > 300


# ----------------------------------------------------------------------------------------------------------
# learning: the embedded model, through the program's own functions


@pytest.fixture
def tiny_run(request, tmp_path):
    """A Run of the embedded model, with a reference, and a rollout with its advantages."""
    device = request.param
    started = start_processes(device)
    c = configure(dict(device=device, votes=8, samples=6, questions_per_step=4, max_new_tokens=48, kl=0.01,
                       micro_batch_tokens=300, out=str(tmp_path), rollout_tokens=20 * 150))  # fmt: skip
    run = build_run(plan_run(c, started, {}))
    whole = ttrl.sample(run, run.train_prompts[:4], 8, stream="train", step=1, temperature=1.0)
    yield run, whole, ttrl.advantages((torch.arange(24).view(4, 6) % 3 == 0).float())
    # before the group: DDP, freed after it, would join gloo's thread with the GIL held, which that waits for
    run.learner = None
    torch.distributed.destroy_process_group()


runs_on_both = pytest.mark.parametrize("tiny_run", BOTH, indirect=True)


@runs_on_both
def test_sampler_and_learner_agree(tiny_run):
    """The metric measures a small gap between sampler and learner.

    The sampler is bf16 with a cache, the learner has fp32 weights under bf16 autocast and packed rows.
    """
    run, whole, advantage = tiny_run
    measured = ttrl.learn(run, whole, advantage, 1)
    exact = run.sampler is run.policy
    gap, gap_max = (1e-5, 1e-3) if exact else (0.005, 1.0)
    assert measured["logprob_gap"] < gap and measured["logprob_gap_max"] < gap_max
    assert measured["updates"] == 2 and 0 < measured["grad_norm"] < 100


@runs_on_both
def test_checkpointing_changes_no_gradient(tiny_run):
    run, whole, advantage = tiny_run
    gradients = []
    for run.policy.checkpointing in (False, True):
        trained = whole[whole.sample < 6]
        tally = metrics.Tally(run.policy.embed_tokens.weight.device)
        loss = ttrl.micro_batch_loss(run, trained, trained.mask(), advantage, 500, tally)
        loss.backward()
        gradients.append([p.grad.clone() for p in run.policy.parameters()])
        run.optimizer.zero_grad()
    for a, b in zip(*gradients, strict=True):
        assert (a - b).norm() <= 1e-3 * a.norm() + 1e-9


@runs_on_both
def test_the_sampler_follows_the_policy(tiny_run):
    """After an update the sampler's weights are the policy's, rounded, at their old addresses."""
    run, whole, advantage = tiny_run
    addresses = [p.data_ptr() for p in run.sampler.parameters()]
    before = run.policy.embed_tokens.weight.detach().clone()
    ttrl.learn(run, whole, advantage, 1)
    assert not run.policy.embed_tokens.weight.equal(before)
    assert [p.data_ptr() for p in run.sampler.parameters()] == addresses
    pairs = zip(run.sampler.parameters(), run.policy.parameters(), strict=True)
    assert all(mine.equal(its.to(mine.dtype)) for mine, its in pairs)


@runs_on_both
def test_nothing_waits_but_where_it_says_so(tiny_run, monkeypatch):
    """torch's own alarm for synchronisations, on while rows are decoded and while gradients are made."""
    run, whole, advantage = tiny_run
    alarm = torch.cuda.set_sync_debug_mode if run.engine else lambda mode: None

    def quietly(function):
        def call(*args):
            alarm("default")
            try:
                return function(*args)
            finally:
                alarm("error")

        return call

    for module in (packing, metrics):
        monkeypatch.setattr(module, "to_host", quietly(packing.to_host))
    ttrl.learn(run, whole, advantage, 1)  # DDP rebuilds its buckets in the second pass of a run, and waits
    alarm("error")
    try:
        ttrl.learn(run, whole, advantage, 2)
        if run.engine:
            with torch.no_grad():
                run.engine.decode_steps(4, 16, run.engine.capacity, 1.0, 1.0)  # replays
                run.engine.step(16, run.engine.capacity, 1.0, 1.0)
    finally:
        alarm("default")


@on_both
def test_the_program(device, tmp_path, few_questions):
    """A whole run in a process; with two GPUs another under torchrun."""
    for ranks in [None, *([2] if device == "cuda" and torch.cuda.device_count() > 1 else [])]:
        out = tmp_path / f"{ranks}"
        flags = [*SMALL, "--data", few_questions, "--out", out, "--device", device, "--kl", "0.01"]
        done = program(*flags, *(["--dry-run"] if device == "cpu" else []), ranks=ranks)
        assert f"ranks    {ranks or 1} on {device}" in done.stdout
        if device == "cuda":
            steps = [line for line in lines_of(out / "metrics.jsonl") if "train/logprob_gap" in line]
            assert len(steps) == 4 and all(line["train/logprob_gap"] < 0.05 for line in steps)
            assert (out / "model" / "model.safetensors").exists()


# ----------------------------------------------------------------------------------------------------------
# a model on several GPUs, or partly in host memory: NCCL, collectives in CUDA graphs, pinned memory. That the
# numbers are right in fp32 is shown by test_parallel.py, on a CPU

needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
SPREAD = [
    pytest.param(["--offload"], None, marks=needs_gpu, id="one with shards in host memory"),
    pytest.param(["--shard", "2"], 2, marks=needs_two, id="two with shards"),
    pytest.param(["--sampler-ranks", "2"], 2, marks=needs_two, id="two with heads"),
    pytest.param(["--shard", "2", "--sampler-ranks", "2", "--offload"], 2, marks=needs_two,
                 id="two with shards and heads in host memory"),
]  # fmt: skip


def first_norm(out):
    lines = lines_of(out / "metrics.jsonl")
    return next(line["train/grad_norm"] for line in lines if "train/grad_norm" in line)


@pytest.mark.parametrize("flags, ranks", SPREAD)
def test_a_model_spread_over_gpus_or_into_host_memory(tmp_path, few_questions, flags, ranks):
    """In bf16 the first step's gradient is DDP's to a few percent; a stopped run goes on."""

    def train(name, *flags):
        base = [*SMALL, "--data", few_questions, "--device", "cuda", "--kl", "0.01"]
        return program(*base, "--out", tmp_path / name, *flags, ranks=ranks).stdout

    train("spread", *flags)
    train("copies", "--shard", "1")
    spread, copies = tmp_path / "spread", tmp_path / "copies"
    gaps = [line["train/logprob_gap"] for line in lines_of(spread / "metrics.jsonl")[1:]]
    assert len(gaps) == 4 and max(gaps) < 0.05
    assert first_norm(spread) == pytest.approx(first_norm(copies), rel=0.1)
    weights = load_file(spread / "model" / "model.safetensors")
    base = load_file(ROOT / "tiny" / "model" / "model.safetensors")
    assert weights.keys() == base.keys() and all(tensor.isfinite().all() for tensor in weights.values())
    assert max((weights[name] - base[name]).abs().max() for name in base) > 1e-3
    train("stopped", *flags, "--max-minutes", "0.001")
    assert "resume   from step 1" in train("stopped", *flags)


# ----------------------------------------------------------------------------------------------------------
# speeds: nothing is asserted but that it runs


def wide_model(device):
    """Qwen2.5-1.5B with half of its layers, random weights; toy widths on a CPU."""
    widths = dict(vocab_size=500, layers=2)
    if device == "cuda":
        widths = dict(vocab_size=151936, hidden_size=1536, intermediate_size=8960, layers=14, heads=12,
                      kv_heads=2, head_dim=128)  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 1e6}
    config = small_config(**widths, max_positions=4096, rope=rope, tie_word_embeddings=True,
                          windows=(None,) * widths["layers"])  # fmt: skip
    with torch.device(device):
        return Transformer(config).to(device)


def peak_gb(device, action):
    """What the GPU holds at most while `action` runs, 0 on a CPU; and what the action returns."""
    if device == "cpu":
        return 0.0, action()
    torch.cuda.reset_peak_memory_stats()
    returned = action()
    return torch.cuda.max_memory_allocated() / 1e9, returned


def copy_bandwidth(device):
    """GB/s that a large copy reads and writes, which is what decoding can hope for."""
    x = torch.zeros((1 << 30) if device == "cuda" else (1 << 22), dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    return 2 * len(x) / seconds(lambda: y.copy_(x), device) / 1e9


@on_both
@torch.no_grad()
def test_speed_of_decoding(device, monkeypatch, capsys):
    whole, peak = in_bf16(wide_model(device)), copy_bandwidth(device)
    length, steps = (512, 16) if device == "cuda" else (8, 2)
    weights = sum(p.numel() * p.element_size() for p in whole.parameters())
    a_token = 2 * whole.config.layers * whole.config.kv_heads * whole.config.head_dim * 2
    prompt = prefill(whole, [list(range(length))])
    lines = [f"decoding at {length} tokens; a copy moves {peak:,.0f} GB/s",
             "rows  flash  graphs    tokens/s    GB/s"]  # fmt: skip
    for flash in [None, *([flash_attn] if device == "cuda" and flash_attn else [])]:
        use_flash(monkeypatch, flash)
        for rows in (1, 8, 64, 256) if device == "cuda" else (1, 3):
            for graphs in (False, True) if device == "cuda" else (False,):
                engine = Engine(whole, rows, length + 64 * steps, 63 * steps, [whole.config.vocab_size])
                engine.graphs = GraphCache() if graphs else None
                engine.insert(0, prompt * rows, torch.arange(rows, device=device), 1.0, 1.0)
                span = -(-(length + 8 * steps) // 256) * 256 if device == "cuda" else engine.capacity
                decode = partial(engine.decode_steps, steps, rows, span, 1.0, 1.0)
                lasted = seconds(decode, device, repeats=3) / steps
                moved = (weights + rows * length * a_token) / lasted / 1e9
                which = f"{rows:4}  {'yes' if flash else 'no':5}  {'yes' if graphs else 'no':6}"
                lines.append(f"{which} {rows / lasted:11,.0f} {moved:7.0f}")
    say(capsys, *lines)


def in_bf16(whole):
    for parameter in whole.parameters():
        parameter.data = parameter.data.bfloat16()
    return whole


@on_both
def test_speed_and_memory_of_the_kernels(device, monkeypatch, capsys):
    tokens, width, vocabulary = (4096, 1536, 151936) if device == "cuda" else (4, 8, 300)
    hidden, weight, targets, grads = logprob_inputs(device, tokens, width, vocabulary, torch.bfloat16)
    hidden.requires_grad_(), weight.requires_grad_()
    logits = torch.randn(256 if device == "cuda" else 2, vocabulary, device=device)
    key = torch.arange(len(logits), device=device)
    lines = [f"{tokens} tokens, width {width}, vocabulary {vocabulary}, bf16; {len(logits)} rows drawn, fp32",
             "          forward ms  backward ms  peak GB   draw ms  top-p ms"]  # fmt: skip

    def forward():
        return logprob.linear_logprob(hidden, weight, targets)

    def both_ways():
        torch.autograd.grad(forward(), [hidden, weight], list(grads))

    def measure(name, draw):
        actions = forward, both_ways, partial(draw, 1.0), partial(draw, 0.95)
        peak, ms = peak_gb(device, lambda: [1e3 * seconds(action, device) for action in actions])
        lines.append(f"{name:8} {ms[0]:11.2f} {ms[1] - ms[0]:12.2f} {peak:8.2f} {ms[2]:9.3f} {ms[3]:9.3f}")

    measure("triton", lambda top_p: sampler.sample_tokens(logits, key, key, 1.0, top_p))
    monkeypatch.setattr(logprob, "on_gpu", lambda x: False)
    u = sampler.uniform(key, key)
    measure("torch", lambda top_p: sampler.sample_inverse_cdf(logits, u, 1.0, top_p))
    say(capsys, *lines)


@on_both
def test_speed_of_rotation_and_swiglu(device, monkeypatch, capsys):
    """One layer of Qwen2.5-1.5B, for the tokens of a decoding step and of a micro-batch."""
    lines = ["microseconds of a layer, forward and with backward", "tokens  step        triton         torch"]
    for tokens in (335, 8192) if device == "cuda" else (2,):
        widths = (14, 128, 8960) if device == "cuda" else (3, 8, 40)
        for name, (function, x) in fused_steps(tokens, *widths, device, torch.bfloat16).items():
            grad = torch.ones_like(function(x))

            def both(function=function, x=x, grad=grad):
                torch.autograd.grad(function(x), x, grad)

            took = []
            for where in (fused.on_gpu, lambda x: False):
                with monkeypatch.context() as here:
                    here.setattr(fused, "on_gpu", where)
                    forward = seconds(lambda f=function, x=x: f(x), device)
                    took += [1e6 * forward, 1e6 * seconds(both, device)]
            pairs = "  ".join(f"{a:5.0f} {b:6.0f}" for a, b in (took[:2], took[2:]))
            lines.append(f"{tokens:6}  {name:9} {pairs}")
    say(capsys, *lines)


@on_both
def test_speed_and_memory_of_learning(device, monkeypatch, capsys):
    """A micro-batch of a few long responses to one question, forward and backward, as the learner runs it."""
    whole, (rows, length) = wide_model(device), (4, 500) if device == "cuda" else (2, 5)
    mb = rollout_of([[5, 6, 7, 8]], [(0, torch.full((length,), 9))] * rows)
    lines = [f"learning from {rows} x {length} tokens", "checkpointing  attention    tokens/s  peak GB"]
    ways = {"padded": None, "torch": TORCH, "flash-attn": flash_attn}
    for name, flash in ways.items():
        if name != "padded" and (device == "cpu" or flash is None):
            continue
        use_flash(monkeypatch, flash)
        for whole.checkpointing in (False, True):

            def learn():
                with torch.autocast(device, torch.bfloat16):
                    logp, _ = whole(mb)
                logp.sum().backward()

            peak, lasted = peak_gb(device, partial(seconds, learn, device, repeats=3))
            which = f"{whole.checkpointing!s:13}  {name:10}"
            lines.append(f"{which} {rows * length / lasted:10,.0f} {peak:8.2f}")
    say(capsys, *lines)
