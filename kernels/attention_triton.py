"""Decoding attention in Triton: one query per row over the filled part of a KV cache.

Decoding is memory-bound: each key and value is read once and used once per query head. The kernel is built
around the reads (flash-decoding, Dao et al. 2023):

    one program per (row, key head, split)    query heads that share a key head share its reads
    splits of a row's keys                    a few long rows keep the whole GPU busy
    lengths are read on the device            the launch depends only on the shape of the cache, so a CUDA
                                              graph stays valid while rows grow, finish and start

Each split computes an online softmax over its own keys, and `merge_splits` combines them.

Letters in shape comments: B rows, T tokens, H heads, K key/value heads, E head width, N splits.
"""

import math

import torch
import triton
from triton import language as tl

SMALLEST_SPLIT = 64  # keys; shorter splits cost more to merge than they save
MOST_SPLITS = 64


def attend_cached_triton(q, k, v, keys, values, length, window=None):
    """Append one token per row to a cache and attend from it: q [B, H, E], k and v [B, K, E] -> [B, H, E].

    keys and values [B, K, T, E] are the cache; `length` [B] of int32 is how many tokens each row holds, which
    must leave room for one more. A query sees `window` tokens, the new one included; None is all of them.
    """
    (rows, heads, width), kv_heads, capacity = q.shape, k.shape[1], keys.shape[2]
    assert keys.shape == values.shape == (rows, kv_heads, capacity, width) and length.shape == (rows,)
    assert all(x.stride()[1:] == (width, 1) for x in (q, k, v)), "the heads of a token must be contiguous"
    assert keys.stride() == values.stride() and keys.stride()[2:] == (width, 1)
    splits = splits_wanted(q.device, rows * kv_heads, capacity)
    sizes = tile_sizes(heads // kv_heads, width, q.element_size())
    acc = torch.empty(rows, heads, splits, width, device=q.device, dtype=torch.float32)
    peak, mass = torch.empty(2, rows, heads, splits, device=q.device, dtype=torch.float32)
    out = torch.empty(rows, heads, width, device=q.device, dtype=q.dtype)
    attend_split[(rows, kv_heads, splits)](
        q, k, v, keys, values, length, acc, peak, mass, q.stride(0), k.stride(0), v.stride(0),
        *keys.stride()[:2], math.log2(math.e) / math.sqrt(width), capacity if window is None else window,
        **sizes, num_warps=4, num_stages=3,
    )  # fmt: skip
    merge_splits[(rows * heads,)](acc, peak, mass, out, N=splits, E=width, BE=sizes["BE"])
    return out


def tile_sizes(group, width, number_bytes):
    """Tile sizes of a program: powers of 2, at least 16 query heads, keys that fit three pipeline stages."""
    wide = triton.next_power_of_2(width)
    queries, keys = max(16, triton.next_power_of_2(group)), 64 if wide * number_bytes <= 256 else 32
    return dict(G=group, BG=queries, E=width, BE=wide, BT=keys)


def splits_wanted(device, programs, capacity):
    """The number of splits of a row, a power of 2: enough of them to keep the GPU busy."""
    wanted = 8 * torch.cuda.get_device_properties(device).multi_processor_count / programs
    most = min(MOST_SPLITS, wanted, capacity / SMALLEST_SPLIT)
    return 1 << max(0, math.ceil(math.log2(most)))


@triton.jit
def attend_split(q, k, v, keys, values, length, acc, peak, mass, q_stride, k_stride, v_stride, row_stride,
                 head_stride, scale, window, G: tl.constexpr, BG: tl.constexpr, E: tl.constexpr,
                 BE: tl.constexpr, BT: tl.constexpr):  # fmt: skip
    """Program (row, key head, split): the G query heads of a key head over one split of the row's keys.

    The first split also attends to the new token, from registers, and stores it for later steps.
    """
    row, head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    splits, heads = tl.num_programs(2), tl.num_programs(1) * G
    g, e = tl.arange(0, BG), tl.arange(0, BE)
    own = (g < G)[:, None] & (e < E)  # tiles are powers of 2, with at least 16 queries
    query = tl.load(q + row * q_stride + (head * G + g)[:, None] * E + e, mask=own, other=0.0)  # [BG, BE]
    new_key = tl.load(k + row * k_stride + head * E + e, mask=e < E, other=0.0)  # [BE]
    new_value = tl.load(v + row * v_stride + head * E + e, mask=e < E, other=0.0)
    filled = tl.load(length + row)
    keys += row * row_stride + head * head_stride
    values += row * row_stride + head * head_stride
    is_first = split == 0
    tl.store(keys + filled * E + e, new_key, mask=is_first & (e < E))
    tl.store(values + filled * E + e, new_value, mask=is_first & (e < E))

    # Every split's running maximum starts at the new token's score, which is finite.
    top = tl.sum(query.to(tl.float32) * new_key.to(tl.float32), 1) * scale  # [BG], in log2 units
    total = tl.where(is_first, tl.full([BG], 1.0, tl.float32), 0.0)
    sums = tl.where(is_first, tl.zeros([BG, BE], tl.float32) + new_value.to(tl.float32), 0.0)
    first = tl.maximum(filled + 1 - window, 0)
    part = tl.cdiv(tl.cdiv(filled - first, splits), BT) * BT
    start = first + split * part
    stop = tl.minimum(start + part, filled)
    for block in range(start, stop, BT):
        t = block + tl.arange(0, BT)
        inside = (t < stop)[:, None] & (e < E)
        key = tl.load(keys + t[:, None] * E + e, mask=inside, other=0.0)  # [BT, BE]
        value = tl.load(values + t[:, None] * E + e, mask=inside, other=0.0)
        top, total, sums = attend_block(query, key, value, t < stop, scale, top, total, sums)
    at = (row * heads + head * G + g) * splits + split  # index into [B, H, N]
    tl.store(acc + at[:, None] * E + e, sums, mask=own)
    tl.store(peak + at, top, mask=g < G)
    tl.store(mass + at, total, mask=g < G)


@triton.jit
def attend_block(query, key, value, is_key, scale, top, total, sums):
    """One step of online softmax (Milakov and Gimelshein 2018): queries [BG, BE], a block of keys [BT, BE].

    With w = 2^(score - top): top [BG] is the largest score so far, total [BG] the sum of w, and sums [BG, BE]
    the sum of w * value. Returns all three, updated with the block.
    """
    score = tl.dot(query, tl.trans(key), input_precision="ieee") * scale  # [BG, BT]
    score = tl.where(is_key, score, float("-inf"))
    higher = tl.maximum(top, tl.max(score, 1))
    shrink, p = tl.exp2(top - higher), tl.exp2(score - higher[:, None])
    sums = tl.dot(p.to(value.dtype), value, sums * shrink[:, None], input_precision="ieee")
    return higher, total * shrink + tl.sum(p, 1), sums


@triton.jit
def merge_splits(acc, peak, mass, out, N: tl.constexpr, E: tl.constexpr, BE: tl.constexpr):
    """Program (row, head): combine N splits under one maximum. A split without keys has a mass of 0."""
    at, split, e = tl.program_id(0).to(tl.int64), tl.arange(0, N), tl.arange(0, BE)
    top = tl.load(peak + at * N + split)
    share = tl.exp2(top - tl.max(top, 0))
    total = tl.sum(share * tl.load(mass + at * N + split), 0)
    sums = tl.load(acc + (at * N + split)[:, None] * E + e, mask=(e < E)[None, :], other=0.0)  # [N, BE]
    tl.store(out + at * E + e, tl.sum(share[:, None] * sums, 0) / total, mask=e < E)
