"""Drawing tokens: random numbers that are a hash of what they are for, and an inverse-CDF sampler without a sort.

`draw` is what decoding calls. With top_p 1 on a GPU it is two Triton kernels, elsewhere the torch functions, which are the
reference that the kernels are tested against. Neither waits for the device nor has a shape that depends on data, so both
(top_p 1) can be captured in a CUDA graph. Letters in shape comments: B rows, V vocabulary, N blocks of the vocabulary.
"""

import torch

try:
    import triton
    from triton import language as tl
except ImportError:  # torch's CPU wheels come without it
    triton = None

BLOCK = 256  # of the vocabulary: sums of blocks are scanned first, then the one block that u falls in
AT_ONCE = {"cpu": 1 << 20, "cuda": 1 << 24}  # logits that the torch functions take at once: what they make of them stays small


def draw(logits, key, position, temperature=1.0, top_p=1.0):
    """Draw the token at `position` [B] of each row: logits [B, V], key [B] of int64 -> (token [B], logprob [B] in fp32).

    What comes out is a function of a row's own logits, key and position, whoever its neighbours in the batch are. The
    log-probability is that under the distribution drawn from, temperature and top-p included.

    >>> token, logprob = draw(torch.tensor([[0.0, -torch.inf, 0.0]]), key=torch.tensor([7]), position=torch.tensor([0]))
    >>> token.item() in (0, 2), round(logprob.item(), 4)
    (True, -0.6931)
    """
    if logits.is_cuda and triton is not None and top_p == 1 and temperature > 0:
        return draw_triton(logits, key, position, temperature)
    rows = max(1, AT_ONCE[logits.device.type] // logits.shape[1])
    parts = zip(logits.split(rows), uniform(key, position).split(rows), strict=True)
    token, logprob = zip(*(sample(part, u, temperature, top_p) for part, u in parts), strict=True)
    return torch.cat(token), torch.cat(logprob)


# ----------------------------------------------------------------------------------------------------------------------
# random numbers


def mix(x):
    """Scramble int64 values: the finaliser of splitmix64 (Steele et al. 2014), every input bit flips half the output's."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor  # >> keeps the sign, the mask takes it off again
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def fold(key, value):
    """Fold one more counter (int or int64 tensor) into a key [B]."""
    value = torch.as_tensor(value, device=key.device)  # tensors wrap around at 64 bits, Python's integers do not
    return mix(key + (value + 1) * -0x61C8864680B583EB)  # the odd 64-bit number nearest 2^64 / golden ratio


def uniform(key, position):
    """One uniform number in (0, 1) per row, [B] in fp32, for the token at `position` [B] of its response.

    >>> 0 < uniform(torch.tensor([7]), torch.tensor([0])).item() < 1
    True
    """
    bits = (fold(key, position) >> 41) & 0x7FFFFF  # the top 23: with the half below, exact in fp32 and never 0 or 1
    return (bits.float() + 0.5) / 2**23


# ----------------------------------------------------------------------------------------------------------------------
# sampling in torch


def sample(logits, u, temperature=1.0, top_p=1.0):
    """Draw a token a row by inverse CDF: logits [B, V], u [B] in (0, 1) -> (token [B], logprob [B]).

    The log-probability is that under the distribution drawn from, temperature and top-p included (Holtzman et al. 2020);
    temperature 0 is greedy, and certain. A token of probability 0 is never drawn. Logits with a NaN give some token of
    the vocabulary and the log-probability NaN.

    >>> token, logprob = sample(torch.tensor([[0.0, 0.0]]), u=torch.tensor([0.7]))  # a fair coin, the upper half
    >>> token.item(), round(logprob.item(), 4)
    (1, -0.6931)
    """
    if temperature == 0:
        return logits.argmax(-1), torch.zeros_like(u)
    logits = logits.float()
    if top_p < 1:
        logits, temperature = keep_nucleus(logits / temperature, top_p), 1.0
    top = logits.amax(-1, keepdim=True)
    p = torch.add(top / -temperature, logits, alpha=1 / temperature).exp_()  # [B, V] in two passes, undivided by its sum
    vocabulary = p.shape[1]
    whole = vocabulary // BLOCK
    blocks, rest = p[:, : whole * BLOCK].unflatten(1, (whole, BLOCK)), p[:, whole * BLOCK :]
    mass = torch.cat((blocks.sum(-1), rest.sum(-1, keepdim=True)), dim=1)  # [B, N]
    total = mass.sum(-1)
    block, left = pick(mass, u * total)
    column = block[:, None] * BLOCK + torch.arange(BLOCK, device=p.device)  # [B, BLOCK] the tokens of the block
    outside = column >= vocabulary
    within, _ = pick(p.gather(1, column.clamp_(max=vocabulary - 1)).masked_fill_(outside, 0), left)
    token = column.gather(1, within[:, None])  # [B, 1]
    return token[:, 0], p.gather(1, token)[:, 0].div_(total).log_()


def pick(mass, target):
    """The first place where the running sum exceeds the target, and how far into it: [B, N], [B] -> (place [B], rest [B]).

    >>> pick(torch.tensor([[2.0, 0.0, 3.0, 0.0]]), torch.tensor([2.5]))
    (tensor([2]), tensor([0.5000]))
    """
    cdf = mass.cumsum(-1)
    place = torch.searchsorted(cdf, target[:, None], right=True)  # [B, 1]
    last = torch.searchsorted(cdf, cdf[:, -1:].contiguous())  # where a target goes that was rounded up to the total
    place = torch.minimum(place, last).clamp_(max=mass.shape[1] - 1)  # the clamp: NaN sorts past the end
    return place[:, 0], target - (cdf - mass).gather(1, place)[:, 0]


def keep_nucleus(logits, top_p):
    """Set to -inf all but the smallest set of most likely tokens whose probabilities reach top_p, [B, V] -> [B, V]."""
    probability, order = torch.sort(logits.softmax(-1), dim=-1, descending=True, stable=True)
    before = probability.cumsum(-1) - probability  # mass of the tokens that are likelier
    return logits.masked_fill((before >= top_p).scatter(1, order, before >= top_p), float("-inf"))


# ----------------------------------------------------------------------------------------------------------------------
# sampling in Triton


def draw_triton(logits, key, position, temperature):
    """draw with top_p 1 by two kernels; logits of any float dtype."""
    rows, vocabulary = logits.shape
    assert logits.stride(1) == 1 and key.shape == position.shape == (rows,), "logits [B, V] with rows without gaps"
    blocks = triton.cdiv(vocabulary, TILE)
    peak, mass = torch.empty(2, rows, blocks, device=logits.device, dtype=torch.float32)
    token = torch.empty(rows, device=logits.device, dtype=torch.int64)
    logprob = torch.empty(rows, device=logits.device, dtype=torch.float32)
    block_mass[(rows, blocks)](logits, peak, mass, vocabulary, blocks, logits.stride(0), 1 / temperature, TILE=TILE)
    block_draw[(rows,)](
        logits, key, position, peak, mass, token, logprob, vocabulary, blocks, logits.stride(0), 1 / temperature,
        BLOCKS=triton.next_power_of_2(blocks), TILE=TILE,
    )  # fmt: skip
    return token, logprob


TILE = 1024  # of the vocabulary, per program of the first kernel

if triton is not None:

    @triton.jit
    def block_mass(logits, peak, mass, vocabulary, blocks, stride, inverse_temperature, TILE: tl.constexpr):
        """Program (row, block): the largest logit of the block, and the sum of exponentials under it."""
        row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
        column = block * TILE + tl.arange(0, TILE)
        x = tl.load(logits + row * stride + column, mask=column < vocabulary, other=float("-inf")).to(tl.float32)
        x *= inverse_temperature
        top = tl.max(x, 0)
        p = tl.where(x == float("-inf"), 0.0, tl.exp(x - top))  # a block may be masked out whole: no -inf - -inf
        tl.store(peak + row * blocks + block, top)
        tl.store(mass + row * blocks + block, tl.sum(p, 0))

    @triton.jit
    def block_draw(logits, key, position, peak, mass, token, logprob, vocabulary, blocks, stride, inverse_temperature,
                   BLOCKS: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
        """Program (row): scan the blocks, then the tokens of the one block that u falls in."""
        row = tl.program_id(0).to(tl.int64)
        u = uniform_of(tl.load(key + row), tl.load(position + row))
        index = tl.arange(0, BLOCKS)
        m = tl.load(peak + row * blocks + index, mask=index < blocks, other=float("-inf"))
        s = tl.load(mass + row * blocks + index, mask=index < blocks, other=0.0)
        top = tl.max(m, 0)
        s *= tl.exp(m - top)  # all blocks under one maximum
        total = tl.sum(s, 0)
        block, left = first_above(s, u * total, index)

        index = tl.arange(0, TILE)
        column = block * TILE + index
        x = tl.load(logits + row * stride + column, mask=column < vocabulary, other=float("-inf")).to(tl.float32)
        x = x * inverse_temperature - top
        place, _ = first_above(tl.exp(x), left, index)
        tl.store(token + row, (block * TILE + place).to(tl.int64))
        tl.store(logprob + row, tl.sum(tl.where(index == place, x, 0.0), 0) - tl.log(total))

    @triton.jit
    def first_above(mass, target, index):
        """pick: the first place of positive mass where the running sum exceeds the target, else the last of positive mass.

        Where the mass is NaN it is place 0, so even then the token is one of the vocabulary.
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
