"""From samples to what may be claimed: rates and their spread, ratios and their intervals, acceptance, step times."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, median

from benchmarks.measure import Run, Sample, Section

# Phases that run a model, by drafter. Anything else is overhead, and so is drafting without a model.
_DRAFTERS_WITHOUT_MODEL = ("none", "ngram", "suffix")


@dataclass(frozen=True)
class Ratio:
    """How many times as fast, with the 95 % interval over prompts; None from fewer than three groups of them."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Row:
    """One contender in one section: tokens per second of each repeat as median, least and most."""

    contender: str
    family: str
    rate: float
    low: float
    high: float
    by_domain: dict[str, float]
    versus: dict[str, Ratio]  # baseline -> ratio


def rows(section: Section, baselines: Sequence[str]) -> list[Row]:
    """In the order of the section. A baseline that did not take part is left out."""
    result = []
    for name, family in section.families.items():
        samples = section.of(name)
        rates = repeat_rates(samples)
        domains = sorted({s.domain for s in samples})
        result.append(
            Row(
                contender=name,
                family=family,
                rate=median(rates),
                low=min(rates),
                high=max(rates),
                by_domain={d: median(repeat_rates([s for s in samples if s.domain == d])) for d in domains},
                versus={b: ratio(samples, section.of(b)) for b in baselines if b in section.families},
            )
        )
    return result


def repeat_rates(samples: Sequence[Sample]) -> list[float]:
    """Tokens per second of each repeat: all tokens over all seconds, so that a slow prompt weighs what it costs."""
    tokens: dict[int, int] = defaultdict(int)
    seconds: dict[int, float] = defaultdict(float)
    for s in samples:
        tokens[s.repeat] += s.run.num_tokens
        seconds[s.repeat] += s.run.seconds
    return [tokens[r] / seconds[r] for r in sorted(tokens)]


def ratio(samples: Sequence[Sample], baseline: Sequence[Sample], num_resamples: int = 2_000) -> Ratio:
    """Speed against a baseline that did the same work: its seconds over these, bootstrapped over prompts.

    A group of prompts counts with its median over the repeats, which one disturbed run does not move.
    """
    own, other = _seconds_by_group(samples), _seconds_by_group(baseline)
    groups = sorted(own.keys() & other.keys())
    value = sum(other[g] for g in groups) / sum(own[g] for g in groups)
    if len(groups) < 3:
        return Ratio(value)
    dice = random.Random(0)
    resampled = []
    for _ in range(num_resamples):
        drawn = dice.choices(groups, k=len(groups))
        resampled.append(sum(other[g] for g in drawn) / sum(own[g] for g in drawn))
    resampled.sort()
    return Ratio(value, resampled[int(0.025 * num_resamples)], resampled[int(0.975 * num_resamples)])


def _seconds_by_group(samples: Sequence[Sample]) -> dict[int, float]:
    by_group: dict[int, list[float]] = defaultdict(list)
    for s in samples:
        by_group[s.group].append(s.run.seconds)
    return {g: median(v) for g, v in by_group.items()}


def fastest(table: Sequence[Row], family: str) -> Row | None:
    return max((r for r in table if r.family == family), key=lambda r: r.rate, default=None)


@dataclass(frozen=True)
class Acceptance:
    """tau counts the bonus token. by_position[k]: (accepted, of so many that were read after k accepted ones)."""

    tau: float
    tau_by_domain: dict[str, float]
    by_position: list[tuple[int, int]]
    num_rounds: int


def acceptance(samples: Sequence[Sample]) -> Acceptance | None:
    """Over the first repeat: the others draft the same tokens. None where nobody reported rounds."""
    first = [s for s in samples if s.repeat == 0]
    rounds = [r for s in first for request in s.run.rounds for r in request]
    if not rounds:
        return None
    by_domain: dict[str, list[tuple[int, int, int]]] = defaultdict(list)
    for s in first:
        by_domain[s.domain] += [r for request in s.run.rounds for r in request]
    deepest = max(verified for _, verified, _ in rounds)
    positions = []
    for k in range(deepest):
        reached = [accepted for _, verified, accepted in rounds if verified > k and accepted >= k]
        positions.append((sum(accepted > k for accepted in reached), len(reached)))
    return Acceptance(_tau(rounds), {d: _tau(r) for d, r in sorted(by_domain.items())}, positions, len(rounds))


def _tau(rounds: Sequence[tuple[int, int, int]]) -> float:
    return mean(accepted + 1 for _, _, accepted in rounds)


@dataclass(frozen=True)
class StepTime:
    """Mean milliseconds of a decoding step by phase; overhead is the share of the step that runs no model."""

    phases: dict[str, float]
    overhead: float
    num_steps: int

    @property
    def total(self) -> float:
        return sum(self.phases.values())


def step_time(drafter: str, samples: Sequence[Sample]) -> StepTime | None:
    """Over all repeats. drafter: the name before any "@", which says whether drafting runs a model."""
    runs: list[Run] = [s.run for s in samples if s.run.num_steps]
    num_steps = sum(r.num_steps for r in runs)
    if not num_steps:
        return None
    phases: dict[str, float] = defaultdict(float)
    for run in runs:
        for phase, seconds in run.phases.items():
            phases[phase] += seconds
    total = sum(phases.values())
    if not total:
        return None
    forwards = phases["target"] + (0.0 if drafter in _DRAFTERS_WITHOUT_MODEL else phases["draft"])
    return StepTime({p: 1e3 * s / num_steps for p, s in phases.items() if s}, 1 - forwards / total, num_steps)


def past_their_end(samples: Sequence[Sample], end_tokens: set[int]) -> tuple[int, int]:
    """(texts that went on after an end token, texts): there a small model repeats itself, which flatters drafts."""
    texts = [ids for s in samples if s.repeat == 0 for ids in s.run.token_ids]
    return sum(bool(end_tokens & set(ids[:-1])) for ids in texts), len(texts)
