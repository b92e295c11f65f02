"""Is the fast text the same text? Counts the texts that differ from plain decoding and those that rounding explains."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from benchmarks.measure import Section
from dspark.monitor.identity import first_difference, gap_between, logits_by_model, tolerance
from dspark.types import Request, SamplingParams

# (token ids read so far, first token, other token, temperature, seed) -> (gap, size of the logits), in float32;
# None: no time to look it up
GapOf = Callable[[Sequence[int], int, int, float, int], tuple[float, float] | None]


@dataclass(frozen=True)
class Identity:
    """Texts of one contender against those of plain decoding."""

    contender: str
    num_identical: int
    num_texts: int
    num_explained: int
    widest_gap: float | None  # of the differing ones, in logits
    num_unjudged: int = 0  # that differ, and there was no time to see whether rounding explains it

    @property
    def num_unexplained(self) -> int:
        return self.num_texts - self.num_identical - self.num_explained - self.num_unjudged


def compare(section: Section, contender: str, reference: str, dtype: str, gap_of: GapOf | None) -> Identity:
    """First repeat only. Without `gap_of`, no difference is judged."""
    expected = {s.group: s.run for s in section.of(reference) if s.repeat == 0}
    num_identical = num_texts = num_explained = num_unjudged = 0
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
                continue
            context = [*prompt.token_ids, *want[:at]]
            judged = gap_of and gap_of(context, want[at], got[at], section.temperature, seed)
            if judged is None:
                num_unjudged += 1
                continue
            gap, size = judged
            widest = gap if widest is None else max(widest, gap)
            num_explained += gap <= tolerance(dtype, size, section.temperature)
    return Identity(contender, num_identical, num_texts, num_explained, widest, num_unjudged)


def until(deadline: float, gap_of: GapOf) -> GapOf:
    """`gap_of` while time.monotonic() is before the deadline; after it nothing is looked up."""
    return lambda *asked: gap_of(*asked) if time.monotonic() < deadline else None


def gap_by_model(model: torch.nn.Module) -> GapOf:
    """model: the target in float32. Above temperature 0 the coupled rule adds its noise to both tokens."""
    logits_of = logits_by_model(model)

    def gap_of(context: Sequence[int], first: int, other: int, temperature: float, seed: int) -> tuple[float, float]:
        logits = logits_of(context)
        request = Request(-1, list(context), SamplingParams(temperature=temperature), len(context), seed)
        return gap_between(logits, first, other, request), float(logits.abs().max())

    return gap_of
