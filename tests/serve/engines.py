"""What tests run in an engine's process. Child processes import this, so it imports nothing that takes long."""

from __future__ import annotations

import os
import time
from pathlib import Path

from dspark.errors import InvalidConfiguration


def pair(
    faulty: bool = False,
    max_num_seqs: int = 32,
    max_waiting: int = 256,
    stuck_seconds: float = 120.0,
    gate: Path | None = None,
):
    """The embedded pair, watched as `dspark serve` watches it; a slot that is not free at the end is exit code 3.

    faulty  the drafter raises on every step
    gate    a file without which no step gets on
    """
    from dspark import Engine, load_drafter, load_target
    from dspark.engine.worker import Worker
    from dspark.monitor.monitoring import Monitoring
    from dspark.serve.backend import Watched

    target = load_target("tiny", dtype="float32", device="cpu")
    drafter = load_drafter("dspark", target)
    if faulty:
        drafter.propose = _fail
    engine = Engine(target, drafter, "fixed:7", max_num_seqs=max_num_seqs)
    if gate is not None:
        engine.observers.append(lambda _: _wait_for(gate))
    monitoring = Monitoring("tiny", "dspark", target.cache.limit, plain=Engine(target))

    def check() -> None:
        try:
            assert_all_free(target.cache)
        except AssertionError:
            os._exit(3)

    worker = Worker(
        engine,
        max_waiting=max_waiting,
        stuck_seconds=stuck_seconds,
        observers=[monitoring.step],
        on_finished=[monitoring.request],
        idle_tasks=[monitoring.idle],
        at_end=[monitoring.close, check],
    )
    return Watched(worker.start(), monitoring.metrics.render, monitoring.snapshot)


def assert_all_free(cache) -> None:
    cache.check()
    assert cache.num_free_slots == cache.limit


def _fail(requests, rule):
    raise RuntimeError("a drafter that is broken")


def _wait_for(file: Path) -> None:
    while not file.exists():
        time.sleep(0.01)


def for_ever():
    """A model that takes long to load."""
    time.sleep(600)


def refusing():
    raise InvalidConfiguration("no such model")


def failing():
    raise RuntimeError("something nobody thought of")
