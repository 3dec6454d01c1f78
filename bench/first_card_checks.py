"""Stage `smoke` of bench/first_card.py: what may be wrong on a GPU, each once against float64.

Also what the other stages (first_card_stages.py) share with it: the device, the widths, random models and
responses. Letters in shape comments: B rows, T tokens, D width, V vocabulary, H heads, K key/value heads, E
head width.
"""

import functools
import gc
import json
import math
import sys
import tempfile
from pathlib import Path

import common  # noqa: F401  puts the program's folder before this one, which has a rollout.py of its own
import torch
import torch.nn.functional as F

import rollout
from kernels import attention, logprob, sampler
from kernels.linear import TiedWeight
from kernels.packing import pack_responses
from model import ModelConfig, Transformer
from rollout import Engine, prefill

DRY = "--dry" in sys.argv
DEVICE = torch.device("cpu" if DRY else "cuda")
DTYPE = torch.float32 if DRY else torch.bfloat16

QWEN = dict(model_type="qwen2", vocab_size=151936, hidden_size=1536, intermediate_size=8960,
            num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2, rope_theta=10000.0,
            max_position_embeddings=4096, rms_norm_eps=1e-6, tie_word_embeddings=True)  # fmt: skip
TOY = dict(QWEN, vocab_size=400, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
           num_attention_heads=4)  # fmt: skip
SHAPE = TOY if DRY else QWEN  # Qwen2.5-Math-1.5B's
V, D, LAYERS = SHAPE["vocab_size"], SHAPE["hidden_size"], SHAPE["num_hidden_layers"]
HEADS, KV_HEADS = SHAPE["num_attention_heads"], SHAPE["num_key_value_heads"]
E = D // HEADS

# ----------------------------------------------------------------------------------------------------------
# what the parts share


def healthy():
    """Does the device still answer? After some CUDA errors no call of the process does. Also frees memory."""
    gc.collect()
    try:
        torch.cuda.empty_cache()
        return torch.ones(2, device=DEVICE).sum().item() == 2
    except RuntimeError:
        return False


def normal(*shape, dtype=DTYPE, scale=1.0):
    return (scale * torch.randn(shape, device=DEVICE)).to(dtype)


def random_prompt(length, vocabulary=V):
    return torch.randint(vocabulary, (length,)).tolist()


def distance(seen, exact):
    """How far two tensors are from each other, as a share of the second's norm. NaN stays NaN."""
    exact = exact.double()
    return ((seen.to(exact) - exact).norm() / exact.norm()).item()


def largest(errors):
    """NaN if there is one."""
    return torch.tensor([*errors], dtype=torch.float64).amax().item()


def gradients(function, inputs, weights, dtype=None):
    """[*outputs, *gradients of sum(output x weight)] of function(*inputs), with all inputs cast to dtype.

    A weight may be None: its output is not used.
    """
    inputs = [x.detach().to(dtype or x.dtype, copy=True).requires_grad_() for x in inputs]
    out = function(*inputs)
    out = out if isinstance(out, tuple) else (out,)
    used = [(x, w.to(x.dtype)) for x, w in zip(out, weights, strict=True) if w is not None]
    outputs, weights = zip(*used, strict=True)
    return [*(x.detach() for x in out), *torch.autograd.grad(outputs, inputs, weights)]


def random_model(shape=SHAPE, dtype=DTYPE, **changes):
    """A model with random weights, made on the device.

    The embedding has std 0.02 and the matrices fan_in^-0.5, so that the blocks are heard beside the residual
    stream: otherwise the model would repeat its input.
    """
    folder = Path(tempfile.mkdtemp())
    (folder / "config.json").write_text(json.dumps({**shape, **changes}))
    with torch.device(DEVICE):
        model = Transformer(ModelConfig.from_pretrained(folder), folder).to(DEVICE)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and "embed" not in name:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        elif name.endswith("norm.weight"):
            torch.nn.init.ones_(parameter)
        else:
            torch.nn.init.normal_(parameter, std=0.02)  # the embedding, and the biases of q, k and v
        parameter.data = parameter.data.to(dtype)
    return model


def made_up_rollout(prompt_lengths, lengths):
    """Responses of random tokens, `lengths` to each prompt, about as likely as under a random model."""
    pairs = [(question, sample) for question in range(len(prompt_lengths)) for sample in range(len(lengths))]
    made = rollout.empty_rollout([*map(random_prompt, prompt_lengths)], pairs, max(lengths))
    for row, (_, sample) in enumerate(pairs):
        tokens = torch.tensor(random_prompt(lengths[sample]))
        made.fill(row, tokens, -math.log(V) - 0.5 * torch.rand(len(tokens)), [])
    return made.trim()


def causal_mask(queries, keys, window=10**6):
    """[1, 1, queries, keys] of bool; the last query sees the last key."""
    at = torch.arange(keys, device=DEVICE)
    query_at = at[keys - queries :, None]
    return ((at <= query_at) & (at > query_at - window))[None, None]


# ----------------------------------------------------------------------------------------------------------
# attention of decoding

DECODING = [(64, 12, 2, 128, 2048, None), (5, 8, 1, 64, 700, 100), (3, 4, 4, 96, 257, 16),
            (9, 16, 2, 80, 96, None)]  # fmt: skip  # rows, heads, key heads, width, capacity, window


def exact_decoding(q, k, v, keys, values, length, window):
    """What decoding attention has to return, in float64, and the keys that it has to leave."""
    keys, values, rows = keys.double(), values.double(), torch.arange(len(q), device=DEVICE)
    keys[rows, :, length.long()], values[rows, :, length.long()] = k.double(), v.double()
    at, length = torch.arange(keys.shape[2], device=DEVICE), length[:, None]
    unseen = (at > length) | (at <= length - (window or 10**6))  # [B, T]
    q = q.double().unflatten(1, (keys.shape[1], -1))  # [B, K, H/K, E]
    scores = q @ keys.transpose(2, 3) / q.shape[-1] ** 0.5
    return (scores.masked_fill(unseen[:, None, None], -torch.inf).softmax(-1) @ values).flatten(1, 2), keys


def check_decoding(card, attend, dtype=DTYPE, allowed=1e-2):
    for rows, heads, kv_heads, width, capacity, window in [(3, 4, 2, 16, 40, 5)] if DRY else DECODING:
        q, k, v = (normal(rows, n, width, dtype=dtype) for n in (heads, kv_heads, kv_heads))
        keys, values = normal(2, rows, kv_heads, capacity, width, dtype=dtype)
        length = torch.randint(capacity, (rows,), device=DEVICE, dtype=torch.int32)
        length[0], length[-1] = 0, capacity - 1
        exact, stored = exact_decoding(q, k, v, keys, values, length, window)
        error = distance(attend(q, k, v, keys, values, length, window), exact)
        what = f"{rows} x {capacity}, {heads}/{kv_heads} heads of {width}, {dtype}"
        card.check(what, error, allowed)
        card.check(f"stored keys, {what}", distance(keys, stored), 1e-9)


def decoding_attention_triton(card):
    if DRY:
        return card.record("triton", "not on a CPU")
    from kernels.attention_triton import attend_cached_triton

    check_decoding(card, attend_cached_triton)
    check_decoding(card, attend_cached_triton, torch.float32, 2e-3)


def decoding_attention_torch(card):
    def attend(q, k, v, keys, values, length, window):
        at, rows = torch.arange(keys.shape[2], device=DEVICE), torch.arange(len(q), device=DEVICE)
        keys[rows, :, length.long()], values[rows, :, length.long()] = k, v
        unseen = (at > length[:, None]) | (at <= length[:, None] - (window or 10**6))
        bias = torch.zeros_like(unseen, dtype=q.dtype).masked_fill_(unseen, -torch.inf)
        return attention.sdpa_one_query(q, keys, values, bias[:, None, None])

    check_decoding(card, attend)


def decoding_attention_flash_attn(card):
    if attention.flash_attn_with_kvcache is None:
        return card.record("flash-attn 2", "not installed")

    def attend(q, k, v, keys, values, length, window):
        theirs = [x.transpose(1, 2).contiguous() for x in (keys, values)]  # [B, T, K, E]
        out = attention.flash_cached(q, k, v, *theirs, length, window)
        keys.copy_(theirs[0].transpose(1, 2))
        return out

    check_decoding(card, attend)


# ----------------------------------------------------------------------------------------------------------
# attention of learning


def check_gradients(card, name, attend, inputs, weights, exact, dtype=None, allowed=2e-2):
    seen = gradients(attend, inputs, weights, dtype)
    errors = [distance(a, b) for a, b in zip(seen, exact, strict=True)]
    parts = zip(("output", "q", "k", "v"), errors, strict=True)
    card.check(name, largest(errors), allowed, note=", ".join(f"{part} {error:.1e}" for part, error in parts))


def padded(q, k, v, mask):
    return attention.sdpa(q[None], k[None], v[None], mask)[0]


def packed_attention(card):
    """Packed rows behind shared prompts, in layers with and without a sliding window: what a learner runs."""
    lengths = [1, 5, 9] if DRY else [1, 2, 64, 705]
    batch = pack_responses(made_up_rollout([3, 7] if DRY else [40, 900], lengths), (None, 64)).to(DEVICE)
    tokens = len(batch.tokens)
    inputs, weights = [normal(tokens, n, E) for n in (HEADS, KV_HEADS, KV_HEADS)], [normal(tokens, HEADS, E)]
    for layer, window in enumerate(batch.windows):
        attend = functools.partial(batch.attend_packed, layer)
        exact = gradients(attend, inputs, weights, torch.float64)
        check_gradients(card, f"{tokens} tokens, window {window}", attend, inputs, weights, exact)


def padded_attention(card):
    """The path of fp32 and of older versions of torch; here in bf16 too."""
    tokens = 20 if DRY else 1000
    attend = functools.partial(padded, mask=causal_mask(tokens, tokens))
    inputs, weights = [normal(tokens, n, E) for n in (HEADS, KV_HEADS, KV_HEADS)], [normal(tokens, HEADS, E)]
    exact = gradients(attend, inputs, weights, torch.float64)
    check_gradients(card, "bf16", attend, inputs, weights, exact)
    check_gradients(card, "fp32", attend, inputs, weights, exact, torch.float32, 1e-3)


def nan_probe(card):
    """704 keys and scores far below 0: cuDNN's gradient under a mask is NaN there (pytorch issue 196678)."""
    tokens, of_response = (20, 5) if DRY else (704, 176)
    q, k = 3 + normal(tokens, HEADS, E, scale=0.1), -3 + normal(tokens, KV_HEADS, E, scale=0.1)
    inputs, weights = [q, k, normal(tokens, KV_HEADS, E)], [normal(tokens, HEADS, E)]
    batch = pack_responses(made_up_rollout([tokens - of_response], [of_response + 1]), (None,)).to(DEVICE)
    in_padded_rows = functools.partial(padded, mask=causal_mask(tokens, tokens))
    for name, attend in (("padded", in_padded_rows), ("packed", functools.partial(batch.attend_packed, 0))):
        seen = count_nan(gradients(attend, inputs, weights))
        card.record(f"NaN in {name} rows", seen, "0", ok=seen == 0)
    if not DRY:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            seen = count_nan(gradients(in_padded_rows, inputs, weights))
        card.record("NaN by cuDNN, which is not used", seen)


def count_nan(tensors):
    return sum(int(x.isnan().sum()) for x in tensors)


def variable_length_operator(card):
    """aten's flash attention alone: fewer key heads than heads, rows behind prompts, a window."""
    if DRY:
        return card.record("operator", "not on a CPU")
    queries, keys = [700, 1, 65], [900, 40, 65]
    begins = [torch.tensor([0, *n], device=DEVICE).cumsum(0).int() for n in (queries, keys)]

    def ours(q, k, v):
        options = dict(window_size_left=window - 1, window_size_right=0)
        lengths = *begins, max(queries), max(keys)
        return torch.ops.aten._flash_attention_forward(q, k, v, *lengths, 0.0, True, False, **options)[0]

    def plain(q, k, v):
        rows = zip(q.split(queries), k.split(keys), v.split(keys), strict=True)
        return torch.cat([padded(*row, causal_mask(len(row[0]), len(row[1]), window)) for row in rows])

    inputs = [normal(sum(queries), HEADS, E), *normal(2, sum(keys), KV_HEADS, E)]
    weights = [normal(sum(queries), HEADS, E)]
    for window in (10000, 100):  # which both functions read
        exact = gradients(plain, inputs, weights, torch.float64)
        check_gradients(card, f"window {window}", ours, inputs, weights, exact)


# ----------------------------------------------------------------------------------------------------------
# log-probabilities and sampling


def log_probabilities(card):
    """At temperatures where a sentinel, a scale or a rounding could overflow."""
    tokens = 16 if DRY else 512
    inputs, targets = (
        [normal(tokens, D), normal(V, D, scale=3 * D**-0.5)],
        torch.randint(V, (tokens,), device=DEVICE),
    )
    of_logprob, of_entropy = normal(2, tokens)

    def plain(hidden, weight):
        logp = (hidden @ weight.T / temperature).log_softmax(-1)
        return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)

    def ours(hidden, weight):
        return logprob.linear_logprob(hidden, weight, targets, temperature)

    for temperature in (0.05, 0.1, 0.2, 0.29, 0.6, 1.0, 5.0):  # which both functions read
        for weights in ([of_logprob, None], [of_logprob, of_entropy]):
            exact, seen = gradients(plain, inputs, weights, torch.float64), gradients(ours, inputs, weights)
            how = f"T {temperature}" + (", and of the entropy" if weights[1] is not None else "")
            card.check(f"log-probabilities, {how}", distance(seen[0], exact[0]), 1e-3)
            card.check(f"entropy, {how}", (seen[1] - exact[1]).abs().max(), 1e-3)
            errors = [distance(a, b) for a, b in zip(seen[2:], exact[2:], strict=True)]
            card.check(f"gradients, {how}", largest(errors), 2e-2)


def check_sampling(card, temperature, top_p):
    """Tokens and log-probabilities of the sampler against the distribution that it should draw from."""
    rows = 8 if DRY else 256
    logits = normal(rows, V, dtype=torch.float32, scale=3)
    key, position = torch.arange(rows, device=DEVICE) * 7919, torch.arange(rows, device=DEVICE) % 5
    token, logp = sampler.sample_tokens(logits, key, position, temperature, top_p)
    likely, order = (logits.double() / temperature).softmax(-1).sort(-1, descending=True)
    kept = likely * (likely.cumsum(-1) - likely < top_p)
    p = torch.zeros_like(kept).scatter(1, order, kept) / kept.sum(-1, keepdim=True)  # [B, V]
    chosen, cdf = (x.gather(1, token[:, None])[:, 0] for x in (p, p.cumsum(-1)))
    u = sampler.uniform(key, position).double()
    how = f"T {temperature}, top-p {top_p}"
    card.check(f"log-probability, {how}", (logp - chosen.log()).abs().max(), 1e-3)
    card.check(f"place in the distribution, {how}", torch.maximum(u - cdf, cdf - chosen - u).max(), 1e-4)


def sampling(card):
    for temperature in (1.0, 0.6, 0.1):
        check_sampling(card, temperature, 1.0)


def sampling_top_p(card):
    for temperature, top_p in ((0.6, 0.95), (1.0, 0.95), (1.0, 0.5), (0.2, 0.1)):
        check_sampling(card, temperature, top_p)


# ----------------------------------------------------------------------------------------------------------
# the model as a whole


def a_small_model(card):
    """Two layers with the real widths: sampler, learner and gradient against float64 on the CPU.

    What is fused on a GPU is plain on a CPU, so this checks all of it at once.
    """
    torch.manual_seed(0)
    model = random_model(vocab_size=400, num_hidden_layers=2)
    prompts = [random_prompt(length, 400) for length in (30, 70)]
    options = dict(max_new_tokens=16 if DRY else 60, eos_ids=[1], seed=0, stream="train", step=0)
    sampled = rollout.generate(model, prompts, 4, **options)
    weights, model = torch.randn(sampled.logprob.shape), model.float()  # the learner's weights
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=not DRY):
        learned, _ = model(sampled)
    (learned * weights.to(DEVICE)).sum().backward()
    seen = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    model.to("cpu", torch.float64)
    batch = pack_responses(sampled, model.config.windows)
    hidden = model.backbone(batch.tokens, batch.positions, batch.attend_packed)
    logp = (hidden[batch.logit_positions] @ model.lm_head.weight.T).log_softmax(-1)
    exact = batch.unpack(logp.gather(1, batch.targets[:, None])[:, 0])
    (exact * weights).sum().backward()
    card.check("log-probabilities of the sampler", distance(sampled.logprob, exact.detach()), 1e-2)
    card.check("log-probabilities of the learner", distance(learned.detach(), exact.detach()), 1e-2)
    errors = {name: distance(a, p.grad) for a, (name, p) in zip(seen, model.named_parameters(), strict=True)}
    worst = next(name for name, error in errors.items() if not error < largest(errors.values()))
    card.check("gradients", largest(errors.values()), 5e-2, note=f"the largest of {worst}")


@torch.no_grad()
def capture_and_replay(card):
    """Steps replayed as CUDA graphs sample what plain steps sample, to the last bit; also with top-p."""
    model, rows, length = random_model(num_hidden_layers=3 - DRY), 4 if DRY else 48, 20 if DRY else 300
    prompt, key = prefill(model, [random_prompt(length)]), torch.arange(rows, device=DEVICE)

    def sampled(graphs, how):
        engine = Engine(model, rows, length + 40, 40, [V - 1])
        engine.graphs = engine.graphs if graphs else None
        engine.insert(0, prompt * rows, key, *how)
        for _ in range(4):
            engine.decode_steps(8, rows, engine.capacity, *how)
        return engine.tokens[:, :33], engine.logprob[:, :33]

    for how in ((1.0, 1.0), (0.6, 0.95), (0.0, 1.0)):
        (tokens, logp), (plain_tokens, plain_logp) = sampled(True, how), sampled(False, how)
        equal = (tokens == plain_tokens).double().mean().item(), (logp == plain_logp).double().mean().item()
        note = "shares of equal tokens and log-probabilities"
        card.record(f"T {how[0]}, top-p {how[1]}", f"{equal[0]:.0%}, {equal[1]:.0%}", "100%, 100%",
                    ok=min(equal) == 1, note=note)  # fmt: skip


def tied_gradient(card):
    """The gradient of a weight that is embedding and head, with a token that comes thousands of times."""
    tokens = torch.randint(V, (64 if DRY else 8192,), device=DEVICE)
    tokens[::2] = 7
    for dtype, allowed in ((torch.float32, 1e-5), (DTYPE, 1e-2)):
        of_tokens, of_head = (normal(n, D, dtype=dtype, scale=0.01) for n in (len(tokens), V))
        weight = normal(V, D, dtype=dtype).requires_grad_()
        embedding, head = TiedWeight.apply(weight)
        embedded = F.embedding(tokens, embedding, sparse=True)
        ((embedded * of_tokens).sum() + (head * of_head).sum()).backward()
        exact = of_head.double().index_add_(0, tokens, of_tokens.double())
        card.check(f"all rows, {dtype}", distance(weight.grad, exact), allowed)
        card.check(f"the row of a frequent token, {dtype}", distance(weight.grad[7], exact[7]), allowed)


def products_in_fp32(card):
    """Products of bf16 whose sums are not rounded to bf16: the sampler's logits."""
    a, b = normal(33, D), normal(D, V)
    card.check("bf16 factors", distance(logprob.product(a, b), a.double() @ b.double()), 1e-4)


SMOKE = {
    decoding_attention_triton: 20, packed_attention: 15, a_small_model: 20, log_probabilities: 15,
    capture_and_replay: 15, sampling: 10, sampling_top_p: 10, nan_probe: 10, padded_attention: 10,
    tied_gradient: 10, variable_length_operator: 10, products_in_fp32: 10, decoding_attention_torch: 10,
    decoding_attention_flash_attn: 10,
}  # fmt: skip
