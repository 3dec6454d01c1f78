"""Log-probability and entropy per token, from hidden states, without materializing the logits.

A policy-gradient step needs two numbers per token, log p(target) and the entropy of p. The plain way builds
the logits [T, V] and several copies of them: at T = 4,096 and V = 152k, each takes 2.5 GB in fp32. Here only
one tile of the logits exists at a time (some tokens by some of the vocabulary), and the backward pass
recomputes each tile.

Two inner functions have Triton versions (logprob_triton.py): `partials`, as one kernel whose logits never
leave the registers, and `logits_to_gradient`. The rest is the same code on every device.

Letters in shape comments: T tokens, D width, V vocabulary; t, v those of a tile; N pieces of the vocabulary.
"""

import math

import torch

from kernels import native

try:
    from kernels import logprob_triton
except ImportError:  # torch's CPU wheels come without triton
    logprob_triton = None

# (tokens, vocabulary) of a tile. CPU: 6 MB, which fits in the cache; with torch's products no other shape was
# faster (87 GFLOP/s on one core, 50 with the whole vocabulary at once). GPU: cuBLAS needs large products.
TILE = {"cpu": (2048, 768), "cuda": (8192, 8192)}

# Older versions cannot accumulate a product of bf16 operands into fp32 in place; they need a temporary tile.
ADDMM_SUMS_IN_FP32 = torch.__version__ >= (2, 11)


def linear_logprob(hidden, weight, targets, temperature=1.0):
    """Log-probability of each target, and entropy, under softmax(hidden @ weight.T / temperature).

    hidden [T, D], weight [V, D] (cast to hidden's dtype for the product, as autocast does), targets [T] of
    int64. Returns (logprob [T], entropy [T]), both fp32 and in nats, differentiable in hidden and weight.
    Under autocast the hidden states are cast to its dtype first.

    >>> hidden, weight = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 5.0]])
    >>> logprob, entropy = linear_logprob(hidden, weight, torch.tensor([0]))  # logits 0, 0: a fair coin
    >>> round(logprob.item(), 4), round(entropy.item(), 4)
    (-0.6931, 0.6931)
    """
    assert hidden.shape[1] == weight.shape[1], "hidden [T, D], weight [V, D]"
    assert hidden.shape[:1] == targets.shape, "hidden [T, D], targets [T]"
    return LinearLogprob.apply(autocast(hidden), weight, targets, float(temperature))


def self_certainty(hidden, weight, targets, logprob, temperature=1.0):
    """KL divergence from the uniform distribution to the softmax of `linear_logprob`, [T], in nats.

    hidden, weight, targets, temperature: as there; logprob [T]: what it returned. Without gradients. The
    divergence is lse - log V - mean logit (arXiv 2502.18581). As lse is the target's logit - logprob, and the
    mean logit is the product with the mean row of the head, it takes two products of a row with a row.

    >>> given = torch.tensor([[1.0]]), torch.tensor([[0.0], [math.log(3)]]), torch.tensor([1])  # p = 1/4, 3/4
    >>> logprob, _ = linear_logprob(*given)
    >>> round(self_certainty(*given, logprob).item(), 4)  # log(1/2 / sqrt(1/4 * 3/4))
    0.1438
    """
    with torch.no_grad():
        hidden, mean_row = autocast(hidden), weight.mean(0, dtype=torch.float32)
        above_mean = weight[targets].to(hidden.dtype).float() - mean_row  # [T, D]
        return (hidden.float() * above_mean).sum(-1) / temperature - logprob - math.log(len(weight))


def autocast(hidden):
    device = hidden.device.type
    return hidden.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else hidden


class LinearLogprob(torch.autograd.Function):
    """With z = logits / temperature, p = softmax(z), H the entropy and y the target:

    d logprob / dz_j = [j == y] - p_j              d H / dz_j = -p_j (log p_j + H)
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature):
        sums = logprob_triton.partials_triton if on_gpu(hidden) else partials
        max_logit, lse, logprob, entropy = merge(*sums(hidden, weight, targets, temperature), temperature)
        ctx.save_for_backward(hidden, weight, targets, max_logit, lse, entropy)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)  # the gradient of an output that the loss does not use is None
        return logprob, entropy

    @staticmethod
    def backward(ctx, grad_logprob, grad_entropy):
        hidden, weight, *per_token = ctx.saved_tensors
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        allocate = torch.empty_like if len(hidden) else torch.zeros_like  # the first tiles overwrite it
        grad_hidden = allocate(hidden, dtype=torch.float32) if want_hidden else None
        grad_weight = allocate(weight, dtype=torch.float32) if want_weight else None
        if grad_logprob is None:
            grad_logprob = torch.zeros_like(grad_entropy)
        per_token += [grad_logprob, grad_entropy]
        to_gradient = logprob_triton.logits_to_gradient_triton if on_gpu(hidden) else logits_to_gradient
        for rows, columns, h, w, logits in tiles(hidden, weight):
            tile_rows = [None if x is None else x[rows] for x in per_token]
            grad_logits = to_gradient(logits, columns.start, *tile_rows, ctx.temperature, hidden.dtype)
            if want_hidden:
                write_product(grad_hidden[rows], grad_logits, w, add=columns.start > 0)
            if want_weight:
                write_product(grad_weight[columns], grad_logits.T, h, add=rows.start > 0)
        return grad_hidden, grad_weight, None, None  # autograd casts them to the dtypes of hidden and weight


def on_gpu(x):
    return x.is_cuda and logprob_triton is not None


def merge(max_logit, sum_exp, sum_exp_c, target, temperature):
    """Merge the pieces of the vocabulary by online softmax: [N, T] -> max_logit, lse, logprob, entropy.

    With c = (logit - max_logit) / temperature, a piece has sum_exp = sum(exp(c)), sum_exp_c = sum(exp(c) c)
    and the target's logit, 0 if the target is in another piece. Relative to the maximum of all pieces,
    lse = log(sum(exp(c))), and the entropy is lse - E[c], where E[c] = sum(exp(c) c) / sum(exp(c)).

    Subtracting the maximum first reduces rounding error: log-probabilities near 0 come from logits near 20.
    """
    highest = max_logit.amax(0)
    shift = (max_logit - highest) / temperature  # what the new maximum adds to each c of the piece
    scale = shift.exp()
    sum_exp_c = (scale * (sum_exp_c + shift * sum_exp)).sum(0)
    sum_exp = (scale * sum_exp).sum(0)
    lse = sum_exp.log()
    logprob = (target.sum(0) - highest) / temperature - lse
    return highest, lse, logprob, lse - sum_exp_c / sum_exp


def tiles(hidden, weight):
    """Yield (rows, columns, hidden[rows], weight[columns], logits [t, v] in fp32); logits share a buffer."""
    tile_tokens, tile_vocabulary = tile_shape(hidden)
    shape = min(tile_tokens, len(hidden)), min(tile_vocabulary, len(weight))
    buffer = torch.empty(shape, device=hidden.device, dtype=torch.float32)
    for rows in slices(len(hidden), tile_tokens):
        for columns in slices(len(weight), tile_vocabulary):
            h, w = hidden[rows], weight[columns].to(hidden.dtype)
            logits = buffer[: len(h), : len(w)]
            write_product(logits, h, w.T, add=False)
            yield rows, columns, h, w, logits


def tile_shape(x):
    return TILE["cuda" if x.is_cuda else "cpu"]


def slices(total, size):
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def product(a, b):
    """a @ b. On CUDA the result is fp32: cuBLAS accumulates in fp32 and can return that without rounding."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b)


def write_product(out, a, b, add):
    """out = a @ b, or out += a @ b, for out in fp32.

    Autocast, under which backward may run, does not touch operations in place or with out=.
    """
    if native.can_multiply(a, b) and out.stride(1) == 1 and out.dtype == a.dtype:
        native.product(a, b, out, add)
    elif out.dtype == a.dtype:
        out.addmm_(a, b, beta=int(add))
    elif a.is_cuda and ADDMM_SUMS_IN_FP32:
        torch.addmm(out, a, b, out_dtype=out.dtype, beta=int(add), out=out)
    elif add:
        out.add_(product(a, b))
    else:
        out.copy_(product(a, b))


# ----------------------------------------------------------------------------------------------------------
# the two inner functions in torch


def partials(hidden, weight, targets, temperature):
    """The arguments of `merge`, [4, N, T]; a piece is a tile's part of the vocabulary."""
    size = tile_shape(hidden)[1]
    pieces = -(-len(weight) // size)
    out = torch.empty(4, pieces, len(hidden), device=hidden.device, dtype=torch.float32)
    for rows, columns, _, _, logits in tiles(hidden, weight):
        max_logit, sum_exp, sum_exp_c, target = out[:, columns.start // size, rows]  # views, written below
        column, inside = locate(targets[rows], columns.start, logits.shape[1])
        torch.mul(logits.gather(1, column)[:, 0], inside, out=target)
        torch.amax(logits, -1, out=max_logit)
        c = logits.sub_(max_logit[:, None]).div_(temperature)
        exp_c = c.exp()
        torch.sum(exp_c, -1, out=sum_exp)
        torch.sum(exp_c.mul_(c), -1, out=sum_exp_c)
    return out


def logits_to_gradient(logits, start, targets, max_logit, lse, entropy, grad_logprob, grad_entropy,
                       temperature, dtype):  # fmt: skip
    """The gradient of logits [t, v], a tile whose first column is `start`, in dtype; overwrites the logits.

    grad_entropy is None if the loss does not use the entropy, which is usually only a metric.
    """
    logp = logits.sub_(max_logit[:, None]).div_(temperature).sub_(lse[:, None])
    column, inside = locate(targets, start, logits.shape[1])
    if grad_entropy is None:
        grad = logp.exp_().mul_(grad_logprob[:, None] / -temperature)  # -p grad_logprob / temperature
    else:
        p = logp.exp()
        grad = logp.add_(entropy[:, None]).mul_(grad_entropy[:, None])  # (log p + H) grad_entropy
        grad = grad.add_(grad_logprob[:, None]).mul_(p).div_(-temperature)
    grad.scatter_add_(1, column, (grad_logprob / temperature * inside)[:, None])  # [j == y] grad_logprob
    return grad.to(dtype)


def locate(targets, start, size):
    """Targets [t] in a tile of `size` columns from `start` on: (column [t, 1], whether it is inside [t])."""
    column = targets - start
    return column.clamp(0, size - 1)[:, None], (column >= 0) & (column < size)
