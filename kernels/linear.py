"""Linear layers: fast matrix products for decoding on a CPU, and one gradient for a tied weight.

A CPU that decodes a small batch spends its time in the matrix products of the linear layers, and nn.Linear
is not the fastest way to compute them. The plain form is x @ weight.T + bias. Linear computes it in one of
three ways, by the number of rows of x:

    1 row         MKL runs a matrix-vector product on one thread, so the weight is cut into parts and
                  multiplied as a batch, which uses all threads
    up to 128     oneDNN repacks its second operand at each call, so the small x comes second:
                  (weight @ x.T).T, a result that is stored column by column
    more          (or by_row=True) oneDNN with x first and the weight second

With gradients, on a GPU, and in any dtype other than fp32, it is nn.Linear.

Letters in shape comments: T tokens, D width, V vocabulary.
"""

import math

import torch
from torch import nn

# The operator is private to torch. In a version without it, Linear is nn.Linear.
ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
FEW_ROWS = 128  # measured: x second is faster up to here; from 256 rows on the order makes no difference


class Linear(nn.Linear):
    """nn.Linear with a faster forward pass for decoding on a CPU.

    by_row=True returns a contiguous result; the sampler reads logits row by row. Otherwise the result may be
    stored column by column.
    """

    def __init__(self, *args, by_row=False, **kwargs):
        super().__init__(*args, **kwargs)
        self.by_row = by_row

    def forward(self, x):
        """x [T, in_features] -> x @ weight.T + bias, [T, out_features]."""
        if not ONEDNN or not x.is_cpu or x.dtype != torch.float32 or torch.is_grad_enabled():
            return super().forward(x)
        parts = math.gcd(self.out_features, 64)
        if len(x) == 1 and parts > 1:
            y = one_row_product(x, self.weight, parts)
        elif self.by_row or len(x) > FEW_ROWS:
            y = onednn_product(x.contiguous(), self.weight)
        else:
            stored_by_column = x.T.is_contiguous()  # onednn_product accepts it as it is
            y = onednn_product(self.weight, x if stored_by_column else x.contiguous()).T
        return y if self.bias is None else y.add_(self.bias)


def one_row_product(x, weight, parts):
    """x @ weight.T for a single row, as a batch of `parts` products."""
    weight = weight.view(parts, -1, weight.shape[1])
    return torch.bmm(weight, x.T.expand(parts, -1, 1)).view(1, -1)


def onednn_product(a, b):
    """a @ b.T: [M, D], [N, D] -> [M, N]. oneDNN is very slow on operands whose rows have gaps."""
    return torch.ops.mkldnn._linear_pointwise.default(a, b, None, "none", [], "")


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
