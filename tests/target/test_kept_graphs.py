"""Graphs on disk: found again by who would compile the same, and by nobody else."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor import compile_fx

from dspark.target import native
from dspark.target.compiled import frozen_weights
from dspark.target.direct import Direct
from dspark.target.kept_graphs import kept_graphs
from dspark.target.linears import with_packed_linears

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on CPU needs a C++ compiler")


def forget() -> None:
    """What the compiler still holds, so that numbers are free as in another process."""
    torch._dynamo.reset()
    gc.collect()


@pytest.fixture(autouse=True)
def shelf(own_graphs: Path) -> Iterator[Path]:
    """Where graphs are kept, with nothing there yet."""
    native.load()
    forget()
    yield own_graphs
    forget()


@pytest.fixture
def num_compiled(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    compile_one, calls = compile_fx.compile_fx, list[int]()

    def count(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        return compile_one(*arguments, **options)

    monkeypatch.setattr(compile_fx, "compile_fx", count)
    return lambda: len(calls)


class Model(nn.Module):
    """Two layers of one input, which are joined, and a weight beside them."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.left, self.right = nn.Linear(16, 8, bias=False), nn.Linear(16, 24)
        self.scale = nn.Parameter(torch.randn(16))
        self.to(torch.bfloat16).requires_grad_(False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x * self.scale
        return self.left(x), self.right(x)


def step_of(model: nn.Module, *facts: object) -> Direct:
    """As the target's and the drafters' are made."""
    packed = with_packed_linears(model)

    def step(x: Tensor, others: list[Tensor]) -> tuple[Any, ...]:
        left, right = packed(x * others[0].shape[0])
        return left, right + others[1], None

    return Direct(step, "a step", kept_graphs({"model": packed}, *facts))


def run(direct: Direct, size: int, width: int = 24) -> tuple[Tensor, Tensor, None]:
    torch.manual_seed(size)
    x, others = torch.randn(size, 16, dtype=torch.bfloat16), [torch.randn(3), torch.randn(width)]
    if not direct.is_direct:
        torch._dynamo.mark_dynamic(x, 0)
    with frozen_weights(torch.device("cpu")), torch.no_grad():
        return direct(x=x, others=others)


def test_it_is_compiled_once_for_all_processes(shelf: Path, num_compiled: Callable[[], int]) -> None:
    model = Model()
    first = step_of(model)
    expected = [run(first, size) for size in (5, 3, 9)]
    assert num_compiled() == 1 and len(list(shelf.iterdir())) == 1
    del first
    forget()
    second = step_of(model)
    for size, outputs in zip((5, 3, 9), expected, strict=True):
        for output, other in zip(run(second, size), outputs, strict=True):
            assert output is other if other is None else torch.equal(output, other)
    assert num_compiled() == 1 and second.is_direct


def test_other_weights_facts_or_sizes_are_another_graph(shelf: Path, num_compiled: Callable[[], int]) -> None:
    model = Model()
    run(step_of(model, "one"), 5)
    for number, (other, fact, width) in enumerate([(model, "two", 24), (Model(seed=1), "one", 24), (model, "one", 1)]):
        forget()
        run(step_of(other, fact), 4, width)
        assert num_compiled() == number + 2 == len(list(shelf.iterdir()))
    forget()
    run(step_of(model, "one"), 7)
    assert num_compiled() == 4


def test_a_size_of_one_is_another_graph_than_larger_ones(shelf: Path, num_compiled: Callable[[], int]) -> None:
    """The compiler takes it for granted even where it was told that the size will change."""
    model = Model()
    one, others = torch.randn(1, 16, dtype=torch.bfloat16), [torch.randn(3), torch.randn(24)]

    def build(direct: Direct, x: Tensor) -> tuple[Any, ...]:
        torch._dynamo.maybe_mark_dynamic(x, 0)
        with frozen_weights(torch.device("cpu")), torch.no_grad():
            return direct.build(x=x, others=others)

    for _ in range(2):  # in the second process both are found, and the numbers are those of the first
        direct = step_of(model)
        for x in (one, torch.cat([one] * 4)):
            found = build(direct, x)
            assert found[0].shape == (len(x), 8) and torch.equal(found[0], found[0][:1].expand(len(x), -1))
        del direct
        forget()
    assert num_compiled() == 2 == len(list(shelf.iterdir()))


def test_what_cannot_be_read_is_made_anew(
    shelf: Path, num_compiled: Callable[[], int], caplog: pytest.LogCaptureFixture
) -> None:
    model = Model()
    expected = run(step_of(model), 5)
    (path,) = shelf.iterdir()
    path.write_bytes(path.read_bytes()[:100])
    forget()
    found = run(step_of(model), 5)
    assert torch.equal(found[0], expected[0]) and num_compiled() == 2
    assert "cannot be read and is made anew" in caplog.text
    assert len(list(shelf.iterdir())) == 1


def test_numbers_that_others_hold_are_not_taken(shelf: Path, num_compiled: Callable[[], int]) -> None:
    model = Model()
    first = step_of(model)
    expected = run(first, 5)
    second = step_of(model)  # the first one's products are still there
    for output, other in zip(run(second, 5), expected, strict=True):
        assert output is other if other is None else torch.equal(output, other)
    assert num_compiled() == (1 if native.small_linear is None else 2)
