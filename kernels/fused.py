"""The elementwise steps of a layer, each in one pass over memory: rotary positions and SwiGLU.

They compute next to nothing, so they cost what they read and write, and in a decoding step of few tokens what
it takes to launch them. On a GPU each is one Triton kernel forward and one backward (fused_triton.py), in
place of two to seven operations of torch; elsewhere the torch functions below, which the kernels are tested
against.

Letters in shape comments: T tokens, H heads, E head width, I width of the MLP.
"""

import torch.nn.functional as F

try:
    from kernels import fused_triton
except ImportError:  # torch's CPU wheels come without triton
    fused_triton = None


def on_gpu(x):
    return x.is_cuda and fused_triton is not None


def rotate(x, cos, signed_sin, dtype):
    """Rotate the pairs of a head, (first half, second half) at the same place: x [T, H, E] -> [T, H, E].

    cos and signed_sin [T, 1, E] in fp32 are cos, cos and -sin, sin of each pair's angle. The sums are in
    fp32, the result in `dtype`. x may be some of the heads of a larger tensor.

    The plain form is        a, b = x.chunk(2, -1)
                             torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    The form below has fewer operations, and with the few tokens of a decoding step it takes half the time.
    """
    if on_gpu(x):
        return fused_triton.Rotation.apply(x, cos, signed_sin, dtype)
    swapped = x.roll(x.shape[-1] // 2, -1)  # b where a was, and a where b was
    return (x * cos).addcmul_(swapped, signed_sin).to(dtype)


def swiglu(gate_up):
    """silu(gate) * up of a product that holds both, [T, 2 I] -> [T, I] (Shazeer 2020)."""
    if on_gpu(gate_up):
        return fused_triton.SwiGLU.apply(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)  # [T, I] each
    return F.silu(gate) * up
