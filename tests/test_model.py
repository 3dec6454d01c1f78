"""model.py against transformers, the reference: logits, cached decode, the learner's forward and gradients; files and names.

Every parity test redraws all parameters, norms and biases included, so that logits have a standard deviation of at least 1
and attention is far from flat: with a fresh initialisation half of the possible mistakes would hide below the tolerance.
`test_parity_notices` plants such mistakes and proves that they are seen.
"""

import dataclasses
import errno
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import filter_repo_objects
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import model as module
from model import Pack, Segments, Transformer, check_vocabulary, flash_takes, hf_tensors, read_config, resolve, rope_frequencies
from rollout import KVCache, Rollout, decode, prefill

TOLERANCE, NOTICED = 1e-4, 1e-3  # a correct model differs by less than the first, a wrong one by more than the second
MAX_POSITIONS = 64


def examples(count):
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    return settings(max_examples=count, derandomize=True, database=None, deadline=None, suppress_health_check=checks)


# ----------------------------------------------------------------------------------------------------------------------
# random configurations


@st.composite
def rope_fields(draw):
    """The rope part of a config.json: any type, in the old or the new spelling."""
    kind = draw(st.sampled_from(sorted(module.ROPE_TYPES)))
    theta = draw(st.sampled_from([50.0, 10000.0, 1000000]))
    scaling = {} if kind == "default" else {"factor": draw(st.sampled_from([1.0, 2, 3.5, 8.0]))}
    if kind == "llama3":
        scaling |= {"low_freq_factor": 1.0, "high_freq_factor": draw(st.sampled_from([2.0, 4]))}
    if kind in ("llama3", "yarn"):
        scaling |= draw(st.sampled_from([{}, {"original_max_position_embeddings": 16}]))
    if kind == "yarn":
        choices = {"attention_factor": 1.3, "beta_fast": 8, "beta_slow": None, "truncate": False}
        scaling |= {field: value for field, value in choices.items() if draw(st.booleans())}
        scaling |= draw(st.sampled_from([{}, {"mscale": 1.0, "mscale_all_dim": 0.5}]))
    if draw(st.booleans()):
        return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **scaling}}
    if kind == "default":
        return {"rope_theta": theta, "rope_scaling": None}
    return {"rope_theta": theta, "rope_scaling": {draw(st.sampled_from(["type", "rope_type"])): kind, **scaling}}


@st.composite
def window_fields(draw, family, layers):
    window = draw(st.integers(1, 9))
    kinds = st.lists(st.sampled_from(["full_attention", "sliding_attention"]), min_size=layers, max_size=layers)
    if family == "llama":
        return {}
    if family == "mistral":
        return {"sliding_window": draw(st.sampled_from([None, window]))}
    if family == "ministral":  # as the hub has it: a mistral whose layers differ
        return {
            "model_type": draw(st.sampled_from(["mistral", "ministral"])),
            "sliding_window": window,
            "layer_types": draw(kinds),
        }
    used = draw(st.booleans())
    fields = {"use_sliding_window": used, "sliding_window": window, "max_window_layers": draw(st.integers(0, layers))}
    return fields | ({"layer_types": draw(kinds)} if used and draw(st.booleans()) else {})


@st.composite
def configs(draw, families=module.FAMILIES):
    """A small config.json of one of the families."""
    family = draw(st.sampled_from(families))
    layers, kv_heads = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    heads = kv_heads * draw(st.integers(1, 3))
    # at least 16 wide: an RMSNorm over fewer may divide by nearly nothing, and then measures rounding, not the model
    width, head_dim = draw(st.sampled_from([16, 18, 22])), draw(st.sampled_from([4, 8]))
    config = {
        "model_type": family,
        "vocab_size": draw(st.integers(11, 50)),
        "hidden_size": heads * width,
        "intermediate_size": draw(st.integers(8, 40)),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": MAX_POSITIONS,
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5, 0.1])),
        "tie_word_embeddings": draw(st.booleans()),
        "dtype": "float32",
    }
    if family in ("qwen3", "ministral") or draw(st.booleans()):  # the others take hidden_size / heads where it is not given
        config["head_dim"] = head_dim
    for field in ("attention_bias", "mlp_bias"):  # fields that some families ignore
        if draw(st.booleans()):
            config[field] = draw(st.booleans())
    return config | draw(rope_fields()) | draw(window_fields(family, layers))


FIXED = {  # one ordinary configuration, for the tests that need no draw
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": MAX_POSITIONS,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}

# ----------------------------------------------------------------------------------------------------------------------
# the two models, and how far they are apart


def redraw(reference, seed):
    """Draw every parameter anew: scores with a deviation of about 2, logits of about 3, norms and biases far from neutral."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in reference.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if name.endswith("norm.weight"):
            gain = 1.4 if "self_attn" in name else 1.0  # a q/k norm decides how large scores are
            p.data = gain * (1 + 0.3 * noise)
        elif name.endswith("bias"):
            p.data = 0.5 * noise
        else:
            gain = 3.0 if name in ("lm_head.weight", "model.embed_tokens.weight") else 1.4
            p.data = gain * noise / math.sqrt(p.shape[-1])


def write_model(folder, config, seed=0):
    """Write a folder in Hugging Face format whose config.json is just `config`; returns transformers' model of it."""
    (folder / "config.json").write_text(json.dumps(config))
    reference = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), attn_implementation="eager").eval()
    redraw(reference, seed)
    save_file({name: p.data for name, p in reference.named_parameters()}, folder / "model.safetensors", {"format": "pt"})
    return reference


def both(config, seed=0):
    with tempfile.TemporaryDirectory() as folder:
        reference = write_model(Path(folder), config, seed)
        return Transformer.from_pretrained(folder), reference


def draw_tokens(config, shape, seed=0):
    return torch.randint(config["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def difference(ours, reference, tokens):
    """The largest difference of the logits, which are made sure to be able to show one."""
    out = reference(tokens, output_attentions=True)
    assert out.logits.std() >= 1
    if tokens.shape[1] >= 8:  # fewer keys say little
        assert flatness(out.attentions) < 0.95
    return (ours.logits(tokens) - out.logits).abs().max().item()


def flatness(attentions):
    """Mean entropy of the attention of queries that see several keys, as a share of what equal weights would have."""
    weights = torch.stack(attentions).double()  # [L, B, H, T, T]
    seen = (weights > 0).sum(-1)
    entropy = -torch.xlogy(weights, weights).sum(-1)
    return (entropy / seen.clamp(min=2).log())[seen > 1].mean() if (seen > 1).any() else 0.0


# ----------------------------------------------------------------------------------------------------------------------
# logits


def check_logits(config, length, seed):
    ours, reference = both(config, seed)
    assert difference(ours, reference, draw_tokens(config, (3, length), seed)) < TOLERANCE


@pytest.mark.parametrize("layout", ["by row", "by column", "with gaps"])
@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("features", [24, 37])  # 37 cannot be cut into parts
@pytest.mark.parametrize("rows", [1, 2, 9, module.FEW_ROWS + 1])
def test_a_product_without_gradients_is_the_product(rows, features, bias, by_row, layout):
    torch.manual_seed(0)
    linear, x = module.Linear(10, features, bias=bias, by_row=by_row), torch.randn(rows, 10)
    x = {"by row": x, "by column": x.T.contiguous().T, "with gaps": torch.cat((x, x), 1)[:, :10]}[layout]
    with torch.no_grad():
        y = linear(x)
    expected = x.double() @ linear.weight.double().T + (linear.bias.double() if bias else 0)
    torch.testing.assert_close(y.double(), expected, atol=1e-6, rtol=1e-6)
    assert y.is_contiguous() or not by_row


@pytest.mark.parametrize("family", module.FAMILIES)
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
    """Rows of different lengths, prefilled together, then decoded step by step; halfway the first row leaves."""
    ours, reference = both(config, seed)
    rows = [draw_tokens(config, (length + forced,), seed + i) for i, length in enumerate(lengths)]
    want = [reference(row[None]).logits[0] for row in rows]
    prompts = prefill(ours, [row[:length].tolist() for row, length in zip(rows, lengths, strict=True)])
    for (_, logits), length, row in zip(prompts, lengths, want, strict=True):
        assert (logits - row[length - 1]).abs().max() < TOLERANCE
    cache = KVCache(ours, slots=len(rows), capacity=max(lengths) + forced)
    for slot, (held, _) in enumerate(prompts):
        cache.admit(slot, *held)
    live = list(range(len(rows)))
    for step in range(forced):
        place = torch.tensor([lengths[row] + step for row in live])
        token = torch.stack([rows[row][at] for row, at in zip(live, place, strict=True)])
        logits = decode(ours, cache, token, place, span=int(place.max()) + 1)
        for row, got in zip(live, logits, strict=True):
            assert (got - want[row][lengths[row] + step]).abs().max() < TOLERANCE, (row, step)
        if step == forced // 2 and len(live) > 1:  # the last row moves into the slot of the first
            live = [live[-1], *live[1:-1]]
            cache.move(torch.tensor([len(live)]), torch.tensor([0]), span=int(place.max()) + 1)


@examples(60)
@given(configs(), st.lists(st.integers(1, 20), min_size=1, max_size=4), st.integers(1, 10), st.integers(0, 1000))
def test_cached_decode_equals_transformers(config, lengths, forced, seed):
    check_decode(config, lengths, forced, seed)


@pytest.mark.long
@examples(300)
@given(configs(), st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(1, 24), st.integers(0, 1000))
def test_cached_decode_equals_transformers_long(config, lengths, forced, seed):
    check_decode(config, lengths, forced, seed)


# ----------------------------------------------------------------------------------------------------------------------
# the learner


@st.composite
def shapes(draw):
    """Prompt length of each question, and (question, response length) of each row in any order."""
    prompts = draw(st.lists(st.integers(1, 12), min_size=1, max_size=3))
    row = st.tuples(st.integers(0, len(prompts) - 1), st.integers(1, draw(st.sampled_from([1, 2, 12]))))
    return prompts, draw(st.lists(row, min_size=1, max_size=6))


def make_rollout(config, prompts, rows, seed):
    prompt_tokens = [draw_tokens(config, (length,), seed + q) for q, length in enumerate(prompts)]
    tokens = [torch.cat((prompt_tokens[q], draw_tokens(config, (length,), seed + 100 + i))) for i, (q, length) in enumerate(rows)]
    return Rollout(
        question=torch.tensor([q for q, _ in rows]) + 5,  # any numbers may name the questions
        sample=torch.arange(len(rows)),
        prompt_length=torch.tensor([prompts[q] for q, _ in rows]),
        response_length=torch.tensor([length for _, length in rows]),
        tokens=torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True),
        logprob=torch.zeros(len(rows), max(length for _, length in rows)),
        finished=torch.zeros(len(rows), dtype=torch.bool),
    )


def row_by_row(reference, rows, temperature):
    """What Transformer.forward returns, the plain way: transformers' logits of one row after the other."""
    width = int(rows.response_length.max())
    logprob, entropy = [], []
    for i in range(len(rows)):
        start, length = int(rows.prompt_length[i]), int(rows.response_length[i])
        row = rows.tokens[i, : start + length]
        logp = (reference(row[None]).logits[0, start - 1 : -1] / temperature).log_softmax(-1)  # [R, V]
        pad = (0, width - length)
        logprob.append(torch.nn.functional.pad(logp.gather(1, row[start:, None])[:, 0], pad))
        entropy.append(torch.nn.functional.pad(-(logp.exp() * logp).sum(-1), pad))
    return torch.stack(logprob), torch.stack(entropy)


def gradients(named_parameters, outputs, weights):
    names, parameters = zip(*named_parameters, strict=True)
    loss = sum((weight * output).sum() for weight, output in zip(weights, outputs, strict=True))
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def learner_difference(ours, reference, rows, temperature, first_only):
    """(largest difference of the outputs, of the gradients relative to each parameter's largest); asserts that both can show."""
    weights = torch.randn(2, *rows.logprob.shape, generator=torch.Generator().manual_seed(1))
    if first_only:  # the token that the prompt predicts
        weights[:, :, 1:] = 0
    want = row_by_row(reference, rows, temperature)
    got = ours(rows, temperature)
    outputs = max((a - b).abs().max().item() for a, b in zip(got, want, strict=True))
    want_grad = gradients(reference.named_parameters(), want, weights)
    got_grad = hf_tensors(ours.config, gradients(ours.named_parameters(), got, weights))
    assert got_grad.keys() == want_grad.keys() and want_grad["model.norm.weight"].abs().max() > 0
    scale = max(grad.abs().max() for grad in want_grad.values()) * 1e-3  # some gradients are nothing but rounding
    worst = max((got_grad[n] - g).abs().max() / max(g.abs().max(), scale) for n, g in want_grad.items())
    return outputs, worst.item()


def check_learner(config, shape, temperature, first_only, seed):
    ours, reference = both(config, seed)
    rows = make_rollout(config, *shape, seed)
    outputs, grads = learner_difference(ours, reference, rows, temperature, first_only)
    assert outputs < TOLERANCE and grads < NOTICED
    ours.checkpointing = True
    assert learner_difference(ours, reference, rows, temperature, first_only) == (outputs, grads)


@examples(60)
@given(configs(), shapes(), st.sampled_from([0.6, 1.0, 1.3]), st.booleans(), st.integers(0, 1000))
def test_learner_equals_transformers_row_by_row(config, shape, temperature, first_only, seed):
    check_learner(config, shape, temperature, first_only, seed)


@pytest.mark.long
@examples(300)
@given(configs(), shapes(), st.sampled_from([0.6, 1.0, 1.3]), st.booleans(), st.integers(0, 1000))
def test_learner_equals_transformers_row_by_row_long(config, shape, temperature, first_only, seed):
    check_learner(config, shape, temperature, first_only, seed)


# ----------------------------------------------------------------------------------------------------------------------
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


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
YARN = {"factor": 4.0, "original_max_position_embeddings": 16}
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
    "llama3 ignored": ({"rope_scaling": {"rope_type": "llama3", **LLAMA3}}, other_rope(rope_type="default")),
    "llama3 as linear": ({"rope_scaling": {"rope_type": "llama3", **LLAMA3}}, other_rope(rope_type="linear")),
    "yarn ignored": ({"rope_scaling": {"rope_type": "yarn", **YARN}}, other_rope(rope_type="default")),
    "yarn without magnitude": ({"rope_scaling": {"rope_type": "yarn", **YARN}}, other_rope(attention_factor=1.0)),
    "yarn truncated": (
        {"rope_theta": 50.0, "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "truncate": False}},
        other_rope(truncate=True),
    ),
    "dynamic as linear": ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, other_rope(rope_type="linear")),
    "other rope base": ({"rope_theta": 10000.0}, other_rope(rope_theta=9000.0)),
    "window ignored": ({"model_type": "mistral", "sliding_window": 8}, other_windows(lambda window: None)),
    "window off by one": ({"model_type": "mistral", "sliding_window": 8}, other_windows(lambda window: window + 1)),
    "window everywhere": (
        {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
        lambda model: setattr(model, "config", dataclasses.replace(model.config, windows=(8, 8))),
    ),
}


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

    def late(cache, place, span):
        open_step(cache, place + 1, span + 1)  # where the key is put, and how far the token sees

    monkeypatch.setattr(KVCache, "open_step", late)
    with pytest.raises((AssertionError, IndexError)):
        check_decode(FIXED, [3, 20, 7], 6, seed=0)


def test_cached_decode_notices_an_ignored_window(monkeypatch):
    config = FIXED | {"model_type": "mistral", "sliding_window": 8}
    check_decode(config, [3, 20, 7], 6, seed=0)
    monkeypatch.setattr(KVCache, "windows", property(lambda cache: (None, None), lambda cache, value: None), raising=False)
    with pytest.raises(AssertionError):
        check_decode(config, [3, 20, 7], 6, seed=0)


SHAPE = ([5, 9], [(1, 6), (0, 1), (1, 3), (0, 8)])


def test_learner_notices_a_wrong_start(monkeypatch):
    """Responses that begin one position late behind their prompt change the outputs."""
    check_learner(FIXED, SHAPE, 1.0, False, seed=0)
    responses = Pack.responses.__func__

    def late(cls, rows, windows):
        pack = responses(cls, rows, windows)
        pack.positions[14:] += 1  # after the prompts' 5 and 9 tokens
        return pack

    monkeypatch.setattr(Pack, "responses", classmethod(late))
    ours, reference = both(FIXED)
    assert learner_difference(ours, reference, make_rollout(FIXED, *SHAPE, 0), 1.0, False)[0] > NOTICED


def test_learner_notices_a_prompt_without_gradient(monkeypatch):
    """Keys and values of the prompt that responses see as constants leave the outputs as they are, but not the gradients."""
    attend = Segments.attend

    def detached(self, window, q, k, v):
        if len(self.mask(window)) > 1:  # the responses' segment: rows start at different places
            k, v = (torch.cat((x[:14].detach(), x[14:])) for x in (k, v))
        return attend(self, window, q, k, v)

    monkeypatch.setattr(Segments, "attend", detached)
    ours, reference = both(FIXED)
    outputs, grads = learner_difference(ours, reference, make_rollout(FIXED, *SHAPE, 0), 1.0, False)
    assert outputs < TOLERANCE and grads > 10 * NOTICED


def varlen_reference(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
                     causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
                     return_attn_probs=False, block_table=None):  # fmt: skip
    """flash_attn 2.8.3's flash_attn_varlen_func, signature and checks, in plain torch and in any precision."""
    assert causal and not (dropout_p or softmax_scale or softcap or alibi_slopes or return_attn_probs or block_table)
    assert q.shape[1] % k.shape[1] == 0 and q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    q_ends, k_ends = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    assert q_ends[0] == k_ends[0] == 0 and q_ends[-1] == len(q) and k_ends[-1] == len(k) == len(v)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    rows = []
    for q_from, q_to, k_from, k_to in zip(q_ends, q_ends[1:], k_ends, k_ends[1:], strict=False):
        queries, keys = q_to - q_from, k_to - k_from
        assert queries <= max_seqlen_q and keys <= max_seqlen_k
        behind = torch.arange(queries)[:, None] + keys - queries - torch.arange(keys)  # lined up at the bottom right
        seen = (behind >= 0) & ((behind <= window_size[0]) | (window_size[0] < 0))
        scores = torch.einsum("qhe,khe->hqk", q[q_from:q_to], k[k_from:k_to]) / q.shape[-1] ** 0.5
        probability = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        rows.append(torch.einsum("hqk,khe->qhe", probability, v[k_from:k_to]))
    return torch.cat(rows)


@pytest.mark.parametrize("window", [None, 4])
def test_learner_with_flash_attn_equals_transformers(monkeypatch, window):
    """The call that a GPU makes without padding, against a reference of its signature: outputs and gradients."""
    calls = []
    monkeypatch.setattr("model.flash_attn_varlen_func", lambda *a, **k: calls.append(1) or varlen_reference(*a, **k))
    monkeypatch.setattr("model.flash_takes", lambda call, dtype, head_dim: call is not None)  # fp32 too
    check_learner(FIXED | ({"model_type": "mistral", "sliding_window": window} if window else {}), SHAPE, 1.0, False, seed=0)
    assert calls


def test_flash_attn_is_called_only_with_what_it_takes():
    half = torch.bfloat16
    takes = [(half, 64), (torch.float16, 256)]
    refuses = [(torch.float32, 64), (half, 20), (half, 264)]
    assert all(flash_takes(len, *case) for case in takes) and not any(flash_takes(len, *case) for case in refuses)
    assert not flash_takes(None, half, 64)


# ----------------------------------------------------------------------------------------------------------------------
# files


@pytest.fixture
def folder(tmp_path):
    """A good model of one shard, to be damaged."""
    path = tmp_path / "some-model"
    path.mkdir()
    write_model(path, FIXED)
    return path


def edit_config(folder, **changes):
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | changes))


def edit_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def shard(folder):
    """Cut model.safetensors in two, with an index, as the hub has it."""
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    files = {name: f"model-0000{1 + (i >= len(names) // 2)}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in sorted(set(files.values())):
        save_file({name: weights[name] for name in names if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    (folder / "model.safetensors").unlink()
    return files


def assert_one_sentence(error, *words):
    """What a user sees: one line of readable length that names every one of `words`."""
    text = str(error)
    assert "\n" not in text and 20 < len(text) < 500, text
    assert all(str(word) in text for word in words), text


def refused(folder, *words, kind=ValueError):
    with pytest.raises(kind) as caught:
        Transformer.from_pretrained(folder)
    assert type(caught.value) is kind
    assert_one_sentence(caught.value, *words)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sharded", [False, True])
def test_reads_every_dtype_and_shards(folder, dtype, sharded):
    edit_weights(folder, lambda weights: weights.update({name: w.to(dtype) for name, w in weights.items()}))
    want = load_file(folder / "model.safetensors")
    if sharded:
        shard(folder)
    ours = Transformer.from_pretrained(folder)
    got = hf_tensors(ours.config, dict(ours.named_parameters()))
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name].float()) and got[name].dtype == torch.float32 for name in want)
    assert all(p.requires_grad and not p.is_meta for p in ours.parameters())
    half = Transformer.from_pretrained(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16} and half.rope_frequency.dtype == torch.float32


def test_reads_what_transformers_writes(tmp_path):
    for changes in (
        {"tie_word_embeddings": True},
        {"model_type": "ministral", "layer_types": ["full_attention", "sliding_attention"]},
    ):
        with tempfile.TemporaryDirectory() as scratch:
            reference = write_model(Path(scratch), FIXED | changes)
        reference.save_pretrained(tmp_path, max_shard_size="20KB")
        ours = Transformer.from_pretrained(tmp_path)
        assert difference(ours, reference, draw_tokens(FIXED, (2, 20))) < TOLERANCE


@pytest.mark.parametrize(
    "changes", [{}, {"tie_word_embeddings": True}, {"model_type": "qwen3", "rope_scaling": {"rope_type": "yarn", **YARN}}]
)
@pytest.mark.parametrize("shard_size", ["5GB", "20KB"])
def test_save_pretrained_round_trip(tmp_path, monkeypatch, capfd, changes, shard_size):
    config = {**FIXED, **changes, "torch_dtype": "bfloat16", "eos_token_id": [1, 2], "note": "kept"}
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    write_model(source, config)
    (source / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    monkeypatch.setattr(module, "SHARD_SIZE", shard_size)
    capfd.readouterr()
    ours = Transformer.from_pretrained(source)
    ours.save_pretrained(target)
    ours.save_pretrained(target)  # over itself, as a run does
    ours.source = target
    ours.save_pretrained(target)
    assert "".join(capfd.readouterr()) == ""
    assert len(list(target.glob("*.safetensors"))) == (
        1 if shard_size == "5GB" else len(list(target.glob("model-*.safetensors")))
    )
    del config["torch_dtype"]
    assert json.loads((target / "config.json").read_text()) == config | {"dtype": "float32"}
    assert (target / "generation_config.json").read_text() == '{"eos_token_id": [1, 2]}'
    theirs = AutoModelForCausalLM.from_pretrained(target, attn_implementation="eager")
    assert theirs.dtype == torch.float32
    assert difference(ours, theirs, draw_tokens(FIXED, (2, 20))) < TOLERANCE
    again = Transformer.from_pretrained(target)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), again.parameters(), strict=True))


def test_tied_head_is_one_parameter(tmp_path):
    write_model(tmp_path, FIXED | {"tie_word_embeddings": True})
    ours = Transformer.from_pretrained(tmp_path)
    assert ours.lm_head.weight is ours.embed_tokens.weight
    assert "lm_head.weight" not in dict(ours.named_parameters())
    embedding = "model.embed_tokens.weight"
    edit_weights(tmp_path, lambda weights: weights.update({"lm_head.weight": weights[embedding].clone()}))  # some files have both
    Transformer.from_pretrained(tmp_path)
    edit_weights(tmp_path, lambda weights: weights["lm_head.weight"].add_(1))
    refused(tmp_path, "config.json", "tie_word_embeddings", "lm_head.weight")


def test_weights_outlive_their_file(folder):
    """safetensors maps the file into memory: without a copy, writing over it would change the model, or kill the process."""
    ours = Transformer.from_pretrained(folder)
    before = [p.detach().clone() for p in ours.parameters()]
    with open(folder / "model.safetensors", "r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        file.write(bytes(size))
    assert all(torch.equal(a, b) for a, b in zip(before, ours.parameters(), strict=True))


def test_max_positions_is_what_config_says(folder):
    assert read_config(folder).max_positions == MAX_POSITIONS


def test_old_rotary_buffers_are_ignored(folder):
    edit_weights(folder, lambda weights: weights.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    Transformer.from_pretrained(folder)


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1])
@pytest.mark.parametrize("sharded", [False, True])
def test_truncated_weights_are_refused(folder, keep, sharded):
    path = folder / "model.safetensors"
    if sharded:
        path = folder / sorted(shard(folder).values())[-1]
    path.write_bytes(path.read_bytes()[:keep])
    refused(folder, path, "safetensors")


@pytest.mark.parametrize(
    "text", [b"\xff" * 64, b"not a model at all, but long enough to have a header", b"\x02" + b"\0" * 7 + b"{}" + b"x"]
)
def test_corrupt_weights_are_refused(folder, text):
    (folder / "model.safetensors").write_bytes(text)
    refused(folder, folder / "model.safetensors", "safetensors")


def test_missing_weights_are_refused(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"pickle")  # as deepseek-math-7b-instruct has it
    refused(folder, folder, "pytorch_model.bin", "save_pretrained", kind=FileNotFoundError)


def test_missing_shard_is_refused(folder):
    files = shard(folder)
    gone = folder / sorted(files.values())[-1]
    gone.unlink()
    refused(folder, gone, "model.safetensors.index.json", kind=FileNotFoundError)


def test_shard_without_its_tensor_is_refused(folder):
    files = shard(folder)
    name = "model.norm.weight"
    weights = load_file(folder / files[name])
    del weights[name]
    save_file(weights, folder / files[name])
    refused(folder, folder / files[name], name, "model.safetensors.index.json")


@pytest.mark.parametrize("text", ["", "[]", "{", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', '{"weight_map": ["a"]}'])
def test_damaged_index_is_refused(folder, text):
    shard(folder)
    (folder / "model.safetensors.index.json").write_text(text)
    refused(folder, folder / "model.safetensors.index.json")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("model.norm.weight", lambda w: w.pop("model.norm.weight")),
        ("lm_head.weight", lambda w: w.pop("lm_head.weight")),
        ("model.layers.0.self_attn.q_proj.bias", lambda w: w.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)})),
        ("model.layers.2.mlp.up_proj.weight", lambda w: w.update({"model.layers.2.mlp.up_proj.weight": torch.zeros(32, 24)})),
        ("model.embed_tokens.weight is [41, 24]", lambda w: w.update({"model.embed_tokens.weight": torch.zeros(41, 24)})),
        ("model.norm.weight is torch.int8", lambda w: w.update({"model.norm.weight": torch.zeros(24, dtype=torch.int8)})),
    ],
)
def test_weights_that_do_not_fit_are_refused(folder, name, change):
    edit_weights(folder, change)
    refused(folder, folder, name)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\0"])
def test_config_that_is_no_json_is_refused(folder, text):
    (folder / "config.json").write_text(text)
    refused(folder, folder / "config.json", "JSON")


def test_missing_config_is_refused(folder):
    (folder / "config.json").unlink()
    refused(folder, folder, "no config.json here", kind=FileNotFoundError)


SLIDING = ["full_attention", "sliding_attention"]
BAD_FIELDS = [  # (what the sentence names, the fields)
    *(("model_type", {"model_type": value}) for value in ("mixtral", "qwen3_moe", "", None, 3, ["llama"])),
    ("quantization_config", {"quantization_config": {"quant_method": "gptq"}}),
    ("auto_map", {"auto_map": {"AutoModelForCausalLM": "modeling.Evil"}}),
    ("hidden_act", {"hidden_act": "gelu"}),
    ("hidden_act", {"hidden_act": 3}),
    *((field, {field: value}) for field in module.SIZES for value in (0, -1, "3", 2.5, True, [3], 10**30)),
    *((field, {field: None}) for field in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")),
    *(("rms_norm_eps", {"rms_norm_eps": value}) for value in (-1.0, "small", None, float("nan"))),
    ("num_key_value_heads", {"num_key_value_heads": 3}),
    ("head_dim", {"head_dim": 7}),
    ("head_dim", {"model_type": "qwen2", "head_dim": 3}),
    ("attention_bias", {"attention_bias": "yes"}),
    ("tie_word_embeddings", {"tie_word_embeddings": "no"}),
    *(("rope_theta", {"rope_theta": value}) for value in (0, -1.0, "10000", None, float("inf"))),
    *(("rope_type", {"rope_scaling": {"rope_type": kind, "factor": 2.0}}) for kind in ("longrope", "su", None, ["linear"])),
    ("rope_type", {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}),
    *(("rope_scaling", {"rope_scaling": value}) for value in ("linear", 3, [2])),
    ("rope_parameters", {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}}),
    *(("factor", {"rope_scaling": {"type": kind}}) for kind in ("linear", "dynamic", "yarn", "llama3")),
    *(("factor", {"rope_scaling": {"type": "linear", "factor": value}}) for value in (None, "2", 0, -2.0, True)),
    *((field, {"rope_scaling": {"rope_type": "llama3", **LLAMA3, field: None}}) for field in LLAMA3),
    ("low_freq_factor", {"rope_scaling": {"rope_type": "llama3", **LLAMA3, "low_freq_factor": 4.0}}),
    ("beta_fast", {"rope_scaling": {"rope_type": "yarn", **YARN, "beta_fast": "32"}}),
    ("original_max", {"rope_scaling": {"rope_type": "yarn", **YARN, "original_max_position_embeddings": 0}}),
    ("partial_rotary_factor", {"partial_rotary_factor": 0.5}),
    ("partial_rotary_factor", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
    ("layer_types", {"model_type": "qwen2", "layer_types": ["full_attention"]}),
    ("layer_types", {"model_type": "qwen2", "layer_types": ["full_attention", "linear_attention"]}),
    ("layer_types", {"model_type": "qwen3", "layer_types": 3}),
    ("sliding_window", {"model_type": "qwen2", "layer_types": SLIDING}),
    ("sliding_window", {"model_type": "mistral", "layer_types": SLIDING, "sliding_window": None}),
    *(("sliding_window", {"model_type": "mistral", "sliding_window": value}) for value in (0, -4, "8")),
    ("use_sliding_window", {"model_type": "qwen2", "use_sliding_window": "yes"}),
]


@pytest.mark.parametrize(("field", "changes"), BAD_FIELDS, ids=[json.dumps(changes) for _, changes in BAD_FIELDS])
def test_config_that_is_not_understood_is_refused(tmp_path, field, changes):
    (tmp_path / "config.json").write_text(json.dumps(FIXED | changes))
    refused(tmp_path, tmp_path / "config.json", field)


def test_vocabulary_smaller_than_the_tokenizers_is_refused(folder):
    config = read_config(folder)
    tokenizer = SimpleNamespace(name_or_path="some-tokenizer", get_vocab=lambda: {"a": 0, "b": 39})
    check_vocabulary(config, tokenizer)
    tokenizer.get_vocab = lambda: {"a": 0, "<pad>": 40}  # few tokens, but an id past the end
    with pytest.raises(ValueError) as caught:
        check_vocabulary(config, tokenizer)
    assert_one_sentence(caught.value, "some-tokenizer", "vocab_size", 40, 41)


# ----------------------------------------------------------------------------------------------------------------------
# names

PAPER = [
    "Qwen/Qwen2.5-Math-1.5B",
    "Qwen/Qwen2.5-Math-7B",
    "Qwen/Qwen2.5-7B",
    "Qwen/Qwen2.5-32B",
    "Qwen/Qwen3-8B",
    "meta-llama/Llama-3.1-8B-Instruct",
    "meta-llama/Llama-3.2-3B-Instruct",
    "sail/Llama-3.2-3B-Oat-Zero",
    "mistralai/Mistral-Nemo-Instruct-2407",
    "mistralai/Ministral-8B-Instruct-2410",
    "deepseek-ai/deepseek-math-7b-instruct",
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
    "Skywork/Skywork-OR1-Math-7B",
]


@pytest.fixture
def asked(monkeypatch):
    """What resolve asks the hub for; nothing is downloaded."""
    calls = []

    def snapshot_download(repo, allow_patterns):
        calls.append((repo, allow_patterns))
        return "/downloaded"

    monkeypatch.setattr(module, "snapshot_download", snapshot_download)
    return calls


@pytest.mark.parametrize("repo", PAPER)
def test_bare_names_of_the_papers_models(asked, repo):
    assert resolve(repo) == resolve(repo.split("/")[1]) == Path("/downloaded")
    assert [call[0] for call in asked] == [repo, repo]


def test_only_safetensors_and_tokenizer_are_downloaded(asked):
    resolve("Mistral-Nemo-Instruct-2407")
    wanted = ["config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json",
              "model-00001-of-00005.safetensors", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
              "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json"]  # fmt: skip
    others = ["consolidated.safetensors", "consolidated-00001-of-00002.safetensors", "params.json", "tekken.json", "README.md",
              "pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "original/consolidated.00.pth", "original/params.json",
              "modeling_evil.py", "tf_model.h5", "flax_model.msgpack", "onnx/model.onnx", "optimizer.pt"]  # fmt: skip
    assert sorted(filter_repo_objects(wanted + others, allow_patterns=asked[0][1])) == sorted(wanted)


def test_folders_come_first(tmp_path, monkeypatch, asked):
    (tmp_path / "Qwen2.5-Local").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("Qwen2.5-Local", "./Qwen2.5-Local", str(tmp_path / "Qwen2.5-Local"), "~/Qwen2.5-Local"):
        assert resolve(name).resolve() == (tmp_path / "Qwen2.5-Local").resolve()
    assert asked == []


@pytest.mark.parametrize("name", ["", "./nowhere", "/no/where", "~/nowhere", "a/b/c", "unheard-of-7B", "x\0y", "n" * 5000])
def test_names_that_cannot_be_are_refused_without_asking(asked, name):
    with pytest.raises(FileNotFoundError):
        resolve(name)
    assert asked == []


def test_a_file_is_not_a_model(tmp_path, asked):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(FileNotFoundError) as caught:
        resolve(str(tmp_path / "model.safetensors"))
    assert_one_sentence(caught.value, tmp_path, "the folder that holds config.json")


def hub_error(kind, status):
    response = SimpleNamespace(headers={}, request=None, status_code=status)
    return kind(f"{status} Client Error.\n\nSomething went wrong.\nhttps://huggingface.co/api", response=response)


HUB_FAILURES = {
    "gated": (
        hub_error(hub_errors.GatedRepoError, 403),
        "accept its licence at https://huggingface.co/Qwen/Qwen9-1B and set HF_TOKEN",
    ),
    "typo": (hub_error(hub_errors.RepositoryNotFoundError, 404), "check the spelling"),
    "bad token": (hub_error(hub_errors.HfHubHTTPError, 401), "check HF_TOKEN"),
    "server": (hub_error(hub_errors.HfHubHTTPError, 500), "run again"),
    "no network": (hub_errors.LocalEntryNotFoundError("Cannot find\nan appropriate snapshot"), "cannot be reached"),
    "offline": (hub_errors.OfflineModeIsEnabled("offline"), "cannot be reached"),
    "broken off": (hub_errors.HTTPError("peer closed connection\nwithout a word"), "run again: it resumes"),
    "connection reset": (ConnectionResetError(104, "Connection reset by peer"), "run again: it resumes"),
    "bad id": (hub_errors.HFValidationError("Repo id must be in the form 'repo_name' or 'namespace/repo_name'"), "owner/name"),
    "full disk": (OSError(errno.ENOSPC, "No space left on device"), "HF_HOME"),
    "full disk in hf_xet": (RuntimeError("Data processing error: I/O error: No space left on device (os error 28)"), "HF_HOME"),
    "read-only cache": (PermissionError(errno.EACCES, "Permission denied", "/cache"), "/cache"),
}


@pytest.mark.parametrize("failure", HUB_FAILURES)
def test_failed_downloads_say_what_to_do(monkeypatch, failure):
    error, words = HUB_FAILURES[failure]

    def snapshot_download(repo, allow_patterns):
        raise error

    monkeypatch.setattr(module, "snapshot_download", snapshot_download)
    with pytest.raises(FileNotFoundError) as caught:
        resolve("Qwen9-1B")
    assert_one_sentence(caught.value, "Qwen/Qwen9-1B", words)


def test_real_cache_offline(tmp_path):
    """The real hub client in a process of its own: HF_HOME's cache is used, HF_HUB_OFFLINE obeyed."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "hub" / "models--Qwen--Qwen2.5-Cached"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    (repo / "snapshots" / commit).mkdir(parents=True)
    write_model(repo / "snapshots" / commit, FIXED | {"model_type": "qwen2"})
    program = """
import model
print(model.Transformer.from_pretrained(model.resolve("Qwen2.5-Cached")).config.layers)
for name in ("Qwen2.5-Absent", "not a/hub id"):
    try:
        model.resolve(name)
    except FileNotFoundError as error:
        print(error)
"""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGINGFACE"))}
    environment |= {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(module.__file__).parent)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    layers, absent, invalid = done.stdout.strip().splitlines()
    assert layers == "2"
    assert_one_sentence(absent, "Qwen/Qwen2.5-Absent", "cannot be reached")
    assert_one_sentence(invalid, "not a/hub id", "owner/name")
