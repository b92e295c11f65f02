"""The way into a graph on CPU: inductor's C++ function, without most of the Python that inductor puts before it."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

Call = Callable[[list[Any]], Sequence[Any]]
Read = Callable[[Mapping[str, Any]], list[Any]]

_SIZE = re.compile(r"(.+)\.(size|stride)\(\)\[(\d+)\]")


def way_in(call: Any, weights: Collection[str]) -> tuple[Call, bool]:
    """What gives the same as `call` of a module that inductor wrote, and whether it takes sizes as tensors.

    weights  names that the module knows tensors by which are no inputs

    The module's own way makes a tensor of every size and a list of all weights at each call, which for a small step
    takes as long as several kernels. Where the module looks otherwise than expected, `call` itself is given back.
    """
    try:
        enter, names = call.__globals__["inductor_entry"], call.__code__.co_names
        to_handles = torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors
        to_tensors = torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs
        if not {to_handles.__name__, to_tensors.__name__} <= {*names}:
            return call, False
        constants = [call.__globals__[name] for name in names if name in weights]
    except (AttributeError, KeyError):
        return call, False

    def run(inputs: list[Any]) -> Sequence[Any]:
        inputs += constants
        outputs: Sequence[Any] = to_tensors(enter(to_handles(inputs)))
        return outputs

    return run, True


def reader(inputs: Sequence[str], sizes_as_tensors: bool) -> Read:
    """What lists a graph's inputs, given as expressions over the arguments L, such as L['ids'] or L['ids'].size()[1]."""
    found = [_SIZE.fullmatch(place) for place in inputs]
    places = [
        place if size is None else f"as_tensor({size[1]}.{size[2]}({size[3]}))" if sizes_as_tensors else place
        for place, size in zip(inputs, found, strict=True)
    ]
    read: Read = eval(f"lambda L: [{', '.join(places)}]", {"as_tensor": _as_tensor})
    return read


@lru_cache(maxsize=1 << 14)
def _as_tensor(size: int) -> Tensor:
    """For reading only."""
    return torch.tensor(size)
