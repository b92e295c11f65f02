"""Short forwards recorded once per size and replayed: on CUDA a step is one launch instead of a thousand small ones.

A recording knows addresses, not values, and never changes its sizes. So every step is padded up to powers of two and
laid out in inputs that stay where they are. Padding is tokens that write to the cache's scratch slot and requests that
see nothing else; what comes out of it is dropped.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dspark.target.kv_cache import KVCache
from dspark.target.plan import Group, Plan, Visibility

_log = logging.getLogger(__name__)

_ALIGNED = 64  # bytes: kernels are compiled anew for addresses that are less even

Outputs = tuple[Tensor, Tensor | None]
Forward = Callable[[Tensor, Tensor, Tensor, Plan], Outputs]
"""(token_ids [T], positions [T], logit_rows [R], plan) -> logits [R, V], features [T, F]"""


class Recorder(Protocol):
    """Runs a function and returns another that does the same work again, on the same tensors.

    num_bytes  that its recordings hold on to
    """

    @property
    def num_bytes(self) -> int: ...

    def __call__(self, run: Callable[[], Outputs]) -> Callable[[], Outputs]: ...


@dataclass(frozen=True)
class Limits:
    """most_tokens: larger forwards are not recorded. least_context: shorter ones share it. most_steps: recordings that
    are kept; the one that was used longest ago goes."""

    most_tokens: int = 256
    least_context: int = 256
    most_steps: int = 64


@dataclass(frozen=True)
class Size:
    """What is padded: T tokens in all, B requests, N queries of each, S keys."""

    tokens: int
    requests: int
    queries: int
    context: int

    @classmethod
    def of(cls, plan: Plan, least_context: int) -> Size:
        """The smallest that the plan fits in. One request needs no grid: its queries are the tokens."""
        (batch, num_queries), num_tokens = plan.groups[0].shape, len(plan.write)
        tokens = _power_of_two(num_tokens)
        queries = tokens if batch == 1 else _power_of_two(num_queries)
        # Queries that are padding have keys of their own after the longest request's.
        context = _power_of_two(max(plan.groups[0].slots.shape[1] + queries, least_context))
        return cls(tokens, _power_of_two(batch), queries, context)


class _Inputs:
    """The inputs of one size, where a recording finds them; laid out on the host and copied over in one go."""

    def __init__(self, size: Size, cache: KVCache, device: torch.device) -> None:
        t, b, n, s = size.tokens, size.requests, size.queries, size.context
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("ids", "positions", "write", "logit_rows", "back"), (t,))
        shapes |= dict.fromkeys(("starts", "firsts"), (b,)) | dict.fromkeys(("queries", "rows"), (b, n))
        shapes |= {"slots": (b, s), "inside": (b, n, n)}
        sizes = {name: prod(shape) * (1 if name == "inside" else 8) for name, shape in shapes.items()}
        ends = np.cumsum([-(-count // _ALIGNED) * _ALIGNED for count in sizes.values()]).tolist()
        self.size, self._scratch = size, cache.scratch
        self._on_host = torch.zeros(ends[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._on_device = torch.empty_like(self._on_host, device=device)
        self._copied: Any = torch.cuda.Event() if device.type == "cuda" else None
        self.host: dict[str, np.ndarray] = {}
        self.tensors: dict[str, Tensor] = {}
        for (name, shape), begin in zip(shapes.items(), [0, *ends], strict=False):
            dtype = torch.bool if name == "inside" else torch.int64
            part = slice(begin, begin + sizes[name])
            self.host[name] = self._on_host[part].view(dtype).view(shape).numpy()
            self.tensors[name] = self._on_device[part].view(dtype).view(shape)
        self.all_rows = torch.arange(t, device=device)

    def fill(self, token_ids: Tensor, positions: Tensor, logit_rows: Tensor, plan: Plan) -> None:
        if self._copied is not None:
            self._copied.synchronize()  # the copy of the step before may still be reading
        group, seen, num_tokens = plan.groups[0], plan.groups[0].visibility, len(plan.write)
        batch, num_queries = group.shape
        is_there = token_ids.device.type != "cpu"  # drawn by the step before, and the host has not seen them
        self._lay_out(ids=None if is_there else token_ids, positions=positions, logit_rows=logit_rows)
        self._lay_out(starts=seen.starts, rows=group.rows)
        self._lay_out(queries=seen.positions, inside=seen.inside, firsts=seen.firsts)
        inside = self.host["inside"]
        inside[batch:, :, 0] = inside[:, num_queries:, 0] = True  # a query that sees nothing has no softmax
        self._lay_out(self._scratch, write=plan.write, slots=group.slots)
        # Where keys end, torch's attention still multiplies by zero: a slot that this step writes holds numbers.
        firsts = group.slots.gather(1, seen.starts[:, None])
        self.host["slots"][:batch, group.slots.shape[1] :] = firsts.numpy()
        for grid in (self.host["rows"], self.host["queries"]):
            grid[:, num_queries:] = grid[:, :1]
        padded = np.arange(num_tokens) if group.back is None else group.back.numpy()
        self._complete(padded // num_queries * self.size.queries + padded % num_queries, batch)
        if is_there:
            self.tensors["ids"][:num_tokens].copy_(token_ids)

    def clear(self) -> None:
        """Nothing but padding."""
        self._on_host.zero_()
        self._lay_out(self._scratch, write=None, slots=None)
        self.host["inside"][:, :, 0] = True
        self._complete(np.zeros(0, dtype=np.int64), 0)

    def plan(self) -> Plan:
        """Of these tensors; a new one for each run, because a plan keeps what attention has made of it."""
        x, is_alone = self.tensors, self.size.requests == 1
        inside = None if self.size.queries == 1 else x["inside"]
        group = Group(x["slots"], Visibility(x["starts"], x["queries"], inside, self.size.context, x["firsts"]))
        if not is_alone:
            group.rows, group.back = x["rows"], x["back"]
        return Plan(x["write"], [group])

    def _lay_out(self, padding: int = 0, **values: Tensor | None) -> None:
        for name, value in values.items():
            into = self.host[name]
            into[...] = padding
            if value is not None:
                into[tuple(map(slice, value.shape))] = value.numpy()

    def _complete(self, cells: np.ndarray, num_requests: int) -> None:
        """Give tokens that are padding their places among the B * N queries, and send everything; cells [T']: taken."""
        num_tokens, back = len(cells), self.host["back"]
        back[:num_tokens] = cells
        if num_tokens < self.size.tokens:
            is_free = np.ones(self.size.requests * self.size.queries, dtype=bool)
            is_free[cells] = False
            free, first = np.flatnonzero(is_free), num_requests * self.size.queries
            # In requests that are padding first, because those have next to no keys.
            free = np.concatenate([free[free >= first], free[free < first]])[: self.size.tokens - num_tokens]
            back[num_tokens:] = free
            self.host["rows"].reshape(-1)[free] = np.arange(num_tokens, self.size.tokens)
        self._on_device.copy_(self._on_host, non_blocking=True)
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(self._on_device.device))


@dataclass(frozen=True)
class _Step:
    inputs: _Inputs
    replay: Callable[[], Outputs]


class CapturedForward:
    """Logits and features of short forwards by replaying recordings, each made at its size's first use.

    forward   what is recorded: eager or compiled. It must wait for nothing on the host
    """

    reads_on = torch.device("cpu")  # where inputs have to be

    def __init__(
        self, forward: Forward, cache: KVCache, device: torch.device, record: Recorder, limits: Limits | None = None
    ) -> None:
        self._forward, self._cache, self._device, self._record = forward, cache, device, record
        self.limits = Limits() if limits is None else limits
        self._steps: OrderedDict[Size, _Step | None] = OrderedDict()  # None: recording failed; last used last
        self._num_moves = cache.num_moves

    def takes(self, plan: Plan) -> bool:
        """Whether there is a recording for this forward; made now if its size is new."""
        if not plan.is_for_graph or len(plan.write) > self.limits.most_tokens:
            return False
        return self._step(Size.of(plan, self.limits.least_context)) is not None

    def __call__(self, token_ids: Tensor, positions: Tensor, logit_rows: Tensor, plan: Plan) -> Outputs:
        """token_ids [T], positions [T], logit_rows [R] -> logits [R, V], features [T, F], the caller's own.

        All on the host, as is the plan; token_ids may be on the device.
        """
        step = self._step(Size.of(plan, self.limits.least_context))
        assert step is not None, "ask `takes` first"
        step.inputs.fill(token_ids, positions, logit_rows, plan)
        logits, features = step.replay()
        logits = logits.index_select(0, step.inputs.tensors["logit_rows"][: len(logit_rows)])
        return logits, None if features is None else features[: len(token_ids)].clone()

    def _step(self, size: Size) -> _Step | None:
        if self._num_moves != self._cache.num_moves:  # recordings know where keys and values were
            self._steps.clear()
            self._num_moves = self._cache.num_moves
        if size not in self._steps:
            self._steps[size] = self._recorded(size)
            if len(self._steps) > self.limits.most_steps:
                self._steps.popitem(last=False)
        self._steps.move_to_end(size)
        return self._steps[size]

    def _recorded(self, size: Size) -> _Step | None:
        try:
            inputs = _Inputs(size, self._cache, self._device)
            inputs.clear()  # a rehearsal must not touch what requests own

            def run() -> Outputs:
                x = inputs.tensors
                return self._forward(x["ids"], x["positions"], inputs.all_rows, inputs.plan())

            step = _Step(inputs, self._record(run))
        except RuntimeError as error:  # out of memory, and all that CUDA refuses to record
            reason = str(error).strip().splitlines() or [type(error).__name__]
            _log.warning("%s runs unrecorded: %s", size, reason[0])
            return None
        count, megabytes = len(self._steps) + 1, self._record.num_bytes / 2**20
        _log.info("recorded %s: %d steps (at most %d), %.0f MB", size, count, self.limits.most_steps, megabytes)
        return step


class GraphRecorder:
    """Records CUDA graphs. They share one pool of memory, because they never run at once and their outputs are copied
    before the next one runs."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # memory is shared between recordings of one stream only

    @property
    def num_bytes(self) -> int:
        segments = torch.cuda.memory_snapshot()
        return sum(segment["total_size"] for segment in segments if segment["segment_pool_id"] == self._pool)

    def __call__(self, run: Callable[[], Outputs]) -> Callable[[], Outputs]:
        with torch.cuda.device(self._device):
            return self._recorded(run)

    def _recorded(self, run: Callable[[], Outputs]) -> Callable[[], Outputs]:
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for _ in range(2):  # kernels are compiled and libraries take their workspaces before recording begins
                run()
        current.wait_stream(self._stream)
        try:
            # Other threads of a server may use the device meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                outputs = run()
        finally:
            torch.cuda.set_stream(current)  # which a recording that fails does not do

        def replay() -> Outputs:
            graph.replay()
            return outputs

        return replay


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()
