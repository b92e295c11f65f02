"""The worker's promises: the engine's own tokens, nothing lost, and life after any fault."""

from __future__ import annotations

import logging
import queue
import threading
import time

import pytest

from dspark.engine.engine import Engine
from dspark.engine.worker import Worker
from dspark.errors import QueueFull, ShuttingDown
from dspark.types import Delta, Draft, SamplingParams
from engine.models import OracleDrafter, random_target

PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6], [5] * 9, [3, 5]]


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return random_target(tmp_path_factory.mktemp("target"))


@pytest.fixture
def started(target):
    """`started(engine, **options)`: a running worker; whatever a test does, nothing is left behind."""
    workers, before = [], set(threading.enumerate())

    def start(engine, **options):
        workers.append(Worker(engine, **options).start())
        return workers[-1]

    yield start
    for worker in workers:
        worker.close()
        assert not worker.is_alive
        assert worker.num_open == 0
    target.cache.check()
    assert target.num_free_slots == target.cache.limit
    assert not {t for t in threading.enumerate() if t.name.startswith("dspark-")} - before


class Caller:
    """Hands in one request and collects what comes."""

    def __init__(self, worker, prompt, **params):
        self.deltas: queue.SimpleQueue[Delta] = queue.SimpleQueue()
        self.worker = worker
        self.request = worker.engine.prepare(prompt, SamplingParams(**params))
        worker.submit([self.request], [self.deltas.put])

    def first(self) -> Delta:
        return self.deltas.get(timeout=30)

    def all(self) -> tuple[list[int], str]:
        tokens = []
        while True:
            delta = self.deltas.get(timeout=30)
            tokens += delta.token_ids
            if delta.finish_reason:
                return tokens, delta.finish_reason


def expected(target, prompt, **params):
    return Engine(target).generate([prompt], SamplingParams(**params))[0].token_ids


def test_many_threads_get_what_plain_decoding_gives(target, started):
    settings = dict(temperature=1.0, seed=3, max_tokens=24)
    texts = [prompt + expected(target, prompt, **settings) for prompt in PROMPTS]
    records = []
    worker = started(Engine(target, OracleDrafter(texts)), on_finished=[records.append])
    got = {}

    def call(i):
        got[i] = Caller(worker, PROMPTS[i % 4], **settings).all()

    threads = [threading.Thread(target=call, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert got == {i: (texts[i % 4][len(PROMPTS[i % 4]) :], "length") for i in range(16)}
    assert worker.drain(30)
    assert sorted((r.prompt_token_ids, r.token_ids) for r in records) == sorted(
        (PROMPTS[i % 4], texts[i % 4][len(PROMPTS[i % 4]) :]) for i in range(16)
    )
    for record in records:
        assert record.arrival_seconds <= record.start_seconds <= record.first_token_seconds <= record.finish_seconds
        assert len(record.token_seconds) == 24 == 1 + sum(r.accepted + 1 for r in record.rounds)
        assert record.token_seconds == sorted(record.token_seconds)
        assert (record.seed, record.drafter, record.finish_reason) == (3, "OracleDrafter", "length")


def test_a_cancelled_request_ends_early_and_the_others_do_not(target, started):
    records = []
    worker = started(Engine(target), on_finished=[records.append])
    long, other = Caller(worker, [1, 2], max_tokens=200), Caller(worker, [3, 1, 4], temperature=0, max_tokens=40)
    long.first()
    worker.cancel(long.request)
    tokens, reason = long.all()
    assert (reason, len(tokens) < 199) == ("cancelled", True)
    assert other.all() == (expected(target, [3, 1, 4], temperature=0, max_tokens=40), "length")
    worker.cancel(other.request)  # too late, and harmless
    worker.drain(30)
    assert [r.finish_reason for r in records] == ["cancelled", "length"]


def test_the_queue_is_bounded(target, started):
    worker = started(Engine(target, max_num_seqs=1), max_waiting=2)
    callers = [Caller(worker, [1, 2], max_tokens=200) for _ in range(3)]
    with pytest.raises(QueueFull, match="3 requests are running or waiting") as refused:
        Caller(worker, [1, 2])
    assert refused.value.retry_seconds >= 1
    for caller in callers:
        worker.cancel(caller.request)
        caller.all()
    deadline = time.monotonic() + 30
    while worker.num_open and time.monotonic() < deadline:
        time.sleep(0.01)
    assert Caller(worker, [1, 2], max_tokens=2).all()[1] == "length"


class FaultyTarget:
    """Makes one forward of a target raise when told so."""

    def __init__(self, target, monkeypatch):
        self.armed = threading.Event()
        extend = target.extend

        def faulty(*arguments, **options):
            out = extend(*arguments, **options)
            if self.armed.is_set():
                self.armed.clear()
                raise RuntimeError("injected")
            return out

        monkeypatch.setattr(target, "extend", faulty)


def test_a_fault_fails_the_running_requests_and_no_other(target, started, monkeypatch, caplog):
    fault = FaultyTarget(target, monkeypatch)
    records = []
    worker = started(Engine(target, max_num_seqs=2), on_finished=[records.append])
    running = [Caller(worker, [1, 2], max_tokens=200) for _ in range(2)]
    waiting = Caller(worker, [3, 1, 4], temperature=0, max_tokens=20)
    for caller in running:
        caller.first()
    with caplog.at_level(logging.ERROR):
        fault.armed.set()
        assert [caller.all()[1] for caller in running] == ["error", "error"]
        tokens, reason = waiting.all()
    assert "its 2 requests fail" in caplog.text
    assert "injected" in caplog.text
    monkeypatch.undo()
    assert (tokens, reason) == (expected(target, [3, 1, 4], temperature=0, max_tokens=20), "length")
    assert worker.num_faults == 1
    worker.drain(30)
    assert sorted(r.finish_reason for r in records) == ["error", "error", "length"]


class BrokenDrafter(OracleDrafter):
    """Raises from the given call on; before, it is right."""

    def __init__(self, texts, num_good):
        super().__init__(texts, error=0.0)
        self.num_good, self.num_calls = num_good, 0

    def propose(self, requests, rule):
        self.num_calls += 1
        if self.num_calls > self.num_good:
            raise ValueError("a drafter's bug")
        return super().propose(requests, rule)


def test_a_drafter_that_raises_costs_no_answer(target, started, caplog):
    settings = dict(temperature=1.0, seed=4, max_tokens=60)
    text = expected(target, PROMPTS[0], **settings)
    worker = started(Engine(target, BrokenDrafter([PROMPTS[0] + text], num_good=2)))
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            assert Caller(worker, PROMPTS[0], **settings).all() == (text, "length")
    assert caplog.text.count("the drafter failed (a drafter's bug)") == 1
    assert "in propose" in caplog.text  # where it was raised
    assert worker.num_faults == 0


def test_a_drafter_that_cannot_forget_costs_no_answer(target, started):
    class Clinging(OracleDrafter):
        def release(self, request_id):
            raise KeyError(request_id)

    text = expected(target, PROMPTS[0], temperature=0, max_tokens=30)
    worker = started(Engine(target, Clinging([PROMPTS[0] + text])))
    assert Caller(worker, PROMPTS[0], temperature=0, max_tokens=30).all() == (text, "length")
    assert worker.num_faults == 0


def test_a_drafter_that_recovers_drafts_for_the_next_request(target, started):
    settings = dict(temperature=0, max_tokens=30)
    text = expected(target, PROMPTS[0], **settings)
    broken = BrokenDrafter([PROMPTS[0] + text], num_good=0)
    records = []
    worker = started(Engine(target, broken, "fixed:5"), on_finished=[records.append])
    assert Caller(worker, PROMPTS[0], **settings).all()[0] == text
    assert broken.num_calls == 1  # what it missed of a request it cannot catch up on
    broken.num_good = 1000
    assert Caller(worker, PROMPTS[0], **settings).all()[0] == text
    worker.drain(30)
    assert [sum(r.accepted for r in record.rounds) > 0 for record in records] == [False, True]


def test_tokens_out_of_the_vocabulary_cost_drafts_and_no_answer(target, started):
    class Wild(OracleDrafter):
        def propose(self, requests, rule):
            draft = super().propose(requests, rule)
            return Draft(draft.tokens + 10_000, draft.sizes)

    text, records = expected(target, PROMPTS[0], temperature=0, max_tokens=30), []
    worker = started(Engine(target, Wild([PROMPTS[0] + text], error=0.0), observers=[records.append]))
    assert Caller(worker, PROMPTS[0], temperature=0, max_tokens=30).all() == (text, "length")
    assert sum(r.num_faults for r in records) == 1


def test_watchers_that_raise_cost_nothing(target, started, caplog):
    def broken(record):
        raise KeyError("metrics")

    seen = []
    ended = []
    wrong, right = [lambda: 1 / 0], [lambda: ended.append(threading.current_thread().name)]
    watchers = {"observers": [broken, seen.append], "on_finished": [broken], "idle_tasks": wrong}
    worker = started(Engine(target), **watchers, at_end=wrong + right)
    for _ in range(2):
        assert Caller(worker, [1, 2], max_tokens=5).all()[1] == "length"
    assert len(seen) == 10
    assert caplog.text.count("is not called again") == 3 and not ended
    worker.close()
    assert ended == ["dspark-engine"]


@pytest.mark.parametrize("seconds", [0.0, float("inf")], ids=["one-by-one", "together"])
def test_what_a_step_brings_is_sent_off_at_once_and_before_anybody_looks_at_it(target, started, seconds, monkeypatch):
    monkeypatch.setattr("dspark.engine.worker._SECONDS_BETWEEN_TELLING", seconds)
    told = []
    options = {"observers": [lambda record: told.append("seen")], "on_finished": [lambda record: told.append("ended")]}
    worker = started(Engine(target), **options, on_delivered=[lambda: told.append("sent")])
    requests = [worker.engine.prepare([1, 2, i], SamplingParams(max_tokens=6)) for i in range(3)]
    worker.submit(requests, [lambda delta: told.append("delta")] * 3)
    worker.drain(30)
    sent = ["delta", "delta", "delta", "sent"]
    steps = [*sent, "seen"] * 6 if seconds == 0 else sent * 6 + ["seen"] * 6
    assert told == [*steps, "ended", "ended", "ended"]


def test_of_a_request_that_ends_amid_others_watchers_are_told_when_it_is_time(target, started, monkeypatch):
    monkeypatch.setattr("dspark.engine.worker._SECONDS_BETWEEN_TELLING", float("inf"))
    told = []
    options = {"observers": [lambda record: told.append("step")], "on_finished": [lambda r: told.append(r.token_ids)]}
    worker = started(Engine(target), **options)
    requests = [worker.engine.prepare([1, 2], SamplingParams(max_tokens=n)) for n in (6, 2)]
    worker.submit(requests, [lambda delta: None] * 2)
    worker.drain(30)
    assert told == [*["step"] * 6, requests[1].generated, requests[0].generated]


def test_idle_tasks_run_only_between_requests(target, started):
    calls = []

    def task():
        assert not worker.engine.has_work
        calls.append(worker.engine.has_work)
        return len(calls) < 5

    worker = Worker(Engine(target))
    worker.idle_tasks.append(task)
    started(worker.engine)  # another worker over the same engine is never used; it only shares the tidying up
    worker.start()
    assert Caller(worker, [1, 2], max_tokens=5).all()[1] == "length"
    deadline = time.monotonic() + 30
    while len(calls) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    worker.close()
    assert len(calls) >= 5


def test_draining_finishes_what_was_taken(target, started):
    worker = started(Engine(target, max_num_seqs=1))
    callers = [Caller(worker, [1, 2, i], max_tokens=20) for i in range(4)]
    worker.begin_drain()
    with pytest.raises(ShuttingDown):
        Caller(worker, [1, 2])
    assert [caller.all()[1] for caller in callers] == ["length"] * 4
    assert worker.drain(30)


def test_a_drain_that_takes_too_long_cancels_the_rest(target, started, monkeypatch):
    extend = target.extend

    def slow(*arguments, **options):
        time.sleep(0.02)
        return extend(*arguments, **options)

    monkeypatch.setattr(target, "extend", slow)
    worker = started(Engine(target))
    caller = Caller(worker, [1, 2], max_tokens=250)
    caller.first()
    assert not worker.drain(0.1)
    assert caller.all()[1] == "cancelled"


def test_a_stuck_step_is_reported_and_over_when_it_ends(target, started, monkeypatch, caplog):
    release, extend = threading.Event(), target.extend

    def stuck(*arguments, **options):
        release.wait(30)
        return extend(*arguments, **options)

    monkeypatch.setattr(target, "extend", stuck)
    worker = started(Engine(target), stuck_seconds=0.1)
    with caplog.at_level(logging.ERROR):
        caller = Caller(worker, [1, 2], max_tokens=3)
        deadline = time.monotonic() + 30
        while "the engine is stuck" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.01)
        assert worker.is_stuck
        release.set()
        assert caller.all()[1] == "length"
    assert caplog.text.count("the engine is stuck") == 1
    assert not worker.is_stuck


def test_a_receiver_that_raises_has_its_request_cancelled(target, started, caplog):
    worker = started(Engine(target))
    request = worker.engine.prepare([1, 2], SamplingParams(max_tokens=100))

    def gone(delta):
        raise RuntimeError("Event loop is closed")

    worker.submit([request], [gone])
    assert Caller(worker, [1, 2], max_tokens=5).all()[1] == "length"
    assert worker.drain(30)
    assert request.finish_reason == "cancelled"
