"""Beliefs that learn while serving: right under censoring, quick after a switch, and nothing that they must not know."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from budget.simulated_serving import World, request
from dspark.budget.beliefs import LiveBeliefs, LiveSettings
from dspark.budget.calibration import Calibration
from dspark.budget.online_logistic import OnlineLogistic
from dspark.errors import CheckpointError
from dspark.types import Draft, Request, SamplingParams, StepRecord

OVERCONFIDENT = World(slope=0.6, offsets=(-0.6, -0.4, -0.2, 0.0, -0.3, 0.2, -0.5))


def world(**changes: object) -> World:
    return World(**{"slope": OVERCONFIDENT.slope, "offsets": OVERCONFIDENT.offsets, **changes})  # type: ignore[arg-type]


class Naive:
    """What it must not be: acceptance per position over all drafts, a trimmed token counted as refused."""

    def __init__(self) -> None:
        self.accepted, self.drafted = torch.zeros(7).double(), 0

    def survival(self, draft: Draft, requests: Sequence[Request]) -> Tensor:
        return (
            (self.accepted / max(1, self.drafted)).expand(draft.tokens.shape) if self.drafted else draft.real.double()
        )

    def observe(self, record: StepRecord) -> None:
        assert record.accepted_nodes is not None
        self.accepted += record.accepted_nodes.double().sum(0)
        self.drafted += len(record.request_ids)


def test_trimmed_tokens_do_not_bend_what_is_learned() -> None:
    serving = world()
    live, naive = LiveBeliefs(), Naive()
    assert serving.calibration_error(live) > 0.07
    serving.serve(live, 300, threshold=0.15)
    assert serving.calibration_error(live) < 0.02
    # The naive one trims what it underrates and underrates what it trims: deep positions are lost for good.
    world().serve(naive, 300, threshold=0.15)
    truth = serving.draft()[1].cumprod(1).double()
    believed = naive.survival(serving.draft()[0], [])[0]
    assert believed[2:].max() < 0.01 < truth.mean(0)[2:5].min() / 2


def test_chances_teach_more_than_outcomes_do_and_the_same() -> None:
    """Each token's own chance is known to the rule, not to the drafter; what is learned is their mean, from fewer drafts."""

    def mean_error(knows_chances: bool, num_steps: int) -> float:
        errors = []
        for seed in range(3):
            live, serving = LiveBeliefs(), world(spread=0.8, knows_chances=knows_chances, seed=seed)
            serving.serve(live, num_steps, threshold=0.15)
            live.learn_waiting()
            errors.append(serving.calibration_error(live))
        return sum(errors) / len(errors)

    assert mean_error(True, 10) < 0.9 * mean_error(False, 30)
    assert mean_error(True, 200) < 0.012  # trimming does not bend it


@pytest.mark.parametrize("is_weighed", [True, False])
def test_a_choice_by_what_the_map_cannot_see_is_weighed_out(is_weighed: bool) -> None:
    """Easy drafts are always verified and hard ones only when drawn: without weights the hard ones would be forgotten."""
    generator = torch.Generator().manual_seed(0)
    settings = LiveSettings(full_share=0.1)
    live, requests = LiveBeliefs(num_positions=1, settings=settings), [request(b) for b in range(64)]
    draft = Draft(torch.zeros(64, 1).long(), torch.ones(64).long(), torch.full((64, 1), 0.5))
    for step in range(200):
        requests = [request(64 * step + b) for b in range(64)]  # none has a record of its own
        live.survival(draft, requests)
        is_easy = torch.rand(64, 1, generator=generator) < 0.5
        kept = is_easy.clone()
        kept[live.wants_whole(64)] = True
        accepted = kept & (torch.rand(64, 1, generator=generator) < torch.where(is_easy, 0.8, 0.2))
        record = StepRecord(request_ids=[r.id for r in requests], kept=kept, accepted_nodes=accepted)
        record.chosen = is_easy if is_weighed else None
        live.observe(record)
    believed = float(live.survival(draft, [request(-1)] * 64)[0, 0])
    assert believed == pytest.approx(0.5 if is_weighed else 0.745, abs=0.04)


def test_after_a_switch_beliefs_are_right_again_within_200_steps(caplog: pytest.LogCaptureFixture) -> None:
    live = LiveBeliefs()
    world(slope=1.0, offsets=(0.0,) * 7).serve(live, 400, threshold=0.1)
    assert live.summary()["classes"]["everyone"]["alarms"] == 0 and not caplog.records
    after = world(slope=0.5, offsets=(-1.0,) * 7, seed=5)
    assert after.calibration_error(live) > 0.1
    after.serve(live, 20, threshold=0.1)
    assert live.summary()["classes"]["everyone"]["alarms"] >= 1 and "traffic has changed" in caplog.text
    after.serve(live, 180, threshold=0.1)
    assert after.calibration_error(live) < 0.03
    assert live.drift < 4


def test_one_request_at_a_time_recovers_too() -> None:
    live = LiveBeliefs(num_positions=7)
    world(slope=1.0, offsets=(0.0,) * 7, num_requests=1).serve(live, 400)
    after = world(slope=0.5, offsets=(-1.0,) * 7, seed=5, num_requests=1)
    assert after.calibration_error(live) > 0.1
    after.serve(live, 200)
    assert after.calibration_error(live) < 0.03


def test_memory_is_what_it_says() -> None:
    learner = OnlineLogistic(np.zeros(1), np.ones(1), np.array([[-9.0], [9.0]]), memory=100.0, num_watched=1)
    learner.learn(np.ones((40, 1)), np.ones(40), np.ones(40), 1)
    known, believed = learner.information.copy(), float(learner.coefficients[0])
    learner.learn(np.zeros((0, 1)), np.zeros(0), np.zeros(0), 100)
    assert learner.information[0, 0] == pytest.approx(known[0, 0] / np.e)
    assert 0 < learner.coefficients[0] < believed  # the prior wins back what fades


def test_a_calibration_is_where_learning_starts() -> None:
    draft, _ = world().draft()
    requests = [request(b) for b in range(len(draft.tokens))]
    calibration = Calibration((1.7, 0.9), (-0.6, 0.2))
    assert draft.confidence is not None
    expected = calibration.apply(draft.confidence).double().cumprod(1)
    assert torch.allclose(LiveBeliefs(calibration).survival(draft, requests), expected, atol=1e-4)


@pytest.mark.parametrize("num_times", [1, 4])
@pytest.mark.parametrize("classes", [["", "a", "b", ""], [""] * 4])
def test_what_is_believed_is_what_is_learned_from(classes: list[str], num_times: int) -> None:
    """Believed by a law made ready for whole drafts, few or many, learned from features of tokens: the same log-odds."""
    calibration = Calibration((0.8, 10.0, 0.1), (0.3, 30.0, -1.0))
    live, classes = LiveBeliefs(calibration, 5), classes * num_times
    requests = [request(b, name or None) for b, name in enumerate(classes)]
    confidence = torch.tensor([0.0, 1e-6, 0.02, 0.5, 0.7, 1.0]).expand(4, 6).clone()
    confidence[2:] = confidence[2:].flip(1)
    confidence = confidence.repeat(num_times, 1)
    draft = Draft(torch.zeros(confidence.shape, dtype=torch.long), torch.full((len(classes),), 6), confidence)
    live.survival(draft, requests)  # classes begin
    for n, learner in enumerate(live.classes.values()):
        learner.coefficients = np.linspace(0.5, 1.0, 8) * (1 + n)
    live._own._records[1] = 2.0, 1.0
    live.survival(draft, requests)
    assert live._asked is not None
    stated = live._asked.stated
    for b, name in enumerate(classes):
        x = live.map.features(stated.confidence[b], stated.place[b], np.full(6, stated.own[b]))
        place = torch.arange(6).clamp(max=4)
        slopes = 1 / torch.tensor(calibration.temperatures)[place.clamp(max=2)].double()
        logits = confidence[b].double().logit().clamp(-12, 12) * slopes
        logits = (logits + torch.tensor(calibration.offsets)[place.clamp(max=2)]).clamp(-8, 8)
        assert torch.from_numpy(x[:, 0]).allclose(logits, rtol=1e-5, atol=1e-9)
        expected = 1 / (1 + np.exp(-x @ live.classes[name].coefficients))
        assert np.allclose(live._asked.believed[b], expected, rtol=1e-9, atol=0)


def test_classes_of_traffic_have_beliefs_of_their_own() -> None:
    live = LiveBeliefs(settings=LiveSettings(most_classes=2))
    good, bad = world(slope=1.0, offsets=(1.0,) * 7, seed=1), world(slope=1.0, offsets=(-1.0,) * 7, seed=2)
    for _ in range(10):
        good.serve(live, 15, classes=["math"])
        bad.serve(live, 15, classes=["chat"])
    draft, _ = good.draft()
    draft = Draft(draft.tokens[:4], draft.sizes[:4], torch.full((4, 7), 0.5))
    by_class = live.survival(draft, [request(-i, name) for i, name in enumerate(("math", "chat", None, "third"))])[:, 0]
    assert by_class[0] > 0.68 and by_class[1] < 0.32
    assert by_class[3] == by_class[2] and set(live.classes) == {"", "math", "chat"}


def test_without_confidences_position_and_a_requests_own_record_tell() -> None:
    live, generator = LiveBeliefs(), torch.Generator().manual_seed(0)
    requests = [request(b) for b in range(16)]
    truth = torch.where(torch.arange(16)[:, None] % 2 == 0, 0.9, 0.3) * torch.tensor([1.0, 0.8, 0.6])
    draft = Draft(torch.zeros(16, 3).long(), torch.full((16,), 3))
    for _ in range(150):
        live.survival(draft, requests)
        accepted = (torch.rand(16, 3, generator=generator) < truth).long().cumprod(1).bool()
        live.observe(StepRecord(request_ids=[r.id for r in requests], kept=draft.real, accepted_nodes=accepted))
    believed = live.survival(draft, requests)
    assert believed[::2, 0].mean() == pytest.approx(0.9, abs=0.1)
    assert believed[1::2, 0].mean() == pytest.approx(0.3, abs=0.1)
    assert (believed[:, 1] / believed[:, 0]).mean() < believed[:, 0].mean()


def test_nothing_is_known_of_tokens_to_come() -> None:
    live = LiveBeliefs()
    world().serve(live, 30)
    draft, _ = world(seed=4).draft()
    requests = [request(b) for b in range(len(draft.tokens))]
    assert draft.confidence is not None
    survival = live.survival(draft, requests)
    for k in range(7):
        changed = draft.confidence.clone()
        changed[:, k:] = torch.rand(changed[:, k:].shape)
        again = live.survival(Draft(draft.tokens + 1, draft.sizes, changed), requests)
        assert torch.equal(again[:, :k], survival[:, :k]) and not torch.equal(again[:, k], survival[:, k])


def test_a_chain_written_as_a_tree_is_believed_the_same() -> None:
    live = LiveBeliefs(Calibration((1.5, 0.8), (0.1, 0.2)))
    world().serve(live, 30)
    draft, _ = world(seed=4).draft()
    requests = [request(b) for b in range(len(draft.tokens))]
    as_tree = Draft(draft.tokens, draft.sizes, draft.confidence, torch.arange(-1, 6).expand(16, 7))
    assert torch.allclose(live.survival(draft, requests), live.survival(as_tree, requests))


def test_past_the_end_of_a_text_nothing_is_learned() -> None:
    learned = []
    for after_end in (True, False):
        live = LiveBeliefs(settings=LiveSettings(rounds_per_update=1))
        ended = Request(0, [1, 2], SamplingParams(), num_prompt_tokens=1)
        draft = Draft(torch.zeros(1, 3).long(), torch.tensor([3]), torch.full((1, 3), 0.5))
        live.survival(draft, [ended])
        ended.tokens += [5, 6]  # the second draft token was an end token
        ended.finish_reason = "stop"
        accepted = torch.tensor([[True, True, after_end]])
        live.observe(StepRecord(request_ids=[0], kept=draft.real, accepted_nodes=accepted))
        learned.append(live.classes[""].coefficients)
    assert np.array_equal(*learned) and learned[0].any()


def test_the_share_of_whole_drafts_is_bounded() -> None:
    live = LiveBeliefs(settings=LiveSettings(full_share=0.02))
    assert sum(len(live.wants_whole(100)) for _ in range(200)) / 20_000 == pytest.approx(0.02, abs=0.005)


def test_what_was_learned_survives_a_restart(tmp_path: Path) -> None:
    live, path = LiveBeliefs(identity="mine"), tmp_path / "beliefs.json"
    world().serve(live, 60, threshold=0.1, classes=[None, "chat"])
    live.save(path)
    again = LiveBeliefs(identity="mine")
    again.load(path)
    draft, _ = world(seed=4).draft()
    requests = [request(-1 - b, "chat" if b % 2 else None) for b in range(len(draft.tokens))]
    assert torch.equal(live.survival(draft, requests), again.survival(draft, requests))
    other = LiveBeliefs(identity="other")
    with pytest.raises(CheckpointError, match="identity is 'mine', expected 'other'"):
        other.load(path)


@pytest.mark.parametrize("damage", ["", "[]", "{}", "nan", "huge", "shape"])
def test_a_corrupt_file_is_refused_and_changes_nothing(tmp_path: Path, damage: str) -> None:
    live, path = LiveBeliefs(), tmp_path / "beliefs.json"
    live.save(path)
    content = json.loads(path.read_text())
    if damage == "nan":
        content["classes"][""]["coefficients"][0] = float("nan")
    if damage == "huge":
        content["classes"][""]["num_rounds"] = 10**400
    if damage == "shape":
        content["classes"][""]["information"].pop()
    path.write_text(json.dumps(content) if damage in ("nan", "huge", "shape") else damage)
    before = live.classes
    with pytest.raises(CheckpointError, match="delete it") as raised:
        live.load(path)
    assert "\n" not in str(raised.value) and live.classes is before


def test_the_summary_shows_where_beliefs_stand() -> None:
    live = LiveBeliefs(num_positions=7)
    world().serve(live, 300)
    summary = live.summary()
    assert json.loads(json.dumps(summary)) == summary
    everyone = summary["classes"]["everyone"]
    assert everyone["rounds"] == pytest.approx(300 * 16, abs=64)
    assert everyone["temperature"] == pytest.approx(1 / 0.6, rel=0.25)
    assert max(summary["calibration_error"][:4]) < 0.06 and max(map(abs, summary["bias"][:3])) < 0.03


def test_alarms_are_warnings(caplog: pytest.LogCaptureFixture) -> None:
    live = LiveBeliefs(settings=LiveSettings(most_classes=0))
    draft, _ = world().draft()
    with caplog.at_level(logging.WARNING):
        for name in ("a", "b"):
            live.survival(draft, [request(b, name) for b in range(16)])
    assert caplog.text.count("traffic classes") <= 1
