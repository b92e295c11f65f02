"""What drafters did on the same prompts, and how sure it is: tau, ratios and their intervals."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dspark.errors import InvalidConfiguration
from dspark.train.files import replace_file

RESULTS = "rounds.json"
_NUM_RESAMPLES = 2000


@dataclass(frozen=True)
class Measured:
    """One drafter of one seed on all prompts.

    rounds  {domain: [length - 1][prompt] -> accepted draft tokens of each round}; prompts in the same order for everyone
    """

    name: str
    seed: int
    num_layers: int
    num_parameters: int
    steps: int
    tokens: int
    rounds: dict[str, list[list[list[int]]]]

    def save(self, folder: Path) -> None:
        with replace_file(folder / RESULTS) as partial:
            partial.write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")


def read_results(out: Path) -> list[Measured]:
    """Of all runs that are finished: OUT/seed-N/NAME."""
    return [Measured(**json.loads(path.read_text(encoding="utf-8"))) for path in sorted(out.glob(f"*/*/{RESULTS}"))]


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"

    @property
    def percent(self) -> str:
        """As a gain, of a ratio."""
        return f"{100 * self.value - 100:+.1f} % [{100 * self.low - 100:+.1f}, {100 * self.high - 100:+.1f}]"


class Comparison:
    """Bootstrap over prompts and seeds, both drawn once for all drafters: so what prompts have in common cancels.

    One seed alone is not drawn again: then the intervals know of prompts only.
    """

    def __init__(self, results: Sequence[Measured]) -> None:
        assert results, "nothing was measured"
        self.names = list(dict.fromkeys(r.name for r in results))
        of_name = {name: {r.seed: r for r in results if r.name == name} for name in self.names}
        self.seeds = sorted(set.intersection(*(set(by_seed) for by_seed in of_name.values())))
        self.runs = {name: [of_name[name][seed] for seed in self.seeds] for name in self.names}
        first = self.runs[self.names[0]][0]
        self.num_prompts = _num_prompts(first)
        self.length = len(next(iter(first.rounds.values())))
        for run in (run for runs in self.runs.values() for run in runs):
            if (run.steps, _num_prompts(run)) != (first.steps, self.num_prompts):
                raise InvalidConfiguration(
                    f"{run.name} of seed {run.seed} has {run.steps} steps and prompts {_num_prompts(run)}, and "
                    f"{first.name} of seed {first.seed} {first.steps} and {self.num_prompts}: use a folder for each setting"
                )
        draw = np.random.default_rng(0)
        self.seed_weights = _multiplicities(draw, len(self.seeds))
        self.prompt_weights = {domain: _multiplicities(draw, num) for domain, num in self.num_prompts.items()}

    def taus(self, name: str, domain: str | None = None, length: int | None = None) -> Any:
        """tau in the sample itself and in every resample [1 + R]; no domain: the mean of all of them."""
        if domain is None:
            return np.mean([self.taus(name, each, length) for each in self.num_prompts], axis=0)
        rounds = [run.rounds[domain][(length or self.length) - 1] for run in self.runs[name]]
        counts = np.array([[[sum(a + 1 for a in prompt), len(prompt)] for prompt in run] for run in rounds])
        tokens, passes = np.einsum("rs,spc,rp->cr", self.seed_weights, counts, self.prompt_weights[domain])
        return tokens / np.where(passes, passes, np.nan)

    def tau(self, name: str, domain: str | None = None, length: int | None = None) -> Estimate:
        return _estimate(self.taus(name, domain, length))

    def ratio(self, name: str, baseline: str, domain: str | None = None, length: int | None = None) -> Estimate:
        return _estimate(self.taus(name, domain, length) / self.taus(baseline, domain, length))

    def acceptance(self, name: str, domain: str, at_least: int = 30) -> list[float]:
        """P(position k is accepted | those before it are), over all rounds of all seeds; nan where fewer got there."""
        rounds = [a for run in self.runs[name] for prompt in run.rounds[domain][-1] for a in prompt]
        reached = [sum(a >= k for a in rounds) for k in range(self.length + 1)]
        return [reached[k + 1] / reached[k] if reached[k] >= at_least else math.nan for k in range(self.length)]


def _num_prompts(run: Measured) -> dict[str, int]:
    return {domain: len(by_length[0]) for domain, by_length in run.rounds.items()}


def _multiplicities(draw: np.random.Generator, num: int) -> Any:
    """How often each of `num` things is in a resample [1 + R, num]; the first row is the sample itself."""
    drawn = draw.multinomial(num, np.full(num, 1 / num), size=_NUM_RESAMPLES)
    return np.concatenate([np.ones((1, num)), drawn if num > 1 else np.ones((_NUM_RESAMPLES, 1))])


def _estimate(values: Any) -> Estimate:
    """Resamples of nothing but answers too short for a round say nothing."""
    low, high = np.nanquantile(values[1:], [0.025, 0.975])
    return Estimate(float(values[0]), float(low), float(high))
