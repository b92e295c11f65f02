"""Memory that is taken page by page, and given back whole."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from dspark import pages
from dspark.target import KVCache

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="/proc says what a process holds")
_LITTLE = 8 << 20  # what else a process may take meanwhile


def resident() -> int:
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@on_linux
def test_what_is_written_is_held_until_nobody_holds_a_view_of_it():
    before = resident()
    numbers = pages.zeros((64, 1 << 20), torch.empty(0, dtype=torch.float32))
    assert resident() - before < _LITTLE
    numbers[:16] = 7.0
    view = numbers[3:5]
    del numbers
    assert resident() - before > 60 << 20
    assert float(view.amin()) == float(view.amax()) == 7.0  # without memory for the answer
    del view
    assert resident() - before < _LITTLE


@on_linux
def test_a_cache_that_grows_holds_memory_of_slots_that_were_used_alone():
    cache, wide = KVCache(1 << 16), torch.zeros(1, 2, 1, 512)
    before = resident()
    for layer in range(4):
        cache.tensors(layer, wide, wide)
    cache.reserve(1, 1000)
    cache.reserve(1, 32_000)
    assert cache.num_allocated * cache.bytes_per_slot == 2 << 30
    assert resident() - before < 1024 * cache.bytes_per_slot + _LITTLE  # what was there before was brought over


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zeros_of_any_shape_and_kind(dtype):
    like = torch.ones(2, dtype=dtype)
    for shape in ((3, 5, 7), (0, 4), (1,)):
        made = pages.zeros(shape, like)
        assert (made.shape, made.dtype, made.count_nonzero()) == (shape, dtype, 0)
        assert made.is_contiguous() and made._base is None, "compiled anew for every size of what it is a view of"


def test_more_than_there_is_raises_what_every_device_raises():
    with pytest.raises(torch.OutOfMemoryError, match="more than the system gives"):
        pages.zeros((1 << 60,), torch.empty(0, dtype=torch.uint8))
