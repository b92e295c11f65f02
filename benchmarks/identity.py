"""Is the fast text the same text? Counts the texts that differ from plain decoding and asks single precision why.

In float32 any difference is a bug. In bfloat16 the logits of one token depend a little on how many are computed
together, so two nearly equal tokens may change places: such a difference is *explained* if float32 logits put the two
closer together than rounding can tell apart. What follows the first difference is another text and is not compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from benchmarks.measure import Section
from dspark.noise import COUPLED, gumbel

# Each of the two runs rounds on its own. The gap between the best two logits of a bfloat16 pass was off by up to 1.1 of
# the dtype's spacing at the size of the logits (embedded target, 8 built-in prompts, every position); so twice that.
_SPACINGS = 2.0

# (token ids read so far, first token, other token, temperature, seed) -> (gap, size of the logits), in float32
GapOf = Callable[[Sequence[int], int, int, float, int], tuple[float, float]]


@dataclass(frozen=True)
class Identity:
    """Texts of one contender against those of plain decoding."""

    contender: str
    num_identical: int
    num_texts: int
    num_explained: int
    widest_gap: float | None  # of the differing ones, in logits

    @property
    def num_unexplained(self) -> int:
        return self.num_texts - self.num_identical - self.num_explained


def compare(section: Section, contender: str, reference: str, dtype: str, gap_of: GapOf | None) -> Identity:
    """First repeat only. Without `gap_of`, no difference is explained."""
    expected = {s.group: s.run for s in section.of(reference) if s.repeat == 0}
    num_identical = num_texts = num_explained = 0
    widest: float | None = None
    for sample in section.of(contender):
        if sample.repeat or sample.group not in expected:
            continue
        plain = expected[sample.group]
        seeds = plain.seeds or [0] * len(plain.token_ids)
        for prompt, want, got, seed in zip(
            section.groups[sample.group], plain.token_ids, sample.run.token_ids, seeds, strict=True
        ):
            num_texts += 1
            at = first_difference(want, got)
            if at is None:
                num_identical += 1
            elif gap_of is not None:
                gap, size = gap_of([*prompt.token_ids, *want[:at]], want[at], got[at], section.temperature, seed)
                widest = gap if widest is None else max(widest, gap)
                num_explained += gap <= tolerance(dtype, size, section.temperature)
    return Identity(contender, num_identical, num_texts, num_explained, widest)


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), None)


def tolerance(dtype: str, size: float, temperature: float) -> float:
    """The gap that rounding in the dtype can close, in logits over temperature. Nothing is excused in float32."""
    if dtype == "float32":
        return 0.0
    return _SPACINGS * torch.finfo(getattr(torch, dtype)).eps * size / (temperature or 1.0)


def gap_by_model(model: torch.nn.Module) -> GapOf:
    """model: the target in float32. Above temperature 0 the coupled rule adds its noise to both tokens."""

    @torch.inference_mode()
    def gap_of(context: Sequence[int], first: int, other: int, temperature: float, seed: int) -> tuple[float, float]:
        logits = model(torch.tensor([list(context)])).logits[0, -1].float()
        scores = logits
        if temperature > 0:
            noise = gumbel(seed, len(context), 1, len(logits), COUPLED, logits.device)[0]
            scores = logits / temperature + noise
        return abs(float(scores[first] - scores[other])), float(logits.abs().max())

    return gap_of
