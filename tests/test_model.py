"""model.py against transformers, the reference: logits and cached decode, for random models of every family.

`test_parity_notices` plants mistakes and proves that they are seen.
"""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from parity import (
    FIXED,
    LLAMA3,
    MAX_POSITIONS,
    NOTICED,
    TOLERANCE,
    YARN,
    both,
    configs,
    difference,
    draw_tokens,
    examples,
)

from kernels.fused import rotate
from kernels.kv_cache import KVCache
from rollout import decode, prefill
from support.pretrained import FAMILIES, hf_tensors
from support.rope import rope_frequencies


def check_logits(config, length, seed):
    ours, reference = both(config, seed)
    assert difference(ours, reference, draw_tokens(config, (3, length), seed)) < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
@examples(40)
@given(st.data(), st.integers(2, 40), st.integers(0, 1000))
def test_logits_equal_transformers(family, data, length, seed):
    check_logits(data.draw(configs([family])), length, seed)


@pytest.mark.long
@examples(1000)
@given(configs(), st.integers(2, MAX_POSITIONS), st.integers(0, 1000))
def test_logits_equal_transformers_long(config, length, seed):
    check_logits(config, length, seed)


@torch.no_grad()
def check_decode(config, lengths, forced, seed):
    """Rows of different lengths, prefilled together and decoded step by step; the first leaves halfway."""
    ours, reference = both(config, seed)
    rows = [draw_tokens(config, (length + forced,), seed + i) for i, length in enumerate(lengths)]
    want = [reference(row[None]).logits[0] for row in rows]
    prompts = prefill(ours, [row[:length].tolist() for row, length in zip(rows, lengths, strict=True)])
    for prompt, length, row in zip(prompts, lengths, want, strict=True):
        assert (prompt.logits - row[length - 1]).abs().max() < TOLERANCE
    cache = KVCache(ours, slots=len(rows), capacity=max(lengths) + forced)
    for slot, prompt in enumerate(prompts):
        cache.insert(slot, prompt.k, prompt.v)
    live = list(range(len(rows)))
    for step in range(forced):
        place = torch.tensor([lengths[row] + step for row in live])
        token = torch.stack([rows[row][at] for row, at in zip(live, place, strict=True)])
        logits = decode(ours, cache, token, place, context=int(place.max()) + 1)
        for row, got in zip(live, logits, strict=True):
            assert (got - want[row][lengths[row] + step]).abs().max() < TOLERANCE, (row, step)
        if step == forced // 2 and len(live) > 1:  # the last row moves into the slot of the first
            live = [live[-1], *live[1:-1]]
            cache.move(torch.tensor([len(live)]), torch.tensor([0]), length=int(place.max()) + 1)


def batches(count, length, forced):
    """Configurations, up to `count` rows of up to `length` tokens, and steps to decode."""
    rows = st.lists(st.integers(1, length), min_size=1, max_size=count)
    return given(configs(), rows, st.integers(1, forced), st.integers(0, 1000))


@examples(60)
@batches(4, 20, 10)
def test_cached_decode_equals_transformers(config, lengths, forced, seed):
    check_decode(config, lengths, forced, seed)


@pytest.mark.long
@examples(300)
@batches(5, 40, 24)
def test_cached_decode_equals_transformers_long(config, lengths, forced, seed):
    check_decode(config, lengths, forced, seed)


@torch.no_grad()
@pytest.mark.parametrize("window", [None, 4])
def test_decode_of_a_row_does_not_depend_on_the_batch(window):
    """Batch of 1 = batch of 64: given tokens, no sampling, rows of many lengths, slots used before."""
    model, _ = both(FIXED | ({"model_type": "mistral", "sliding_window": window} if window else {}))
    lengths, tokens = torch.arange(64) % 9 + 1, draw_tokens(FIXED, (64, 14))
    prompts = prefill(model, [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)])

    def decoded(rows):
        cache = KVCache(model, slots=len(rows), capacity=16)
        cache.k.fill_(7), cache.v.fill_(7)  # what another row left there, which nobody may see
        for slot, row in enumerate(rows):
            cache.insert(slot, prompts[row].k, prompts[row].v)
        places = [lengths[rows] + step for step in range(4)]
        return [decode(model, cache, tokens[rows, at], at, context=int(at.max()) + 1) for at in places]

    together = torch.stack(decoded(list(range(64))), 1)  # [64, steps, V]
    for row in range(64):
        alone = torch.stack(decoded([row]), 1)
        assert (together[row] - alone[0]).abs().max() < 1e-4, row


# ------------------------------------------------------------------------------------------------------------
# can these tests fail? planted mistakes


def drop_bias(name):
    def plant(model):
        for tensor_name, bias in hf_tensors(model.config, dict(model.named_parameters())).items():
            if tensor_name.endswith(f"{name}.bias"):
                bias.data.zero_()

    return plant


def ignore_qk_norm(model):
    for layer in model.layers:
        layer.self_attn.q_norm = layer.self_attn.k_norm = torch.nn.Identity()


def ignore_norm_weights(model):
    for name, p in model.named_parameters():
        if name.endswith("layernorm.weight"):
            p.data.fill_(1)


def other_rope(**changes):
    def plant(model):
        config = dataclasses.replace(model.config, rope={**model.config.rope, **changes})
        model.rope_frequency, model.rope_scale = rope_frequencies(config)

    return plant


def other_windows(change):
    def plant(model):
        windows = tuple(None if window is None else change(window) for window in model.config.windows)
        model.config = dataclasses.replace(model.config, windows=windows)

    return plant


def wrong_groups(model):  # query heads go with the key heads in turn (0 1 0 1) instead of in blocks (0 0 1 1)
    for name, weight in hf_tensors(model.config, dict(model.named_parameters())).items():
        for part, dim in (("q_proj.weight", 0), ("o_proj.weight", 1)):
            if name.endswith(part):
                mixed = weight.data.unflatten(dim, (2, 2, -1)).transpose(dim, dim + 1).flatten(dim, dim + 2)
                weight.data.copy_(mixed)


def scaling(kind, **fields):
    return {"rope_scaling": {"rope_type": kind, **fields}}


WINDOW = {"model_type": "mistral", "sliding_window": 8}
PLANTS = {
    "q bias dropped": ({"model_type": "qwen2"}, drop_bias("self_attn.q_proj")),
    "k bias dropped": ({"model_type": "qwen2"}, drop_bias("self_attn.k_proj")),
    "v bias dropped": ({"model_type": "qwen2"}, drop_bias("self_attn.v_proj")),
    "o bias dropped": ({"attention_bias": True}, drop_bias("self_attn.o_proj")),
    "gate bias dropped": ({"mlp_bias": True}, drop_bias("mlp.gate_proj")),
    "up bias dropped": ({"mlp_bias": True}, drop_bias("mlp.up_proj")),
    "down bias dropped": ({"mlp_bias": True}, drop_bias("mlp.down_proj")),
    "q/k norm ignored": ({"model_type": "qwen3"}, ignore_qk_norm),
    "norm weights ignored": ({}, ignore_norm_weights),
    "key heads mixed up": ({}, wrong_groups),
    "linear ignored": ({"rope_scaling": {"type": "linear", "factor": 2.0}}, other_rope(rope_type="default")),
    "dynamic as linear": (scaling("dynamic", factor=2.0), other_rope(rope_type="linear")),
    "llama3 ignored": (scaling("llama3", **LLAMA3), other_rope(rope_type="default")),
    "llama3 as linear": (scaling("llama3", **LLAMA3), other_rope(rope_type="linear")),
    "yarn ignored": (scaling("yarn", **YARN), other_rope(rope_type="default")),
    "yarn without magnitude": (scaling("yarn", **YARN), other_rope(attention_factor=1.0)),
    "yarn truncated": (
        {"rope_theta": 50.0, **scaling("yarn", factor=4.0, truncate=False)}, other_rope(truncate=True)
    ),
    "other rope base": ({"rope_theta": 10000.0}, other_rope(rope_theta=9000.0)),
    "window ignored": (WINDOW, other_windows(lambda window: None)),
    "window off by one": (WINDOW, other_windows(lambda window: window + 1)),
    "window everywhere": (
        {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
        lambda model: setattr(model, "config", dataclasses.replace(model.config, windows=(8, 8))),
    ),
}  # fmt: skip


@pytest.mark.parametrize("plant", PLANTS)
def test_parity_notices(plant):
    changes, sow = PLANTS[plant]
    ours, reference = both(FIXED | changes)
    tokens = draw_tokens(FIXED, (3, 40))
    assert difference(ours, reference, tokens) < TOLERANCE
    sow(ours)
    assert difference(ours, reference, tokens) > NOTICED


def test_cached_decode_notices_a_position_off_by_one(monkeypatch):
    check_decode(FIXED, [3, 20, 7], 6, seed=0)
    open_step = KVCache.open_step

    def late(cache, position, context):
        open_step(cache, position + 1, context + 1)  # where the key is put, and how far the token sees

    monkeypatch.setattr(KVCache, "open_step", late)
    with pytest.raises((AssertionError, IndexError)):
        check_decode(FIXED, [3, 20, 7], 6, seed=0)


def test_cached_decode_notices_an_ignored_window(monkeypatch):
    check_decode(FIXED | WINDOW, [3, 20, 7], 6, seed=0)
    ignored = property(lambda cache: (None, None), lambda cache, value: None)
    monkeypatch.setattr(KVCache, "windows", ignored, raising=False)
    with pytest.raises(AssertionError):
        check_decode(FIXED | WINDOW, [3, 20, 7], 6, seed=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_equals_its_plain_form(dtype):
    x, angle = torch.randn(7, 3, 8, dtype=torch.float64), 10 * torch.randn(7, 1, 4, dtype=torch.float64)
    cos, sin = angle.cos(), angle.sin()
    a, b = x.chunk(2, -1)
    plain = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    signed = [torch.cat(halves, -1).float() for halves in ((cos, cos), (-sin, sin))]
    rotated = rotate(x.to(dtype), *signed, dtype)
    assert rotated.dtype == dtype
    assert (rotated.double() - plain).abs().max() < (1e-6 if dtype == torch.float32 else 0.05)
