"""The compiled forward gives what the eager one gives, and is compiled once however requests come and go."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor import compile_fx

from dspark.target import Target, native
from dspark.target.plan import View
from dspark.types import Span
from target.tape import RunAgain

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on CPU needs a C++ compiler")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def trace(monkeypatch: pytest.MonkeyPatch, generated: int) -> list[torch.fx.GraphModule]:
    """The graphs in the order in which they are compiled. Code is generated for this one alone: it takes most of the time.
    The others run as they were traced."""
    generate, graphs = compile_fx.compile_fx, list[torch.fx.GraphModule]()

    def compile_traced(graph: torch.fx.GraphModule, examples: Sequence[Any], **options: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return generate(graph, examples, **options) if len(graphs) == generated else graph.forward

    monkeypatch.setattr(compile_fx, "compile_fx", compile_traced)
    return graphs


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """With code for many requests, whose sizes change most."""
    return trace(monkeypatch, generated=3)


@pytest.fixture
def two_threads() -> Iterator[None]:
    usual = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(usual)


def fixed_sizes(graph: torch.fx.GraphModule) -> dict[str, list[int]]:
    """By input, keys and values aside, the sizes that the graph takes for granted: called directly, nobody checks them."""
    inputs = {n.name: n.meta["example_value"] for n in graph.graph.nodes if n.op == "placeholder"}
    fixed = {
        name.removeprefix("l_").rstrip("_"): [size for size in value.shape if isinstance(size, int)]
        for name, value in inputs.items()
        if isinstance(value, torch.Tensor) and "pairs" not in name
    }
    return {name: sizes for name, sizes in fixed.items() if sizes}


def read_and_drop(target: Target, spans: list[Span], layers: tuple[int, ...]) -> torch.Tensor:
    logits = target.extend(spans, layers).logits
    for span in spans:
        target.keep(span.request_id, span.start, ())
    return logits


def test_steady_state_compiles_nothing(
    make_pair: Callable[..., Any], traced: list[torch.fx.GraphModule], monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = make_pair("mistral", num_slots=3000, num_hidden_layers=1)
    target, layers = pair.target, (0, -1)
    assert target.compile(layers)
    assert counters["stats"]["unique_graphs"] == 3
    of_one_request = {name: [1] for name in ("slots", "starts", "queries", "inside", "firsts")}
    assert fixed_sizes(traced[1]) == of_one_request and fixed_sizes(traced[2]) == {}
    run_eagerly, eagerly = target._eager, list[torch.Tensor]()

    def note(token_ids: torch.Tensor, *others: Any, **options: Any) -> Any:
        if options["feature_layers"] in (layers, ()):
            eagerly.append(token_ids)
        return run_eagerly(token_ids, *others, **options)

    monkeypatch.setattr(target, "_eager", note)
    rng = random.Random(0)
    texts = {request: [rng.randrange(3, 97) for _ in range(250)] for request in range(9)}
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(30):
            running = [request for request in texts if target.cache.length(request) < 220]
            spans = []
            for request in rng.sample(running, rng.choice((1, 1, 2, 5, 9)) if len(running) > 8 else 1):
                start, size = target.cache.length(request), rng.choice((1, 1, 2, 7, 16, 40))
                num_logits = rng.randint(0, size)
                spans.append(Span(request, start, texts[request][start : start + size], num_logits=num_logits))
            found = target.extend(spans, layers)
            rows = found.logits.split([span.num_logits for span in spans])
            for span, piece in zip(spans, rows, strict=True):
                end = span.start + len(span.tokens)
                expected = pair.logits(texts[span.request_id][:end])[end - span.num_logits :]
                torch.testing.assert_close(piece, expected, atol=2e-5, rtol=0)
                target.keep(span.request_id, span.start, range(rng.randint(1, len(span.tokens))))
            assert found.features.shape == (sum(len(span.tokens) for span in spans), 64)
            held = target.cache.request_ids[: 1 + step % 3]
            spans = [Span(request, target.cache.length(request), (5,), num_logits=1) for request in held]
            seeing = target.seeing(View(3, 4))  # through the same graphs
            compiled, eager = (read_and_drop(seeing, spans, features) for features in (layers, (0,)))
            torch.testing.assert_close(compiled, eager, atol=2e-5, rtol=0)
            # Who wants no features takes the same graphs.
            without = target.extend([Span(88, 0, texts[0][:20], num_logits=1)])
            target.release(88)
            assert without.features is None
            torch.testing.assert_close(without.logits, pair.logits(texts[0][:20])[-1:], atol=2e-5, rtol=0)
            if step == 5:  # the cache grows
                target.cache.reserve(55, 1500)
                target.release(55)
            if step == 10:  # a tree, and the same tree eagerly
                span = Span(77, 0, (5, 6, 7, 8), parents=(-1, 0, 0, 2), num_logits=4)
                compiled = target.extend([span], layers)
                target.release(77)
                eager = target.extend([span], (0,))
                target.release(77)
                torch.testing.assert_close(compiled.logits, eager.logits, atol=2e-5, rtol=0)
                torch.testing.assert_close(compiled.features[:, :32], eager.features, atol=2e-5, rtol=0)
            target.cache.check()
        assert all(len(token_ids) == 1 for token_ids in eagerly)  # the first of a text; long spans are read in pieces
        target.capture(RunAgain(), layers)  # as on CUDA: the same graphs over padded inputs
        for request in target.cache.request_ids:
            target.release(request)
        for sizes in ((5,), (1,), (3,), (2, 7, 1), (1, 1)):
            spans = [
                Span(r, target.cache.length(r), texts[r][target.cache.length(r) :][:n], num_logits=n)
                for r, n in enumerate(sizes)
            ]
            found = target.extend(spans, layers).logits.split(list(sizes))
            for span, piece in zip(spans, found, strict=True):
                end = span.start + len(span.tokens)
                expected = pair.logits(texts[span.request_id][:end])[span.start :]
                torch.testing.assert_close(piece, expected, atol=2e-5, rtol=0)
    assert counters["stats"]["unique_graphs"] == 3


def test_without_a_compiler_it_runs_eagerly(
    make_pair: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("No working C++ compiler found\nand much more text")

    target = make_pair("llama").target
    monkeypatch.setattr(torch, "compile", fail)
    assert not target.compile()
    assert [record.message for record in caplog.records] == ["llama runs uncompiled: No working C++ compiler found"]
    assert not target.cache.request_ids
    assert target.extend([Span(1, 0, (5,), num_logits=1)]).logits.shape == (1, 97)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.skipif(not native.load() or native.small_linear is None, reason="no kernel of our own for linear layers")
def test_threads_share_the_reading_of_prompts(make_pair: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = trace(monkeypatch, generated=4)
    model = make_pair("mistral", num_hidden_layers=1, max_position_embeddings=512).plain.to(torch.bfloat16)
    target, uncompiled = Target(model, name="compiled"), Target(model, name="uncompiled")
    for each in (target, uncompiled):
        each.resize(3000)
    assert target.compile((0,))
    assert len(graphs) == 4 and fixed_sizes(graphs[3]) == {}
    written = target._compiled[(0,)]._graphs["prompts"]._ran
    assert written is not None and "omp parallel" in written.source
    rng = random.Random(0)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for sizes in ((128,), (130, 1), (300, 40, 1), (511, 16, 16, 1)):
            texts = [[rng.randrange(3, 97) for _ in range(size)] for size in sizes]
            spans = [Span(n, 0, text, num_logits=1) for n, text in enumerate(texts)]
            found, expected = target.extend(spans, (0,)), uncompiled.extend(spans, (0,))
            # bfloat16 is rounded in other places; a number of another token would be off by about one.
            torch.testing.assert_close(found.logits, expected.logits.float(), atol=0.15, rtol=2**-6)
            torch.testing.assert_close(found.features, expected.features, atol=0.15, rtol=2**-6)
            for span in spans:
                target.release(span.request_id)
                uncompiled.release(span.request_id)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(("num_slots", "dtype"), [(280, torch.bfloat16), (3000, torch.float32)])
def test_prompts_have_no_graph_where_it_would_not_fit_or_take_weights_of_its_own(
    make_pair: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, num_slots: int, dtype: torch.dtype
) -> None:
    graphs = trace(monkeypatch, generated=0)
    target = Target(
        make_pair("mistral", num_hidden_layers=1, max_position_embeddings=512).plain.to(dtype), name="small"
    )
    target.resize(num_slots)
    assert target.compile() and len(graphs) == 3
    target.extend([Span(0, 0, (5,) * 250, num_logits=1)])
    assert len(graphs) == 3
