"""Numbers between host and device: in one copy where there could be several, and without waiting where nobody must.

Whatever comes to the host, and whatever goes over from memory that is not pinned, waits until the device has done all
that it was told before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

_ALIGNED = 64  # bytes: kernels read addresses that are less even more slowly


def on_device(values: Sequence[float], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Numbers as a tensor there. Nobody waits."""
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


def columns_on_device(columns: Sequence[Sequence[int]], device: torch.device) -> Sequence[Tensor]:
    """Several lists of integers, of any lengths, as tensors there: one copy, and nobody waits."""
    if device.type == "cpu":
        return [torch.from_numpy(np.array(column, dtype=np.int64)) for column in columns]
    flat = on_device([number for column in columns for number in column], device, torch.int64)
    return flat.split([len(column) for column in columns])


def tables_on_device(tables: Sequence[Sequence[Sequence[int]]], device: torch.device) -> list[Tensor]:
    """Tables of integers there, each of columns of one length [columns, n]: one copy, and nobody waits."""
    if device.type == "cpu":
        return [torch.from_numpy(np.array(table, dtype=np.int64)) for table in tables]
    shapes = [(len(table), len(table[0])) for table in tables]
    flat = on_device([number for table in tables for column in table for number in column], device, torch.int64)
    return [part.view(shape) for part, shape in zip(flat.split([n * m for n, m in shapes]), shapes, strict=True)]


def together_on_device(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Tensors of the host there: one copy, and nobody waits. On CPU the very same."""
    if device.type != "cuda":
        return [tensor.to(device) for tensor in tensors]
    sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
    *starts, total = accumulate((-(-size // _ALIGNED) * _ALIGNED for size in sizes), initial=0)
    on_host = torch.empty(total, dtype=torch.uint8, pin_memory=True)
    places = [slice(start, start + size) for start, size in zip(starts, sizes, strict=True)]
    for tensor, place in zip(tensors, places, strict=True):
        on_host[place].view(tensor.dtype).view(tensor.shape).copy_(tensor)
    there = on_host.to(device, non_blocking=True)
    return [there[place].view(x.dtype).view(x.shape) for x, place in zip(tensors, places, strict=True)]


def together_on_host(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The same in the host's memory, which waits for them once. What lies there already stays itself."""
    far = [x for x in tensors if x is not None and x.device.type == "cuda"]
    if len(far) < 2:
        return [None if x is None else x.cpu() for x in tensors]
    near = _unpacked(_packed(far).cpu(), far)
    return [None if x is None else near.get(id(x), x) for x in tensors]


def coming_to_host(*tensors: Tensor) -> Callable[[], list[Tensor]]:
    """Begin one copy of tensors of one device. Who calls what is returned gets them, and waits for no more than that copy."""
    device = tensors[0].device
    if device.type != "cuda":
        return lambda: list(tensors)
    packed = _packed(tensors)
    on_host = torch.empty(packed.shape, dtype=torch.uint8, pin_memory=True)
    on_host.copy_(packed, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(device))

    def arrived() -> list[Tensor]:
        copied.synchronize()
        near = _unpacked(on_host, tensors)
        return [near[id(x)] for x in tensors]

    return arrived


def _widest_first(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Side by side, each then begins at a multiple of its numbers' size."""
    return sorted(tensors, key=lambda x: -x.element_size())


def _packed(tensors: Sequence[Tensor]) -> Tensor:
    """[bytes]  of all of them."""
    return torch.cat([x.contiguous().view(-1).view(torch.uint8) for x in _widest_first(tensors)])


def _unpacked(packed: Tensor, tensors: Sequence[Tensor]) -> dict[int, Tensor]:
    """By the id of each of `tensors`, what `_packed` has made of it."""
    ordered = _widest_first(tensors)
    pieces = packed.split([x.numel() * x.element_size() for x in ordered])
    return {id(x): piece.view(x.dtype).view(x.shape) for x, piece in zip(ordered, pieces, strict=True)}
