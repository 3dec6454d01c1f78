"""The functions of fused.py in Triton. They read and write any float dtype and compute in fp32."""

import torch
import triton
from triton import language as tl

HEADS = 16  # heads of a token per program of the rotation
COLUMNS = 1024  # columns of the MLP's width per program of SwiGLU


class Rotation(torch.autograd.Function):
    """fused.rotate. The gradient is rotated back, by the negative angles."""

    @staticmethod
    def forward(ctx, x, cos, signed_sin, dtype):
        ctx.save_for_backward(cos, signed_sin)
        ctx.dtype = x.dtype
        return turned(x, cos, signed_sin, dtype, 1.0)

    @staticmethod
    def backward(ctx, grad):
        return turned(grad, *ctx.saved_tensors, ctx.dtype, -1.0), None, None, None


def turned(x, cos, signed_sin, dtype, sign):
    """Rotate x [T, H, E] into a new contiguous tensor of `dtype`; sign -1 rotates back."""
    (tokens, heads, width), x = x.shape, with_unit_stride(x)
    for angles in (cos, signed_sin):
        fits = angles.shape == (tokens, 1, width) and angles.is_contiguous()
        assert fits and angles.dtype == torch.float32, "cos and signed_sin [T, 1, E] in fp32"
    out = x.new_empty(x.shape, dtype=dtype)
    sizes = dict(HALF=width // 2, PAIRS=triton.next_power_of_2(width // 2), HEADS=HEADS)
    grid = tokens, triton.cdiv(heads, HEADS)
    rotate_kernel[grid](x, cos, signed_sin, out, heads, x.stride(0), x.stride(1), sign, **sizes)
    return out


class SwiGLU(torch.autograd.Function):
    """fused.swiglu. Saves only its input; the backward pass recomputes silu(gate)."""

    @staticmethod
    def forward(ctx, gate_up):
        gate_up = with_unit_stride(gate_up)
        ctx.save_for_backward(gate_up)
        tokens, width = len(gate_up), gate_up.shape[1] // 2
        out = gate_up.new_empty(tokens, width)
        grid = tokens, triton.cdiv(width, COLUMNS)
        swiglu_kernel[grid](gate_up, out, width, gate_up.stride(0), COLUMNS=COLUMNS)
        return out

    @staticmethod
    def backward(ctx, grad):
        (gate_up,), grad = ctx.saved_tensors, with_unit_stride(grad)
        (tokens, width), out = grad.shape, gate_up.new_empty(gate_up.shape)
        strides = gate_up.stride(0), grad.stride(0)
        grid = tokens, triton.cdiv(width, COLUMNS)
        swiglu_gradient_kernel[grid](gate_up, grad, out, width, *strides, COLUMNS=COLUMNS)
        return out


def with_unit_stride(x):
    """x, copied unless its last dimension is contiguous (the gradient of a sum is an expanded scalar)."""
    return x if x.stride(-1) == 1 else x.contiguous()


@triton.jit
def rotate_kernel(x, cos, signed_sin, out, heads, token_stride, head_stride, sign,
                  HALF: tl.constexpr, PAIRS: tl.constexpr, HEADS: tl.constexpr):  # fmt: skip
    """Program (token, block of heads). A head has HALF pairs; PAIRS is HALF rounded up to a power of 2."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    pair = tl.arange(0, PAIRS)
    inside = (head < heads) & (pair < HALF)
    angle = token * (2 * HALF) + pair
    c = tl.load(cos + angle, mask=pair < HALF, other=0.0)
    s = tl.load(signed_sin + (angle + HALF), mask=pair < HALF, other=0.0) * sign  # the second half is +sin
    x += token * token_stride + head * head_stride + pair
    a = tl.load(x, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x + HALF, mask=inside, other=0.0).to(tl.float32)
    out += (token * heads + head) * (2 * HALF) + pair
    tl.store(out, a * c - b * s, mask=inside)
    tl.store(out + HALF, b * c + a * s, mask=inside)


@triton.jit
def swiglu_kernel(gate_up, out, width, stride, COLUMNS: tl.constexpr):
    """Program (token, block of columns)."""
    token = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    at = gate_up + token * stride + place
    gate = tl.load(at, mask=place < width, other=0.0).to(tl.float32)
    up = tl.load(at + width, mask=place < width, other=0.0).to(tl.float32)
    tl.store(out + token * width + place, gate * tl.sigmoid(gate) * up, mask=place < width)


@triton.jit
def swiglu_gradient_kernel(gate_up, grad, out, width, stride, grad_stride, COLUMNS: tl.constexpr):
    """Program (token, block of columns): with s = sigmoid(x), d silu(x) / dx = s (1 + x (1 - s))."""
    token = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    at = gate_up + token * stride + place
    gate = tl.load(at, mask=place < width, other=0.0).to(tl.float32)
    up = tl.load(at + width, mask=place < width, other=0.0).to(tl.float32)
    g = tl.load(grad + token * grad_stride + place, mask=place < width, other=0.0).to(tl.float32)
    s = tl.sigmoid(gate)
    out += token * (2 * width) + place
    tl.store(out, g * up * s * (1 + gate * (1 - s)), mask=place < width)
    tl.store(out + width, g * gate * s, mask=place < width)
