"""Causal attention over rows or a KV cache: flash attention where there is one, else torch's SDPA.

Flash attention over rows is the package flash-attn's where it is installed, else torch's own.

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

# On an H100 SDPA with a mask goes to cuDNN first. That gives NaN gradients where length % 128 == 64 and all
# scores of a query are low (pytorch issue 196678), and plans 30 ms for each new shape: for every micro-batch.
torch.backends.cuda.enable_cudnn_sdp(False)


def flash_takes(dtype, head_dim):
    """Does flash attention take such numbers?"""
    return dtype in (torch.float16, torch.bfloat16) and head_dim % 8 == 0 and head_dim <= 256


def flash_available(dtype, head_dim):
    """Is flash-attn installed, and does it take such numbers?"""
    return flash_takes(dtype, head_dim) and flash_attn_varlen_func is not None


def torch_has_flash(device):
    """Can `flash_packed` do without the package? torch's operator is for Nvidia's GPUs from sm_80 on."""
    built = torch.backends.cuda.is_flash_attention_available() and not torch.version.hip
    return device.type == "cuda" and built and torch.cuda.get_device_capability(device) >= (8, 0)


def packed_available(q):
    """Does `flash_packed` take queries like q [T, H, E], of this dtype and width and on this device?"""
    installed = flash_attn_varlen_func is not None
    return flash_takes(q.dtype, q.shape[-1]) and (installed or torch_has_flash(q.device))


def triton_available(x):
    """Does attention over a cache run in Triton for tensors such as x, where flash-attn is not installed?"""
    return x.is_cuda and attend_cached_triton is not None


def flash_packed(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, window):
    """Rows one after another, without padding: q [sum of Tq, H, E], k and v [sum of Tk, K, E] -> like q.

    cu_seqlens [B + 1] of int32: where each row begins. The last query of a row sees its last key.
    """
    lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    # Causal is a right window of 0. It is said twice: with (-1, -1) and no row of two queries, both functions
    # regroup the heads and fail if a row has none.
    left, right = -1 if window is None else window - 1, 0
    if flash_attn_varlen_func is not None:
        return flash_attn_varlen_func(q, k, v, *lengths, causal=True, window_size=(left, right))
    dropout, causal, debug = 0.0, True, False
    windows = dict(window_size_left=left, window_size_right=right)
    return torch.ops.aten._flash_attention_forward(q, k, v, *lengths, dropout, causal, debug, **windows)[0]


def flash_cached(q, k, v, keys, values, length, window):
    """Store one token per row in a cache and attend from it: q [B, H, E], k and v [B, K, E] -> [B, H, E].

    The cache's keys and values [B, T, K, E] hold `length` [B] of int32 tokens; k and v are written behind
    them.
    """
    options = dict(cache_seqlens=length, causal=True, window_size=flash_window(window))
    return flash_attn_with_kvcache(q[:, None], keys, values, k[:, None], v[:, None], **options)[:, 0]


def flash_window(window):
    """How many keys a query sees, itself included, as flash-attn counts: (to its left, to its right)."""
    return (-1, -1) if window is None else (window - 1, 0)


def sdpa(q, k, v, mask):
    """Padded rows: q [B, Tq, H, E], k and v [B, Tk, K, E], mask [B or 1, 1, Tq, Tk] of bool -> like q."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if q.is_cuda:  # torch has no fused CUDA kernel for a mask together with shared heads
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=not q.is_cuda)  # [B, H, Tq, E]
    return out.transpose(1, 2)


def sdpa_one_query(q, k, v, bias):
    """One query per row: q [B, H, E], k and v [B, K, T, E], bias [B, 1, 1, T] (0 or -inf) -> [B, H, E]."""
    q = q.unflatten(1, (k.shape[1], -1))  # [B, K, H/K, E]: the query heads of a key head, as if queries of it
    return F.scaled_dot_product_attention(q, k, v, bias).flatten(1, 2)
