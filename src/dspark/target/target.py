"""The target: any transformers causal LM over a slot cache. It reads spans, gives logits, knows of no speculation."""

from __future__ import annotations

import copy
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dspark.errors import InvalidConfiguration
from dspark.gradients import without_gradients
from dspark.target import attention, kernels, native
from dspark.target.captured import CapturedForward, GraphRecorder, Outputs, Recorder
from dspark.target.compiled import CompiledForward
from dspark.target.kv_cache import KVCache
from dspark.target.lone_chain import LoneChains
from dspark.target.modules import captured_outputs, decoder_layers, shared_kv_sources, with_layers
from dspark.target.plan import SHORT, Plan, View, in_short_pieces, make_plan, move, read_spans, refuse_trees
from dspark.types import Span

_log = logging.getLogger(__name__)

_DEFAULT_SLOTS = 65536  # a cap, not memory: storage grows with use
_SHARE_OF_CACHE = 0.8  # of the device's free memory at most; the rest is for drafters and what forwards need meanwhile


@dataclass(frozen=True)
class Extension:
    """What one forward gave.

    logits    [R, V]  spans in order, of each the last `num_logits` tokens
    features  [T, F]  of every token, the wanted layers side by side; None when none were wanted
    """

    logits: Tensor
    features: Tensor | None


class Target:
    """A causal LM whose requests share one slot cache.

    name            for people
    max_length      tokens that one request may have
    end_token_ids   tokens after which the model has nothing more to say
    view            what spans see of their requests; None: everything
    is_deterministic  logits have the same bits whatever is computed together (target/deterministic.py)
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        name: str = "target",
        cache: KVCache | None = None,
        num_layers: int | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.name = name
        self.config = model.config.get_text_config(decoder=True)
        self.layers = decoder_layers(model, num_layers or self.config.num_hidden_layers)
        self.num_layers = len(self.layers)
        self.cache = KVCache(_DEFAULT_SLOTS) if cache is None else cache
        self.cache.shared.update(shared_kv_sources(self.layers))
        self.windows: set[int] = set()  # sliding windows that layers asked for so far
        self.max_length = _max_length(self.config)
        self.end_token_ids = _end_token_ids(model, tokenizer)
        self.num_parameters = sum(parameter.numel() for parameter in model.parameters())
        self.is_deterministic = False
        self.view: View | None = None
        # By feature layers: what runs short forwards instead of transformers' own way.
        self._compiled: dict[tuple[int, ...], CompiledForward | CapturedForward] = {}
        self._recorder: Recorder | None = None
        self._lone_chains = LoneChains()
        self.turn = threading.RLock()  # engines that share it, and threads that share an engine, step one at a time
        if self.device.type == "cuda":
            kernels.load_triton(self.device)
        model.eval()
        model.set_attn_implementation(attention.NAME)

    def __repr__(self) -> str:
        size = f"{self.num_parameters:,} parameters"
        return f"Target({self.name}: {type(self.model).__name__}, {size}, {str(self.dtype)[6:]} on {self.device})"

    @cached_property
    def vocab_size(self) -> int:
        """Columns of the logits; a tokenizer may know fewer tokens."""
        return int(self.model.get_output_embeddings().weight.shape[0])

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states, and of one layer of features."""
        return int(self.config.hidden_size)

    @cached_property
    def dtype(self) -> torch.dtype:
        """Of the weights, and of keys and values."""
        return self.model.get_input_embeddings().weight.dtype

    @cached_property  # asked for many times a step
    def device(self) -> torch.device:
        """Where weights and cache are."""
        return self.model.get_input_embeddings().weight.device

    @property
    def num_free_slots(self) -> int:
        """Tokens that the cache still has room for."""
        return self.cache.num_free_slots

    @without_gradients
    def extend(
        self, spans: Sequence[Span], feature_layers: tuple[int, ...] = (), token_ids: Tensor | None = None
    ) -> Extension:
        """Append each span to its request's cached prefix in one forward.

        feature_layers are 0-based decoder layers whose raw output is wanted (before the final norm); -1 is what the
        first layer reads. token_ids [T]: of all spans, where the device knows them and the host does not yet; what the
        spans say is then only how many. Every span must start where its request's cache ends, a request may occur once. When it
        raises (OutOfSlots, an interrupt), the cache is as before.
        """
        write = self._reserve(spans)
        try:
            compiled = self._compiled_for(feature_layers)
            pieces = in_short_pieces(spans) if self._reads_in_pieces(spans, compiled is not None) else spans
            plan, inputs = self._lay_out(pieces, write, compiled is not None)
            plan.in_fixed_order = self.is_deterministic
            run: Callable[..., Outputs] = partial(self._eager, feature_layers=feature_layers)
            place = self.device
            if compiled is not None and compiled.takes(plan):
                run, place = compiled, compiled.reads_on
            ids, *others = move(plan, inputs, place)
            logits, features = run(ids if token_ids is None else token_ids, *others, plan)
            return Extension(logits, features if feature_layers else None)
        except BaseException:
            for span in spans:
                self.cache.keep(span.request_id, span.start, ())
            raise

    def _compiled_for(self, feature_layers: tuple[int, ...]) -> CompiledForward | CapturedForward | None:
        """The graphs that give these features. Who wants none, as a plain engine beside one that drafts, takes what there is
        and leaves them."""
        if feature_layers in self._compiled or feature_layers:
            return self._compiled.get(feature_layers)
        return next(iter(self._compiled.values()), None)

    def _eager(
        self, token_ids: Tensor, positions: Tensor, logit_rows: Tensor, plan: Plan, feature_layers: tuple[int, ...]
    ) -> Outputs:
        with captured_outputs(self.layers, feature_layers) as captured:
            output = self.model(
                input_ids=token_ids[None],
                position_ids=positions[None],
                use_cache=False,
                logits_to_keep=logit_rows,
                plan=plan,
                kv_cache=self.cache,
            )
        self.windows.update(plan.windows)
        return output.logits[0], torch.cat(captured, -1) if feature_layers else None

    def _lay_out(
        self, spans: Sequence[Span], write: np.ndarray, for_graph: bool
    ) -> tuple[Plan, tuple[Tensor, Tensor, Tensor]]:
        """The plan, token ids [T], positions [T] and logit rows [R] on the host."""
        span = spans[0]
        if for_graph and len(spans) == 1 and span.is_chain and len(span.tokens) <= SHORT and self.view is None:
            return self._lone_chains.lay_out(span, write, self.cache.slots_of(span.request_id))
        read = read_spans(spans, write)
        plan = make_plan(spans, read, self.cache, for_graph, self.view)
        token_ids, positions, logit_rows = map(torch.from_numpy, (read.token_ids, read.positions, read.logit_rows))
        return plan, (token_ids, positions, logit_rows)

    def _reads_in_pieces(self, spans: Sequence[Span], is_compiled: bool) -> bool:
        """Whether long chains are read as short ones: in one order of sums, and on CPU by the graph that reads short ones,
        which is faster than an eager pass. Kernels for GPUs take long ones as they are."""
        if self.is_deterministic:
            refuse_trees(spans)
            return True
        return is_compiled and self.view is None and self.device.type == "cpu"

    def _reserve(self, spans: Sequence[Span]) -> np.ndarray:
        wanted: list[tuple[int, int]] = []
        for span in spans:
            length = self.cache.length(span.request_id)
            assert span.start == length, f"request {span.request_id} has {length} cached tokens, not {span.start}"
            assert len(span.tokens) > 0, "a span has at least one token"
            wanted.append((span.request_id, len(span.tokens)))
        assert len(dict(wanted)) == len(spans), "a request may have one span per forward"
        return self.cache.reserve_many(wanted)

    def compile(self, feature_layers: tuple[int, ...] = ()) -> bool:
        """Compile, ahead of time, the forwards of short spans and on CPU of all chains, prompts too; on CUDA record them too.
        Returns whether it worked.

        Takes tens of seconds, on CPU only until its graphs are on disk, and a C++ compiler (CPU) or Triton (GPU).
        feature_layers as they will be asked for; forwards that want others run eagerly, those that want none take what
        there is. Later changes of the weights are not seen. The cache must be empty.
        """
        if feature_layers in self._compiled:
            return True
        if self.is_deterministic:
            raise InvalidConfiguration(
                "a deterministic target runs uncompiled: its graphs for one token and for several would round "
                "differently; leave out one of deterministic and compile"
            )
        assert not self.cache.request_ids, "compile before the first request"
        start = time.perf_counter()
        if self.device.type == "cpu":
            native.load()
        try:
            self.extend([Span(-1, 0, (0, 0, 0))], feature_layers)
            if self.device.type == "cuda":
                kernels.tune(self.config.num_attention_heads, self.cache.storage.values())
            forward = CompiledForward(self.model, self.layers, self.cache, feature_layers)
            self._compiled[feature_layers] = forward
            self._warm_up(forward)
        except RuntimeError as error:  # the compiler's own errors all derive from it
            self._compiled.pop(feature_layers, None)
            reason = str(error).strip().splitlines() or [type(error).__name__]
            _log.warning("%s runs uncompiled: %s", self.name, reason[0])
        finally:
            for request in self.cache.request_ids:
                self.release(request)
        _log.info("compiling %s took %.1f s", self.name, time.perf_counter() - start)
        if self.device.type == "cuda":
            self._settle_cache()
            self._recorder = self._recorder or GraphRecorder(self.device)
            self.capture(self._recorder, feature_layers)
        return feature_layers in self._compiled

    def fit_cache(self) -> None:
        """Cap the cache at what the device has memory for; on CUDA, once a forward has shown what a slot takes."""
        if self.device.type != "cuda" or not self.cache.storage:
            return
        limit, free = self.cache.limit, torch.cuda.mem_get_info(self.device)[0]
        fitting = int(_SHARE_OF_CACHE * free / self.cache.bytes_per_slot)
        if 1 <= fitting < limit:
            self.resize(fitting)
            found = (self.name, fitting, limit, free / 2**30)
            _log.warning("the cache of %s holds %d tokens at most, not %d: %.1f GB of memory are free", *found)

    def _settle_cache(self) -> None:
        """Let the cache have all its memory on CUDA, if there is plenty: recordings are lost when its tensors move."""
        if self.cache.num_allocated == self.cache.limit:
            return
        num_bytes = self.cache.bytes_per_slot * self.cache.limit
        free = torch.cuda.mem_get_info(self.device)[0]
        if num_bytes < free / 2:
            self.cache.allocate()
            return
        _log.warning(
            "the cache of %s grows with use, and steps are recorded anew whenever it does: all its %d slots would take %.1f "
            "of %.1f GB that are free; ask for fewer",
            *(self.name, self.cache.limit, num_bytes / 2**30, free / 2**30),
        )

    def capture(self, record: Recorder, feature_layers: tuple[int, ...] = ()) -> None:
        """Record short forwards at each size's first use and replay them from then on: compiled ones where they are."""
        forward = self._compiled.get(feature_layers) or partial(self._eager, feature_layers=feature_layers)
        assert not isinstance(forward, CapturedForward), "recorded already"
        self._compiled[feature_layers] = CapturedForward(forward, self.cache, self.device, record)

    def _warm_up(self, forward: CompiledForward) -> None:
        """Run each graph once, with sizes that all differ: equal ones would be taken for the same."""
        feature_layers = forward.feature_layers
        self.extend([Span(-1, 3, (0,), num_logits=1)], feature_layers)
        self.extend([Span(-1, 4, (0,) * 5, num_logits=3)], feature_layers)
        for request, length in ((-2, 8), (-3, 13)):
            self.extend([Span(request, 0, (0,) * length)], feature_layers)
        spans = [Span(-1, 9, (0,) * 6, num_logits=2), Span(-2, 8, (0,) * 3, num_logits=2), Span(-3, 13, (0,) * 2)]
        self.extend(spans, feature_layers)
        # How many threads share a loop is compiled in, by the numbers that it meets first: in a small step it is one.
        before, read = 24, 270
        has_room = before + read <= min(self.max_length, self.cache.limit)
        if has_room and forward.shares_weights and torch.get_num_threads() > 1:
            forward.shares_reading = True
            for request in self.cache.request_ids:
                self.release(request)
            self.extend([Span(-4, 0, (0,) * before)], feature_layers)
            self.extend([Span(-4, before, (0,) * read, num_logits=4)], feature_layers)

    def keep(self, request_id: int, start: int, chosen: Sequence[int]) -> None:
        """Of the request's tokens from position `start` on keep those at `chosen` (relative to start), in order."""
        self.cache.keep(request_id, start, chosen)

    def release(self, request_id: int) -> None:
        """Forget a request. An unknown id is fine."""
        self.cache.release(request_id)

    def resize(self, num_slots: int) -> None:
        """Cap the cache at `num_slots` tokens over all requests; only while no request is in it."""
        self.cache.resize(num_slots)

    def truncated(self, num_layers: int) -> Target:
        """The same weights stopping after the first `num_layers`, final norm and head on top, over the same cache.

        All of them: itself, with its compiled forwards.
        It sees this target's requests and slots. What it appends has keys and values in the first layers only: drop
        it with keep(request_id, start, []) before this target extends the request.
        """
        if not 1 <= num_layers <= self.num_layers:
            raise InvalidConfiguration(
                f"the first {num_layers} layers were asked for; {self.name} has {self.num_layers}, so ask for 1 or more"
            )
        if num_layers == self.num_layers:
            return self
        model = with_layers(self.model, self.layers, self.layers[:num_layers])
        return Target(model, self.tokenizer, f"{self.name}[:{num_layers}]", self.cache, num_layers)

    def seeing(self, view: View) -> Target:
        """The same model over the same cache with the same compiled forwards, attending to no more than the view.

        What it appends was made from less than everything: drop it as that of `truncated`.
        """
        seeing = copy.copy(self)
        seeing.view = view
        return seeing


def _max_length(config: Any) -> int:
    """Positions the model knows; one chunk where layers attend in chunks (Llama 4), which spans cannot express."""
    length = getattr(config, "max_position_embeddings", None) or 1 << 20
    chunk = getattr(config, "attention_chunk_size", None)
    return int(min(length, chunk) if chunk else length)


def _end_token_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    ids: set[int] = set()
    generation = getattr(model, "generation_config", None)
    for source in (generation, model.config, tokenizer):
        found = getattr(source, "eos_token_id", None)
        ids.update([found] if isinstance(found, int) else found or [])
    return tuple(sorted(ids))
