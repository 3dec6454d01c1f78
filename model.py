"""One decoder-only transformer for the Qwen2, Qwen3, Llama and Mistral families.

Token ids go in as one flat list, the tokens of all rows concatenated, so embeddings, norms and linear layers
never see padding. Only attention knows which token belongs to which row, and the caller passes it in as a
function `attend(layer, q, k, v)`: over packed rows in learning and prefill (kernels/packing.py), over a KV
cache in decoding (kernels/kv_cache.py). That is the difference between sampling and learning; up to the
head, everything else is the same code.

Letters in shape comments: B rows, T tokens, R response tokens, N response tokens of all rows, D width, I
width of the MLP, H heads, K key/value heads, E head width, V vocabulary.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from distributed import parallel, weights
from kernels.fused import rotate, swiglu
from kernels.linear import Linear, TiedWeight
from kernels.logprob import linear_logprob, product, self_certainty
from kernels.packing import gather_rows, pack_responses, pack_rows
from support.pretrained import read_config
from support.rope import rope_frequencies


@dataclass(frozen=True)
class ModelConfig:
    """What the forward pass needs to know."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float
    max_positions: int
    rope: dict  # rope_type, rope_theta and what else that type needs
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool  # Qwen3: an RMSNorm over each head of q and k
    tie_word_embeddings: bool  # lm_head is the embedding matrix
    windows: tuple  # per layer: how many keys a query sees, itself included; None is all of them

    @classmethod
    def from_pretrained(cls, folder):
        """Read config.json in `folder`. Raises FileNotFoundError or ValueError, naming the field."""
        return cls(**read_config(folder))


def rope_cos_sin(positions, frequency, scale):
    """What `rotate` takes: cos of each pair's angle, and sin with its sign, [T, 1, E] each in fp32."""
    angle = positions[:, None, None].float() * frequency  # [T, 1, E/2]
    cos, sin = angle.cos() * scale, angle.sin() * scale
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


# ------------------------------------------------------------------------------------------------------------
# layers, named as in Hugging Face checkpoints, except that q/k/v and gate/up are fused (`hf_tensors`)


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight over the last dimension (Zhang and Sennrich 2019); sums in fp32, fused on a GPU."""

    def forward(self, x):
        return super().forward(
            x.to(self.weight.dtype)
        )  # the fused kernel needs one dtype: fp32 under autocast


class Attention(nn.Module):
    """Grouped-query attention; the caller passes in attention itself, as `attend(q, k, v)`."""

    def __init__(self, config):
        super().__init__()
        self.head_dim = config.head_dim
        self.heads = (config.heads, config.kv_heads, config.kv_heads)  # of q, k and v
        self.qkv_proj = Linear(config.hidden_size, sum(self.heads) * config.head_dim, bias=config.qkv_bias)
        self.o_proj = Linear(config.heads * config.head_dim, config.hidden_size, bias=config.o_bias)
        self.qk_norm = config.qk_norm
        if self.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.norm_eps)

    def forward(self, x, cos, sin, attend):
        qkv = self.qkv_proj(x).unflatten(-1, (-1, self.head_dim))  # [T, H + 2K, E]
        if self.qk_norm:
            q, k, v = qkv.split(self.heads, dim=1)  # [T, H, E], [T, K, E], [T, K, E]
            q = rotate(self.q_norm(q), cos, sin, v.dtype)  # under autocast the norm is in fp32
            k = rotate(self.k_norm(k), cos, sin, v.dtype)
        else:  # the heads of q and k are adjacent, and are rotated together
            qk, v = qkv.split((sum(self.heads[:2]), self.heads[2]), dim=1)  # [T, H + K, E], [T, K, E]
            q, k = rotate(qk, cos, sin, v.dtype).split(self.heads[:2], dim=1)
        out = attend(q, k, v)  # [T, H, E]
        return self.o_proj(out.flatten(-2))  # [T, D]


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer 2020)."""

    def __init__(self, config):
        super().__init__()
        self.gate_up_proj = Linear(config.hidden_size, 2 * config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x):
        return self.down_proj(swiglu(self.gate_up_proj(x)))  # [T, D], from the product's [T, 2 I]


class Block(nn.Module):
    """Pre-norm residual block. group: the ranks with its other heads and the rest of its MLP, or None."""

    def __init__(self, config, group):
        super().__init__()
        self.group = group
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, attend):
        x = x + parallel.sum_over(self.group, self.self_attn(self.input_layernorm(x), cos, sin, attend))
        return x + parallel.sum_over(self.group, self.mlp(self.post_attention_layernorm(x)))


class Transformer(nn.Module):
    """The policy. `forward` is the learner's: log-probabilities of responses. Sampling calls `backbone`."""

    def __init__(self, config, source=None, group=None):
        super().__init__()
        self.whole_config = config
        self.config = config = parallel.rank_config(config, group)  # of this rank's part
        self.group = group  # the ranks that hold the other heads of a tensor-parallel sampler
        self.source = source  # the folder with config.json, which save_pretrained copies
        self.checkpointing = False  # recompute each layer in the backward pass instead of keeping activations
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, group) for _ in range(config.layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        with torch.device("cpu"):  # real numbers even while the parameters are built on the meta device
            frequency, self.rope_scale = rope_frequencies(config)
        self.register_buffer("rope_frequency", frequency, persistent=False)  # fp32: only parameters are cast

    @classmethod
    def from_pretrained(cls, folder, dtype=torch.float32, device="cpu", shard=None, group=None):
        """A model from a folder in Hugging Face format: config.json and safetensors, in one file or several.

        shard(model) splits its parameters into shards; a group of ranks holds a part each (weights.load).
        Raises FileNotFoundError or ValueError, naming the file and the tensor or field.
        """
        with torch.device("meta"):
            model = cls(ModelConfig.from_pretrained(folder), Path(folder), group)
        return weights.load(model, folder, dtype, device, shard)

    def save_pretrained(self, folder):
        """Write config.json and fp32 safetensors to `folder`; transformers and vLLM load them."""
        weights.save(self, folder)

    def forward(self, rows, temperature=1.0, certainty=False):
        """The learner's forward pass: log-probability and entropy of the response tokens, [B, R] each.

        rows: a rollout.Rollout; R is its longest response. Beyond the end of a response both are 0. Rows with
        the same `question` share its prompt, which is computed once. certainty: return the self-certainty of
        the policy at each token as well, without gradients.
        """
        batch = pack_responses(rows, self.config.windows).to(self.rope_frequency.device)
        embedded, head = None, self.lm_head.weight
        if self.config.tie_word_embeddings:
            embedding, head = TiedWeight.apply(head)
            embedded = F.embedding(batch.tokens, embedding, sparse=True)
        hidden = self.backbone(batch.tokens, batch.positions, batch.attend_packed, embedded)  # [T, D]
        predicting = gather_rows(hidden, batch.logit_positions)  # [N, D]
        measured = linear_logprob(predicting, head, batch.targets, temperature)  # ([N], [N])
        if certainty:
            measured += (self_certainty(predicting, head, batch.targets, measured[0], temperature),)
        return tuple(map(batch.unpack, measured))

    def backbone(self, tokens, positions, attend, embedded=None):
        """Hidden states before the head: tokens [T], positions [T] -> [T, D].

        attend(layer, q, k, v): attention. embedded [T, D]: the embeddings of the tokens, if the caller has
        looked them up.
        """
        x = self.embed_tokens(tokens) if embedded is None else embedded  # [T, D]
        cos, sin = self.rotation(positions)
        for index, layer in enumerate(self.layers):
            attend_here = partial(attend, index)
            if self.checkpointing and torch.is_grad_enabled():
                # Nothing in a layer is random, so there is no generator state to keep.
                x = checkpoint(layer, x, cos, sin, attend_here, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x, cos, sin, attend_here)
        return self.norm(x)

    def rotation(self, positions):
        """What turns queries and keys at positions [T]: cos and signed sin, [T, 1, E] each."""
        return rope_cos_sin(positions, self.rope_frequency, self.rope_scale)

    def next_token_logits(self, hidden):
        """The logits that tokens are sampled from: hidden states [B, D] -> [B, V], without gradients.

        On a GPU they are fp32 even for a bf16 model: cuBLAS accumulates in fp32 anyway, and in bf16, logits
        between 16 and 32 are 1/8 apart, so the sampler's distribution would differ from the learner's.
        """
        if hidden.is_cuda:
            return product(hidden, self.lm_head.weight.T)
        return self.lm_head(hidden)

    def logits(self, tokens):
        """Plain next-token logits, [B, T] -> [B, T, V]: for tests and exercises, never used in training."""
        lengths = torch.full((len(tokens),), tokens.shape[1])
        batch = pack_rows(tokens, lengths, self.config.windows).to(self.rope_frequency.device)
        hidden = self.backbone(batch.tokens, batch.positions, batch.attend_packed)  # [B T, D]
        return self.lm_head(hidden).unflatten(0, tokens.shape)
