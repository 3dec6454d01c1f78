"""Packed rows: forward and gradients against transformers, row by row; attention against its plain form."""

from types import SimpleNamespace

import flash_attention
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from parity import FIXED, NOTICED, TOLERANCE, both, configs, draw_tokens, examples
from test_flash_attention import PACKAGES, use_flash

import model
from kernels import attention
from kernels.kv_cache import KVCache
from kernels.packing import AttentionGroup, pack_responses
from rollout import Rollout
from support.pretrained import hf_tensors

SHAPE = ([5, 9], [(1, 6), (0, 1), (1, 3), (0, 8)])  # prompt lengths; (question, response length) of each row


def plain_attention(q, k, v, window):
    """Causal attention of one row, no packing, padding or fused kernel: q [T, H, E], k and v [T, K, E]."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = torch.einsum("qhe,khe->hqk", q, k) / q.shape[-1] ** 0.5
    distance = torch.arange(len(q))[:, None] - torch.arange(len(q))
    seen = (distance >= 0) & (distance < (window or len(q)))
    return torch.einsum("hqk,khe->qhe", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("window", [None, 1, 3])
def test_packed_attention_equals_each_row_alone(window):
    """Values and gradients: two prompts of 5 and 9 tokens, then the responses without their last tokens."""
    rows = make_rollout(FIXED, *SHAPE, 0)
    batch = pack_responses(rows, (window,))
    prompts, first, alone = [range(5), range(5, 14)], 14, []
    for question, length in SHAPE[1]:
        alone.append([*prompts[question], *range(first, first + length - 1)])
        first += length - 1
    q, k, v = (torch.randn(first, heads, 8, requires_grad=True) for heads in (4, 2, 2))
    packed = batch.attend_packed(0, q, k, v)
    plain = torch.zeros_like(packed)
    for row in alone:  # a prompt several times, always with the same result
        plain[row] = plain_attention(q[row], k[row], v[row], window)
    assert first == len(batch.tokens) and torch.allclose(packed, plain, atol=1e-6)
    for row in range(len(rows)):
        tokens = rows.tokens[row, : rows.prompt_length[row] + rows.response_length[row] - 1]
        assert batch.tokens[alone[row]].equal(tokens)
        assert batch.positions[alone[row]].equal(torch.arange(len(tokens)))
    # the gradient: each prompt's tokens once, each response's own
    weight = torch.randn(first, 4, 8)
    chosen = {index: row for row in reversed(alone) for index in row}  # one row that holds each token
    total = 0
    for row in alone:
        counted = torch.tensor([chosen[index] is row for index in row])[:, None, None]
        total += (plain_attention(q[row], k[row], v[row], window) * weight[row] * counted).sum()
    got, want = (torch.autograd.grad(loss, (q, k, v)) for loss in ((packed * weight).sum(), total))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("window", [None, 1, 3])
def test_cached_attention_equals_each_row_alone(window):
    """Three rows at different places, token after token through the cache of two layers, as decoding does."""
    windows = (None, window)
    config = SimpleNamespace(windows=windows, head_dim=8, kv_heads=2, layers=2)
    weight = torch.zeros(1)
    cache = KVCache(SimpleNamespace(config=config, embed_tokens=SimpleNamespace(weight=weight)), 4, 12)
    cache.k.fill_(3), cache.v.fill_(9)  # what other rows left behind
    q, k, v = (torch.randn(2, 3, 10, heads, 8) for heads in (4, 2, 2))  # [L, B, T, heads, E]
    filled = torch.tensor([1, 6, 3])
    for row, length in enumerate(filled):
        cache.insert(row, *(x[:, row, :length].transpose(1, 2) for x in (k, v)))
    at = torch.arange(3)
    for position in (filled, filled + 1, filled + 2):
        cache.open_step(position, context=int(position.max()) + 1)
        for layer in (0, 1):
            got = cache.attend_cached(layer, *(x[layer, at, position] for x in (q, k, v)))
            for row, place in enumerate(position):
                alone = (x[layer, row, : place + 1] for x in (q, k, v))
                assert torch.allclose(got[row], plain_attention(*alone, windows[layer])[-1], atol=1e-5)


def test_the_example_of_the_docstring():
    a, b, c, d, e, f, g, h = range(1, 9)
    rows = Rollout(
        question=torch.tensor([4, 4]),
        sample=torch.tensor([0, 1]),
        prompt_length=torch.tensor([3, 3]),
        response_length=torch.tensor([2, 3]),
        tokens=torch.tensor([[a, b, c, d, e, 0], [a, b, c, f, g, h]]),
        logprob=torch.zeros(2, 3),
        finished=torch.ones(2, dtype=torch.bool),
    )
    batch = pack_responses(rows, (None,))
    assert batch.tokens.tolist() == [a, b, c, d, f, g] and batch.positions.tolist() == [0, 1, 2, 3, 3, 4]
    assert batch.targets.tolist() == [d, e, f, g, h] and batch.logit_positions.tolist() == [2, 3, 2, 4, 5]
    assert batch.groups[1].query.tolist() == [[3, 0], [4, 5]]
    assert batch.groups[1].key.tolist() == [[0, 1, 2, 3, 0], [0, 1, 2, 4, 5]]
    queries, keys, begins = batch.groups[1].flat
    assert queries == slice(3, 6) and keys.tolist() == [0, 1, 2, 3, 0, 1, 2, 4, 5]
    assert begins.tolist() == [[0, 1, 3], [0, 4, 9]]
    assert batch.unpack(torch.arange(1.0, 6.0)).tolist() == [[1, 2, 0], [3, 4, 5]]


# ------------------------------------------------------------------------------------------------------------
# the learner


@st.composite
def shapes(draw):
    """Prompt length of each question, and (question, response length) of each row in any order."""
    prompts = draw(st.lists(st.integers(1, 12), min_size=1, max_size=3))
    row = st.tuples(st.integers(0, len(prompts) - 1), st.integers(1, draw(st.sampled_from([1, 2, 12]))))
    return prompts, draw(st.lists(row, min_size=1, max_size=6))


def make_rollout(config, prompts, rows, seed):
    prompt_tokens = [draw_tokens(config, (length,), seed + q) for q, length in enumerate(prompts)]
    responses = [draw_tokens(config, (length,), seed + 100 + i) for i, (_, length) in enumerate(rows)]
    tokens = [torch.cat((prompt_tokens[q], own)) for (q, _), own in zip(rows, responses, strict=True)]
    return Rollout(
        question=torch.tensor([q for q, _ in rows]) + 5,  # any numbers may name the questions
        sample=torch.arange(len(rows)),
        prompt_length=torch.tensor([prompts[q] for q, _ in rows]),
        response_length=torch.tensor([length for _, length in rows]),
        tokens=torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True),
        logprob=torch.zeros(len(rows), max(length for _, length in rows)),
        finished=torch.zeros(len(rows), dtype=torch.bool),
    )


def row_by_row(reference, rows, temperature):
    """What Transformer.forward returns, the plain way: transformers' logits of one row after the other."""
    width = int(rows.response_length.max())
    logprob, entropy = [], []
    for i in range(len(rows)):
        start, length = int(rows.prompt_length[i]), int(rows.response_length[i])
        row = rows.tokens[i, : start + length]
        logp = (reference(row[None]).logits[0, start - 1 : -1] / temperature).log_softmax(-1)  # [R, V]
        pad = (0, width - length)
        logprob.append(torch.nn.functional.pad(logp.gather(1, row[start:, None])[:, 0], pad))
        entropy.append(torch.nn.functional.pad(-(logp.exp() * logp).sum(-1), pad))
    return torch.stack(logprob), torch.stack(entropy)


def gradients(named_parameters, outputs, weights):
    names, parameters = zip(*named_parameters, strict=True)
    loss = sum((weight * output).sum() for weight, output in zip(weights, outputs, strict=True))
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def learner_difference(ours, reference, rows, temperature, first_only):
    """The largest difference of outputs, and of gradients relative to each parameter's; both can show one."""
    weights = torch.randn(2, *rows.logprob.shape, generator=torch.Generator().manual_seed(1))
    if first_only:  # the token that the prompt predicts
        weights[:, :, 1:] = 0
    want = row_by_row(reference, rows, temperature)
    got = ours(rows, temperature)
    outputs = max((a - b).abs().max().item() for a, b in zip(got, want, strict=True))
    want_grad = gradients(reference.named_parameters(), want, weights)
    got_grad = hf_tensors(ours.config, gradients(ours.named_parameters(), got, weights))
    assert got_grad.keys() == want_grad.keys() and want_grad["model.norm.weight"].abs().max() > 0
    # some gradients are nothing but rounding
    scale = max(grad.abs().max() for grad in want_grad.values()) * 1e-3
    worst = max((got_grad[n] - g).abs().max() / max(g.abs().max(), scale) for n, g in want_grad.items())
    return outputs, worst.item()


def check_learner(config, shape, temperature, first_only, seed):
    ours, reference = both(config, seed)
    rows = make_rollout(config, *shape, seed)
    outputs, grads = learner_difference(ours, reference, rows, temperature, first_only)
    assert outputs < TOLERANCE and grads < NOTICED
    ours.checkpointing = True
    assert learner_difference(ours, reference, rows, temperature, first_only) == (outputs, grads)


CASES = given(configs(), shapes(), st.sampled_from([0.6, 1.0, 1.3]), st.booleans(), st.integers(0, 1000))


@examples(60)
@CASES
def test_learner_equals_transformers_row_by_row(config, shape, temperature, first_only, seed):
    check_learner(config, shape, temperature, first_only, seed)


@pytest.mark.long
@examples(300)
@CASES
def test_learner_equals_transformers_row_by_row_long(config, shape, temperature, first_only, seed):
    check_learner(config, shape, temperature, first_only, seed)


# ------------------------------------------------------------------------------------------------------------
# can these tests fail? planted mistakes


def test_learner_notices_a_wrong_start(monkeypatch):
    """Responses that begin one position late behind their prompt change the outputs."""
    check_learner(FIXED, SHAPE, 1.0, False, seed=0)

    def late(rows, windows):
        batch = pack_responses(rows, windows)
        batch.positions[14:] += 1  # after the prompts' 5 and 9 tokens
        return batch

    monkeypatch.setattr(model, "pack_responses", late)
    ours, reference = both(FIXED)
    assert learner_difference(ours, reference, make_rollout(FIXED, *SHAPE, 0), 1.0, False)[0] > NOTICED


def test_learner_notices_a_prompt_without_gradient(monkeypatch):
    """If responses see their prompt's keys and values as constants, only the gradients change."""
    attend = AttentionGroup.attend_rows

    def detached(self, window, q, k, v):
        if len(self.mask(window)) > 1:  # the responses' group: rows start at different places
            k, v = (torch.cat((x[:14].detach(), x[14:])) for x in (k, v))
        return attend(self, window, q, k, v)

    monkeypatch.setattr(AttentionGroup, "attend_rows", detached)
    ours, reference = both(FIXED)
    outputs, grads = learner_difference(ours, reference, make_rollout(FIXED, *SHAPE, 0), 1.0, False)
    assert outputs < TOLERANCE and grads > 10 * NOTICED


@pytest.mark.parametrize("package", PACKAGES.values(), ids=PACKAGES)
@pytest.mark.parametrize("window", [None, 4])
def test_learner_with_flash_attention_equals_transformers(monkeypatch, window, package):
    """Outputs and gradients by the calls that a GPU makes without padding, which references take in fp32."""
    calls, made = [], attention.flash_packed
    use_flash(monkeypatch, package)
    monkeypatch.setattr(flash_attention, "DTYPES", [torch.float32])
    monkeypatch.setattr("kernels.packing.packed_available", lambda q: True)
    monkeypatch.setattr("kernels.packing.flash_packed", lambda *args: calls.append(1) or made(*args))
    mistral = {"model_type": "mistral", "sliding_window": window} if window else {}
    check_learner(FIXED | mistral, SHAPE, 1.0, False, seed=0)
    assert calls
