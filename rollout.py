"""Batched sampling: prefill each question once, clone it to its samples, decode, retire what ended, refill.

Every few tokens the host polls which rows have ended: those are read out, the last rows move into the gaps,
and waiting rows enter behind them. A response does not depend on its slot or its neighbours: its random
numbers are a hash of what it is (seed, stream, step, question, sample, position), not of when it ran.

Letters in shape comments: B rows, T tokens, R response tokens, Q prompts.
"""

from collections import Counter, deque
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
import torch.nn.functional as F

from distributed.parallel import same_on_all
from kernels.attention import (
    attend_cached_triton,
    flash_available,
    flash_cached,
    sdpa_one_query,
    triton_available,
)
from kernels.cuda_graph import GraphCache
from kernels.packing import PREFILL_TOKENS, length_mask, pack_rows, pad
from kernels.sampler import fold_in, sample_tokens

POLL_EVERY = 8  # tokens that a GPU samples between two polls, each of which makes the host wait for it


class KVCache:
    """Keys and values of up to `slots` rows of up to `capacity` tokens, [L, S, K, T, E] each."""

    def __init__(self, model, slots, capacity):
        config, weight = model.config, model.embed_tokens.weight
        self.windows = config.windows
        self.flash = flash_available(weight.dtype, config.head_dim)
        self.by_length = self.flash or triton_available(weight)  # reads only what is filled, needs no mask
        inner = (capacity, config.kv_heads) if self.flash else (config.kv_heads, capacity)
        shape = (config.layers, slots, *inner, config.head_dim)
        # zeros, not empty: what is not filled yet is masked out, but 0 x NaN would not be 0
        self.k = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        self.v = torch.zeros_like(self.k)
        if self.flash:  # it wants [S, T, K, E] in memory; we index [S, K, T, E] all the same
            self.k, self.v = self.k.transpose(2, 3), self.v.transpose(2, 3)

    def insert(self, slot, k, v):
        """Copy a prompt, k and v [L, K, Tp, E], into a slot."""
        self.k[:, slot, :, : k.shape[2]] = k
        self.v[:, slot, :, : v.shape[2]] = v

    def move(self, source, target, length):
        """Copy the first `length` tokens of the slots `source` [G] over those of `target` [G]."""
        for layer in (*self.k, *self.v):  # one at a time: what is gathered stays small
            layer[target, :, :length] = layer[source, :, :length]

    def open_step(self, position, context):
        """Where the next token of each of the first B slots goes: position [B], all below `context`."""
        if self.by_length:
            self.length = position.to(torch.int32)
            return
        self.position, self.context = position, context
        self.slot = torch.arange(len(position), device=position.device)
        key_at, self.bias = torch.arange(context, device=position.device), {}
        for window in set(self.windows):
            seen = key_at <= position[:, None]  # [B, T]
            if window is not None:
                seen &= key_at > position[:, None] - window
            bias = torch.zeros_like(seen, dtype=self.k.dtype).masked_fill_(~seen, float("-inf"))
            self.bias[window] = bias[:, None, None]  # [B, 1, 1, T]

    def attend_cached(self, layer, q, k, v):
        """Store one token per row and attend from it: q [B, H, E], k and v [B, K, E] -> [B, H, E]."""
        keys, values, window = self.k[layer, : len(q)], self.v[layer, : len(q)], self.windows[layer]
        if self.flash:
            keys, values = keys.transpose(1, 2), values.transpose(1, 2)  # [B, T, K, E]
            return flash_cached(q, k, v, keys, values, self.length, window)
        if self.by_length:
            return attend_cached_triton(q, k, v, keys, values, self.length, window)
        keys[self.slot, :, self.position] = k
        values[self.slot, :, self.position] = v
        keys, values = keys[:, :, : self.context], values[:, :, : self.context]
        return sdpa_one_query(q, keys, values, self.bias[window])


class Prefilled(NamedTuple):
    """A prompt that the model has read: what each of its samples starts from."""

    k: torch.Tensor  # [L, K, Tp, E]
    v: torch.Tensor  # [L, K, Tp, E]
    logits: torch.Tensor  # [V] of the first response token


def prefill(model, prompts):
    """Run whole prompts (lists of ids) at once: a Prefilled for each."""
    device = model.embed_tokens.weight.device
    padded, lengths = pad(prompts)
    batch = pack_rows(padded, lengths, model.config.windows).to(device)
    keys, values = [], []

    def attend_and_record(layer, q, k, v):
        keys.append(k.clone())  # k and v are views: kept as they are, they would keep all q alive too
        values.append(v.clone())
        return batch.attend_packed(layer, q, k, v)

    hidden = model.backbone(batch.tokens, batch.positions, attend_and_record)  # [T, D]
    last = lengths.cumsum(0) - 1  # [Q] the last token of each prompt
    logits = model.next_token_logits(hidden[last.to(device)])  # [Q, V]
    k, v = torch.stack(keys).transpose(1, 2), torch.stack(values).transpose(1, 2)  # [L, K, T, E]
    sizes = lengths.tolist()
    return [Prefilled(*parts) for parts in zip(k.split(sizes, 2), v.split(sizes, 2), logits, strict=True)]


def decode(model, cache, token, position, context):
    """One more token per row: tokens [B] at positions [B] below `context` -> next-token logits [B, V]."""
    cache.open_step(position, context)
    return model.next_token_logits(model.backbone(token, position, cache.attend_cached))


class Engine:
    """Slots in which rows are decoded: the cache, what each row has generated, and the step of one token."""

    def __init__(self, model, slots, capacity, max_new_tokens, eos_ids):
        device = model.embed_tokens.weight.device
        self.model, self.slots, self.capacity, self.max_new_tokens = model, slots, capacity, max_new_tokens
        self.cache = KVCache(model, slots, capacity)
        self.eos_ids = sorted(eos_ids)
        self.eos = torch.tensor(self.eos_ids, device=device)
        self.key = torch.zeros(slots, dtype=torch.int64, device=device)  # [S] of the random numbers
        self.alive = torch.zeros(slots, dtype=torch.bool, device=device)  # [S] not ended yet
        self.prompt_length = torch.ones(slots, dtype=torch.int64, device=device)  # [S]
        self.num_generated = torch.zeros(slots, dtype=torch.int64, device=device)  # [S] response tokens
        # Rows that ended since the last poll go on sampling, into the spare last column, which nobody reads.
        self.tokens = torch.zeros(slots, max_new_tokens + 1, dtype=torch.int64, device=device)  # [S, R+1]
        self.logprob = torch.zeros(slots, max_new_tokens + 1, device=device)  # [S, R+1]
        on_gpu = device.type == "cuda"
        self.poll_every = POLL_EVERY if on_gpu else 1  # a CPU has nothing to wait for
        self.graphs = GraphCache() if on_gpu else None

    def insert(self, first, prompts, keys, temperature, top_p):
        """Put rows (Prefilled, keys [B]) into the slots from `first` on, and sample their first tokens."""
        slots = slice(first, first + len(prompts))
        self.key[slots] = keys
        self.alive[slots] = True
        self.num_generated[slots] = 0
        for slot, prompt in enumerate(prompts, start=first):
            self.cache.insert(slot, prompt.k, prompt.v)
            self.prompt_length[slot] = prompt.k.shape[2]
        self.sample(torch.stack([prompt.logits for prompt in prompts]), first, temperature, top_p)

    def sample(self, logits, first, temperature, top_p):
        """Sample a token for each of the slots from `first` on: logits [B, V]."""
        slots = slice(first, first + len(logits))
        alive, num_generated = self.alive[slots], self.num_generated[slots]  # views, updated in place
        token, logprob = sample_tokens(logits, self.key[slots], num_generated, temperature, top_p)
        token = same_on_all(self.model.group, token)
        column = torch.where(alive, num_generated, self.max_new_tokens)[:, None]
        self.tokens[slots].scatter_(1, column, token[:, None])
        self.logprob[slots].scatter_(1, column, logprob[:, None])
        num_generated += alive
        alive &= (token[:, None] != self.eos).all(1) & (num_generated < self.max_new_tokens)

    def step(self, count, context, temperature, top_p):
        """Decode and sample a token for each of the first `count` slots, whose rows are below `context`."""
        num_generated = self.num_generated[:count]
        last = (num_generated - 1).clamp(min=0)
        token = self.tokens[:count].gather(1, last[:, None])[:, 0]
        position = self.prompt_length[:count] + num_generated - 1  # of that token, not yet in the cache
        logits = decode(self.model, self.cache, token, position, context)
        self.sample(logits, 0, temperature, top_p)

    def decode_steps(self, steps, count, context, temperature, top_p):
        """`steps` more tokens for each of the first `count` slots, whose rows stay within `context`."""
        for _ in range(steps):
            if self.graphs is None:
                self.step(count, context, temperature, top_p)
            else:
                self.graphs.run(self.step, *self.bucket(count, context), temperature, top_p)

    def bucket(self, count, context):
        """Round a step's shape up to one of few, which have graphs. Spare slots sample what nobody reads."""
        count = next(size for size in (1, 2, 4, 8, round_up(count, 16)) if size >= count)
        context = self.capacity if self.cache.by_length else round_up(context, 256)
        return min(count, self.slots), min(context, self.capacity)

    def poll(self, count):
        """Wait for the device: alive and num_generated of the first `count` slots, [B] each, on the CPU."""
        alive, num_generated = torch.stack((self.alive[:count], self.num_generated[:count])).cpu()
        return alive.bool(), num_generated

    def read(self, slots):
        """The response tokens and log-probabilities of some slots, [G, R+1] each, on the CPU."""
        slots = slots.to(self.key.device)
        return self.tokens[slots].cpu(), self.logprob[slots].cpu()

    def compact(self, order, count, context):
        """Of the first `count` slots keep `order` [B'], in that order, copying only what changes slots."""
        target = (order != torch.arange(len(order))).nonzero()[:, 0]
        if len(target):
            source, target = order[target].to(self.key.device), target.to(self.key.device)
            self.cache.move(source, target, context)
            for state in (self.key, self.alive, self.prompt_length, self.num_generated):
                state[target] = state[source]
            for response in (self.tokens, self.logprob):
                response[target] = response[source]
        self.alive[len(order) : count] = False


def round_up(number, multiple):
    return -(-number // multiple) * multiple


# What is random for one of these reasons shares no number with another: the responses of training and of
# evaluation, the coins of --reward random, the order of the questions.
STREAMS = {"train": 0, "eval": 1, "reward": 2, "draw": 3}


@dataclass
class Rollout:
    """Sampled responses, one per row, on the CPU. What lies past a row's length is zero and means nothing."""

    question: torch.Tensor  # [B] index into the prompts
    sample: torch.Tensor  # [B] which of the question's samples
    prompt_length: torch.Tensor  # [B]
    response_length: torch.Tensor  # [B] an end-of-sequence token is part of the response
    tokens: torch.Tensor  # [B, T] prompt, then response
    logprob: torch.Tensor  # [B, R] of each response token under the distribution that it was sampled from
    finished: torch.Tensor  # [B] ended by an end-of-sequence token; False: truncated at max_new_tokens

    def __len__(self):
        return len(self.question)

    def __getitem__(self, rows):
        """The rows of an index or mask, as a Rollout."""
        return Rollout(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    def mask(self):
        """[B, R] True at response tokens, R the longest response: from lengths, so a final EOS counts."""
        return length_mask(self.response_length)

    def fill(self, row, tokens, logprob, eos_ids):
        """Write a response and its log-probabilities, [R] each, into a row."""
        start, length = int(self.prompt_length[row]), len(tokens)
        self.tokens[row, start : start + length] = tokens
        self.logprob[row, :length] = logprob
        self.response_length[row] = length
        self.finished[row] = int(tokens[-1]) in eos_ids

    def response(self, row):
        """The token ids of one response, as a list."""
        start = int(self.prompt_length[row])
        return self.tokens[row, start : start + int(self.response_length[row])].tolist()

    def trim(self):
        """Cut off the columns that no row uses."""
        longest, longest_response = self.prompt_length + self.response_length, self.response_length.max()
        self.tokens = self.tokens[:, : int(longest.max())].clone()
        self.logprob = self.logprob[:, : int(longest_response)].clone()
        return self


def empty_rollout(prompts, rows, max_new_tokens):
    """A Rollout of the (question, sample) pairs `rows`: prompts filled in, and room for every response."""
    question, sample = (torch.tensor(column) for column in zip(*rows, strict=True))
    padded, lengths = pad(prompts)
    prompt_length = lengths[question]
    width = int(prompt_length.max())
    tokens = torch.zeros(len(rows), width + max_new_tokens, dtype=torch.int64)
    tokens[:, :width] = padded[question, :width]
    logprob, finished = torch.zeros(len(rows), max_new_tokens), torch.zeros(len(rows), dtype=torch.bool)
    return Rollout(question, sample, prompt_length, torch.zeros_like(question), tokens, logprob, finished)


def row_keys(seed, stream, step, question, sample):
    """The random key of each row, [B] of int64, from everything that names the row except the position."""
    key = torch.zeros_like(question)
    for counter in (seed, STREAMS[stream], step, question, sample):
        key = fold_in(key, counter)
    return key


@torch.no_grad()
def generate(model, prompts, rows, *, max_new_tokens, temperature=1.0, top_p=1.0, eos_ids, seed, stream, step,
             budget_tokens=None, engine=None):  # fmt: skip
    """Sample responses to `prompts` (lists of token ids): a Rollout in the order of `rows`.

    rows: a list of (question, sample) pairs, question an index into prompts; or a number n, short for all
    pairs with sample < n. A response ends with any of eos_ids or after max_new_tokens. stream ("train" or
    "eval") and step tell the random numbers of one rollout from those of another. budget_tokens bounds the
    tokens whose keys and values are held at a time (None: all rows at once). An `engine` made for this model,
    these ends and lengths is used again, with its CUDA graphs. Raises ValueError where training would learn
    from another distribution than it samples (top-p below 1, temperature 0), where not even one row fits the
    budget, and for an engine that was made for something else or holds more than the budget.
    """
    if stream == "train" and (top_p < 1 or temperature == 0):
        how = f"top_p {top_p}, temperature {temperature}"
        raise ValueError(
            f"{how}: for evaluation only; training samples from the softmax that the loss computes"
        )
    if isinstance(rows, int):
        rows = [(question, sample) for question in range(len(prompts)) for sample in range(rows)]
    longest = max(len(prompts[question]) for question, _ in rows) + max_new_tokens
    if engine is None:
        slots = slots_within(budget_tokens, len(rows), longest)
        engine = Engine(model, slots, longest, max_new_tokens, eos_ids)
    check_engine(engine, model, longest, max_new_tokens, eos_ids, budget_tokens)
    rollout = empty_rollout(prompts, rows, max_new_tokens)
    keys = row_keys(seed, stream, step, rollout.question, rollout.sample).to(engine.key.device)
    scheduler = Scheduler(engine, prompts, rollout, keys, eos_ids, temperature, top_p)
    while scheduler.waiting or len(scheduler.running):
        scheduler.refill()
        scheduler.decode()
        scheduler.retire()
    return rollout.trim()


def slots_within(budget_tokens, num_rows, longest):
    """How many rows of `longest` tokens to decode at a time. Raises ValueError if the budget holds none."""
    if budget_tokens is None:
        return num_rows
    if budget_tokens < longest:
        raise ValueError(
            f"a budget of {budget_tokens} tokens holds no row of {longest} (prompt and new tokens)"
        )
    return min(num_rows, budget_tokens // longest)


def check_engine(engine, model, longest, max_new_tokens, eos_ids, budget_tokens):
    """Raise ValueError, with what is wrong, for an engine that `generate` cannot use as it is asked to."""
    held, new = engine.slots * engine.capacity, engine.max_new_tokens
    over = budget_tokens is not None and held > budget_tokens
    wrong = {
        "is of another model": engine.model is not model,
        "ends responses at other tokens": engine.eos_ids != sorted(eos_ids),
        f"samples {new} new tokens, not {max_new_tokens}": new != max_new_tokens,
        f"holds rows of {engine.capacity} tokens, not {longest}": engine.capacity < longest,
        f"holds {held} tokens, over the budget of {budget_tokens}": over,
    }
    if any(wrong.values()):
        raise ValueError(f"the engine {', '.join(what for what, so in wrong.items() if so)}")


class Scheduler:
    """One call of `generate`: which rows wait, which run and in which slot, and how far these are."""

    def __init__(self, engine, prompts, rollout, keys, eos_ids, temperature, top_p):
        self.engine, self.prompts = engine, prompts
        self.rollout, self.keys, self.eos_ids = rollout, keys, eos_ids
        self.sampling = temperature, top_p
        self.questions = rollout.question.tolist()  # of each row
        self.waiting = deque(range(len(rollout)))  # rows
        self.waiting_for = Counter(self.questions)  # question -> how many of its rows wait
        self.prefilled = {}  # question -> Prefilled, kept until its last waiting row has entered
        self.running = torch.zeros(0, dtype=torch.int64)  # [B] the row in each slot
        self.num_generated = torch.zeros(0, dtype=torch.int64)  # [B] at the last poll
        self.context = 0  # no running row is longer

    def refill(self):
        """Let waiting rows enter the free slots and sample their first tokens."""
        while self.waiting and len(self.running) < self.engine.slots:
            entering, new = self.next_to_enter(self.engine.slots - len(self.running))
            if new:
                prefilled = prefill(self.engine.model, [self.prompts[question] for question in new])
                self.prefilled.update(zip(new, prefilled, strict=True))
            questions = [self.questions[row] for row in entering]
            prompts = [self.prefilled[question] for question in questions]
            self.engine.insert(len(self.running), prompts, self.keys[entering], *self.sampling)
            self.running = torch.cat((self.running, torch.tensor(entering)))
            self.num_generated = F.pad(self.num_generated, (0, len(entering)), value=1)
            self.waiting_for.subtract(questions)
            self.prefilled = {q: prompt for q, prompt in self.prefilled.items() if self.waiting_for[q]}

    def next_to_enter(self, room):
        """Take up to `room` waiting rows whose new prompts make one prefill: (rows, questions to prefill)."""
        entering, new, tokens = [], [], 0
        while self.waiting and len(entering) < room:
            question = self.questions[self.waiting[0]]
            if question not in self.prefilled and question not in new:
                tokens += len(self.prompts[question])
                if new and tokens > PREFILL_TOKENS:
                    break
                new.append(question)
            entering.append(self.waiting.popleft())
        return entering, new

    def decode(self):
        """Decode up to the next poll, but no further than the row that may go on the longest."""
        steps = min(self.engine.poll_every, self.engine.max_new_tokens - int(self.num_generated.min()))
        longest = int((self.rollout.prompt_length[self.running] + self.num_generated).max())
        self.context = longest + max(steps, 1) - 1
        self.engine.decode_steps(steps, len(self.running), self.context, *self.sampling)

    def retire(self):
        """Write the responses that have ended into the rollout, and move the last rows into the gaps."""
        count = len(self.running)
        alive, self.num_generated = self.engine.poll(count)
        if alive.all():
            return
        ended = (~alive).nonzero()[:, 0]
        lengths = self.num_generated[ended]
        tokens, logprobs = self.engine.read(ended)
        for i, row in enumerate(self.running[ended]):
            length = int(lengths[i])
            self.rollout.fill(row, tokens[i, :length], logprobs[i, :length], self.eos_ids)
        order = fill_gaps(alive)
        self.engine.compact(order, count, self.context)
        self.running, self.num_generated = self.running[order], self.num_generated[order]


def fill_gaps(alive):
    """The new order of the rows that go on: the last ones move into the gaps, [B] of bool -> [B'].

    >>> fill_gaps(torch.tensor([True, False, True, True])).tolist()
    [0, 3, 2]
    """
    count = int(alive.sum())
    order = torch.arange(count)
    order[~alive[:count]] = alive[count:].nonzero()[:, 0] + count
    return order
