"""The fast path: a forward whose spans are all short, as one compiled graph over the same attention.

Worth it where a forward is small: on CPU an eager step of a 7 M parameter model is mostly Python. Four graphs, chosen
by shape before the call: one token; one request with several tokens; several requests; and the same with so many tokens
that on CPU all threads take part in everything. Within each all sizes are dynamic, so nothing is compiled again while
requests come and go. On CPU the weights are packed once for all of them, and later changes are not seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dspark.target.direct import Direct
from dspark.target.kept_graphs import kept_graphs
from dspark.target.kv_cache import KVCache
from dspark.target.linears import with_packed_linears
from dspark.target.modules import capture_outputs, decoder_layers, with_layers, with_own_hooks
from dspark.target.plan import Group, Plan, Visibility

_MOMENT = 16384  # numbers worth another thread: threads wait for each other for longer than a few thousand take
_LONG_MOMENT = 2048  # where tokens are many, and the products between wake all threads anyway
_LONG = 128  # tokens
_ALONE, _SPAN, _MANY, _READING = "one token", "one request", "many requests", "prompts"


class _Storage:
    """The part of KVCache that attention sees, over tensors that are inputs of the graph."""

    def __init__(self, layers: Sequence[int], pairs: Sequence[tuple[Tensor, Tensor]], shared: dict[int, int]) -> None:
        self.pairs = dict(zip(layers, pairs, strict=True))
        self.shared = shared

    def tensors(self, layer: int, _keys: Tensor, _values: Tensor) -> tuple[Tensor, Tensor]:
        return self.pairs[layer]


class CompiledForward:
    """Logits and features of short forwards through compiled graphs, each compiled at its first use.

    feature_layers are outputs of the graphs. Every layer must have its storage in the cache already.

    shares_reading  whether many tokens at a time have the graph of their own. It is to be made ahead of time: no prompt
                    should have to wait for it
    """

    def __init__(
        self, model: nn.Module, layers: nn.ModuleList, cache: KVCache, feature_layers: tuple[int, ...]
    ) -> None:
        self.feature_layers = feature_layers
        self.reads_on = next(model.parameters()).device  # where inputs have to be
        self._cache = cache
        self._captured: list[Any] = [None] * len(feature_layers)
        packed = with_packed_linears(model)
        self.shares_weights = packed is not model  # or every graph has packed ones of its own
        self.shares_reading = False
        layers = decoder_layers(packed, len(layers))
        hooked = with_own_hooks(layers)
        capture_outputs(hooked, feature_layers, self._captured)
        self._model: Any = with_layers(packed, layers, hooked)
        self._storage_of = tuple(cache.storage)
        self._pairs: list[tuple[Tensor, Tensor]] = []  # of these layers, as they were when the cache last moved
        self._num_moves = -1
        self._kept = kept_graphs({"model": self._model}, getattr(model, "config", None), feature_layers, cache.shared)
        self._graphs: dict[str, Direct] = {}

    def takes(self, plan: Plan) -> bool:
        """Whether there is a graph for this forward."""
        return plan.is_for_graph

    def __call__(
        self, token_ids: Tensor, positions: Tensor, logit_rows: Tensor, plan: Plan
    ) -> tuple[Tensor, Tensor | None]:
        """token_ids [T], positions [T], logit_rows [R] -> logits [R, V], features [T, F]."""
        group, visibility = plan.groups[0], plan.groups[0].visibility
        kind = _READING if self.shares_reading and _is_long(group) else _kind_of(group)
        num_rows = len(logit_rows)
        arrays: dict[str, Tensor | None] = {
            "ids": token_ids,
            "positions": positions,
            "write": plan.write,
            "logit_rows": logit_rows if num_rows > 1 or kind == _ALONE else _two(logit_rows),
            "slots": group.slots,
            "starts": visibility.starts,
            "queries": visibility.positions,
            "inside": visibility.inside,
            "firsts": visibility.firsts,
            "rows": group.rows,
            "back": group.back,
        }
        if self._num_moves != self._cache.num_moves:
            self._pairs = [self._cache.storage[layer] for layer in self._storage_of]
            self._num_moves = self._cache.num_moves
        pairs = self._pairs
        if kind in self._graphs:
            logits, features = self._graphs[kind](**arrays, pairs=pairs)
        else:
            self._graphs[kind] = self._compile(kind)
            # Inputs of their own: a graph should know nothing of the buffer that they came over in.
            arrays = {name: None if array is None else array.clone() for name, array in arrays.items()}
            _mark_sizes(kind, arrays, pairs)
            with frozen_weights(plan.write.device, _LONG_MOMENT if kind == _READING else _MOMENT):
                logits, features = self._graphs[kind](**arrays, pairs=pairs)
        return logits if len(logits) == num_rows else logits[:num_rows], features

    def _compile(self, kind: str) -> Direct:
        model, captured, storage_of = self._model, self._captured, self._storage_of
        shared, is_alone = dict(self._cache.shared), kind == _ALONE

        def step(
            ids: Tensor,
            positions: Tensor,
            write: Tensor,
            logit_rows: Tensor,
            slots: Tensor,
            starts: Tensor,
            queries: Tensor,
            inside: Tensor | None,
            firsts: Tensor,
            rows: Tensor | None,
            back: Tensor | None,
            pairs: list[tuple[Tensor, Tensor]],
        ) -> tuple[Tensor, Tensor | None]:
            for tensor in (tensor for pair in pairs for tensor in pair):  # one size instead of one for each
                torch._check(tensor.shape[0] == pairs[0][0].shape[0])
            group = Group(slots, Visibility(starts, queries, inside, slots.shape[1], firsts), rows, back)
            output = model(
                input_ids=ids[None],
                position_ids=positions[None],
                use_cache=False,
                logits_to_keep=0 if is_alone else logit_rows,
                plan=Plan(write, [group]),
                kv_cache=_Storage(storage_of, pairs, shared),
            )
            features = torch.cat(captured, -1) if captured else None
            # What is left in the list would be handed out of the graph, piece by piece.
            for place in range(len(captured)):
                captured[place] = None
            return output.logits[0].float(), features  # as sampling takes them

        return Direct(step, kind, self._kept)


def frozen_weights(device: torch.device, moment: int = _MOMENT) -> Any:
    """While a graph is compiled: on CPU, pack its weights for the kernels, join projections of one input, and call the
    kernels from C++, which spares a small step an eighth of its time. moment: numbers worth another thread.

    Its checks of every size before every kernel go: they cost as much as some kernels, and who calls is not a stranger.
    It must hold while dynamo traces, so torch.compile's own `options` come too late for it.
    """
    from torch._inductor import config

    is_cpu = device.type == "cpu"
    options: dict[str, Any] = dict.fromkeys(("freezing", "cpp.enable_concat_linear", "cpp_wrapper"), is_cpu)
    options |= {"size_asserts": not is_cpu, "cpp.min_chunk_size": moment}
    return config.patch(options)


def _two(rows: Tensor) -> Tensor:
    """Instead of one row, or of none, which would be compiled in."""
    return rows.repeat(2) if len(rows) else rows.new_zeros(2)


def _kind_of(group: Group) -> str:
    batch, num_queries = group.shape
    return _MANY if batch > 1 else _SPAN if num_queries > 1 else _ALONE


def _is_long(group: Group) -> bool:
    batch, num_queries = group.shape
    return batch > 1 and batch * num_queries >= _LONG


def _mark_sizes(kind: str, arrays: dict[str, Tensor | None], pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Tell the compiler, at a graph's first call, which sizes change from one forward to the next."""
    dynamic: dict[str, tuple[int, ...]] = {"slots": (1,)}
    if kind != _ALONE:
        dynamic |= {"ids": (0,), "positions": (0,), "write": (0,), "logit_rows": (0,), "queries": (1,)}
        dynamic |= {"inside": (1, 2)}
    if kind in (_MANY, _READING):
        dynamic |= {
            "starts": (0,),
            "firsts": (0,),
            "slots": (0, 1),
            "queries": (0, 1),
            "inside": (0, 1, 2),
            "rows": (0, 1),
        }
        dynamic |= {"back": (0,)}
    for name, sizes in dynamic.items():
        for size in sizes:
            torch._dynamo.mark_dynamic(arrays[name], size)
    for tensor in (tensor for pair in pairs for tensor in pair):
        torch._dynamo.mark_dynamic(tensor, 0)
