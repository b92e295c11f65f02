"""What is the Triton kernel's own: long spans, many splits, its place in compiled graphs. The rest is in test_kernels.py."""

from __future__ import annotations

import pytest
import torch

from target.test_kernels import Case, Kernel

pytest.importorskip("triton")

from dspark.target import kernels, triton_attention
from dspark.target.triton_attention import Tiling


@pytest.fixture
def kernel() -> Kernel:
    return Kernel("triton")


def test_more_splits_than_are_added_at_a_time(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    tiling = Tiling(rows=16, keys=16, split=16)
    monkeypatch.setattr(triton_attention, "tiling_for", lambda *_: tiling)
    case = Case([300], [2], torch.float32, width=16, value_width=16)
    case.assert_equal(kernel, window=280)


@pytest.mark.parametrize(("start", "window"), [(0, None), (81, 25)])
def test_prompt_chunks(kernel: Kernel, start: int, window: int | None) -> None:
    case = Case([start], [23], torch.bfloat16, width=16, value_width=16)
    assert triton_attention.tiling_for(23, 32) is triton_attention.LONG_SPANS
    case.assert_equal(kernel, window=window)


def test_compilers_know_its_shape_without_running_it(kernel: Kernel) -> None:
    case = Case([5, 2], [1, 2], torch.float32, width=16, value_width=24)
    seen, group = case.group.visibility, case.group
    places = (group.slots, seen.starts, seen.positions, seen.inside, group.rows, group.back)
    arguments = (case.queries, case.keys, case.values, *places, 0.1, 0, 0.0, None)
    arguments = tuple(x.to(kernel.device) if isinstance(x, torch.Tensor) else x for x in arguments)
    torch.library.opcheck(kernel.attend_slots, arguments, test_utils=("test_schema", "test_faketensor"))


def test_it_is_for_cuda_only() -> None:
    query = torch.zeros(1, 2, 8, device="meta")
    assert kernels.load_triton()
    assert kernels.on_cuda is triton_attention.attend_slots
    assert kernels.kernel_for(query, 1) is None
