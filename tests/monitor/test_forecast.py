"""From series and curves to a plan: the right numbers reach the queue."""

from __future__ import annotations

import numpy as np
import pytest

from dspark.errors import InvalidRequest
from dspark.monitor.forecast import Limits, Mix, Outlook, kv_requests, make_plan, make_replica
from dspark.monitor.monitoring import Monitoring
from dspark.monitor.prometheus import Metrics
from dspark.monitor.request_metrics import Objectives
from dspark.monitor.snapshot import Snapshots, read, read_page
from dspark.types import Round
from tests.monitor.records import finished, step


class Straight:
    """10 ms and 1 ms per token read; a prompt costs half of that per token; 2 ms per drafted request."""

    def seconds(self, tokens, requests, context_tokens, is_reading=False):
        return 0.01 + 0.001 * np.asarray(tokens, dtype=float)

    def draft_seconds(self, requests, context_tokens):
        return 0.002 * requests


PLAIN = Mix(100, 51, ((1, 1.0, 0.0),))


def planned(limits: Limits, objectives: Objectives):
    return make_plan(make_replica(Straight(), PLAIN, limits), PLAIN, limits, objectives)


def served() -> Metrics:
    """Steps of one and of eight requests, and requests of which half gain nothing."""
    metrics = Metrics("t", "d", 5000, process=False)
    for _ in range(3):
        metrics.step(step(drafted=(7,), verified=(5,), accepted=(3,)))
        metrics.step(step(drafted=(7,) * 8, verified=(2,) * 8, accepted=(1,) * 8))
    for accepted in (0, 2):
        rounds = [Round(7, 5, accepted)] * 10
        metrics.request(
            finished(prompt_token_ids=[1] * 40, token_seconds=[101.0 + i for i in range(30)], rounds=rounds)
        )
    return metrics


def test_a_replica_adds_up_what_steps_cost():
    replica = make_replica(Straight(), Mix(100, 51, ((1, 2.0, 3.0),)), Limits(max_num_seqs=4))
    assert replica.pass_seconds == pytest.approx([0.012 + 0.0 + 0.004 * n + 0.002 * (n - 1) for n in (1, 2, 3, 4)])
    assert replica.passes == pytest.approx([25.0] * 4)
    assert replica.prompt_seconds == pytest.approx([0.1] * 4)


def test_long_prompts_take_several_passes():
    replica = make_replica(Straight(), Mix(1000, 51, PLAIN.by_load), Limits(max_num_batched_tokens=300))
    assert replica.prompt_passes == 4
    assert replica.prompt_seconds[0] == pytest.approx(1.0)


def test_plain_decoding_is_charged_no_drafts():
    assert make_replica(Straight(), PLAIN, Limits(max_num_seqs=1)).pass_seconds == pytest.approx([0.011])


def test_kv_limits_how_many_run():
    assert kv_requests(PLAIN, Limits(num_slots=152 * 5)) == 5
    assert kv_requests(PLAIN, Limits(num_slots=10**6)) == 32
    with pytest.raises(InvalidRequest, match="slots"):
        kv_requests(PLAIN, Limits(num_slots=100))
    objectives = Objectives(1.0, 0.1)
    small, large = (planned(Limits(num_slots=n), objectives) for n in (152 * 5, 10**6))
    assert small.max_decoding == 5 and small.kv_full_rate is not None
    assert large.kv_full_rate is None and large.highest_rate > small.highest_rate


def test_the_tighter_objective_gives_way_first():
    assert planned(Limits(), Objectives(10.0, 0.03)).limited_by == "per_token"
    assert planned(Limits(), Objectives(0.15, 10.0)).limited_by == "ttft"
    assert planned(Limits(), Objectives(0.05, 1.0)).highest_rate == 0


def test_the_mix_is_what_the_server_counted_also_when_read_from_its_page():
    metrics = served()
    mix = Mix.of_metrics(read(metrics))
    assert mix == Mix.of_metrics(read_page(metrics.render().decode()))
    assert (mix.prompt_tokens, mix.output_tokens) == (40, 30)
    assert mix.by_load == ((1.0, 4.0, 5.0), (pytest.approx(40**0.5), 2.0, 2.0))
    assert mix.at(np.array([1, 32]))[0].tolist() == [4.0, 2.0]
    # Half of the requests take one pass per token, the others a third of that.
    assert np.mean(mix.spread) == pytest.approx(1) and max(mix.spread) == pytest.approx(1.5, rel=0.1)
    assert min(mix.spread) == pytest.approx(0.5, rel=0.1)


def test_nothing_is_said_before_a_request_has_finished_and_soon_after():
    metrics, now = Metrics("t", "d", 5000, process=False), [0.0]
    outlook = Outlook(Straight(), Limits(), Objectives(), clock=lambda: now[0])
    outlook.step(metrics)
    assert Snapshots(metrics, capacity=outlook)()["capacity"] == {}
    now[0] = 2.0
    outlook.step(served())
    assert Snapshots(metrics, capacity=outlook)()["capacity"]["highest_rate"] > 0
    latest, others = outlook(), served()
    others.request(finished(prompt_token_ids=[1] * 400))
    outlook.step(others)
    assert outlook() is latest, "renewed now and then, not with every step"
    now[0] = 60.0
    outlook.step(others)
    assert outlook()["highest_rate"] < latest["highest_rate"]


def test_the_plan_is_in_the_metrics():
    watched = Monitoring("t", "d", 5000, capacity=Straight(), limits=Limits(), process=False)
    assert "dspark_capacity_requests_per_second|objectives" in read(watched.metrics)
    watched.request(finished())
    watched.step(step())
    plan = watched.snapshot()["capacity"]
    values = read_page(watched.metrics.render().decode())
    assert values["dspark_capacity_requests_per_second|objectives"] == plan["highest_rate"] > 0
    assert values["dspark_capacity_requests_per_second|saturation"] == plan["saturation"]
