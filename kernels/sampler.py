"""Sampling tokens: counter-based random numbers and inverse-CDF sampling.

A random number is a hash of what it is for (seed, step, question, sample, position), so it does not depend on
the batch. Decoding calls `sample_tokens`. On a GPU with Triton it runs the kernels of sampler_triton.py, on a
CPU with a C compiler the loop of cpu/sample.c, elsewhere the torch functions below, against which both are
tested. On a GPU neither synchronizes or has data-dependent shapes, so both can be captured in a CUDA graph.

Letters in shape comments: B rows, V vocabulary, N blocks of the vocabulary.
"""

import torch
import torch.nn.functional as F

from kernels import native

try:
    from kernels import sampler_triton
except ImportError:  # torch's CPU wheels come without triton
    sampler_triton = None

# What random numbers are for; no two streams share a number: responses in training and in evaluation, the
# coins of --reward random, the order of the questions.
STREAMS = {"train": 0, "eval": 1, "reward": 2, "draw": 3}
BLOCK = 256  # tokens of a block: the block sums are scanned first, then the one block that u falls in
CHUNK = {"cpu": 1 << 20, "cuda": 1 << 24}  # logits sampled at a time in torch, to bound the copies


def sample_tokens(logits, key, position, temperature=1.0, top_p=1.0):
    """Sample the token at `position` [B] of each row: logits [B, V], key [B] -> (token [B], logprob [B]).

    The result depends only on the row's own logits, key and position, not on the rest of the batch. The
    log-probability is that of the distribution sampled from, including temperature and top-p. Top-p keeps the
    smallest set of most likely tokens whose probability reaches top_p (Holtzman et al. 2020), and any tokens
    that tie with the least likely of them.

    >>> logits = torch.tensor([[0.0, -torch.inf, 0.0]])
    >>> token, logprob = sample_tokens(logits, key=torch.tensor([7]), position=torch.tensor([0]))
    >>> token.item() in (0, 2), round(logprob.item(), 4)
    (True, -0.6931)
    """
    if logits.is_cuda and sampler_triton is not None and temperature > 0:
        return sampler_triton.sample_tokens_triton(logits, key, position, temperature, top_p)
    if native.can_sample(logits, temperature):
        return native.sample_rows(logits, uniform(key, position), temperature, top_p)
    rows = max(1, CHUNK[logits.device.type] // logits.shape[1])
    chunks = zip(logits.split(rows), uniform(key, position).split(rows), strict=True)
    sampled = [sample_inverse_cdf(chunk, u, temperature, top_p) for chunk, u in chunks]
    tokens, logprobs = zip(*sampled, strict=True)
    return torch.cat(tokens), torch.cat(logprobs)


# ----------------------------------------------------------------------------------------------------------
# random numbers


def splitmix64(x):
    """Hash int64 values with splitmix64's finalizer (Steele et al. 2014)."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = (x ^ logical_shift(x, shift)) * factor
    return x ^ logical_shift(x, 31)


def logical_shift(x, bits):
    """x >> bits as if int64 were unsigned: torch's shift copies the sign bit, and the mask clears it."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def fold_in(key, counter):
    """A new key [B] from a key and a counter (an int or an int64 tensor)."""
    counter = torch.as_tensor(counter, device=key.device)  # unlike an int, it wraps around at 64 bits
    return splitmix64(key + (counter + 1) * -0x61C8864680B583EB)  # the odd number nearest 2^64 / golden ratio


def row_keys(seed, stream, step, question, sample):
    """The random key of each row, [B] of int64, from everything that identifies a row."""
    key = torch.zeros_like(question)
    for counter in (seed, STREAMS[stream], step, question, sample):
        key = fold_in(key, counter)
    return key


def uniform(key, position):
    """A uniform number in (0, 1) per row, [B] in fp32, for the token at `position` [B] of its response.

    >>> 0 < uniform(torch.tensor([7]), torch.tensor([0])).item() < 1
    True
    """
    bits = logical_shift(fold_in(key, position), 41)  # the top 23: bits + 0.5 is exact in fp32, never 0 or 1
    return (bits.float() + 0.5) / 2**23


# ----------------------------------------------------------------------------------------------------------
# sampling in torch


def sample_inverse_cdf(logits, u, temperature=1.0, top_p=1.0):
    """Sample a token per row by inverse CDF: logits [B, V], u [B] in (0, 1) -> (token [B], logprob [B]).

    Temperature and top-p are as in sample_tokens. Temperature 0 is greedy, with log-probability 0. A token of
    probability 0 is never sampled. If the logits have a NaN, so is the log-probability, but the token is
    still one of the vocabulary.

    >>> token, logprob = sample_inverse_cdf(torch.tensor([[0.0, 0.0]]), u=torch.tensor([0.7]))  # a fair coin
    >>> token.item(), round(logprob.item(), 4)
    (1, -0.6931)
    """
    if temperature == 0:
        return logits.argmax(-1), torch.zeros_like(u)
    logits = logits.float()
    max_logit = logits.amax(-1, keepdim=True)
    # exp((logits - max_logit) / temperature), not normalized, in two passes over [B, V]
    p = torch.add(max_logit / -temperature, logits, alpha=1 / temperature).exp_()
    if top_p < 1:
        keep_nucleus(p, top_p)
    mass = block_sums(p)  # [B, N]
    total = mass.sum(-1)
    block, rest = inverse_cdf(mass, u * total)
    column = block[:, None] * BLOCK + torch.arange(BLOCK, device=p.device)  # [B, BLOCK]
    outside = column >= p.shape[1]
    column = column.clamp_(max=p.shape[1] - 1)
    within, _ = inverse_cdf(p.gather(1, column).masked_fill_(outside, 0), rest)
    token = column.gather(1, within[:, None])  # [B, 1]
    return token[:, 0], p.gather(1, token)[:, 0].div_(total).log_()


def block_sums(p):
    """Sums over blocks of BLOCK columns, and over the rest: [B, V] -> [B, V // BLOCK + 1]."""
    whole = p.shape[1] // BLOCK
    blocks, rest = p[:, : whole * BLOCK].unflatten(1, (whole, BLOCK)), p[:, whole * BLOCK :]
    return torch.cat((blocks.sum(-1), rest.sum(-1, keepdim=True)), dim=1)


def inverse_cdf(mass, target):
    """The first index with mass whose running sum exceeds the target, and the target's offset into it.

    mass [B, N], target [B] -> [B], [B]. A target at or above the total gives the first index that reaches it.

    >>> inverse_cdf(torch.tensor([[2.0, 0.0, 3.0, 0.0]]), torch.tensor([2.5]))
    (tensor([2]), tensor([0.5000]))
    """
    cdf = mass.cumsum(-1)
    reached = cdf.masked_fill(
        mass == 0, float("-inf")
    )  # a token without mass must never be hit, even if rounding puts the target at its boundary
    total = reached.amax(-1, keepdim=True)
    hit = (reached > target[:, None]) | (reached == total)
    index = hit.int().argmax(-1, keepdim=True)  # [B, 1] the first, or 0 where all is NaN
    return index[:, 0], target - (cdf - mass).gather(1, index)[:, 0]


# ----------------------------------------------------------------------------------------------------------
# top-p


def keep_nucleus(p, top_p):
    """Zero in place the tokens that top-p drops: p [B, V], whose rows need not be normalized.

    >>> keep_nucleus(torch.tensor([[0.25, 1.0, 0.5, 0.25]]), top_p=0.7)  # 1.0 and 0.5 are 0.75 of the total
    tensor([[0.0000, 1.0000, 0.5000, 0.0000]])
    """
    total = p.sum(-1, keepdim=True)  # [B, 1]
    target = top_p * total
    if p.is_cuda:  # a CUDA graph needs shapes that do not depend on data
        return p.masked_fill_(p < least_kept(p, target), 0)
    # Tokens below the mean of the dropped mass are dropped in any case, which leaves few to sort.
    bound = torch.minimum((1 - top_p) * total / p.shape[1], p.amax(-1, keepdim=True))
    for row, likely, of_row in zip(p, ~(p < bound), target, strict=True):  # not p >= bound: NaN stays
        floor = least_kept(row[likely], of_row)
        F.threshold_(row, floor.nextafter(-floor).item(), 0)  # zeroes values at or below the number
    return p


def least_kept(p, target):
    """The smallest p that top-p keeps: p [..., V], target [..., 1] of their sum -> [..., 1]."""
    bits = p.view(torch.int32)  # same order, since p >= 0; torch sorts long integer tensors by radix
    ranked = bits.sort(-1).values.view(torch.float32).flip(-1)
    last = torch.searchsorted(ranked.cumsum(-1), target).clamp_(max=ranked.shape[-1] - 1)
    return ranked.gather(-1, last)
