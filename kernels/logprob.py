"""Log-probability and entropy of tokens straight from hidden states; the logits of all tokens never exist.

A policy-gradient step needs two numbers a token, log p(target) and the entropy of p, but the plain way to get them
builds a [T, V] matrix of logits and several copies of it: at T 4,096 and V 152k that is 2.5 GB each in fp32. Here the
logits live only as a chunk of tokens, and the backward pass computes each chunk a second time instead of keeping it.
"""

import torch

CHUNK_BYTES = 32 << 20  # of fp32 logits held at a time: large enough for a full-speed matrix product, small beside weights


def linear_logprob(hidden, weight, targets, temperature=1.0):
    """Log-probability of each target, and entropy, of softmax(hidden @ weight.T / temperature).

    hidden [T, D], weight [V, D] (cast to hidden's dtype for the product, as autocast does), targets [T] of int64.
    Returns (logprob [T], entropy [T]), both fp32 and in nats, differentiable in hidden and weight.

    >>> hidden, weight = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 5.0]])
    >>> logprob, entropy = linear_logprob(hidden, weight, torch.tensor([0]))  # both logits are 0: a fair coin
    >>> round(logprob.item(), 4), round(entropy.item(), 4)
    (-0.6931, 0.6931)
    """
    assert hidden.shape[1] == weight.shape[1] and targets.shape == hidden.shape[:1], "hidden [T,D], weight [V,D], targets [T]"
    return LinearLogprob.apply(hidden, weight, targets, float(temperature))


class LinearLogprob(torch.autograd.Function):
    """Chunked torch: the path for CPU, and the reference that any fused kernel is tested against.

    With z = logits / temperature, p = softmax(z), H the entropy and y the target:
        d logprob / dz_j = [j == y] - p_j              d H / dz_j = -p_j (log p_j + H)
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature):
        cast = weight.to(hidden.dtype)
        logprob, entropy, lse = torch.empty(3, len(hidden), device=hidden.device, dtype=torch.float32)
        for rows in chunks(len(hidden), len(weight)):
            z = centred_logits(hidden[rows], cast, temperature)  # [t, V]
            p = z.exp()  # not yet divided by its sum
            total = p.sum(-1)
            lse[rows] = total.log()
            logprob[rows] = z.gather(1, targets[rows, None])[:, 0] - lse[rows]
            entropy[rows] = lse[rows] - torch.linalg.vecdot(p, z) / total  # H = lse - E[z]
        ctx.save_for_backward(hidden, weight, targets, lse, entropy)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)  # an output that the loss does not use comes back as None, not as zeros
        return logprob, entropy

    @staticmethod
    def backward(ctx, grad_logprob, grad_entropy):
        hidden, weight, targets, lse, entropy = ctx.saved_tensors
        cast = weight.to(hidden.dtype)
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if want_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if want_weight else None
        for rows in chunks(len(hidden), len(weight)):
            logp = centred_logits(hidden[rows], cast, ctx.temperature).sub_(lse[rows, None])
            p = logp.exp()
            grad_z = torch.zeros_like(p)  # [t, V]
            if grad_logprob is not None:
                grad_z.addcmul_(p, grad_logprob[rows, None], value=-1)
                grad_z.scatter_add_(1, targets[rows, None], grad_logprob[rows, None])
            if grad_entropy is not None:  # as a rule a metric only, then this falls away
                grad_z -= p * (logp + entropy[rows, None]) * grad_entropy[rows, None]
            grad_z = grad_z.div_(ctx.temperature).to(hidden.dtype)
            if want_hidden:
                grad_hidden[rows] = grad_z @ cast
            if want_weight:
                grad_weight += grad_z.T @ hidden[rows]
        return grad_hidden, grad_weight.to(weight.dtype) if want_weight else None, None, None


def chunks(tokens, vocabulary):
    """Slices over the tokens such that a slice's logits fit in CHUNK_BYTES."""
    size = max(16, CHUNK_BYTES // (4 * vocabulary))
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def centred_logits(hidden, weight, temperature):
    """Logits of a few tokens under a temperature, less the largest of each: [t, D] x [V, D] -> [t, V] in fp32.

    Log-probabilities are near 0 where logits may be 20, so rounding them after the subtraction loses less.
    """
    z = (hidden @ weight.T).float().div_(temperature)
    return z.sub_(z.amax(-1, keepdim=True))
