"""Compiled, recorded and attended to by a kernel, a block drafter drafts what it drafts step by step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from drafters.formulas import CONFIG, Pair, assert_as_expected
from dspark.drafters.block_step import Step
from dspark.target import native
from dspark.target.captured import Outputs
from dspark.target.direct import Direct
from dspark.types import SamplingParams
from target.tape import TapeRecorder


def assert_equal_drafts(eager: Pair, other: Pair) -> None:
    """Whatever is accepted, joins or leaves."""
    for temperature in (1.0, 0.0):
        for ids in ([0], [0, 1], [1, 2, 3], [3], [3, 4, 1]):
            drafts = []
            for pair in (eager, other):
                requests = [pair.requests.setdefault(i, pair.request(i, 4 + 9 * i)) for i in ids]
                for request in requests:
                    request.params = SamplingParams(temperature=temperature)
                drafts.append(pair.propose(requests))
                for request in requests:
                    pair.commit(request, [5] * (1 + (request.id + len(ids)) % 4))
            assert drafts[0].tokens.tolist() == drafts[1].tokens.tolist()
            torch.testing.assert_close(drafts[0].confidence, drafts[1].confidence)


def test_without_a_compiler_it_drafts_all_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def call(self: Direct, kind: object, **arguments: Any) -> Outputs:
        raise RuntimeError("no C++ compiler found\nand many lines more")

    monkeypatch.setattr(Direct, "__call__", call)
    eager, compiled = Pair(), Pair()
    compiled.drafter.compile()
    assert_equal_drafts(eager, compiled)
    assert caplog.messages == ["the drafter runs uncompiled: no C++ compiler found"]


def test_the_graph_of_one_request_reads_prompts_too_and_never_a_single_position(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is read outside of it costs a draft more than everything else."""
    pair, sizes = Pair(), []

    def graph(step: Step, noise: torch.Tensor) -> Outputs:
        sizes.append(step.news.shape[1])
        return pair.drafter._run(step, noise)

    monkeypatch.setattr(pair.drafter, "_graph", graph)
    request = pair.request(0, 30)
    for tokens in ([5], [5, 7, 8], [6]):
        assert_as_expected(pair, [request], pair.propose([request]))
        pair.commit(request, tokens)
    assert sizes == [29, 2, 3]


@pytest.mark.slow
def test_compiled_equals_eager(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And is compiled once on a machine, though rows are added and get longer."""
    if not native.load():
        pytest.skip("no C++ compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = dataclasses.replace(CONFIG, num_hidden_layers=1)
    before = counters["stats"]["unique_graphs"]
    for _ in ("the first process", "the next"):
        eager, compiled = Pair(config), Pair(config)
        compiled.drafter.compile()
        assert_equal_drafts(eager, compiled)
        compiled.drafter.compile()  # by another engine
        assert_equal_drafts(eager, compiled)
        assert counters["stats"]["unique_graphs"] == before + 2, "one for one request, one for more"


def test_replayed_equals_eager() -> None:
    if not native.load():
        pytest.skip("recordings need a kernel, and this one needs a C++ compiler")
    eager, replayed, tape = Pair(CONFIG), Pair(CONFIG), TapeRecorder()
    replayed.drafter.capture(tape)
    for _ in range(2):
        assert_equal_drafts(eager, replayed)
    assert tape.num_replays > tape.num_recordings > 2
    requests = [replayed.requests[i] for i in (0, 1)]
    first = replayed.propose(requests)
    tokens = first.tokens.clone()
    for request in requests:
        replayed.commit(request, [7, 7])
    assert replayed.propose(requests).tokens.tolist() != tokens.tolist() == first.tokens.tolist()
    for request in requests:
        replayed.commit(request, [5] * 140)
    replayed.propose(requests)  # the rows have grown
    assert [replayed.propose([r]).tokens.tolist() for r in requests] == [[replayed.expected(r)[0]] for r in requests]


def test_drafts_that_cannot_be_recorded_are_made_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    def refuse(run: Callable[[], Outputs]) -> Callable[[], Outputs]:
        raise RuntimeError("operation not permitted\nand much more text")

    pair = Pair(CONFIG)
    pair.drafter.capture(refuse)  # type: ignore[arg-type]
    request = pair.request(0, 9)
    for _ in range(2):
        assert pair.propose([request]).tokens.tolist() == [pair.expected(request)[0]]
        pair.commit(request, [5])
    assert [r.message for r in caplog.records] == ["drafts for 1 requests run unrecorded: operation not permitted"]


def test_the_kernel_for_cpu_attends_as_torch_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests of different lengths, and rows that are not the first ones."""
    if not native.load():
        pytest.skip("no C++ compiler")
    kernel, drafts = native.attend_slots, []
    for attend in (kernel, None):
        monkeypatch.setattr(native, "attend_slots", attend)
        pair = Pair(CONFIG)
        requests = [pair.request(i, 4 + 9 * i) for i in range(3)]
        drafts.append([pair.propose(asked) for asked in (requests, requests[1:], requests[2:])])
    for ours, theirs in zip(*drafts, strict=True):
        assert ours.tokens.tolist() == theirs.tokens.tolist()
        torch.testing.assert_close(ours.confidence, theirs.confidence)
