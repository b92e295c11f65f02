"""`--compare`: the same request with and without speculation, timed so that the ratio is fair."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dspark import Engine, Generation, SamplingParams

_NUM_RUNS = 3
_SECONDS_ENOUGH = 20.0  # a slow model is not run again once this much time has been spent on timing


@dataclass(frozen=True)
class Difference:
    """The first position at which two runs wrote different tokens; None: one of them had ended."""

    position: int
    token_id: int | None
    plain_token_id: int | None


@dataclass(frozen=True)
class Comparison:
    """Medians over `num_runs` interleaved runs of each kind; speeds in tokens/s, the prompt's reading included."""

    tokens_per_second: float
    plain_tokens_per_second: float
    num_runs: int
    difference: Difference | None

    @property
    def speedup(self) -> float:
        """Times as fast as plain decoding."""
        return self.tokens_per_second / self.plain_tokens_per_second

    def as_json(self) -> dict[str, Any]:
        return {
            "plain_tokens_per_second": self.plain_tokens_per_second,
            "speedup": self.speedup,
            "identical": self.difference is None,
            "first_difference": None if self.difference is None else asdict(self.difference),
            "num_runs": self.num_runs,
        }


def compare(
    speculative: Engine, plain: Engine, prompt: Any, params: SamplingParams, raw: bool, seed: int
) -> Comparison:
    """Time both engines in turn on one request with one seed. The speculative engine must have run before."""
    params = replace(params, seed=seed)
    plain.generate([prompt], replace(params, max_tokens=min(8, params.max_tokens)), raw=raw)  # warm, like the other
    outputs: dict[Engine, Generation] = {}
    speeds: dict[Engine, list[float]] = {plain: [], speculative: []}
    order = [plain, speculative]
    started = time.perf_counter()
    while len(speeds[plain]) < _NUM_RUNS and (not outputs or time.perf_counter() - started < _SECONDS_ENOUGH):
        for engine in order:
            outputs[engine], tokens_per_second = timed(engine, prompt, params, raw)
            speeds[engine].append(tokens_per_second)
        order.reverse()  # neither always finds the processor as the other left it
    return Comparison(
        tokens_per_second=statistics.median(speeds[speculative]),
        plain_tokens_per_second=statistics.median(speeds[plain]),
        num_runs=len(speeds[plain]),
        difference=first_difference(outputs[speculative].token_ids, outputs[plain].token_ids),
    )


def timed(engine: Engine, prompt: Any, params: SamplingParams, raw: bool) -> tuple[Generation, float]:
    """A generation and its tokens/s, from handing in the prompt to the last token."""
    started = time.perf_counter()
    (generation,) = engine.generate([prompt], params, raw=raw)
    return generation, len(generation.token_ids) / (time.perf_counter() - started)


def first_difference(token_ids: list[int], plain_token_ids: list[int]) -> Difference | None:
    """Where two texts part; None: nowhere. The shorter one has no token where it has ended."""
    for position in range(max(len(token_ids), len(plain_token_ids))):
        ours = token_ids[position] if position < len(token_ids) else None
        plain = plain_token_ids[position] if position < len(plain_token_ids) else None
        if ours != plain:
            return Difference(position, ours, plain)
    return None
