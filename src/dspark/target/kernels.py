"""Which kernel attends over slots where they lie: C++ on CPU, Triton on CUDA. Without one, torch gathers them first."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from dspark.target import native
from dspark.target.plan import SHORT

AttendSlots = Callable[..., Tensor]
"""(query, keys, values, slots, starts, positions, inside, rows, back, scale, window, softcap, sinks) -> [T', H, Dv]"""

_log = logging.getLogger(__name__)

IN_TRITON = (torch.float32, torch.bfloat16, torch.float16)

on_cuda: AttendSlots | None = None  # once `load_triton` has succeeded


def kernel_for(query: Tensor, num_queries: int) -> AttendSlots | None:
    """The kernel for spans of up to `num_queries` tokens and such queries, or None."""
    if query.device.type == "cpu":
        return native.attend_slots if num_queries <= SHORT else None
    if query.device.type == "cuda":
        return on_cuda if query.dtype in IN_TRITON else None
    return None


@cache
def load_triton() -> bool:
    """Make the kernel for CUDA available. Whether it worked."""
    global on_cuda
    try:
        on_cuda = importlib.import_module("dspark.target.triton_attention").attend_slots
    except ImportError as error:
        _log.warning("attention runs without its Triton kernel: %s", error)
        return False
    return True
