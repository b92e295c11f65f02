"""Beliefs that find traffic changed show in /metrics and in the event log."""

from __future__ import annotations

from budget.simulated_serving import World
from dspark.budget.beliefs import LiveBeliefs
from dspark.monitor.monitoring import Monitoring
from dspark.types import StepRecord


def series(monitoring: Monitoring, name: str) -> float:
    lines = monitoring.metrics.render().decode().splitlines()
    return float(next(line.split()[-1] for line in lines if line.startswith(name)))


def test_a_change_of_traffic_is_counted_and_logged() -> None:
    live = LiveBeliefs(num_positions=7)
    monitoring = Monitoring("tiny", "dspark", 100, beliefs=live, process=False)
    alarms = 'dspark_drift_alarms_total{request_class="all",signal="beliefs"}'
    World().serve(live, 200)
    monitoring.step(StepRecord())
    assert series(monitoring, alarms) == 0 and 0 < series(monitoring, "dspark_belief_drift") < 4.5
    World(offsets=(-1.0,) * 7, seed=3).serve(live, 16)
    monitoring.step(StepRecord())
    assert series(monitoring, alarms) == 1
    event = monitoring.events.recent[-1]
    assert event["signal"] == "beliefs" and event["drift"] > 4.5 and event["bias"] > 0
