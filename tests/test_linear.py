"""Products of a linear layer and their gradients against float64, and the gradient of a tied weight."""

import pytest
import torch

from kernels.linear import Linear, TiedWeight
from kernels.native import FEW_ROWS


@pytest.mark.parametrize("layout", ["by row", "by column", "with gaps"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, FEW_ROWS - 1, FEW_ROWS, 100])
def test_a_layer_and_its_gradients_are_those_of_float64(rows, bias, layout):
    torch.manual_seed(0)
    linear, x, grad = Linear(40, 37, bias=bias), torch.randn(rows, 40), torch.randn(rows, 37)
    x = {"by row": x, "by column": x.T.contiguous().T, "with gaps": torch.cat((x, x), 1)[:, :40]}[layout]
    grad = grad if layout == "by row" else grad[:, :1].expand(-1, 37)  # as of a sum
    exact = torch.nn.Linear(40, 37, bias=bias).double()
    exact.load_state_dict(linear.state_dict())
    found = []
    for layer, kind in ((linear, torch.float32), (exact, torch.float64)):
        leaf = x.detach().to(kind).requires_grad_()
        y = layer(leaf)
        y.backward(grad.to(kind))
        found.append([y, leaf.grad, *(p.grad for p in layer.parameters())])
    for got, expected in zip(*found, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("frozen", ["weight", "x"])
def test_only_the_gradients_that_are_asked_for_are_computed(frozen):
    linear, x = Linear(40, 24, bias=False), torch.randn(32, 40, requires_grad=frozen != "x")
    linear.weight.requires_grad_(frozen != "weight")
    linear(x).sum().backward()
    assert (x.grad is None) == (frozen == "x") and (linear.weight.grad is None) == (frozen == "weight")


def test_under_autocast_a_layer_is_torchs():
    linear, x = Linear(40, 24), torch.randn(32, 40)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear(x), torch.nn.functional.linear(x, linear.weight, linear.bias))


def test_the_gradient_of_a_frequent_token_is_a_sum_in_fp32():
    """A model in shards computes in bf16, which added 4,096 times one by one stands still at 256."""
    weight = torch.zeros(3, 4, dtype=torch.bfloat16, requires_grad=True)
    embedding, head = TiedWeight.apply(weight)
    embedded = torch.nn.functional.embedding(torch.ones(4096, dtype=torch.int64), embedding, sparse=True)
    (embedded.sum() + (head * 1).sum()).backward()
    assert weight.grad.tolist() == [[1.0] * 4, [4096.0] * 4, [1.0] * 4]  # 4097 in bf16 is 4096
