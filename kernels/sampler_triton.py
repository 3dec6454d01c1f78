"""sampler.sample_tokens in Triton: one kernel sums blocks, one samples from them, and two more do top-p.

Top-p keeps the logits at or above a floor: the highest number above which the mass still reaches top_p. The
32 bits of the floor are found digit by digit, as in radix selection: a pass over the logits sums the mass at
or above each of 16 candidates, and the highest candidate whose mass reaches top_p is where the next pass
starts. That always takes eight passes, so a CUDA graph can hold them.
"""

import torch
import triton
from triton import language as tl

TILE = 1024  # tokens of the vocabulary per program
BITS = 4  # bits of the floor per pass


def sample_tokens_triton(logits, key, position, temperature, top_p=1.0):
    """sample_tokens at a temperature above 0; logits [B, V] of any float dtype, each row contiguous."""
    rows, vocabulary = logits.shape
    assert logits.stride(1) == 1, "each row of logits must be contiguous"
    assert key.shape == position.shape == (rows,), "logits [B, V], key [B], position [B]"
    blocks = triton.cdiv(vocabulary, TILE)
    peak, mass = torch.empty(2, rows, blocks, device=logits.device, dtype=torch.float32)
    token = torch.empty(rows, device=logits.device, dtype=torch.int64)
    logprob = torch.empty(rows, device=logits.device, dtype=torch.float32)
    scalars = vocabulary, blocks, logits.stride(0), 1 / temperature
    sizes = dict(BLOCKS=triton.next_power_of_2(blocks), TILE=TILE)
    floor = None
    block_mass[(rows, blocks)](logits, floor, peak, mass, *scalars, TILE=TILE)
    if top_p < 1:
        floor = nucleus_floor_triton(logits, peak, mass, top_p, scalars, sizes)
        block_mass[(rows, blocks)](logits, floor, peak, mass, *scalars, TILE=TILE)
    block_draw[(rows,)](logits, floor, key, position, peak, mass, token, logprob, *scalars, **sizes)
    return token, logprob


def nucleus_floor_triton(logits, peak, mass, top_p, scalars, sizes):
    """The smallest logit that top-p keeps, as an ordinal [B]; peak and mass [B, blocks] of all logits."""
    (rows, blocks), digits = peak.shape, 2**BITS
    floor = torch.full((rows,), -(2**31), device=logits.device, dtype=torch.int32)
    above = torch.empty(rows, blocks, digits, device=logits.device, dtype=torch.float32)
    for shift in range(32 - BITS, -1, -BITS):
        block_above[(rows, blocks)](logits, floor, peak, above, *scalars, shift, DIGITS=digits, TILE=TILE,
                                    num_warps=1)  # fmt: skip
        raise_floor[(rows,)](floor, peak, mass, above, blocks, scalars[-1], top_p, shift, DIGITS=digits,
                             BLOCKS=sizes["BLOCKS"])  # fmt: skip
    return floor


@triton.jit
def block_mass(logits, floor, peak, mass, vocabulary, blocks, stride, inverse_temperature,
               TILE: tl.constexpr):  # fmt: skip
    """Program (row, block): the largest logit of the block, and the sum of exp(logit - largest)."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    x = load_block(logits, floor, row, block, vocabulary, stride, TILE) * inverse_temperature
    top = tl.max(x, 0)
    p = tl.where(x == float("-inf"), 0.0, tl.exp(x - top))  # if the whole block is -inf, x - top is NaN
    tl.store(peak + row * blocks + block, top)
    tl.store(mass + row * blocks + block, tl.sum(p, 0))


@triton.jit
def block_draw(logits, floor, key, position, peak, mass, token, logprob, vocabulary, blocks, stride,
               inverse_temperature, BLOCKS: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """Program (row): scan the blocks, then the tokens of the one block that u falls in."""
    row = tl.program_id(0).to(tl.int64)
    u = uniform_of(tl.load(key + row), tl.load(position + row))
    index = tl.arange(0, BLOCKS)
    s, _, top, _ = load_masses(peak, mass, row, index, blocks)
    total = tl.sum(s, 0)
    block, rest = first_above(s, u * total, index)

    index = tl.arange(0, TILE)
    x = load_block(logits, floor, row, block, vocabulary, stride, TILE) * inverse_temperature - top
    place, _ = first_above(tl.exp(x), rest, index)
    tl.store(token + row, (block * TILE + place).to(tl.int64))
    tl.store(logprob + row, tl.sum(tl.where(index == place, x, 0.0), 0) - tl.log(total))


@triton.jit(do_not_specialize=["shift"])
def block_above(logits, floor, peak, above, vocabulary, blocks, stride, inverse_temperature, shift,
                DIGITS: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """Program (row, block): for each digit, the block's mass at or above the floor plus that digit."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    low, top = tl.load(floor + row), tl.load(peak + row * blocks + block)
    if not (top < number_of(low) * inverse_temperature):  # else the mass is 0, as raise_floor knows
        x = load_block(logits, None, row, block, vocabulary, stride, TILE)
        p = tl.exp(x * inverse_temperature - tl.maximum(top, -1e38))  # avoids -inf - -inf
        for digit in tl.static_range(1, DIGITS):
            kept = (x >= number_of(low + (digit << shift))).to(tl.float32)
            tl.store(above + (row * blocks + block) * DIGITS + digit, tl.sum(kept * p, 0))


@triton.jit(do_not_specialize=["shift"])
def raise_floor(floor, peak, mass, above, blocks, inverse_temperature, top_p, shift, DIGITS: tl.constexpr,
                BLOCKS: tl.constexpr):  # fmt: skip
    """Program (row): raise the floor by the largest digit at which the mass still reaches top_p."""
    row = tl.program_id(0).to(tl.int64)
    low, index, digit = tl.load(floor + row), tl.arange(0, BLOCKS), tl.arange(0, DIGITS)
    s, peaks, _, scale = load_masses(peak, mass, row, index, blocks)
    written = (index < blocks) & ~(peaks < number_of(low) * inverse_temperature)
    at = (row * blocks + index)[:, None] * DIGITS + digit
    a = tl.load(above + at, mask=written[:, None], other=0.0)  # digit 0 is not written, nor needed
    reaches = tl.sum(a * scale[:, None], 0) >= top_p * tl.sum(s, 0)
    tl.store(floor + row, low + (tl.max(tl.where(reaches, digit, 0), 0) << shift))


@triton.jit
def load_masses(peak, mass, row, index, blocks):
    """A row's blocks: masses relative to the row's maximum, block peaks, the maximum, rescaling factors."""
    m = tl.load(peak + row * blocks + index, mask=index < blocks, other=float("-inf"))
    top = tl.max(m, 0)
    scale = tl.exp(m - top)
    return tl.load(mass + row * blocks + index, mask=index < blocks, other=0.0) * scale, m, top, scale


@triton.jit
def load_block(logits, floor, row, block, vocabulary, stride, TILE: tl.constexpr):
    """The logits of a block in fp32; -inf past the vocabulary and below the floor, if there is one."""
    column = block * TILE + tl.arange(0, TILE)
    x = tl.load(logits + row * stride + column, mask=column < vocabulary, other=float("-inf")).to(tl.float32)
    if floor is not None:
        x = tl.where(x < number_of(tl.load(floor + row)), float("-inf"), x)
    return x


@triton.jit
def number_of(ordinal):
    """The fp32 number of an int32 ordinal: both have the same order, with NaN at both ends."""
    return (ordinal ^ ((ordinal >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def first_above(mass, target, index):
    """inverse_cdf: the first index with mass whose running sum exceeds the target, else the last with mass.

    If the mass is NaN, the index is 0, so the token is still one of the vocabulary.
    """
    cdf = tl.cumsum(mass, 0)
    last = tl.max(tl.where(mass > 0, index, 0), 0)
    place = tl.min(tl.where((cdf > target) & (mass > 0), index, last), 0)
    return place, target - tl.sum(tl.where(index < place, mass, 0.0), 0)


@triton.jit
def uniform_of(key, position):
    """uniform(key, position), with unsigned integers, whose shifts are logical."""
    x = key.to(tl.uint64, bitcast=True) + (position.to(tl.uint64, bitcast=True) + 1) * 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    x = x ^ (x >> 31)
    return ((x >> 41).to(tl.float32) + 0.5) / 8388608
