"""Test-only: the two functions of flash-attn 2.8.3 that we call, in plain torch on the CPU; and torch's own.

Signatures and checks are those of the package. What its source says and a call can get wrong: fp16 or bf16
only; a head width that is a multiple of 8 and at most 256; lengths in int32; the causal mask lines up the
last query with the last key; new keys are written into the cache in place, at the length that the cache had
*before* them; and nobody reports a cache that overflows (here it is an error).

torch's operator for rows is built from the same source, so it has the same checks. A CPU has none: importing
this file gives it one, forward and backward, so that torch's own autograd formula runs between the two.
"""

import inspect

import torch

SIGNATURES = {  # as text, so that a change of ours to the functions below is seen
    "flash_attn_with_kvcache": "(q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, "
    "cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, "
    "causal=False, window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, "
    "num_splits=0, return_softmax_lse=False)",
    "flash_attn_varlen_func": "(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, "
    "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, "
    "deterministic=False, return_attn_probs=False, block_table=None)",
}
SCHEMAS = {  # of torch 2.8 to 2.11; later versions have more behind the last argument
    "_flash_attention_forward": "(Tensor query, Tensor key, Tensor value, Tensor? cum_seq_q, "
    "Tensor? cum_seq_k, SymInt max_q, SymInt max_k, float dropout_p, bool is_causal, bool return_debug_mask, "
    "*, float? scale=None, SymInt? window_size_left=None, SymInt? window_size_right=None, "
    "Tensor? seqused_k=None, Tensor? alibi_slopes=None) -> (Tensor output, Tensor softmax_logsumexp, "
    "Tensor rng_state, Tensor unused, Tensor debug_attn_mask)",
    "_flash_attention_backward": "(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, "
    "Tensor logsumexp, Tensor cum_seq_q, Tensor cum_seq_k, SymInt max_q, SymInt max_k, float dropout_p, "
    "bool is_causal, Tensor rng_state, Tensor unused, *, float? scale=None, SymInt? window_size_left=None, "
    "SymInt? window_size_right=None) -> (Tensor, Tensor, Tensor)",
}
DTYPES = (torch.float16, torch.bfloat16)


def check(q, k, v):
    """What the CUDA extension checks of every call. Works on fake tensors too."""
    assert q.dtype in DTYPES, f"FlashAttention only support fp16 and bf16 data type, not {q.dtype}"
    assert q.dtype == k.dtype == v.dtype, "query, key and value must have the same dtype"
    assert q.device == k.device == v.device, "query, key and value on different devices"
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1, (
        "Input tensor must have contiguous last dimension"
    )
    assert q.shape[-1] == k.shape[-1] == v.shape[-1], "query, key and value must have the same head width"
    assert q.shape[-1] % 8 == 0 and q.shape[-1] <= 256, "head width: a multiple of 8 up to 256"
    assert k.shape == v.shape, "key and value must have the same shape"
    assert q.shape[-2] % k.shape[-2] == 0, "heads of the query must be a multiple of those of the key"


def check_lengths(lengths, count, like):
    right = lengths.dtype == torch.int32 and lengths.shape == (count,) and lengths.device == like.device
    assert right, "lengths: int32"
    assert lengths.is_contiguous(), "lengths must be contiguous"


def check_rows(q, k, v, ends_q, ends_k, longest_q, longest_k, window):
    """What is checked of rows that lie one after another: a slice of q and one of k for each row."""
    check(q, k, v)
    for ends, longest, x in ((ends_q, longest_q, q), (ends_k, longest_k, k)):
        check_lengths(ends, len(ends_q), x)
        assert type(longest) is int and ends[0] == 0 and ends[-1] == len(x) and ends.diff().max() <= longest
    if longest_q == 1 and q.shape[1] > k.shape[1] and max(window) < 0:
        assert len(q) == len(ends_q) - 1, "the heads are regrouped as if each row had one query"
    spans = ([slice(*pair) for pair in ends.unfold(0, 2, 1).tolist()] for ends in (ends_q, ends_k))
    return list(zip(*spans, strict=True))


def only_these(arguments, *names):
    """flash-attn's other arguments must keep their defaults: the reference below knows nothing of them."""
    for name, parameter in inspect.signature(globals()[arguments.pop("function")]).parameters.items():
        needed = parameter.default is inspect.Parameter.empty
        assert needed or name in names or arguments[name] == parameter.default, name


@torch.autocast("cpu", enabled=False)  # in fp32 inside as in the kernel
def one_row(q, k, v, causal, window_size):
    """One sequence: q [Tq, H, E], k and v [Tk, K, E] -> [Tq, H, E]."""
    v = v.float().repeat_interleave(q.shape[1] // k.shape[1], 1)
    return torch.einsum("hqk,khe->qhe", probabilities(q, k, causal, window_size), v).to(q.dtype)


@torch.autocast("cpu", enabled=False)
def gradients_of_one_row(grad, q, k, v, causal, window_size):
    """By hand, from the gradient of the result: those of q, k and v."""
    heads = (k.shape[1], -1)  # the query heads of each key head
    more_k, more_v = (x.float().repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    p = probabilities(q, k, causal, window_size)
    grad_p = torch.einsum("qhe,khe->hqk", grad.float(), more_v)
    grad_scores = p * (grad_p - (p * grad_p).sum(-1, keepdim=True)) / q.shape[-1] ** 0.5
    grad_q = torch.einsum("hqk,khe->qhe", grad_scores, more_k)
    grad_k = torch.einsum("hqk,qhe->khe", grad_scores, q.float()).unflatten(1, heads).sum(2)
    grad_v = torch.einsum("hqk,qhe->khe", p, grad.float()).unflatten(1, heads).sum(2)
    return [x.to(q.dtype) for x in (grad_q, grad_k, grad_v)]


def probabilities(q, k, causal, window_size):
    """[H, Tq, Tk] of fp32."""
    k = k.float().repeat_interleave(q.shape[1] // k.shape[1], 1)
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
    return scores.masked_fill(~seen, float("-inf")).softmax(-1)


def flash_attn_with_kvcache(
    q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None,
    cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0,
    return_softmax_lse=False,
):  # fmt: skip
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


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
    causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
    return_attn_probs=False, block_table=None,
):  # fmt: skip
    """q [sum of Tq, H, E], k and v [sum of Tk, K, E] -> [sum of Tq, H, E], differentiable.

    The rows lie one after another.
    """
    only_these({"function": "flash_attn_varlen_func", **locals()}, "causal", "window_size", "deterministic")
    rows = check_rows(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, window_size)
    return torch.cat([one_row(q[mine], k[theirs], v[theirs], causal, window_size) for mine, theirs in rows])


# ------------------------------------------------------------------------------------------------------------
# torch's operators


def window_of(dropout_p, scale, window_size_left=None, window_size_right=None, **rest):
    """(left, right) as flash-attn takes it. What the reference does not know must keep its default."""
    assert dropout_p == 0 and scale is None and not any(x is not None for x in rest.values())
    return tuple(-1 if side is None else side for side in (window_size_left, window_size_right))


def forward(q, k, v, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *,
            scale=None, **options):  # fmt: skip
    window = window_of(dropout_p, scale, **options)
    rows = check_rows(q, k, v, cum_seq_q, cum_seq_k, max_q, max_k, window)
    assert not return_debug_mask, "only with dropout"
    out = torch.cat([one_row(q[mine], k[theirs], v[theirs], is_causal, window) for mine, theirs in rows])
    state = torch.zeros(2, dtype=torch.uint64)  # of random numbers, for dropout
    return out, q.new_zeros(q.shape[1], len(q), dtype=torch.float32), state, state[0].clone(), q.new_empty(0)


def backward(grad, q, k, v, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal,
             rng_state, unused, *, scale=None, **options):  # fmt: skip
    window = window_of(dropout_p, scale, **options)
    rows = check_rows(q, k, v, cum_seq_q, cum_seq_k, max_q, max_k, window)
    assert grad.dtype == out.dtype == q.dtype and grad.shape == q.shape
    gradients = (
        gradients_of_one_row(grad[mine], q[mine], k[theirs], v[theirs], is_causal, window)
        for mine, theirs in rows
    )
    return tuple(map(torch.cat, zip(*gradients, strict=True)))


ON_CPU = torch.library.Library("aten", "IMPL")
ON_CPU.impl("_flash_attention_forward", forward, "CPU")
ON_CPU.impl("_flash_attention_backward", backward, "CPU")
