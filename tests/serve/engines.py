"""What tests run in an engine's process. Child processes import this, so it imports nothing that takes long."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from dspark.errors import InvalidConfiguration


def pair(
    max_num_seqs: int = 32,
    max_waiting: int = 256,
    stuck_seconds: float = 120.0,
    canary_share: float = 0.01,
    faults: Path | None = None,
) -> Any:
    """The embedded pair, watched as `dspark serve` watches it, but with alarms that need few requests.

    faults   a folder: what the names of files in it say is wrong while they are there (`Faults`)
    """
    from dspark import Engine, load_drafter, load_target
    from dspark.engine.worker import Worker
    from dspark.monitor.drift import Drift
    from dspark.monitor.monitoring import Monitoring, MonitorSettings
    from dspark.serve.backend import Watched

    target = load_target("tiny", dtype="float32", device="cpu")
    engine = Engine(target, load_drafter("dspark", target), "fixed:7", max_num_seqs=max_num_seqs)
    if faults is not None:
        Faults(engine, faults)
    watching = MonitorSettings(canary_share)
    monitoring = Monitoring("tiny", "dspark", target.cache.limit, watching, plain=Engine(target, None, max_num_seqs=4))
    monitoring.canaries.max_waiting = 1000
    monitoring.drift = Drift(monitoring._drifted, batch=4, num_reference=10)

    def page() -> bytes:
        in_use = target.cache.limit - target.cache.num_free_slots
        mine = f"test_slots_in_use {in_use}\ntest_threads {threading.active_count()}\n"
        return bytes(monitoring.metrics.render()) + mine.encode()

    worker = Worker(
        engine,
        max_waiting=max_waiting,
        stuck_seconds=stuck_seconds,
        observers=[monitoring.step],
        on_finished=[monitoring.request],
        idle_tasks=[monitoring.idle],
        at_end=[monitoring.close],
    )
    return Watched(worker.start(), page, monitoring.snapshot)


def leaving_nothing(make: Callable[..., Any], *arguments: Any) -> Any:
    """The same for a process of its own, whose exit code is 3 where a slot is not free at its end."""
    watched = make(*arguments)

    def check() -> None:
        try:
            assert_all_free(watched.worker.engine.target.cache)
        except AssertionError:
            os._exit(3)

    watched.worker.at_end.append(check)
    return watched


def assert_all_free(cache) -> None:
    cache.check()
    assert cache.num_free_slots == cache.limit


class Faults:
    """Breaks an engine before a step and mends it before another, as files in a folder say.

    drafter-raises   whenever it is asked
    drafter-corrupt  its weights are shuffled
    verdicts-wrong   the next token is another one, whatever the target says
    clock-time, clock-perf_counter   it jumps
    stuck            the step does not end
    """

    def __init__(self, engine: Any, folder: Path) -> None:
        self._engine, self._folder, self._step = engine, folder, engine.step
        self._present: dict[str, AbstractContextManager[Any]] = {}
        engine.step = self.step

    def step(self) -> Any:
        while (self._folder / "stuck").exists():
            time.sleep(0.01)
        wanted = {file.name for file in self._folder.iterdir()} - {"stuck"}
        for name in self._present.keys() - wanted:
            self._present.pop(name).__exit__(None, None, None)
        for name in wanted - self._present.keys():
            self._present[name] = self._fault(name)
            self._present[name].__enter__()
        return self._step()

    def _fault(self, name: str) -> AbstractContextManager[Any]:
        drafter, rule = self._engine.drafter, self._engine.rule
        if name == "drafter-raises":
            return patch.object(drafter, "propose", side_effect=RuntimeError("a drafter that is broken"))
        if name == "drafter-corrupt":
            return _shuffled(drafter.model)
        if name == "verdicts-wrong":
            return patch.object(rule, "verify", partial(_off_by_one, rule.verify, self._engine.target.vocab_size))
        return jumping(name.removeprefix("clock-"))


@contextmanager
def _shuffled(model: Any) -> Iterator[None]:
    import torch

    right = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter[torch.randperm(len(parameter))])
    yield
    model.load_state_dict(right)


def _off_by_one(verify: Callable[..., Any], vocab_size: int, *arguments: Any) -> Any:
    verdict = verify(*arguments)
    verdict.next_tokens = (verdict.next_tokens + 1) % vocab_size
    return verdict


def jumping(clock: str) -> AbstractContextManager[Any]:
    """The time of day goes back and forth; the other clock stands still or runs ahead, as on a machine that was paused."""
    rng, real, ahead = random.Random(0), getattr(time, clock), [0.0]

    def now() -> float:
        if rng.random() < 0.1:
            ahead[0] = rng.choice([0.0, 7200.0, -86400.0]) if clock == "time" else ahead[0] + rng.choice([0, 7200])
        return float(real() + ahead[0])

    return patch.object(time, clock, now)


def for_ever():
    """A model that takes long to load."""
    time.sleep(600)


def refusing():
    raise InvalidConfiguration("no such model")


def failing():
    raise RuntimeError("something nobody thought of")
