"""The numbers of `/metrics` as a person asks for them: rates, percentiles, curves. Every one is computed from the series
that a scraper reads, so the dashboard and Prometheus cannot disagree.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dspark.monitor.events import EventLog
from dspark.monitor.load_metrics import LOADS, SIZES
from dspark.monitor.prometheus import MAX_POSITIONS, OUTCOMES, PHASES, Metrics

Values = Mapping[str, float]
WINDOW_SECONDS = 60.0  # of rates and percentiles
_LATENCIES = {
    "ttft": "dspark_time_to_first_token_seconds",
    "inter_token": "dspark_inter_token_latency_seconds",
    "per_output_token": "dspark_time_per_output_token_seconds",
    "e2e": "dspark_e2e_request_latency_seconds",
    "queue": "dspark_request_queue_time_seconds",
}
_GAUGES = {
    "running": "dspark_requests_running",
    "waiting": "dspark_requests_waiting",
    "kv_usage": "dspark_kv_usage_ratio",
    "kv_slots": "dspark_kv_slots",
    "prefix_hits": "dspark_prefix_hit_ratio",
    "speedup": "dspark_speedup_vs_plain",
    "calibration_error": "dspark_calibration_error",
    "cost_error": "dspark_cost_error_ratio",
    "regret": "dspark_regret_ratio",
}


@dataclass(frozen=True)
class Limits:
    """Where the dashboard raises an alert, and how much must have been seen before it does; the rules in monitoring/ have
    the same limits and wait longer.
    """

    calibration_error: float = 0.05
    speedup: float = 1.0
    kv_usage: float = 0.95
    num_judged: int = 1000  # draft tokens, for calibration_error
    num_seconds: float = 30.0  # of steps with drafts, for speedup


class Snapshots:
    """Call it for a dict of plain numbers (None: nothing to say yet). Call it about once a second: that is its clock."""

    def __init__(
        self,
        metrics: Metrics,
        events: EventLog | None = None,
        limits: Limits | None = None,
        clock: Callable[[], float] = time.monotonic,
        capacity: Callable[[], dict[str, Any]] = dict,
    ) -> None:
        self.metrics, self.events, self.limits, self._clock = metrics, events, limits or Limits(), clock
        self._capacity = capacity
        self._began = clock()
        self._samples: deque[tuple[float, Values]] = deque([(self._began, {})])
        self._history: deque[dict[str, Any]] = deque(maxlen=120)
        self._lock = threading.Lock()

    def __call__(self) -> dict[str, Any]:
        with self._lock:
            now, values = self._clock(), read(self.metrics)
            before, old = self._samples[0]
            recent = {name: value - old.get(name, 0.0) for name, value in values.items()}
            snapshot = self._describe(values, recent, now - before)
            self._remember(now, values, snapshot)
            return _without_nan(snapshot)

    def _remember(self, now: float, values: Values, snapshot: dict[str, Any]) -> None:
        if now - self._samples[-1][0] >= 0.5:  # several viewers ask more often; the history is one
            self._samples.append((now, values))
            self._history.append(
                {
                    "seconds": now - self._began,
                    "tokens_per_second": snapshot["rates"]["tokens_per_second"],
                    "running": snapshot["now"]["running"],
                    "kv_usage": snapshot["now"]["kv_usage"],
                    "speedup": snapshot["now"]["speedup"],
                }
            )
        while len(self._samples) > 2 and now - self._samples[1][0] > WINDOW_SECONDS:
            self._samples.popleft()

    def _describe(self, values: Values, recent: Values, seconds: float) -> dict[str, Any]:
        gauges = {name: values.get(series, math.nan) for name, series in _GAUGES.items()}
        return {
            "target": self.metrics.target,
            "drafter": self.metrics.drafter,
            "uptime_seconds": self._clock() - self._began,
            "window_seconds": seconds,
            "now": gauges,
            "rates": _rates(recent, seconds),
            "totals": _totals(values),
            "acceptance": _acceptance(values),
            "budget": _budget(values),
            "cost": _cost(values),
            "reliability": _reliability(values, self.metrics.reliability.labels),
            "phases": _phases(recent),
            "capacity": self._capacity(),
            "latency": {
                name: {
                    **{f"p{q}": percentile(recent, series, q / 100) for q in (50, 95, 99)},
                    "count": recent.get(f"{series}_count", 0.0),
                }
                for name, series in _LATENCIES.items()
            },
            "canaries": {name: values.get(f"dspark_canaries_total|{name}", 0.0) for name in OUTCOMES},
            "alerts": self._alerts(values, gauges),
            "events": list(self.events.recent)[-20:] if self.events else [],
            "history": list(self._history),
        }

    def _alerts(self, values: Values, gauges: Mapping[str, float]) -> list[dict[str, str]]:
        limits, found = self.limits, []

        def tell(severity: str, name: str, text: str) -> None:
            found.append({"severity": severity, "name": name, "text": text})

        if unexplained := values.get("dspark_canaries_total|unexplained", 0.0):
            tell(
                "page", "CanaryMismatch", f"{unexplained:.0f} replayed requests differ from plain decoding, unexplained"
            )
        for name, count in values.items():
            if name.startswith("dspark_drift_alarms_total|") and count:
                tell("ticket", "Drift", " ".join(name.split("|")[1:]).replace("_", " "))
        num_judged = sum(v for name, v in values.items() if name.startswith("dspark_confidence_tokens_total|"))
        if gauges["calibration_error"] > limits.calibration_error and num_judged >= limits.num_judged:
            tell("ticket", "CalibrationDrift", f"confidences are off by {gauges['calibration_error']:.3f} on average")
        num_seconds = values.get("dspark_speculative_seconds_total", 0.0)
        if gauges["speedup"] < limits.speedup and num_seconds >= limits.num_seconds:
            tell("ticket", "SpeculationHurts", f"{gauges['speedup']:.2f}x of plain decoding's speed")
        if gauges["kv_usage"] > limits.kv_usage:
            tell("page", "KvSaturation", f"{gauges['kv_usage']:.0%} of the KV slots are in use")
        return found


def read(metrics: Metrics) -> dict[str, float]:
    """Every sample of the registry as name, or name|label values; the model's and drafter's names are left out."""
    return _samples(metrics.registry.collect())


def read_page(page: str) -> dict[str, float]:
    """The same from what a server answers at `/metrics`; ValueError where it is no such page."""
    from prometheus_client.parser import text_string_to_metric_families

    return _samples(text_string_to_metric_families(page))


def _samples(families: Iterable[Any]) -> dict[str, float]:
    return {
        "|".join([sample.name, *(v for k, v in sorted(sample.labels.items()) if k not in ("model_name", "drafter"))]): (
            sample.value
        )
        for family in families
        for sample in family.samples
    }


def percentile(values: Values, series: str, q: float) -> float:
    """Of a histogram, linear within the bucket, as PromQL's histogram_quantile has it; NaN without observations."""
    prefix = f"{series}_bucket|"
    edges = sorted((float(n.removeprefix(prefix)), v) for n, v in values.items() if n.startswith(prefix))
    if not edges or not edges[-1][1]:
        return math.nan
    rank, lower, below = q * edges[-1][1], 0.0, 0.0
    for edge, count in edges:
        if count >= rank:
            if math.isinf(edge):
                return lower
            return lower + (edge - lower) * (rank - below) / (count - below) if count > below else edge
        lower, below = edge, count
    return lower


def _rates(recent: Values, seconds: float) -> dict[str, float]:
    def of(series: str) -> float:
        return recent.get(series, 0.0)

    passes, committed = of("dspark_decode_passes_total"), of("dspark_committed_tokens_total")
    drafts = of("vllm:spec_decode_num_drafts_total")
    per_token = "dspark_time_per_output_token_seconds"
    return {
        "tokens_per_second": _ratio(committed, seconds),
        "user_tokens_per_second": _ratio(of(f"{per_token}_count"), of(f"{per_token}_sum")),
        "requests_per_second": _ratio(of("dspark_request_generation_tokens_count"), seconds),
        "prompt_tokens_per_second": _ratio(of("dspark_prompt_tokens_total"), seconds),
        "tau": _ratio(committed, passes),
        "first_token_hit_rate": _ratio(of("dspark_first_token_hits_total"), drafts),
        "full_draft_hit_rate": _ratio(of("dspark_full_draft_hits_total"), of("dspark_proposals_total")),
        "coverage": _ratio(of("dspark_proposals_total"), passes),
        "drafter_share": _ratio(of("dspark_accepted_tokens_total"), committed),
        "wasted_share": _ratio(of("dspark_wasted_draft_tokens_total"), of("vllm:spec_decode_num_draft_tokens_total")),
        "pruned_share": _ratio(of("dspark_pruned_draft_tokens_total"), of("dspark_drafted_tokens_total")),
    }


def _totals(values: Values) -> dict[str, float]:
    names = {
        "drafts": "vllm:spec_decode_num_drafts_total",
        "draft_tokens": "vllm:spec_decode_num_draft_tokens_total",
        "accepted_tokens": "vllm:spec_decode_num_accepted_tokens_total",
        "committed_tokens": "dspark_committed_tokens_total",
        "prompt_tokens": "dspark_prompt_tokens_total",
        "steps": "dspark_step_seconds_count",
        "preemptions": "dspark_preemptions_total",
        "draft_faults": "dspark_draft_faults_total",
    }
    finished = {n.partition("|")[2]: v for n, v in values.items() if n.startswith("dspark_requests_finished_total|")}
    return {**{name: values.get(series, 0.0) for name, series in names.items()}, "requests": sum(finished.values())}


def _acceptance(values: Values) -> list[dict[str, float]]:
    rows = []
    for k in range(MAX_POSITIONS):
        reached = values.get(f"dspark_reached_tokens_per_pos_total|{k}", 0.0)
        accepted = values.get(f"vllm:spec_decode_num_accepted_tokens_per_pos_total|{k}", 0.0)
        if reached:
            rows.append({"position": k + 1, "reached": reached, "accepted": accepted, "rate": accepted / reached})
    return rows


def _budget(values: Values) -> list[dict[str, Any]]:
    rows = []
    for load in (*map(str, LOADS), "+Inf"):
        passes = values.get(f"dspark_load_passes_total|{load}", 0.0)
        if passes:
            verified = values[f"dspark_load_verified_tokens_total|{load}"] / passes
            tau = values[f"dspark_load_committed_tokens_total|{load}"] / passes
            rows.append({"requests": load, "passes": passes, "verified": verified, "tau": tau})
    return rows


def _cost(values: Values) -> list[dict[str, Any]]:
    rows = []
    for size in (*map(str, SIZES), "+Inf"):
        steps = values.get(f"dspark_cost_steps_total|{size}", 0.0)
        if steps:
            measured, believed = (
                values[f"dspark_cost_{kind}_seconds_total|{size}"] for kind in ("measured", "believed")
            )
            rows.append({"tokens": size, "steps": steps, "measured": measured / steps, "believed": believed / steps})
    return rows


def _reliability(values: Values, labels: Iterable[str]) -> list[dict[str, float]]:
    rows = []
    for label in labels:
        tokens = values.get(f"dspark_confidence_tokens_total|{label}", 0.0)
        if tokens:
            accepted, stated = (values[f"dspark_confidence_{n}_total|{label}"] / tokens for n in ("accepted", "sum"))
            rows.append({"stated": stated, "accepted": accepted, "tokens": tokens})
    return rows


def _phases(recent: Values) -> dict[str, float]:
    spent = {phase: recent.get(f"dspark_phase_seconds_total|{phase}", 0.0) for phase in PHASES}
    return {phase: _ratio(seconds, sum(spent.values())) for phase, seconds in spent.items()}


def _ratio(a: float, b: float) -> float:
    return a / b if b > 0 else math.nan


def _without_nan(value: Any) -> Any:
    """JSON has no NaN; None says that there is nothing to say."""
    if isinstance(value, dict):
        return {key: _without_nan(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_without_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
