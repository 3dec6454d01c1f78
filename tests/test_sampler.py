"""The sampler's edges and top-p: no token of probability 0, and the nucleus that sorting in float64 gives."""

import pytest
import torch

from kernels.sampler import BLOCK, block_sums, keep_nucleus, sample_inverse_cdf

CLOSE = 5e-7  # to top_p: so near, rounding decides whether a token belongs to the nucleus


def nucleus_by_sort(logits, temperature, top_p):
    """In float64: the probabilities after top-p [B, V], how sure the nucleus is [B], what is likelier [B, V].

    Sure: the least distance between top_p and the mass of all tokens likelier than some token.
    """
    scaled = logits.double() / temperature
    p = scaled.softmax(-1)
    if top_p == 1:
        return p, torch.ones_like(p[:, 0]), torch.zeros_like(p)
    ranked, order = scaled.sort(-1, descending=True)
    mass = torch.nn.functional.pad(ranked.softmax(-1).cumsum(-1), (1, 0))  # [B, V+1] of the first n tokens
    first_tie = torch.searchsorted(-ranked, -ranked)  # how many are likelier
    likelier = torch.empty_like(ranked).scatter_(1, order, mass.gather(1, first_tie))
    kept = p * (likelier < top_p)
    margin = (likelier - top_p).abs().masked_fill(p == 0, 1).amin(-1)
    return kept / kept.sum(-1, keepdim=True), margin, likelier


def check_sampled(logits, u, temperature, top_p, token, logprob):
    """That u picks these tokens from the sorted nucleus, but for rounding. Returns the sure rows."""
    p, margin, likelier = nucleus_by_sort(logits, temperature, top_p)
    p_token, cdf = p.gather(1, token[:, None])[:, 0], p.cumsum(-1).gather(1, token[:, None])[:, 0]
    sure = margin > CLOSE
    assert logprob.isfinite().all() and (likelier.gather(1, token[:, None]) < top_p + CLOSE).all()
    assert ((logprob - p_token.log())[sure].abs() < 1e-5 * max(1, 1 / temperature)).all()
    before, behind = (cdf - p_token - u)[sure], (u - cdf)[sure]
    assert (before < 1e-5).all() and (behind < 1e-5).all()
    return sure


def test_no_number_near_the_edge_of_a_block_samples_what_cannot_be():
    """Targets a few ulps around the sums of blocks, where the rest within the block may round below 0."""
    generator = torch.Generator().manual_seed(0)
    for seed in range(5):
        logits = torch.randn(1, 40 * BLOCK, generator=generator)
        logits[:, torch.rand(40 * BLOCK, generator=generator) < 0.5] = -torch.inf
        logits.view(40, BLOCK)[:, :3] = logits.view(40, BLOCK)[:, -3:] = -torch.inf
        mass = block_sums((logits - logits.amax()).exp())
        u = mass.cumsum(-1)[0] / mass.sum()
        near = torch.cat([(u.view(torch.int32) + ulps).view(torch.float32) for ulps in range(-9, 10)])
        near = near[(near > 0) & (near < 1)]
        _, logprob = sample_inverse_cdf(logits.expand(len(near), -1), near)
        assert len(near) > 700 and logprob.isfinite().all(), seed


def some_logits(rows, vocabulary, spread):
    """Flat (0), ordinary or peaked logits; rows with ties, with -inf, and with all but one token -inf."""
    generator = torch.Generator().manual_seed(vocabulary)
    logits = spread * torch.randn(rows, vocabulary, generator=generator)
    logits[1::4] = logits[1::4].round()
    logits[2::4, 1::2] = -torch.inf
    logits[3, :-1] = -torch.inf
    return logits, torch.rand(rows, generator=generator)


SHAPES = [(100, 5), (100, 300), (40, 5000)]
ALL = [(*shape, temperature, top_p) for shape in SHAPES for temperature in (0.05, 0.6, 1.0, 5.0)
       for top_p in (1e-5, 0.5, 0.8, 0.95, 0.9999)]  # fmt: skip
LARGE = [(4, 151936, 0.6, 0.95), (4, 151936, 1.0, 0.8), (4, 151936, 5.0, 0.9999)]


@pytest.mark.parametrize("rows, vocabulary, temperature, top_p", ALL + LARGE)
def test_top_p_is_that_of_sorting(rows, vocabulary, temperature, top_p):
    for spread in (0.0, 1.0, 5.0):
        logits, u = some_logits(rows, vocabulary, spread)
        sampled = sample_inverse_cdf(logits, u, temperature, top_p)
        sure = check_sampled(logits, u, temperature, top_p, *sampled)
        p = ((logits - logits.amax(-1, keepdim=True)) / temperature).exp()
        kept = keep_nucleus(p, top_p) > 0
        assert kept[sure].equal((nucleus_by_sort(logits, temperature, top_p)[0] > 0)[sure])
        assert sure.float().mean() > 0.2 or vocabulary > 5000


def test_ties_with_the_least_likely_stay():
    p = torch.tensor([[0.5, 1.0, 0.5, 0.25, 0.5], [1.0, 1.0, 1.0, 1.0, 1.0]])
    kept = [[0.5, 1.0, 0.5, 0.0, 0.5], [1.0] * 5]
    assert keep_nucleus(p.clone(), top_p=0.6).tolist() == kept
    assert (keep_nucleus(p / 2**20, top_p=0.6) * 2**20).tolist() == kept
    assert keep_nucleus(p, top_p=1e-9).tolist() == [[0.0, 1.0, 0.0, 0.0, 0.0], [1.0] * 5]
    for vocabulary in range(1, 100):  # the mean of equal numbers may be rounded above them
        assert keep_nucleus(torch.full((1, vocabulary), 0.1), top_p=1e-9).all()


def test_a_nan_stays_a_nan_under_top_p():
    logits = torch.zeros(2, 700)
    logits[1, 5] = torch.nan
    token, logprob = sample_inverse_cdf(logits, torch.tensor([0.5, 0.5]), 1.0, 0.9)
    assert 0 <= token[1] < 700 and logprob[1].isnan() and logprob[0].isfinite()
