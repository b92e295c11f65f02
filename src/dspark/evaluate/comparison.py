"""Which of two runs is better, by how much, how sure that is, and whether a gate lets the new one through."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dspark.errors import InvalidConfiguration, InvalidRequest
from dspark.evaluate.runs import Run, Unit
from dspark.evaluate.statistics import Interval, ratio_of_rates

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

METRICS = ("speed", "tau", "same_text")


@dataclass(frozen=True)
class Comparison:
    """A run against a baseline over the same units. Ratios are above 1 where the run is better.

    same_text  share of units with the baseline's token ids
    speed      None where the two were timed on different machines
    """

    baseline: str
    name: str
    speed: Interval | None
    tau: Interval
    same_text: float
    speed_by_domain: Mapping[str, Interval] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """In one word what the interval of the speed allows to say."""
        if self.speed is None:
            return "not comparable in speed"
        if self.speed.low > 1:
            return "faster"
        return "slower" if self.speed.high < 1 else "undecided"

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"verdict": self.verdict}


def require_same_work(baseline: Run, name: str, work: str) -> None:
    """Raise InvalidRequest where what `name` decodes, or is to decode, is not what the baseline did."""
    if baseline.work != work:
        raise InvalidRequest(
            f"{baseline.name} and {name} do not decode the same prompts with the same parameters and batch: "
            "compare runs of one command line"
        )


def compare(baseline: Run, run: Run, confidence: float = 0.95) -> Comparison:
    """Paired by unit. InvalidRequest where the two did not do the same work."""
    require_same_work(baseline, run.name, run.work)
    pairs = list(zip(baseline.units, run.units, strict=True))
    same = sum(a.texts == b.texts for a, b in pairs) / len(pairs)
    tau = ratio_of_rates(
        [(a.num_committed, max(1, a.num_passes)) for a, _ in pairs],
        [(b.num_committed, max(1, b.num_passes)) for _, b in pairs],
        confidence,
    )
    is_one_machine = dict(baseline.facts) == dict(run.facts)
    domains = {a.domain: [p for p in pairs if p[0].domain == a.domain] for a, _ in pairs}
    return Comparison(
        baseline.name,
        run.name,
        _speed(pairs, confidence) if is_one_machine else None,
        tau,
        same,
        {d: _speed(own, confidence) for d, own in domains.items() if is_one_machine and 1 < len(own) < len(pairs)},
    )


def _speed(pairs: Sequence[tuple[Unit, Unit]], confidence: float) -> Interval:
    before = [(a.num_tokens, a.usual_seconds) for a, _ in pairs]
    return ratio_of_rates(before, [(b.num_tokens, b.usual_seconds) for _, b in pairs], confidence)


@dataclass(frozen=True)
class Choice:
    """The fastest of several runs, and those that may be as fast: its interval against them includes 1."""

    best: str
    rivals: tuple[str, ...]
    lead: Interval | None  # over the next one


def choose(runs: Sequence[Run], confidence: float = 0.95) -> Choice:
    """Every other run is compared with the fastest, at a confidence that holds for all of them together (Bonferroni)."""
    fastest, *others = sorted(runs, key=lambda run: -run.tokens_per_second)
    if not others:
        return Choice(fastest.name, (), None)
    each = 1 - (1 - confidence) / len(others)
    leads = [compare(other, fastest, each).speed for other in others]
    rivals = tuple(o.name for o, lead in zip(others, leads, strict=True) if lead is None or lead.low <= 1)
    return Choice(fastest.name, rivals, leads[0])


@dataclass(frozen=True)
class Requirement:
    """What a metric must not do. A ratio fails where its whole interval does, so that noise alone fails nothing.

    at_least   the ratio to the baseline (same_text: the share) itself
    max_drop   relative to the baseline: 0.05 lets a ratio of 0.95 through
    """

    at_least: float | None = None
    max_drop: float | None = None

    @property
    def least(self) -> float:
        """The lowest ratio to the baseline that passes."""
        return max(self.at_least or 0.0, 0.0 if self.max_drop is None else 1 - self.max_drop)


USUAL_GATE = {"speed": Requirement(max_drop=0.05), "tau": Requirement(max_drop=0.02)}


def read_gate(path: Path) -> dict[str, Requirement]:
    """A table for each metric: `[speed]`, `[tau]`, `[same_text]` with `at_least` or `max_drop`."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
        gate = {name: Requirement(**table) for name, table in tables.items()}
        if unknown := set(gate) - set(METRICS):
            raise ValueError(f"no metric is called {', '.join(sorted(unknown))}")
        for requirement in gate.values():
            if not 0 <= requirement.least <= 100:
                raise ValueError(f"{requirement} is out of range")
    except (OSError, ValueError, TypeError) as error:
        raise InvalidConfiguration(
            f"{path} is no gate ({error}): expected [{'], ['.join(METRICS)}], each with at_least or max_drop"
        ) from error
    return gate


def failures(found: Comparison, gate: Mapping[str, Requirement]) -> list[str]:
    """Why this comparison does not pass, one sentence each; empty where it does."""
    reasons = []
    for name in ("speed", "tau"):
        interval: Interval | None = getattr(found, name)
        if name in gate and interval is not None and interval.high < gate[name].least:
            shown = f"{interval.value:.3f} ({interval.low:.3f} to {interval.high:.3f})"
            reasons.append(f"{name} of {found.name} is {shown} of {found.baseline}'s; at least {gate[name].least:g}")
    if "same_text" in gate and found.same_text < gate["same_text"].least:
        least = gate["same_text"].least
        reasons.append(f"{found.same_text:.0%} of texts of {found.name} are {found.baseline}'s; at least {least:.0%}")
    return reasons
