"""Run by test_kernels.py with TRITON_INTERPRET=1: the kernels against float64, and against their torch twins.

A kernel may be no further from float64 than the plain formula in the same low precision, plus a tolerance.
"""

from functools import partial
from unittest import mock

import numpy as np
import pytest
import torch
import triton
from test_flash_attention import attended_exactly, check_decoding, small_model
from test_logprob import DTYPES, inputs, plain, test_temperatures, test_values_and_gradients  # noqa: F401
from test_sampler import check_sampled, nucleus_by_sort, some_logits
from triton import language as tl
from triton.runtime import interpreter

from kernels import attention_triton, fused, kv_cache, logprob, logprob_triton, sampler, sampler_triton
from rollout import generate

Builder = interpreter.InterpreterBuilder

# -----------------------------------------------------------------------------------------------------------
# triton's interpreter (3.7.1 and 3.9.0) holds bf16 as bits in uint16, and multiplies those as integers


def is_bf16(x):
    return x.dtype.scalar == tl.bfloat16


def widened(x):
    if not is_bf16(x):
        return x
    bits = np.ascontiguousarray(x.data).astype(np.uint32) << 16
    return interpreter.TensorHandle(bits.view(np.float32), tl.float32)


def mended():
    """The patches: bf16 is widened before a product, and a cast to it rounds to nearest even.

    Other arithmetic on bf16 fails.
    """
    cast, dot, binary = Builder.cast_impl, Builder.create_dot, Builder.binary_op

    def cast_impl(self, x, dtype):
        if dtype.scalar != tl.bfloat16:
            return widened(x) if dtype.scalar == tl.float32 and is_bf16(x) else cast(self, widened(x), dtype)
        rounded = torch.from_numpy(np.ascontiguousarray(widened(x).data, dtype=np.float32)).bfloat16()
        return interpreter.TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)

    def create_dot(self, a, b, *rest):
        return dot(self, widened(a), widened(b), *rest)

    def binary_op(self, a, b, op):
        assert not is_bf16(a) and not is_bf16(b), "arithmetic in bf16: convert to fp32 first"
        return binary(self, a, b, op)

    def create_fp_to_fp(self, x, dtype, rounding):
        return self.cast_impl(x, dtype)

    return {f.__name__: f for f in (cast_impl, create_dot, binary_op, create_fp_to_fp)}


STOCK = {name: getattr(Builder, name) for name in mended()}


def patch_lang_tensor(tensor, *scope, stock=interpreter._patch_lang_tensor):
    """Before Triton 3.7 the bound of a loop is an array of one number, which NumPy 2.5 takes for no index."""
    stock(tensor, *scope)
    tensor.__index__ = lambda self: int(self.handle.data.item())


interpreter._patch_lang_tensor = patch_lang_tensor  # for good: the hints of the exercises run kernels too


@triton.jit
def product(a, b, out, rounded, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)
    c = tl.dot(tl.load(a + at), tl.trans(tl.load(b + at)))
    tl.store(out + at, c)
    tl.store(rounded + at, c)


@pytest.mark.parametrize("patches", [STOCK, mended()], ids=["stock", "mended"])
def test_bf16_in_the_interpreter_is_wrong_unless_mended(patches):
    """If the stock one is right, Triton has been mended: delete `mended` and this test."""
    a, b = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    out, rounded = torch.empty(16, 16), torch.empty(16, 16, dtype=torch.bfloat16)
    with mock.patch.multiple(Builder, **patches):
        product[(1,)](a, b, out, rounded, N=16)
    right = torch.allclose(out, a.float() @ b.float().T, atol=1e-5) and torch.equal(rounded, out.bfloat16())
    assert right == (patches is not STOCK)


@pytest.fixture(autouse=True)
def on_gpu(monkeypatch):
    """Take the Triton path on CPU tensors."""
    for name, patch in mended().items():
        monkeypatch.setattr(Builder, name, patch)
    monkeypatch.setattr(logprob, "on_gpu", lambda x: True)
    monkeypatch.setattr(fused, "on_gpu", lambda x: True)
    monkeypatch.setattr(logprob_triton, "programs_wanted", lambda device: 3)
    # what torch.mm(out_dtype=) does on a GPU
    monkeypatch.setattr(logprob, "product", lambda a, b: a.float() @ b.float())


# ----------------------------------------------------------------------------------------------------------
# linear_logprob: test_values_and_gradients and test_temperatures of test_logprob.py, and its kernels


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens, width, vocabulary, programs", [
    (1, 8, 5, 1), (5, 24, 333, 1), (37, 70, 301, 3), (70, 24, 333, 1000),
])  # fmt: skip
def test_partial_results_by_the_plain_formula(tokens, width, vocabulary, programs, dtype, monkeypatch):
    """The pieces of the vocabulary put together in float64: log-probability, entropy, the largest logit."""
    monkeypatch.setattr(logprob_triton, "programs_wanted", lambda device: programs)
    hidden, weight, targets = inputs(tokens, width, vocabulary, dtype)
    pieces = logprob_triton.partials_triton(hidden, weight, targets, 0.7)
    max_logit, sum_exp, sum_exp_c, target = pieces.double()  # [pieces, T] each
    exact = hidden.double(), weight.double()
    assert (max_logit.amax(0) - (exact[0] @ exact[1].T).amax(1)).abs().max() < 1e-5
    lse = (max_logit / 0.7 + sum_exp.log()).logsumexp(0)
    scale = (max_logit / 0.7 - lse).exp()  # what a piece's exponentials are worth in all
    entropy = -(scale * (sum_exp_c + (max_logit / 0.7 - lse) * sum_exp)).sum(0)
    got = target.sum(0) / 0.7 - lse, entropy
    for expected, x in zip(plain(*exact, targets, 0.7), got, strict=True):
        assert (x - expected).abs().max() < 1e-5


@pytest.mark.parametrize("programs", [1, 1000])
def test_however_the_vocabulary_is_split(programs, monkeypatch):
    monkeypatch.setattr(logprob_triton, "programs_wanted", lambda device: programs)
    hidden, weight, targets = inputs(5, 24, 333)
    pieces, again = (logprob_triton.partials_triton(hidden, weight, targets, 0.7) for _ in range(2))
    assert pieces.shape[1] == (1 if programs == 1 else 6) and torch.equal(pieces, again)
    _, _, *got = logprob.merge(*pieces, 0.7)
    for expected, x in zip(plain(hidden.double(), weight.double(), targets, 0.7), got, strict=True):
        assert (x - expected).abs().max() < 5e-6


def test_gradient_is_written_over_the_logits():
    z, targets = torch.randn(3, 50), torch.tensor([7, 8, 60])
    rest = 7, targets, *torch.rand(5, 3), 0.7, torch.float32
    assert logprob_triton.logits_to_gradient_triton(z, *rest) is z


def test_an_entropy_without_gradient_is_not_read():
    z, per_token, targets = torch.randn(3, 50), torch.rand(4, 3), torch.tensor([7, 8, 60])
    per_token[2] = torch.nan
    rest = 7, targets, *per_token, None, 0.7, torch.bfloat16
    got, expected = (
        f(z.clone(), *rest) for f in (logprob_triton.logits_to_gradient_triton, logprob.logits_to_gradient)
    )
    assert (got - expected).abs().max() < 0.02


# ----------------------------------------------------------------------------------------------------------
# the sampler


@triton.jit
def uniforms(key, position, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, sampler_triton.uniform_of(tl.load(key + at), tl.load(position + at)))


def test_random_numbers_are_those_of_torch():
    key = torch.randint(-(2**63), 2**63 - 1, (256,), generator=torch.Generator().manual_seed(0))
    position, out = torch.arange(256) ** 3, torch.empty(256)
    uniforms[(1,)](key, position, out, N=256)
    assert torch.equal(out, sampler.uniform(key, position))


@triton.jit
def picks(mass, target, place, rest, N: tl.constexpr):
    row, index = tl.program_id(0), tl.arange(0, N)
    p, r = sampler_triton.first_above(tl.load(mass + row * N + index), tl.load(target + row), index)
    tl.store(place + row, p.to(tl.int64))
    tl.store(rest + row, r)


def test_a_place_without_mass_is_never_picked():
    """Targets below 0 and below the first mass, on an edge, and at and above the total."""
    target = torch.tensor([-0.5, 0.0, 0.5, 1.0, 2.5, 3.0, 3.5])
    mass = torch.tensor([0.0, 0, 1, 0, 2, 0, 0, 0]).repeat(7, 1)
    place, rest = torch.empty(7, dtype=torch.int64), torch.empty(7)
    picks[(7,)](mass, target, place, rest, N=8)
    for got_place, got_rest in ((place, rest), sampler.inverse_cdf(mass, target)):
        assert got_place.tolist() == [2, 2, 2, 4, 4, 4, 4]
        assert got_rest.tolist() == [-0.5, 0, 0.5, 0, 1.5, 2, 2.5]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary, temperature, masked", [
    (1, 1.0, 0), (7, 0.6, 3), (1024, 1.0, 0), (2503, 0.6, 2), (2503, 1.3, 0),
])  # fmt: skip
def test_draws_are_those_of_torch(vocabulary, temperature, masked, dtype):
    """Where the numbers fall further than 1e-5 from an edge of the float64 CDF, as most do."""
    rows, generator = 30, torch.Generator().manual_seed(vocabulary)
    logits = (4 * torch.randn(rows, vocabulary, generator=generator)).to(dtype)
    if masked:
        logits[:, ::masked] = -torch.inf
        logits[:, : 3 * vocabulary // 4] = -torch.inf  # whole blocks
    logits[0, -1] = 50  # the last token, all but surely
    key, position = torch.randint(2**62, (rows,), generator=generator), torch.arange(rows)
    token, logp = sampler_triton.sample_tokens_triton(logits, key, position, temperature)
    expected, expected_logp = sampler.sample_tokens(logits, key, position, temperature)
    exact = (logits.double() / temperature).log_softmax(-1)
    clear = (exact.exp().cumsum(-1) - sampler.uniform(key, position)[:, None]).abs().amin(-1) > 1e-5
    assert clear.float().mean() > 0.5 or vocabulary == 1
    assert torch.equal(token[clear], expected[clear])
    for got_token, got in ((token, logp), (expected, expected_logp)):
        of_token = exact.gather(1, got_token[:, None])[:, 0]
        assert of_token.isfinite().all() and (got - of_token).abs().max() < 3e-6


def test_draw_never_leaves_the_vocabulary():
    """A number at the very top of its range, and logits that are no numbers."""
    key = position = torch.zeros(2, dtype=torch.int64)
    logits = torch.full((2, 1500), -torch.inf)
    logits[0, 3], logits[1] = 0.0, torch.nan
    token, logp = sampler_triton.sample_tokens_triton(logits, key, position, 1.0)
    assert token[0] == 3 and logp[0] == 0 and 0 <= token[1] < 1500 and logp[1].isnan()


# ----------------------------------------------------------------------------------------------------------
# attention of decoding


def cached_rows(heads, kv_heads, width, lengths, capacity, dtype):
    """What attention is given: heads of one product, as model.Attention cuts them, and a cache with NaN where
    nothing has been written yet."""
    generator = torch.Generator().manual_seed(width + heads)
    qkv = torch.randn(len(lengths), heads + 2 * kv_heads, width, generator=generator).to(dtype)
    q, k, v = qkv.split((heads, kv_heads, kv_heads), 1)
    cache = torch.randn(2, 2, len(lengths) + 1, kv_heads, capacity, width, generator=generator).to(dtype)
    for row, filled in enumerate(lengths):
        cache[:, :, row, :, filled:] = torch.nan
    keys, values = cache[0, 1, : len(lengths)], cache[1, 1, : len(lengths)]  # a layer's, without spare slots
    return 2 * q, k, v, keys, values, torch.tensor(lengths, dtype=torch.int32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, kv_heads, width, lengths, capacity, window, splits", [
    (1, 1, 16, [0], 1, None, 1),  # nothing but the new token
    (6, 1, 128, [0, 1, 64, 99], 100, None, 2),  # a full cache, a whole block, an empty second split
    (8, 1, 64, [130, 5], 140, None, 4),
    (4, 2, 80, [70, 33], 96, 1, 2),  # sees the new token alone
    (4, 2, 96, [70, 33], 96, 17, 2),
    (8, 8, 128, [150, 149], 151, 66, 1),
    (28, 4, 128, [90], 200, 200, 8),
])  # fmt: skip
def test_attention_over_a_cache(
    heads, kv_heads, width, lengths, capacity, window, splits, dtype, monkeypatch
):
    """Against float64 it errs no more than its own rounding, stores one token a row and touches no other."""
    monkeypatch.setattr(attention_triton, "splits_wanted", lambda *_: splits)
    q, k, v, keys, values, length = cached_rows(heads, kv_heads, width, lengths, capacity, dtype)
    exact = attended_exactly(q, k, v, keys, values, length, window)
    before = keys.clone(), values.clone()
    out = attention_triton.attend_cached_triton(q, k, v, keys, values, length, window)
    assert out.dtype == dtype and out.shape == q.shape
    # the weights of values are rounded to dtype, and so is the result
    tolerance = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    assert (out.double() - exact).abs().max() < tolerance
    for row, filled in enumerate(lengths):
        before[0][row, :, filled], before[1][row, :, filled] = k[row], v[row]
    assert all(a.equal(b) or torch.equal(a.nan_to_num(9), b.nan_to_num(9))
               for a, b in zip(before, (keys, values), strict=True))  # fmt: skip


def test_rows_are_split_until_the_gpu_is_busy(monkeypatch):
    h100 = mock.Mock(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: h100)
    of = {rows: attention_triton.splits_wanted("cuda", 2 * rows, 4096) for rows in (1, 16, 64, 335, 4096)}
    assert of == {1: 64, 16: 64, 64: 16, 335: 2, 4096: 1}
    assert attention_triton.splits_wanted("cuda", 2, 40) == 1  # a short cache


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_decoding_in_the_model(dtype, monkeypatch):
    monkeypatch.setattr(attention_triton, "splits_wanted", lambda *_: 2)
    check_decoding(monkeypatch, dtype, package=None, triton=True)


@torch.no_grad()
def test_rollouts_are_those_of_plain_attention(monkeypatch):
    """The engine with the kernel in each layer, rows that move and are refilled included."""
    monkeypatch.setattr(attention_triton, "splits_wanted", lambda *_: 2)
    whole = small_model(torch.float32, windows=(None, 9))
    rollouts = []
    for in_triton in (False, True):
        monkeypatch.setattr(kv_cache, "triton_available", lambda x, answer=in_triton: answer)
        how = dict(max_new_tokens=12, eos_ids=range(12), seed=1, stream="train", step=1, budget_tokens=4 * 17)
        rollouts.append(generate(whole, [[5, 17, 3], [7, 7, 9, 60, 2]], 3, **how))
    a, b = rollouts
    assert a.tokens.equal(b.tokens) and (a.logprob - b.logprob).abs().max() < 1e-5
    assert a.response_length.unique().numel() > 2


# ----------------------------------------------------------------------------------------------------------
# rotation and SwiGLU: computed in fp32, so only the last rounding tells them from float64


def assert_rounded_once(exact, got):
    """`got` is float64's number, rounded to its own dtype, up to 1e-6 that fp32 may have lost before."""
    half_a_place = torch.finfo(got.dtype).eps / 2 * exact.abs()
    assert ((got.double() - exact).abs() <= half_a_place + 1e-6 * (1 + exact.abs())).all()


def both_ways(function, x, grad):
    x = x.detach().requires_grad_()
    out = function(x)
    return out, torch.autograd.grad(out, x, grad.to(out.dtype), retain_graph=True)[0]


def check_against_float64(function, plain, x, grad):
    """function(x) and its gradient against `plain` in float64; x and grad hold what the dtypes hold."""
    out, x_grad = both_ways(function, x, grad)
    for exact, got in zip(both_ways(plain, x.double(), grad.to(out.dtype)), (out, x_grad), strict=True):
        assert_rounded_once(exact.detach(), got.detach())
    assert x_grad.dtype == x.dtype
    return out


def angles(tokens, width):
    """cos and signed sin, [T, 1, E] each, in fp32; positions far apart."""
    angle = torch.arange(tokens)[:, None, None] * 37.0 * 10.0 ** -torch.linspace(0, 4, width // 2)
    return torch.cat((angle.cos(), angle.cos()), -1), torch.cat((-angle.sin(), angle.sin()), -1)


def plain_rotation(x, cos, signed_sin):
    half = x.shape[-1] // 2
    a, b, cos, sin = *x.split(half, -1), cos[..., :half].double(), signed_sin[..., half:].double()
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


NORMED = (torch.float32, torch.bfloat16)  # Qwen3's norms under autocast: fp32 in, bf16 out


@pytest.mark.parametrize("dtype, to", [*zip(DTYPES, DTYPES, strict=True), NORMED])
@pytest.mark.parametrize("width", [4, 64, 80, 96, 128])
@pytest.mark.parametrize("tokens, heads", [(1, 1), (7, 14), (5, 33)])
def test_rotation(tokens, heads, width, dtype, to):
    """The heads of q and k as the model gives them: a part of the product that also holds v."""
    generator = torch.Generator().manual_seed(width)
    qkv = torch.randn(tokens, heads + 2, width, generator=generator).to(dtype)
    x, grad = qkv[:, :heads], torch.randn(tokens, heads, width, generator=generator)
    cos_sin = angles(tokens, width)
    plain = partial(plain_rotation, cos=cos_sin[0], signed_sin=cos_sin[1])
    out = check_against_float64(lambda x: fused.rotate(x, *cos_sin, to), plain, x, grad.to(to))
    assert out.dtype == to and out.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens, width", [(1, 5), (3, 96), (7, 1024), (3, 2500)])
def test_swiglu(tokens, width, dtype):
    """Also where a gate is far from 0: silu is then 0 or the gate, with the slope 0 or 1."""
    generator = torch.Generator().manual_seed(width)
    gate_up = 3 * torch.randn(tokens, 2 * width, generator=generator)
    gate_up[:, 0], gate_up[:, 1] = -200, 200
    grad = torch.randn(tokens, width, generator=generator).to(dtype)

    def plain(gate_up):
        gate, up = gate_up.chunk(2, -1)
        return torch.nn.functional.silu(gate) * up

    out = check_against_float64(fused.swiglu, plain, gate_up.to(dtype), grad)
    saved = out.grad_fn.saved_tensors
    assert [x.shape for x in saved] == [gate_up.shape], "only the product is kept for the backward pass"


def test_gradients_and_products_of_any_strides():
    """The gradient of a sum is one number, expanded; a product may be stored by column or part of another."""
    rotate = partial(fused.rotate, cos=angles(5, 8)[0], signed_sin=angles(5, 8)[1], dtype=torch.float32)
    inputs = torch.randn(5, 4, 8), torch.randn(20, 5).T, torch.randn(5, 30)[:, 4:24]
    for function, x in zip((rotate, fused.swiglu, fused.swiglu), inputs, strict=True):
        grad = torch.randn(function(x).shape)
        padded, by_column = torch.nn.functional.pad(grad, (2, 1))[..., 2:-1], grad.mT.contiguous().mT
        for some in (padded, by_column, torch.ones(()).expand_as(grad)):
            expected = both_ways(function, x.contiguous(), some.contiguous())
            for got, wanted in zip(both_ways(function, x, some), expected, strict=True):
                assert torch.equal(got, wanted)


@triton.jit
def numbers(ordinal, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, sampler_triton.number_of(tl.load(ordinal + at)))


def number_of(ordinal):
    out = torch.empty(len(ordinal))
    numbers[(1,)](ordinal, out, N=len(ordinal))
    return out


def test_ordinals_are_in_the_order_of_the_numbers():
    expected = torch.tensor([-torch.inf, -3e38, -1.0, -1e-40, -0.0, 0.0, 1e-40, 1.0, 3e38, torch.inf])
    bits = expected.view(torch.int32)
    ordinal = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    assert (ordinal.diff() > 0).all()
    ends = torch.tensor([-(2**31), 2**31 - 1], dtype=torch.int32)
    got = number_of(torch.nn.functional.pad(torch.cat((ordinal, ends)), (0, 4)))
    assert got[:10].view(torch.int32).equal(bits) and got[10:12].isnan().all()


@pytest.fixture
def floors(monkeypatch):
    """The floors that the kernels found, as logits, one tensor a call."""
    found, find = [], sampler_triton.nucleus_floor_triton

    def recorded(*args):
        found.append(find(*args))
        return found[-1]

    monkeypatch.setattr(sampler_triton, "nucleus_floor_triton", recorded)
    return found


@pytest.mark.parametrize("vocabulary, temperature, top_p, spread, dtype", [
    (1, 1.0, 0.5, 1.0, torch.float32), (5, 0.6, 0.95, 1.0, torch.float16),
    (300, 5.0, 0.8, 5.0, torch.float32), (300, 0.6, 0.95, 0.0, torch.float32),
    (700, 1.0, 1e-5, 1.0, torch.float32), (700, 0.05, 0.9999, 5.0, torch.bfloat16),
    (2503, 1.0, 0.95, 5.0, torch.float32), (2503, 0.6, 0.95, 1.0, torch.bfloat16),
    (2503, 5.0, 0.9999, 1.0, torch.float32),
])  # fmt: skip
def test_top_p_is_that_of_sorting(vocabulary, temperature, top_p, spread, dtype, floors):
    """Token, log-probability and the least likely token kept, against float64."""
    key = position = torch.arange(4)
    logits = some_logits(4, vocabulary, spread)[0].to(dtype)
    logits[:3, 1024:] = -3 * spread  # blocks below the floor, which are soon left out
    sampled = sampler_triton.sample_tokens_triton(logits, key, position, temperature, top_p)
    sure = check_sampled(logits, sampler.uniform(key, position), temperature, top_p, *sampled)
    kept = nucleus_by_sort(logits, temperature, top_p)[0] > 0
    least = logits.float().masked_fill(~kept, torch.inf).amin(-1)
    assert sure.any() and number_of(floors[0])[sure].equal(least[sure])


def test_top_p_of_logits_that_are_no_numbers():
    """NaN in one row, and a row with one token: the others are sampled as they are alone."""
    key = position = torch.zeros(3, dtype=torch.int64)
    logits = torch.randn(3, 1500, generator=torch.Generator().manual_seed(0))
    logits[0, 1200], logits[1], logits[1, 3] = torch.nan, -torch.inf, -7.0
    token, logp = sampler_triton.sample_tokens_triton(logits, key, position, 1.0, 0.9)
    alone = sampler_triton.sample_tokens_triton(logits[2:], key[2:], position[2:], 1.0, 0.9)
    assert 0 <= token[0] < 1500 and logp[0].isnan() and token[1] == 3 and logp[1] == 0
    assert token[2] == alone[0] and logp[2] == alone[1]
