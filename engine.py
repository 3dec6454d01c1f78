"""The device's half of sampling: a KV cache, and the step that decodes and samples a token per running row.

The running rows lie without gaps in the first slots. A step asks nothing of the host, and everything that it
touches stays at its address. So on a GPU it is replayed as a CUDA graph, also after the weights have been
refreshed in place. Attention on a GPU is flash-attn where that is installed, else a Triton kernel
(kernels/attention_triton.py); on a CPU it is torch's SDPA.

Letters in shape comments: B rows, S slots, T tokens, R response tokens, V vocabulary, L layers, H heads, K
key/value heads, E head width.
"""

from typing import NamedTuple

import torch

from kernels.attention import (
    attend_cached_triton,
    flash_available,
    flash_cached,
    sdpa_one_query,
    triton_available,
)
from kernels.cuda_graph import GraphCache
from kernels.sampler import sample_tokens
from packing import pack_rows, pad
from parallel import same_on_all

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
