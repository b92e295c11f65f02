"""On a device the engine writes the same, mixes no devices, and waits only where the host must know: tests/pretend_cuda.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dspark import sampling
from dspark.drafters.loading import load_drafter
from dspark.engine.engine import Engine
from dspark.target import Target, kernels
from dspark.target.loading import load_target
from dspark.types import SamplingParams, Span
from pretend_cuda import DEVICE, Ledger, pretend_cuda
from target.tape import RunAgain

PROMPTS = [[*range(5, 24)], [30, 31], [40, 41, 42, 43, 44, 45], [7] * 9, [50, 60, 70], [*range(80, 90)]]


class EveryOther:
    """A grammar: even and odd token ids take turns."""

    text = "every other"

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def matcher(self) -> EveryOther:
        return self

    def allowed(self, tokens: Any) -> Tensor:
        return torch.arange(self.vocab_size) % 2 == len(tokens) % 2


@pytest.fixture(scope="module")
def target() -> Target:
    return load_target("tiny", dtype="float32", device="cpu", check=False)


@pytest.fixture(scope="module")
def ledger() -> Iterator[Ledger]:
    with pytest.MonkeyPatch.context() as patch, pretend_cuda(patch) as ledger:
        for part in (kernels, sampling):
            patch.setattr(part, "runs_triton", lambda device: False)
        yield ledger


@pytest.fixture(scope="module")
def there(ledger: Ledger) -> Target:
    return load_target("tiny", dtype="float32", device=DEVICE, check=False)


def all_params(target: Target) -> list[SamplingParams]:
    ways: list[dict[str, Any]] = [
        dict(temperature=0.0, logprobs=2),
        dict(temperature=1.0),
        dict(temperature=0.9, top_k=20, top_p=0.9, min_p=0.02),
        dict(temperature=0.8, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.3),
        dict(logit_bias={3: 2.0, 5: -4.0}),
        dict(temperature=0.7, grammar=EveryOther(target.vocab_size)),
    ]
    return [SamplingParams(**way, max_tokens=6, seed=i, ignore_eos=True) for i, way in enumerate(ways)]


def texts(target: Target, drafter: str, rule: str, options: dict[str, Any]) -> tuple[list[list[int]], int]:
    """Of requests that differ in every parameter, and how often one had to make room for the others."""
    records: list[Any] = []
    engine = Engine(
        target,
        load_drafter(drafter, target, **options),
        "fixed:4",
        rule,
        max_num_batched_tokens=16,
        num_slots=52,
        prefix_tokens=32,
        observers=[records.append],
    )
    generations = engine.generate(PROMPTS, all_params(target))
    return [g.token_ids for g in generations], sum(record.num_preempted for record in records)


@pytest.fixture(scope="module")
def plain(target: Target) -> list[list[int]]:
    return texts(target, "none", "coupled", {})[0]


@pytest.mark.parametrize(
    ("drafter", "options"),
    [
        ("dspark", {}),
        ("dspark", dict(tree=6, width=2)),
        ("eagle3", dict(window=8, length=3)),
    ],
)
def test_texts_are_those_of_the_cpu(
    plain: list[list[int]], there: Target, drafter: str, options: dict[str, Any]
) -> None:
    found, num_preempted = texts(there, drafter, "coupled", options)
    assert found == plain
    assert num_preempted > 0 or options


def test_texts_of_the_rejection_rule_are_those_of_the_cpu(target: Target, there: Target) -> None:
    found, expected = (texts(place, "self", "rejection", dict(num_layers=2, length=2)) for place in (there, target))
    assert found == expected


@pytest.mark.parametrize("is_recorded", [False, True])
def test_the_overlapped_loop_waits_for_the_step_before_only(
    target: Target, there: Target, ledger: Ledger, is_recorded: bool
) -> None:
    """Nothing that it reads is there before it waited for it, and the device always has the next step to go on with."""
    params = [SamplingParams(t, max_tokens=8, seed=i, ignore_eos=True) for i, t in enumerate((0.0, 0.7, 1.0))]
    expected = [g.token_ids for g in Engine(target).generate(PROMPTS[:3], params)]
    there._compiled.clear()
    engine = Engine(there, overlap=True, num_slots=1024)
    if is_recorded:
        there.capture(RunAgain())
    requests = [engine.submit(prompt, one) for prompt, one in zip(PROMPTS, params, strict=False)]
    for _ in range(3):  # prompts are read, and the first step ahead has its size recorded
        engine.step()
    for _ in range(4):
        ledger.copies.clear()
        engine.step()
        assert not ledger.of("to host", "to device", "wait")
        assert [copy.line.partition(":")[0] for copy in ledger.of("late")][-1] == "engine/overlapped.py"
        assert len(ledger.of("late")) == 1 + is_recorded  # inputs of a recording wait until the last ones went over
        assert [copy.num_bytes for copy in ledger.of("coming")] == [8 * len(requests)]
    engine.step()
    assert [r.generated for r in requests] == expected
    assert there.num_free_slots == there.cache.limit
    there._compiled.clear()


@pytest.mark.parametrize("is_recorded", [False, True])
def test_drafts_that_are_read_late_are_waited_for_once(
    target: Target, there: Target, ledger: Ledger, is_recorded: bool
) -> None:
    params = [SamplingParams(t, max_tokens=40, seed=i, ignore_eos=True) for i, t in enumerate((0.0, 0.7, 1.0))]
    expected = [g.token_ids for g in Engine(target).generate(PROMPTS[:3], params)]
    there._compiled.clear()
    engine = Engine(there, load_drafter("dspark", there), "fixed:7", overlap=True, num_slots=1024)
    if is_recorded:
        there.capture(RunAgain(), engine.drafter.feature_layers)
    requests = [engine.submit(prompt, one) for prompt, one in zip(PROMPTS, params, strict=False)]
    for _ in range(2):
        engine.step()
    for _ in range(3):
        ledger.copies.clear()
        engine.step()
        waits = ledger.of("to host", "to device", "wait")
        assert [copy.line.partition(":")[0] for copy in waits] == ["engine/late_round.py"]
        assert [copy.num_bytes for copy in ledger.of("coming")] == [3 * (7 * 8 + 7 * 4 + 8 * 8)]
    assert all(r.generated == known[: len(r.generated)] for r, known in zip(requests, expected, strict=True))
    assert sum(len(r.rounds) + 1 < len(r.generated) for r in requests)  # drafts were of use, or nothing was shown
    engine.fail_running()
    there._compiled.clear()


def test_the_cache_fits_the_device(there: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    there.resize(4096)
    there.extend([Span(0, 0, (1,))])
    there.release(0)
    there.fit_cache()
    assert there.cache.limit == 4096
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (500 * there.cache.bytes_per_slot, 2**40))
    there.fit_cache()
    assert there.cache.limit == 400


@pytest.mark.parametrize(
    ("drafter", "options", "is_recorded", "waiting"),
    [
        ("none", {}, True, ["verify.py"]),
        ("dspark", {}, True, ["types/draft.py", "verify.py"]),
        ("dspark", dict(tree=8, width=2), False, ["types/draft.py", "verify.py"]),
        ("eagle3", {}, False, ["types/draft.py", "verify.py"]),
    ],
)
def test_what_a_step_copies(
    there: Target, ledger: Ledger, drafter: str, options: dict[str, Any], is_recorded: bool, waiting: list[str]
) -> None:
    """Tokens and confidences come to the host, a few hundred bytes; nothing else makes it wait."""
    for request in there.cache.request_ids:
        there.release(request)
    there._compiled.clear()
    engine = Engine(there, load_drafter(drafter, there, **options), "fixed:4", num_slots=1024)
    if is_recorded:
        there.capture(RunAgain(), engine.drafter.feature_layers)
    for prompt in PROMPTS[:3]:
        engine.submit(prompt, SamplingParams(0.0 if is_recorded else 0.8, max_tokens=40, seed=0, ignore_eos=True))
    engine.step()
    for _ in range(2):
        ledger.copies.clear()
        engine.step()
        waits = ledger.of("to host", "to device", "wait")
        assert [copy.line.partition(":")[0] for copy in waits] == waiting
        assert sum(copy.num_bytes for copy in waits) < 1024
        assert len(ledger.of("queued")) <= 8
    ledger.settle()
