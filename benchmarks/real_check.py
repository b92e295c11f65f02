"""Does a replay do what the engine does? The same prompts, beliefs and scheduler in both."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.calibration_trials import LOADS, Bench
from benchmarks.recorded import Text, num_common, seeded
from benchmarks.replay import Calibrated, Replay
from dspark import Engine, SamplingParams
from dspark.budget.prefix_scheduler import ConfidenceThreshold
from dspark.target.target import Target
from dspark.types import Drafter

_THRESHOLD = 0.5
_NUM_PROMPTS = 16
_KINDS = ("raw", "STS + offset", "live")

Prompts = Sequence[tuple[str, Sequence[int]]]


def check(
    target: Target, drafter: Drafter, bench: Bench, prompts: Prompts, texts: Sequence[Text], num_tokens: int
) -> dict[str, Any]:
    """Share of rounds before the first one that differs, and what the real engine makes of three kinds of beliefs.

    prompts and texts as they were recorded: prompt i with seed i. In bfloat16 texts part at near ties, for good.
    """
    stride = max(1, len(prompts) // _NUM_PROMPTS)
    chosen = list(range(0, len(prompts), stride))
    params = [seeded(SamplingParams(max_tokens=num_tokens), i) for i in chosen]
    asked = [list(prompts[i][1]) for i in chosen]
    calibrated = Calibrated(bench.fitted["in-domain"]["STS"])
    engine = Engine(target, drafter, f"threshold:{_THRESHOLD}", beliefs=calibrated)  # type: ignore[arg-type]
    same = total = 0
    for i, generation in zip(chosen, engine.generate(asked, params), strict=True):
        real = [(r.verified, r.accepted) for r in generation.rounds]
        same += num_common(real, _rounds(texts[i], calibrated))  # type: ignore[arg-type]
        total += len(real)
    rates: dict[str, list[float]] = {kind: [] for kind in _KINDS}
    taus = {}
    for repeat in range(2):
        for kind in _KINDS if repeat % 2 else reversed(_KINDS):
            engine = Engine(
                target,
                drafter,
                "optimal",
                beliefs=bench.beliefs(kind, "in-domain"),
                capacity=copy.deepcopy(bench.capacity),  # every engine learns from its own steps
                max_num_seqs=LOADS["middle"],
            )
            began = time.perf_counter()
            done = engine.generate(asked, params)
            rates[kind].append(sum(len(g.token_ids) for g in done) / (time.perf_counter() - began))
            rounds = [r for g in done for r in g.rounds]
            taus[kind] = 1 + statistics.fmean(r.accepted for r in rounds)
    return {
        "rounds": total,
        "same": same / total,
        "tokens per second": {kind: statistics.median(values) for kind, values in rates.items()},
        "tau": taus,
    }


def _rounds(text: Text, beliefs: Calibrated) -> list[tuple[int, int]]:
    """(verified, accepted) of each round when one request is served alone with a threshold."""
    replay = Replay(beliefs, ConfidenceThreshold(_THRESHOLD), _Free(), 1)
    replay.slots = [replay.slot([text])]
    while replay.slots[0].left:
        replay.step()
    steps = replay.steps
    return list(zip(steps.verified, steps.accepted, strict=True))


class _Free:
    """Steps at one price: a threshold does not ask."""

    def seconds(self, tokens: Any, requests: int, context_tokens: int, is_reading: bool = False) -> Any:
        return tokens * 0.0 + 1.0

    def draft_seconds(self, requests: int, context_tokens: int) -> float:
        return 0.0
