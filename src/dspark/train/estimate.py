"""What a run will cost and bring, before it is run: `dspark train --dry-run`."""

from __future__ import annotations

import math
import resource
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from dspark.losses import CHUNK_ROWS
from dspark.train.cache import cache_size
from dspark.train.run_log import time_left

if TYPE_CHECKING:
    from dspark.train.student import Student
    from dspark.train.trainer import Trainer

# The DSpark drafter of the embedded pair's first target, of 8 layers: positions learned from, and tau estimated from the
# losses on held-out texts. Its steps learned from 8.54 M / 2,600 positions each.
_POSITIONS_PER_STEP = 8.54e6 / 2600
_CURVE = ((400, 2.18), (1200, 2.62), (2000, 2.86), (2600, 2.98), (4100, 3.12))
# Decoding gave 2.45 where the estimate was 2.98, and 2.52 where it was 3.12: 0.72 of what is above 1.
_DECODED_SHARE = ((2.45 - 1) / (2.98 - 1) + (2.52 - 1) / (3.12 - 1)) / 2
# At equal training: DFlash without heads 2.10, code 2.27, math 2.66, against a mean of 2.45. As shares of tau - 1.
_LOW, _HIGH = (2.10 - 1) / (2.45 - 1), (2.66 - 1) / (2.45 - 1)


@dataclass(frozen=True)
class ExpectedTau:
    """tau at temperature 1 and the range that this project's own domains and drafters span."""

    tau: float
    low: float
    high: float
    is_beyond_curve: bool


def expected_tau(num_positions: float) -> ExpectedTau:
    """From the embedded pair's learning curve, linear in the logarithm of the positions learned from; flat after its end."""
    points = [(math.log(step * _POSITIONS_PER_STEP), (tau - 1) * _DECODED_SHARE) for step, tau in _CURVE]
    x = math.log(max(1.0, num_positions))
    (x0, y0), (x1, y1) = points[0], points[1]
    for left, right in pairwise(points):
        if x >= left[0]:
            (x0, y0), (x1, y1) = left, right
    gain = min(max(0.0, y0 + (y1 - y0) * (x - x0) / (x1 - x0)), points[-1][1])
    is_beyond = x > points[-1][0] or x < points[0][0]
    return ExpectedTau(1 + gain, 1 + _LOW * gain, 1 + _HIGH * gain, is_beyond)


@dataclass(frozen=True)
class Measured:
    """Of a few real steps. bytes: the process's peak on a CPU, the allocator's on a GPU."""

    seconds_per_step: float
    tokens_per_step: float
    positions_per_step: float
    peak_bytes: int


def measure(trainer: Trainer, num_steps: int = 4) -> Measured:
    """Run steps without writing anything; the first one is not counted."""
    stream, seconds = trainer.stream(), []
    is_cuda = trainer.target.device.type == "cuda"
    for _ in range(num_steps + 1):
        started = time.perf_counter()
        trainer.step(stream)
        if is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    unit = 1 if sys.platform == "darwin" else 1024  # what ru_maxrss counts
    peak = torch.cuda.max_memory_allocated() if is_cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    steps = trainer.progress["step"]
    return Measured(
        statistics.median(seconds[1:]), trainer.progress["tokens"] / steps, trainer.progress["positions"] / steps, peak
    )


def estimate(trainer: Trainer) -> Iterator[str]:
    """Lines to print."""
    settings, plan = trainer.settings, trainer.plan
    num_tokens = sum(map(len, trainer.train_texts))
    yield f"texts: {len(plan.texts):,}, {num_tokens:,} tokens to train on, {len(trainer.validation_texts)} texts held out"
    for student in trainer.students:
        yield from _sizes(student)
    config = trainer.target.config
    size = cache_size(
        plan.texts, len(trainer.online.layer_ids) * config.hidden_size, config.hidden_size, trainer.target.dtype
    )
    on_disk = _size(size.num_bytes)
    yield f"traces: {size.bytes_per_token} bytes per token of the target's states; --cache would take {on_disk} of disk"
    yield from _loss_bytes(trainer)
    measured = measure(trainer)
    speed = measured.tokens_per_step / measured.seconds_per_step
    yield (
        f"measured: {measured.seconds_per_step:.3g} s per step of {measured.tokens_per_step:.0f} tokens "
        f"({speed:.0f} tokens/s), peak memory {_size(measured.peak_bytes)}, target included"
    )
    passes = settings.steps * measured.tokens_per_step / num_tokens
    yield (
        f"whole run: {settings.steps} steps, {time_left(settings.steps * measured.seconds_per_step)} without "
        f"validation, {passes:.1f} passes over the texts"
    )
    expected = expected_tau(settings.steps * measured.positions_per_step)
    yield (
        f"tau to expect at temperature 1: about {expected.tau:.1f} ({expected.low:.1f} to {expected.high:.1f} over the "
        "domains and drafters of the embedded pair)"
        + (", beyond what was measured there" if expected.is_beyond_curve else "")
        + ". This comes from one small target; validation will tell what yours does"
    )


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.3g} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.3g} MB"


def _sizes(student: Student) -> Iterator[str]:
    trained = sum(p.numel() for p in student.model.parameters() if p.requires_grad)
    matrices = sum(p.numel() for o in student.optimizers[1:] for g in o.param_groups for p in g["params"])
    # weights, gradient and running mean of 4 bytes each; AdamW keeps two more, Muon one
    state = 12 * trained + 8 * (trained - matrices) + 4 * matrices
    yield (
        f"{student.recipe.name}: {trained:,} parameters (embedding and head are the target's), "
        f"{_size(state)} for weights, gradients, running mean and optimiser"
    )


def _loss_bytes(trainer: Trainer) -> Iterator[str]:
    """The largest vocabulary-wide tensors: a chunk of rows at a time, whatever the number of anchors."""
    vocab = trainer.target.vocab_size
    for student in trainer.students:
        rows = trainer.settings.anchors_per_batch * student.recipe.config.block_size
        dense = rows * vocab * 4
        yield (
            f"{student.recipe.name}: the loss takes {_size(CHUNK_ROWS * vocab * 4)} per tensor of {CHUNK_ROWS} rows x "
            f"vocabulary; all {rows:,} rows at once would take {_size(dense)}, five times over"
        )
