"""sample_tokens of sampler.py in Triton, for top_p 1: one kernel sums blocks, one samples from them."""

import torch
import triton
from triton import language as tl

TILE = 1024  # of the vocabulary, per program of the first kernel


def sample_tokens_triton(logits, key, position, temperature):
    """sample_tokens with top_p 1 by two kernels; logits [B, V] of any float dtype, each row contiguous."""
    rows, vocabulary = logits.shape
    assert logits.stride(1) == 1, "each row of logits has to be contiguous"
    assert key.shape == position.shape == (rows,), "logits [B, V], key [B], position [B]"
    blocks = triton.cdiv(vocabulary, TILE)
    peak, mass = torch.empty(2, rows, blocks, device=logits.device, dtype=torch.float32)
    token = torch.empty(rows, device=logits.device, dtype=torch.int64)
    logprob = torch.empty(rows, device=logits.device, dtype=torch.float32)
    scalars = vocabulary, blocks, logits.stride(0), 1 / temperature
    sizes = dict(BLOCKS=triton.next_power_of_2(blocks), TILE=TILE)
    block_mass[(rows, blocks)](logits, peak, mass, *scalars, TILE=TILE)
    block_draw[(rows,)](logits, key, position, peak, mass, token, logprob, *scalars, **sizes)
    return token, logprob


@triton.jit
def block_mass(logits, peak, mass, vocabulary, blocks, stride, inverse_temperature, TILE: tl.constexpr):
    """Program (row, block): the largest logit of the block, and the sum of exponentials under it."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = block * TILE + tl.arange(0, TILE)
    x = tl.load(logits + row * stride + column, mask=column < vocabulary, other=float("-inf")).to(tl.float32)
    x *= inverse_temperature
    top = tl.max(x, 0)
    p = tl.where(x == float("-inf"), 0.0, tl.exp(x - top))  # a whole block may be -inf: no -inf - -inf
    tl.store(peak + row * blocks + block, top)
    tl.store(mass + row * blocks + block, tl.sum(p, 0))


@triton.jit
def block_draw(logits, key, position, peak, mass, token, logprob, vocabulary, blocks, stride,
               inverse_temperature, BLOCKS: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """Program (row): scan the blocks, then the tokens of the one block that u falls in."""
    row = tl.program_id(0).to(tl.int64)
    u = uniform_of(tl.load(key + row), tl.load(position + row))
    index = tl.arange(0, BLOCKS)
    m = tl.load(peak + row * blocks + index, mask=index < blocks, other=float("-inf"))
    s = tl.load(mass + row * blocks + index, mask=index < blocks, other=0.0)
    top = tl.max(m, 0)
    s *= tl.exp(m - top)  # all blocks under one maximum
    total = tl.sum(s, 0)
    block, rest = first_above(s, u * total, index)

    index = tl.arange(0, TILE)
    column = block * TILE + index
    x = tl.load(logits + row * stride + column, mask=column < vocabulary, other=float("-inf")).to(tl.float32)
    x = x * inverse_temperature - top
    place, _ = first_above(tl.exp(x), rest, index)
    tl.store(token + row, (block * TILE + place).to(tl.int64))
    tl.store(logprob + row, tl.sum(tl.where(index == place, x, 0.0), 0) - tl.log(total))


@triton.jit
def first_above(mass, target, index):
    """inverse_cdf: the first index with mass whose running sum exceeds the target, else the last with mass.

    Where the mass is NaN it is index 0, so even then the token is one of the vocabulary.
    """
    cdf = tl.cumsum(mass, 0)
    last = tl.max(tl.where(mass > 0, index, 0), 0)
    place = tl.min(tl.where((cdf > target) & (mass > 0), index, last), 0)
    return place, target - tl.sum(tl.where(index < place, mass, 0.0), 0)


@triton.jit
def uniform_of(key, position):
    """uniform(key, position), in unsigned numbers, whose shifts are logical."""
    x = key.to(tl.uint64, bitcast=True) + (position.to(tl.uint64, bitcast=True) + 1) * 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    x = x ^ (x >> 31)
    return ((x >> 41).to(tl.float32) + 0.5) / 8388608
