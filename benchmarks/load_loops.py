"""Work for one engine: requests that are always as many (closed loop), or that come when they come (open loop)."""

from __future__ import annotations

import random
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dspark import Engine, SamplingParams
from dspark.types import Request, StepRecord


@dataclass
class Slice:
    """One policy at work for a while. Seconds are those of its steps; prompts that are read in between are among them.

    work  of each step: tokens committed, prompt tokens read, seconds
    """

    seconds: float = 0.0
    tokens: int = 0
    work: list[tuple[int, int, float]] = field(default_factory=list)
    steps: int = 0
    asked: int = 0
    decoded: int = 0  # requests in all steps together
    verified: int = 0
    accepted: int = 0
    foretold: int = 0  # accepted tokens of steps for which somebody had said how many to expect,
    predicted_accepted: float = 0.0  # and what was said
    phases: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def add(self, record: StepRecord, num_committed: int) -> None:
        seconds = record.step_seconds + record.draft_seconds
        self.seconds += seconds
        self.tokens += num_committed
        self.work.append((num_committed, record.num_prompt_tokens, seconds))
        self.steps += 1
        self.asked += record.num_asked
        self.decoded += len(record.request_ids)
        self.verified += sum(record.verified)
        self.accepted += sum(record.accepted)
        if record.survival is not None and record.kept is not None:  # who is timed is not asked to foretell more
            self.foretold += sum(record.accepted)
            self.predicted_accepted += float((record.survival * record.kept).sum())
        for phase, seconds in record.seconds.items():
            self.phases[phase] += seconds

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


@dataclass(frozen=True)
class PlainCost:
    """Seconds of plain decoding for each committed token and for each prompt token.

    Policies come to the same requests at different moments: a turn in which a long prompt is read commits few tokens, in
    whichever policy it falls. What a turn has done is therefore counted in seconds that plain decoding takes for it.
    """

    per_token: float
    per_prompt_token: float

    @classmethod
    def of(cls, plain: Sequence[Slice]) -> PlainCost:
        """Least squares over all steps."""
        work = np.array([step for s in plain for step in s.work], dtype=float)
        per_token, per_prompt_token = np.linalg.lstsq(work[:, :2], work[:, 2])[0]
        return cls(float(per_token), max(0.0, float(per_prompt_token)))

    def speed(self, slice: Slice) -> float:
        """How many seconds' worth of plain decoding were done in a second."""
        prompt_tokens = sum(step[1] for step in slice.work)
        return (self.per_token * slice.tokens + self.per_prompt_token * prompt_tokens) / slice.seconds


@dataclass
class Workload:
    """Endless requests: every policy is given the same ones in the same order."""

    prompts: Sequence[Sequence[int]]
    seed: int
    shortest: int
    longest: int
    count: int = 0

    def next(self) -> tuple[list[int], SamplingParams]:
        rng = random.Random(self.seed * 100_003 + self.count)
        prompt = list(self.prompts[(self.seed + self.count) % len(self.prompts)])
        self.count += 1
        num_tokens = rng.randint(self.shortest, self.longest)
        params = SamplingParams(
            temperature=float(self.count % 2), max_tokens=num_tokens, ignore_eos=True, seed=rng.randrange(2**31)
        )
        return prompt, params


class ClosedLoop:
    """So many requests always running; they stay where they are between turns, so that no turn begins with everybody's
    prompts, and what drafting hastens in one turn is not paid for by another.
    """

    def __init__(self, engine: Engine, workload: Workload, num_requests: int) -> None:
        self.engine, self.workload, self.num_tokens = engine, workload, 0
        self.requests = [engine.submit(*workload.next()) for _ in range(num_requests)]

    def run(self, until: int) -> Slice:
        """Go on until so many tokens have been committed since the loop began."""
        measured = Slice()
        while self.num_tokens < until:
            before = _num_generated(self.requests)
            record = self.engine.step()
            committed = _num_generated(self.requests) - before
            measured.add(record, committed)
            self.num_tokens += committed
            self.requests = [
                r if r.finish_reason is None else self.engine.submit(*self.workload.next()) for r in self.requests
            ]
        return measured

    def end(self) -> None:
        for request in self.requests:
            self.engine.cancel(request)


@dataclass(frozen=True)
class Served:
    """One request of an open loop; seconds since it came."""

    num_tokens: int
    first_token_seconds: float
    seconds: float


@dataclass
class Arrivals:
    """An open loop: who was served, and how many were still waiting or running when nobody waited any longer."""

    per_second: float
    served: list[Served] = field(default_factory=list)
    num_unfinished: int = 0


def open_loop(engine: Engine, workload: Workload, per_second: float, seconds: float) -> Arrivals:
    """Requests at Poisson arrivals for so many seconds; those that have come are waited for half as long again."""
    rng = random.Random(workload.seed)
    start, due, running, found = time.perf_counter(), 0.0, dict[int, tuple[float, Request]](), Arrivals(per_second)
    first: dict[int, float] = {}
    while True:
        now = time.perf_counter() - start
        if now > 1.5 * seconds:
            found.num_unfinished = len(running)
            for _, request in running.values():
                engine.cancel(request)
            return found
        while due <= now and due < seconds:
            request = engine.submit(*workload.next())
            running[request.id] = (due, request)
            due += rng.expovariate(per_second)
        if not running and due >= seconds:
            return found
        if not engine.has_work:
            time.sleep(min(0.001, max(0.0, due - now)))
            continue
        engine.step()
        now = time.perf_counter() - start
        for request_id, (came, request) in list(running.items()):
            if request.generated and request_id not in first:
                first[request_id] = now - came
            if request.finish_reason is not None:
                found.served.append(Served(len(request.generated), first[request_id], now - came))
                del running[request_id]


def _num_generated(requests: Sequence[Any]) -> int:
    return sum(len(r.tokens) - r.num_prompt_tokens for r in requests)
