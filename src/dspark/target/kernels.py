"""Which kernel attends over slots where they lie: C++ on CPU, Triton on CUDA. Without one, torch gathers them first."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from dspark.cards import runs_triton
from dspark.target import native
from dspark.target.plan import SHORT
from dspark.target.tilings import geometry_of

AttendSlots = Callable[..., Tensor]
"""(query, keys, values, slots, starts, positions, inside, rows, back, scale, window, softcap, sinks, firsts=None)

-> [T', H, Dv]; sinks are a layer's own, firsts those of plan.Visibility."""

IN_TRITON = (torch.float32, torch.bfloat16, torch.float16)

on_cuda: AttendSlots | None = None  # once `load_triton` has succeeded
tuned_on_cuda: AttendSlots | None = None  # then too: faster, in an order of sums that depends on the batch


def kernel_for(query: Tensor, num_queries: int, in_fixed_order: bool = False) -> AttendSlots | None:
    """The kernel for spans of up to `num_queries` tokens and such queries, or None."""
    if query.device.type == "cpu":
        return native.attend_slots if num_queries <= SHORT else None
    if query.device.type == "cuda" and query.dtype in IN_TRITON:
        return on_cuda if in_fixed_order else tuned_on_cuda
    return None


def load_triton(device: torch.device) -> bool:
    """Make the kernel for CUDA available, if the device runs it. Whether it does."""
    global on_cuda, tuned_on_cuda
    if not runs_triton(device):
        return False
    module = importlib.import_module("dspark.target.triton_attention")
    on_cuda, tuned_on_cuda = module.attend_slots, module.attend_tuned
    return True


def tune(heads: int, storage: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Find the fastest tilings of layers with so many heads and such keys and values on CUDA: about a minute, once per card.

    From then on all of this process use them but deterministic targets.
    """
    for keys, values in storage:
        if keys.dtype in IN_TRITON and load_triton(keys.device):
            tuning = importlib.import_module("dspark.target.triton_tuning")
            with torch.cuda.device_of(keys):  # on which Triton launches and takes the time
                tuning.tune(geometry_of(heads, keys, values), keys.device)
