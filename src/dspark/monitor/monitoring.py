"""All that watches one engine, put together: what a server gives its worker and what it shows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from dspark.budget.beliefs import LiveBeliefs
from dspark.monitor.canaries import Canaries, Outcome, PlainEngine
from dspark.monitor.drift import Cusum, Drift
from dspark.monitor.events import EventLog
from dspark.monitor.forecast import Cost, Limits, Outlook
from dspark.monitor.identity import LogitsOf
from dspark.monitor.prometheus import Metrics
from dspark.monitor.request_metrics import Objectives
from dspark.monitor.snapshot import Snapshots
from dspark.types import Beliefs, RequestRecord, StepRecord


@dataclass(frozen=True)
class MonitorSettings:
    """canary_share    of the finished requests, replayed without speculation while the server is idle
    event_log       JSON lines file of differing canaries and drift; None remembers only
    log_tokens      put token ids into it (they can be turned back into what users wrote)
    objectives      latency that requests should keep
    """

    canary_share: float = 0.01
    event_log: str | None = None
    log_tokens: bool = False
    objectives: Objectives = field(default_factory=Objectives)


class Monitoring:
    """Give `step` to the worker's observers, `request` to on_finished, `idle` to its idle tasks, `close` to
    what it does at its end; `snapshot` feeds the dashboard and `metrics.render` is `/metrics`.

    plain      an engine over the same target without drafter and prefix cache; None replays nothing (rejection rule)
    logits_of  the target in float32, for targets in less; without it their differing canaries are unjudged
    capacity   what steps cost, as the engine learns it; with `limits` the dashboard says how much the server can take
    beliefs    of the engine; those that learn say when drafts fare other than believed
    """

    def __init__(
        self,
        target: str,
        drafter: str,
        num_slots: int,
        settings: MonitorSettings | None = None,
        *,
        dtype: str = "float32",
        plain: PlainEngine | None = None,
        logits_of: LogitsOf | None = None,
        cost: Callable[[int, int, int], float] | None = None,
        capacity: Cost | None = None,
        limits: Limits | None = None,
        beliefs: Beliefs | None = None,
        process: bool = True,
    ) -> None:
        settings = settings or MonitorSettings()
        self.beliefs = beliefs if isinstance(beliefs, LiveBeliefs) else None
        self.metrics = Metrics(target, drafter, num_slots, settings.objectives, cost, process)
        if learned := self.beliefs:
            self._num_alarms = learned.num_alarms
            self.metrics.belief_drift.set_function(lambda: learned.drift)
        self.events = EventLog(settings.event_log, settings.log_tokens)
        self.drift = Drift(self._drifted)
        self.canaries: Canaries | None = None
        if plain is not None and settings.canary_share > 0:
            self.canaries = Canaries(
                plain,
                settings.canary_share,
                dtype,
                logits_of,
                observers=[self.metrics.canary, self.drift.canary, self._replayed],
                step_observers=[self.metrics.plain_step],
            )
        self.outlook = Outlook(capacity, limits, settings.objectives) if capacity and limits else None
        if outlook := self.outlook:
            self.metrics.capacity["objectives"].set_function(lambda: outlook().get("highest_rate", math.nan))
            self.metrics.capacity["saturation"].set_function(lambda: outlook().get("saturation", math.nan))
        self.snapshot = Snapshots(self.metrics, self.events, capacity=self.outlook or dict)

    def step(self, record: StepRecord) -> None:
        """Observer of the engine's steps."""
        self.metrics.step(record)
        if self.outlook is not None:
            self.outlook.step(self.metrics)
        if self.beliefs is not None:
            self._look_at(self.beliefs)
        if self.canaries is not None:
            self.canaries.step(record)

    def request(self, record: RequestRecord) -> None:
        """Observer of finished requests."""
        self.metrics.request(record)
        self.drift.request(record)
        if self.canaries is not None:
            self.canaries.request(record)

    def idle(self) -> bool:
        """Idle task: a little of what can wait; whether there is more."""
        self.metrics.at_rest()
        return self.canaries is not None and self.canaries.idle()

    def close(self) -> None:
        """No step follows."""
        if self.canaries is not None:
            self.canaries.close()
        self.events.close()

    def _look_at(self, beliefs: LiveBeliefs) -> None:
        if beliefs.num_alarms > self._num_alarms:
            self._num_alarms = beliefs.num_alarms
            self.metrics.drift_alarms["beliefs", "all"].inc()
            evidence: dict[str, Any] = dict(beliefs.at_alarm)
            self.events.write("drift", signal="beliefs", request_class="all", **evidence)

    def _drifted(self, signal: str, name: str, cusum: Cusum) -> None:
        self.metrics.drift_alarms[signal, name].inc()
        evidence: dict[str, Any] = {
            "low": round(cusum.low, 2),
            "high": round(cusum.high, 2),
            "reference": round(cusum.mean, 4),
        }
        self.events.write("drift", signal=signal, request_class=name, **evidence)

    def _replayed(self, outcome: Outcome) -> None:
        if outcome.difference is None:
            return
        record = outcome.record
        facts: dict[str, Any] = {**asdict(outcome.difference), "request_id": record.request_id, "seed": record.seed}
        if not self.events.with_tokens:
            del facts["token_id"], facts["plain_token_id"]
        traces = {
            "prompt_token_ids": record.prompt_token_ids,
            "token_ids": record.token_ids,
            "plain_token_ids": outcome.plain_token_ids,
        }
        self.events.write("canary", traces, outcome=outcome.kind, **facts)
