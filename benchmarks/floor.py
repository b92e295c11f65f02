"""How fast it could be at best: bytes that must be read, over how fast this memory copies."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dspark.drafters.block import BlockDrafter
from dspark.target.target import Target


@dataclass(frozen=True)
class Floor:
    """Seconds below which no step can go: every weight once, every cached key and value once, nothing else.

    target, drafter      bytes of weights that a pass reads; the drafter's contain the target's head, which it uses
    per_token            bytes of keys and values of one cached token, in the target
    draft_per_token      and in the drafter
    bytes_per_second     read and written together, by a copy
    """

    target: int
    drafter: int
    per_token: int
    draft_per_token: int
    bytes_per_second: float

    def step(self, context_tokens: int) -> float:
        """Seconds of a target pass over so many cached tokens, all requests together."""
        return (self.target + self.per_token * context_tokens) / self.bytes_per_second

    def draft(self, context_tokens: int) -> float:
        return (self.drafter + self.draft_per_token * context_tokens) / self.bytes_per_second


def floor_of(target: Target, drafter: BlockDrafter, bytes_per_second: float) -> Floor:
    head = target.model.get_output_embeddings()
    model = drafter.model
    looked_up = [] if model.head.markov_w2 is None else [model.markov_head.markov_w1.weight]
    return Floor(
        target=weight_bytes(target.model, target.model.get_input_embeddings(), head),
        drafter=num_bytes(*model.parameters()) - num_bytes(*looked_up) + num_bytes(head.weight),
        per_token=key_value_bytes(target.config, target.num_layers, target.dtype),
        draft_per_token=key_value_bytes(model.config, model.config.num_hidden_layers, drafter.dtype),
        bytes_per_second=bytes_per_second,
    )


def weight_bytes(model: nn.Module, embedding: nn.Module, head: nn.Module) -> int:
    """Of what a pass multiplies: of an embedding that is not the head too, only a few rows are read."""
    whole = num_bytes(*model.parameters())
    return whole if embedding.weight is head.weight else whole - num_bytes(embedding.weight)


def num_bytes(*tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def key_value_bytes(config: Any, num_layers: int, dtype: torch.dtype) -> int:
    """Of one token in all layers."""
    return 2 * num_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize


def copy_bandwidth(device: torch.device, num_bytes: int | None = None, repeats: int = 10) -> float:
    """Bytes per second, read and written, of the fastest of some large copies."""
    size = num_bytes or (1 << 30 if device.type == "cuda" else 1 << 28)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    copy = torch.empty_like(source)
    return 2 * size / min(seconds_of(lambda: copy.copy_(source), device, repeats))


def seconds_of(call: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    """Of each call, all its kernels included. On one CPU thread, of that thread: others on the core do not count."""
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.thread_time if alone else time.perf_counter
    taken = []
    for _ in range(repeats):
        synchronize(device)
        begin = clock()
        call()
        synchronize(device)
        taken.append(clock() - begin)
    return taken


def busy_share(call: Callable[[], object], device: torch.device, repeats: int) -> float | None:
    """How much of the time kernels run, by the profiler, which slows the host a little; None where there is none."""
    if device.type != "cuda":
        return None
    synchronize(device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        begin = time.perf_counter()
        for _ in range(repeats):
            call()
        synchronize(device)
        taken = time.perf_counter() - begin
    return sum(event.self_device_time_total for event in profile.key_averages()) / 1e6 / taken


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
