"""Test-only: the two functions of flash-attn 2.8.3 that we call, in plain torch on the CPU.

Signatures and checks are those of the package. What its source says and a call can get wrong: fp16 or bf16
only; a head width that is a multiple of 8 and at most 256; lengths in int32; the causal mask lines up the
last query with the last key; new keys are written into the cache in place, at the length that the cache had
*before* them; and nobody reports a cache that overflows (here it is an error).
"""

import inspect

import torch

SIGNATURES = {  # as text, so that a change of ours to the functions below is seen
    "flash_attn_with_kvcache": "(q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, "
    "cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, "
    "causal=False, window_size=(-1, -1), "
    "softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0, return_softmax_lse=False)",
    "flash_attn_varlen_func": "(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, "
    "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, "
    "deterministic=False, "
    "return_attn_probs=False, block_table=None)",
}


def check(q, k, v):
    """What the CUDA extension checks of every call. Works on fake tensors too."""
    assert q.dtype in (torch.float16, torch.bfloat16), (
        f"FlashAttention only support fp16 and bf16 data type, not {q.dtype}"
    )
    assert q.dtype == k.dtype == v.dtype, "query, key and value must have the same dtype"
    assert q.device == k.device == v.device, "query, key and value on different devices"
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1, (
        "Input tensor must have contiguous last dimension"
    )
    assert q.shape[-1] == k.shape[-1] == v.shape[-1] <= 256 and q.shape[-1] % 8 == 0, (
        "head width: a multiple of 8 up to 256"
    )
    assert k.shape == v.shape and q.shape[-2] % k.shape[-2] == 0, (
        "heads of the query must be a multiple of those of the key"
    )


def check_lengths(lengths, count, like):
    assert lengths.dtype == torch.int32 and lengths.shape == (count,) and lengths.device == like.device, (
        "lengths: int32"
    )
    assert lengths.is_contiguous(), "lengths must be contiguous"


def only_these(arguments, *names):
    """flash-attn's other arguments must keep their defaults: the reference below knows nothing of them."""
    for name, parameter in inspect.signature(globals()[arguments.pop("function")]).parameters.items():
        assert (
            name in names
            or parameter.default is inspect.Parameter.empty
            or arguments[name] == parameter.default
        ), name


def one_row(q, k, v, causal, window_size):
    """One sequence, in fp32 inside as in the kernel: q [Tq, H, E], k and v [Tk, K, E] -> [Tq, H, E]."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.float().repeat_interleave(groups, 1) for x in (k, v))
    scores = torch.einsum("qhe,khe->hqk", q.float(), k) / q.shape[-1] ** 0.5
    query_at = torch.arange(len(q))[:, None] + len(k) - len(q)  # bottom right
    key_at = torch.arange(len(k))
    left, right = window_size
    seen = torch.ones(len(q), len(k), dtype=torch.bool)
    if left >= 0:
        seen &= key_at >= query_at - left
    if right >= 0:
        seen &= key_at <= query_at + right
    if causal:
        seen &= key_at <= query_at
    return torch.einsum("hqk,khe->qhe", scores.masked_fill(~seen, float("-inf")).softmax(-1), v).to(q.dtype)


def flash_attn_with_kvcache(q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None,
                            cache_seqlens=None,
                            cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None,
                            causal=False,
                            window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None,
                            num_splits=0,
                            return_softmax_lse=False):  # fmt: skip
    """q [B, Tq, H, E], caches [B, T, K, E], k and v [B, Tn, K, E] -> [B, Tq, H, E].

    k and v are written into the caches.
    """
    used = ("k", "v", "cache_seqlens", "causal", "window_size")
    only_these({"function": "flash_attn_with_kvcache", **locals()}, *used)
    check(q, k_cache, v_cache)
    check(q, k, v)
    check_lengths(cache_seqlens, len(q), q)
    assert len(q) == len(k_cache) == len(k) and k.shape[2] == k_cache.shape[2]
    assert not (torch.is_grad_enabled() and q.requires_grad), "no backward pass"
    out = []
    for row, before in enumerate(cache_seqlens.tolist()):
        after = before + k.shape[1]
        assert after <= k_cache.shape[1], "the cache overflows, which flash-attn would not say"
        k_cache[row, before:after], v_cache[row, before:after] = k[row], v[row]
        out.append(one_row(q[row], k_cache[row, :after], v_cache[row, :after], causal, window_size))
    return torch.stack(out)


def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
                           softmax_scale=None,
                           causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
                           deterministic=False,
                           return_attn_probs=False, block_table=None):  # fmt: skip
    """q [sum of Tq, H, E], k and v [sum of Tk, K, E] -> [sum of Tq, H, E], differentiable.

    The rows lie one after another.
    """
    only_these({"function": "flash_attn_varlen_func", **locals()}, "causal", "window_size", "deterministic")
    check(q, k, v)
    for ends, longest, x in ((cu_seqlens_q, max_seqlen_q, q), (cu_seqlens_k, max_seqlen_k, k)):
        check_lengths(ends, len(cu_seqlens_q), x)
        assert type(longest) is int and ends[0] == 0 and ends[-1] == len(x) and ends.diff().max() <= longest
    spans = zip(
        *([slice(*pair) for pair in ends.unfold(0, 2, 1).tolist()] for ends in (cu_seqlens_q, cu_seqlens_k)),
        strict=True,
    )
    return torch.cat([one_row(q[mine], k[theirs], v[theirs], causal, window_size) for mine, theirs in spans])
