"""The two inner functions of logprob.py in Triton: one kernel for the forward pass, one for the gradient."""

import torch
import triton
from triton import language as tl

# Bytes per number -> (tokens, vocabulary, width) of a program's tile, the largest that spills no registers.
# In bf16 a byte from L2 serves 64 operations at 128 x 128 and 85 at 128 x 256; an H100 can do about 107.
FORWARD = {4: (64, 64, 16), 2: (128, 128, 64)}  # fp32; bf16 and fp16
FORWARD_ON_H100 = {**FORWARD, 2: (128, 256, 64)}
WARPS = 8
COLUMNS = 2048  # columns of a tile of logits per program of the gradient kernel


def partials_triton(hidden, weight, targets, temperature):
    """partials, including the matrix product; a piece is the part of the vocabulary that a program reads."""
    (tokens, width), vocabulary = hidden.shape, len(weight)
    hidden, weight, targets = hidden.contiguous(), weight.to(hidden.dtype).contiguous(), targets.contiguous()
    BT, BV, BD = forward_tile(hidden)
    token_blocks, vocabulary_blocks = triton.cdiv(tokens, BT), triton.cdiv(vocabulary, BV)
    wanted = triton.cdiv(programs_wanted(hidden.device), max(1, token_blocks))
    size = triton.cdiv(vocabulary_blocks, wanted) * BV
    pieces = triton.cdiv(vocabulary, size)  # at most as many as wanted; none is empty
    out = torch.empty(4, pieces, tokens, device=hidden.device, dtype=torch.float32)
    exact = torch.get_float32_matmul_precision() == "highest"  # like torch.mm in the backward pass
    partials_kernel[(token_blocks, pieces)](
        hidden, weight, targets, out, tokens, width, vocabulary, size, 1 / temperature,
        PRECISION="ieee" if exact else "tf32", BT=BT, BV=BV, BD=BD, num_warps=WARPS,
    )  # fmt: skip
    return out


def forward_tile(x):
    on_h100 = x.is_cuda and torch.cuda.get_device_capability(x.device) == (9, 0)
    return (FORWARD_ON_H100 if on_h100 else FORWARD)[x.element_size()]


def programs_wanted(device):
    """Sixteen waves of one program per multiprocessor, so that a nearly empty last wave costs little."""
    return 16 * torch.cuda.get_device_properties(device).multi_processor_count


def logits_to_gradient_triton(logits, start, targets, max_logit, lse, entropy, grad_logprob, grad_entropy,
                              temperature, dtype):  # fmt: skip
    """logits_to_gradient in one pass; overwrites the logits if dtype is fp32, else fills a new tile."""
    out = logits if dtype == logits.dtype else torch.empty_like(logits, dtype=dtype)
    rows, columns = logits.shape
    per_token = targets, max_logit, lse, entropy, grad_logprob, grad_entropy
    per_token = [x if x is None else x.contiguous() for x in per_token]
    scalars = start, columns, logits.stride(0), out.stride(0), 1 / temperature
    grid = rows, triton.cdiv(columns, COLUMNS)
    logits_to_gradient_kernel[grid](logits, out, *per_token, *scalars, COLUMNS=COLUMNS)
    return out


@triton.jit(do_not_specialize=["tokens", "vocabulary"])
def partials_kernel(hidden, weight, targets, out, tokens, width, vocabulary, size, inverse_temperature,
                    BT: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr,
                    PRECISION: tl.constexpr):  # fmt: skip
    """Program (block of BT tokens, piece of `size` tokens of the vocabulary): one piece's partial sums."""
    # Programs that run at the same time share 8 pieces and a few token blocks, which stay in L2.
    piece, block = tl.swizzle2d(tl.program_id(1), tl.program_id(0), tl.num_programs(1), tl.num_programs(0), 8)
    row = block.to(tl.int64) * BT + tl.arange(0, BT)
    first = piece * size
    target_at = tl.load(targets + row, mask=row < tokens, other=-1).to(tl.int32)
    max_logit = tl.full([BT], -1e30, tl.float32)  # still finite when divided by the temperature
    sum_exp = tl.zeros([BT], tl.float32)
    sum_exp_c = tl.zeros([BT], tl.float32)
    target = tl.zeros([BT], tl.float32)
    for start in range(first, min(first + size, vocabulary), BV):
        column = start + tl.arange(0, BV)
        z = tl.zeros([BT, BV], tl.float32)
        for d in range(0, width, BD):
            at = d + tl.arange(0, BD)
            h_mask = (row < tokens)[:, None] & (at < width)
            w_mask = (column < vocabulary)[:, None] & (at < width)
            h = tl.load(hidden + row[:, None] * width + at, mask=h_mask, other=0.0)
            w = tl.load(weight + column.to(tl.int64)[:, None] * width + at, mask=w_mask, other=0.0)
            z = tl.dot(h, tl.trans(w), z, input_precision=PRECISION)
        target += tl.sum(tl.where(column == target_at[:, None], z, 0.0), 1)
        z = tl.where(column < vocabulary, z, -1e30)
        higher = tl.maximum(max_logit, tl.max(z, 1))
        shift = (max_logit - higher) * inverse_temperature  # rescales the old sums to the new maximum
        c = (z - higher[:, None]) * inverse_temperature
        exp_c = tl.exp(c)
        sum_exp_c = tl.exp(shift) * (sum_exp_c + shift * sum_exp) + tl.sum(exp_c * c, 1)
        sum_exp = tl.exp(shift) * sum_exp + tl.sum(exp_c, 1)
        max_logit = higher
    out += piece.to(tl.int64) * tokens + row
    pieces = tl.num_programs(1).to(tl.int64)
    tl.store(out, max_logit, mask=row < tokens)
    tl.store(out + pieces * tokens, sum_exp, mask=row < tokens)
    tl.store(out + 2 * pieces * tokens, sum_exp_c, mask=row < tokens)
    tl.store(out + 3 * pieces * tokens, target, mask=row < tokens)


@triton.jit(do_not_specialize=["start"])
def logits_to_gradient_kernel(z, out, targets, top, lse, entropy, grad_logprob, grad_entropy, start, columns,
                              z_stride, out_stride, inverse_temperature, COLUMNS: tl.constexpr):  # fmt: skip
    """Program (row, block of columns) of the logits z. out may be z: programs do not overlap.

    With grad_entropy None, the kernel is compiled without the entropy's terms.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    x = tl.load(z + row * z_stride + column, mask=column < columns, other=0.0)
    logp = (x - tl.load(top + row)) * inverse_temperature - tl.load(lse + row)
    g_logprob = tl.load(grad_logprob + row)
    gradient = -tl.exp(logp) * g_logprob
    if grad_entropy is not None:
        gradient -= tl.exp(logp) * tl.load(grad_entropy + row) * (logp + tl.load(entropy + row))
    gradient += tl.where(start + column == tl.load(targets + row), g_logprob, 0.0)
    tl.store(out + row * out_stride + column, gradient * inverse_temperature, mask=column < columns)
