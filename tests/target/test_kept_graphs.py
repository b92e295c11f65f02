"""Graphs on disk: found again by who would compile the same, and by nobody else."""

from __future__ import annotations

import copy
import gc
import importlib
import io
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor import compile_fx

from dspark import caches
from dspark.target import native
from dspark.target.compiled import frozen_weights
from dspark.target.direct import Direct
from dspark.target.kept_graphs import KeptGraph, kept_graphs
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


def sum_of_rows(x: Tensor) -> tuple[Tensor]:
    total = x[0] * 0
    for row in range(x.shape[0]):
        total = total + x[row]
    return (total,)


def plus_one(x: Tensor) -> tuple[Tensor]:
    return (x + 1,)


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
            return direct(len(x), x=x, others=others)

    for _ in range(2):  # in the second process both are found, and the numbers are those of the first
        direct = step_of(model)
        for x in (one, torch.cat([one] * 4)):
            found = build(direct, x)
            assert found[0].shape == (len(x), 8) and torch.equal(found[0], found[0][:1].expand(len(x), -1))
        del direct
        forget()
    assert num_compiled() == 2 == len(list(shelf.iterdir()))


def rewritten(path: Path, **changes: Any) -> None:
    content = torch.load(io.BytesIO(caches.read(path)), weights_only=True)
    changed = io.BytesIO()
    torch.save({**content, **changes}, changed)
    caches.write(path, changed.getvalue(), 1 << 30)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_bytes(path.read_bytes()[:100]),
        lambda path: rewritten(path, source="raise OSError('no machine code can be kept')"),
        lambda path: rewritten(path, joined=[([1, 2], 3)]),
    ],
    ids=["cut", "raises", "numbers"],
)
def test_what_cannot_be_had_is_made_anew(
    spoil: Callable[[Path], None], shelf: Path, num_compiled: Callable[[], int], caplog: pytest.LogCaptureFixture
) -> None:
    model = Model()
    expected = run(step_of(model), 5)
    (path,) = shelf.iterdir()
    spoil(path)
    forget()
    found = run(step_of(model), 5)
    assert torch.equal(found[0], expected[0]) and num_compiled() == 2
    forget()
    assert torch.equal(run(step_of(model), 5)[0], expected[0]) and num_compiled() == 2
    assert len(list(shelf.iterdir())) == 1 == sum("is made anew" in message for message in caplog.messages)


def test_what_cannot_be_kept_is_said_once(
    shelf: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def write(*_: object) -> None:
        raise OSError("read-only file system")

    monkeypatch.setattr(caches, "write", write)
    kept = kept_graphs({"model": Model()})
    assert kept is not None
    for name in ("one", "two"):
        kept.keep(name, {}, STAND_IN)
        assert kept.find(name, {}) is None
    assert caplog.messages == ["compiled graphs cannot be kept: read-only file system"]


STAND_IN = KeptGraph("", [], [], 0, [], {})


def is_found(model: nn.Module) -> bool:
    """Whether there is a graph of this model, one of which is kept where not."""
    kept = kept_graphs({"model": model})
    assert kept is not None
    found = kept.find("a step", {}) is not None
    kept.keep("a step", {}, STAND_IN)
    return found


def test_settings_of_modules_are_other_graphs() -> None:
    model = Model()
    assert [is_found(model), is_found(model)] == [False, True]
    model.factor = 0.5
    assert [is_found(model), is_found(model)] == [False, True]
    model.table = torch.zeros(3)
    assert [is_found(model), is_found(model)] == [False, True]
    model.table[1] = 1
    assert not is_found(model)


def test_the_environment_is_in_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Vectors of another width, say, would read past what the text was written for."""
    model = Model()
    is_found(model)
    with torch._inductor.config.patch({"cpp.simdlen": 256}):
        assert not is_found(model)
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    assert [is_found(model), is_found(model)] == [False, True]


def test_code_that_came_with_a_model_is_in_the_key_with_what_lies_beside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_helpers.py").write_text("FACTOR = 2\n")
    (tmp_path / "own_model.py").write_text("import torch\nclass Own(torch.nn.Linear): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    model = importlib.import_module("own_model").Own(2, 2)
    assert [is_found(model), is_found(model)] == [False, True]
    (tmp_path / "own_helpers.py").write_text("FACTOR = 3\n")
    assert not is_found(model)


def test_what_is_hooked_or_patched_is_not_kept() -> None:
    hooked, patched = Model(), Model()
    hooked.left.register_forward_hook(lambda _module, _arguments, output: output * 2)
    patched.left.forward = patched.right.forward  # type: ignore[method-assign]
    assert kept_graphs({"model": hooked}) is None and kept_graphs({"model": patched}) is None


@pytest.mark.parametrize(
    ("function", "inputs"),
    [
        (sum_of_rows, [torch.ones(8, 4)[:n] for n in (5, 3)]),
        (plus_one, [torch.arange(12.0).view(4, 3).t(), torch.arange(24.0).view(3, 8)[:, ::2]]),
    ],
)
def test_what_a_graph_takes_for_granted_is_asked(function: Any, inputs: list[Tensor]) -> None:
    """A size that was to change but is counted by a loop, and strides."""
    for x in inputs:
        forget()
        torch._dynamo.maybe_mark_dynamic(x, 0)
        direct = Direct(function, "a step", kept_graphs({"model": Model()}))
        with frozen_weights(torch.device("cpu")), torch.no_grad():
            assert torch.equal(direct(x=x)[0], function(x)[0])


def test_numbers_that_others_hold_are_not_taken(shelf: Path, num_compiled: Callable[[], int]) -> None:
    model = Model()
    first = step_of(model)
    expected = run(first, 5)
    second, third = step_of(model), step_of(copy.deepcopy(model))  # the first one's products are still there
    for own, expected_compiled in ((second, 1), (third, 1 if native.small_linear is None else 2)):
        for output, other in zip(run(own, 5), expected, strict=True):
            assert output is other if other is None else torch.equal(output, other)
        assert num_compiled() == expected_compiled
