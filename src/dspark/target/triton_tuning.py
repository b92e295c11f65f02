"""Times the Triton kernel for attention on the card at hand, tiling by tiling (tilings.py).

Import it only where Triton is installed; `kernels.tune` does.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.errors import TritonError

from dspark.target import tilings, triton_attention
from dspark.target.plan import SHORT
from dspark.target.tilings import Geometry, Seconds, Shape, Tiling, tiling_for

_MOST_SLOTS = 1 << 16  # more than a card's caches hold; larger shapes read some of them again


def tune(geometry: Geometry, device: torch.device) -> None:
    """Let the kernel know its fastest tilings for such layers."""
    machine = {
        "card": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "kernel": hashlib.sha256(Path(triton_attention.__file__).read_bytes()).hexdigest()[:16],
    }
    measured = partial(tilings.measure, usual_for(geometry), clock(geometry, device))
    tilings.find(geometry, machine, measured)


def usual_for(geometry: Geometry) -> Callable[[Shape], Tiling]:
    """What is taken as long as nothing has been measured."""
    bytes_per_key = max(geometry.width, geometry.value_width) * getattr(torch, geometry.dtype).itemsize
    return lambda shape: tiling_for(shape.queries, bytes_per_key)


def clock(geometry: Geometry, device: torch.device) -> Seconds:
    """Median of some calls, the card's caches emptied before each."""
    call_of = lru_cache(maxsize=1)(lambda shape: attention_of(geometry, shape, device))

    def seconds(shape: Shape, tiling: Tiling) -> float:
        try:
            call = partial(call_of(shape), tiling)
            return 1e-3 * float(triton.testing.do_bench(call, warmup=5, rep=20, return_mode="median"))
        except (TritonError, torch.OutOfMemoryError):  # its tiles do not fit, or the shape does not
            return math.inf

    return seconds


def attention_of(geometry: Geometry, shape: Shape, device: torch.device) -> Callable[[Tiling], Tensor]:
    """One call of the kernel over random slots, drafts with a mask as recorded steps have it."""
    like = {"dtype": getattr(torch, geometry.dtype), "device": device}
    batch, num_queries, num_keys = shape.sizes
    num_slots = min(batch * num_keys, _MOST_SLOTS)
    query = torch.randn(batch * num_queries, geometry.heads, geometry.width, **like)
    keys = torch.randn(num_slots, geometry.kv_heads, geometry.width, **like)
    values = torch.randn(num_slots, geometry.kv_heads, geometry.value_width, **like)
    slots = torch.randint(num_slots, (batch, num_keys), device=device)
    starts = torch.full((batch,), num_keys - num_queries, device=device)
    steps = torch.arange(num_queries, device=device)
    inside = None
    if 1 < num_queries <= SHORT:
        inside = (steps <= steps[:, None]).repeat(batch, 1, 1)
    places = (slots, starts, starts[:, None] + steps, inside, None, None)
    arguments = (query, keys, values, *places, geometry.width**-0.5, 0, 0.0, None)
    return lambda tiling: triton_attention.attend_in(tiling, *arguments)
