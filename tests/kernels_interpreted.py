"""Run by test_kernels.py with TRITON_INTERPRET=1: the kernels against float64, and against their torch twins.

A kernel may be no further from float64 than the plain formula in the same low precision, plus a tolerance.
"""

from unittest import mock

import numpy as np
import pytest
import torch
import triton
from triton import language as tl
from triton.runtime import interpreter

from kernels import logprob, logprob_triton, sampler, sampler_triton

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
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
            return (
                cast(self, widened(x), dtype) if dtype.scalar != tl.float32 or not is_bf16(x) else widened(x)
            )
        rounded = torch.from_numpy(np.ascontiguousarray(widened(x).data, dtype=np.float32)).bfloat16()
        return interpreter.TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)

    def create_dot(self, a, b, *rest):
        return dot(self, widened(a), widened(b), *rest)

    def binary_op(self, a, b, op):
        assert not is_bf16(a) and not is_bf16(b), "arithmetic in bf16: convert to fp32 first"
        return binary(self, a, b, op)

    def create_fp_to_fp(self, x, dtype, rounding):
        return self.cast_impl(x, dtype)

    return dict(
        cast_impl=cast_impl, create_dot=create_dot, binary_op=binary_op, create_fp_to_fp=create_fp_to_fp
    )


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
    monkeypatch.setattr(logprob_triton, "programs_wanted", lambda device: 3)
    # what torch.mm(out_dtype=) does on a GPU
    monkeypatch.setattr(logprob, "product", lambda a, b: a.float() @ b.float())


# ----------------------------------------------------------------------------------------------------------
# linear_logprob


def plain(hidden, weight, targets, temperature):
    logp = (
        (hidden @ weight.T)
        .to(max(hidden.dtype, torch.float32, key=lambda d: d.itemsize))
        .div(temperature)
        .log_softmax(-1)
    )
    return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def results(function, hidden, weight, targets, temperature, grads, dtype):
    """[logprob, entropy, gradient of hidden, gradient of weight] in float64.

    An output whose entry in grads is None stays unused.
    """
    hidden, weight = (x.to(dtype, copy=True).requires_grad_() for x in (hidden, weight))
    outputs = function(hidden, weight, targets, temperature)
    sum((x * g.to(x.dtype)).sum() for x, g in zip(outputs, grads, strict=True) if g is not None).backward()
    return [x.detach().double() for x in (*outputs, hidden.grad, weight.grad)]


def inputs(tokens, width, vocabulary, dtype):
    """Values that dtype holds exactly, with targets at both ends of the vocabulary.

    The logits of the last tokens are far apart.
    """
    generator = torch.Generator().manual_seed(tokens + vocabulary)
    hidden = torch.randn(tokens, width, generator=generator) * torch.linspace(0.3, 6, tokens)[:, None]
    weight = torch.randn(vocabulary, width, generator=generator) / width**0.5
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    targets[0], targets[-1] = 0, vocabulary - 1
    grads = torch.randn(2, tokens, generator=generator)
    return hidden.to(dtype).double(), weight.to(dtype).double(), targets, grads


def assert_close(exact, eager, got):
    """Gradients are allowed more: they rest on torch's product, which rounds otherwise than the kernel's."""
    tolerances = {"logprob": 1e-6, "entropy": 1e-6, "grad_hidden": 2e-5, "grad_weight": 2e-5}
    for (name, tolerance), *values in zip(tolerances.items(), exact, eager, got, strict=True):
        scale = max(1.0, values[0].abs().max().item())
        eager_error, error = ((x - values[0]).abs().max().item() / scale for x in values[1:])
        assert error <= eager_error + tolerance, (
            f"{name}: {error:.1e} from float64, the plain formula {eager_error:.1e}"
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens, width, vocabulary, used", [
    (1, 8, 5, "both"), (37, 70, 301, "both"), (37, 70, 301, "logprob"), (37, 70, 301, "entropy"),
    (130, 96, 700, "both"),
])  # fmt: skip
def test_values_and_gradients(tokens, width, vocabulary, used, dtype, monkeypatch):
    # several tiles of the backward pass, the last ones smaller
    monkeypatch.setattr(logprob, "TILE", {"cpu": (100, 200)})
    hidden, weight, targets, grads = inputs(tokens, width, vocabulary, dtype)
    grads = [
        g if used in ("both", name) else None for name, g in zip(("logprob", "entropy"), grads, strict=True)
    ]
    exact, eager, got = (
        results(function, hidden, weight, targets, 0.7, grads, precision)
        for function, precision in ((plain, torch.float64), (plain, dtype), (logprob.linear_logprob, dtype))
    )
    assert_close(exact, eager, got)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens, width, vocabulary, programs", [
    (1, 8, 5, 1), (5, 24, 333, 1), (37, 70, 301, 3), (70, 24, 333, 1000),
])  # fmt: skip
def test_partial_results_by_the_plain_formula(tokens, width, vocabulary, programs, dtype, monkeypatch):
    """The pieces of the vocabulary put together in float64: log-probability, entropy, the largest logit."""
    monkeypatch.setattr(logprob_triton, "programs_wanted", lambda device: programs)
    hidden, weight, targets, _ = inputs(tokens, width, vocabulary, dtype)
    pieces = logprob_triton.partials_triton(hidden.to(dtype), weight.to(dtype), targets, 0.7)
    max_logit, sum_exp, sum_exp_c, target = pieces.double()  # [pieces, T] each
    logits = hidden @ weight.T
    assert (max_logit.amax(0) - logits.amax(1)).abs().max() < 1e-5
    lse = (max_logit / 0.7 + sum_exp.log()).logsumexp(0)
    scale = (max_logit / 0.7 - lse).exp()  # what a piece's exponentials are worth in all
    entropy = -(scale * (sum_exp_c + (max_logit / 0.7 - lse) * sum_exp)).sum(0)
    got = target.sum(0) / 0.7 - lse, entropy
    for expected, x in zip(plain(hidden, weight, targets, 0.7), got, strict=True):
        assert (x - expected).abs().max() < 1e-5


@pytest.mark.parametrize("programs", [1, 1000])
def test_however_the_vocabulary_is_split(programs, monkeypatch):
    monkeypatch.setattr(logprob_triton, "programs_wanted", lambda device: programs)
    hidden, weight, targets, _ = inputs(5, 24, 333, torch.float32)
    pieces = logprob_triton.partials_triton(hidden.float(), weight.float(), targets, 0.7)
    again = logprob_triton.partials_triton(hidden.float(), weight.float(), targets, 0.7)
    assert pieces.shape[1] == (1 if programs == 1 else 6) and torch.equal(pieces, again)
    _, _, *got = logprob.merge(*pieces, 0.7)
    for expected, x in zip(plain(hidden, weight, targets, 0.7), got, strict=True):
        assert (x - expected).abs().max() < 5e-6


def test_gradient_is_written_over_the_logits():
    z, per_token = torch.randn(3, 50), torch.rand(5, 3)
    out = logprob_triton.logits_to_gradient_triton(
        z, 7, torch.tensor([7, 8, 60]), *per_token, 0.7, torch.float32
    )
    assert out is z


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
    """Targets below the first mass, on an edge, and at and above the total."""
    target, mass = (
        torch.tensor([0.0, 0.5, 1.0, 2.5, 3.0, 3.5]),
        torch.tensor([0.0, 0, 1, 0, 2, 0, 0, 0]).repeat(6, 1),
    )
    place, rest = torch.empty(6, dtype=torch.int64), torch.empty(6)
    picks[(6,)](mass, target, place, rest, N=8)
    for got_place, got_rest in ((place, rest), sampler.inverse_cdf(mass, target)):
        assert got_place.tolist() == [2, 2, 4, 4, 4, 4] and got_rest.tolist() == [0, 0.5, 0, 1.5, 2, 2.5]


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
