"""The KV cache that decoding reads, and extends by one token per row and step.

On a GPU, attention reads only the filled part of the cache, with flash-attn if it is installed, else with a
Triton kernel (attention_triton.py). On a CPU it is torch's SDPA with a mask.

Letters in shape comments: B rows, G a subset of the slots, S slots, T tokens (Tp of a prompt), L layers, H
heads, K key/value heads, E head width.
"""

import torch

from kernels.attention import (
    attend_cached_triton,
    flash_available,
    flash_cached,
    sdpa_one_query,
    triton_available,
)
from kernels.native import native_step


class KVCache:
    """Keys and values of up to `slots` rows of up to `capacity` tokens each, [L, S, K, T, E]."""

    def __init__(self, model, slots, capacity):
        config, weight = model.config, model.embed_tokens.weight
        self.windows = config.windows
        self.flash = flash_available(weight.dtype, config.head_dim)
        self.by_length = self.flash or triton_available(weight)  # attention takes lengths instead of a mask
        inner = (capacity, config.kv_heads) if self.flash else (config.kv_heads, capacity)
        shape = (config.layers, slots, *inner, config.head_dim)
        # zeros, not empty: masked positions have weight 0, but 0 x NaN would be NaN
        self.k = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        self.v = torch.zeros_like(self.k)
        if self.flash:  # flash-attn needs [S, T, K, E] in memory; the index order stays [S, K, T, E]
            self.k, self.v = self.k.transpose(2, 3), self.v.transpose(2, 3)
        self.native = native_step(model, self)  # a whole step in C; None where there is none

    def insert(self, slot, k, v):
        """Copy a prompt's k and v [L, K, Tp, E] into a slot."""
        self.k[:, slot, :, : k.shape[2]] = k
        self.v[:, slot, :, : v.shape[2]] = v
        if self.native:
            self.native.insert(slot, k)

    def move(self, source, target, length):
        """Copy the first `length` tokens of slots `source` [G] to slots `target` [G]."""
        for layer in (*self.k, *self.v):  # layer by layer, so the temporary copy stays small
            layer[target, :, :length] = layer[source, :, :length]
        if self.native:
            self.native.move(source, target)

    def open_step(self, position, context):
        """Begin a step: the next token of slot b goes to position[b], for the first B slots.

        Attention reads the first `context` positions, so all of position [B] must be below it.
        """
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
        """Append one token per row and attend from it: q [B, H, E], k and v [B, K, E] -> [B, H, E]."""
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
