"""Measure what steps cost before anybody waits for them: a short grid of real steps, timed as all steps are."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dspark.budget.prefix_scheduler import FixedLength
from dspark.types import Request, SamplingParams

if TYPE_CHECKING:
    from dspark.engine.engine import Engine


@dataclass(frozen=True)
class Grid:
    """
    requests  running side by side
    contexts  tokens that each has read before
    repeats   steps of each kind; their median counts
    seconds   begin nothing new after so long
    """

    requests: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    contexts: tuple[int, ...] = (32, 512)
    repeats: int = 5
    seconds: float = 30.0


def measure(engine: Engine, grid: Grid, say: Callable[[str], None] = lambda _: None) -> int:
    """Run steps of many sizes over random tokens, from which the engine's capacity learns; how many there were.

    The engine must be idle. Its scheduler and guard are out of the way meanwhile.
    """
    assert not engine.has_work, "measure before the first request"
    scheduler, guard, started = engine.choosing.scheduler, engine.drafting.guard, time.perf_counter()
    engine.drafting.guard, num_steps = None, 0
    try:
        for context in sorted(grid.contexts):
            for num_requests in sorted(n for n in grid.requests if n <= engine.batcher.max_running):
                if time.perf_counter() - started > grid.seconds:
                    return num_steps
                say(f"{num_requests} requests, context {context}")
                num_steps += _measure_at(engine, num_requests, context, grid.repeats)
    finally:
        engine.choosing.scheduler, engine.drafting.guard = scheduler, guard
    return num_steps


def _measure_at(engine: Engine, num_requests: int, context: int, repeats: int) -> int:
    lengths = sorted({0, 1, engine.drafter.length // 2, engine.drafter.length})
    # Everything may be accepted, and every request must last.
    most = len(lengths) * (repeats + 1) * (1 + engine.drafter.length)
    rng, vocab_size = random.Random(0), engine.target.vocab_size
    context = min(context, engine.max_length - most - 1)
    if context < 1 or num_requests * (context + most) > engine.target.num_free_slots:
        return 0
    params = SamplingParams(max_tokens=most, ignore_eos=True, seed=0)
    prompts = [[rng.randrange(vocab_size) for _ in range(context)] for _ in range(num_requests)]
    requests = [engine.submit(prompt, params) for prompt in prompts]
    try:
        while any(not r.generated for r in requests):
            engine.step()
        return sum(_steps(engine, length, repeats, requests) for length in lengths)
    finally:
        engine.capacity.learn_waiting()  # nobody asks, and of what waits for long only the newest is learned
        for request in requests:
            engine.cancel(request)


def _steps(engine: Engine, length: int, repeats: int, requests: Sequence[Request]) -> int:
    engine.choosing.scheduler = FixedLength(length)
    for _ in range(repeats):
        engine.step()
    assert all(r.finish_reason is None for r in requests)
    return repeats
