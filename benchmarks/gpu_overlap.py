"""What it brings to wait for the device less: plain decoding and whole rounds by both loops, over the same prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import median

from benchmarks.floor import Floor, busy_share
from benchmarks.gpu_sections import PROMPT_TOKENS, Say, random_prompts
from dspark import Engine, SamplingParams
from dspark.budget.capacity import Capacity
from dspark.target.target import Target
from dspark.types import Drafter, StepRecord

_BUSY_STEPS = 5


@dataclass(frozen=True)
class OverlapRow:
    """Steps at one load, by the plain loop and by the overlapped one. Seconds are medians of whole steps.

    policy   off, or the fixed length that is drafted and verified; random models accept next to nothing
    host     of an overlapped step, the seconds that the host worked; the rest of it, it waited
    busy     the share of its time that the device computes; None where nothing tells
    is_same  whether both wrote the same tokens
    """

    requests: int
    context: int
    policy: str
    plain: float
    overlapped: float
    host: float
    plain_busy: float | None
    busy: float | None
    floor: float
    is_same: bool


@dataclass(frozen=True)
class _Run:
    records: list[StepRecord]
    busy: float | None
    tokens: list[list[int]]


def loops(
    target: Target, drafter: Drafter, floor: Floor, loads: Sequence[int], context: int, repeats: int, say: Say
) -> Iterator[OverlapRow]:
    """Two rows for each load, without drafts and with whole ones; the loops take turns."""
    for requests, own in product(loads, (None, drafter)):
        policy = "off" if own is None else f"fixed:{drafter.length}"
        say(f"overlap: {requests} requests, {policy}")
        runs = [_decode(target, own, requests, context, repeats, overlap) for overlap in (False, True, False, True)]
        plain, ahead = ([record for run in these for record in run.records] for these in (runs[::2], runs[1::2]))
        yield OverlapRow(
            requests,
            context,
            policy,
            plain=median(sum(r.seconds.values()) for r in plain),
            overlapped=median(sum(r.seconds.values()) for r in ahead),
            host=median(sum(r.seconds.values()) - r.seconds["verify"] for r in ahead),
            plain_busy=runs[2].busy,
            busy=runs[3].busy,
            floor=floor.step(requests * context) + (0.0 if own is None else floor.draft(requests * context)),
            is_same=all(run.tokens == runs[0].tokens for run in runs),
        )


def _decode(target: Target, drafter: Drafter | None, requests: int, context: int, repeats: int, overlap: bool) -> _Run:
    """Full steps, all requests decoding."""
    length = 0 if drafter is None else drafter.length
    # While others still read their prompts, the first ones write.
    most = (1 + length) * (repeats + _BUSY_STEPS + 8 + -(-requests * context // (PROMPT_TOKENS // 4)))
    target.resize(requests * (context + most + length + 2))
    records: list[StepRecord] = []
    engine = Engine(
        target,
        drafter,
        f"fixed:{length}",
        max_num_seqs=requests,
        max_num_batched_tokens=PROMPT_TOKENS,
        capacity=Capacity(),
        overlap=overlap,
        observers=[records.append],
    )
    params = SamplingParams(temperature=0.8, max_tokens=most, ignore_eos=True, seed=0)
    running = [engine.submit(list(p.token_ids), params) for p in random_prompts(target, requests, context)]
    try:
        while any(not r.generated for r in running):
            engine.step()
        for _ in range(3):
            engine.step()
        records.clear()
        for _ in range(repeats):
            engine.step()
        measured = list(records)
        busy = busy_share(engine.step, target.device, _BUSY_STEPS)
        return _Run(measured, busy, [list(r.generated) for r in running])
    finally:
        for request in running:
            engine.cancel(request)
