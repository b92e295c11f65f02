"""What the budget and a step's cost are at each load: the two curves that the scheduler trades against each other."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from dspark.monitor.series import Counter, Registry
from dspark.types import StepRecord

LOADS = (1, 2, 4, 8, 16, 32, 64, 128)  # decoding requests in a step, at most
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)  # tokens the target reads in a step, at most


class LoadMetrics:
    """Series by decoding requests (`load`) and by tokens read (`tokens`), in steps of two."""

    def __init__(self, registry: Registry) -> None:
        def by(label: str, edges: Sequence[int], names: dict[str, str]) -> list[tuple[Counter, ...]]:
            counters = [registry.counters(f"dspark_{name}", text, label) for name, text in names.items()]
            return [tuple(c.labels(str(edge)) for c in counters) for edge in (*edges, "+Inf")]

        passes = {
            "load_passes": "target passes of decoding requests, by requests decoded together",
            "load_verified_tokens": "draft tokens read in them",
            "load_committed_tokens": "tokens they committed",
        }
        costs = {
            "cost_steps": "steps whose seconds were predicted, by tokens read",
            "cost_measured_seconds": "what they took, drafting left out",
            "cost_believed_seconds": "what the scheduler thought they would take",
        }
        self._by_load = by("load", LOADS, passes)
        self._by_size = by("tokens", SIZES, costs)

    def observe(self, record: StepRecord) -> None:
        """Observer of steps that decode."""
        num_requests = len(record.request_ids)
        amounts: tuple[float, ...] = (num_requests, sum(record.verified), num_requests + sum(record.accepted))
        for counter, amount in zip(self._by_load[bisect_left(LOADS, num_requests)], amounts, strict=True):
            counter.inc(amount)
        if record.predicted_seconds > 0 and record.step_seconds > 0:
            spent = (1.0, record.step_seconds, record.predicted_seconds)
            for counter, amount in zip(self._by_size[bisect_left(SIZES, record.num_tokens)], spent, strict=True):
                counter.inc(amount)
