"""Batched sampling with a KV cache: prefill each question once, decode all its samples side by side.

A row is one sample of one question. `generate` moves every row through three states:

    WAITING    in a queue                                                        Scheduler.waiting
    RUNNING    in a slot of the KV cache; each step decodes one token per slot   Scheduler.running
    FINISHED   ended by an EOS token or by the length limit                      written to the Rollout

The running rows occupy the first slots without gaps: when some finish, the last rows move into their slots,
and waiting rows enter behind them. A response depends neither on its slot nor on its neighbours: its random
numbers are a hash of what it is (seed, stream, step, question, sample, position), not of when it ran.

Letters in shape comments: B rows, S slots, T tokens (Tp of a prompt), R response tokens, Q prompts, V
vocabulary, L layers, K key/value heads, E head width.
"""

from collections import deque
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch

from distributed.parallel import same_on_all
from kernels.cuda_graph import GraphCache, bucket, round_up
from kernels.kv_cache import KVCache
from kernels.packing import PREFILL_TOKENS, length_mask, pack_rows, pad
from kernels.sampler import row_keys, sample_tokens

POLL_EVERY = 8  # steps on a GPU between two polls; each poll makes the host wait for the device


@dataclass
class Rollout:
    """Sampled responses, one per row, on the CPU. Positions beyond a row's length are zero padding."""

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

    def response(self, row):
        """The token ids of one response, as a list."""
        start = int(self.prompt_length[row])
        return self.tokens[row, start : start + int(self.response_length[row])].tolist()

    def fill(self, row, tokens, logprob, eos_ids):
        """Write a response and its log-probabilities, [R] each, into a row."""
        start, length = int(self.prompt_length[row]), len(tokens)
        self.tokens[row, start : start + length] = tokens
        self.logprob[row, :length] = logprob
        self.response_length[row] = length
        self.finished[row] = int(tokens[-1]) in eos_ids

    def trim(self):
        """Cut off the columns that no row uses."""
        self.tokens = self.tokens[:, : int((self.prompt_length + self.response_length).max())].clone()
        self.logprob = self.logprob[:, : int(self.response_length.max())].clone()
        return self


def empty_rollout(prompts, rows, max_new_tokens):
    """A Rollout of the (question, sample) pairs `rows`: prompts filled in, with room for every response."""
    question, sample = (torch.tensor(column) for column in zip(*rows, strict=True))
    padded, lengths = pad(prompts)
    prompt_length = lengths[question]
    width = int(prompt_length.max())
    tokens = torch.zeros(len(rows), width + max_new_tokens, dtype=torch.int64)
    tokens[:, :width] = padded[question, :width]
    logprob, finished = torch.zeros(len(rows), max_new_tokens), torch.zeros(len(rows), dtype=torch.bool)
    return Rollout(question, sample, prompt_length, torch.zeros_like(question), tokens, logprob, finished)


@torch.no_grad()
def generate(model, prompts, rows, *, max_new_tokens, temperature=1.0, top_p=1.0, eos_ids, seed, stream, step,
             budget_tokens=None, engine=None, watch=lambda finished, tokens: False):  # fmt: skip
    """Sample responses to `prompts` (lists of token ids): a Rollout in the order of `rows`.

    rows: a list of (question, sample) pairs, question an index into prompts; or n for all with sample <
    n. A response ends with any of eos_ids or after max_new_tokens. stream ("train" or "eval") and step
    tell the random numbers of one rollout from those of another. budget_tokens bounds the tokens in the
    KV cache (None: all rows run at once); or reuse an `engine` of the same model, ends and lengths, with
    its slots and CUDA graphs. watch is called now and then with the numbers of finished responses and of
    sampled tokens; once it returns true, sampling ends and the rollout is not complete. Raises ValueError
    where training would learn from another distribution than it samples (top-p below 1, temperature 0), and
    if the engine or the budget do not fit.
    """
    if stream == "train" and (top_p < 1 or temperature == 0):
        how = f"top_p {top_p} and temperature {temperature} are for evaluation only"
        raise ValueError(f"{how}: training samples from the softmax that the loss computes")
    if isinstance(rows, int):
        rows = [(question, sample) for question in range(len(prompts)) for sample in range(rows)]
    longest = max(len(prompts[question]) for question, _ in rows) + max_new_tokens
    if engine is None:
        slots = len(rows) if budget_tokens is None else min(len(rows), budget_tokens // longest)
        engine = Engine(model, slots, longest, max_new_tokens, eos_ids)
    engine.check(model, longest, max_new_tokens, eos_ids)
    rollout = empty_rollout(prompts, rows, max_new_tokens)
    keys = row_keys(seed, stream, step, rollout.question, rollout.sample).to(engine.key.device)
    scheduler = Scheduler(engine, prompts, rollout, keys, temperature, top_p)
    while scheduler.finished < len(rollout):
        if same_on_all(model.group, torch.tensor(bool(watch(scheduler.finished, scheduler.tokens)))):
            break
        scheduler.admit()
        scheduler.decode()
        scheduler.finish()
    return rollout.trim()


class Scheduler:
    """One call of `generate`, on the host: moves rows from WAITING to RUNNING to FINISHED."""

    def __init__(self, engine, prompts, rollout, keys, temperature, top_p):
        self.engine, self.prompts, self.rollout, self.keys = engine, prompts, rollout, keys
        self.sampling = temperature, top_p
        self.questions = rollout.question.tolist()  # of each row
        self.waiting = deque(rollout.question.argsort(stable=True).tolist())  # question by question
        self.prefilled = {}  # {question: Prefilled}, until its last row has entered
        self.running = []  # the row in each slot
        self.context = 0  # positions that attention reads: those of the longest running row
        self.finished = self.tokens = 0  # responses that are finished; tokens sampled so far

    def admit(self):
        """WAITING -> RUNNING: let rows enter the free slots and sample their first tokens."""
        while self.waiting and len(self.running) < self.engine.slots:
            rows, new = self.next_rows(self.engine.slots - len(self.running))
            if new:
                prefilled = prefill(self.engine.model, [self.prompts[question] for question in new])
                self.prefilled.update(zip(new, prefilled, strict=True))
            prompts = [self.prefilled[self.questions[row]] for row in rows]
            self.engine.insert(len(self.running), prompts, self.keys[rows], *self.sampling)
            self.running += rows
            self.context = max(self.context, int(self.rollout.prompt_length[rows].max()) + 1)
            next_question = self.questions[self.waiting[0]] if self.waiting else None
            self.prefilled = {q: prompt for q, prompt in self.prefilled.items() if q == next_question}

    def next_rows(self, room):
        """Take up to `room` rows whose new prompts fit one prefill: (rows, questions to prefill)."""
        rows, new, tokens = [], [], 0
        while self.waiting and len(rows) < room:
            question = self.questions[self.waiting[0]]
            if question not in self.prefilled and question not in new:
                tokens += len(self.prompts[question])
                if new and tokens > PREFILL_TOKENS:
                    break
                new.append(question)
            rows.append(self.waiting.popleft())
        return rows, new

    def decode(self):
        """Decode until the next poll. Each step after the first reads one position more."""
        steps = self.engine.poll_every
        self.context = min(self.context + steps - 1, self.engine.capacity)
        self.engine.decode_steps(steps, len(self.running), self.context, *self.sampling)

    def finish(self):
        """RUNNING -> FINISHED: copy finished responses to the rollout, and close the gaps they leave."""
        count = len(self.running)
        alive, num_generated = self.engine.poll(count)
        if not alive.all():
            ended = (~alive).nonzero()[:, 0]
            tokens, logprob = self.engine.read(ended)
            for i, slot in enumerate(ended.tolist()):
                n = int(num_generated[slot])
                self.rollout.fill(self.running[slot], tokens[i, :n], logprob[i, :n], self.engine.eos_ids)
            order = fill_gaps(alive)
            self.engine.compact(order, count, self.context)
            self.running = [self.running[slot] for slot in order.tolist()]
            num_generated = num_generated[order]
        lengths = self.rollout.prompt_length[self.running] + num_generated
        self.context = int(lengths.max()) if self.running else 0
        self.finished = len(self.rollout) - len(self.waiting) - len(self.running)
        self.tokens = int(self.rollout.response_length.sum() + num_generated.sum())


def fill_gaps(alive):
    """The new order of the rows that continue: the last ones move into the gaps, [B] of bool -> [B'].

    >>> fill_gaps(torch.tensor([True, False, True, True])).tolist()
    [0, 3, 2]
    """
    count = int(alive.sum())
    order = torch.arange(count)
    order[~alive[:count]] = alive[count:].nonzero()[:, 0] + count
    return order


class Prefilled(NamedTuple):
    """A prompt that the model has read: what each of its samples starts from."""

    k: torch.Tensor  # [L, K, Tp, E]
    v: torch.Tensor  # [L, K, Tp, E]
    logits: torch.Tensor  # [V] of the first response token


def prefill(model, prompts):
    """Run whole prompts (lists of ids) in one batch: a Prefilled for each."""
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
    if cache.native:  # cpu/decode.c does the same
        return cache.native(decode, cache, token, position, context)
    cache.open_step(position, context)
    return model.next_token_logits(model.backbone(token, position, cache.attend_cached))


class Engine:
    """The slots on the device: their cache, what each has generated, and the step that decodes one token.

    A step never synchronises with the host and uses fixed addresses, so on a GPU it is captured as a CUDA
    graph, which stays valid when the weights are refreshed in place.
    """

    def __init__(self, model, slots, capacity, max_new_tokens, eos_ids):
        if slots < 1:
            raise ValueError(f"the budget holds no row of {capacity} tokens")
        device = model.embed_tokens.weight.device
        self.model, self.slots, self.capacity, self.max_new_tokens = model, slots, capacity, max_new_tokens
        self.cache = KVCache(model, slots, capacity)
        self.eos_ids = sorted(eos_ids)
        self.eos = torch.tensor(self.eos_ids, device=device)
        self.key = torch.zeros(slots, dtype=torch.int64, device=device)  # [S] of the random numbers
        self.alive = torch.zeros(slots, dtype=torch.bool, device=device)  # [S] not finished yet
        self.prompt_length = torch.ones(slots, dtype=torch.int64, device=device)  # [S]
        self.num_generated = torch.zeros(slots, dtype=torch.int64, device=device)  # [S] response tokens
        # Rows that finished since the last poll keep sampling, into a spare last column that nobody reads.
        self.tokens = torch.zeros(slots, max_new_tokens + 1, dtype=torch.int64, device=device)  # [S, R+1]
        self.logprob = torch.zeros(slots, max_new_tokens + 1, device=device)  # [S, R+1]
        self.graphs = GraphCache() if device.type == "cuda" else None
        self.poll_every = POLL_EVERY if self.graphs else 1  # a CPU has nothing to wait for

    def check(self, model, longest, max_new_tokens, eos_ids):
        """Raise ValueError, with the reasons, if this engine cannot serve such a call of `generate`."""
        asked = {"model": model, "number of new tokens": max_new_tokens, "set of EOS tokens": sorted(eos_ids)}
        built_for = (self.model, self.max_new_tokens, self.eos_ids)
        wrong = [name for name, own in zip(asked, built_for, strict=True) if own != asked[name]]
        wrong += [f"length (up to {self.capacity} tokens, not {longest})"] * (longest > self.capacity)
        if wrong:
            raise ValueError(f"the engine was built for another {' and another '.join(wrong)}")

    def insert(self, first, prompts, keys, temperature, top_p):
        """Put rows (Prefilled, keys [B]) into the slots from `first` on, and sample their first tokens."""
        slots = slice(first, first + len(prompts))
        self.key[slots], self.alive[slots], self.num_generated[slots] = keys, True, 0
        for slot, prompt in enumerate(prompts, start=first):
            self.cache.insert(slot, prompt.k, prompt.v)
            self.prompt_length[slot] = prompt.k.shape[2]
        self.sample(torch.stack([prompt.logits for prompt in prompts]), first, temperature, top_p)

    def decode_steps(self, steps, count, context, temperature, top_p):
        """Decode `steps` tokens for each of the first `count` slots, whose rows stay within `context`."""
        if self.graphs:
            context = self.capacity if self.cache.by_length else round_up(context, 256)
            count, context = bucket(count, self.slots), min(context, self.capacity)
        for _ in range(steps):
            if self.graphs:
                self.graphs.run(self.step, count, context, temperature, top_p)
            else:
                self.step(count, context, temperature, top_p)

    def step(self, count, context, temperature, top_p):
        """Run the newest token of each of the first `count` slots through the model and sample the next."""
        num_generated = self.num_generated[:count]
        token = self.tokens[:count].gather(1, (num_generated - 1).clamp(min=0)[:, None])[:, 0]
        position = self.prompt_length[:count] + num_generated - 1  # of that token, not yet in the cache
        logits = decode(self.model, self.cache, token, position, context)
        self.sample(logits, 0, temperature, top_p)

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

    def poll(self, count):
        """Wait for the device: alive and num_generated of the first `count` slots, [B] each, on the CPU."""
        alive, num_generated = torch.stack((self.alive[:count], self.num_generated[:count])).cpu()
        return alive.bool(), num_generated

    def read(self, slots):
        """The response tokens and log-probabilities of some slots, [G, R+1] each, on the CPU."""
        slots = slots.to(self.key.device)
        return self.tokens[slots].cpu(), self.logprob[slots].cpu()

    def compact(self, order, count, context):
        """Keep the slots `order` [B'] of the first `count`, in that order; only rows that move are copied."""
        target = (order != torch.arange(len(order))).nonzero()[:, 0]
        if len(target):
            source, target = order[target].to(self.key.device), target.to(self.key.device)
            self.cache.move(source, target, context)
            rows = self.key, self.alive, self.prompt_length, self.num_generated, self.tokens, self.logprob
            for state in rows:
                state[target] = state[source]
        self.alive[len(order) : count] = False
