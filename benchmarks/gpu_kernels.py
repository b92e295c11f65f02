"""Our kernels beside torch's on the same tensors: attention over slots, and draws over the vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.floor import Floor, seconds_of
from benchmarks.gpu_sections import Say, cached
from dspark.noise import COUPLED
from dspark.sampling import KeyedDraws
from dspark.target import kernels, native
from dspark.target.attention import slot_attention
from dspark.target.plan import make_plan, move, read_spans
from dspark.target.target import Target
from dspark.types import Span


@dataclass(frozen=True)
class KernelRow:
    """Seconds of one call: our kernel, torch (for attention: gather, then scaled_dot_product_attention), the floor."""

    what: str
    requests: int
    tokens: int
    context: int
    kernel: float
    torch: float
    floor: float


@dataclass(frozen=True)
class _Layer:
    layer_idx: int = 0


def attention_rows(
    target: Target, floor: Floor, sizes: Sequence[tuple[int, int, int]], most_bytes: int, repeats: int, say: Say
) -> Iterator[KernelRow]:
    """One layer's attention; sizes: (requests, tokens of each, cached tokens of each)."""
    config, per_token = target.config, floor.per_token / target.num_layers
    for requests, each, context in sizes:
        # The gathered copy and its repeated heads come on top of the cache.
        if 2 * requests * (context + each) * floor.per_token > most_bytes or context + each > target.max_length:
            continue
        say(f"kernels: attention of {requests} x {each} tokens, context {context}")
        with cached(target, requests, context, each):
            spans = [Span(request, context, (1,) * each) for request in range(requests)]
            write = target.cache.reserve_many([(request, each) for request in range(requests)])
            plan = make_plan(spans, read_spans(spans, write), target.cache)
            move(plan, (), target.device)
            shape = (1, requests * each, config.head_dim)
            like = {"dtype": target.dtype, "device": target.device}
            q = torch.randn(1, config.num_attention_heads, *shape[1:], **like)
            k, v = (torch.randn(1, config.num_key_value_heads, *shape[1:], **like) for _ in range(2))

            def attend() -> None:
                slot_attention(_Layer(), q, k, v, None, plan=plan, kv_cache=target.cache)  # type: ignore[arg-type]  # noqa: B023

            own = _quartile(attend, target, repeats)
            with without_kernels():
                other = _quartile(attend, target, repeats)
        least = requests * context * per_token / floor.bytes_per_second
        yield KernelRow("attention", requests, requests * each, context, own, other, least)


def draw_rows(target: Target, floor: Floor, loads: Sequence[int], repeats: int, say: Say) -> Iterator[KernelRow]:
    """Tokens from logits at temperature 1 for verified drafts of 7, their noise included, which nobody has made before."""
    with_kernel, without = (KeyedDraws(target.vocab_size, target.device) for _ in range(2))
    if with_kernel._draw is None:  # on CPU
        return
    without._draw = None
    for requests in loads:
        say(f"kernels: draws for {requests} requests")
        scores = torch.randn(8 * requests, target.vocab_size, device=target.device)
        temperature = torch.ones(8 * requests, 1, device=target.device)
        seeds = [request for request in range(requests) for _ in range(8)]

        def seconds(draws: KeyedDraws) -> float:
            first = iter(range(1 << 20, 1 << 30, 64))

            def draw() -> None:
                start = next(first)
                positions = [start + k for _ in range(requests) for k in range(8)]  # noqa: B023
                draws.tokens(scores, temperature, seeds, positions, COUPLED)  # noqa: B023

            return _quartile(draw, target, repeats)

        own = seconds(with_kernel)
        least = scores.numel() * scores.element_size() / floor.bytes_per_second
        yield KernelRow("draw", requests, 8 * requests, 0, own, seconds(without), least)


def _quartile(call: Callable[[], Any], target: Target, repeats: int) -> float:
    seconds_of(call, target.device, 2)
    return sorted(seconds_of(call, target.device, repeats))[repeats // 4]


@contextmanager
def without_kernels() -> Iterator[None]:
    """As on a machine without Triton or a C++ compiler: torch attends."""
    kept = kernels.on_cuda, native.attend_slots
    kernels.on_cuda = native.attend_slots = None
    try:
        yield
    finally:
        kernels.on_cuda, native.attend_slots = kept
