"""Linear layers for few rows: the same weights packed once for a kernel of our own (csrc/small_linear.cpp)."""

from __future__ import annotations

import copy
import zlib
from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import cast
from weakref import WeakValueDictionary, finalize

import torch
from torch import Tensor, nn

from dspark.target import native


class Product:
    """Weights that the kernel knows by a number, for as long as this object is there.

    parts   the products that it joins: their numbers are not given to others meanwhile
    source  what was packed: nothing else comes to lie where it lies meanwhile
    """

    def __init__(self, number: int, parts: Sequence[Product] = (), source: tuple[Tensor | None, ...] = ()) -> None:
        self.number, self.parts, self.source = number, tuple(parts), source
        _live[number] = self
        # Not at exit: a thread may still be in a step.
        finalize(self, torch.ops.dspark.free_linear, number).atexit = False

    @classmethod
    def of(cls, linear: nn.Linear, name: str) -> Product:
        """A layer's weights, packed: later changes are not seen. The name gives it its number: the same in every process,
        if it is free. Graphs of one model share it, or what they read would not fit into a cache where one copy does."""
        weight, bias = linear.weight.detach(), None if linear.bias is None else linear.bias.detach()
        as_it_is = name, _state(weight), None if bias is None else _state(bias)
        found = _packed.get(as_it_is)
        if found is None:
            number = torch.ops.dspark.pack_linear(weight, bias, _number_for(f"{name}: {linear}"))
            found = _packed[as_it_is] = cls(number, source=(weight, bias))
        return found

    @classmethod
    def joined(cls, numbers: Sequence[int]) -> Product:
        """Outputs of several, side by side. It shares their weights, and is one object for all who ask for the same."""
        found = _joined.get(tuple(numbers))
        if found is None:
            parts = [_live[number] for number in numbers]
            found = cls(torch.ops.dspark.join_linears(numbers, _number_for(repr(list(numbers)))), parts)
            _joined[tuple(numbers)] = found
        return found


_live: WeakValueDictionary[int, Product] = WeakValueDictionary()  # by their numbers
_packed: WeakValueDictionary[Hashable, Product] = WeakValueDictionary()  # by the weights as they were
_joined: WeakValueDictionary[tuple[int, ...], Product] = WeakValueDictionary()  # by the numbers of their parts


class PackedLinear(nn.Linear):
    """A bfloat16 linear layer on CPU that costs a fraction where rows are few, and gives each row the same bits whatever
    others there are (up to 16 rows on processors with matrix units, which take what is larger).
    """

    product: Product
    number: int

    @classmethod
    def of(cls, linear: nn.Linear, name: str = "") -> PackedLinear:
        """The same layer, whose name in its model this is, with its weight packed for the kernel."""
        clone = cast(PackedLinear, copy.copy(linear))
        clone.__class__ = cls
        clone.product = Product.of(linear, name)
        clone.number = clone.product.number
        return clone

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.dspark.small_linear(x, self.number, self.out_features)
        return y


def with_packed_linears(module: nn.Module, name: str = "") -> nn.Module:
    """The module tree with its linear layers packed, where there is a kernel for that; everything else is shared.

    name  of the module in the whole tree
    """
    if native.small_linear is None or not any(map(_can_pack, module.modules())):
        return module
    if _can_pack(module):
        return PackedLinear.of(module, name)  # type: ignore[arg-type]
    clone = copy.copy(module)
    clone._modules = {
        own: None if child is None else with_packed_linears(child, f"{name}.{own}")
        for own, child in module._modules.items()
    }
    return clone


def join_linears(graph: torch.fx.Graph) -> list[Product]:
    """Have packed layers that read the same tensor run as one call, such as queries, keys and values.

    Every output is the sum that it was. Returns what has to live as long as the graph, in the order it was made.
    """
    kernel, products = native.small_linear, list[Product]()
    if kernel is None:
        return products
    readers: dict[torch.fx.Node, list[torch.fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        if node.target in (kernel, kernel.default):
            readers[node.args[0]].append(node)
    for x, nodes in readers.items():
        if len(nodes) < 2:
            continue
        numbers, widths = zip(*(node.args[1:] for node in nodes), strict=True)
        products.append(Product.joined(numbers))
        with graph.inserting_before(nodes[0]):
            whole = graph.call_function(kernel, (x, products[-1].number, sum(widths)))
            for node, piece in zip(nodes, widths, strict=True):
                start = sum(widths[: nodes.index(node)])
                node.replace_all_uses_with(graph.call_function(torch.narrow, (whole, -1, start, piece)))
        for node in nodes:
            graph.erase_node(node)
    return products


def _state(weights: Tensor) -> Hashable:
    """What tells these weights from others, and from themselves once they were written to."""
    writes = object() if weights.is_inference() else weights._version  # which are not counted for all tensors
    return weights.data_ptr(), weights.shape, weights.stride(), writes


def _number_for(name: str) -> int:
    return zlib.crc32(name.encode()) % 2**16


def _can_pack(module: nn.Module) -> bool:
    """Subclasses may mean something else by the same weights."""
    if type(module) is not nn.Linear:
        return False
    weight = module.weight
    return weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and weight.shape[1] % 2 == 0
