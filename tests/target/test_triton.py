"""What is the Triton kernel's own: long spans, many splits, its place in compiled graphs. The rest is in test_kernels.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from target.test_kernels import Case, Kernel

pytest.importorskip("triton")

import triton
from triton.errors import TritonError

from dspark.target import kernels, tilings, triton_attention
from dspark.target.tilings import Geometry, Shape, Tiling
from dspark.target.triton_tuning import attention_of


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
    assert triton_attention.tiling_for(23, 32) is tilings.LONG_SPANS
    case.assert_equal(kernel, window=window)


@pytest.mark.parametrize("shape", [Shape(1, 1, 100), Shape(2, 8, 40), Shape(1, 17, 24)])
def test_tilings_differ_in_speed_only(kernel: Kernel, shape: Shape) -> None:
    call = attention_of(Geometry(2, 1, 16, 24, "float32"), shape, torch.device(kernel.device))
    expected = call(Tiling(16, 64, 256))
    assert expected.shape == (shape.requests * shape.queries, 2, 24) and expected.std() > 0.05
    for tiling in (Tiling(32, 16, 32, num_warps=8), Tiling(64, 128, 0, num_stages=4)):
        torch.testing.assert_close(call(tiling), expected, atol=2e-6, rtol=0)


def test_what_is_known_to_be_fast_is_taken_unless_the_order_is_fixed(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, taken = Case([40, 7], [2, 2], torch.float32, width=16, value_width=16), []
    fast = Tiling(16, 16, 32)
    monkeypatch.setattr(tilings, "known", {Geometry(6, 2, 16, 16, "float32"): {Shape(1, 1, 512): fast}})
    attend_in = triton_attention.attend_in
    monkeypatch.setattr(triton_attention, "attend_in", lambda t, *rest: taken.append(t) or attend_in(t, *rest))
    assert kernels.load_triton(torch.device(kernel.device))
    for attend_slots in (kernels.tuned_on_cuda, kernels.on_cuda):
        kernel.attend_slots = attend_slots
        case.assert_equal(kernel)
    assert taken == [fast, tilings.SHORT_SPANS]


def test_tuning_tries_tilings_and_keeps_the_fastest_that_fits(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shapes, tried = (Shape(1, 1, 32), Shape(1, 2, 32)), []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tilings, "SHAPES", shapes)
    monkeypatch.setattr(tilings, "_CHOICES", {"rows": (16, 32), "keys": (32, 128)})
    monkeypatch.setattr(tilings, "known", {})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a card")

    def clock(call: Any, **_: Any) -> float:
        """Large tiles are fast, if there is room for them."""
        (tiling,) = call.args
        tried.append(tiling)
        if tiling.keys > 64:
            raise TritonError("out of resource: shared memory")
        assert call().isfinite().all()
        return 1.0 / tiling.rows / tiling.keys

    monkeypatch.setattr(triton.testing, "do_bench", clock)
    layers = [(torch.zeros(2, 1, 16, device=kernel.device), torch.zeros(2, 1, 16, device=kernel.device))] * 2
    kernels.tune(2, layers)
    fastest = replace(tilings.SHORT_SPANS, rows=32)
    assert tilings.known == {Geometry(2, 1, 16, 16, "float32"): dict.fromkeys(shapes, fastest)}
    assert len(tried) == 2 * 4  # of each shape, and nothing for the second layer, which is like the first
    assert [path.suffix for path in tmp_path.rglob("*.*")] == [".json"]


def test_compilers_know_its_shape_without_running_it(kernel: Kernel) -> None:
    case = Case([5, 2], [1, 2], torch.float32, width=16, value_width=24)
    seen, group = case.group.visibility, case.group
    places = (group.slots, seen.starts, seen.positions, seen.inside, group.rows, group.back)
    arguments = (case.queries, case.keys, case.values, *places, 0.1, 0, 0.0, None)
    arguments = tuple(x.to(kernel.device) if isinstance(x, torch.Tensor) else x for x in arguments)
    torch.library.opcheck(kernel.attend_slots, arguments, test_utils=("test_schema", "test_faketensor"))


def test_it_is_for_cuda_only() -> None:
    query = torch.zeros(1, 2, 8, device="meta")
    assert kernels.load_triton(torch.device("cpu"))
    assert kernels.on_cuda is triton_attention.attend_slots
    assert kernels.kernel_for(query, 1) is None
