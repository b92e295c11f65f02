"""Calibration recovers what is known, helps on rounds it has not seen, and survives its file."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dspark.budget.calibration import (
    Calibration,
    Origin,
    Outcomes,
    calibration_in,
    fingerprint,
    fit_affine,
    fit_bias,
    fit_temperatures,
    log_loss,
    split,
    with_bias,
)
from dspark.budget.reliability import expected_calibration_error, ranking, report
from dspark.errors import CheckpointError, InvalidRequest

TEMPERATURES = (1.8, 0.6, 1.5)
NONE = (0.0, 0.0, 0.0)
ORIGIN = Origin("t", "d", "w", 1.0, "coupled", "outcome", "sts", ("math",), 2, 300, 2, 310, (0.1,), (0.01,), (0.8,))


def simulated(num: int, temperatures: tuple[float, ...], offsets: tuple[float, ...], seed: int = 0) -> Outcomes:
    """Rounds of a drafter whose confidence k is off by T_k and b_k: P(accepted) = sigmoid(z / T + b)."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num, len(temperatures), generator=generator).double() * 1.5 + 0.5
    truth = torch.sigmoid(logits / torch.tensor(temperatures) + torch.tensor(offsets))
    accepted = torch.rand(truth.shape, generator=generator) < truth
    reached = torch.cat([torch.ones(num, 1), accepted[:, :-1].double().cumprod(1)], 1).bool()
    prompts = torch.arange(num) % 100
    return Outcomes(torch.sigmoid(logits), reached, accepted, torch.ones_like(accepted), prompts, ("all",) * 100)


def mean_error(outcomes: Outcomes, confidence: Tensor) -> float:
    errors = expected_calibration_error(confidence.cumprod(1).T.contiguous(), outcomes.survived[:, 0])
    assert errors.shape == (len(TEMPERATURES),)
    return report(confidence.cumprod(1), outcomes.survived, outcomes.known, outcomes.prompts).mean_ece.value


def test_scaling_recovers_known_temperatures_and_helps_on_new_rounds() -> None:
    fitted = fit_temperatures(simulated(40_000, TEMPERATURES, NONE))
    assert fitted.temperatures == pytest.approx(TEMPERATURES, rel=0.15) and fitted.offsets == ()
    new = simulated(40_000, TEMPERATURES, NONE, seed=1)
    assert mean_error(new, new.confidence) > 0.03
    assert mean_error(new, fitted.apply(new.confidence)) < 0.008


def test_an_offset_is_recovered_where_temperatures_cannot_help() -> None:
    offsets = (-0.7, 0.6, -0.5)
    known = simulated(40_000, TEMPERATURES, offsets)
    fitted = fit_affine(known)
    assert fitted.temperatures == pytest.approx(TEMPERATURES, rel=0.1)
    assert fitted.offsets == pytest.approx(offsets, abs=0.08)
    new = simulated(40_000, TEMPERATURES, offsets, seed=1)
    scaled = mean_error(new, fit_temperatures(known).apply(new.confidence))
    assert mean_error(new, fitted.apply(new.confidence)) < 0.008 < scaled / 2


def test_one_bias_is_recovered_and_leaves_to_temperatures_what_they_can_mend() -> None:
    known, new = (simulated(40_000, (1.0, 1.0, 1.0), (-0.5, -0.5, -0.5), seed) for seed in (0, 1))
    bias = fit_bias(known)
    assert bias == pytest.approx(-0.5, abs=0.03)
    mended = with_bias(new, bias)
    assert log_loss(mended) < log_loss(new) - 0.01
    scaled = [mean_error(o, fit_temperatures(known).apply(o.confidence)) for o in (new, mended)]
    assert mean_error(mended, mended.confidence) < 0.008 < scaled[0] / 2
    assert with_bias(new, 0.0) is new


def test_a_bias_learns_only_from_what_was_reached_and_observed() -> None:
    outcomes = simulated(4_000, TEMPERATURES, NONE)
    known = torch.ones_like(outcomes.known)
    known[::5, 2:] = False
    spoiled = torch.where(known & outcomes.reached, outcomes.accepted, ~outcomes.accepted)
    honest, lied_to = (replace(outcomes, accepted=a, known=known) for a in (outcomes.accepted, spoiled))
    assert fit_bias(honest) == fit_bias(lied_to) and log_loss(honest) == log_loss(lied_to)


def test_what_was_not_observed_is_not_learned_from() -> None:
    outcomes = simulated(4_000, TEMPERATURES, NONE)
    known = torch.ones_like(outcomes.known)
    known[::5, 2:] = False
    spoiled = outcomes.accepted.clone()
    spoiled[::5, 2:] = ~spoiled[::5, 2:]
    honest, lied_to = (replace(outcomes, accepted=a, known=known) for a in (outcomes.accepted, spoiled))
    for fit in (fit_temperatures, fit_affine):
        assert fit(honest) == fit(lied_to) != fit(simulated(4_000, TEMPERATURES, NONE, seed=3))
    judged = [report(o.confidence.cumprod(1), o.survived, o.known, o.prompts) for o in (honest, lied_to)]
    assert judged[0] == judged[1] and judged[0].positions[2].num_rounds == 3_200


def test_probabilities_do_as_labels_and_are_less_noisy() -> None:
    outcomes = simulated(3_000, TEMPERATURES, NONE)
    truth = torch.sigmoid(torch.logit(outcomes.confidence) / torch.tensor(TEMPERATURES))
    by_outcome, by_truth = fit_affine(outcomes), fit_affine(replace(outcomes, accepted=truth))
    assert by_truth.temperatures == pytest.approx(TEMPERATURES, rel=0.02)
    assert by_outcome.temperatures == pytest.approx(TEMPERATURES, rel=0.3)
    assert by_outcome.temperatures != pytest.approx(TEMPERATURES, rel=0.02)


def test_too_few_rounds_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="position 1 was verified in 90 rounds"):
        fit_temperatures(simulated(90, TEMPERATURES, NONE))


def test_halves_share_no_prompt() -> None:
    outcomes = simulated(1_000, TEMPERATURES, NONE)
    marked = replace(outcomes, confidence=outcomes.prompts[:, None].double())
    first, second = split(marked)
    owners = [set(half.confidence[:, 0].tolist()) for half in (first, second)]
    assert not owners[0] & owners[1] and len(owners[0]) == len(owners[1]) == 50
    assert len(first.prompts) + len(second.prompts) == 1_000 and int(first.prompts.max()) == 49


def test_order_within_a_position_is_kept_and_deeper_ones_use_the_last() -> None:
    calibration = Calibration((2.0, 0.5), (0.3, -0.2))
    confidence = torch.rand(50, 4, generator=torch.Generator().manual_seed(0))
    calibrated = calibration.apply(confidence)
    assert torch.equal(calibrated.argsort(0), confidence.argsort(0))
    column = torch.tensor([[0.9, 0.9, 0.9]])
    assert calibration.apply(column)[0, 1] == calibration.apply(column)[0, 2] != calibration.apply(column)[0, 0]
    in_a_tree = calibration.apply(column, torch.tensor([[1, 1, 2]]))[0]
    assert in_a_tree[0] == in_a_tree[1] == calibration.apply(column)[0, 0]
    assert calibration.apply(torch.tensor([[0.0, 1.0]])).isfinite().all()


def test_errors_and_ranking_by_hand() -> None:
    p, y = torch.tensor([0.2, 0.2, 0.9, 0.9]), torch.tensor([0, 1, 1, 1])
    assert float(expected_calibration_error(p, y)) == pytest.approx((2 * 0.3 + 2 * 0.1) / 4)
    assert ranking(p, y) == pytest.approx((0.5 + 1 + 1) / 3)  # of the three that happened against the one that did not
    assert ranking(-p, y) == pytest.approx((0.5 + 0 + 0) / 3)


def test_the_report_tells_error_from_chance() -> None:
    honest = simulated(4_000, (1.0, 1.0, 1.0), NONE)
    truthful = report(honest.confidence.cumprod(1), honest.survived, honest.known, honest.prompts)
    assert truthful.mean_ece.value == pytest.approx(truthful.mean_floor, abs=0.003)
    assert truthful.mean_ece.low < truthful.mean_floor / 2  # chance alone is no error
    wrong = report(honest.confidence.cumprod(1) ** 2, honest.survived, honest.known, honest.prompts)
    assert wrong.mean_ece.low > 0.05
    assert [r.auc.value for r in wrong.positions] == pytest.approx([r.auc.value for r in truthful.positions], abs=1e-6)


def test_the_order_of_drafts_that_all_fared_alike_is_not_known() -> None:
    """Nor is it in a draw of prompts where none of them survived: the others tell how sure the rest is."""
    torch.manual_seed(0)
    survived = torch.zeros(60, 2)
    survived[:9:3, 0] = 1
    positions = report(torch.rand(60, 2), survived, torch.ones(60, 2, dtype=torch.bool), torch.arange(60)).positions
    assert 0 < positions[0].auc.low < positions[0].auc.value < positions[0].auc.high <= 1
    assert all(math.isnan(x) for x in (positions[1].auc.value, positions[1].auc.low, positions[1].auc.high))


def test_the_file_comes_back_and_sglang_can_read_its_own(tmp_path: Path) -> None:
    calibration = Calibration((1.5, 0.7), (), ORIGIN)
    calibration.save(tmp_path / "calibration.json")
    calibration.save_for_sglang(tmp_path / "sts.json")
    assert Calibration.load(tmp_path / "calibration.json") == calibration
    table = json.loads((tmp_path / "sts.json").read_text())
    assert table.keys() == {"temperatures", "dataset", "num_samples", "ece_before", "ece_after"}
    assert Calibration.load(tmp_path / "sts.json").temperatures == (1.5, 0.7)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[1, 2]",
        '{"temperatures": []}',
        '{"temperatures": [1, -2]}',
        '{"temperatures": [1], "format": 9}',
        '{"temperatures": [1' + 400 * "0" + "]}",
    ],
)
def test_a_corrupt_file_is_refused_in_one_line(tmp_path: Path, content: str) -> None:
    path = tmp_path / "calibration.json"
    path.write_text(content)
    with pytest.raises(CheckpointError, match="dspark calibrate") as raised:
        Calibration.load(path)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


def test_a_calibration_of_other_weights_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert calibration_in(tmp_path) is None
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    origin = Origin(**{**vars(ORIGIN), "weights": fingerprint(tmp_path)})
    Calibration((1.5,), (), origin).save(tmp_path / "calibration.json")
    assert calibration_in(tmp_path) is not None
    (tmp_path / "model.safetensors").write_bytes(b"Weights")
    with caplog.at_level(logging.WARNING):
        assert calibration_in(tmp_path) is None
    assert "other weights" in caplog.text
