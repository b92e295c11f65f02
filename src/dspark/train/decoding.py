"""Validation by what counts: held-out prompts decoded by the engine with the drafter as it would be loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dspark.drafters.loading import load_drafter
from dspark.engine.engine import Engine
from dspark.target.target import Target
from dspark.train.acceptance import Outcome
from dspark.train.distributed import gathered, join
from dspark.types import SamplingParams


@dataclass(frozen=True)
class Decoding:
    """How to decode: under the coupled rule the same seeds give the same text every time, so drafters are compared on
    equal texts and the difference of two measurements has less noise than each."""

    max_new: int = 128
    temperature: float = 1.0
    batch: int = 32


def decode(folder: Path, target: Target, prompts: Sequence[list[int]], settings: Decoding) -> Outcome:
    """All rounds of the drafter in `folder` over prompts (token ids). Every process takes its share of them."""
    rank, num_processes = join()
    drafter = load_drafter(folder, target)
    # Drafted always and verified whole: what is measured is the drafter, not what this machine makes of it.
    whole = f"fixed:{drafter.length}"
    engine = Engine(target, drafter, whole, max_num_seqs=settings.batch, max_num_batched_tokens=2048)
    own = [
        (place, prompt)
        for place, prompt in enumerate(prompts)
        if place % num_processes == rank and len(prompt) < engine.max_length
    ]
    params = [
        SamplingParams(temperature=settings.temperature, max_tokens=settings.max_new, seed=place) for place, _ in own
    ]
    generations = engine.generate([prompt for _, prompt in own], params) if own else []
    found = [(place, [r.accepted for r in g.rounds]) for (place, _), g in zip(own, generations, strict=True)]
    rounds = [accepted for _, accepted in sorted(pair for part in gathered(found) for pair in part) if accepted]
    return Outcome(rounds, drafter.length)
