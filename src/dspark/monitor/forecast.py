"""How much a server can take: its measured curve, what drafts bring, and what requests are like, put together.

The mix of requests comes from the series of `/metrics`, seconds from what `dspark profile` or the running server has
measured (budget/capacity.py), and the queue from replica.py.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dspark.budget.throughput import StepCost
from dspark.errors import InvalidRequest
from dspark.monitor.load_metrics import LOADS
from dspark.monitor.prometheus import Metrics
from dspark.monitor.replica import Floats, Replica
from dspark.monitor.request_metrics import Objectives
from dspark.monitor.snapshot import percentile, read

_SPREAD = 20  # quantiles of tokens per pass among requests
_SAMPLED = 12  # numbers of requests at which a cost is asked for
_RENEWED_SECONDS = 20.0  # the plan of a running server
_LOOKED_SECONDS = 1.0  # for the first finished request: to read all series takes as long as a small step


class Cost(StepCost, Protocol):
    """Seconds of steps and of drafting; `Capacity` has them."""

    def draft_seconds(self, requests: int, context_tokens: int) -> float: ...


@dataclass(frozen=True)
class Limits:
    """What the server was started with: --max-num-seqs, --num-slots, --max-num-batched-tokens, --max-waiting."""

    max_num_seqs: int = 32
    num_slots: int = 65536
    max_num_batched_tokens: int = 512
    max_waiting: int = 256


@dataclass(frozen=True)
class Mix:
    """Requests as they come.

    prompt_tokens, output_tokens  of a request, on average
    by_load  (requests decoded together, tokens per target pass of each, draft tokens read in it), rising
    spread   passes of equally many requests relative to the average one
    """

    prompt_tokens: float
    output_tokens: float
    by_load: tuple[tuple[float, float, float], ...]
    spread: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        if self.prompt_tokens < 1 or self.output_tokens < 1:
            raise InvalidRequest(
                "requests need prompts and outputs of 1 token or more; "
                f"got {self.prompt_tokens:g} and {self.output_tokens:g} on average"
            )
        if not self.by_load or min(tau for _, tau, _ in self.by_load) < 1:
            taus = ", ".join(f"{tau:g}" for _, tau, _ in self.by_load)
            raise InvalidRequest(f"tokens per target pass (tau) are 1 or more; got {taus or 'none'}")

    @classmethod
    def of_metrics(cls, values: Mapping[str, float]) -> Mix | None:
        """From the series of `/metrics` (`monitor.snapshot.read`); None until a request has finished."""
        prompts, outputs = (
            values.get(f"dspark_request_{kind}_tokens_sum", 0.0)
            / max(1.0, values.get(f"dspark_request_{kind}_tokens_count", 0.0))
            for kind in ("prompt", "generation")
        )
        by_load = tuple(_by_load(values))
        if not (prompts and outputs and by_load):
            return None
        return cls(prompts, outputs, by_load, _spread(values))

    def at(self, num_requests: NDArray[np.int64]) -> tuple[Floats, Floats]:
        """([N] tokens per pass, [N] draft tokens read in it) with so many decoded together; flat beyond what was seen."""
        loads, tau, verified = np.array(self.by_load).T
        where = np.log(num_requests)
        return np.interp(where, np.log(loads), tau), np.interp(where, np.log(loads), verified)


def make_replica(cost: Cost, mix: Mix, limits: Limits) -> Replica:
    """A server with this cost under this mix. KV limits how many requests it decodes together if their tokens do."""
    most = kv_requests(mix, limits)
    n = np.unique(np.rint(np.geomspace(1, most, _SAMPLED))).astype(np.int64)  # straight lines between them
    tau, verified = mix.at(n)
    read = np.rint(n * (1 + verified)).astype(np.int64)
    context = np.rint(n * _context(mix)).astype(np.int64)
    chunks = math.ceil(mix.prompt_tokens / limits.max_num_batched_tokens)
    chunk = math.ceil(mix.prompt_tokens / chunks)
    decode, prompt, draft = np.empty(len(n)), np.empty(len(n)), np.empty(len(n))
    for i, requests in enumerate(n.tolist()):
        (decode[i],) = cost.seconds(read[i : i + 1], requests, int(context[i]))
        (reading,) = cost.seconds(read[i : i + 1] + chunk, requests + 1, int(context[i]), is_reading=True)
        prompt[i] = chunks * max(0.0, reading - decode[i])
        draft[i] = cost.draft_seconds(requests, int(context[i])) if verified[i] > 0 else 0.0
    passes = (mix.output_tokens - 1) / tau + 1e-9

    def everywhere(sampled: Floats) -> Floats:
        return np.interp(np.arange(1, most + 1), n, sampled)

    return Replica(
        pass_seconds=everywhere(decode + draft),
        passes=everywhere(passes),
        prompt_seconds=everywhere(prompt),
        output_tokens=mix.output_tokens,
        prompt_passes=chunks,
        max_waiting=limits.max_waiting,
        spread=mix.spread,
    )


def kv_requests(mix: Mix, limits: Limits) -> int:
    """Requests decoded together at most: the limit of the engine, or what whole requests leave of the KV cache."""
    by_slots = int(limits.num_slots // (mix.prompt_tokens + mix.output_tokens + 1 + max(v for _, _, v in mix.by_load)))
    if by_slots < 1:
        raise InvalidRequest(
            f"{limits.num_slots} KV slots hold no request of {mix.prompt_tokens + mix.output_tokens:.0f} tokens"
        )
    return min(limits.max_num_seqs, by_slots)


@dataclass(frozen=True)
class Plan:
    """What one server holds, and how much of that is in use at `rate`.

    highest_rate       requests per second at which `share` of them still keep each objective
    saturation         requests per second at which the queue grows without end
    limited_by         the objective that gives way first: ttft or per_token
    max_decoding       requests decoded together at most; whole ones must fit into the KV cache
    kv_usage           share of the KV slots in use at `highest_rate`, on average
    kv_full_rate       requests per second at which the requests that KV has room for are 95 % there; None: there is
                       room for as many as are decoded together
    The rest is at `highest_rate`: requests decoded together, tokens per pass, draft tokens read in it, mean latencies.
    """

    highest_rate: float
    saturation: float
    limited_by: str
    max_decoding: int
    kv_usage: float
    kv_full_rate: float | None
    running: float
    tau: float
    verified: float
    per_token_seconds: float
    ttft_seconds: float

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def make_plan(replica: Replica, mix: Mix, limits: Limits, objectives: Objectives, share: float = 0.99) -> Plan:
    """The highest rate within the objectives, and what the server (`make_replica` of the same) is like at it."""
    each = objectives.ttft_seconds, objectives.per_token_seconds
    highest = replica.highest_rate(*each, share)
    least = 1e-6 * replica.saturation
    service, beyond = replica.at(max(highest, least), *each), replica.at(max(1.02 * highest, least), *each)
    kept = {"ttft": beyond.ttft_kept, "per_token": beyond.per_token_kept}
    max_decoding = len(replica.pass_seconds)
    (tau,), (verified,) = mix.at(np.array([max(1, round(service.running))]))
    return Plan(
        highest_rate=highest,
        saturation=replica.saturation,
        limited_by=min(kept, key=lambda name: kept[name]),
        max_decoding=max_decoding,
        kv_usage=service.running * _context(mix) / limits.num_slots,
        kv_full_rate=_kv_full_rate(replica, limits),
        running=service.running,
        tau=float(tau),
        verified=float(verified),
        per_token_seconds=service.per_token_seconds,
        ttft_seconds=service.ttft_seconds,
    )


class Outlook:
    """The plan of a running server. `step` belongs to the thread that steps the engine, since it reads the curve that the
    engine is refining; the rest is done when somebody asks, on any thread. Empty until a request has finished.
    """

    def __init__(
        self, cost: Cost, limits: Limits, objectives: Objectives, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._cost, self._limits, self._objectives, self._clock = cost, limits, objectives, clock
        self._due = -math.inf
        self._known: tuple[Replica, Mix] | None = None
        self._planned: tuple[Replica, dict[str, Any]] | None = None

    def step(self, metrics: Metrics) -> None:
        """Between two steps of the engine: renew what is known of the traffic, if it is time."""
        now = self._clock()
        if now < self._due:
            return
        mix = Mix.of_metrics(read(metrics))
        self._due = now + (_LOOKED_SECONDS if mix is None else _RENEWED_SECONDS)
        if mix is not None:
            self._known = make_replica(self._cost, mix, self._limits), mix

    def __call__(self) -> dict[str, Any]:
        known, planned = self._known, self._planned
        if known is None:
            return {}
        replica, mix = known
        if planned is None or planned[0] is not replica:
            self._planned = planned = replica, make_plan(replica, mix, self._limits, self._objectives).as_json()
        return planned[1]


def _context(mix: Mix) -> float:
    """Tokens in the cache of a request, on average over the time it is decoded."""
    return mix.prompt_tokens + mix.output_tokens / 2


# KV is full where the requests that it has room for are all there, so that others wait for their slots.
def _kv_full_rate(replica: Replica, limits: Limits) -> float | None:
    if len(replica.pass_seconds) >= limits.max_num_seqs:
        return None
    low, high = 0.0, replica.saturation
    for _ in range(30):
        middle = (low + high) / 2
        running = replica.at(middle, math.inf, math.inf).running
        low, high = (low, middle) if running > 0.95 * len(replica.pass_seconds) else (middle, high)
    return high


def _by_load(values: Mapping[str, float]) -> list[tuple[float, float, float]]:
    rows, below = [], 0
    for load in LOADS:
        passes = values.get(f"dspark_load_passes_total|{load}", 0.0)
        if passes:
            committed = values[f"dspark_load_committed_tokens_total|{load}"] / passes
            verified = values[f"dspark_load_verified_tokens_total|{load}"] / passes
            rows.append((math.sqrt((below + 1) * load), max(1.0, committed), verified))
        below = load
    return rows


def _spread(values: Mapping[str, float]) -> tuple[float, ...]:
    taus = [percentile(values, "dspark_request_tau", (i + 0.5) / _SPREAD) for i in range(_SPREAD)]
    if any(math.isnan(tau) for tau in taus):
        return (1.0,)
    passes = np.array([1 / max(1.0, tau) for tau in taus])
    return tuple((passes / passes.mean()).tolist())
