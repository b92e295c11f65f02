"""The kernel for linear layers over few rows: right, the same for any number of rows, and used where it can be."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dspark.target import native
from dspark.target.linears import PackedLinear, with_packed_linears


@pytest.fixture(scope="module", autouse=True)
def kernel():
    if not native.load() or native.small_linear is None:
        pytest.skip("no compiler, or a processor without bfloat16 dot products")


def linear(width: int, inner: int, bias: bool = False) -> nn.Linear:
    torch.manual_seed(width)
    return nn.Linear(inner, width, bias=bias).to(torch.bfloat16)


@pytest.mark.parametrize(
    ("width", "inner", "bias"), [(64, 256, False), (200, 34, True), (1, 16, True), (515, 768, False)]
)
def test_it_is_the_product_whatever_the_sizes(width, inner, bias):
    layer = linear(width, inner, bias)
    for num_rows in (1, 2, 3, 4, 5, 6, 7, 8, 13, 40):
        x = torch.randn(num_rows, inner).bfloat16()
        y = PackedLinear.of(layer)(x)
        exact = x.double() @ layer.weight.double().T + (layer.bias.double() if bias else 0)
        assert y.shape == (num_rows, width) and y.dtype == torch.bfloat16
        torch.testing.assert_close(y.double(), exact, rtol=2**-8, atol=2**-8 * exact.abs().max().item())


def test_every_row_has_the_same_bits_alone_and_in_company():
    layer = PackedLinear.of(linear(300, 256))
    x = torch.randn(2, 7, 256).bfloat16()  # with matrix units, more than 16 rows would be the library's
    y = layer(x)
    assert y.shape == (2, 7, 300)
    for i in range(2):
        for j in range(7):
            assert torch.equal(layer(x[i, j]), y[i, j])
    assert torch.equal(layer(x.transpose(0, 1)), y.transpose(0, 1))  # as it lies in memory does not matter


def test_a_model_shares_all_but_what_is_packed():
    class Odd(nn.Linear):
        """Means something else by its weights."""

    model = nn.Sequential(
        linear(8, 16), nn.LayerNorm(8), nn.ModuleDict({"in": Odd(8, 8).bfloat16(), "full": nn.Linear(8, 8)})
    )
    packed = with_packed_linears(model)
    assert type(model[0]) is nn.Linear and type(packed[0]) is PackedLinear
    assert packed[0].weight is model[0].weight and packed[1] is model[1]
    assert packed[2]["in"] is model[2]["in"] and packed[2]["full"] is model[2]["full"]
    assert with_packed_linears(model[1]) is model[1]


def test_wrong_inputs_are_refused():
    layer = PackedLinear.of(linear(8, 16))
    for x in (torch.zeros(2, 18).bfloat16(), torch.zeros(2, 16)):
        with pytest.raises(RuntimeError, match="bfloat16"):
            layer(x)
