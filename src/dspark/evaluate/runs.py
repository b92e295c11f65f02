"""Several ways to decode the same prompts, timed so that they can be compared, and kept for the next version.

Whoever is compared runs in turns over the same few prompts, in an order that reverses every time, so that a machine
that gets slower gets slower for everybody.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from dspark.engine.engine import Engine
from dspark.errors import InvalidConfiguration, InvalidRequest
from dspark.evaluate.prompts import Sample
from dspark.types import Generation, SamplingParams

_FORMAT = 1
_WARM_UP = 3  # units that every engine decodes before the clock is on


@dataclass(frozen=True)
class Setup:
    """A way to decode, as users write it: `DRAFTER[,scheduler=NAME][,rule=NAME]`."""

    name: str
    drafter: str
    scheduler: str = "auto"
    rule: str = "coupled"

    @classmethod
    def parse(cls, text: str) -> Setup:
        """From DRAFTER[,scheduler=NAME][,rule=NAME]."""
        drafter, *options = text.split(",")
        given = dict(option.partition("=")[::2] for option in options)
        if unknown := set(given) - {"scheduler", "rule"}:
            raise InvalidConfiguration(
                f"expected DRAFTER[,scheduler=NAME][,rule=NAME]; got {text!r} with {', '.join(sorted(unknown))}"
            )
        if not drafter:
            raise InvalidConfiguration(f"{text!r} names no drafter; `none` is plain decoding")
        return cls(text, drafter, **given)


@dataclass
class Unit:
    """Prompts decoded together: what came of them and, for each repeat, in how many seconds."""

    domain: str
    num_tokens: int = 0
    num_committed: int = 0  # by passes after the prompt
    num_passes: int = 0
    texts: str = ""  # a digest of the token ids
    seconds: list[float] = field(default_factory=list)

    def note(self, generations: Sequence[Generation], seconds: float) -> None:
        """One more repeat: counts are of the last, seconds of all."""
        rounds = [r for g in generations for r in g.rounds]
        self.num_tokens = sum(len(g.token_ids) for g in generations)
        self.num_passes, self.num_committed = len(rounds), sum(1 + r.accepted for r in rounds)
        self.texts = _digest([g.token_ids for g in generations])
        self.seconds.append(seconds)

    @property
    def usual_seconds(self) -> float:
        """The median over the repeats."""
        return statistics.median(self.seconds)


@dataclass
class Run:
    """One setup over all units. facts: what its seconds are true of. work: what was asked for, as a digest."""

    name: str
    work: str
    facts: Mapping[str, str]
    units: list[Unit]

    @property
    def tokens_per_second(self) -> float:
        """Over all units, each at its usual seconds."""
        return sum(u.num_tokens for u in self.units) / sum(u.usual_seconds for u in self.units)

    @property
    def tau(self) -> float:
        """Tokens committed per target pass, over all units."""
        return sum(u.num_committed for u in self.units) / max(1, sum(u.num_passes for u in self.units))

    def save(self, path: Path) -> None:
        """Keep it as JSON, for a later `dspark compare --against`."""
        path.write_text(json.dumps({"format": _FORMAT, **asdict(self)}), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Run:
        """What `save` wrote; InvalidRequest otherwise."""
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            if state.pop("format") != _FORMAT:
                raise ValueError("another format")
            return cls(**{**state, "units": [Unit(**unit) for unit in state["units"]]})
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise InvalidRequest(f"{path} is no saved run ({error}): write one with `dspark compare --save`") from error


def work_of(samples: Sequence[Sample], params: SamplingParams, batch: int, raw: bool) -> str:
    """A digest of what is asked for. Parameters at their defaults have no part in it: versions to come may have more."""
    usual = type(params)()
    given = {f.name: value for f in fields(params) if (value := getattr(params, f.name)) != getattr(usual, f.name)}
    return _digest([[s.prompt for s in samples], given, batch, raw])


def run_all(
    engines: Mapping[str, Engine],
    facts: Mapping[str, str],
    samples: Sequence[Sample],
    params: SamplingParams,
    batch: int,
    repeats: int,
    raw: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Run]:
    """Decode the samples with every engine, `batch` of one domain at a time, each sample with a seed of its own."""
    units = _units(samples, batch)
    first_seed = params.seed or 0
    each = [replace(params, seed=first_seed + i) for i in range(len(samples))]
    work = work_of(samples, params, batch, raw)
    runs = {name: Run(name, work, facts, [Unit(samples[u[0]].domain) for u in units]) for name in engines}

    def decode(name: str, members: Sequence[int]) -> list[Generation]:
        return engines[name].generate([samples[i].prompt for i in members], [each[i] for i in members], raw=raw)

    for name in engines:
        for members in units[:_WARM_UP]:
            decode(name, members)
    order = list(engines)
    for repeat in range(repeats):
        for u, members in enumerate(units):
            for name in order:
                began = time.perf_counter()
                generations = decode(name, members)
                runs[name].units[u].note(generations, time.perf_counter() - began)
            order.reverse()
            progress(repeat * len(units) + u + 1, repeats * len(units))
    return list(runs.values())


def _units(samples: Sequence[Sample], batch: int) -> list[list[int]]:
    """Indices of the samples of each domain, so many at a time; domains take turns."""
    by_domain: dict[str, list[int]] = {}
    for i, sample in enumerate(samples):
        by_domain.setdefault(sample.domain, []).append(i)
    parts = [[own[i : i + batch] for i in range(0, len(own), batch)] for own in by_domain.values()]
    longest = max(len(own) for own in parts)
    return [own[turn] for turn in range(longest) for own in parts if turn < len(own)]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, default=str).encode()).hexdigest()[:16]
