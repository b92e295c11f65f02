"""Faults behind the API: the answers stay right, the alarms that are meant for a fault fire, and the others do not."""

from __future__ import annotations

import random
import time

import httpx
import numpy as np
import pytest
import torch

from dspark import Engine, load_drafter
from dspark.monitor.drift import Drift
from dspark.monitor.monitoring import Monitoring, MonitorSettings
from serve.conftest import serving
from serve.test_storms import BODY, OTHERS, streamed, together, whole


def watched(engine):
    """Monitoring that replays every request and needs few of them to know what is normal; the worker's options for it."""
    plain = Engine(engine.target, None, max_num_seqs=4)
    monitoring = Monitoring("tiny", "dspark", engine.target.cache.limit, MonitorSettings(canary_share=1), plain=plain)
    monitoring.canaries.max_waiting = 1000
    monitoring.drift = Drift(monitoring._drifted, batch=4, num_reference=10)
    options = {
        "observers": [monitoring.step],
        "on_finished": [monitoring.request],
        "idle_tasks": [monitoring.idle],
        "at_end": [monitoring.close],
    }
    return monitoring, options


def outcomes(monitoring, num_canaries: int) -> dict[str, float]:
    """How the canaries came out, once there are so many."""
    deadline, counts = time.monotonic() + 60, {}
    while sum(counts.values()) < num_canaries and time.monotonic() < deadline:
        time.sleep(0.02)
        counts = {name: counter.value for name, counter in monitoring.metrics.canaries.items()}
    return {name: count for name, count in counts.items() if count}


def ask(served, num: int, **changes) -> None:
    async def crowd(client):
        for i in range(num):
            message = {"role": "user", "content": OTHERS[i % 5]}
            await whole(client, {**BODY, "messages": [message], "seed": i, "max_tokens": 40, **changes})

    together(served, crowd)


@torch.no_grad()
def corrupt(model) -> None:
    for parameter in model.parameters():
        parameter.copy_(parameter[torch.randperm(len(parameter))])


def test_a_corrupted_drafter_costs_acceptance_and_a_corrupted_answer_a_canary(target, plain):
    drafter = load_drafter("dspark", target)
    engine = Engine(target, drafter, "fixed:7")
    expected = plain("What is a river?", temperature=1, seed=5, max_tokens=24)
    monitoring, options = watched(engine)

    def alarms():
        return [entry["signal"] for entry in monitoring.events.recent if entry["event"] == "drift"]

    with serving(engine, options) as served:
        ask(served, 5)
        assert not monitoring.drift.acceptance["sampled"].is_learning
        assert (outcomes(monitoring, 5), alarms()) == ({"equal": 5}, [])
        corrupt(drafter.model)
        ask(served, 3)
        assert together(served, lambda client: whole(client, BODY)) == expected.text
        assert outcomes(monitoring, 9) == {"equal": 9}
        assert "first_token_acceptance" in alarms()

        verify = engine.rule.verify

        def wrong(*arguments):
            verdict = verify(*arguments)
            verdict.next_tokens = (verdict.next_tokens + 1) % target.vocab_size
            return verdict

        engine.rule.verify = wrong
        together(served, lambda client: whole(client, BODY))
        engine.rule.verify = verify
        assert outcomes(monitoring, 10) == {"equal": 9, "unexplained": 1}
        assert monitoring.canaries.kept[-1].plain_token_ids == expected.token_ids
        assert together(served, lambda client: whole(client, BODY)) == expected.text
        assert outcomes(monitoring, 11) == {"equal": 10, "unexplained": 1}


@pytest.mark.parametrize("clock", ["time", "perf_counter"])
def test_clocks_that_jump_change_no_answer(target, plain, monkeypatch, clock):
    """The time of day goes back and forth; the other clock stands still or runs ahead, as on a machine that was paused."""
    expected = plain("What is a river?", temperature=1, seed=5, max_tokens=24).text
    engine = Engine(target, load_drafter("dspark", target), "auto")
    monitoring, options = watched(engine)
    with serving(engine, options) as served:
        ask(served, 2)
        rng, real, ahead = random.Random(0), getattr(time, clock), [0.0]

        def jumping() -> float:
            if rng.random() < 0.1:
                ahead[0] = rng.choice([0.0, 7200.0, -86400.0]) if clock == "time" else ahead[0] + rng.choice([0, 7200])
            return real() + ahead[0]

        monkeypatch.setattr(time, clock, jumping)
        for ours in (whole, streamed, whole):
            assert together(served, lambda client, ours=ours: ours(client, BODY)) == expected
        monkeypatch.undo()
        ask(served, 3)
        assert together(served, lambda client: whole(client, BODY)) == expected
        assert outcomes(monitoring, 9) == {"equal": 9}
        assert httpx.get(served.url + "/ready").status_code == 200
    costs = engine.capacity
    for curve in (costs.decoding, costs.reading, costs.drafting):
        assert curve.seconds(np.arange(1, 33), 1, 64).max() < 60, "no step has ever taken hours"
