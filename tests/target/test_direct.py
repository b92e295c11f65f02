"""A graph that is called directly gives what torch.compile gives, or is not called directly."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import Tensor

from dspark.target.direct import Direct

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on CPU needs a C++ compiler")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_inputs_are_found_wherever_they_lie_and_sizes_may_change():
    def step(x: Tensor, pairs: list[tuple[Tensor, Tensor]], nothing: Tensor | None) -> tuple[Tensor, Tensor, None]:
        first, second = pairs[1]
        return first * x.shape[0] + pairs[0][0], second + x.sum(), None

    graph = Direct(step, "step_of_pairs")
    for number, size in enumerate((5, 3, 9)):
        x, pairs = torch.randn(size), [(torch.randn(4), torch.randn(2)), (torch.randn(4), torch.randn(2))]
        if number == 0:
            torch._dynamo.mark_dynamic(x, 0)
        found = graph(x=x, pairs=pairs, nothing=None)
        assert graph.is_direct
        for output, expected in zip(found, step(x, pairs, None), strict=True):
            assert output is expected if expected is None else torch.allclose(output, expected)


def test_who_writes_something_else_each_time_goes_the_usual_way():
    def count(total: Tensor) -> tuple[Tensor]:
        total += 1
        return (total.clone(),)

    graph, total = Direct(count, "count"), torch.zeros(1)
    graph(total=total)
    assert not graph.is_direct
    before = float(total)
    assert float(graph(total=total)[0]) == before + 1


def test_another_graph_is_asked_for():
    """Sizes that were not to change do: built anew it is compiled again, and direct again."""

    def double(x: Tensor) -> tuple[Tensor]:
        return (x * 2 * x.shape[0],)

    graph = Direct(double, "double")
    with torch._dynamo.config.patch(assume_static_by_default=True, automatic_dynamic_shapes=False):
        for size in (4, 7):
            x = torch.randn(size)
            assert torch.equal(graph(size, x=x)[0], x * 2 * size) and graph.is_direct
            assert torch.equal(graph(size, x=x)[0], x * 2 * size)


def test_what_is_no_argument_is_found_the_usual_way():
    weight = torch.randn(3)

    def weigh(x: Tensor) -> tuple[Tensor]:
        return (x * weight,)

    graph = Direct(weigh, "weigh")
    for x in (torch.randn(3), torch.randn(3)):
        assert torch.equal(graph(x=x)[0], x * weight)
    assert not graph.is_direct


def test_a_kind_has_the_graph_that_the_compiler_took_for_it():
    """And not the newest one, which here gives the same by chance and then reads what is not there."""

    def amount(x: Tensor) -> tuple[Tensor]:
        return (torch.stack([x.sum(), x.max()]),)

    graph = Direct(amount, "amount")
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False):
        for kind, size in enumerate((4, 7, 4)):
            graph(kind, x=torch.zeros(16)[:size])
        assert graph.is_direct
        for kind, size in enumerate((4, 7, 4)):
            assert graph(kind, x=torch.ones(16)[:size])[0].tolist() == [size, 1]


def test_what_goes_the_usual_way_runs_once_a_call():
    def count(total: Tensor) -> tuple[Tensor]:
        total += 1
        return (total.clone(),)

    graph, total = Direct(count, "count"), torch.zeros(1)
    graph(total=total)
    before = float(total)
    for _ in range(3):
        graph(total=total)
    assert float(total) == before + 3
