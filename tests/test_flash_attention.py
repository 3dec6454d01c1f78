"""Our calls of flash attention, against CPU references with its signatures (flash_attention.py) and SDPA.

The package and torch's operator need a GPU: there tests/test_gpu.py compares them with SDPA. This file proves
that what we hand over is what signatures and checks ask for, and means what SDPA with our own masks means.
"""

import copy
import inspect
import sys
from types import SimpleNamespace

import flash_attention
import pytest
import torch
from conftest import ROOT, environment, execute, rollout_of
from fake_cuda import plant

import rollout
from kernels import attention, kv_cache, packing
from kernels.kv_cache import KVCache
from kernels.packing import AttentionGroup, pack_responses
from model import ModelConfig, Transformer
from rollout import Engine, decode, prefill

EOS = [1, 2, 3]
PROMPTS = [[5, 17, 3, 88, 41], [7, 7, 9], [60, 2, 2, 31, 14, 55, 90, 8], [12]]


def small_config(**changes):
    """Four heads on two of keys, a layer without a sliding window and one with."""
    small = dict(vocab_size=101, hidden_size=64, intermediate_size=96, layers=2, heads=4, kv_heads=2,
                 head_dim=16, norm_eps=1e-6, max_positions=128, windows=(None, 4),
                 rope={"rope_type": "default", "rope_theta": 1e4}, qkv_bias=True, o_bias=False,
                 mlp_bias=False, qk_norm=False, tie_word_embeddings=False)  # fmt: skip
    return ModelConfig(**{**small, **changes})


def small_model(dtype=torch.bfloat16, head_dim=16, windows=(None, 4), seed=0):
    """A Transformer of small_config with every parameter random."""
    torch.manual_seed(seed)
    whole = Transformer(small_config(head_dim=head_dim, windows=windows))
    with torch.no_grad():
        for parameter in whole.parameters():
            noise = torch.randn(parameter.shape)
            parameter.copy_((0.22 * noise if parameter.dim() > 1 else 1 + 0.3 * noise).to(dtype))
            parameter.data = parameter.data.to(dtype)
    return whole


TORCH = SimpleNamespace(flash_attn_with_kvcache=None, flash_attn_varlen_func=None)  # its own, no package
PACKAGES = {"flash-attn": flash_attention, "torch": TORCH}


def use_flash(monkeypatch, package=flash_attention):
    """flash-attn is `package`; or TORCH: not installed, but torch has an operator; or None: neither."""
    for name in ("flash_attn_with_kvcache", "flash_attn_varlen_func"):
        monkeypatch.setattr(attention, name, package and getattr(package, name))
    monkeypatch.setattr(attention, "torch_has_flash", lambda device: package is TORCH)


@pytest.mark.parametrize("name", flash_attention.SIGNATURES)
def test_the_reference_has_the_signature_of_the_package(name):
    assert str(inspect.signature(getattr(flash_attention, name))) == flash_attention.SIGNATURES[name]


@pytest.mark.parametrize("name", flash_attention.SCHEMAS)
def test_the_operator_has_the_schema_that_we_tested_with(name):
    """That of the torch which is installed may only have more behind the last argument."""
    tested = torch._C.parse_schema(f"aten::{name}{flash_attention.SCHEMAS[name]}")
    assert getattr(torch.ops.aten, name).default._schema.is_backward_compatible_with(tested)


def test_flash_attn_4_is_not_taken_for_flash_attn_2(tmp_path):
    """It has no module flash_attn, but a folder of that name, which Python imports all the same."""
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    (tmp_path / "flash_attn" / "cute" / "__init__.py").touch()
    code = """if True:
        import flash_attn, test_gpu
        from kernels import attention
        assert len(flash_attn.__path__) and attention.flash_attn_with_kvcache is None
        assert attention.flash_attn_varlen_func is None and test_gpu.flash_attn is None"""
    path = {"PYTHONPATH": f"{tmp_path}:{ROOT}:{ROOT / 'tests'}"}
    execute([sys.executable, "-c", code], env=environment() | path)


def test_no_attention_by_cudnn():
    assert not torch.backends.cuda.cudnn_sdp_enabled()


# ------------------------------------------------------------------------------------------------------------
# decoding


@torch.no_grad()
def decoded(whole, monkeypatch, package, move=True, steps=6, triton=False):
    """Logits of `steps` decoding steps of four rows, and the cache.

    Attention is that of a package such as flash-attn, or our Triton kernel, or torch's SDPA. Before the last
    two steps the row of slot 0 ends. With `move` the row of slot 3, the longest, then goes into slot 0, as
    `Engine.compact` does it; without, all rows go on.
    """
    use_flash(monkeypatch, package)
    monkeypatch.setattr(kv_cache, "triton_available", lambda x: triton)
    device = whole.embed_tokens.weight.device
    cache = KVCache(whole, slots=5, capacity=20)
    assert cache.flash == (package is not None) and cache.by_length == (cache.flash or triton)
    assert cache.k.shape == (2, 5, 2, 20, 16)
    prompts = [PROMPTS[row] for row in (0, 1, 3, 2)]
    for slot, prompt in enumerate(prefill(whole, prompts)):
        cache.insert(slot, prompt.k, prompt.v)
    place = torch.tensor([len(prompt) for prompt in prompts], device=device)
    stay, out = torch.arange(4, device=device), []
    tokens = torch.randint(101, (steps, 4), generator=torch.Generator().manual_seed(1)).to(device)
    for step in range(steps):
        if step == steps - 2:
            stay = torch.tensor([3, 1, 2], device=device)
            if move:
                cache.move(stay[:1], torch.zeros_like(stay[:1]), length=int(place[3]))
                place, tokens, stay = place[stay], tokens[:, stay], torch.arange(3, device=device)
        out.append(decode(whole, cache, tokens[step], place, context=int(place.max()) + 1).float()[stay])
        place = place + 1
    return torch.cat(out), cache


def check_as_good(flash, plain, exact):
    """flash-attn is as near fp32 as SDPA is in the same lower precision, in means and in largest errors."""
    flash_error, plain_error = (flash - exact).abs(), (plain - exact).abs()
    assert flash_error.mean() < 1.3 * plain_error.mean() and flash_error.max() < 2 * plain_error.max()


def check_decoding(monkeypatch, dtype=torch.bfloat16, device="cpu", package=flash_attention, triton=False):
    """As good logits, and the same cache, by flash-attn or our kernel as by SDPA."""
    whole = small_model(dtype).to(device)
    flash, flash_cache = decoded(whole, monkeypatch, package, triton=triton)
    plain, plain_cache = decoded(whole, monkeypatch, None, move=False)
    exact, _ = decoded(copy.deepcopy(whole).float(), monkeypatch, None, move=False)
    check_as_good(*(logits.log_softmax(-1) for logits in (flash, plain, exact)))
    for of_flash, of_plain in ((flash_cache.k, plain_cache.k), (flash_cache.v, plain_cache.v)):
        # the first layer, whose input no attention has touched
        assert of_flash[0, :3].equal(of_plain[0, [3, 1, 2]])
    # as flash-attn wants it in memory, and as our kernel does
    assert (flash_cache.k[0].transpose(1, 2) if package else flash_cache.k[0]).is_contiguous()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_decoding(monkeypatch, dtype):
    check_decoding(monkeypatch, dtype)


def attended_exactly(q, k, v, keys, values, length, window):
    """Attention of new tokens over a cache by the plain formula in float64: [B, H, E]."""
    out = torch.empty(q.shape, dtype=torch.float64)
    for row, filled in enumerate(length.tolist()):
        seen = slice(0 if window is None else max(0, filled + 1 - window), filled)
        for head in range(q.shape[1]):
            of = head // (q.shape[1] // k.shape[1])
            these = torch.cat((keys[row, of, seen], k[row, of][None])).double()
            those = torch.cat((values[row, of, seen], v[row, of][None])).double()
            out[row, head] = (these @ q[row, head].double() / q.shape[2] ** 0.5).softmax(0) @ those
    return out


@torch.no_grad()
def test_one_step_against_float64(monkeypatch):
    """attend_cached() alone: rows of several lengths, with and without a window, and what it stores."""
    use_flash(monkeypatch)
    whole = small_model()
    cache = KVCache(whole, slots=4, capacity=12)
    for x in (cache.k, cache.v):
        x.copy_(torch.randn(x.shape))
    q, k, v = (torch.randn(3, heads, 16).bfloat16() for heads in (4, 2, 2))
    place = torch.tensor([0, 5, 11])
    before = cache.k.clone()
    cache.open_step(place, context=12)
    for layer, window in enumerate(whole.config.windows):
        out = cache.attend_cached(layer, q, k, v)
        rows = range(3), slice(None), place
        assert cache.k[layer][rows].equal(k) and cache.v[layer][rows].equal(v)
        exact = attended_exactly(q, k, v, cache.k[layer], cache.v[layer], place, window)
        assert (out - exact).abs().max() < 0.02
    changed = (cache.k != before).any(-1).any(2)  # [L, S, T]
    written = [[layer, row, at] for layer in (0, 1) for row, at in enumerate(place.tolist())]
    assert changed.nonzero().tolist() == written


def check_same_but_for_ties(whole, a, b, tie):
    """Greedy rollouts part only where the logits of the two tokens nearly tie.

    Returns how many tokens are the same.
    """
    same = 0
    for row in range(len(a)):
        for at, (one, other) in enumerate(zip(a.response(row), b.response(row), strict=False)):
            if one != other:
                last = whole.logits(a.tokens[row : row + 1, : a.prompt_length[row] + at])[0, -1].float()
                assert (last[one] - last[other]).abs() < tie, (row, at)
                break
            same += 1
    return same


@torch.no_grad()
def test_generate(monkeypatch):
    """Whole rollouts through an engine with refills."""
    whole, both = small_model(), []
    for package in (flash_attention, None):
        use_flash(monkeypatch, package)
        engine = Engine(whole, 3, 40, max_new_tokens=24, eos_ids=EOS)
        assert engine.cache.flash == (package is not None)
        how = dict(max_new_tokens=24, temperature=0.0, eos_ids=EOS, seed=0, stream="eval", step=0,
                   engine=engine)  # fmt: skip
        both.append(rollout.generate(whole, PROMPTS, [(q, s) for s in range(2) for q in range(4)], **how))
        same = [both[-1].response(row) == both[-1].response(row + 4) for row in range(4)]
        assert all(same)  # whichever slot, whichever neighbours
    assert check_same_but_for_ties(whole, *both, tie=0.15) > 20
    assert both[0].response_length.unique().numel() > 2


# ------------------------------------------------------------------------------------------------------------
# rows without padding


ROWS = {  # tokens of each prompt; prompt and tokens of each response, of which all but the last are queries
    "rows": ([5, 3], [(0, 6), (1, 1), (0, 3), (1, 8)]),
    "rows of one query and of none": ([4, 6], [(0, 1), (0, 2), (1, 2)]),
}


def packed(shape, window):
    """The PackedBatch of prompts and responses of some lengths."""
    prompts, responses = shape
    made_up = [(question, torch.full((length,), 7)) for question, length in responses]
    rows = rollout_of([[5] * length for length in prompts], made_up)
    return pack_responses(rows, (window,))


def inputs(tokens, heads, kv_heads, width, dtype=torch.bfloat16, score=0.0):
    """q, k, v and the gradient of the result, [T, heads, E] each; scores are `score` in the mean."""
    generator = torch.Generator().manual_seed(3)
    heads = (heads, kv_heads, kv_heads, heads)
    q, k, v, grad = (torch.randn(tokens, h, width, generator=generator) for h in heads)
    q[..., 0], k[..., 0] = score, width**0.5
    return [x.to(dtype) for x in (q, k, v, grad)]


def attended(monkeypatch, package, batch, q, k, v, grad):
    """The result of packed attention and the gradients of q, k and v, in float64 on the CPU."""
    use_flash(monkeypatch, package)
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out = batch.attend_packed(0, q, k, v)
    return [x.detach().double().cpu() for x in (out, *torch.autograd.grad(out, (q, k, v), grad))]


def check_rows(monkeypatch, package, shape, window=None, heads=(4, 2), width=16, device="cpu", **options):
    """Against float64, flash attention errs no more than padded SDPA, forward and backward."""
    batch = packed(shape, window).to(torch.device(device))
    given = [x.to(device) for x in inputs(len(batch.tokens), *heads, width, **options)]
    exact = attended(monkeypatch, None, batch, *(x.double() for x in given))
    flash = attended(monkeypatch, package, batch, *given)
    plain = attended(monkeypatch, None, batch, *given)
    for name, a, b, c in zip(("result", "grad q", "grad k", "grad v"), exact, flash, plain, strict=True):
        assert b.isfinite().all() and c.isfinite().all(), name
        assert (b - a).abs().max() <= 1.5 * (c - a).abs().max() + 2e-3 * a.abs().max(), name


@pytest.mark.parametrize("package", PACKAGES.values(), ids=PACKAGES)
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("shape", ROWS.values(), ids=ROWS)
def test_rows(monkeypatch, package, shape, window):
    check_rows(monkeypatch, package, shape, window)


# ------------------------------------------------------------------------------------------------------------
# learning


def learned(whole, monkeypatch, package, autocast=True):
    """Log-probabilities of a rollout with shared prompts, and a gradient of their sum, flat."""
    use_flash(monkeypatch, package)
    device = whole.embed_tokens.weight.device.type
    generator = torch.Generator().manual_seed(2)
    lengths = [1 if row == 4 else 1 + row for row in range(12)]
    responses = [torch.randint(4, 101, (length,), generator=generator) for length in lengths]
    rows = rollout_of(PROMPTS, [(row // 3, response) for row, response in enumerate(responses)])
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        logprob, _ = whole(rows)
    weights = [x for name, x in whole.named_parameters() if "0.self_attn" in name and "weight" in name]
    gradients = torch.autograd.grad(logprob.sum(), weights)
    return logprob.detach(), torch.cat([x.flatten() for x in gradients])


def check_learning(monkeypatch, device="cpu", package=flash_attention):
    """Log-probabilities and gradients of packed rows, by flash attention and by SDPA.

    The weights are fp32, under autocast, as on a GPU.
    """
    whole = small_model(torch.float32).to(device)
    results = [learned(whole, monkeypatch, *how) for how in ((package,), (None,), (None, False))]
    for of_kind in zip(*results, strict=True):
        check_as_good(*of_kind)


@pytest.mark.parametrize("package", PACKAGES.values(), ids=PACKAGES)
def test_learning(monkeypatch, package):
    check_learning(monkeypatch, package=package)


# ------------------------------------------------------------------------------------------------------------
# what flash-attn cannot take, and planted mistakes


@pytest.mark.parametrize("dtype, head_dim, takes", [
    (torch.bfloat16, 64, True), (torch.float16, 256, True), (torch.float32, 64, False),
    (torch.bfloat16, 20, False), (torch.bfloat16, 264, False),
])  # fmt: skip
def test_what_flash_attn_refuses_goes_to_sdpa(monkeypatch, dtype, head_dim, takes):
    """The reference raises where `flash_available` and `packed_available` say no; the model still runs."""
    x = torch.zeros(3, 2, head_dim, dtype=dtype)
    use_flash(monkeypatch, None)
    assert not attention.flash_available(dtype, 64) and not attention.packed_available(x)
    whole = small_model(dtype, head_dim)
    for package in PACKAGES.values():
        use_flash(monkeypatch, package)
        assert attention.packed_available(x) == takes
        assert attention.flash_available(dtype, head_dim) == (takes and package is flash_attention)
        assert KVCache(whole, 2, 8).flash == (takes and package is flash_attention)
        assert whole.logits(torch.tensor([[5, 6, 7]])).isfinite().all()
    if not takes:
        with pytest.raises(AssertionError, match=r"fp16 and bf16|multiple of 8"):
            flash_attention.check(x, x, x)


MISTAKES = {
    "lengths one too long": (KVCache, "open_step", "position.to(torch.int32)",
                             "(position + 1).to(torch.int32)"),
    "lengths in int64": (KVCache, "open_step", "position.to(torch.int32)", "position"),
    "the window one too wide": (attention, "flash_window", "(window - 1, 0)", "(window, 0)"),
    "no window": (kv_cache, "flash_cached", "window_size=flash_window(window)", "window_size=(-1, -1)"),
    "keys and values swapped": (kv_cache, "flash_cached", "k[:, None], v[:, None]", "v[:, None], k[:, None]"),
    "caches swapped": (kv_cache, "flash_cached", "q[:, None], keys, values", "q[:, None], values, keys"),
    "SDPA's layout": (KVCache, "__init__", "(capacity, config.kv_heads) if self.flash else ", ""),
    "a row copied but for its last place": (KVCache, "move", "layer[target, :, :length] = ",
                                            "length = length - 1; layer[target, :, :length] = "),
}  # fmt: skip
IN_ROWS = {  # in both ways of flash attention, or in the one that is named
    "a window one too wide": (packing, "flash_packed", "window - 1, 0", "window, 0"),
    "no window": (packing, "flash_packed", "window - 1, 0", "-1, 0"),
    "heads regrouped": (packing, "flash_packed", "window - 1, 0", "window - 1, -1"),
    "not causal, flash-attn": (packing, "flash_packed",
                               "causal=True, window_size=(left, right)", "window_size=(left, -1)"),
    "not causal, torch": (packing, "flash_packed",
                          "True, False\n    windows = dict(window_size_left=left, window_size_right=right)",
                          "False, False\n    windows = dict(window_size_left=left)"),
    "only one half of the window, torch": (packing, "flash_packed", "window_size_left=left, ", ""),
    "longest rows swapped": (packing, "flash_packed",
                             "max_seqlen_q, max_seqlen_k\n", "max_seqlen_k, max_seqlen_q\n"),
    "the second result, torch": (packing, "flash_packed", "**windows)[0]", "**windows)[1]"),
    "begins of keys for those of queries":
        (AttentionGroup, "flat",
         "cu_seqlens(self.query_length), cu_seqlens(self.key_length)",
         "cu_seqlens(self.key_length), cu_seqlens(self.query_length)"),
    "begins in int64": (packing, "cu_seqlens", ".int()", ""),
    "keys without their prompts": (AttentionGroup, "__init__", "offset + query_length", "query_length"),
    "only the queries' own keys": (AttentionGroup, "flat", "if self.offset.any():", "if False:"),
    "a query too few": (AttentionGroup, "flat", "int(flat_query[-1]) + 1", "int(flat_query[-1])"),
    "queries of the prompts": (AttentionGroup, "flat", "slice(int(flat_query[0]), int(flat_query[-1]) + 1)",
                               "slice(0, len(flat_query))"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_in_decoding(monkeypatch, mistake):
    plant(monkeypatch, *MISTAKES[mistake])
    with pytest.raises((AssertionError, RuntimeError)):
        check_decoding(monkeypatch)


@pytest.mark.parametrize("mistake", IN_ROWS)
def test_mistake_in_rows(monkeypatch, mistake):
    plant(monkeypatch, *IN_ROWS[mistake])
    for package in [PACKAGES[name] for name in PACKAGES if mistake.endswith(name)] or PACKAGES.values():
        with pytest.raises((AssertionError, RuntimeError)):
            for shape in ROWS.values():
                for window in (None, 3):
                    check_rows(monkeypatch, package, shape, window)
