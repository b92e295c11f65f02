"""Make a drafter's confidences mean what they say: Sequential Temperature Scaling, and the same with an offset.

Confidence k is a logit z. The paper's STS (section 3.2.1) divides it by T_k: left to right, each T_k is the one with which
the product of the calibrated confidences up to k is closest to how often whole prefixes survive. `fit_affine` also adds an
offset, z / T_k + b_k, because a temperature cannot move confidences around one half, where those of deep positions lie.
`fit_bias` is one offset for all positions, which the head's own bias can take up.
Labels come from full-length verification: a position that was not verified has none.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dspark.budget.reliability import expected_calibration_error
from dspark.errors import CheckpointError, InvalidRequest

log = logging.getLogger(__name__)

FILE = "calibration.json"
SGLANG_FILE = "sts.json"
FEWEST_ROUNDS = 100
LOGIT_LIMIT = 12.0  # a confidence of exactly 0 or 1 has no logit
_FORMAT = 1
_COLDEST, _HOTTEST = 0.1, 10.0
_GRID, _REFINEMENTS = 41, 3
_PRIOR_PRECISION = (4.0, 4.0)  # of slope and offset: a standard deviation of one half
_LARGEST_OFFSET = 6.0


@dataclass(frozen=True)
class Outcomes:
    """What became of full-length drafts: N rounds, K positions.

    confidence [N, K]  as the drafter gave it
    reached    [N, K]  all tokens before it were accepted
    accepted   [N, K]  where reached: whether it was accepted, too, or the probability of that
    known      [N, K]  false past the end of a text, where the target's judgement means nothing
    prompts    [N]     which prompt a round belongs to
    domains            of each prompt
    """

    confidence: Tensor
    reached: Tensor
    accepted: Tensor
    known: Tensor
    prompts: Tensor
    domains: tuple[str, ...]

    def of_prompts(self, chosen: Tensor) -> Outcomes:
        """The rounds of some prompts [P] (a mask), the prompts numbered anew."""
        rows = chosen[self.prompts]
        renumbered = chosen.long().cumsum(0) - 1
        domains = tuple(d for d, is_chosen in zip(self.domains, chosen.tolist(), strict=True) if is_chosen)
        return Outcomes(
            self.confidence[rows],
            self.reached[rows],
            self.accepted[rows],
            self.known[rows],
            renumbered[self.prompts[rows]],
            domains,
        )

    def of_domain(self, domain: str) -> Outcomes:
        """The part of one domain."""
        return self.of_prompts(torch.tensor([d == domain for d in self.domains]))

    @property
    def survived(self) -> Tensor:
        """[N, K]  this token and all before it were accepted."""
        return self.reached * self.accepted


@dataclass(frozen=True)
class Origin:
    """How and on what a calibration was fitted; the errors are those of held-out prompts, by position."""

    target: str
    drafter: str
    weights: str  # fingerprint of the drafter's weights
    temperature: float  # of sampling
    rule: str
    labels: str  # outcome: accepted or not; overlap: sum of min(p, q)
    method: str  # sts or affine
    data: tuple[str, ...]
    num_prompts: int
    num_rounds: int
    num_held_out_prompts: int
    num_held_out_rounds: int
    ece_before: tuple[float, ...] = ()
    ece_after: tuple[float, ...] = ()
    auc: tuple[float, ...] = ()


@dataclass(frozen=True)
class Calibration:
    """Temperatures and offsets by position: sigmoid(z / T + b). Later positions use the last ones."""

    temperatures: tuple[float, ...]
    offsets: tuple[float, ...] = ()  # () is none, as in STS
    origin: Origin | None = None

    def __post_init__(self) -> None:
        if not self.temperatures or not all(math.isfinite(t) and t > 0 for t in self.temperatures):
            raise InvalidRequest(f"expected temperatures above 0, one for each position; got {self.temperatures}")
        if (self.offsets and len(self.offsets) != len(self.temperatures)) or not all(map(math.isfinite, self.offsets)):
            raise InvalidRequest(f"expected as many offsets as temperatures, or none; got {self.offsets}")

    def apply(self, confidence: Tensor, depth: Tensor | None = None) -> Tensor:
        """Calibrated confidence [B, K]; depth [B, K] as in Draft.depth, None for chains."""
        return torch.sigmoid(self.logits(confidence, depth))

    def logits(self, confidence: Tensor, depth: Tensor | None = None) -> Tensor:
        """The same as log-odds."""
        place = torch.arange(confidence.shape[1]) if depth is None else depth - 1
        place = place.clamp(max=len(self.temperatures) - 1)
        scaled = logit(confidence) / torch.tensor(self.temperatures, dtype=confidence.dtype)[place]
        if self.offsets:
            scaled = scaled + torch.tensor(self.offsets, dtype=confidence.dtype)[place]
        return scaled

    def save(self, path: Path) -> None:
        """Write it as calibration.json."""
        _write(path, {"format": _FORMAT, **dataclasses.asdict(self)})

    def save_for_sglang(self, path: Path) -> None:
        """The file of SGLang's --speculative-dspark-confidence-sts-path, which knows temperatures only."""
        assert not self.offsets and self.origin is not None, "an STS file is written of what STS fitted"
        origin = self.origin
        _write(
            path,
            {
                "temperatures": self.temperatures,
                "dataset": ", ".join(origin.data),
                "num_samples": origin.num_rounds,
                "ece_before": origin.ece_before,
                "ece_after": origin.ece_after,
            },
        )

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Read calibration.json or an SGLang STS file."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content.get("format", _FORMAT) != _FORMAT:
                raise ValueError(f"format {content['format']}, expected {_FORMAT}")
            origin = content.get("origin")
            if origin is not None:
                fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in origin.items()}
                origin = Origin(**fields)
            return cls(
                tuple(map(float, content["temperatures"])), tuple(map(float, content.get("offsets", ()))), origin
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise CheckpointError(
                f"{path} is not a calibration ({type(error).__name__}: {error}): delete it, and write it again with "
                "dspark calibrate"
            ) from error


def calibration_in(folder: Path) -> Calibration | None:
    """The calibration of the drafter in this folder; None if it has none, or one of other weights, which is said."""
    path = folder / FILE
    if not path.is_file():
        return None
    calibration = Calibration.load(path)
    if calibration.origin is not None and calibration.origin.weights != fingerprint(folder):
        log.warning("%s belongs to other weights and is not used: run dspark calibrate again", path)
        return None
    return calibration


def logit(confidence: Tensor) -> Tensor:
    """log(c / (1 - c)), bounded."""
    return torch.logit(confidence).clamp(-LOGIT_LIMIT, LOGIT_LIMIT)


def fit_temperatures(outcomes: Outcomes) -> Calibration:
    """Sequential Temperature Scaling on these rounds (paper, section 3.2.1)."""
    _require_rounds(outcomes.known)
    logits = logit(outcomes.confidence.double())
    before = torch.ones(len(logits), dtype=torch.double)
    temperatures = []
    for k in range(logits.shape[1]):
        rows = outcomes.known[:, k]
        temperatures.append(_temperature(logits[rows, k], before[rows], outcomes.survived[rows, k].double()))
        before = before * torch.sigmoid(logits[:, k] / temperatures[-1])
    return Calibration(tuple(round(t, 4) for t in temperatures))


def fit_affine(outcomes: Outcomes) -> Calibration:
    """Temperature and offset of each position by maximum likelihood, where all before it were accepted.

    Each confidence is P(accepted | ancestors accepted), so calibrated ones multiply to calibrated survival. Positions that
    few rounds reach stay near the confidence as it is: a weak prior holds them.
    """
    _require_rounds(outcomes.known)
    logits, reached = logit(outcomes.confidence.double()), outcomes.reached & outcomes.known
    fitted = [
        _logistic(logits[rows, k], outcomes.accepted[rows, k].double()) for k, rows in enumerate(reached.unbind(1))
    ]
    return Calibration(tuple(round(1 / slope, 4) for slope, _ in fitted), tuple(round(b, 4) for _, b in fitted))


def fit_bias(outcomes: Outcomes) -> float:
    """b of sigmoid(z + b), the same for all positions, by maximum likelihood where all before it were accepted.

    A head learns sum(min(p, q)), which is what the rejection rule accepts. The coupled rule accepts less: a share c of it
    becomes c / (2 - c) at the least (Daliri et al. 2024), which is half the odds: so that rule alone costs a head up to ln 2.
    """
    _require_rounds(outcomes.known)
    logits, happened = _of_reached(outcomes)
    precision, bias = _PRIOR_PRECISION[1], 0.0
    for _ in range(25):
        p = torch.sigmoid(logits + bias)
        step = float((happened - p).sum() - precision * bias) / float(precision + (p * (1 - p)).sum())
        bias += max(-1.0, min(1.0, step))
        if abs(step) < 1e-9:
            break
    return bias


def with_bias(outcomes: Outcomes, bias: float) -> Outcomes:
    """The same rounds, had the drafter added `bias` to the logit of every confidence."""
    if not bias:
        return outcomes
    return dataclasses.replace(outcomes, confidence=torch.sigmoid(logit(outcomes.confidence) + bias))


def log_loss(outcomes: Outcomes) -> float:
    """Mean -log probability of what became of a token, where all before it were accepted. Nats."""
    logits, happened = _of_reached(outcomes)
    return float(torch.nn.functional.binary_cross_entropy_with_logits(logits, happened))


def split(outcomes: Outcomes, seed: int = 0) -> tuple[Outcomes, Outcomes]:
    """(to fit on, held out): halves by prompt."""
    num_prompts = int(outcomes.prompts.max()) + 1
    chosen = torch.zeros(num_prompts, dtype=torch.bool)
    chosen[torch.randperm(num_prompts, generator=torch.Generator().manual_seed(seed))[: num_prompts // 2]] = True
    return outcomes.of_prompts(chosen), outcomes.of_prompts(~chosen)


def fingerprint(folder: Path) -> str:
    """Tells a drafter's weights from others without reading all of them: sizes and the first MiB of each file."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as opened:
            digest.update(f"{file.name} {file.stat().st_size} ".encode() + opened.read(1 << 20))
    return digest.hexdigest()[:16]


def _of_reached(outcomes: Outcomes) -> tuple[Tensor, Tensor]:
    """(logits, accepted) of all tokens whose ancestors were accepted, whatever their position."""
    rows = outcomes.reached & outcomes.known
    return logit(outcomes.confidence.double())[rows], outcomes.accepted[rows].double()


def _require_rounds(known: Tensor) -> None:
    for k, num in enumerate(known.sum(0).tolist()):
        if num < FEWEST_ROUNDS:
            raise InvalidRequest(
                f"position {k + 1} was verified in {num} rounds, and fewer than {FEWEST_ROUNDS} say nothing about its "
                "confidences: use more prompts or longer answers"
            )


def _logistic(logits: Tensor, happened: Tensor) -> tuple[float, float]:
    """(slope, offset) of P(happened) = sigmoid(slope z + offset): Newton steps from (1, 0), where the prior lies."""
    x = torch.stack([logits, torch.ones_like(logits)], 1)
    prior, precision = torch.tensor([1.0, 0.0]).double(), torch.diag(torch.tensor(_PRIOR_PRECISION).double())
    theta = prior.clone()
    for _ in range(25):
        p = torch.sigmoid(x @ theta)
        gradient = x.T @ (happened - p) - precision @ (theta - prior)
        step = torch.linalg.solve(precision + x.T @ (x * (p * (1 - p))[:, None]), gradient)
        theta = theta + step.clamp(-1, 1)
        if float(step.abs().max()) < 1e-9:
            break
    return float(theta[0].clamp(1 / _HOTTEST, 1 / _COLDEST)), float(theta[1].clamp(-_LARGEST_OFFSET, _LARGEST_OFFSET))


def _temperature(logits: Tensor, before: Tensor, survived: Tensor) -> float:
    """The temperature with the least calibration error: a coarse grid, then finer ones around the best."""
    low, high = math.log(_COLDEST), math.log(_HOTTEST)
    best = 1.0
    for _ in range(1 + _REFINEMENTS):
        grid = torch.linspace(low, high, _GRID, dtype=torch.double)
        survival = before * torch.sigmoid(logits / grid.exp()[:, None])
        errors = expected_calibration_error(survival, survived)
        # Binning makes the error a ragged curve: the middle of all that are as good as the best.
        least = grid[errors <= errors.min() + 1e-12]
        centre, step = float(least[len(least) // 2]), (high - low) / (_GRID - 1)
        best, low, high = math.exp(centre), centre - 2 * step, centre + 2 * step
    return min(_HOTTEST, max(_COLDEST, best))


def _write(path: Path, content: dict[str, Any]) -> None:
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written ({error}): name a folder that can be with --out") from error
