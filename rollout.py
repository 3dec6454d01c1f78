"""Batched sampling with a KV cache: prefill each question once, clone it to its samples, decode, drop finished rows, refill.

The rows being decoded lie without gaps in the first slots of an `Engine`. Every few tokens the host looks which of them
have ended: those leave, the last rows move into the gaps, and waiting rows enter behind them. Nothing about a response
depends on which slot it sits in or who its neighbours are: its random numbers are a hash of what it is (seed, stream,
step, question, sample, position), not of when it ran.

On a GPU a step is replayed as a CUDA graph, and attends by flash-attn where that is installed. The rest is the same.

Letters in shape comments: B rows, S slots, T tokens, R response tokens, V vocabulary, L layers, H heads, K key/value heads,
E head width.
"""

from collections import Counter, deque
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F

from kernels.sampler import draw, fold
from model import Pack, flash_takes, ragged

try:
    from flash_attn import flash_attn_with_kvcache
except ImportError:  # an optional package, of CUDA only
    flash_attn_with_kvcache = None

STREAMS = {"train": 0, "eval": 1}  # evaluation never shares its random numbers with training
LOOK_EVERY = 8  # tokens that a GPU draws between two looks at which rows have ended: each look makes it wait for the host
PREFILL_TOKENS = 8192  # of the prompts that are run at once


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

    def fill(self, row, tokens, logprob, eos_ids):
        """Put a response and its log-probabilities, [R] both, into a row."""
        start, length = int(self.prompt_length[row]), len(tokens)
        self.tokens[row, start : start + length], self.logprob[row, :length] = tokens, logprob
        self.response_length[row], self.finished[row] = length, int(tokens[-1]) in eos_ids

    def response(self, row):
        """The token ids of one response, as a list."""
        start = int(self.prompt_length[row])
        return self.tokens[row, start : start + int(self.response_length[row])].tolist()


def row_keys(seed, stream, step, question, sample):
    """The random key of each row, [B] of int64, from everything that names the row but the position."""
    key = torch.zeros_like(question)
    for counter in (seed, STREAMS[stream], step, question, sample):
        key = fold(key, counter)
    return key


# ----------------------------------------------------------------------------------------------------------------------
# the cache


class KVCache:
    """Keys and values of up to `slots` rows of up to `capacity` tokens, [L, S, K, T, E] each."""

    def __init__(self, model, slots, capacity):
        config, like = model.config, model.embed_tokens.weight
        self.flash = flash_takes(flash_attn_with_kvcache, like.dtype, config.head_dim)
        self.windows, self.capacity = config.windows, capacity
        inner = (capacity, config.kv_heads) if self.flash else (config.kv_heads, capacity)
        # zeros, not empty: what is not yet filled is masked out, but 0 x NaN would not be 0
        shape = (2, config.layers, slots, *inner, config.head_dim)
        self.k, self.v = torch.zeros(shape, dtype=like.dtype, device=like.device)
        if self.flash:  # it wants [S, T, K, E] in memory; the rest of this file indexes [S, K, T, E] all the same
            self.k, self.v = self.k.transpose(2, 3), self.v.transpose(2, 3)

    def admit(self, slot, k, v):
        """Clone a prompt, k and v [L, K, Tp, E], into a slot."""
        self.k[:, slot, :, : k.shape[2]], self.v[:, slot, :, : v.shape[2]] = k, v

    def move(self, source, target, span):
        """Copy the first `span` places of the slots `source` [G] over those of `target` [G]."""
        for layer in (*self.k, *self.v):  # one at a time: what is gathered stays small
            layer[target, :, :span] = layer[source, :, :span]

    def open_step(self, place, span):
        """Say where the next token of each of the first B slots goes, place [B] below `span`: it sees what lies up to there."""
        self.place, self.span, self.slot = place, span, torch.arange(len(place), device=place.device)
        if self.flash:  # masks by length itself
            self.length = place.to(torch.int32)
            return
        key_at, self.bias = torch.arange(span, device=place.device), {}
        for window in set(self.windows):
            seen = key_at <= place[:, None]  # [B, T]
            if window is not None:
                seen &= key_at > place[:, None] - window
            self.bias[window] = torch.zeros_like(seen, dtype=self.k.dtype).masked_fill_(~seen, float("-inf"))[:, None, None]

    def attend(self, layer, q, k, v):
        """Put one token a row in its place and attend from it: q [B, H, E], k and v [B, K, E] -> [B, H, E]."""
        keys, values, window = self.k[layer, : len(q)], self.v[layer, : len(q)], self.windows[layer]
        if self.flash:  # takes [B, T, K, E] of the full capacity, and reads of it what is filled
            window_size = (-1, -1) if window is None else (window - 1, 0)
            keys, values = keys.transpose(1, 2), values.transpose(1, 2)
            options = dict(cache_seqlens=self.length, causal=True, window_size=window_size)
            return flash_attn_with_kvcache(q[:, None], keys, values, k[:, None], v[:, None], **options)[:, 0]
        keys[self.slot, :, self.place], values[self.slot, :, self.place] = k, v
        grouped = q.unflatten(1, (k.shape[1], -1))  # [B, K, H/K, E]: heads that share keys are like queries of one head
        span = slice(self.span)
        return F.scaled_dot_product_attention(grouped, keys[:, :, span], values[:, :, span], self.bias[window]).flatten(1, 2)


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


def decode(model, cache, token, place, span):
    """One more token a row: the last tokens [B], which stand at place [B] below `span` -> next-token logits [B, V]."""
    cache.open_step(place, span)
    return model.lm_head(model.hidden(token, place, cache.attend))


# ----------------------------------------------------------------------------------------------------------------------
# the engine


class Engine:
    """Slots in which rows are decoded, on the model's device: the cache, what each row has drawn, and the step that draws.

    A step reads and writes tensors that stay at their addresses, and asks the host for nothing. So on a GPU it can be
    captured as a CUDA graph and replayed, also after the weights have been refreshed in place.
    """

    def __init__(self, model, slots, capacity, max_new_tokens, eos_ids):
        device = model.embed_tokens.weight.device
        self.model, self.slots, self.capacity, self.max_new_tokens = model, slots, capacity, max_new_tokens
        self.cache = KVCache(model, slots, capacity)
        self.eos = torch.tensor(sorted(eos_ids), device=device)
        self.key = torch.zeros(slots, dtype=torch.int64, device=device)  # [S] of the random numbers
        self.going = torch.zeros(slots, dtype=torch.bool, device=device)  # [S] not ended yet
        self.prompt_length = torch.ones(slots, dtype=torch.int64, device=device)  # [S]
        self.drawn = torch.zeros(slots, dtype=torch.int64, device=device)  # [S] response tokens so far
        # The last column takes what rows draw that have ended since the last look; nobody reads it.
        self.tokens = torch.zeros(slots, max_new_tokens + 1, dtype=torch.int64, device=device)  # [S, R+1] of the response
        self.logprob = torch.zeros(slots, max_new_tokens + 1, device=device)  # [S, R+1]
        cuda = device.type == "cuda"
        self.look_every = LOOK_EVERY if cuda else 1  # a CPU has nothing to wait for
        self.graphs = {} if cuda else None  # shape of a step -> its graph
        self.graph_memory = torch.cuda.graph_pool_handle() if cuda else None

    def admit(self, first, prefilled, keys, temperature, top_p):
        """Let rows enter the slots from `first` on and draw their first tokens; prefilled: ((k, v), logits) of each, keys [B]."""
        here = slice(first, first + len(prefilled))
        self.key[here], self.going[here], self.drawn[here] = keys, True, 0
        for slot, ((k, v), _) in enumerate(prefilled, start=first):
            self.cache.admit(slot, k, v)
            self.prompt_length[slot] = k.shape[2]
        self.draw(torch.stack([logits for _, logits in prefilled]), first, temperature, top_p)

    def draw(self, logits, first, temperature, top_p):
        """Draw a token for the slots from `first` on: logits [B, V]."""
        here = slice(first, first + len(logits))
        going, drawn = self.going[here], self.drawn[here]  # views, updated in place
        token, logprob = draw(logits, self.key[here], drawn, temperature, top_p)
        column = torch.where(going, drawn, self.max_new_tokens)[:, None]
        self.tokens[here].scatter_(1, column, token[:, None])
        self.logprob[here].scatter_(1, column, logprob[:, None])
        drawn += going
        going &= (token[:, None] != self.eos).all(1) & (drawn < self.max_new_tokens)

    def step(self, count, span, temperature, top_p):
        """Decode and draw one token for each of the first `count` slots, whose rows are all shorter than `span`."""
        drawn = self.drawn[:count]
        token = self.tokens[:count].gather(1, (drawn - 1).clamp(min=0)[:, None])[:, 0]
        place = self.prompt_length[:count] + drawn - 1  # of that last token, which the cache does not have yet
        self.draw(decode(self.model, self.cache, token, place, span), 0, temperature, top_p)

    def advance(self, steps, count, span, temperature, top_p):
        """`steps` tokens more for each of the first `count` slots, whose rows stay within `span`."""
        if self.graphs is None:
            for _ in range(steps):
                self.step(count, span, temperature, top_p)
            return
        shape = (*self.rung(count, span), temperature, top_p)
        for _ in range(steps):
            if shape not in self.graphs:  # the first of its shape runs as it is, which warms up the libraries
                self.graphs[shape] = None
                self.step(*shape)
                continue
            self.graphs[shape] = self.graphs[shape] or capture(lambda: self.step(*shape), self.graph_memory)
            self.graphs[shape]()

    def rung(self, count, span):
        """The next larger shape that gets a graph: slots without a going row take part, and draw what nobody reads."""
        count = 1 << (count - 1).bit_length() if count <= 16 else -(-count // 16) * 16
        span = self.capacity if self.cache.flash else -(-span // 256) * 256  # flash-attn reads only what is filled anyway
        return min(count, self.slots), min(span, self.capacity)

    def look(self, count):
        """Wait for the device: which of the first `count` slots are going, and what each has drawn, [B] both, on the CPU."""
        going, drawn = torch.stack((self.going[:count], self.drawn[:count])).cpu()
        return going.bool(), drawn

    def read(self, slots):
        """The response tokens and log-probabilities of some slots, [G, R+1] both, on the CPU."""
        slots = slots.to(self.key.device)
        return self.tokens[slots].cpu(), self.logprob[slots].cpu()

    def keep(self, order, count, span):
        """Of the first `count` slots keep those of `order` [B'], in that order; only what changes its slot is copied."""
        target = (order != torch.arange(len(order))).nonzero()[:, 0]
        if len(target):
            source, target = order[target].to(self.key.device), target.to(self.key.device)
            self.cache.move(source, target, span)
            for state in (self.key, self.going, self.prompt_length, self.drawn, self.tokens, self.logprob):
                state[target] = state[source]
        self.going[len(order) : count] = False


def capture(action, memory):
    """Capture `action` as a CUDA graph: each call of what is returned launches the same kernels again, in one go.

    Graphs may compute in the same memory: a single one runs at a time, and nobody reads what it leaves there.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=memory, capture_error_mode="thread_local"):  # NCCL's watchdog is another thread
        action()
    return graph.replay


@torch.no_grad()
def generate(model, prompts, rows, *, max_new_tokens, temperature=1.0, top_p=1.0, eos_ids, seed, stream, step,
             budget_tokens=None, engine=None):  # fmt: skip
    """Sample responses to `prompts` (lists of token ids) and return them as a Rollout, in the order of `rows`.

    rows: a list of (question, sample) pairs, question an index into prompts; or a number n, short for all pairs with
    sample < n. A response ends with any of eos_ids or after max_new_tokens. stream ("train" or "eval") and step tell the
    random numbers of one rollout from those of another. budget_tokens bounds the tokens whose keys and values are held
    at a time (None: all rows at once); or an `engine` made for this model, these ends and lengths is used again, with
    its CUDA graphs. Raises ValueError where training would learn from another distribution than it samples (top-p below
    1, temperature 0), and where not even one row fits the budget.
    """
    if stream == "train" and (top_p < 1 or temperature == 0):
        raise ValueError(f"top_p {top_p}, temperature {temperature}: for evaluation only; the loss knows no truncated softmax")
    if isinstance(rows, int):
        rows = [(question, s) for question in range(len(prompts)) for s in range(rows)]
    capacity = max(len(prompts[question]) for question, _ in rows) + max_new_tokens
    if engine is None:
        slots = len(rows) if budget_tokens is None else min(len(rows), budget_tokens // capacity)
        if slots < 1:
            raise ValueError(f"a budget of {budget_tokens} tokens holds no row of {capacity} (prompt and new tokens)")
        engine = Engine(model, slots, capacity, max_new_tokens, eos_ids)
    assert engine.model is model and engine.max_new_tokens == max_new_tokens and engine.capacity >= capacity
    out = empty_rollout(prompts, rows, max_new_tokens)
    keys = row_keys(seed, stream, step, out.question, out.sample).to(engine.key.device)

    waiting, still_waiting = deque(range(len(rows))), Counter(question for question, _ in rows)
    prefilled = {}  # question -> ((k, v), logits), kept until its last waiting row has entered
    live, drawn = torch.zeros(2, 0, dtype=torch.int64)  # [B] which row of `rows` each slot decodes, and how far it is
    while waiting or len(live):
        while waiting and len(live) < engine.slots:
            entering, new = next_to_enter(waiting, engine.slots - len(live), prompts, rows, prefilled)
            if new:
                prefilled.update(zip(new, prefill(model, [prompts[q] for q in new]), strict=True))
            engine.admit(len(live), [prefilled[rows[row][0]] for row in entering], keys[entering], temperature, top_p)
            live, drawn = torch.cat((live, torch.tensor(entering))), F.pad(drawn, (0, len(entering)), value=1)
            still_waiting.subtract(rows[row][0] for row in entering)
            prefilled = {q: held for q, held in prefilled.items() if still_waiting[q]}

        steps = min(engine.look_every, max_new_tokens - int(drawn.min()))
        span = int((out.prompt_length[live] + drawn).max()) + max(steps, 1) - 1
        engine.advance(steps, len(live), span, temperature, top_p)
        going, drawn = engine.look(len(live))
        if not going.all():
            ended = (~going).nonzero()[:, 0]
            for row, length, tokens, logprob in zip(live[ended], drawn[ended], *engine.read(ended), strict=True):
                out.fill(row, tokens[:length], logprob[:length], eos_ids)
            order = close_gaps(going)
            engine.keep(order, len(live), span)
            live, drawn = live[order], drawn[order]
    out.tokens = out.tokens[:, : int((out.prompt_length + out.response_length).max())].clone()
    out.logprob = out.logprob[:, : int(out.response_length.max())].clone()
    return out


def next_to_enter(waiting, room, prompts, rows, prefilled):
    """Take from `waiting` up to `room` rows whose new prompts make one prefill: (rows, questions to prefill)."""
    entering, new, tokens = [], [], 0
    while waiting and len(entering) < room:
        question = rows[waiting[0]][0]
        if question not in prefilled and question not in new:
            tokens += len(prompts[question])
            if new and tokens > PREFILL_TOKENS:
                break
            new.append(question)
        entering.append(waiting.popleft())
    return entering, new


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
