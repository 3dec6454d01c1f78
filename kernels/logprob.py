"""Log-probability and entropy of tokens straight from hidden states; the logits of all tokens never exist.

A policy-gradient step needs two numbers a token, log p(target) and the entropy of p, but the plain way to get them
builds a [T, V] matrix of logits and several copies of it: at T 4,096 and V 152k that is 2.5 GB each in fp32. Here the
logits live only as a tile, of some tokens by some of the vocabulary, and the backward pass computes each tile a second
time instead of keeping it.

Two inner functions have a twin on a GPU: `partials` (in Triton the product and its sums are one kernel, whose logits
never leave the registers) and `logits_to_gradient`. All else is the same code everywhere.
Letters in shape comments: T tokens, D width, V vocabulary; t, v those of a tile; N pieces that the vocabulary is cut into.
"""

import torch

try:
    import triton
    from triton import language as tl
except ImportError:  # torch's CPU wheels come without it
    triton = None

# Tokens and vocabulary of a tile. CPU: 6 MB, so the passes over a tile run in the cache, and one product of this shape is as
# fast as any (87 GFLOP/s of one core where all of the vocabulary at once reached 50). GPU: cuBLAS wants large products.
TILE = {"cpu": (2048, 768), "cuda": (8192, 8192)}


def linear_logprob(hidden, weight, targets, temperature=1.0):
    """Log-probability of each target, and entropy, of softmax(hidden @ weight.T / temperature).

    hidden [T, D], weight [V, D] (cast to hidden's dtype for the product, as autocast does), targets [T] of int64.
    Returns (logprob [T], entropy [T]), both fp32 and in nats, differentiable in hidden and weight. Under autocast the
    hidden states, too, are cast to its dtype first.

    >>> hidden, weight = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 5.0]])
    >>> logprob, entropy = linear_logprob(hidden, weight, torch.tensor([0]))  # both logits are 0: a fair coin
    >>> round(logprob.item(), 4), round(entropy.item(), 4)
    (-0.6931, 0.6931)
    """
    assert hidden.shape[1] == weight.shape[1] and targets.shape == hidden.shape[:1], "hidden [T,D], weight [V,D], targets [T]"
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden = hidden.to(torch.get_autocast_dtype(device))
    return LinearLogprob.apply(hidden, weight, targets, float(temperature))


class LinearLogprob(torch.autograd.Function):
    """With z = logits / temperature, p = softmax(z), H the entropy and y the target:

    d logprob / dz_j = [j == y] - p_j              d H / dz_j = -p_j (log p_j + H)
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature):
        pieces = (partials_triton if on_gpu(hidden) else partials)(hidden, weight, targets, temperature)
        top, lse, logprob, entropy = combine(*pieces, temperature)
        ctx.save_for_backward(hidden, weight, targets, top, lse, entropy)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)  # an output that the loss does not use comes back as None, not as zeros
        return logprob, entropy

    @staticmethod
    def backward(ctx, grad_logprob, grad_entropy):
        hidden, weight, *_ = ctx.saved_tensors
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32) if want_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if want_weight else None
        if grad_logprob is None:
            grad_logprob = torch.zeros_like(grad_entropy)
        to_gradient = logits_to_gradient_triton if on_gpu(hidden) else logits_to_gradient
        for rows, columns, h, w, z in tiles(hidden, weight):
            of_rows = [x if x is None else x[rows] for x in (*ctx.saved_tensors[2:], grad_logprob, grad_entropy)]
            grad_z = to_gradient(z, columns.start, *of_rows, ctx.temperature, hidden.dtype)  # [t, v]
            if want_hidden:
                add_product(grad_hidden[rows], grad_z, w)
            if want_weight:
                add_product(grad_weight[columns], grad_z.T, h)
        return grad_hidden, grad_weight, None, None  # autograd converts them to the dtypes of hidden and weight


def on_gpu(x):
    return x.is_cuda and triton is not None


def combine(top, total, moment, target, temperature):
    """The pieces of the vocabulary as one, [N, T] each -> top, lse, logprob, entropy, [T] each.

    What a piece is made of, with c = (logits - top) / temperature: top, its largest logit; total, the sum of exp(c); moment,
    the sum of exp(c) c; target, the target's logit, or 0 if the target is in another piece. The log-sum-exp is that of c.
    Log-probabilities are near 0 where logits may be 20: what is centred first loses less to rounding.
    """
    highest = top.amax(0)
    shift = (top - highest) / temperature
    scale = shift.exp()
    moment = (scale * (moment + shift * total)).sum(0)
    total = (scale * total).sum(0)
    lse = total.log()
    return highest, lse, (target.sum(0) - highest) / temperature - lse, lse - moment / total  # H = lse - E[c]


def tiles(hidden, weight):
    """Yields (rows, columns, hidden[rows], weight[columns], their logits in fp32: [t, v], in a buffer used again)."""
    t, v = TILE["cuda" if hidden.is_cuda else "cpu"]
    buffer = torch.empty(min(t, len(hidden)), min(v, len(weight)), device=hidden.device, dtype=torch.float32)
    for rows in spans(len(hidden), t):
        for columns in spans(len(weight), v):
            h, w = hidden[rows], weight[columns].to(hidden.dtype)
            z = buffer[: len(h), : len(w)]
            if h.dtype == z.dtype:
                torch.mm(h, w.T, out=z)
            else:
                z.copy_(product(h, w.T))
            yield rows, columns, h, w, z


def spans(total, size):
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def product(a, b):
    """a @ b, in fp32 where cuBLAS can hand out its fp32 sums unrounded: forward and backward must see the same logits."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda and a.dtype != torch.float32 else torch.mm(a, b)


def add_product(out, a, b):
    """out += a @ b for out in fp32. (Autocast, in whose reach the backward pass may run, leaves what is in place alone.)"""
    return out.addmm_(a, b) if out.dtype == a.dtype else out.add_(product(a, b))


# ----------------------------------------------------------------------------------------------------------------------
# the two inner functions in torch


def partials(hidden, weight, targets, temperature):
    """What `combine` takes, [4, N, T]; a piece is a tile's worth of the vocabulary."""
    size = TILE["cuda" if hidden.is_cuda else "cpu"][1]
    out = torch.empty(4, -(-len(weight) // size), len(hidden), device=hidden.device, dtype=torch.float32)
    for rows, columns, _, _, z in tiles(hidden, weight):
        top, total, moment, target = out[:, columns.start // size, rows]
        place, inside = locate(targets[rows], columns.start, z.shape[1])
        torch.mul(z.gather(1, place)[:, 0], inside, out=target)
        torch.amax(z, -1, out=top)
        p = z.sub_(top[:, None]).div_(temperature).exp()
        torch.sum(p, -1, out=total)
        torch.sum(p.mul_(z), -1, out=moment)
    return out


def logits_to_gradient(z, start, targets, top, lse, entropy, grad_logprob, grad_entropy, temperature, dtype):
    """Turn logits [t, v] of the vocabulary from `start` on into their gradient, in place; returned in dtype.

    grad_entropy may be None: as a rule the entropy is a metric only.
    """
    logp = z.sub_(top[:, None]).div_(temperature).sub_(lse[:, None])
    place, inside = locate(targets, start, z.shape[1])
    if grad_entropy is None:
        grad_z = logp.exp_().mul_(grad_logprob[:, None] / -temperature)
    else:
        p = logp.exp()
        grad_z = logp.add_(entropy[:, None]).mul_(grad_entropy[:, None]).add_(grad_logprob[:, None]).mul_(p).div_(-temperature)
    grad_z.scatter_add_(1, place, (grad_logprob / temperature * inside)[:, None])
    return grad_z.to(dtype)


def locate(targets, start, size):
    """Where in `size` tokens of the vocabulary from `start` on the targets [t] are: (place [t, 1], whether there at all [t])."""
    place = targets - start
    return place.clamp(0, size - 1)[:, None], (place >= 0) & (place < size)


# ----------------------------------------------------------------------------------------------------------------------
# the two inner functions in Triton

# (tokens, vocabulary, width) of a program's tile, and its warps: what compiles without spills from sm_80 to sm_100
FORWARD = {2: ((128, 64, 64), 8), 4: ((64, 64, 16), 8)}  # by bytes of a number: bf16 and fp16, fp32
COLUMNS = 2048  # of a tile of logits, per program of the gradient kernel


def partials_triton(hidden, weight, targets, temperature):
    """partials, its product included, as one kernel; a piece is what one program runs through."""
    (tokens, width), vocabulary = hidden.shape, len(weight)
    hidden, weight, targets = hidden.contiguous(), weight.to(hidden.dtype).contiguous(), targets.contiguous()
    (BT, BV, BD), warps = FORWARD[hidden.element_size()]
    blocks = triton.cdiv(vocabulary, BV)
    wanted = triton.cdiv(programs_wanted(hidden.device), max(1, triton.cdiv(tokens, BT)))  # pieces that keep the GPU busy
    size = triton.cdiv(blocks, wanted) * BV
    pieces = triton.cdiv(vocabulary, size)  # this way round none of them is empty
    out = torch.empty(4, pieces, tokens, device=hidden.device, dtype=torch.float32)
    precision = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"  # as torch.mm in the backward pass
    partials_kernel[(triton.cdiv(tokens, BT), pieces)](
        hidden, weight, targets, out, tokens, width, vocabulary, size, 1 / temperature,
        PRECISION=precision, BT=BT, BV=BV, BD=BD, num_warps=warps,
    )  # fmt: skip
    return out


def programs_wanted(device):
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count


def logits_to_gradient_triton(z, start, targets, top, lse, entropy, grad_logprob, grad_entropy, temperature, dtype):
    """logits_to_gradient in one pass; in place if dtype is fp32, else into a tile of dtype."""
    out = z if dtype == z.dtype else torch.empty_like(z, dtype=dtype)
    grad_entropy = torch.zeros_like(grad_logprob) if grad_entropy is None else grad_entropy
    rows, columns = z.shape
    of_rows = [x.contiguous() for x in (targets, top, lse, entropy, grad_logprob, grad_entropy)]
    logits_to_gradient_kernel[(rows, triton.cdiv(columns, COLUMNS))](
        z, out, *of_rows, start, columns, z.stride(0), out.stride(0), 1 / temperature, COLUMNS=COLUMNS
    )
    return out


if triton is not None:

    @triton.jit(do_not_specialize=["tokens", "vocabulary"])
    def partials_kernel(hidden, weight, targets, out, tokens, width, vocabulary, size, inverse_temperature,
                        PRECISION: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr):  # fmt: skip
        """Program (block of BT tokens, piece of `size` of the vocabulary): its row of each of the four partial results."""
        row = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
        first = tl.program_id(1) * size
        target_at = tl.load(targets + row, mask=row < tokens, other=-1).to(tl.int32)
        top = tl.full([BT], -1e38, tl.float32)  # not -inf, whose differences are NaN
        total = tl.zeros([BT], tl.float32)
        moment = tl.zeros([BT], tl.float32)
        target = tl.zeros([BT], tl.float32)
        for start in range(first, min(first + size, vocabulary), BV):
            column = start + tl.arange(0, BV)
            z = tl.zeros([BT, BV], tl.float32)
            for d in range(0, width, BD):
                at = d + tl.arange(0, BD)
                h_mask, w_mask = (row < tokens)[:, None] & (at < width), (column < vocabulary)[:, None] & (at < width)
                h = tl.load(hidden + row[:, None] * width + at, mask=h_mask, other=0.0)
                w = tl.load(weight + column.to(tl.int64)[:, None] * width + at, mask=w_mask, other=0.0)
                z = tl.dot(h, tl.trans(w), z, input_precision=PRECISION)
            target += tl.sum(tl.where(column == target_at[:, None], z, 0.0), 1)
            z = tl.where(column < vocabulary, z, -1e38)
            higher = tl.maximum(top, tl.max(z, 1))
            shift = (top - higher) * inverse_temperature
            c = (z - higher[:, None]) * inverse_temperature
            p = tl.exp(c)
            moment = tl.exp(shift) * (moment + shift * total) + tl.sum(p * c, 1)  # under the new maximum
            total = tl.exp(shift) * total + tl.sum(p, 1)
            top = higher
        out += tl.program_id(1).to(tl.int64) * tokens + row
        pieces = tl.num_programs(1).to(tl.int64)
        tl.store(out, top, mask=row < tokens)
        tl.store(out + pieces * tokens, total, mask=row < tokens)
        tl.store(out + 2 * pieces * tokens, moment, mask=row < tokens)
        tl.store(out + 3 * pieces * tokens, target, mask=row < tokens)

    @triton.jit(do_not_specialize=["start"])
    def logits_to_gradient_kernel(z, out, targets, top, lse, entropy, grad_logprob, grad_entropy, start, columns,
                                  z_stride, out_stride, inverse_temperature, COLUMNS: tl.constexpr):  # fmt: skip
        """Program (row, block of columns): out may be z, each number is read once and written once, by one program."""
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        x = tl.load(z + row * z_stride + column, mask=column < columns, other=0.0)
        logp = (x - tl.load(top + row)) * inverse_temperature - tl.load(lse + row)
        g_logprob, g_entropy = tl.load(grad_logprob + row), tl.load(grad_entropy + row)
        gradient = -tl.exp(logp) * (g_logprob + g_entropy * (logp + tl.load(entropy + row)))
        gradient += tl.where(start + column == tl.load(targets + row), g_logprob, 0.0)
        tl.store(out + row * out_stride + column, gradient * inverse_temperature, mask=column < columns)
