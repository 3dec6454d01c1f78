"""One decoder-only transformer for the Qwen2, Qwen3, Llama and Mistral families; Hugging Face weights in and out.

Token ids go in as one flat list, the tokens of all rows one after another, so that embeddings, norms and linear layers
never see padding. Only attention knows which token belongs to which row, and it is handed in as a function
`attend(layer, q, k, v)`: packed rows for learning and prefill (`Segments` below), a KV cache for decoding (rollout.py).
That is the whole difference between sampling and learning; everything else is the same code.

Letters in shape comments: B rows, T tokens, D width, H heads, K key/value heads, E head width, V vocabulary.
"""

import errno
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import errors as hub_errors
from huggingface_hub import save_torch_state_dict, snapshot_download
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig

from kernels.logprob import linear_logprob

try:
    from flash_attn import flash_attn_varlen_func
except ImportError:  # an optional package, of CUDA only
    flash_attn_varlen_func = None

ONEDNN = torch.backends.mkldnn.is_available()
FEW_ROWS = 128  # of a product, see Linear: measured, from 256 on it makes no difference
FAMILIES = ("qwen2", "qwen3", "llama", "mistral", "ministral")  # of config.json's model_type
ROPE_TYPES = {  # rope_type: the fields that it cannot do without
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}

# ----------------------------------------------------------------------------------------------------------------------
# configuration


@dataclass(frozen=True)
class ModelConfig:
    """What the forward pass has to know, read from config.json by `read_config`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float
    max_positions: int
    rope: dict  # rope_type, rope_theta and what that type needs besides
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool  # Qwen3: an RMSNorm over each head of q and k
    tied: bool  # the head is the embedding matrix
    windows: tuple  # a layer: how many keys a query sees, itself included; None is all of them


def read_config(folder):
    """Read `folder`/config.json into a ModelConfig. Raises FileNotFoundError, ValueError: the field that we cannot honour."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: no config.json here; a model is a folder in Hugging Face format")
    check_fields(read_json(path), path)
    try:
        hf = AutoConfig.from_pretrained(folder)  # fills in what older files leave out, and gathers the rope fields
    except Exception as error:  # its checks raise a dozen types
        raise ValueError(f"{path}: transformers refuses it ({one_line(error)})") from None
    family = hf.model_type
    attention_bias = family in ("qwen3", "llama") and hf.attention_bias  # the others ignore the field
    config = ModelConfig(
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        intermediate_size=hf.intermediate_size,
        layers=hf.num_hidden_layers,
        heads=hf.num_attention_heads,
        kv_heads=hf.num_key_value_heads,
        head_dim=getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
        norm_eps=hf.rms_norm_eps,
        max_positions=hf.max_position_embeddings,
        rope=dict(hf.rope_parameters),
        qkv_bias=family == "qwen2" or attention_bias,
        o_bias=attention_bias,
        mlp_bias=family == "llama" and hf.mlp_bias,
        qk_norm=family == "qwen3",
        tied=hf.tie_word_embeddings,
        windows=layer_windows(hf, path),
    )
    if config.heads % config.kv_heads:
        raise ValueError(f"{path}: num_attention_heads {config.heads} is no multiple of num_key_value_heads {config.kv_heads}")
    if config.head_dim % 2 or not config.head_dim:
        raise ValueError(f"{path}: head_dim {config.head_dim} is not even, but rotary positions turn pairs")
    return config


SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
         "head_dim", "max_position_embeddings")  # fmt: skip
POSITIVE = ("rms_norm_eps", "rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
            "attention_factor", "beta_fast", "beta_slow")  # fmt: skip


def check_fields(raw, path):
    """Raise ValueError naming the first field of config.json that this module would get wrong."""
    if raw.get("model_type") not in FAMILIES:
        raise ValueError(f"{path}: model_type {raw.get('model_type')!r} is not one of {', '.join(FAMILIES)}")
    for field in ("quantization_config", "auto_map"):
        if raw.get(field):
            raise ValueError(f"{path}: {field} is set; only plain weights of a built-in architecture are loaded")
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise ValueError(f"{path}: rope_scaling or rope_parameters is not an object of plain values")
    fields = {**raw, **rope}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in list(ROPE_TYPES):
        raise ValueError(f"{path}: rope_type {kind!r} is not one of {', '.join(ROPE_TYPES)}")
    lacking = [field for field in ROPE_TYPES[kind] if rope.get(field) is None]
    if lacking:
        raise ValueError(f"{path}: rope_type {kind!r} needs the field {lacking[0]}")
    for field in SIZES:
        largest = 1024 if field == "num_hidden_layers" else 2**24  # positions are exact in fp32 up to there
        value = raw.get(field)
        if value is not None and not (type(value) is int and 1 <= value <= largest):
            raise ValueError(f"{path}: {field} {value!r} is not a whole number from 1 to {largest}")
    for field in POSITIVE:
        value = fields.get(field, 1)
        if value is None and field in ("attention_factor", "beta_fast", "beta_slow"):
            continue  # as if it were not there
        if not (type(value) in (int, float) and 0 < value < math.inf):
            raise ValueError(f"{path}: {field} {value!r} is not a positive number")
    if kind == "llama3" and rope["low_freq_factor"] >= rope["high_freq_factor"]:
        raise ValueError(f"{path}: low_freq_factor is not below high_freq_factor")
    for field, only in (("hidden_act", "silu"), ("partial_rotary_factor", 1.0)):
        if fields.get(field, only) not in (only, None):
            raise ValueError(f"{path}: {field} {fields[field]!r} is not supported, only {only!r}")


def layer_windows(hf, path):
    """For each layer how many keys a query sees, itself included, or None for all. `hf` is transformers' config."""
    window = None if hf.model_type == "llama" else hf.sliding_window
    kinds = ["full_attention" if window is None else "sliding_attention"] * hf.num_hidden_layers
    if hf.model_type in ("qwen2", "qwen3", "ministral"):  # layers may differ
        kinds = hf.layer_types
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise ValueError(f"{path}: layer_types has {kind!r}; only full_attention and sliding_attention are supported")
        if kind == "sliding_attention" and (window is None or window < 1):
            raise ValueError(f"{path}: sliding_window {window} is not a positive number, but there are layers that use it")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def one_line(error):
    """The last line of what an exception says: wrappers put the reason there."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()


def read_json(path):
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: not a JSON object")
    return value


# ----------------------------------------------------------------------------------------------------------------------
# rotary positions


def rope_frequencies(config):
    """Radians a position for each pair of a head, [E/2] in fp32, and the factor on cos and sin (1 but for yarn).

    Su et al. 2021 (arXiv 2104.09864): pair i turns by theta^(-2i/E) a position. The scaled types stretch that to longer
    contexts: `linear` turns all pairs slower; `llama3` and `yarn` only those that turn less than once or so in the
    original context, with a ramp between; `dynamic` changes nothing up to max_position_embeddings, where we stop anyway.
    """
    rope, width = config.rope, config.head_dim
    kind, theta = rope.get("rope_type", "default"), rope["rope_theta"]
    frequency = theta ** -(torch.arange(0, width, 2, dtype=torch.float32) / width)  # [E/2]
    if kind == "linear":
        return frequency / rope["factor"], 1.0
    if kind == "llama3":
        turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)  # within the original context
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)  # 0: stretched by factor, 1: as it was
        return frequency * (keep + (1 - keep) / rope["factor"]), 1.0
    if kind == "yarn":
        return yarn_frequencies(frequency, rope, width)
    return frequency, 1.0


def yarn_frequencies(frequency, rope, width):
    """YaRN (Peng et al. 2023, arXiv 2309.00071, section 3.2 and 3.4): interpolate the slow pairs, keep the fast ones."""
    original, factor = rope["original_max_position_embeddings"], rope["factor"]

    def pair_that_turns(times):  # index of the pair that makes that many turns in the original context
        return width * math.log(original / (times * 2 * math.pi)) / (2 * math.log(rope["rope_theta"]))

    low, high = pair_that_turns(rope.get("beta_fast") or 32), pair_that_turns(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    stretch = ((torch.arange(width // 2) - low) / (high - low or 0.001)).clamp(0, 1)  # 0: as it was, 1: by factor

    def magnitude(weight=1.0):
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    scale = rope.get("attention_factor")
    if scale is None and rope.get("mscale") and rope.get("mscale_all_dim"):
        scale = magnitude(rope["mscale"]) / magnitude(rope["mscale_all_dim"])
    return frequency * (1 - stretch + stretch / factor), magnitude() if scale is None else scale


def rotation(positions, frequency, scale, dtype):
    """cos and sin of each pair's angle, [T, 1, E] both: a pair is a place of the first half and the same of the second."""
    angle = positions[:, None, None].float() * frequency  # [T, 1, E/2]
    cos, sin = (angle.cos() * scale).to(dtype), (angle.sin() * scale).to(dtype)
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def rotate(x, cos, sin):
    """Turn each head's pairs (a, b) into (a cos - b sin, b cos + a sin): x [T, H, E]."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)  # the roll puts b where a was, and a where b was


# ----------------------------------------------------------------------------------------------------------------------
# layers, named as in Hugging Face checkpoints, but for products of the same input, which are one (`hf_tensors`)


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight over the last dimension (Zhang and Sennrich 2019); sums in fp32, on a GPU one kernel."""

    def forward(self, x):
        return super().forward(x.to(self.weight.dtype))  # that kernel wants one dtype; under autocast it is fp32


class Linear(nn.Linear):
    """nn.Linear, whose product on a CPU without gradients (sampling) is the one that is fastest there for a few rows.

    What comes out may lie column by column in memory, unless by_row.
    """

    def __init__(self, *args, by_row=False, **kwargs):
        super().__init__(*args, **kwargs)
        self.by_row = by_row

    def forward(self, x):
        if not ONEDNN or not x.is_cpu or x.dtype != torch.float32 or torch.is_grad_enabled():
            return super().forward(x)
        parts = math.gcd(self.out_features, 64)
        if len(x) == 1 and parts > 1:  # MKL multiplies one row by one thread, but parts of the weight by all of them
            weight = self.weight.view(parts, -1, self.in_features)
            y = torch.bmm(weight, x.T.expand(parts, -1, 1)).view(1, -1)
        elif self.by_row or len(x) > FEW_ROWS:
            y = onednn_product(x.contiguous(), self.weight)
        else:  # oneDNN packs the second factor anew each time: rather the few rows than the weight
            y = onednn_product(self.weight, x if x.T.is_contiguous() else x.contiguous()).T
        return y if self.bias is None else y.add_(self.bias)


def onednn_product(a, b):
    """a b^T by oneDNN, [M, D], [N, D] -> [M, N]; both without gaps, for what has strides of its own it multiplies very slowly."""
    return torch.ops.mkldnn._linear_pointwise.default(a, b, None, "none", [], "")


class Attention(nn.Module):
    """Grouped-query attention but for the attending itself, which is the caller's `attend`."""

    def __init__(self, config):
        super().__init__()
        self.heads, self.head_dim = (config.heads, config.kv_heads, config.kv_heads), config.head_dim  # of q, k and v
        width = config.heads * config.head_dim
        self.qkv_proj = Linear(config.hidden_size, sum(self.heads) * config.head_dim, bias=config.qkv_bias)
        self.o_proj = Linear(width, config.hidden_size, bias=config.o_bias)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x, cos, sin, attend):
        qkv = self.qkv_proj(x).contiguous().unflatten(-1, (-1, self.head_dim))  # attention wants a head's numbers together
        q, k, v = qkv.split(self.heads, dim=1)  # [T, H, E], [T, K, E] twice
        q = rotate(self.q_norm(q), cos, sin).to(v.dtype)  # under autocast rotation makes it fp32 again
        k = rotate(self.k_norm(k), cos, sin).to(v.dtype)
        return self.o_proj(attend(q, k, v).flatten(-2))  # [T, H, E] -> [T, D]


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer 2020)."""

    def __init__(self, config):
        super().__init__()
        self.gate_up_proj = Linear(config.hidden_size, 2 * config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)  # [T, I] each
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    """Pre-norm residual block."""

    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, attend):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class Tie(torch.autograd.Function):
    """A weight [V, D] twice, as embedding (looked up with a sparse gradient) and as head.

    The few rows of the embedding's gradient are added to the head's in place: autograd would make a second [V, D] of them.
    """

    @staticmethod
    def forward(ctx, weight):
        return weight.view_as(weight), weight.view_as(weight)

    @staticmethod
    def backward(ctx, of_embedding, of_head):
        return of_head.index_put_((of_embedding._indices()[0],), of_embedding._values(), accumulate=True)


class Transformer(nn.Module):
    """The policy. `forward` is the learner's: log-probabilities of responses; `hidden` serves every other caller."""

    def __init__(self, config, source=None):
        super().__init__()
        self.config = config
        self.source = source  # the folder that config.json comes from; written again by save_pretrained
        self.checkpointing = False  # recompute each layer in the backward pass instead of keeping its activations
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False, by_row=True)  # logits are read so
        if config.tied:
            self.lm_head.weight = self.embed_tokens.weight
        with torch.device("cpu"):  # real numbers even while the rest is built on the meta device
            frequency, self.rope_scale = rope_frequencies(config)
        self.register_buffer("rope_frequency", frequency, persistent=False)  # stays fp32: parameters alone are cast

    @classmethod
    def from_pretrained(cls, folder, dtype=torch.float32, device="cpu"):
        """A model from a folder in Hugging Face format (config.json and safetensors, in one file or sharded).

        Raises FileNotFoundError or ValueError, naming the file and the tensor or field, rather than load half a model.
        """
        with torch.device("meta"):
            model = cls(read_config(folder), source=Path(folder))
        model.load_state_dict(read_weights(folder, model, dtype), assign=True, strict=False)  # names checked there
        if model.config.tied:
            model.lm_head.weight = model.embed_tokens.weight
        return model.to(device).requires_grad_(True)

    def save_pretrained(self, folder):
        """Write config.json and fp32 safetensors to `folder`; transformers and vLLM load them."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        raw = read_json(self.source / "config.json")
        raw.pop("torch_dtype", None)  # the older name of dtype
        (folder / "config.json").write_text(json.dumps({**raw, "dtype": "float32"}, indent=2) + "\n")
        if (self.source / "generation_config.json").exists():
            (folder / "generation_config.json").write_bytes((self.source / "generation_config.json").read_bytes())
        weights = hf_tensors(self.config, {name: p.detach() for name, p in self.named_parameters()})
        weights = {name: part.to("cpu", torch.float32, copy=True) for name, part in weights.items()}  # views cannot be saved
        save_torch_state_dict(weights, folder, max_shard_size=SHARD_SIZE)

    @torch.no_grad()
    def copy_from(self, other):
        """Refresh these weights from another model's *in place*, cast to this one's dtype."""
        for mine, theirs in zip(self.parameters(), other.parameters(), strict=True):
            mine.copy_(theirs)

    def hidden(self, tokens, positions, attend, embedded=None):
        """Hidden states before the head: tokens [T], positions [T] -> [T, D]. `attend(layer, q, k, v)` attends.

        embedded [T, D]: the tokens' embeddings, where the caller has looked them up.
        """
        x = self.embed_tokens(tokens) if embedded is None else embedded  # [T, D]
        cos, sin = rotation(positions, self.rope_frequency, self.rope_scale, x.dtype)
        for index, layer in enumerate(self.layers):

            def attend_here(q, k, v, index=index):
                return attend(index, q, k, v)

            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, cos, sin, attend_here, use_reentrant=False)
            else:
                x = layer(x, cos, sin, attend_here)
        return self.norm(x)

    def logits(self, tokens):
        """Plain next-token logits, [B, T] -> [B, T, V]: for tests and exercises, training never builds them."""
        pack = Pack.prompts(tokens, torch.full((len(tokens),), tokens.shape[1]), self.config.windows)
        pack = pack.to(self.rope_frequency.device)
        return self.lm_head(self.hidden(pack.tokens, pack.positions, pack.attend)).unflatten(0, tokens.shape)

    def forward(self, rows, temperature=1.0):
        """Log-probability and entropy of the response tokens of `rows` (a rollout.Rollout), each [B, R], zero past the end.

        R is the longest response. Prompts are computed once a question: rows with the same `question` share theirs.
        """
        pack = Pack.responses(rows, self.config.windows).to(self.rope_frequency.device)
        embedded, head = None, self.lm_head.weight
        if self.config.tied:
            embedding, head = Tie.apply(head)
            embedded = F.embedding(pack.tokens, embedding, sparse=True)
        hidden = self.hidden(pack.tokens, pack.positions, pack.attend, embedded)
        predictors = take(hidden, pack.predictor)  # [N, D]: where each of the N response tokens is predicted
        flat = linear_logprob(predictors, head, pack.target, temperature)
        logprob, entropy = (x.new_zeros(pack.shape.numel()).scatter(0, pack.place, x).view(pack.shape) for x in flat)
        return logprob, entropy


# ----------------------------------------------------------------------------------------------------------------------
# packed rows: which tokens a micro-batch has, and who attends to whom


def take(x, index):
    """x[index] over the first dimension. As an embedding look-up, because the backward of that adds up in a fixed order."""
    return F.embedding(index, x.flatten(1)).unflatten(-1, x.shape[1:])


def ragged(lengths):
    """[G, max(lengths)] of bool (one column at least): True at the first lengths[g] places of row g."""
    return torch.arange(max(int(lengths.max()), 1)) < lengths[:, None]


def numbered(filled, start=0):
    """[G, T] of int64: start, start+1, ... over the True places of `filled` in reading order, 0 elsewhere."""
    index = torch.zeros(filled.shape, dtype=torch.int64)
    index[filled] = torch.arange(start, start + int(filled.sum()))
    return index


def flash_takes(call, dtype, head_dim):
    """Is this function of flash-attn there (not None), and would it take such numbers?"""
    return call is not None and dtype in (torch.float16, torch.bfloat16) and head_dim % 8 == 0 and head_dim <= 256


class Segments:
    """Some rows of the flat tokens for attention: query [G, Tq] and key [G, Tk] hold flat indices, right-padded.

    The first query of row g stands at key number start[g]; query j sees the keys up to number start[g] + j (fewer
    under a sliding window). Padding lies behind the real keys, so the causal mask is all the mask there is. flash-attn
    takes the same rows without padding, one after another; it lines the last query up with the last key.
    """

    def __init__(self, query, filled, key, start):
        self.query, self.key = query, key
        self.real = filled.flatten().nonzero()[:, 0]  # where the real queries are, in reading order
        queries = filled.sum(1)
        key_filled = torch.arange(key.shape[1]) < (start + queries)[:, None]
        self.flat_query, self.flat_key = query[filled], key[key_filled]
        self.ends = [F.pad(lengths.cumsum(0), (1, 0)).int() for lengths in (queries, key_filled.sum(1))]  # [G+1] each
        self.start = start[:1] if bool((start == start[0]).all()) else start  # one mask for all rows where it is the same
        self.masks = {}

    def mask(self, window):
        """Which keys a query sees, [G or 1, 1, Tq, Tk] of bool; made when a layer first asks for it."""
        if window not in self.masks:
            device = self.query.device
            query_at = self.start[:, None, None, None] + torch.arange(self.query.shape[1], device=device)[:, None]
            key_at = torch.arange(self.key.shape[1], device=device)
            causal = key_at <= query_at
            self.masks[window] = causal if window is None else causal & (key_at > query_at - window)
        return self.masks[window]

    def attend(self, window, q, k, v):
        """q [T, H, E], k and v [T, K, E] -> [the real queries in reading order, H, E]."""
        if flash_takes(flash_attn_varlen_func, q.dtype, q.shape[-1]):
            q, k, v = take(q, self.flat_query), take(k, self.flat_key), take(v, self.flat_key)
            window_size = (-1, -1) if window is None else (window - 1, 0)
            lengths = (*self.ends, self.query.shape[1], self.key.shape[1])
            return flash_attn_varlen_func(q, k, v, *lengths, causal=True, window_size=window_size)
        q, k, v = (take(x, index).transpose(1, 2) for x, index in ((q, self.query), (k, self.key), (v, self.key)))
        if q.is_cuda:  # with a mask and shared heads torch has no fused kernel there
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask(window), enable_gqa=not q.is_cuda)  # [G, H, Tq, E]
        return take(out.transpose(1, 2).flatten(0, 1), self.real)


@dataclass
class Pack:
    """The flat tokens of a micro-batch: first each question's prompt, once, then the responses.

    The last token of a response predicts nothing that counts, so it is a target but never an input:

        prompt a b c, responses d e and f g h      tokens     a b c | d | f g
                                                   target     d e | f g h
                                                   predictor  c d | c f g     (as places in tokens)
    """

    windows: tuple
    tokens: torch.Tensor  # [T]
    positions: torch.Tensor  # [T]
    segments: list  # of Segments that cover the tokens in order
    target: torch.Tensor | None = None  # [N] response tokens
    predictor: torch.Tensor | None = None  # [N] the flat place whose hidden state predicts each target
    shape: torch.Size | None = None  # (B, R)
    place: torch.Tensor | None = None  # [N] of each response token in [B, R], flat

    @classmethod
    def prompts(cls, tokens, lengths, windows):
        """Rows of their own, tokens [B, T] right-padded: prefill, and plain logits."""
        filled = ragged(lengths)
        index = numbered(filled)
        segments = [Segments(index, filled, index, torch.zeros_like(lengths))]
        return cls(windows, tokens[filled], torch.arange(filled.shape[1]).expand(filled.shape)[filled], segments)

    @classmethod
    def responses(cls, rows, windows):
        """Prompts once a question, then every response behind its own; rows is a rollout.Rollout on the CPU."""
        first, owner = first_rows(rows.question)
        prompts = cls.prompts(rows.tokens[first, : int(rows.prompt_length.max())], rows.prompt_length[first], windows)
        response = ragged(rows.response_length)  # [B, R]
        inputs = ragged(rows.response_length - 1)  # [B, R-1]; all False where every response is a single token
        at = rows.prompt_length[:, None] + torch.arange(response.shape[1])  # [B, R] column of rows.tokens
        target = rows.tokens.gather(1, at.clamp(max=rows.tokens.shape[1] - 1))  # [B, R]
        prompt_at = prompts.segments[0].query[owner]  # [B, Tp] flat places of each row's prompt
        input_at = numbered(inputs, start=len(prompts.tokens))  # [B, R-1]
        key = prompt_then(prompt_at, input_at, rows.prompt_length)  # [B, Tp + R-1]
        last = prompt_at.gather(1, rows.prompt_length[:, None] - 1)  # [B, 1] the prompt's last token predicts the first
        predictor = torch.cat((last, input_at), 1)[:, : response.shape[1]]  # [B, R]
        return cls(
            windows,
            torch.cat((prompts.tokens, target[:, : inputs.shape[1]][inputs])),
            torch.cat((prompts.positions, at[:, : inputs.shape[1]][inputs])),
            prompts.segments + ([Segments(input_at, inputs, key, rows.prompt_length)] if inputs.any() else []),
            target[response],
            predictor[response],
            response.shape,
            response.flatten().nonzero()[:, 0],
        )

    def attend(self, layer, q, k, v):
        return torch.cat([segment.attend(self.windows[layer], q, k, v) for segment in self.segments])

    def to(self, device):
        """Move every index to the model's device; they are built on the CPU, where their sizes are known without a sync."""
        for holder in (self, *self.segments):
            for name, value in vars(holder).items():
                if isinstance(value, torch.Tensor):
                    setattr(holder, name, value.to(device, non_blocking=True))  # does not wait for what the GPU still does
        for segment in self.segments:
            segment.ends = [end.to(device, non_blocking=True) for end in segment.ends]
        return self


def first_rows(question):
    """The first row of each distinct question [Q], and for each row which of those it belongs to [B]."""
    _, owner = torch.unique(question, return_inverse=True)
    first = torch.full((int(owner.max()) + 1,), len(owner)).scatter_reduce(0, owner, torch.arange(len(owner)), "amin")
    return first, owner


def prompt_then(prompt_at, input_at, prompt_length):
    """Each row's prompt places and right behind them its response places: [B, Tp], [B, Tr] -> [B, Tp + Tr]."""
    behind = torch.arange(prompt_at.shape[1] + input_at.shape[1]) - prompt_length[:, None]  # [B, Tp + Tr]
    prompt_at = F.pad(prompt_at, (0, input_at.shape[1]))
    return torch.where(behind < 0, prompt_at, input_at.gather(1, behind.clamp(0, input_at.shape[1] - 1)))


# ----------------------------------------------------------------------------------------------------------------------
# files and names

SHARD_SIZE = "5GB"  # the largest safetensors file that is written


def hf_tensors(config, tensors):
    """Tensors under our parameters' names -> the same under a Hugging Face checkpoint's, where each projection is its own.

    What is one matrix for us and several there comes as views of its rows.
    """
    width, kv_width, inner = config.heads * config.head_dim, config.kv_heads * config.head_dim, config.intermediate_size
    fused = {
        "qkv_proj": dict(q_proj=width, k_proj=kv_width, v_proj=kv_width),
        "gate_up_proj": dict(gate_proj=inner, up_proj=inner),
    }
    found = {}
    for name, tensor in tensors.items():
        *stem, module, kind = (name if name.startswith("lm_head") else f"model.{name}").split(".")
        parts = fused.get(module, {module: len(tensor)})
        for part, rows in zip(parts, tensor.split(list(parts.values())), strict=True):
            found[".".join((*stem, part, kind))] = rows
    return found


def read_weights(folder, model, dtype):
    """{our name: tensor in dtype} for every parameter of `model`; names, shapes and dtypes are checked on the way."""
    where = weight_files(folder)
    weights = {name: torch.empty(p.shape, dtype=dtype) for name, p in model.named_parameters()}
    wanted = hf_tensors(model.config, weights)
    check_names(folder, wanted.keys(), where.keys(), model.config.tied)
    for path in sorted({where[name] for name in wanted}):
        with open_safetensors(path) as file:
            for name in [name for name in wanted if where[name] == path]:
                tensor, ours = file.get_tensor(name), wanted[name]
                if tensor.shape != ours.shape:
                    raise ValueError(f"{path}: {name} is {list(tensor.shape)}, config.json says {list(ours.shape)}")
                if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
                    raise ValueError(f"{path}: {name} is {tensor.dtype}; only float32, float16 and bfloat16 are read")
                ours.copy_(tensor)
    if model.config.tied and "lm_head.weight" in where:
        head = open_safetensors(where["lm_head.weight"]).get_tensor("lm_head.weight").to(dtype)
        if not torch.equal(head, weights["embed_tokens.weight"]):
            raise ValueError(f"{folder}: config.json sets tie_word_embeddings, but lm_head.weight is not the embedding")
    return weights


def check_names(folder, wanted, held, tied):
    """Raise ValueError unless the files hold exactly the tensors that the model has parameters for."""
    missing, extra = sorted(wanted - held), sorted(held - wanted)
    # old Llama files carry their rotary frequencies, and some tied ones the head a second time
    extra = [n for n in extra if not n.endswith("rotary_emb.inv_freq") and not (tied and n == "lm_head.weight")]
    if missing or extra:
        what = f"lacks the tensor {missing[0]}" if missing else f"has a tensor that config.json leaves no place for, {extra[0]}"
        raise ValueError(
            f"{folder}: {what} ({len(missing)} missing, {len(extra)} left over); do weights and config belong together?"
        )


def weight_files(folder):
    """{Hugging Face tensor name: path of the safetensors file that holds it}."""
    folder = Path(folder)
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if single.is_file():  # it wins where both stand, as in transformers
        return dict.fromkeys(open_safetensors(single).keys(), single)
    if not index.is_file():
        raise FileNotFoundError(
            f"{folder}: no model.safetensors and no {index.name}; pickled weights (pytorch_model.bin) are not read, "
            "transformers' from_pretrained and save_pretrained convert them"
        )
    try:
        where = {name: folder / file for name, file in read_json(index)["weight_map"].items()}
    except (KeyError, AttributeError, TypeError):
        raise ValueError(
            f"{index}: not a safetensors index, a JSON object whose weight_map names a file for each tensor"
        ) from None
    absent = sorted({path for path in where.values() if not path.is_file()})
    if absent:
        raise FileNotFoundError(f"{absent[0]}: this shard is missing, {index.name} names it; copy or download it again")
    held = {path: set(open_safetensors(path).keys()) for path in set(where.values())}
    lost = sorted(name for name, path in where.items() if name not in held[path])
    if lost:
        raise ValueError(f"{where[lost[0]]}: lacks the tensor {lost[0]} that {index.name} says it has")
    return where


def open_safetensors(path):
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a whole safetensors file ({one_line(error)}); copy or download it again") from None


def check_vocabulary(config, tokenizer):
    """Raise ValueError where the tokenizer has ids that the model has no embedding for; the other way round is usual."""
    ids = max(tokenizer.get_vocab().values()) + 1
    if ids > config.vocab_size:
        raise ValueError(
            f"{tokenizer.name_or_path}: the tokenizer has {ids} ids, but the model's vocab_size is {config.vocab_size}"
        )


OWNERS = {  # the start of a bare model name -> who publishes it on the hub
    "Qwen": "Qwen", "Llama-3.2-3B-Oat-Zero": "sail", "Llama": "meta-llama", "Meta-Llama": "meta-llama",
    "Mistral": "mistralai", "Ministral": "mistralai", "DeepSeek": "deepseek-ai", "Skywork": "Skywork", "SmolLM": "HuggingFaceTB",
}  # fmt: skip
FILES = ["config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json"]
TOKENIZER_FILES = ["tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template*"]


def resolve(name):
    """The local folder of a model: `name` itself, or that of a hub id, downloaded at the first call.

    A bare name gets its owner: Qwen2.5-Math-1.5B is Qwen/Qwen2.5-Math-1.5B. Raises FileNotFoundError with what to do.
    """
    folder = os.path.expanduser(name)
    if os.path.isdir(folder):
        return Path(folder)
    if os.path.exists(folder):
        raise FileNotFoundError(f"{name}: a file; a model is the folder that holds config.json and the weights")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"{name}: no such folder")
    repo = name
    if "/" not in name:
        owner = next((o for start, o in OWNERS.items() if name.lower().startswith(start.lower())), None)
        if owner is None:
            raise FileNotFoundError(f"{name}: neither a folder nor a model name whose owner is known; give owner/name")
        repo = f"{owner}/{name}"
    try:
        return Path(snapshot_download(repo, allow_patterns=FILES + TOKENIZER_FILES))  # resumes what was broken off
    except (OSError, RuntimeError, hub_errors.HTTPError, hub_errors.HFValidationError) as error:
        raise FileNotFoundError(f"{repo}: {download_advice(repo, error)}") from None


def download_advice(repo, error):
    """What to do about a failed download, by its error: the hub's own, the network's (httpx) or the disk's."""
    if isinstance(error, hub_errors.GatedRepoError):
        return f"gated; accept its licence at https://huggingface.co/{repo} and set HF_TOKEN"
    if isinstance(error, hub_errors.RepositoryNotFoundError):
        return "neither a folder here nor on the hub; check the spelling (or set HF_TOKEN if it is private)"
    if isinstance(error, hub_errors.HFValidationError):
        return "neither a folder here nor a hub id, which is owner/name"
    if isinstance(error, (hub_errors.LocalEntryNotFoundError, hub_errors.OfflineModeIsEnabled)):
        return "not complete in the local cache, and the hub cannot be reached; download it elsewhere and give its folder"
    if getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
        return f"the hub refuses access ({one_line(error)}); check HF_TOKEN"
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
        return "the disk is full; free some space or set HF_HOME to a larger disk, then run again: it resumes"
    return f"the download broke off ({one_line(error)}); run again: it resumes"
