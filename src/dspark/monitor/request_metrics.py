"""What a finished request adds to the metrics: latencies, objectives, and first-token acceptance by class of request."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from dspark.monitor.drift import CLASSES, by_temperature
from dspark.monitor.series import Histogram, Registry
from dspark.types import RequestRecord

FINISH_REASONS = ("stop", "length", "cancelled", "error", "timeout")
OBJECTIVES = ("ttft", "per_token")
_OTHER = "other"
_LATENCY = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_TAUS = (1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0, 12.0, 16.0)
_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536)


@dataclass(frozen=True)
class Objectives:
    """Latency that a request should keep; a request that does is `good` in `dspark_slo_good_total`.

    ttft_seconds       from arrival to the first token
    per_token_seconds  mean time of every later token
    """

    ttft_seconds: float = 1.0
    per_token_seconds: float = 0.1


class RequestMetrics:
    """Series of finished requests in `registry`. `observe` is an observer of RequestRecord."""

    def __init__(self, registry: Registry, objectives: Objectives) -> None:
        self.objectives = objectives

        def latency(name: str, text: str) -> Histogram:
            return registry.histogram(f"dspark_{name}_seconds", text, _LATENCY)

        finished = registry.counters("dspark_requests_finished", "requests that ended", "reason")
        self.finished = {reason: finished.labels(reason) for reason in (*FINISH_REASONS, _OTHER)}
        self.generated = registry.counter("dspark_generation_tokens", "tokens in finished requests")
        self.ttft = latency("time_to_first_token", "from arrival to the first token")
        self.inter_token = latency("inter_token_latency", "between two streamed events of a request")
        self.per_output_token = latency("time_per_output_token", "mean per token after the first, by request")
        self.e2e = latency("e2e_request_latency", "from arrival to the last token")
        self.queue = latency("request_queue_time", "from arrival to the first step")
        self.prompt_length = registry.histogram("dspark_request_prompt_tokens", "prompt tokens per request", _TOKENS)
        self.output_length = registry.histogram("dspark_request_generation_tokens", "tokens per request", _TOKENS)
        self.tau = registry.histogram("dspark_request_tau", "tokens per target pass, by request", _TAUS)
        judged = registry.counters("dspark_slo_requests", "requests judged by a latency objective", "objective")
        good = registry.counters("dspark_slo_good", "requests that kept the objective", "objective")
        self.slo = {name: (judged.labels(name), good.labels(name)) for name in OBJECTIVES}
        drafts = registry.counters("dspark_class_drafts", "drafts read, by class of request", "request_class")
        hits = registry.counters(
            "dspark_class_first_token_hits", "of which the first token was accepted", "request_class"
        )
        self.classes = {name: (drafts.labels(name), hits.labels(name)) for name in CLASSES}

    def observe(self, record: RequestRecord) -> None:
        """Count a request that has ended."""
        self.finished.get(record.finish_reason, self.finished[_OTHER]).inc()
        self.generated.inc(len(record.token_ids))
        self.prompt_length.observe(len(record.prompt_token_ids))
        drafts, hits = self.classes[by_temperature(record)]
        drafts.inc(sum(r.verified > 0 for r in record.rounds))
        hits.inc(sum(r.accepted > 0 for r in record.rounds))
        if record.rounds:
            self.tau.observe(1 + sum(r.accepted for r in record.rounds) / len(record.rounds))
        if record.start_seconds is not None:
            self.queue.observe(record.start_seconds - record.arrival_seconds)
        if record.token_seconds:
            self._observe_times(record.token_seconds, record.arrival_seconds)

    def _observe_times(self, times: list[float], arrival: float) -> None:
        self.output_length.observe(len(times))
        self.e2e.observe(times[-1] - arrival)
        for gap in _gaps(times):
            self.inter_token.observe(gap)
        self.ttft.observe(times[0] - arrival)
        self._judge("ttft", times[0] - arrival <= self.objectives.ttft_seconds)
        if len(times) > 1:
            per_token = (times[-1] - times[0]) / (len(times) - 1)
            self.per_output_token.observe(per_token)
            self._judge("per_token", per_token <= self.objectives.per_token_seconds)

    def _judge(self, objective: str, is_kept: bool) -> None:
        judged, good = self.slo[objective]
        judged.inc()
        good.inc(is_kept)


def _gaps(times: Iterable[float]) -> list[float]:
    """Seconds between events; the tokens of one step came as one event."""
    return [later - earlier for earlier, later in pairwise(sorted(set(times)))]
