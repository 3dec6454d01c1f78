"""linear_logprob against the plain formula in float64, gradients included."""

import pytest
import torch

from kernels import logprob as module
from kernels.logprob import linear_logprob


def plain(hidden, weight, targets, temperature):
    logp = (hidden @ weight.T / temperature).log_softmax(-1)
    return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def inputs(tokens, width, vocabulary, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocabulary, width, generator=generator, dtype=torch.float64) / width**0.5 * 3
    return hidden, weight, torch.randint(vocabulary, (tokens,), generator=generator)


@pytest.mark.parametrize("chunk_bytes", [1, 1 << 30])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("tokens, width, vocabulary", [(1, 8, 11), (37, 24, 101), (64, 16, 1000), (33, 7, 3)])
def test_values_and_gradients(monkeypatch, tokens, width, vocabulary, temperature, chunk_bytes):
    monkeypatch.setattr(module, "CHUNK_BYTES", chunk_bytes)  # 1: chunks of 16 tokens
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


def test_logits_of_all_tokens_never_exist():
    """Counts the elements of every tensor made on the way: with small chunks none is as large as [T, V]."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.seen = max(self.seen, out.numel())
            return out

    hidden, weight, targets = (x.float() if x.is_floating_point() else x for x in inputs(512, 8, 400))
    h, w = hidden.requires_grad_(), weight.requires_grad_()
    module_chunk, module.CHUNK_BYTES = module.CHUNK_BYTES, 32 * 400 * 4
    try:
        with Largest() as largest:
            linear_logprob(h, w, targets)[0].sum().backward()
    finally:
        module.CHUNK_BYTES = module_chunk
    assert largest.seen <= 32 * 400
