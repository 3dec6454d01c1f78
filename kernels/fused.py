"""The elementwise steps of a layer, each in one pass over memory: rotary positions and SwiGLU.

These steps are memory-bound, and with the few tokens of a decoding step, launch-bound. On a GPU each is one
Triton kernel forward and one backward (fused_triton.py) instead of two to seven torch operations. On a
CPU with a C compiler so is SwiGLU (cpu/swiglu.c). Elsewhere the torch functions below run; the kernels are
tested against them.

Letters in shape comments: T tokens, H heads, E head width, I width of the MLP.
"""

import torch
import torch.nn.functional as F

from kernels import native

try:
    from kernels import fused_triton
except ImportError:  # torch's CPU wheels come without triton
    fused_triton = None


def on_gpu(x):
    return x.is_cuda and fused_triton is not None


def rotate(x, cos, signed_sin, dtype):
    """Apply rotary positions: x [T, H, E] -> [T, H, E] in `dtype`. Pair i is x[..., i] and x[..., i + E/2].

    cos and signed_sin [T, 1, E] in fp32 hold (cos, cos) and (-sin, sin) of each pair's angle. The sums are in
    fp32. x may be a slice of the heads of a larger tensor.

    The plain form is        a, b = x.chunk(2, -1)
                             torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    The form below needs fewer operations: half the time with the few tokens of a decoding step.
    """
    if on_gpu(x):
        return fused_triton.Rotation.apply(x, cos, signed_sin, dtype)
    swapped = x.roll(x.shape[-1] // 2, -1)  # (b, a)
    return (x * cos).addcmul_(swapped, signed_sin).to(dtype)


def swiglu(gate_up):
    """silu(gate) * up, for gate and up concatenated: [T, 2 I] -> [T, I] (Shazeer 2020)."""
    if on_gpu(gate_up):
        return fused_triton.SwiGLU.apply(gate_up)
    if native.can_swiglu(gate_up):
        return NativeSwiGLU.apply(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)  # [T, I] each
    return F.silu(gate) * up


class NativeSwiGLU(torch.autograd.Function):
    """`swiglu` on a CPU with a C compiler."""

    @staticmethod
    def forward(ctx, gate_up):
        ctx.save_for_backward(gate_up)
        return native.swiglu(gate_up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return native.swiglu(*ctx.saved_tensors, grad)
