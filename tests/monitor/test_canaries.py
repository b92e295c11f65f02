"""Canaries say nothing while all is well, and catch what acceptance does not show."""

from __future__ import annotations

import json
import threading

import pytest

from dspark.engine.engine import Engine
from dspark.engine.worker import Worker
from dspark.errors import InvalidConfiguration
from dspark.monitor.canaries import Canaries
from dspark.monitor.events import EventLog
from dspark.monitor.prometheus import Metrics
from dspark.types import SamplingParams
from engine.models import OracleDrafter, random_target
from monitor.records import finished
from monitor.test_prometheus import values
from target.tape import RunAgain

PARAMS = SamplingParams(temperature=1.0, max_tokens=12, seed=3)


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return random_target(tmp_path_factory.mktemp("target"))


def served(target, prompt=(3, 1, 4), **changes):
    """A finished request as the worker reports it."""
    generation = Engine(target).generate([list(prompt)], PARAMS)[0]
    facts = dict(params=PARAMS, seed=3, prompt_token_ids=list(prompt), token_ids=generation.token_ids)
    return finished(**{**facts, "finish_reason": generation.finish_reason, **changes})


def outcomes(target, records, dtype="float32", logits_of=None, **options):
    seen = []
    canaries = Canaries(Engine(target), 1.0, dtype, logits_of, observers=[seen.append], **options)
    for record in records:
        canaries.request(record)
    while canaries.idle():
        pass
    return seen, canaries


def test_the_same_tokens_are_equal(target):
    seen, canaries = outcomes(target, [served(target), served(target, (1, 5))])
    assert [o.kind for o in seen] == ["equal", "equal"] and not canaries.kept
    assert all(o.logprob < 0 for o in seen)
    assert target.num_free_slots == target.cache.limit


def test_replays_beside_a_drafter_take_the_graphs_that_its_engine_takes(target, monkeypatch):
    """Uncompiled passes take several times as long, and for each of their many sizes libraries keep what they prepared."""
    records = [served(target), served(target, range(1, 40))]
    monkeypatch.setattr(target, "_compiled", {})
    target.capture(RunAgain(), (0, 2))  # as compiled for a drafter that reads these layers
    run_eagerly, eagerly = target._eager, []
    monkeypatch.setattr(target, "_eager", lambda *x, **options: eagerly.append(x) or run_eagerly(*x, **options))
    seen, _ = outcomes(target, records)
    assert not eagerly
    assert [o.kind for o in seen] == ["equal", "equal"]


def test_one_corrupted_token_is_found_with_both_traces(target):
    record = served(target)
    wrong = [*record.token_ids]
    wrong[5] = (wrong[5] + 1) % target.vocab_size
    seen, canaries = outcomes(target, [served(target, token_ids=wrong)])
    (outcome,) = canaries.kept
    assert seen == [outcome] and outcome.kind == "unexplained"
    assert outcome.difference.position == 5
    assert (outcome.record.token_ids, outcome.plain_token_ids) == (wrong, record.token_ids)


def test_rounding_explains_only_near_ties(target):
    import torch

    record = served(target)
    wrong = [*record.token_ids[:-1], (record.token_ids[-1] + 1) % target.vocab_size]
    far = torch.linspace(-9, 9, target.vocab_size)
    seen, _ = outcomes(target, [served(target, token_ids=wrong)], "bfloat16", lambda _: 1e-3 * far)
    assert seen[0].kind == "unexplained"  # the noise alone sets the two apart
    greedy = SamplingParams(temperature=0, max_tokens=4)
    plain = Engine(target).generate([[3, 1]], greedy)[0].token_ids
    record = finished(params=greedy, prompt_token_ids=[3, 1], token_ids=[*plain[:3], 0 if plain[3] else 1])
    near = torch.full((target.vocab_size,), 5.0)
    assert outcomes(target, [record], "bfloat16", lambda _: near)[0][0].kind == "explained"
    assert outcomes(target, [record], "bfloat16")[0][0].kind == "unjudged"
    assert outcomes(target, [record], "float32")[0][0].kind == "unexplained"


def test_what_was_cancelled_is_not_replayed_and_what_cannot_be_is_abandoned(target):
    seen, _ = outcomes(target, [served(target, finish_reason="cancelled"), finished(prompt_token_ids=[1] * 900)])
    assert [o.kind for o in seen] == ["abandoned"]


def test_the_share_and_the_queue_bound_the_work(target):
    record = served(target)
    canaries = Canaries(Engine(target), 0.25, "float32", max_waiting=1000)
    for _ in range(400):
        canaries.request(record)
    assert 60 < len(canaries._replays) < 140
    _, canaries = outcomes(target, [record] * 5, max_waiting=2)
    assert canaries.num_passed_over == 3
    with pytest.raises(InvalidConfiguration):
        Canaries(Engine(target), 1.5, "float32")


def test_users_get_the_slots_back_and_the_replay_still_ends_right(target):
    seen = []
    canaries = Canaries(Engine(target), 1.0, "float32", observers=[seen.append])
    canaries.request(served(target))
    engine = Engine(target, observers=[canaries.step])
    for _ in range(4):
        canaries.idle()
        assert target.num_free_slots < target.cache.limit
        engine.step()
        assert target.num_free_slots == target.cache.limit
    while canaries.idle():
        pass
    assert [o.kind for o in seen] == ["equal"]


def test_a_worker_that_ends_in_the_middle_of_a_replay_holds_no_slot(target):
    canaries, is_halfway = Canaries(Engine(target), 1.0, "float32"), threading.Event()

    def one_step() -> bool:
        if canaries.idle():
            is_halfway.set()
        return False

    options = {"on_finished": [canaries.request], "idle_tasks": [one_step], "at_end": [canaries.close]}
    worker = Worker(Engine(target), **options).start()
    worker.submit([worker.engine.prepare([3, 1, 4], PARAMS)], [lambda delta: None])
    assert is_halfway.wait(30)
    assert target.num_free_slots < target.cache.limit
    worker.close()
    assert target.num_free_slots == target.cache.limit


def test_in_a_worker_with_metrics_and_events(target, tmp_path):
    """The whole chain: a request is served, replayed when idle, counted; and plain steps give the speed-up its measure."""
    metrics, done = Metrics("t", "oracle", 100, process=False), threading.Event()
    events = EventLog(tmp_path / "events.jsonl")

    def tell(outcome):
        metrics.canary(outcome)
        events.write("canary", {"token_ids": outcome.record.token_ids}, kind=outcome.kind)
        done.set()

    canaries = Canaries(Engine(target), 1.0, "float32", observers=[tell], step_observers=[metrics.plain_step])
    texts = [[3, 1, 4, *served(target).token_ids]]
    engine = Engine(target, OracleDrafter(texts, error=0.2))
    worker = Worker(
        engine,
        observers=[metrics.step, canaries.step],
        on_finished=[metrics.request, canaries.request],
        idle_tasks=[canaries.idle],
    ).start()
    worker.submit([engine.prepare([3, 1, 4], PARAMS)], [lambda delta: None])
    assert done.wait(30)
    worker.close()
    v = values(metrics)
    assert v["dspark_canaries_total.equal"] == 1 and v["dspark_requests_finished_total.length"] == 1
    assert metrics.plain.step_seconds(1) > 0
    events.close()
    (line,) = (tmp_path / "events.jsonl").read_text().splitlines()
    assert json.loads(line)["kind"] == "equal" and "token_ids" not in json.loads(line)
