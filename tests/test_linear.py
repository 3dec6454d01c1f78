"""The product of few rows on a CPU against float64."""

import pytest
import torch

from kernels.linear import FEW_ROWS, Linear


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
