"""What recorded steps and measured tilings bring: the same passes eager and replayed, the same attention in both cuts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass
from typing import Any

from benchmarks.floor import Floor
from benchmarks.gpu_sections import Say, cached, pass_seconds, sharing_weights
from dspark.target import kernels, tilings
from dspark.target.captured import GraphRecorder, Recorder
from dspark.target.target import Target


@dataclass(frozen=True)
class CapturedRow:
    """Seconds of one size of target pass: eager, its recording replayed, and, where compiled, that form replayed.

    recording      seconds that it took to record the eager one
    num_megabytes  that all recordings so far hold
    """

    requests: int
    tokens: int
    context: int
    eager: float
    captured: float
    compiled: float | None
    recording: float
    num_megabytes: float
    floor: float


@dataclass(frozen=True)
class TilingRow:
    """Seconds of one layer's attention over such shapes: in the cut chosen by reasoning and in the one measured best."""

    requests: int
    tokens: int
    context: int
    usual: float
    fastest: float
    floor: float
    tiling: tuple[int, ...]  # rows, keys, split, warps, stages


class Timed:
    """A recorder that knows how long it took. On CPU it records nothing: what is timed there is the padding."""

    def __init__(self, record: Recorder | None) -> None:
        self._record, self.seconds = record, 0.0

    @property
    def num_bytes(self) -> int:
        return 0 if self._record is None else self._record.num_bytes

    def __call__(self, run: Callable[[], Any]) -> Callable[[], Any]:
        begin = time.perf_counter()
        replay = run if self._record is None else self._record(run)
        self.seconds += time.perf_counter() - begin
        return replay


def passes(
    target: Target,
    is_compiled: bool,
    floor: Floor,
    sizes: Sequence[tuple[int, int]],
    context: int,
    repeats: int,
    say: Say,
) -> Iterator[CapturedRow]:
    """sizes: (requests, tokens of each). The same weights in each form, in turn."""
    plain, replayed = (Target(sharing_weights(target.model), name=target.name) for _ in range(2))
    record = Timed(GraphRecorder(target.device) if target.device.type == "cuda" else None)
    replayed.capture(record)
    for requests, each in sizes:
        say(f"captured: {requests} x {each} tokens")
        record.seconds, found = 0.0, []
        for one in (plain, replayed, target) if is_compiled else (plain, replayed):
            with cached(one, requests, context, each):
                found.append(pass_seconds(one, requests, each, context, repeats))
        compiled = found[2] if is_compiled else None
        least, megabytes = floor.step(requests * context), record.num_bytes / 2**20
        yield CapturedRow(
            requests, requests * each, context, found[0], found[1], compiled, record.seconds, megabytes, least
        )


def attention(target: Target, floor: Floor, say: Say) -> Iterator[TilingRow]:
    """Finds the fastest tilings first, or the file that an earlier run has left."""
    if target.device.type != "cuda" or not kernels.load_triton(target.device):
        return
    from dspark.target.triton_tuning import clock, usual_for

    say("tilings: looking for the fastest")
    with cached(target, 1, 1, 1):
        keys, values = next(iter(target.cache.storage.values()))
    kernels.tune(target.config.num_attention_heads, [(keys, values)])
    geometry = tilings.geometry_of(target.config.num_attention_heads, keys, values)
    seconds, usual = clock(geometry, target.device), usual_for(geometry)
    for shape, fastest in tilings.known[geometry].items():
        requests, each, context = shape.sizes
        least = requests * context * floor.per_token / target.num_layers / floor.bytes_per_second
        times = (seconds(shape, usual(shape)), seconds(shape, fastest))
        yield TilingRow(requests, requests * each, context, *times, least, astuple(fastest))
