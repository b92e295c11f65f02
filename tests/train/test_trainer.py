"""The trainer: it learns, a stop changes nothing, and what it saves is what the engine loads."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from dspark import load_drafter, load_target
from dspark.errors import DSparkError, InvalidConfiguration
from dspark.losses import LossWeights
from dspark.train.regenerate import Row, save_shard
from dspark.train.trainer import DrafterSettings, Trainer, TrainSettings

DSPARK = DrafterSettings(
    num_hidden_layers=1,
    target_layer_ids=(0, 2),
    mask_token_id=3,
    block_size=4,
    markov_rank=8,
    enable_confidence_head=True,
)
DFLASH = dataclasses.replace(DSPARK, markov_rank=0, enable_confidence_head=False)
SETTINGS = TrainSettings(
    steps=12,
    tokens_per_batch=160,
    anchors_per_batch=32,
    num_validation=3,
    validate_every=6,
    log_every=4,
    mean_decay=0.9,
    save_seconds=0.0,
)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Counting: easily learned by heart; 20 texts, so that 12 steps are several passes."""
    folder = tmp_path_factory.mktemp("texts")
    rows = [Row([7, 8, 9, *(10 + (i + j) % 12 for j in range(24 + i % 3))], 3) for i in range(20)]
    save_shard(rows, folder / "shard-0000.safetensors")
    return folder


def make(
    target: Path,
    texts: Path,
    out: Path,
    drafters: dict[str, DrafterSettings] | None = None,
    weights: LossWeights = LossWeights(),  # noqa: B008  it is frozen
    **changes: Any,
) -> Trainer:
    settings = dataclasses.replace(SETTINGS, **changes)
    target_config = AutoConfig.from_pretrained(target).to_dict()
    recipes = [
        (drafter.config(target_config), settings, weights, out / name)
        for name, drafter in (drafters or {"dspark": DSPARK}).items()
    ]
    return Trainer(target, texts, settings, recipes)


def test_the_loss_falls_on_text_that_can_be_learned_by_heart(target_folder: Path, texts: Path, tmp_path: Path) -> None:
    weights = LossWeights(cross_entropy=1.0, total_variation=0.0, confidence=0.0)
    trainer = make(target_folder, texts, tmp_path, weights=weights, steps=80, save_seconds=1e9)
    [student] = trainer.students
    before = trainer.validate(student)
    trainer.run()
    after = trainer.validate(student)
    assert after["cross_entropy"] < 0.5 * before["cross_entropy"]


def test_a_stop_changes_no_bit(
    target_folder: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = {"dspark": DSPARK, "dflash": DFLASH}
    make(target_folder, texts, tmp_path / "whole", both).run()
    stopped = make(target_folder, texts, tmp_path / "stopped", both)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "validate", stop)
        with pytest.raises(KeyboardInterrupt):
            stopped.run()
    again = make(target_folder, texts, tmp_path / "stopped", both)
    again.resume()
    assert again.progress["step"] == SETTINGS.validate_every - 1  # it was stopped before it saved the step
    again.run()
    for name in both:
        whole, resumed = (
            torch.load(tmp_path / run / name / "training_state.pt", weights_only=True) for run in ("whole", "stopped")
        )
        assert whole["progress"]["tokens"] == resumed["progress"]["tokens"]
        for key, value in whole["model"].items():
            assert torch.equal(value, resumed["model"][key]), key
        saved = [load_file(tmp_path / run / name / "model.safetensors") for run in ("whole", "stopped")]
        assert all(torch.equal(value, saved[1][key]) for key, value in saved[0].items())


def test_the_engines_loaders_take_what_is_saved(target_folder: Path, texts: Path, tmp_path: Path) -> None:
    drafters = {"dspark": DSPARK, "dflash": DFLASH, "rnn": dataclasses.replace(DSPARK, markov_head_type="rnn")}
    trainer = make(target_folder, texts, tmp_path, drafters, steps=2, start_from_target=True)
    trainer.run()
    target = load_target(target_folder, dtype="float32", device="cpu")
    for student in trainer.students:
        drafter = load_drafter(student.out, target)
        assert drafter.feature_layers == (0, 2) and drafter.length == 4
        for name, mean in student.mean.mean.items():
            torch.testing.assert_close(drafter.model.state_dict()[name], mean.bfloat16().float(), atol=0, rtol=0)


def test_a_loss_that_is_no_number_stops_with_the_saved_state_intact(
    target_folder: Path, texts: Path, tmp_path: Path
) -> None:
    trainer = make(target_folder, texts, tmp_path, steps=2)
    trainer.run()
    saved = (tmp_path / "dspark" / "model.safetensors").read_bytes()
    broken = make(target_folder, texts, tmp_path, steps=4)
    broken.resume()
    with torch.no_grad():
        broken.students[0].model.fc.weight[0, 0] = float("nan")
    with pytest.raises(DSparkError, match=r"the loss of dspark became nan.*lower lr_matrices"):
        broken.run()
    assert (tmp_path / "dspark" / "model.safetensors").read_bytes() == saved


def test_what_does_not_go_together_is_refused(target_folder: Path, texts: Path, tmp_path: Path) -> None:
    other = dataclasses.replace(DFLASH, target_layer_ids=(1, 2))
    with pytest.raises(InvalidConfiguration, match="same target layers"):
        make(target_folder, texts, tmp_path / "a", {"dspark": DSPARK, "dflash": other})
    with pytest.raises(InvalidConfiguration, match="num_validation between 1 and 19"):
        make(target_folder, texts, tmp_path / "b", num_validation=20)
    deep = dataclasses.replace(DSPARK, num_hidden_layers=4)
    with pytest.raises(InvalidConfiguration, match="start_from_target"):
        make(target_folder, texts, tmp_path / "c", {"dspark": deep}, start_from_target=True)
    make(target_folder, texts, tmp_path / "d", steps=2).run()
    with pytest.raises(InvalidConfiguration, match="of one step"):
        make(target_folder, texts, tmp_path / "d", {"dspark": DSPARK, "dflash": DFLASH}).resume()
