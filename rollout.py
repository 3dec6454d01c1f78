"""Batched sampling with a KV cache: prefill each question once, clone it to its samples, decode, drop finished rows, refill.

The rows being decoded lie without gaps in the first slots of a dense cache. A row that ends leaves at once; a waiting
row takes its place, or, when none waits, the last row moves into the gap. Nothing about a response depends on which slot
it sits in or who its neighbours are: its random numbers are a hash of what it is (seed, stream, step, question, sample,
position), not of when it ran.

Letters in shape comments: B rows, T tokens, R response tokens, V vocabulary, L layers, K key/value heads, E head width.
"""

from collections import Counter, deque
from dataclasses import dataclass, fields

import torch

from model import Pack, ragged

STREAMS = {"train": 0, "eval": 1}  # evaluation never shares its random numbers with training


@dataclass
class Rollout:
    """Sampled responses, a row each, on the CPU. Whatever lies past a row's length is zero and means nothing."""

    question: torch.Tensor  # [B] index into the prompts
    sample: torch.Tensor  # [B] which of the question's samples
    prompt_length: torch.Tensor  # [B]
    response_length: torch.Tensor  # [B] the end-of-sequence token, if it came, is part of the response
    tokens: torch.Tensor  # [B, T] prompt, then response
    logprob: torch.Tensor  # [B, R] of each response token under the distribution that it was drawn from
    finished: torch.Tensor  # [B] ended by an end-of-sequence token; False: truncated at max_new_tokens

    def __len__(self):
        return len(self.question)

    def __getitem__(self, rows):
        """The rows of an index or mask, as a Rollout."""
        return Rollout(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    def mask(self):
        """[B, R] True at response tokens, R the longest response of these rows: from lengths, so a trained EOS counts."""
        return ragged(self.response_length)

    def response(self, row):
        """The token ids of one response, as a list."""
        start = int(self.prompt_length[row])
        return self.tokens[row, start : start + int(self.response_length[row])].tolist()


# ----------------------------------------------------------------------------------------------------------------------
# random numbers and sampling


def mix(x):
    """Scramble int64 values: the finaliser of splitmix64 (Steele et al. 2014), every input bit flips half the output's."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor  # >> keeps the sign, the mask takes it off again
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def fold(key, value):
    """Fold one more counter (int or int64 tensor) into a key [B]."""
    value = torch.as_tensor(value, device=key.device)  # tensors wrap around at 64 bits, Python's integers do not
    return mix(key + (value + 1) * -0x61C8864680B583EB)  # the odd 64-bit number nearest 2^64 / golden ratio


def row_keys(seed, stream, step, question, sample):
    """The random key of each row, [B] of int64, from everything that names the row but the position."""
    key = torch.zeros_like(question)
    for counter in (seed, STREAMS[stream], step, question, sample):
        key = fold(key, counter)
    return key


def uniform(key, position):
    """One uniform number in (0, 1) per row, [B] in fp32, for the token at `position` [B] of its response.

    >>> key = row_keys(seed=0, stream="train", step=3, question=torch.tensor([7]), sample=torch.tensor([0]))
    >>> 0 < uniform(key, torch.tensor([0])).item() < 1
    True
    """
    bits = (fold(key, position) >> 41) & 0x7FFFFF  # the top 23: with the half below, exact in fp32 and never 0 or 1
    return (bits.float() + 0.5) / 2**23


def sample(logits, u, temperature=1.0, top_p=1.0):
    """Draw a token a row by inverse CDF: logits [B, V], u [B] in (0, 1) -> (token [B], logprob [B]).

    The log-probability is that under the distribution drawn from, temperature and top-p included (Holtzman et al. 2020);
    temperature 0 is greedy, and certain.

    >>> token, logprob = sample(torch.tensor([[0.0, 0.0]]), u=torch.tensor([0.7]))  # a fair coin, the upper half
    >>> token.item(), round(logprob.item(), 4)
    (1, -0.6931)
    """
    if temperature == 0:
        return logits.argmax(-1), torch.zeros_like(u)
    logits = logits.float() / temperature
    if top_p < 1:
        logits = keep_nucleus(logits, top_p)
    lse = logits.logsumexp(-1)
    cdf = (logits - lse[:, None]).exp_().cumsum(-1)  # [B, V]; each row is scanned in order, whatever the batch
    total = cdf[:, -1:].contiguous()
    token = torch.searchsorted(cdf, u[:, None] * total, right=True)  # the first place that exceeds u
    token = torch.minimum(token, torch.searchsorted(cdf, total))[:, 0]  # if u * total rounds up to total: the last possible
    return token, logits.gather(1, token[:, None])[:, 0] - lse


def keep_nucleus(logits, top_p):
    """Set to -inf all but the smallest set of most likely tokens whose probabilities reach top_p, [B, V] -> [B, V]."""
    probability, order = torch.sort(logits.softmax(-1), dim=-1, descending=True, stable=True)
    before = probability.cumsum(-1) - probability  # mass of the tokens that are likelier
    return logits.masked_fill((before >= top_p).scatter(1, order, before >= top_p), float("-inf"))


# ----------------------------------------------------------------------------------------------------------------------
# the cache


class KVCache:
    """Keys and values of up to `slots` rows of up to `capacity` tokens, [L, slots, K, capacity, E], and their lengths."""

    def __init__(self, model, slots, capacity):
        config, like = model.config, model.embed_tokens.weight
        shape = (config.layers, slots, config.kv_heads, capacity, config.head_dim)
        # zeros, not empty: what is not yet filled is masked out, but 0 x NaN would not be 0
        self.k, self.v = (torch.zeros(shape, dtype=like.dtype, device=like.device) for _ in range(2))
        self.windows = config.windows
        self.length = torch.zeros(0, dtype=torch.int64)  # [B] filled places of the live rows, which are slots 0 to B-1

    def admit(self, prompts):
        """Append rows; `prompts` is a list of (k, v), each [L, K, Tp, E], one a row."""
        first = len(self.length)
        for slot, (k, v) in enumerate(prompts, start=first):
            self.k[:, slot, :, : k.shape[2]], self.v[:, slot, :, : v.shape[2]] = k, v
        self.length = torch.cat((self.length, torch.tensor([k.shape[2] for k, _ in prompts])))

    def keep(self, rows):
        """Make row rows[i] the new row i. Only rows that change their slot are copied, and only what they have filled."""
        moved = (rows != torch.arange(len(rows))).nonzero()[:, 0]
        if len(moved):
            span = int(self.length[rows[moved]].max())
            for cache in (self.k, self.v):
                cache[:, moved, :, :span] = cache[:, rows[moved], :, :span]
        self.length = self.length[rows]

    def open_step(self):
        """Make room for one more token a row: where it goes, and who may see what."""
        device = self.k.device
        self.slot, self.place = torch.arange(len(self.length), device=device), self.length.to(device)
        self.span = int(self.length.max()) + 1
        key_at = torch.arange(self.span, device=device)
        ahead = key_at > self.place[:, None]  # [B, T]
        self.hidden = {w: ahead if w is None else ahead | (key_at <= self.place[:, None] - w) for w in set(self.windows)}
        self.length = self.length + 1

    def attend(self, layer, q, k, v):
        """One token a row against all of that row's keys: q [B, H, E], k and v [B, K, E] -> [B, H, E]."""
        self.k[layer, self.slot, :, self.place], self.v[layer, self.slot, :, self.place] = k, v
        keys, values = self.k[layer, : len(q), :, : self.span], self.v[layer, : len(q), :, : self.span]  # [B, K, T, E]
        grouped = q.unflatten(1, (keys.shape[1], -1)) / q.shape[-1] ** 0.5  # [B, K, H/K, E]: heads that share a key head
        scores = (grouped @ keys.transpose(-1, -2)).float()  # [B, K, H/K, T]
        scores.masked_fill_(self.hidden[self.windows[layer]][:, None, None], float("-inf"))
        return (scores.softmax(-1).to(values.dtype) @ values).flatten(1, 2)


def pad(prompts):
    """Lists of token ids -> (ids [Q, T], right-padded with zeros; lengths [Q])."""
    rows = [torch.tensor(prompt) for prompt in prompts]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), torch.tensor([len(row) for row in rows])


def prefill(model, prompts):
    """Run whole prompts (lists of ids): for each its keys and values ([L, K, Tp, E] twice) and next-token logits [V]."""
    device = model.embed_tokens.weight.device
    padded, lengths = pad(prompts)
    pack = Pack.prompts(padded, lengths, model.config.windows).to(device)
    keys, values = [], []

    def attend(layer, q, k, v):
        keys.append(k)
        values.append(v)
        return pack.attend(layer, q, k, v)

    last = model.hidden(pack.tokens, pack.positions, attend)[(lengths.cumsum(0) - 1).to(device)]  # [Q, D]
    split = [torch.stack(x).transpose(1, 2).split(lengths.tolist(), dim=2) for x in (keys, values)]  # [L, K, Tp, E] each
    return list(zip(zip(*split, strict=True), model.lm_head(last), strict=True))


def decode(model, cache, token):
    """One more token a row: the last tokens [B] -> next-token logits [B, V]."""
    cache.open_step()
    return model.lm_head(model.hidden(token, cache.place, cache.attend))


# ----------------------------------------------------------------------------------------------------------------------
# the engine


@torch.no_grad()
def generate(model, prompts, rows, *, max_new_tokens, temperature=1.0, top_p=1.0, eos_ids, seed, stream, step,
             budget_tokens=None):  # fmt: skip
    """Sample responses to `prompts` (lists of token ids) and return them as a Rollout, in the order of `rows`.

    rows: a list of (question, sample) pairs, question an index into prompts; or a number n, short for all pairs with
    sample < n. A response ends with any of eos_ids or after max_new_tokens. stream ("train" or "eval") and step tell the
    random numbers of one rollout from those of another. budget_tokens bounds the tokens whose keys and values are held
    at a time (None: all rows at once). Raises ValueError where training would learn from another distribution than it
    samples (top-p below 1, temperature 0), and where not even one row fits the budget.
    """
    if stream == "train" and (top_p < 1 or temperature == 0):
        raise ValueError(f"top_p {top_p}, temperature {temperature}: for evaluation only; the loss knows no truncated softmax")
    if isinstance(rows, int):
        rows = [(question, s) for question in range(len(prompts)) for s in range(rows)]
    capacity = max(len(prompts[question]) for question, _ in rows) + max_new_tokens
    slots = len(rows) if budget_tokens is None else min(len(rows), budget_tokens // capacity)
    if slots < 1:
        raise ValueError(f"a budget of {budget_tokens} tokens holds no row of {capacity} (prompt and new tokens)")
    device = model.embed_tokens.weight.device
    out = empty_rollout(prompts, rows, max_new_tokens)
    keys = row_keys(seed, stream, step, out.question, out.sample).to(device)
    eos = torch.tensor(sorted(eos_ids), device=device)

    cache = KVCache(model, slots, capacity)
    waiting, still_waiting = deque(range(len(rows))), Counter(question for question, _ in rows)
    prefilled = {}  # question -> ((k, v), logits), kept until its last waiting row has entered
    live = torch.zeros(0, dtype=torch.int64)  # [B] which row of `rows` each slot decodes
    token = torch.zeros(0, dtype=torch.int64, device=device)  # [B] the token each drew last
    while waiting or len(live):
        logits = [decode(model, cache, token)] if len(live) else []
        entering = [waiting.popleft() for _ in range(min(slots - len(live), len(waiting)))]
        if entering:
            questions = [rows[row][0] for row in entering]
            new = [q for q in dict.fromkeys(questions) if q not in prefilled]
            if new:
                prefilled.update(zip(new, prefill(model, [prompts[q] for q in new]), strict=True))
            cache.admit([prefilled[q][0] for q in questions])
            logits.append(torch.stack([prefilled[q][1] for q in questions]))
            live = torch.cat((live, torch.tensor(entering)))
            still_waiting.subtract(questions)
            prefilled = {q: held for q, held in prefilled.items() if still_waiting[q]}

        position = out.response_length[live]  # [B] of the token about to be drawn
        u = uniform(keys[live.to(device)], position.to(device))
        token, logprob = sample(torch.cat(logits), u, temperature, top_p)
        out.tokens[live, out.prompt_length[live] + position] = token.cpu()
        out.logprob[live, position] = logprob.cpu()
        out.response_length[live] += 1
        out.finished[live] = torch.isin(token, eos).cpu()

        going = ~out.finished[live] & (position + 1 < max_new_tokens)
        if not going.all():
            order = close_gaps(going)
            cache.keep(order)
            live, token = live[order], token[order.to(device)]
    longest = int(out.response_length.max())
    out.tokens = out.tokens[:, : int((out.prompt_length + out.response_length).max())].clone()
    out.logprob = out.logprob[:, :longest].clone()
    return out


def empty_rollout(prompts, rows, max_new_tokens):
    """A Rollout with its prompts filled in and room for every response."""
    question, sample_index = (torch.tensor(column) for column in zip(*rows, strict=True))
    padded, lengths = pad(prompts)
    prompt_length = lengths[question]
    width = int(prompt_length.max())
    tokens = torch.zeros(len(rows), width + max_new_tokens, dtype=torch.int64)
    tokens[:, :width] = padded[question, :width]
    logprob = torch.zeros(len(rows), max_new_tokens)
    return Rollout(question, sample_index, prompt_length, torch.zeros_like(question), tokens, logprob,
                   torch.zeros(len(rows), dtype=torch.bool))  # fmt: skip


def close_gaps(going):
    """The new order of the rows that go on: each keeps its slot but the last ones, which fill the gaps. [B] bool -> [B'].

    >>> close_gaps(torch.tensor([True, False, True, True])).tolist()
    [0, 3, 2]
    """
    count = int(going.sum())
    order = torch.arange(count)
    order[~going[:count]] = going.nonzero()[:, 0][int(going[:count].sum()) :]
    return order
