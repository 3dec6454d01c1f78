"""Linear layers: a faster product of few rows on a CPU, and a tied weight with a single gradient.

Letters in shape comments: T tokens, D width, V vocabulary.
"""

import math

import torch
from torch import nn

# The product's name is a private one of torch: a version without it takes nn.Linear's own.
ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
FEW_ROWS = 128  # up to here the order of oneDNN's factors matters (measured: from 256 rows on it does not)


class Linear(nn.Linear):
    """nn.Linear with a faster product where a CPU decodes: fp32, no gradients, few rows.

    The result may be stored column by column; with by_row it never is (the sampler reads logits row by row).
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
        else:  # oneDNN repacks its second factor at every call, so that one should be the small one
            stored_by_column = x.T.is_contiguous()
            y = onednn_product(self.weight, x if stored_by_column else x.contiguous()).T
        return y if self.bias is None else y.add_(self.bias)


def one_row_product(x, weight, parts):
    """x @ weight.T for one row: on one thread in MKL, but on all as a batch of `parts` of the weight."""
    weight = weight.view(parts, -1, weight.shape[1])
    return torch.bmm(weight, x.T.expand(parts, -1, 1)).view(1, -1)


def onednn_product(a, b):
    """a @ b.T by oneDNN: [M, D], [N, D] -> [M, N], both contiguous (it is very slow on strided views)."""
    return torch.ops.mkldnn._linear_pointwise.default(a, b, None, "none", [], "")


class TiedWeight(torch.autograd.Function):
    """One weight [V, D] used twice: as the embedding (whose gradient is sparse) and as the output head.

    The few rows of the embedding's gradient are added to the head's gradient in place. Autograd would
    allocate a second [V, D] for the sum.
    """

    @staticmethod
    def forward(ctx, weight):
        return weight.view_as(weight), weight.view_as(weight)

    @staticmethod
    def backward(ctx, embedding_grad, head_grad):
        rows, values = embedding_grad._indices()[0], embedding_grad._values()
        # In fp32: in bf16 the sum of a frequent token stands still at 256 times its addends. Autograd casts.
        return head_grad.float().index_put_((rows,), values.float(), accumulate=True)
