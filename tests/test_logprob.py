"""linear_logprob against the plain formula in float64, gradients included."""

import json

import pytest
import torch
from conftest import rollout_of
from fake_memory import Held

from kernels import logprob as module
from kernels.logprob import linear_logprob, self_certainty
from model import ModelConfig, Transformer

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def plain(hidden, weight, targets, temperature):
    """The formula as it is written, with all logits at once and at least in fp32."""
    logits = (hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32))
    logp = (logits / temperature).log_softmax(-1)
    return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def results(function, dtype, hidden, weight, targets, grads, temperature):
    """[logprob, entropy, gradient of hidden, gradient of weight] of inputs in dtype, as float64.

    grads: those of logprob and entropy; None leaves that output unused.
    """
    h, w = (x.to(dtype, copy=True).requires_grad_() for x in (hidden, weight))
    outputs = function(h, w, targets, temperature)
    used = [(x, grad.to(x.dtype)) for x, grad in zip(outputs, grads, strict=True) if grad is not None]
    gradients = torch.autograd.grad([x for x, _ in used], [h, w], [grad for _, grad in used])
    assert [x.dtype for x in gradients] == [dtype] * 2
    return [x.detach().double() for x in (*outputs, *gradients)]


def exact_eager_and_ours(dtype, *given):
    """The results of the plain formula in float64 and in dtype, and of linear_logprob in dtype."""
    ways = (plain, torch.float64), (plain, dtype), (linear_logprob, dtype)
    return [results(*way, *given) for way in ways]


def assert_close(exact, eager, got, rounding=0.0):
    """Hardly further from float64 than the plain formula, by Triton no further.

    Gradients are allowed more: they rest on torch's product, which rounds otherwise than the Triton kernel's.
    rounding: of the largest logit, in units of the temperature.
    """
    of_gradients = (2e-5 if module.on_gpu(exact[0]) else 1e-5) + 2 * rounding
    more = 1.0 if module.on_gpu(exact[0]) else 1.1
    tolerances = {"logprob": 1e-6, "entropy": 1e-6, "grad_hidden": of_gradients, "grad_weight": of_gradients}
    for (name, tolerance), *values in zip(tolerances.items(), exact, eager, got, strict=True):
        scale = max(1.0, values[0].abs().max().item())
        eager_error, error = ((x - values[0]).abs().max().item() / scale for x in values[1:])
        assert error <= more * eager_error + tolerance, f"{name}: {error:.1e}, not {eager_error:.1e}"


def inputs(tokens, width, vocabulary, dtype=torch.float32):
    """Values in dtype, with targets at both ends of the vocabulary.

    The logits of the last tokens are far apart.
    """
    generator = torch.Generator().manual_seed(tokens + vocabulary)
    hidden = torch.randn(tokens, width, generator=generator) * torch.linspace(0.3, 6, tokens)[:, None]
    weight = torch.randn(vocabulary, width, generator=generator) / width**0.5
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    targets[0], targets[-1] = 0, vocabulary - 1
    return hidden.to(dtype), weight.to(dtype), targets


def gradients_of(used, tokens):
    """Gradients of logprob and entropy, None for the one that is not used."""
    grads = torch.randn(2, tokens, generator=torch.Generator().manual_seed(1))
    return [grad if used in ("both", name) else None
            for name, grad in zip(("logprob", "entropy"), grads, strict=True)]  # fmt: skip


SEVERAL_TILES, ONE_TILE = (100, 200), (1 << 20, 1 << 20)  # the last of several are smaller


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens, width, vocabulary, used, tile", [
    (1, 8, 5, "both", SEVERAL_TILES), (37, 70, 301, "both", SEVERAL_TILES), (37, 70, 301, "both", (16, 60)),
    (37, 70, 301, "logprob", SEVERAL_TILES), (37, 70, 301, "entropy", SEVERAL_TILES),
    (130, 96, 700, "both", SEVERAL_TILES), (33, 7, 3, "both", ONE_TILE),
])  # fmt: skip
def test_values_and_gradients(tokens, width, vocabulary, used, tile, dtype, monkeypatch):
    """Also of one output alone."""
    if tile == ONE_TILE and module.on_gpu(torch.empty(0)):
        pytest.skip("three logits in one tile: a case of torch's loop over tiles")
    monkeypatch.setattr(module, "TILE", {"cpu": tile})
    given = *inputs(tokens, width, vocabulary, dtype), gradients_of(used, tokens), 0.7
    assert_close(*exact_eager_and_ours(dtype, *given))


@pytest.mark.parametrize("used", ["both", "logprob"])
@pytest.mark.parametrize("far", [1, 1000])
@pytest.mark.parametrize("temperature", [0.05, 0.1, 0.2, 0.29, 0.6, 1.0, 5.0])
def test_temperatures(temperature, far, used, monkeypatch):
    """Low ones, where the logits of a block's padding are divided by little; logits up to 10^4."""
    monkeypatch.setattr(module, "TILE", {"cpu": SEVERAL_TILES})
    hidden, weight, targets = inputs(9, 24, 301)
    weight = weight * far
    given = hidden, weight, targets, gradients_of(used, 9), temperature
    largest = (hidden.double() @ weight.double().T).abs().max().item()
    assert_close(*exact_eager_and_ours(torch.float32, *given), rounding=2**-24 * largest / temperature)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_self_certainty_is_the_divergence_from_uniform(dtype, temperature):
    hidden, weight, targets = inputs(13, 8, 50, dtype)
    logprob, _ = linear_logprob(hidden, weight, targets, temperature)
    logits = hidden.double() @ weight.double().T / temperature
    uniform = torch.full_like(logits, 1 / 50)
    exact = torch.nn.functional.kl_div(logits.log_softmax(-1), uniform, reduction="none").sum(-1)
    got = self_certainty(hidden, weight, targets, logprob, temperature)
    # A CPU rounds the logits of `linear_logprob` to their dtype; a GPU does not.
    rounding = torch.finfo(dtype).eps * logits.abs().max()
    assert got.dtype == torch.float32 and (got - exact).abs().max() < 1e-6 + 2 * rounding


def test_no_memory_is_read_before_it_is_written(monkeypatch):
    """torch's deterministic mode fills new memory with NaN, and changes no bit of the results."""
    monkeypatch.setattr(module, "TILE", {"cpu": (16, 30)})
    given, runs = (*inputs(40, 8, 101), torch.ones(2, 40), 0.7), []
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        try:
            runs.append(results(linear_logprob, torch.float32, *given))
        finally:
            torch.use_deterministic_algorithms(False)
    for expected, got in zip(*runs, strict=True):
        assert torch.equal(expected, got)


def test_frozen_inputs_and_no_tokens():
    hidden, weight, targets = inputs(5, 8, 20)
    h = hidden.clone().requires_grad_()
    linear_logprob(h, weight, targets)[0].sum().backward()
    assert h.grad is not None and weight.grad is None
    w = weight.clone().requires_grad_()
    linear_logprob(hidden[:0], w, targets[:0])[0].sum().backward()
    assert w.grad.eq(0).all()


def test_far_logits_stay_finite():
    hidden, weight, targets = inputs(9, 8, 30)
    logprob, entropy = linear_logprob(hidden * 1e3, weight, targets)
    assert logprob.isfinite().all() and entropy.isfinite().all() and (entropy > -1e-3).all()


@pytest.mark.parametrize("forward, backward", [(True, True), (True, False), (False, True)])
def test_autocast_reaches_the_hidden_states_and_nothing_else(forward, backward):
    """Around the forward pass it makes the hidden states bf16; around the backward pass it does nothing."""
    hidden, weight, targets = inputs(20, 8, 50)
    runs = []
    for autocast in (False, True):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast and forward):
            given = h.bfloat16() if forward and not autocast else h
            logprob, entropy = linear_logprob(given, w, targets, 0.7)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast and backward):
            (logprob.sum() + entropy.sum()).backward()
        assert h.grad.dtype == w.grad.dtype == torch.float32
        runs.append((logprob.detach(), entropy.detach(), h.grad, w.grad))
    for expected, got in zip(*runs, strict=True):
        assert torch.equal(expected, got)


def test_only_a_tile_of_the_logits_exists_and_one_gradient_beside_the_sum(monkeypatch):
    """Three micro-batches hold at most the summed gradient, another of that size, and a few tiles."""
    monkeypatch.setattr(module, "TILE", {"cpu": (32, 100)})
    hidden, weight, targets = inputs(512, 32, 1000)
    w = weight.requires_grad_()
    with Held() as memory:
        for _ in range(3):
            h = hidden.clone().requires_grad_()
            linear_logprob(h, w, targets)[0].sum().backward()
            del h
    of_weight, of_hidden, tile, per_token = 4 * 32 * 1000, 4 * 32 * 512, 4 * 32 * 100, 4 * 512
    assert 2 * of_weight < memory.peak < 2 * of_weight + 3 * of_hidden + 4 * tile + (4 * 10 + 20) * per_token
    assert memory.peak < 4 * 512 * 1000  # one matrix of all logits


def test_a_tied_weight_has_one_gradient_beside_the_sum(random_model, tmp_path):
    """The same of the whole model: the gradients of embedding and head never stand side by side."""
    config = json.loads((random_model.source / "config.json").read_text())
    config |= {"tie_word_embeddings": True, "vocab_size": 4001}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = Transformer(ModelConfig.from_pretrained(tmp_path))
    rows = rollout_of([[5, 17, 3]], [(0, torch.arange(7)), (0, torch.arange(7) + 1)])
    with Held(only=4001 * 64 * 4) as memory:
        for _ in range(3):
            model(rows)[0].sum().backward()
    assert memory.peak == 3 * 4001 * 64 * 4  # the weight itself, and two of its size
