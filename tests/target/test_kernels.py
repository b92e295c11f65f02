"""The attention kernels against the torch form of the same attention, and against themselves in other company.

Triton's runs in its interpreter where there is no GPU.
"""

from __future__ import annotations

import importlib.util
import math
import shutil
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

from dspark.target import attention, kernels, native
from dspark.target.plan import Group, Visibility

HEADS, KV_HEADS = 6, 2
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def load(name: str) -> kernels.AttendSlots:
    if name == "c++":
        if shutil.which("g++") is None:
            pytest.skip("needs a C++ compiler")
        assert native.load()
        return torch.ops.dspark.attend_slots
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton")
    from dspark.target.triton_attention import attend_slots

    return attend_slots


class Kernel:
    """One of them, by name, and what it runs on."""

    def __init__(self, name: str) -> None:
        self.attend_slots = load(name)
        self.device = "cuda" if name == "triton" and torch.cuda.is_available() else "cpu"
        self.dtypes = kernels.IN_TRITON if name == "triton" else tuple(TOLERANCE)


@pytest.fixture(params=["c++", "c++ in the other way", "triton"])
def kernel(request: pytest.FixtureRequest) -> Iterator[Kernel]:
    """Where the processor multiplies pairs of bfloat16, the C++ kernel may do so or not."""
    name, *other = request.param.split(" ", 1)
    kernel = Kernel(name)
    if not other:
        yield kernel
        return
    if native.small_linear is None:
        pytest.skip("a processor without bfloat16 dot products")
    usual = torch.ops.dspark.multiply_in_pairs(True)
    torch.ops.dspark.multiply_in_pairs(not usual)
    yield kernel
    torch.ops.dspark.multiply_in_pairs(usual)


class Case:
    """Spans of `sizes` tokens after `starts` cached ones, with keys and values in random slots; unused slots are NaN.

    hidden: between the first three cached tokens and the others so many are left out.
    """

    def __init__(
        self,
        starts: list[int],
        sizes: list[int],
        dtype: torch.dtype,
        width: int = 64,
        value_width: int = 64,
        trees: bool = False,
        is_block: bool = False,
        hidden: list[int] | None = None,
    ) -> None:
        generator = torch.Generator().manual_seed(sum(starts) + 31 * sum(sizes))
        batch, num_queries = len(starts), max(sizes)
        num_keys = [start + size for start, size in zip(starts, sizes, strict=True)]
        total = sum(num_keys)
        places = torch.randperm(2 * total, generator=generator)[:total].split(num_keys)
        self.keys = torch.full((2 * total, KV_HEADS, width), math.nan, dtype=dtype)
        self.values = torch.full((2 * total, KV_HEADS, value_width), math.nan, dtype=dtype)
        for used in places:
            self.keys[used] = torch.randn(len(used), KV_HEADS, width, generator=generator).to(dtype)
            self.values[used] = torch.randn(len(used), KV_HEADS, value_width, generator=generator).to(dtype)
        padded = [
            torch.cat([own, own[start].repeat(max(num_keys) - len(own))])
            for own, start in zip(places, starts, strict=True)
        ]
        slots = torch.stack(padded)
        self.queries = torch.randn(sum(sizes), HEADS, width, generator=generator).to(dtype)
        offsets = torch.tensor([0, *sizes]).cumsum(0)[:-1]
        steps = torch.arange(num_queries)
        is_real = steps < torch.tensor(sizes)[:, None]
        rows = offsets[:, None] + torch.where(is_real, steps, 0)
        inside, depth = None, steps.expand(batch, -1)
        if trees:  # two branches from the first token
            inside = torch.zeros(batch, num_queries, num_queries, dtype=torch.bool)
            inside[:, :, 0] = True
            for i in range(num_queries):
                for j in range(i % 2, i + 1, 2):
                    inside[:, i, j] = i > 0 and (j > 0)
                inside[:, i, i] = True
            depth = ((steps + 1) // 2).expand(batch, -1)
        if is_block:
            inside = torch.ones(batch, num_queries, num_queries, dtype=torch.bool) & is_real[:, None]
        positions = torch.tensor(starts)[:, None] + torch.where(is_real, depth, 0)
        firsts = None
        if hidden is not None:
            positions, firsts = positions + torch.tensor(hidden)[:, None], torch.full((batch,), 3)
        visibility = Visibility(torch.tensor(starts), positions, inside, max(num_keys), firsts)
        self.group = Group(slots, visibility, rows, is_real.flatten().nonzero()[:, 0])

    def run(self, kernel: Kernel, **options: object) -> Tensor:
        """[T, H, Dv] on CPU."""
        if self.queries.dtype not in kernel.dtypes:
            pytest.skip("a kernel for smaller numbers")
        return attend(kernel, self.queries, self.keys, self.values, self.group, **options)

    def run_in_torch(self, **options: object) -> Tensor:
        """The same in double precision."""
        doubles = (x.double() for x in (self.queries, self.keys, self.values))
        return attend(None, *doubles, self.group, **options)

    def assert_equal(self, kernel: Kernel, **options: object) -> None:
        got = self.run(kernel, **options).double()
        torch.testing.assert_close(got, self.run_in_torch(**options), rtol=0, atol=TOLERANCE[self.queries.dtype])


def attend(
    kernel: Kernel | None, queries: Tensor, keys: Tensor, values: Tensor, group: Group, **options: object
) -> Tensor:
    every = {"scaling": 0.11, "window": None, "softcap": None, "sinks": None} | options
    group.masks.clear()
    device = "cpu" if kernel is None else kernel.device
    seen = {f.name: getattr(group.visibility, f.name) for f in fields(Visibility)}
    parts = {f.name: getattr(group, f.name) for f in fields(Group)} | {"visibility": Visibility(**moved(seen, device))}
    tensors = (x.to(device) for x in (queries, keys, values))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "kernel_for", lambda *_: kernel and kernel.attend_slots)
        return attention._attend_group(*tensors, Group(**moved(parts, device)), **moved(every, device)).cpu()


def moved(values: dict[str, Any], device: str) -> dict[str, Any]:
    return {name: x.to(device) if isinstance(x, Tensor) else x for name, x in values.items()}


RAGGED = ([130, 0, 63, 5], [1, 5, 3, 9])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("trees", [False, True])
@pytest.mark.parametrize(("starts", "sizes"), [([0], [1]), ([90], [8]), RAGGED])
def test_a_kernel_equals_torch(
    kernel: Kernel, dtype: torch.dtype, trees: bool, starts: list[int], sizes: list[int]
) -> None:
    Case(starts, sizes, dtype, trees=trees).assert_equal(kernel)


@pytest.mark.parametrize("kernel", ["c++", "c++ in the other way"], indirect=True)
def test_in_c_bfloat16_is_rounded_once(kernel: Kernel) -> None:
    case = Case([90], [8], torch.bfloat16)
    is_same = case.run(kernel) == case.run_in_torch().bfloat16()
    assert is_same.float().mean() > 0.99  # a sum next to where it is rounded may fall on either side


@pytest.mark.parametrize("trees", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"window": 1},
        {"window": 37},
        {"softcap": 0.7},
        {"sinks": torch.linspace(-2, 4, HEADS)},
        {"window": 70, "softcap": 1.5, "sinks": torch.linspace(-1, 1, HEADS)},
    ],
)
def test_windows_softcaps_and_sinks(kernel: Kernel, options: dict[str, object], trees: bool) -> None:
    Case([150, 2, 64], [5, 9, 1], torch.float32, trees=trees).assert_equal(kernel, **options)


@pytest.mark.parametrize("window", [5, 37, 75])
@pytest.mark.parametrize("trees", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_windows_count_what_a_view_leaves_out(kernel: Kernel, dtype: torch.dtype, trees: bool, window: int) -> None:
    case = Case([150, 3, 64, 9], [5, 9, 1, 2], dtype, trees=trees, hidden=[30, 70, 0, 1])
    case.assert_equal(kernel, window=window)


def test_blocks_see_themselves_whole(kernel: Kernel) -> None:
    case = Case([70, 3], [8, 5], torch.float32, is_block=True)
    case.assert_equal(kernel)
    assert case.group.visibility.inside is not None and case.group.visibility.inside[0].all()


def test_widths_that_are_no_multiple_of_a_register_and_differ(kernel: Kernel) -> None:
    Case([20, 3], [2, 7], torch.float32, width=24, value_width=41).assert_equal(kernel)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_token_gets_the_same_bits_alone_and_in_company(kernel: Kernel, dtype: torch.dtype) -> None:
    together = Case([290, 7, 33], [1, 4, 5], dtype)
    whole = together.run(kernel)
    group, seen = together.group, together.group.visibility
    for b, size in enumerate([1, 4, 5]):
        rows = group.rows[b, :size]  # type: ignore[index]
        for n in {0, size - 1}:  # the span's first n + 1 tokens only, by themselves
            num_keys = int(seen.starts[b]) + n + 1
            part = Visibility(seen.starts[b : b + 1], seen.positions[b : b + 1, : n + 1], None, num_keys)
            alone = Group(group.slots[b : b + 1, :num_keys].contiguous(), part, rows[None, : n + 1].contiguous())
            got = attend(kernel, together.queries, together.keys, together.values, alone)
            assert torch.equal(got[n], whole[rows[n]])
