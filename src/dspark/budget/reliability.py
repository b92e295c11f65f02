"""How far stated probabilities can be trusted: calibration error, ranking, Brier score, and a picture of them.

Everything is about survival, P(a draft token and all before it are accepted), position by position. Rounds of one prompt
resemble each other, so intervals resample prompts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dspark.errors import InvalidConfiguration

NUM_BINS = 20  # the paper's and the released code's
_NUM_AUC_BINS = 500
_NUM_RESAMPLES = 200
_NUM_FLOOR_DRAWS = 50


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95 % interval (basic bootstrap over prompts)."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Reliability:
    """How good the probabilities of one position were.

    num_rounds   rounds whose outcome at this position is known
    rate         how often the token survived
    ece          expected calibration error, 20 bins of equal width
    ece_floor    what a perfect forecaster with as many rounds would show: the mean error of chance alone
    auc          P(a token that survived was given the higher probability)
    brier        mean squared error of the probability
    bins         (mean probability, rate, rounds) of each bin that is not empty
    """

    num_rounds: int
    rate: float
    ece: Interval
    ece_floor: float
    auc: Interval
    brier: Interval
    bins: tuple[tuple[float, float, int], ...]


@dataclass(frozen=True)
class Report:
    """Reliability of every position, and the mean calibration error over the positions."""

    positions: tuple[Reliability, ...]
    mean_ece: Interval
    mean_floor: float
    num_prompts: int
    num_rounds: int


def expected_calibration_error(predicted: Tensor, happened: Tensor, num_bins: int = NUM_BINS) -> Tensor:
    """Mean gap between stated and observed frequency, weighed by how often each bin is used.

    predicted [..., N], happened [N] (yes, no or a probability). Returns [...]: many forecasts of the same events at once.
    """
    gap = predicted.double() - happened.double()
    index = _bins(predicted, num_bins)
    per_bin = torch.zeros(*predicted.shape[:-1], num_bins, dtype=torch.double).scatter_add_(-1, index, gap)
    return per_bin.abs().sum(-1) / predicted.shape[-1]


def ranking(predicted: Tensor, happened: Tensor) -> float:
    """Area under the ROC curve; ties count half. NaN where only one outcome ever happened."""
    yes = happened.double()
    values, group = predicted.unique(return_inverse=True)
    ups = torch.zeros(len(values), dtype=torch.double).scatter_add_(0, group, yes)
    downs = torch.zeros(len(values), dtype=torch.double).scatter_add_(0, group, 1 - yes)
    return float(_area(ups, downs))


def report(survival: Tensor, survived: Tensor, known: Tensor, prompts: Tensor, seed: int = 0) -> Report:
    """Judge believed survival [N, K] by what happened.

    survived [N, K]  yes, no or its probability;  known [N, K]  where that was observed;  prompts [N]  0 .. P-1
    """
    num_prompts = int(prompts.max()) + 1 if len(prompts) else 0
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(num_prompts, (_NUM_RESAMPLES, num_prompts), generator=generator)
    weights = torch.zeros(_NUM_RESAMPLES, num_prompts, dtype=torch.double)
    weights.scatter_add_(1, draws, torch.ones_like(draws, dtype=torch.double))
    positions, errors = [], []
    for k in range(survival.shape[1]):
        rows = known[:, k]
        p, y, owner = survival[rows, k].double(), survived[rows, k].double(), prompts[rows]
        reliability, resampled = _position(p, y, owner, weights, generator)
        positions.append(reliability)
        errors.append(resampled)
    mean = sum(r.ece.value for r in positions) / len(positions)
    floor = sum(r.ece_floor for r in positions) / len(positions)
    return Report(tuple(positions), _interval(mean, torch.stack(errors).mean(0)), floor, num_prompts, survival.shape[0])


def plot_reliability(path: Path, panels: Sequence[tuple[str, Report, Report]]) -> None:
    """One row of diagrams per panel (title, before, after): stated survival against observed, by position."""
    try:
        import matplotlib
    except ImportError as error:
        raise InvalidConfiguration('diagrams need matplotlib: pip install "dspark[train]"') from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    num_positions = len(panels[0][1].positions)
    figure, axes = pyplot.subplots(
        len(panels), num_positions, figsize=(1.9 * num_positions, 2.1 * len(panels) + 0.4), squeeze=False
    )
    for row, (title, before, after) in zip(axes, panels, strict=True):
        for k, axis in enumerate(row):
            axis.plot([0, 1], [0, 1], color="#bbbbbb", linewidth=1)
            for which, colour, mark in ((before, "#d9a514", "o"), (after, "#2a9d5c", "s")):
                stated, observed, counts = zip(*which.positions[k].bins, strict=True)
                sizes = [3 + 60 * (n / sum(counts)) ** 0.5 for n in counts]
                axis.scatter(stated, observed, s=sizes, color=colour, marker=mark, alpha=0.75, linewidths=0)
            errors = f"{before.positions[k].ece.value:.1%} → {after.positions[k].ece.value:.1%}"
            axis.set_title(f"position {k + 1}: {errors}", fontsize=7)
            axis.set(xlim=(0, 1), ylim=(0, 1), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
            axis.tick_params(labelsize=6)
        row[0].set_ylabel(f"{title}\nsurvived", fontsize=7)
    figure.supxlabel("stated survival (yellow: raw, green: calibrated; larger marks: more rounds)", fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _position(
    p: Tensor, y: Tensor, owner: Tensor, weights: Tensor, generator: torch.Generator
) -> tuple[Reliability, Tensor]:
    num_resamples, num_prompts = weights.shape
    if not len(p):
        nothing = Interval(float("nan"), float("nan"), float("nan"))
        return Reliability(0, float("nan"), nothing, 0.0, nothing, nothing, ()), torch.zeros(num_resamples).double()

    def by_prompt(values: Tensor, index: Tensor, num_cells: int) -> Tensor:
        """[P, cells] sums of values by prompt and cell."""
        cells = torch.zeros(num_prompts * num_cells, dtype=torch.double)
        return cells.scatter_add_(0, owner * num_cells + index, values).view(num_prompts, num_cells)

    index, fine, one = _bins(p, NUM_BINS), _bins(p, _NUM_AUC_BINS), torch.ones_like(p)
    counts, stated, observed = (by_prompt(v, index, NUM_BINS) for v in (one, p, y))
    squares, rounds = by_prompt((p - y) ** 2, torch.zeros_like(index), 1), counts.sum(1, keepdim=True)
    ups, downs = by_prompt(y, fine, _NUM_AUC_BINS), by_prompt(1 - y, fine, _NUM_AUC_BINS)
    total = (weights @ rounds).clamp_min(1)
    errors = (weights @ (stated - observed)).abs().sum(1) / total[:, 0]
    areas = _area(weights @ ups, weights @ downs)
    chance = torch.rand(_NUM_FLOOR_DRAWS, len(p), generator=generator, dtype=torch.double) < p
    floor = torch.stack([expected_calibration_error(p, drawn) for drawn in chance]).mean()
    used = counts.sum(0) > 0
    columns = (stated.sum(0)[used] / counts.sum(0)[used], observed.sum(0)[used] / counts.sum(0)[used])
    return (
        Reliability(
            num_rounds=len(p),
            rate=float(y.mean()),
            ece=_interval(float(expected_calibration_error(p, y)), errors),
            ece_floor=float(floor),
            auc=_interval(ranking(p, y), areas, most=1.0),
            brier=_interval(float(((p - y) ** 2).mean()), (weights @ squares / total)[:, 0], most=1.0),
            bins=tuple(zip(*(c.tolist() for c in columns), counts.sum(0)[used].int().tolist(), strict=True)),
        ),
        errors,
    )


def _interval(value: float, resampled: Tensor, most: float = float("inf")) -> Interval:
    """Reflected at the estimate, because a resampled error is too large by as much as the estimate itself is."""
    if math.isnan(value):
        return Interval(value, value, value)
    # A draw of prompts in which all drafts fared alike says nothing of their order.
    low, high = torch.nanquantile(resampled, torch.tensor([0.025, 0.975], dtype=torch.double)).tolist()
    return Interval(value, min(most, max(0.0, 2 * value - high)), min(most, max(0.0, 2 * value - low)))


def _area(ups: Tensor, downs: Tensor) -> Tensor:
    """[...] area under the ROC curve of [..., cells] with rising probability."""
    below = downs.cumsum(-1) - downs / 2
    return (ups * below).sum(-1) / (ups.sum(-1) * downs.sum(-1))


def _bins(predicted: Tensor, num_bins: int) -> Tensor:
    return (predicted * num_bins).long().clamp(0, num_bins - 1)
