"""Frequencies of rotary positions, and how the scaled types adapt them to longer contexts."""

import math

import torch


def rope_frequencies(config):
    """Radians per position for each pair of a head, [E/2] in fp32, and a factor on cos and sin (for yarn).

    Pair i rotates by theta^(-2i/E) per position (Su et al. 2021, arXiv 2104.09864). The scaled types adapt
    that to longer contexts. `linear` slows down all pairs; `llama3` and `yarn` slow down those that make less
    than about one turn in the original context, with a ramp to the faster ones, which do not change;
    `dynamic` changes nothing up to max_position_embeddings, our limit.
    """
    rope, width = config.rope, config.head_dim
    kind, theta = rope.get("rope_type", "default"), rope["rope_theta"]
    frequency = theta ** -(torch.arange(0, width, 2, dtype=torch.float32) / width)  # [E/2]
    if kind == "linear":
        return frequency / rope["factor"], 1.0
    if kind == "llama3":
        original = rope["original_max_position_embeddings"]
        turns = original * frequency / (2 * math.pi)  # of each pair in the original context
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)  # 0: slowed down by `factor`, 1: unchanged
        return frequency * (keep + (1 - keep) / rope["factor"]), 1.0
    if kind == "yarn":
        return yarn_frequencies(frequency, rope, width), yarn_magnitude(rope)
    return frequency, 1.0


def yarn_frequencies(frequency, rope, width):
    """YaRN (Peng et al. 2023, arXiv 2309.00071, section 3.2): slow down slow pairs, keep fast ones."""
    original, theta = rope["original_max_position_embeddings"], rope["rope_theta"]

    def pair_that_turns(times):  # index of the pair that makes this many turns in the original context
        return width * math.log(original / (times * 2 * math.pi)) / (2 * math.log(theta))

    low = pair_that_turns(rope.get("beta_fast") or 32)
    high = pair_that_turns(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    ramp = (torch.arange(width // 2) - low) / (high - low or 0.001)
    ramp = ramp.clamp(0, 1)  # 0: unchanged, 1: slowed down by `factor`
    return frequency * (1 - ramp + ramp / rope["factor"])


def yarn_magnitude(rope):
    """YaRN's factor on cos and sin (section 3.4): it sharpens the attention over a longer context."""

    def magnitude(weight=1.0):
        return 0.1 * weight * math.log(rope["factor"]) + 1.0 if rope["factor"] > 1 else 1.0

    if rope.get("attention_factor") is not None:
        return rope["attention_factor"]
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return magnitude(rope["mscale"]) / magnitude(rope["mscale_all_dim"])
    return magnitude()
