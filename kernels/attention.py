"""Causal attention over rows or a KV cache, by flash attention where it is available, else by torch's SDPA.

Over rows, flash attention is that of the package flash-attn if installed, else torch's own.

Letters in shape comments: B rows, T tokens (Tq queries, Tk keys), H heads, K key/value heads, E head width.
"""

import torch
import torch.nn.functional as F

try:
    from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache
except ImportError:  # an optional package, for CUDA only
    flash_attn_varlen_func = flash_attn_with_kvcache = None
try:
    from kernels.attention_triton import attend_cached_triton
except ImportError:  # torch's CPU wheels come without triton
    attend_cached_triton = None

# On an H100, SDPA with a mask prefers cuDNN. It returns NaN gradients if length % 128 == 64 and all scores of
# a query are low (pytorch issue 196678), and it plans for 30 ms at each new shape: at every micro-batch.
torch.backends.cuda.enable_cudnn_sdp(False)


def flash_takes(dtype, head_dim):
    """Does flash attention support this dtype and head width?"""
    return dtype in (torch.float16, torch.bfloat16) and head_dim % 8 == 0 and head_dim <= 256


def flash_available(dtype, head_dim):
    """Is the package flash-attn installed, and does it support this dtype and head width?"""
    return flash_takes(dtype, head_dim) and flash_attn_varlen_func is not None


def torch_has_flash(device):
    """Does torch have flash attention here? Its operator needs an Nvidia GPU of sm_80 or newer."""
    built = torch.backends.cuda.is_flash_attention_available() and not torch.version.hip
    return device.type == "cuda" and built and torch.cuda.get_device_capability(device) >= (8, 0)


def packed_available(q):
    """Does `flash_packed` support queries like q [T, H, E]: their dtype, head width and device?"""
    installed = flash_attn_varlen_func is not None
    return flash_takes(q.dtype, q.shape[-1]) and (installed or torch_has_flash(q.device))


def triton_available(x):
    """Without flash-attn, does attention over a cache run in Triton on x's device?"""
    return x.is_cuda and attend_cached_triton is not None


def flash_packed(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, window):
    """Attention over concatenated rows: q [sum of Tq, H, E], k and v [sum of Tk, K, E] -> like q.

    cu_seqlens [B + 1] of int32: the start of each row, and the end. A row's last query sees its last key.
    """
    lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    # A right window of 0 repeats causal=True. With (-1, -1) and at most one query per row, both functions
    # regroup the heads and fail if a row has none.
    left, right = -1 if window is None else window - 1, 0
    if flash_attn_varlen_func is not None:
        return flash_attn_varlen_func(q, k, v, *lengths, causal=True, window_size=(left, right))
    dropout, causal, debug = 0.0, True, False
    windows = dict(window_size_left=left, window_size_right=right)
    return torch.ops.aten._flash_attention_forward(q, k, v, *lengths, dropout, causal, debug, **windows)[0]


def flash_cached(q, k, v, keys, values, length, window):
    """Append one token per row to a cache and attend from it: q [B, H, E], k and v [B, K, E] -> [B, H, E].

    keys and values [B, T, K, E] are the cache; `length` [B] of int32 is how many tokens each row holds.
    """
    options = dict(cache_seqlens=length, causal=True, window_size=flash_window(window))
    return flash_attn_with_kvcache(q[:, None], keys, values, k[:, None], v[:, None], **options)[:, 0]


def flash_window(window):
    """The window as flash-attn counts it: (keys to the left of the query, keys to its right)."""
    return (-1, -1) if window is None else (window - 1, 0)


def sdpa(q, k, v, mask):
    """Attention over padded rows: q [B, Tq, H, E], k, v [B, Tk, K, E], mask [B or 1, 1, Tq, Tk] -> like q."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if q.is_cuda:  # torch has no fused CUDA kernel for a mask combined with shared key/value heads
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=not q.is_cuda)  # [B, H, Tq, E]
    return out.transpose(1, 2)


def sdpa_one_query(q, k, v, bias):
    """Attention of one query per row: q [B, H, E], k, v [B, K, T, E], bias [B, 1, 1, T] -> [B, H, E]."""
    q = q.unflatten(1, (k.shape[1], -1))  # [B, K, H/K, E]: treat the heads that share a key as queries of it
    return F.scaled_dot_product_attention(q, k, v, bias).flatten(1, 2)
