"""The CUDA path of the real program, sampling and learning, without a GPU: on the tensors of fake_cuda.py.

It proves that devices and dtypes fit together, that nothing waits for the device but the few places made for
it, and that what a CUDA graph records stays on the device. It cannot prove that the numbers are right:
tests/test_gpu.py does, on a GPU.

Replaced are the device, launches (Triton kernels, flash-attn, graphs), DDP's exchange, and the places where
the host reads (`Engine.poll`, `Engine.read`, `to_host`). Those run too, but what they return is made up.
"""

import contextlib
import dataclasses
import json
import sys
from types import SimpleNamespace
from unittest import mock

import fake_cuda as fake
import flash_attention
import pytest
import torch
from conftest import ROOT, execute, rollout_of
from fake_memory import Held
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor

import kernels.fused
import kernels.logprob
import kernels.sampler
import model
import rewards
import rollout
import ttrl
from distributed import parallel, ranks, weights
from distributed.shards import local
from kernels import attention, cuda_graph, kv_cache, packing
from model import Transformer
from report import metrics
from support import run as run_module
from support.config import configure
from support.inputs import Inputs, load_prompts
from support.prompts import load_tokenizer
from support.questions import load

attention_triton, fused_triton, logprob_triton, sampler_triton = fake.triton_halves()


def test_the_cuda_path_without_a_gpu():
    """Run the functions below named fake_* in a process of their own, as the fake device stays for good."""
    if torch.cuda.is_available():
        pytest.skip("a real GPU is here: tests/test_gpu.py runs the CUDA path on it")
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11):
        pytest.skip("the fake CUDA device is made of parts that torch has since 2.11")
    if fake.COMPILER is None:
        pytest.skip("no C++ compiler (c++ or g++): the fake CUDA device cannot be built")
    arguments = "-o python_functions=fake_* -p no:cacheprovider --tb=short --durations=5".split()
    execute([sys.executable, "-m", "pytest", __file__, *arguments], cwd=ROOT)


# ----------------------------------------------------------------------------------------------------------
# what is replaced

EOS = [7, 9]


class ScriptedEngine(rollout.Engine):
    """The real engine without numbers; when the host polls, a script says which rows have ended."""

    mode = None

    def __init__(self, *args):
        super().__init__(*args)
        self.dice = torch.Generator().manual_seed(0)
        self.at, self.end = torch.zeros(2, self.slots, dtype=torch.int64)
        self.moves = 0

    def insert(self, first, prompts, *rest):
        super().insert(first, prompts, *rest)
        slots = slice(first, first + len(prompts))
        self.at[slots] = 1
        self.end[slots] = torch.randint(1, self.max_new_tokens + 1, (len(prompts),), generator=self.dice)

    def sample(self, logits, *rest):
        assert logits.dtype == torch.float32, "logits that are rounded to bf16"
        super().sample(logits, *rest)

    def step(self, *shape):
        with self.mode.as_recorded():  # also the first, which is not: what comes later is the same
            super().step(*shape)

    def decode_steps(self, steps, count, *rest):
        super().decode_steps(steps, count, *rest)
        self.at[:count] = torch.minimum(self.at[:count] + steps, self.end[:count])

    def poll(self, count):
        with self.mode.reading():
            seen = super().poll(count)
        told = self.at[:count] < self.end[:count], self.at[:count].clone()
        assert [(x.shape, x.dtype, x.device) for x in seen] == [(x.shape, x.dtype, x.device) for x in told]
        return told

    def read(self, slots):
        with self.mode.reading():
            seen = super().read(slots)
        tokens = torch.randint(10, 100, (len(slots), self.max_new_tokens + 1), generator=self.dice)
        ends_early = self.end[slots] < self.max_new_tokens
        tokens[ends_early, self.end[slots][ends_early] - 1] = EOS[0]
        told = tokens, -torch.rand(tokens.shape, generator=self.dice)
        assert [(x.shape, x.dtype, x.device) for x in seen] == [(x.shape, x.dtype, x.device) for x in told]
        return told

    def compact(self, order, count, context):
        super().compact(order, count, context)
        self.moves += int((order != torch.arange(len(order))).sum())
        self.at[: len(order)], self.end[: len(order)] = self.at[order], self.end[order]


class NoExchange(torch.nn.Module):
    """DistributedDataParallel of one rank."""

    def __init__(self, module, gradient_as_bucket_view):
        super().__init__()
        self.module = module

    def forward(self, *args):
        return self.module(*args)

    def no_sync(self):
        return contextlib.nullcontext()


def patch_to_host(monkeypatch, replacement):
    for module in (packing, metrics, rewards):
        monkeypatch.setattr(module, "to_host", replacement)


def read_on_device(*numbers):
    """to_host up to the point where the host would wait."""
    together = torch.stack([n.double() for n in numbers])
    assert all(n.device.type == "cuda" for n in numbers) and together.is_cuda
    return torch.ones(together.shape, device="cpu").tolist()


def dense(*tensors):
    return all(x.is_contiguous() for x in tensors)


def shaped(shape, *tensors):
    return all(x.shape == shape for x in tensors)


def check_partials(grid, hidden, weight, targets, out, tokens, width, vocabulary, size, inverse_temperature,
                   BT, BV, BD, **constants):  # fmt: skip
    assert hidden.dtype == weight.dtype and targets.dtype == torch.int64 and out.dtype == torch.float32
    assert hidden.shape == (tokens, width) and weight.shape == (vocabulary, width)
    assert targets.shape == (tokens,) and out.shape == (4, grid[1], tokens) and grid[0] * BT >= tokens
    assert (grid[1] - 1) * size < vocabulary <= grid[1] * size and dense(hidden, weight, targets, out)


def check_gradient(grid, z, out, targets, *rest, COLUMNS):
    of_rows, (_, columns, z_stride, out_stride, *_) = rest[:5], rest[5:]
    assert {x.dtype for x in (z, *of_rows[:4])} == {torch.float32} and targets.dtype == torch.int64
    assert of_rows[4] is None, "a gradient of the entropy, which is a metric only"
    assert z.shape == out.shape == (grid[0], columns) and grid[1] * COLUMNS >= columns
    assert z.stride() == (z_stride, 1) and out.stride() == (out_stride, 1)
    assert shaped(grid[:1], targets, *of_rows[:4]) and dense(targets, *of_rows[:4])


def check_mass(grid, logits, floor, peak, mass, vocabulary, blocks, stride, inverse_temperature, TILE):
    assert logits.stride() == (stride, 1) and logits.shape == (grid[0], vocabulary)
    assert grid == (len(logits), blocks) and blocks * TILE >= vocabulary
    assert shaped(grid, peak, mass) and dense(peak, mass)
    assert floor is None or (floor.shape == grid[:1] and floor.dtype == torch.int32)


def check_above(grid, logits, floor, peak, above, *scalars, DIGITS, TILE):
    *sizes, shift = scalars
    check_mass(grid, logits, floor, peak, peak, *sizes, TILE)
    assert above.shape == (*grid, DIGITS) and above.is_contiguous() and DIGITS << shift <= 2**32


def check_raise(grid, floor, peak, mass, above, blocks, inverse_temperature, top_p, shift, DIGITS, BLOCKS):
    assert floor.shape == grid and floor.dtype == torch.int32 and above.shape == (*grid, blocks, DIGITS)
    assert shaped((*grid, blocks), peak, mass) and dense(peak, mass) and blocks <= BLOCKS


def check_draw(grid, logits, floor, key, position, peak, mass, token, logprob, vocabulary, blocks, stride,
               inverse_temperature, BLOCKS, TILE):  # fmt: skip
    scalars = vocabulary, blocks, stride, inverse_temperature
    check_mass((*grid, blocks), logits, floor, peak, mass, *scalars, TILE)
    of_rows = key, position, token, logprob
    assert blocks <= BLOCKS and shaped(grid, *of_rows) and dense(*of_rows)
    assert key.dtype == position.dtype == token.dtype == torch.int64 and logprob.dtype == torch.float32


def check_rotation(grid, x, cos, signed_sin, out, heads, token_stride, head_stride, sign,
                   HALF, PAIRS, HEADS):  # fmt: skip
    assert x.shape == out.shape == (grid[0], heads, 2 * HALF) and dense(out, cos, signed_sin)
    assert x.stride() == (token_stride, head_stride, 1) and abs(sign) == 1
    assert shaped((grid[0], 1, 2 * HALF), cos, signed_sin) and cos.dtype == signed_sin.dtype == torch.float32
    assert PAIRS >= HALF and grid[1] * HEADS >= heads
    assert (out if sign == 1 else x).dtype == torch.bfloat16  # attention's side; before are Qwen3's norms


def check_swiglu(grid, gate_up, out, width, stride, COLUMNS):
    assert gate_up.shape == (grid[0], 2 * width) and gate_up.stride() == (stride, 1)
    assert out.shape == (grid[0], width) and out.is_contiguous() and grid[1] * COLUMNS >= width
    assert gate_up.dtype == out.dtype == torch.bfloat16


def check_swiglu_gradient(grid, gate_up, grad, out, width, stride, grad_stride, COLUMNS):
    check_swiglu(grid, gate_up, grad, width, stride, COLUMNS)
    assert grad.stride() == (grad_stride, 1) and out.shape == gate_up.shape and out.is_contiguous()


def check_attention(grid, q, k, v, keys, values, length, acc, peak, mass, q_stride, k_stride, v_stride,
                    row_stride, head_stride, scale, window, G, BG, E, BE, BT):  # fmt: skip
    rows, kv_heads, splits = grid
    assert q.shape == (rows, kv_heads * G, E) and k.shape == v.shape == (rows, kv_heads, E)
    assert {x.dtype for x in (q, k, v, keys, values)} == {torch.bfloat16}
    assert length.dtype == torch.int32, "lengths: int32"
    assert [x.stride() for x in (q, k, v)] == [(stride, E, 1) for stride in (q_stride, k_stride, v_stride)]
    assert keys.shape[:2] == (rows, kv_heads) and keys.stride() == (row_stride, head_stride, E, 1)
    assert values.stride() == keys.stride() and length.shape == (rows,) and length.is_contiguous()
    check_merge((rows * kv_heads * G,), acc, peak, mass, q.new_empty(q.shape), splits, E, BE)
    assert max(G, 16) <= BG and window >= 1


def check_merge(grid, acc, peak, mass, out, N, E, BE):
    assert acc.shape == (*out.shape[:2], N, E) and shaped(acc.shape[:3], peak, mass)
    assert grid == (out.shape[0] * out.shape[1],) and dense(acc, peak, mass, out)
    assert N & (N - 1) == 0 and BE >= E and acc.dtype == peak.dtype == torch.float32


KERNELS = [
    (attention_triton, "attend_split", check_attention),
    (attention_triton, "merge_splits", check_merge),
    (fused_triton, "rotate_kernel", check_rotation),
    (fused_triton, "swiglu_kernel", check_swiglu),
    (fused_triton, "swiglu_gradient_kernel", check_swiglu_gradient),
    (logprob_triton, "partials_kernel", check_partials),
    (logprob_triton, "logits_to_gradient_kernel", check_gradient),
    (sampler_triton, "block_mass", check_mass),
    (sampler_triton, "block_above", check_above),
    (sampler_triton, "raise_floor", check_raise),
    (sampler_triton, "block_draw", check_draw),
]


def flash_with_kvcache(q, k_cache, v_cache, k, v, *, cache_seqlens, causal, window_size):
    flash_attention.check(q, k_cache, v_cache)
    flash_attention.check(q, k, v)
    flash_attention.check_lengths(cache_seqlens, len(q), q)
    assert k_cache.is_contiguous() and len(k_cache) == len(q) and k.shape == (len(q), 1, *k_cache.shape[2:])
    return torch.empty_like(q)


def flash_varlen(q, k, v, ends_q, ends_k, longest_q, longest_k, *, causal, window_size, **_):
    flash_attention.check(q, k, v)
    flash_attention.check_lengths(ends_q, len(ends_q), q)
    flash_attention.check_lengths(ends_k, len(ends_q), k)
    return q + k.mean() + v.mean()  # to be differentiable in all three


def attention_with_a_fused_kernel(
    q, k, v, attn_mask=None, sdpa=torch.nn.functional.scaled_dot_product_attention, **options
):
    """SDPA, but not with a mask and shared heads: no fused CUDA kernel takes them."""
    fused = not q.is_cuda or attn_mask is None or (q.dim() == 4 and q.shape[1] == k.shape[1])
    assert fused, "a mask and shared heads: [B, H, Tq, Tk] would be written out"
    return sdpa(q, k, v, attn_mask, **options)


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    fake.install(tmp_path_factory.mktemp("fake_cuda"))
    ranks.start_processes("cpu")
    yield
    torch.distributed.destroy_process_group()


PACKAGES = ["triton and flash-attn", "torch only", "torch without flash attention", "triton"]


@pytest.fixture(params=[*PACKAGES[:2], PACKAGES[3]])
def gpu(machine, request, monkeypatch):
    """The fake device, with the optional packages or without; `gpu.kernels` counts the launches of each."""
    with fake.fake_cuda() as mode:
        ScriptedEngine.mode = mode

        def capture(function, pool):  # a GPU records, and does nothing yet
            with mode.as_recorded():
                function()
            return lambda: None

        has_triton, has_flash = "triton" in request.param, "flash-attn" in request.param
        launched = {}
        triton = SimpleNamespace(cdiv=lambda a, b: -(-a // b),
                                 next_power_of_2=lambda n: 1 << (n - 1).bit_length())  # fmt: skip
        for module, name, check in KERNELS:
            names = getattr(getattr(module, name), "arg_names", None)  # None: triton is not installed
            launched[name] = fake.Kernel(name, check, names and len(names))
            monkeypatch.setattr(module, "triton", triton)
            monkeypatch.setattr(module, name, launched[name])
        for module, half in ((kernels.fused, fused_triton), (kernels.logprob, logprob_triton),
                             (kernels.sampler, sampler_triton)):  # fmt: skip
            monkeypatch.setattr(module, half.__name__.split(".")[1], half if has_triton else None)
        over_cache = attention_triton.attend_cached_triton if has_triton else None
        for module in (attention, kv_cache):
            monkeypatch.setattr(module, "attend_cached_triton", over_cache)
        monkeypatch.setattr(attention, "flash_attn_with_kvcache", flash_with_kvcache if has_flash else None)
        monkeypatch.setattr(attention, "flash_attn_varlen_func", flash_varlen if has_flash else None)
        if request.param == PACKAGES[2]:
            monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
        sdpa = "scaled_dot_product_attention"
        monkeypatch.setattr(torch.nn.functional, sdpa, attention_with_a_fused_kernel)
        monkeypatch.setattr(cuda_graph, "capture", capture)
        for module in (rollout, run_module):
            monkeypatch.setattr(module, "Engine", ScriptedEngine)
        monkeypatch.setattr(parallel, "DistributedDataParallel", NoExchange)
        patch_to_host(monkeypatch, read_on_device)
        mode.kernels = launched if has_triton else None
        yield mode


@pytest.fixture
def two_gpus(gpu):
    """This process as the first of two: torch's fake process group exchanges nothing."""
    from torch.distributed._tools import fake_collectives  # noqa: F401  # shapes of what is exchanged
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.destroy_process_group()
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    stream = mock.MagicMock()  # what FSDP asks of streams and events, which have nothing to wait for
    replaced = dict(
        Stream=mock.MagicMock, Event=mock.MagicMock, current_stream=lambda *_: stream,
        stream=contextlib.nullcontext, current_device=lambda: 0, device_count=lambda: 2,
        set_device=lambda _: None, is_initialized=lambda: True,
    )  # fmt: skip
    with mock.patch.multiple("torch.cuda", **replaced):
        yield gpu
    torch.distributed.destroy_process_group()
    ranks.start_processes("cpu")


QWEN2 = dict(model_type="qwen2", hidden_size=3584, num_attention_heads=28, num_key_value_heads=4,
             intermediate_size=18944, vocab_size=20000, tie_word_embeddings=False,
             max_position_embeddings=4096)  # fmt: skip
QWEN3 = dict(model_type="qwen3", hidden_size=1024, num_attention_heads=16, num_key_value_heads=8,
             intermediate_size=3072, head_dim=128, vocab_size=20000, tie_word_embeddings=True,
             max_position_embeddings=4096,
             use_sliding_window=True, sliding_window=16, max_window_layers=1)  # fmt: skip

SMALL = dict(model_type="llama", hidden_size=64, num_attention_heads=4, num_key_value_heads=2,
             intermediate_size=96, vocab_size=500, num_hidden_layers=1)  # fmt: skip


def make_run(folder, config, checkpointing=True, **split):
    """A Run on the device, as run.open_run makes it; the models by run.build_run, without weights.

    Real widths cost nothing where there are no numbers.
    """
    (folder / "config.json").write_text(json.dumps({"num_hidden_layers": 2, "rms_norm_eps": 1e-6, **config}))
    c = configure(dict(model=str(folder), data="amc", votes=6, samples=4, questions_per_step=3,
                       questions_per_update=2, max_new_tokens=40, temperature=1.0, kl=0.01))  # fmt: skip
    assert c.checkpointing is None and c.device == "cuda"  # memory decides
    asked = [SimpleNamespace(id=str(i)) for i in range(3)]
    prompts = [[11, 12, 13, 14, 15], [21, 22], [31] * 9]
    decided = {"shard": 1, "sampler_ranks": 1, "offload": False, "checkpointing": checkpointing, **split}
    c = dataclasses.replace(c, rollout_tokens=5 * 49, micro_batch_tokens=24, **decided)
    data = (asked, prompts, asked, prompts)
    inputs = Inputs(c, torch.device("cuda", 0), folder, None, EOS, *data)
    here = mock.patch.object(run_module, "on_every_rank", lambda action: action())  # nothing pickles here
    with here, mock.patch.object(weights, "read_weights", lambda *_: ()):
        run = run_module.build_run(inputs)
    assert run.policy.checkpointing == checkpointing
    return run


def check_sampling(run, **how):
    how = {"stream": "train", "max_new_tokens": 40, "eos_ids": EOS, "seed": 0, "step": 1, **how}
    assert run.engine.key.is_cuda, "the engine is on the CPU"
    whole = rollout.generate(run.sampler, run.train_prompts, 6, engine=run.engine, **how)
    assert not any(isinstance(x, FakeTensor) for x in vars(whole).values())
    assert len(whole) == 18 and whole.response_length.min() >= 1 and whole.response_length.max() == 40
    assert run.engine.moves > 0
    graphs = run.engine.graphs.graphs
    recorded = {shape for shape, graph in graphs.items() if graph}
    assert len({shape[0] for shape in recorded}) >= 2 and {shape[0] for shape in graphs} <= {1, 2, 4, 5}


def made_up_rollout(run):
    """18 responses to 3 questions, on the CPU, where the sampler's results are."""
    responses = [(row // 6, torch.arange(1 + row % 5 * 2) + 50) for row in range(18)]
    return rollout_of(run.train_prompts, responses, room=40)


ADVANTAGE = torch.tensor([[1.0, -1.0, 0.5, -0.5]]).repeat(3, 1)


# ----------------------------------------------------------------------------------------------------------
# the real functions


@pytest.mark.parametrize("config", [QWEN2, QWEN3], ids=["qwen2", "qwen3"])
def fake_models_have_the_right_dtypes(gpu, tmp_path, config):
    run = make_run(tmp_path, config)
    dtypes = {run.policy: torch.float32, run.sampler: torch.bfloat16, run.reference: torch.bfloat16}
    for built, dtype in dtypes.items():
        assert {(p.dtype, p.device.type) for p in built.parameters()} == {(dtype, "cuda")}
        assert built.rope_frequency.is_cuda and built.rope_frequency.dtype == torch.float32
        assert (built.lm_head.weight is built.embed_tokens.weight) == config["tie_word_embeddings"]
    assert not any(p.requires_grad for p in run.reference.parameters())
    assert run.engine.cache.k.dtype == torch.bfloat16 and run.engine.slots == 5


@pytest.mark.parametrize("config, how", [
    (QWEN2, {}),
    (QWEN3, {}),
    (QWEN3, dict(stream="eval", temperature=0.6, top_p=0.95)),
    (QWEN3, dict(stream="eval", temperature=0.0)),
], ids=["qwen2", "qwen3", "nucleus", "greedy"])  # fmt: skip
def fake_sampling_refills_moves_and_replays(gpu, tmp_path, config, how):
    """18 rows through 5 slots: the rollout is whole and on the CPU, steps are recorded at several shapes."""
    run = make_run(tmp_path, config)
    check_sampling(run, **how)
    if gpu.kernels:
        flash, over_cache = run.engine.cache.flash, gpu.kernels["attend_split"].launches
        assert flash == (attention.flash_attn_with_kvcache is not None) and (over_cache > 0) == (not flash)
        assert len({context for _, context, *_ in run.engine.graphs.graphs}) == 1, "one graph for each count"
        drawn, raised = (gpu.kernels[name].launches for name in ("block_draw", "raise_floor"))
        assert (drawn > 0) == (how.get("temperature") != 0) and raised == (8 * drawn if "top_p" in how else 0)
        layers = gpu.kernels["swiglu_kernel"].launches  # run through in all; q and k have norms in Qwen3
        assert gpu.kernels["rotate_kernel"].launches == layers * (1 + (config is QWEN3)) > 0
        assert gpu.kernels["swiglu_gradient_kernel"].launches == 0


def storages(model):
    return [p.untyped_storage()._cdata for p in model.parameters()]


def fake_weights_are_refreshed_in_place(gpu, tmp_path):
    run = make_run(tmp_path, SMALL)
    before = storages(run.sampler)
    run.refresh_sampler()
    assert storages(run.sampler) == before


def check_learning(run, gpu, monkeypatch):
    seen, norms, reads, uploads = [], [], [], gpu.slow_uploads
    name = "partials_triton" if gpu.kernels else "partials"
    where = logprob_triton if gpu.kernels else kernels.logprob
    inner, clip, read = getattr(where, name), torch.nn.utils.clip_grad_norm_, packing.to_host

    def partials(hidden, *rest):
        seen.append((hidden.dtype, hidden.is_cuda))
        return inner(hidden, *rest)

    def clip_and_look(parameters, norm):
        parameters = list(parameters)
        norms.append({(p.grad.dtype, p.grad.is_cuda, p.grad.shape == p.shape) for p in parameters})
        return clip(parameters, norm)

    monkeypatch.setattr(where, name, partials)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip_and_look)
    patch_to_host(monkeypatch, lambda *numbers: reads.append(len(numbers)) or read(*numbers))
    metrics = ttrl.learn(run, made_up_rollout(run), ADVANTAGE, 1)
    assert norms == [{(torch.float32, True, True)}] * 2
    assert reads[:2] == [1] * 2 and len(reads) == 3  # the only waits: once an update, once a step
    assert gpu.slow_uploads == uploads  # nor does a copy to the device wait for the micro-batch before it
    assert {"entropy", "clip_fraction", "kl_old_new", "kl"} < metrics.keys()
    assert {"logprob_gap", "logprob_gap_max", "grad_norm"} < metrics.keys()
    # policy and reference, seven micro-batches
    assert set(seen) == {(torch.bfloat16, True)} and len(seen) == 14
    state = run.optimizer.state[run.policy.norm.weight]
    assert state and all(x.dtype == torch.float32 and x.is_cuda for x in state.values())
    assert {p.dtype for p in run.sampler.parameters()} == {torch.bfloat16}
    if gpu.kernels:
        assert gpu.kernels["partials_kernel"].launches == 14
        assert gpu.kernels["logits_to_gradient_kernel"].launches >= 7
        # 7 micro-batches: reference, policy and with checkpointing again forward, one pass backward
        layers, rotations = 7 * len(run.policy.layers), 1 + run.policy.config.qk_norm
        forward = 2 + run.policy.checkpointing
        assert gpu.kernels["swiglu_kernel"].launches == forward * layers
        assert gpu.kernels["swiglu_gradient_kernel"].launches == layers
        assert gpu.kernels["rotate_kernel"].launches == (forward + 1) * layers * rotations


@pytest.mark.parametrize("gpu, config, checkpointing", [
    (PACKAGES[0], QWEN3, True), (PACKAGES[1], QWEN2, True), (PACKAGES[2], QWEN2, True),
    (PACKAGES[3], QWEN3, False),
], indirect=["gpu"], ids=PACKAGES)  # fmt: skip
def fake_learning(gpu, tmp_path, config, checkpointing, monkeypatch):
    """Two updates: fp32 gradients and moments on the device, bf16 products, few waits for the device."""
    check_learning(make_run(tmp_path, config, checkpointing=checkpointing), gpu, monkeypatch)
    by_torch = attention.flash_attn_varlen_func is None and attention.torch_has_flash(torch.device("cuda"))
    assert (gpu.packed_calls > 0) == by_torch


@pytest.mark.parametrize("gpu", PACKAGES[:1], indirect=True)
@pytest.mark.parametrize("autocast", [False, True])
def fake_products_are_summed_where_they_belong(gpu, autocast, monkeypatch):
    """fp32 sums of bf16 products: in the one tile of logits and in the gradients, with no copy beside."""
    if not kernels.logprob.ADDMM_SUMS_IN_FP32:
        pytest.skip("this torch has no addmm that adds a product of bf16 to a sum in fp32")
    monkeypatch.setattr(kernels.logprob, "TILE", {"cuda": (64, 96)})
    hidden = torch.ones(256, 40, dtype=torch.bfloat16, device="cuda").requires_grad_()
    weight = torch.ones(288, 40, device="cuda").requires_grad_()
    logprob, _ = kernels.logprob.linear_logprob(hidden, weight, torch.ones(256, device="cuda").long())
    sizes = {"logits": 4 * 64 * 96, "hidden": 4 * 64 * 40, "weight": 4 * 96 * 40}  # unlike any other tensor's
    with contextlib.ExitStack() as stack:
        memory = {name: stack.enter_context(Held(only=size)) for name, size in sizes.items()}
        stack.enter_context(torch.autocast("cuda", torch.bfloat16, enabled=autocast))
        logprob.sum().backward()
    assert [m.peak for m in memory.values()] == [sizes["logits"], 0, 0]


@pytest.mark.parametrize("gpu", PACKAGES[:1], indirect=True)
def fake_a_step_of_the_loop(gpu, tmp_path, monkeypatch):
    """ttrl.train_step as it is: sampling, grading of what the script made up, voting, learning, metrics."""
    monkeypatch.setattr(ranks, "gather", lambda items: items)  # of one rank; torch cannot pickle in this mode
    monkeypatch.setattr(ranks, "broadcast", lambda value: value)
    run = make_run(tmp_path, SMALL)
    run.tokenizer, _ = load_tokenizer(ROOT / "tiny" / "model")
    run.train_set, run.train_prompts = load_prompts(run.config, run.tokenizer, "tiny", load("tiny"))
    longest = max(map(len, run.train_prompts)) + 40
    run.config = dataclasses.replace(run.config, rollout_tokens=5 * longest)
    run.engine = ScriptedEngine(run.sampler, 5, longest, 40, EOS)
    measured, groups, rewards = ttrl.train_step(run, 1, {})
    assert measured["updates"] == 2 and measured["kl"] == 1.0 and len(groups) == 3 == len(rewards)
    run.config = dataclasses.replace(run.config, reward="self_certainty")  # one more pass of the policy
    _, groups, rewards = ttrl.train_step(run, 2, {})
    flat = [response for group in groups for response in group.responses]
    assert all(len(response.certainty) == len(response.tokens) for response in flat)


# ----------------------------------------------------------------------------------------------------------
# the same as one of two ranks. The fake group exchanges nothing; and what lies in host memory is left out,
# since pinning it asks the CUDA driver: test_gpu.py has that


SHARDS, HEADS = {"shard": 2}, {"sampler_ranks": 2}
SPLITS = {"shards": SHARDS, "heads": HEADS, "shards and heads": SHARDS | HEADS}


@pytest.mark.parametrize("gpu", PACKAGES[:1], indirect=True)
@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("config", [QWEN2, QWEN3], ids=["qwen2", "qwen3"])
def fake_slices_have_the_right_dtypes(two_gpus, tmp_path, config, split):
    run = make_run(tmp_path, config, **split)
    for built, dtype in ((run.policy, torch.float32), (run.reference, torch.bfloat16)):
        held = list(built.parameters())
        assert {(p.dtype, p.device.type) for p in held} == {(dtype, "cuda")}
        assert all(isinstance(p, DTensor) == run.config.sharded for p in held)
        assert all(len(local(p)) == len(p) // run.config.shard for p in held)
        assert (built.lm_head.weight is built.embed_tokens.weight) == config["tie_word_embeddings"]
    heads = config["num_key_value_heads"] // run.config.sampler_ranks
    assert run.sampler.config.kv_heads == run.engine.cache.k.shape[2] == heads
    assert {(p.dtype, p.device.type) for p in run.sampler.parameters()} == {(torch.bfloat16, "cuda")}
    assert run.sampler.rope_frequency.is_cuda and run.policy.rope_frequency.dtype == torch.float32


def fake_sampling_on_two_ranks(two_gpus, tmp_path):
    """What a rank exchanges with those that have the other heads stays within the recorded step."""
    check_sampling(make_run(tmp_path, SMALL, **HEADS))


@pytest.mark.parametrize("gpu, config, split", [
    (PACKAGES[0], QWEN3, SPLITS["shards and heads"]), (PACKAGES[1], QWEN2, SPLITS["shards"]),
], indirect=["gpu"], ids=["qwen3", "qwen2"])  # fmt: skip
def fake_learning_on_two_ranks(two_gpus, tmp_path, config, split, monkeypatch):
    """Two updates and a refresh: gradients in fp32, products in bf16 without autocast, the same few waits."""
    run = make_run(tmp_path, config, **split)
    before = storages(run.sampler)
    check_learning(run, two_gpus, monkeypatch)
    assert storages(run.sampler) == before


# ----------------------------------------------------------------------------------------------------------
# the fake device itself

MIXES = "on the same device|two different devices"  # torch 2.13, and before
FORBIDDEN = {
    "a CPU index into a CUDA tensor": (lambda gpu, cpu: gpu[cpu.long()], "cuda is indexed by one on cpu"),
    "a CUDA index into a CPU tensor": (lambda gpu, cpu: cpu[gpu.long()], "cpu is indexed by one on cuda"),
    "a write at a CPU index": (lambda gpu, cpu: gpu.index_put_((cpu.long(),), gpu), "cuda is indexed by one"),
    "a sum of two devices": (lambda gpu, cpu: gpu + cpu, MIXES),
    "a copy to the CPU in place": (lambda gpu, cpu: cpu.copy_(gpu), "from the device to the host"),
    "a list": (lambda gpu, cpu: gpu.tolist(), "from the device to the host|the host reads"),
    "a branch": (lambda gpu, cpu: 1 if gpu.any() else 0, "the host reads"),
    "a comparison": (lambda gpu, cpu: torch.equal(gpu, gpu), "the host reads"),
    "places": (lambda gpu, cpu: gpu.nonzero(), "the host reads"),
    "a mask": (lambda gpu, cpu: gpu[gpu > 0], "indexing by a mask"),
}


@pytest.mark.parametrize("what", FORBIDDEN)
def fake_device_refuses(machine, what):
    action, says = FORBIDDEN[what]
    with fake.fake_cuda(), pytest.raises((AssertionError, RuntimeError), match=says):
        action(torch.ones(3, device="cuda"), torch.ones(3))


# ----------------------------------------------------------------------------------------------------------
# planted mistakes: what the tests above would not notice is not tested


ENGINE, CACHE, READS = rollout.Engine, kv_cache.KVCache, "the host reads"
STEP = "num_generated = self.num_generated[:count]"
IN_SAMPLING = {  # what is wrong: (where, function, its text, the text planted, what has to be said)
    "ends on the CPU": (ENGINE, "__init__", "self.eos_ids, device=device)", "sorted(eos_ids))", MIXES),
    "a step reads a number": (ENGINE, "step", STEP, f"{STEP}; num_generated.max().item()", READS),
    "a step asks whether any row goes on": (ENGINE, "step", STEP, f"{STEP}; assert self.alive.any()", READS),
    "a step polls":
        (ENGINE, "step", STEP, "_, num_generated = self.poll(count)", "from the device to the host"),
    "a step reads responses":
        (ENGINE, "step", STEP, f"{STEP}; self.tokens[0].cpu()", "from the device to the host"),
    "a step brings something along":
        (ENGINE, "step",
         STEP, f"{STEP} + torch.ones(count).to(self.key.device)", "from the host to the device"),
    "a step indexes by a mask": (ENGINE, "step", STEP, f"{STEP}; self.key[self.alive]", "indexing by a mask"),
    "rows move by an index on the CPU":
        (ENGINE, "compact",
         "order[target].to(self.key.device), ", "order[target], ", "cuda is indexed by one on cpu"),
    "slots are numbered on the CPU":
        (CACHE, "open_step",
         "torch.arange(len(position), device=position.device)",
         "torch.arange(len(position))", "cuda is indexed by one on cpu"),
    "the mask of keys on the CPU":
        (CACHE, "open_step",
         "torch.arange(context, device=position.device)", "torch.arange(context)", "a CPU tensor in a step"),
    "the cache in fp32":
        (CACHE, "__init__", "dtype=weight.dtype", "dtype=torch.float32", "must have the same dtype"),
    "flash-attn's lengths in int64":
        (CACHE, "open_step", "position.to(torch.int32)", "position", "lengths: int32"),
    "flash-attn's cache in SDPA's layout":
        (CACHE, "attend_cached",
         "keys.transpose(1, 2), values.transpose(1, 2)", "keys, values", "must be a multiple"),
    "the kernel's lengths in int64":
        (CACHE, "open_step", "position.to(torch.int32)", "position", "lengths: int32"),
    "prompts stay on the CPU":
        (rollout, "prefill", "model.config.windows).to(device)", "model.config.windows)", MIXES),
    "logits in bf16":
        (Transformer, "next_token_logits", "if hidden.is_cuda:", "if False:", "rounded to bf16"),
    "the sampler on the CPU":
        (run_module, "load_models",
         "folder, compute_dtype, device, group=group",
         "folder, compute_dtype, group=group", "the engine is on the CPU"),
}  # fmt: skip
IN_LEARNING = {
    "advantages on the CPU":
        (ttrl, "micro_batch_loss",
         "packing.upload(advantage[micro_batch.question, trained][:, None], device)",
         "advantage[micro_batch.question, trained][:, None]", MIXES),
    "old log-probabilities on the CPU":
        (ttrl, "micro_batch_loss",
         "packing.upload(micro_batch.logprob[:, : mask.shape[1]], device)",
         "micro_batch.logprob[:, : mask.shape[1]]", MIXES),
    "a metric is read": (metrics.Tally, "add", "entropy, 0.0).sum()", "entropy, 0.0).sum().item()", READS),
    "learning branches on a gap":
        (metrics.Tally, "add", "self.gap_max = torch", "assert gap.max(); self.gap_max = torch", READS),
    "the loss branches on a ratio":
        (ttrl, "grpo_loss", "if ref_logprob is not None:", "if (ratio > 1).any():", READS),
    "an upload waits": (packing, "upload", "non_blocking=True", "non_blocking=False", "slow_uploads"),
    "an upload from memory that is not pinned": (packing, "upload", ".pin_memory()", "", "slow_uploads"),
    "an upload of columns": (packing, "upload", ".contiguous()", "", "slow_uploads"),
    "angles in bf16":
        (model, "rope_cos_sin", "torch.cat((cos, cos), -1)", "torch.cat((cos, cos), -1).bfloat16()", "fp32"),
    "the rotation in fp32":
        (model.Attention, "forward", "cos, sin, v.dtype).split", "cos, sin, x.dtype).split",
         "torch.float32"),
    "no autocast":
        (parallel, "mixed_precision",
         "enabled=enabled", "enabled=False", "torch.float32"),
    "the policy in bf16":
        (run_module, "load_models", "folder, torch.float32, device, shard",
         "folder, compute_dtype, device, shard", "bfloat16, True, True"),
    "the sampler in fp32":
        (run_module, "load_models",
         "folder, compute_dtype, device, group=group",
         "folder, torch.float32, device, group=group", "torch.float32"),
    "the sampler on the CPU": (*IN_SAMPLING["the sampler on the CPU"][:-1], "from the device to the host"),
    "an index stays on the CPU":
        (packing.PackedBatch, "to",
         "isinstance(value, torch.Tensor)", 'isinstance(value, torch.Tensor) and name != "unpacked"', MIXES),
    "where keys lie stays on the CPU":
        (packing.AttentionGroup, "flat", "upload(self.key", "(lambda x, _: x)(self.key", MIXES),
    "where rows begin stays on the CPU":
        (packing.AttentionGroup, "flat", "upload(begins, self.device)", "begins", "lengths: int32"),
    "where rows begin in int64": (packing, "cu_seqlens", ".int()", "", "lengths: int32"),
    "groups take the device of their indices":
        (packing.PackedBatch, "to", "group.device = device", "pass", "lengths: int32"),
    "padded queries stay on the CPU":
        (packing.AttentionGroup, "padded", "upload(index, self.device) for", "index for", MIXES),
    "the learner's mask on the CPU":
        (packing.AttentionGroup, "mask",
         "device = self.device", "device = torch.device('cpu')", MIXES),
    "shared heads under a mask": (packing, "sdpa", "if q.is_cuda:", "if False:", "a mask and shared heads"),
}  # fmt: skip
ON_TWO = {
    "shards compute in fp32":
        (parallel, "shard", "param_dtype=compute_dtype", "param_dtype=torch.float32", "torch.float32"),
    "shards round cos and sin": (parallel, "shard", "cast_forward_inputs=False,", "", "in fp32"),
    "shards on the CPU":
        (parallel, "shard", 'torch.device("cpu") if offload else device', 'torch.device("cpu")', "cuda|cpu"),
    "heads are summed on the host":
        (parallel, "sum_over", "x = x.contiguous()", "x = x.cpu()", "from the device to the host"),
}  # fmt: skip
NEEDS = {  # the packages without which a mistake's code does not run; all others are tried with the first
    "the kernel's lengths in int64": PACKAGES[3],
    **dict.fromkeys(("slots are numbered on the CPU", "the mask of keys on the CPU",
                     "where keys lie stays on the CPU", "where rows begin stays on the CPU",
                     "where rows begin in int64"), PACKAGES[1]),
    **dict.fromkeys(("the learner's mask on the CPU", "padded queries stay on the CPU",
                     "shared heads under a mask"), PACKAGES[2]),
}  # fmt: skip


def with_packages(mistakes):
    tried = [(NEEDS.get(mistake, PACKAGES[0]), mistake) for mistake in mistakes]
    return pytest.mark.parametrize("gpu, mistake", tried, indirect=["gpu"])


@contextlib.contextmanager
def planted(monkeypatch, where, function, old, new, says):
    """Here the program has a mistake, which has to be seen."""
    fake.plant(monkeypatch, where, function, old, new)
    with pytest.raises((AssertionError, RuntimeError), match=says):
        yield


@with_packages(IN_SAMPLING)
def fake_mistake_in_sampling(gpu, tmp_path, monkeypatch, mistake):
    with planted(monkeypatch, *IN_SAMPLING[mistake]):
        check_sampling(make_run(tmp_path, SMALL))


@with_packages(IN_LEARNING)
def fake_mistake_in_learning(gpu, tmp_path, monkeypatch, mistake):
    with planted(monkeypatch, *IN_LEARNING[mistake]):
        check_learning(make_run(tmp_path, SMALL), gpu, monkeypatch)


@with_packages(ON_TWO)
def fake_mistake_on_two_ranks(two_gpus, tmp_path, monkeypatch, mistake):
    with planted(monkeypatch, *ON_TWO[mistake]):
        run = make_run(tmp_path, SMALL, **SHARDS, **HEADS)
        check_sampling(run)
        check_learning(run, two_gpus, monkeypatch)
