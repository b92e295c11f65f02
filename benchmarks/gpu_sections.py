"""What benchmarks/gpu.py measures, one function per section; each gives rows for its table and for the JSON file."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

from benchmarks.floor import Floor, busy_share, seconds_of
from benchmarks.prompts import EncodedPrompt
from benchmarks.replayed import Dice, ReplayedDrafter, ReplayedRule
from dspark import Engine, SamplingParams
from dspark.budget.capacity import Capacity
from dspark.budget.prefix_scheduler import FixedLength
from dspark.drafters.block import BlockDrafter
from dspark.engine import measuring
from dspark.target.deterministic import make_deterministic
from dspark.target.target import Target
from dspark.types import Observer, Span, StepRecord

Say = Callable[[str], None]

PROMPT_TOKENS = 8192  # read in one step


@dataclass(frozen=True)
class StepRow:
    """One size of target pass: seconds as measured (lower quartile) and the floor."""

    requests: int
    tokens: int
    context: int  # cached per request
    seconds: float
    floor: float


@dataclass(frozen=True)
class RoundRow:
    """Engine steps at one load: plain, and with drafts that are verified in full. Seconds are medians of whole steps.

    busy: the share of its time that the device computes, kernels of drafts included; None where nothing tells.
    """

    requests: int
    context: int
    plain: float
    draft: float
    verify: float
    plain_floor: float
    draft_floor: float
    plain_busy: float | None
    busy: float | None


@dataclass(frozen=True)
class DeterministicRow:
    """One target pass with and without fixed orders of summation."""

    requests: int
    tokens: int
    plain: float
    deterministic: float


def steps(
    target: Target, floor: Floor, sizes: Sequence[tuple[int, int, int]], most_bytes: int, repeats: int, say: Say
) -> Iterator[StepRow]:
    """sizes: (requests, tokens of each, cached tokens of each); those whose cache takes more than most_bytes are left out."""
    for requests, each, context in sizes:
        if requests * (context + each) * floor.per_token > most_bytes or context + each > target.max_length:
            say(f"steps: {requests} x {each} tokens, context {context}: left out, it does not fit")
            continue
        say(f"steps: {requests} x {each} tokens, context {context}")
        with cached(target, requests, context, each):
            seconds = pass_seconds(target, requests, each, context, repeats)
        yield StepRow(requests, requests * each, context, seconds, floor.step(requests * context))


def step_sizes(most_tokens: int, contexts: Sequence[int]) -> list[tuple[int, int, int]]:
    """All numbers of tokens at the first context, plain, as drafts of 7, and as one prompt; a few of them at the others."""
    doubling = [2**n for n in range(most_tokens.bit_length())]
    sizes = [(n, 1, contexts[0]) for n in doubling] + [(n, 8, contexts[0]) for n in doubling if 8 * n <= most_tokens]
    sizes += [(1, n, contexts[0]) for n in (32, 128, 512) if n <= most_tokens]
    return sizes + [(n, each, context) for context in contexts[1:] for n in (1, 32) for each in (1, 8)]


@contextmanager
def cached(target: Target, requests: int, context: int, room: int) -> Iterator[None]:
    """Requests 0 .. requests - 1 with random keys and values in their cache, as if they had been read."""
    target.resize(requests * (context + room) + 64)
    target.extend([Span(-1, 0, (0,))])  # layers make their storage at the first forward
    target.release(-1)
    try:
        for request in range(requests):
            target.cache.reserve(request, context)
        for pair in target.cache.storage.values():
            for tensor in pair:
                tensor.normal_()
        yield
    finally:
        for request in range(requests):
            target.release(request)
        target.resize(65536)


def pass_seconds(target: Target, requests: int, each: int, context: int, repeats: int) -> float:
    """Lower quartile of passes over `each` new tokens of every request, logits of all of them included."""
    spans = [Span(request, context, (1,) * each, num_logits=each) for request in range(requests)]

    def one_pass() -> None:
        target.extend(spans)
        for request in range(requests):
            target.keep(request, context, ())

    seconds_of(one_pass, target.device, 2)
    return sorted(seconds_of(one_pass, target.device, repeats))[repeats // 4]


class Ready:
    """A target and its drafter, ready to be run by engines that share what steps cost."""

    def __init__(self, target: Target, drafter: BlockDrafter, dice: Dice, max_requests: int) -> None:
        self.target, self.dice, self.max_requests = target, dice, max_requests
        self.drafter = ReplayedDrafter(drafter, dice)
        self.capacity = Capacity()

    def engine(self, policy: str, *observers: Observer) -> Engine:
        """`off`, or a scheduler's name."""
        is_off = policy == "off"
        engine = Engine(
            self.target,
            None if is_off else self.drafter,
            "fixed:0" if is_off else policy,
            max_num_seqs=self.max_requests,
            max_num_batched_tokens=PROMPT_TOKENS,
            capacity=self.capacity,
            observers=observers,
        )
        engine.rule = ReplayedRule(engine.rule, self.dice)
        return engine


def rounds(
    ready: Ready, floor: Floor, loads: Sequence[int], context: int, repeats: int, say: Say
) -> Iterator[RoundRow]:
    for requests in loads:
        say(f"rounds: {requests} requests")
        plain, plain_busy = _decoding_steps(ready, "off", requests, context, repeats)
        drafting, busy = _decoding_steps(ready, f"fixed:{ready.drafter.length}", requests, context, repeats)
        yield RoundRow(
            requests,
            context,
            plain=median(sum(r.seconds.values()) for r in plain),
            draft=median(r.draft_seconds for r in drafting),
            verify=median(r.step_seconds for r in drafting),
            plain_floor=floor.step(requests * context),
            draft_floor=floor.draft(requests * context),
            plain_busy=plain_busy,
            busy=busy,
        )


def _decoding_steps(
    ready: Ready, policy: str, requests: int, context: int, repeats: int
) -> tuple[list[StepRecord], float | None]:
    """Full steps, all requests decoding; busy: how much of them the device worked, where that is known."""
    records: list[StepRecord] = []
    # While others still read their prompts, the first ones write: one token a step, undrafted.
    most = (2 * repeats + 4) * (1 + ready.drafter.length) + 4 * requests * context // PROMPT_TOKENS + 8
    ready.target.resize(requests * (context + most + 16))
    engine = ready.engine(policy, records.append)
    scheduler, engine.choosing.scheduler = engine.choosing.scheduler, FixedLength(0)
    params = SamplingParams(temperature=0.0, max_tokens=most, ignore_eos=True, seed=0)
    running = [engine.submit(list(p.token_ids), params) for p in random_prompts(ready.target, requests, context)]
    try:
        while any(not r.generated for r in running):
            engine.step()
        engine.choosing.scheduler = scheduler
        for _ in range(2):
            engine.step()
        records.clear()
        for _ in range(repeats):
            engine.step()
        measured = list(records)
        busy = busy_share(engine.step, ready.target.device, min(repeats, 5))
    finally:
        for request in running:
            engine.cancel(request)
    return measured, busy


def learn_costs(ready: Ready, loads: Sequence[int], context: int, seconds: float, say: Say) -> None:
    """Measure what `dspark profile` would have measured, so that policies that weigh costs begin with them."""
    engine = ready.engine(f"fixed:{ready.drafter.length}")
    measuring.measure(engine, measuring.Grid(tuple(loads), (context,), repeats=3, seconds=seconds), say)


def deterministic(
    target: Target, sizes: Sequence[tuple[int, int]], context: int, repeats: int, say: Say
) -> Iterator[DeterministicRow]:
    """sizes: (requests, tokens of each). The same weights twice, in turn."""
    twin = Target(sharing_weights(target.model), name=target.name)
    make_deterministic(twin)
    for requests, each in sizes:
        say(f"deterministic: {requests} x {each} tokens")
        found = []
        for one in (target, twin):
            with cached(one, requests, context, each):
                found.append(pass_seconds(one, requests, each, context, repeats))
        yield DeterministicRow(requests, requests * each, *found)


def sharing_weights(model: Any) -> Any:
    """A model of its own over the same parameters: what one does to its modules the other does not see."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def random_prompts(target: Target, count: int, length: int) -> list[EncodedPrompt]:
    dice = random.Random(count)
    return [EncodedPrompt("random", tuple(dice.choices(range(target.vocab_size), k=length))) for _ in range(count)]
