"""Linear layers: matrix products on the threads of kernels/cpu, and one gradient for a tied weight.

nn.Linear computes x @ weight.T + bias. On a CPU with a C compiler, Linear computes the product and its two
gradients in C (kernels/cpu/product.c), whose threads do not wait for each other where another program takes
their core. Elsewhere, in a dtype other than fp32, and for few rows it is nn.Linear.

Letters in shape comments: T tokens, D width, V vocabulary.
"""

import torch
from torch import nn

from kernels import native


class Linear(nn.Linear):
    """nn.Linear, on a CPU with products in C."""

    def forward(self, x):
        """x [T, in_features] -> x @ weight.T + bias, [T, out_features]."""
        if not native.can_multiply(x, self.weight) or torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        y = NativeProduct.apply(x, self.weight)
        return y if self.bias is None else y.add_(self.bias)


class NativeProduct(torch.autograd.Function):
    """x @ weight.T."""

    @staticmethod
    def forward(ctx, x, weight):
        want_x, want_weight = ctx.needs_input_grad
        ctx.save_for_backward(x if want_weight else None, weight if want_x else None)
        return native.product(x, weight.T)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        want_x, want_weight = ctx.needs_input_grad
        return (native.product(grad, weight) if want_x else None,
                native.product(grad.T, x) if want_weight else None)  # fmt: skip


class TiedWeight(torch.autograd.Function):
    """A tied weight [V, D] as two: the embedding, whose gradient is sparse, and the output head.

    The few rows of the embedding's gradient are added to the head's gradient in place. Autograd would
    allocate a second [V, D] for the sum.
    """

    @staticmethod
    def forward(ctx, weight):
        return weight.view_as(weight), weight.view_as(weight)

    @staticmethod
    def backward(ctx, embedding_grad, head_grad):
        rows, values = embedding_grad._indices()[0], embedding_grad._values()
        # In fp32: a bf16 sum stops growing at 256 times its addends. Autograd casts the result back.
        return head_grad.float().index_put_((rows,), values.float(), accumulate=True)
