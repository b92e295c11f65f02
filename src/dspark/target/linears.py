"""Linear layers for few rows: the same weights packed once for a kernel of our own (csrc/small_linear.cpp)."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from dspark.target import native


class PackedLinear(nn.Linear):
    """A bfloat16 linear layer on CPU that costs a fraction where rows are few, and gives each row the same bits whatever
    others there are (up to 16 rows on processors with matrix units, which take what is larger).

    Its weights are packed when it is made: later changes are not seen.
    """

    packed: Tensor

    @classmethod
    def of(cls, linear: nn.Linear) -> PackedLinear:
        """The same layer with its weight packed for the kernel."""
        clone = copy.copy(linear)
        clone.__class__ = cls
        clone._buffers = {"packed": torch.ops.dspark.pack_linear(linear.weight.detach())}
        return clone  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.dspark.small_linear(x, self.weight, self.packed, self.bias)
        return y


def with_packed_linears(module: nn.Module) -> nn.Module:
    """The module tree with its linear layers packed, where there is a kernel for that; everything else is shared."""
    if native.small_linear is None or not any(map(_can_pack, module.modules())):
        return module
    if _can_pack(module):
        return PackedLinear.of(module)  # type: ignore[arg-type]
    clone = copy.copy(module)
    clone._modules = {
        name: None if child is None else with_packed_linears(child) for name, child in module._modules.items()
    }
    return clone


def _can_pack(module: nn.Module) -> bool:
    """Subclasses may mean something else by the same weights."""
    if type(module) is not nn.Linear:
        return False
    weight = module.weight
    return weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and weight.shape[1] % 2 == 0
