"""The product of few rows on a CPU against float64, and the gradient of a tied weight."""

import runpy
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

from kernels.linear import FEW_ROWS, Linear, TiedWeight


@pytest.mark.parametrize("layout", ["by row", "by column", "with gaps"])
@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("features", [24, 37])  # 37 cannot be cut into parts
@pytest.mark.parametrize("rows", [1, 2, 9, FEW_ROWS + 1])
def test_a_product_without_gradients_is_the_product(rows, features, bias, by_row, layout):
    torch.manual_seed(0)
    linear, x = Linear(10, features, bias=bias, by_row=by_row), torch.randn(rows, 10)
    x = {"by row": x, "by column": x.T.contiguous().T, "with gaps": torch.cat((x, x), 1)[:, :10]}[layout]
    with torch.no_grad():
        y = linear(x)
    expected = x.double() @ linear.weight.double().T + (linear.bias.double() if bias else 0)
    torch.testing.assert_close(y.double(), expected, atol=1e-6, rtol=1e-6)
    assert y.is_contiguous() or not by_row


def test_a_torch_without_the_private_product_takes_its_own(monkeypatch):
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace())
    linear, x = runpy.run_path(ROOT / "kernels" / "linear.py")["Linear"](10, 24), torch.randn(3, 10)
    with torch.no_grad():
        assert torch.equal(linear(x), torch.nn.functional.linear(x, linear.weight, linear.bias))


def test_the_gradient_of_a_frequent_token_is_a_sum_in_fp32():
    """A model in shards computes in bf16, which added 4,096 times one by one stands still at 256."""
    weight = torch.zeros(3, 4, dtype=torch.bfloat16, requires_grad=True)
    embedding, head = TiedWeight.apply(weight)
    embedded = torch.nn.functional.embedding(torch.ones(4096, dtype=torch.int64), embedding, sparse=True)
    (embedded.sum() + (head * 1).sum()).backward()
    assert weight.grad.tolist() == [[1.0] * 4, [4096.0] * 4, [1.0] * 4]  # 4097 in bf16 is 4096
