"""linear_logprob against the plain formula in float64, gradients included."""

import json
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import logprob as module
from kernels.logprob import linear_logprob
from model import ModelConfig, Transformer
from rollout import empty_rollout


def plain(hidden, weight, targets, temperature):
    logp = (hidden @ weight.T / temperature).log_softmax(-1)
    return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def inputs(tokens, width, vocabulary, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocabulary, width, generator=generator, dtype=torch.float64) / width**0.5 * 3
    return hidden, weight, torch.randint(vocabulary, (tokens,), generator=generator)


@pytest.mark.parametrize("tile", [(16, 10), (1 << 20, 1 << 20)])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("tokens, width, vocabulary", [(1, 8, 11), (37, 24, 101), (64, 16, 1000), (33, 7, 3)])
def test_values_and_gradients(monkeypatch, tokens, width, vocabulary, temperature, tile):
    monkeypatch.setattr(module, "TILE", {"cpu": tile})
    hidden, weight, targets = inputs(tokens, width, vocabulary)
    grads = torch.randn(2, tokens, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    results = []
    for function, dtype in ((plain, torch.float64), (linear_logprob, torch.float32)):
        h, w = (x.to(dtype, copy=True).requires_grad_() for x in (hidden, weight))
        logprob, entropy = function(h, w, targets, temperature)
        (logprob @ grads[0].to(dtype) + entropy @ grads[1].to(dtype)).backward()
        results.append([x.detach().double() for x in (logprob, entropy, h.grad, w.grad)])
    for expected, got in zip(*results, strict=True):
        assert (expected - got).abs().max() < 1e-5 * max(1.0, expected.abs().max().item())


@pytest.mark.parametrize("which", [0, 1])
def test_one_output_alone_has_the_same_gradient(which):
    hidden, weight, targets = inputs(20, 8, 50)
    grads = []
    for function, dtype in ((plain, torch.float64), (linear_logprob, torch.float32)):
        h, w = (x.to(dtype, copy=True).requires_grad_() for x in (hidden, weight))
        function(h, w, targets, 0.7)[which].sum().backward()
        grads.append((h.grad.double(), w.grad.double()))
    for expected, got in zip(*grads, strict=True):
        assert (expected - got).abs().max() < 1e-5 * max(1.0, expected.abs().max().item())


@pytest.mark.parametrize("used", ["both", "logprob"])
@pytest.mark.parametrize("far", [1, 1000])
@pytest.mark.parametrize("temperature", [0.05, 0.1, 0.29, 5.0])
def test_temperatures(monkeypatch, temperature, far, used):
    """Against float64, no further from it than the plain formula in fp32; logits up to 10^4."""
    monkeypatch.setattr(module, "TILE", {"cpu": (16, 30)})
    hidden, weight, targets = (x.float() if x.is_floating_point() else x for x in inputs(20, 24, 101))
    results = []
    for function, dtype in (
        (plain, torch.float64),
        (plain, torch.float32),
        (linear_logprob, torch.float32),
    ):
        h, w = hidden.to(dtype, copy=True), weight.to(dtype) * far
        h.requires_grad_(), w.requires_grad_()
        logprob, entropy = function(h, w, targets, temperature)
        (logprob.sum() + (entropy.sum() if used == "both" else 0)).backward()
        results.append([x.detach().double() for x in (logprob, entropy, h.grad, w.grad)])
    for exact, eager, got in zip(*results, strict=True):
        scale = max(1.0, exact.abs().max().item())
        assert (got - exact).abs().max() <= 2 * (eager - exact).abs().max() + 1e-5 * scale


def test_no_memory_is_read_before_it_is_written(monkeypatch):
    """torch's deterministic mode fills new memory with NaN, and changes no bit of the results."""
    monkeypatch.setattr(module, "TILE", {"cpu": (16, 30)})
    results = []
    for deterministic in (False, True):
        hidden, weight, targets = (x.float() if x.is_floating_point() else x for x in inputs(40, 8, 101))
        h, w = hidden.requires_grad_(), weight.requires_grad_()
        torch.use_deterministic_algorithms(deterministic)
        try:
            logprob, entropy = linear_logprob(h, w, targets, 0.7)
            (logprob.sum() + entropy.sum()).backward()
        finally:
            torch.use_deterministic_algorithms(False)
        results.append((logprob.detach(), entropy.detach(), h.grad, w.grad))
    for expected, got in zip(*results, strict=True):
        assert torch.equal(expected, got)


def test_frozen_inputs_and_no_tokens():
    hidden, weight, targets = (x.float() if x.is_floating_point() else x for x in inputs(5, 8, 20))
    h = hidden.clone().requires_grad_()
    linear_logprob(h, weight, targets)[0].sum().backward()
    assert h.grad is not None and weight.grad is None
    w = weight.clone().requires_grad_()
    linear_logprob(hidden[:0], w, targets[:0])[0].sum().backward()
    assert w.grad.eq(0).all()


def test_far_logits_stay_finite():
    hidden, weight, targets = (x.float() if x.is_floating_point() else x for x in inputs(9, 8, 30))
    logprob, entropy = linear_logprob(hidden * 1e3, weight, targets)
    assert logprob.isfinite().all() and entropy.isfinite().all() and (entropy > -1e-3).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_no_worse_than_the_plain_formula(dtype):
    """The truth is float64, on inputs that dtype holds exactly; a gradient has the dtype of its tensor."""
    hidden, weight, targets = inputs(40, 24, 200)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    results = []
    for function, precision in ((plain, torch.float64), (plain, dtype), (linear_logprob, dtype)):
        h, w = (x.to(precision, copy=True).requires_grad_() for x in (hidden, weight))
        logprob, entropy = function(h, w, targets, 0.7)
        (logprob.sum() + 0.1 * entropy.sum()).backward()
        assert h.grad.dtype == w.grad.dtype == precision
        results.append([x.detach().double() for x in (logprob, entropy, h.grad, w.grad)])
    for exact, eager, got in zip(*results, strict=True):
        assert (got - exact).abs().max() <= (eager - exact).abs().max() * 1.1


@pytest.mark.parametrize("forward, backward", [(True, True), (True, False), (False, True)])
def test_autocast_reaches_the_hidden_states_and_nothing_else(forward, backward):
    """Around the forward pass it makes the hidden states bf16; around the backward pass it does nothing."""
    hidden, weight, targets = (x.float() if x.is_floating_point() else x for x in inputs(20, 8, 50))
    results = []
    for autocast in (False, True):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast and forward):
            logprob, entropy = linear_logprob(
                h.bfloat16() if forward and not autocast else h, w, targets, 0.7
            )
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast and backward):
            (logprob.sum() + entropy.sum()).backward()
        assert h.grad.dtype == w.grad.dtype == torch.float32
        results.append((logprob.detach(), entropy.detach(), h.grad, w.grad))
    for expected, got in zip(*results, strict=True):
        assert torch.equal(expected, got)


class LiveBytes(TorchDispatchMode):
    """The peak of the bytes of tensors that operators return while this is active, each storage once.

    only: count the storages of just so many bytes.
    """

    def __init__(self, only=None):
        super().__init__()
        self.only, self.live, self.peak, self.seen = only, 0, 0, weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        storage = (
            out.untyped_storage() if isinstance(out, torch.Tensor) and out.layout == torch.strided else None
        )
        if storage is not None and storage not in self.seen and self.only in (None, storage.nbytes()):
            self.seen.add(storage)
            weakref.finalize(storage, self.free, storage.nbytes())
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
        return out

    def free(self, size):
        self.live -= size


def test_only_a_tile_of_the_logits_exists_and_one_gradient_beside_the_sum(monkeypatch):
    """Three micro-batches hold at most the summed gradient, another of that size, and a few tiles."""
    monkeypatch.setattr(module, "TILE", {"cpu": (32, 100)})
    hidden, weight, targets = (x.float() if x.is_floating_point() else x for x in inputs(512, 32, 1000))
    w = weight.requires_grad_()
    with LiveBytes() as memory:
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
    (tmp_path / "config.json").write_text(
        json.dumps({**config, "tie_word_embeddings": True, "vocab_size": 4001})
    )
    model = Transformer(ModelConfig.from_pretrained(tmp_path))
    rows = empty_rollout([[5, 17, 3]], [(0, 0), (0, 1)], 8)
    for row in range(2):
        rows.fill(row, torch.arange(7) + row, torch.zeros(7), [1])
    with LiveBytes(only=4001 * 64 * 4) as memory:
        # not the weight itself, only what is made beside it
        memory.seen.add(model.lm_head.weight.untyped_storage())
        for _ in range(3):
            model(rows)[0].sum().backward()
    assert memory.peak == 2 * 4001 * 64 * 4
