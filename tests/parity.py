"""Test-only: random models of every family, as transformers and we have them, and how far apart they are.

Every parity test redraws all parameters, norms and biases included, so that logits have a standard deviation
of at least 1 and attention is far from flat: with a fresh initialisation half of the possible mistakes would
hide below the tolerance.
"""

import json
import math
import tempfile
from pathlib import Path

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from model import Transformer
from support.pretrained import FAMILIES, ROPE_TYPES

# a correct model differs by less than the first, a wrong one by more than the second
TOLERANCE, NOTICED = 1e-4, 1e-3
MAX_POSITIONS = 64
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip
YARN = {"factor": 4.0, "original_max_position_embeddings": 16}


def examples(count):
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    plain = settings(derandomize=True, database=None, deadline=None, suppress_health_check=checks)
    return settings(plain, max_examples=count)


# ------------------------------------------------------------------------------------------------------------
# random configurations


@st.composite
def rope_fields(draw):
    """The rope part of a config.json: any type, in the old or the new spelling."""
    kind = draw(st.sampled_from(sorted(ROPE_TYPES)))
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
    scaling[draw(st.sampled_from(["type", "rope_type"]))] = kind
    return {"rope_theta": theta, "rope_scaling": scaling}


@st.composite
def window_fields(draw, family, layers):
    window = draw(st.integers(1, 9))
    kind = st.sampled_from(["full_attention", "sliding_attention"])
    kinds = st.lists(kind, min_size=layers, max_size=layers)
    if family == "llama":
        return {}
    if family == "mistral":
        return {"sliding_window": draw(st.sampled_from([None, window]))}
    if family == "ministral":  # as the hub has it: a mistral whose layers differ
        name = draw(st.sampled_from(["mistral", "ministral"]))
        return {"model_type": name, "sliding_window": window, "layer_types": draw(kinds)}
    used = draw(st.booleans())
    fields = {"use_sliding_window": used, "sliding_window": window}
    fields["max_window_layers"] = draw(st.integers(0, layers))
    return fields | ({"layer_types": draw(kinds)} if used and draw(st.booleans()) else {})


@st.composite
def configs(draw, families=FAMILIES):
    """A small config.json of one of the families."""
    family = draw(st.sampled_from(families))
    layers, kv_heads = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    heads = kv_heads * draw(st.integers(1, 3))
    # at least 16 wide: an RMSNorm over fewer may divide by nearly nothing, and then measures only rounding
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
    # the other families take hidden_size / heads where head_dim is not given
    if family in ("qwen3", "ministral") or draw(st.booleans()):
        config["head_dim"] = head_dim
    for field in ("attention_bias", "mlp_bias"):  # fields that some families ignore
        if draw(st.booleans()):
            config[field] = draw(st.booleans())
    return config | draw(rope_fields()) | draw(window_fields(family, layers))


FIXED = {  # one ordinary configuration, for the tests that need no draw
    "model_type": "llama", "vocab_size": 40, "hidden_size": 24, "intermediate_size": 32,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": MAX_POSITIONS, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
}  # fmt: skip

# ------------------------------------------------------------------------------------------------------------
# the two models, and how far they are apart


def redraw(reference, seed):
    """Draw every parameter anew, norms and biases far from neutral; logits get a deviation of about 3."""
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
    """Write a Hugging Face folder whose config.json is just `config`; returns transformers' model of it."""
    (folder / "config.json").write_text(json.dumps(config))
    read = AutoConfig.from_pretrained(folder)
    reference = AutoModelForCausalLM.from_config(read, attn_implementation="eager").eval()
    redraw(reference, seed)
    weights = {name: p.data for name, p in reference.named_parameters()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
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
    """Mean entropy of the attention of queries that see several keys, as a share of that of equal weights."""
    weights = torch.stack(attentions).double()  # [L, B, H, T, T]
    seen = (weights > 0).sum(-1)
    entropy = -torch.xlogy(weights, weights).sum(-1)
    return (entropy / seen.clamp(min=2).log())[seen > 1].mean() if (seen > 1).any() else 0.0


def assert_one_sentence(error, *words):
    """What a user sees: one line of readable length that names every one of `words`."""
    text = str(error)
    assert "\n" not in text and 20 < len(text) < 500, text
    assert all(str(word) in text for word in words), text
