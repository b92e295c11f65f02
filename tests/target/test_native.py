"""The C++ kernels against torch: attention, also against itself in other company, and noise, bit for bit."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from dspark import noise
from dspark.target import attention, native
from dspark.target.plan import Group, Visibility

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")

HEADS, KV_HEADS = 6, 2
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.fixture(autouse=True)
def kernel() -> Iterator[None]:
    before = native.attend_slots
    assert native.load()
    native.attend_slots = torch.ops.dspark.attend_slots
    yield
    native.attend_slots = before


class Case:
    """Spans of `sizes` tokens after `starts` cached ones, with keys and values in random slots; unused slots are NaN."""

    def __init__(
        self,
        starts: list[int],
        sizes: list[int],
        dtype: torch.dtype,
        width: int = 64,
        value_width: int = 64,
        trees: bool = False,
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
        positions = torch.tensor(starts)[:, None] + torch.where(is_real, depth, 0)
        visibility = Visibility(torch.tensor(starts), positions, inside, max(num_keys))
        self.group = Group(slots, visibility, rows, is_real.flatten().nonzero()[:, 0])

    def run(self, **options: object) -> Tensor:
        defaults = {"scaling": 0.11, "window": None, "softcap": None, "sinks": None} | options
        self.group.masks.clear()
        return attention._attend_group(self.queries, self.keys, self.values, self.group, **defaults)  # type: ignore[arg-type]

    def run_in_torch(self, **options: object) -> Tensor:
        built, native.attend_slots = native.attend_slots, None
        try:
            return self.run(**options)
        finally:
            native.attend_slots = built


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("trees", [False, True])
@pytest.mark.parametrize(("starts", "sizes"), [([0], [1]), ([90], [8]), ([130, 0, 63, 5], [1, 8, 3, 12])])
def test_kernel_equals_torch(dtype: torch.dtype, trees: bool, starts: list[int], sizes: list[int]) -> None:
    case = Case(starts, sizes, dtype, trees=trees)
    torch.testing.assert_close(case.run(), case.run_in_torch(), rtol=0, atol=TOLERANCE[dtype])


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
def test_windows_softcaps_and_sinks(options: dict[str, object], trees: bool) -> None:
    case = Case([150, 2, 64], [5, 9, 1], torch.float32, trees=trees)
    torch.testing.assert_close(case.run(**options), case.run_in_torch(**options), rtol=0, atol=2e-5)


def test_widths_that_are_no_multiple_of_a_register_and_differ() -> None:
    case = Case([20, 3], [2, 7], torch.float32, width=24, value_width=41)
    torch.testing.assert_close(case.run(), case.run_in_torch(), rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_token_gets_the_same_bits_alone_and_in_company(dtype: torch.dtype) -> None:
    together = Case([100, 7, 33], [1, 6, 8], dtype)
    whole = together.run()
    group, seen = together.group, together.group.visibility
    for b, size in enumerate([1, 6, 8]):
        rows = group.rows[b, :size]  # type: ignore[index]
        for n in range(size):  # the span's first n + 1 tokens only, by themselves
            num_keys = int(seen.starts[b]) + n + 1
            part = Visibility(seen.starts[b : b + 1], seen.positions[b : b + 1, : n + 1], None, num_keys)
            alone = Group(group.slots[b : b + 1, :num_keys].contiguous(), part, rows[None, : n + 1].contiguous())
            got = attention._attend_group(
                together.queries, together.keys, together.values, alone, 0.11, None, None, None
            )
            assert torch.equal(got[n], whole[rows[n]])


def test_a_missing_compiler_is_said_and_torch_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    native.load.cache_clear()
    native.attend_slots = None
    assert not native.load()
    assert "no-such-compiler" in caplog.text
    native.load.cache_clear()
    case = Case([4], [2], torch.float32)
    assert case.run().isfinite().all()


@pytest.mark.parametrize("vocab_size", [1, 5, 64, 1000])
def test_noise_has_the_same_bits_as_without_the_kernel(vocab_size, monkeypatch):
    for seed, position, stream in ((0, 0, 0), (2**63 - 1, 2**20 + 3, 2), (12345, 7, 1)):
        rows = []
        for kernel in (torch.ops.dspark.keyed_uniform, None):
            monkeypatch.setattr(noise, "keyed_uniform", kernel)
            rows.append(noise.gumbel(seed, position, 6, vocab_size, stream, torch.device("cpu")))
        assert torch.equal(*rows)
