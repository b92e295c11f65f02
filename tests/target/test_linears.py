"""The kernel for linear layers over few rows: right, the same for any number of rows, and used where it can be."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from dspark.target import native
from dspark.target.direct import Direct
from dspark.target.linears import PackedLinear, Product, with_packed_linears


@pytest.fixture(scope="module", autouse=True, params=["in pairs", "as floats"])
def kernel(request: pytest.FixtureRequest) -> Iterator[None]:
    if not native.load() or native.small_linear is None:
        pytest.skip("no compiler, or a processor without bfloat16 dot products")
    usual = torch.ops.dspark.multiply_in_pairs(request.param == "in pairs")
    yield
    torch.ops.dspark.multiply_in_pairs(usual)


def linear(width: int, inner: int, bias: bool = False) -> nn.Linear:
    torch.manual_seed(width)
    return nn.Linear(inner, width, bias=bias).to(torch.bfloat16)


@pytest.mark.parametrize(
    ("width", "inner", "bias"), [(64, 256, False), (200, 34, True), (1, 16, True), (515, 768, False)]
)
def test_it_is_the_product_whatever_the_sizes(width, inner, bias):
    layer = linear(width, inner, bias)
    for num_rows in (*range(1, 16), 25, 40):
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


def test_joined_layers_give_what_they_gave_side_by_side():
    layers = [PackedLinear.of(linear(width, 34, bias)) for width, bias in ((70, False), (1, True), (96, True))]
    joined = Product.joined([layer.number for layer in layers])
    again = Product.joined([joined.number, layers[0].number])
    for num_rows in (1, 7, 16):
        x = torch.randn(num_rows, 34).bfloat16()
        apart = torch.cat([layer(x) for layer in layers], -1)
        assert torch.equal(torch.ops.dspark.small_linear(x, joined.number, 167), apart)
        assert torch.equal(torch.ops.dspark.small_linear(x, again.number, 237), torch.cat([apart, apart[:, :70]], -1))


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on CPU needs a C++ compiler")
def test_a_graph_joins_layers_of_one_input_and_no_others():
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up, self.down = linear(70, 34), linear(71, 34, bias=True), linear(34, 70)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(torch.sigmoid(self.gate(x)) * self.up(x)[..., :-1])

    model = with_packed_linears(Gated())

    def step(x: torch.Tensor) -> tuple[torch.Tensor]:
        return (model(x),)

    graph = Direct(step, "gated")
    with torch.no_grad():
        for size in (7, 3):
            x = torch.randn(1, size, 34).bfloat16()
            torch._dynamo.maybe_mark_dynamic(x, 1)
            torch.testing.assert_close(graph(x=x)[0], model(x), rtol=2**-7, atol=2**-7)
    assert graph.is_direct and len(graph._products) == 1


def test_weights_go_with_who_needs_them():
    layer, other = PackedLinear.of(linear(8, 16)), PackedLinear.of(linear(8, 16))
    number, joined_numbers = layer.number, [layer.number, other.number]
    joined = Product.joined(joined_numbers)
    x = torch.randn(1, 16).bfloat16()
    before = torch.ops.dspark.small_linear(x, joined.number, 16)
    clone = copy.copy(layer)
    del layer
    assert torch.equal(clone(x), before[:, :8])
    del clone, other
    assert Product.joined(joined_numbers) is joined and torch.equal(
        torch.ops.dspark.small_linear(x, joined.number, 16), before
    )
    del joined
    with pytest.raises(RuntimeError, match=f"no packed linear layer has the number {number}"):
        torch.ops.dspark.small_linear(x, number, 8)


def test_one_layer_is_packed_once_and_again_after_it_was_written_to():
    layer, x = linear(8, 16, bias=True), torch.randn(1, 16).bfloat16()
    first, second, like_it = PackedLinear.of(layer, "a"), PackedLinear.of(layer, "a"), linear(8, 16, bias=True)
    assert first.product is second.product is not PackedLinear.of(like_it, "a").product
    with torch.no_grad():
        layer.bias += 1
        biased = PackedLinear.of(layer, "a")
        layer.weight *= 2
        doubled = PackedLinear.of(layer, "a")
    assert len({each.product for each in (first, biased, doubled)}) == 3
    torch.testing.assert_close(doubled(x), layer(x))
    assert not torch.equal(biased(x), first(x))


def test_weights_of_many_layers_lie_together_and_large_ones_alone():
    large = linear(4096, 4104)  # more than a chunk
    layers = [PackedLinear.of(each) for each in (linear(64, 256), large, *(linear(512, 1024) for _ in range(40)))]
    for layer in layers:
        x = torch.randn(2, layer.in_features).bfloat16()
        torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight), rtol=2**-7, atol=2**-7)


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
