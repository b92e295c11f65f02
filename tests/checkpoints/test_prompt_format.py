"""A drafter says which tokens and which chat template it knows, and whoever loads it for others is told."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest

from checkpoints.test_drafter import CONFIG, load
from dspark.checkpoints import check_fit, open_checkpoint, save_drafter
from dspark.checkpoints.doctor import examine
from dspark.checkpoints.prompt_format import (
    fingerprint,
    system_prompt_note,
    template_fingerprint,
    tokenizer_fingerprint,
)
from dspark.drafters.block_model import BlockModel
from dspark.errors import CheckpointError
from dspark.target.target import Target
from engine.models import random_target


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    target = random_target(tmp_path_factory.mktemp("target"), num_layers=4)
    target.tokenizer = SimpleNamespace(get_vocab=lambda: {"a": 0, "b": 1}, chat_template="{{ messages }}")
    return target


def saved(folder: Path, **noted: str) -> Path:
    save_drafter(BlockModel(CONFIG), folder, **noted)
    return folder


def test_what_fits_is_loaded_without_a_word(tmp_path: Path, target: Target, caplog: pytest.LogCaptureFixture) -> None:
    own = {
        "tokenizer_sha256": tokenizer_fingerprint(target.tokenizer),
        "template_sha256": template_fingerprint(target.tokenizer),
    }
    for name, noted in (("noted", own), ("silent", {})):
        load(saved(tmp_path / name, **noted), target)
    assert not caplog.records


def test_another_template_is_warned_about(tmp_path: Path, target: Target, caplog: pytest.LogCaptureFixture) -> None:
    folder = saved(tmp_path, template_sha256="other")
    with caplog.at_level(logging.WARNING):
        load(folder, target)
    assert "trained with another chat template" in caplog.text
    assert check_fit(str(folder), target) == []


def test_a_system_prompt_of_training_is_noted() -> None:
    for noted in ({}, {"system_prompt_sha256": "unknown"}, {"system_prompt_sha256": fingerprint(None)}):
        assert system_prompt_note(noted) is None
    assert "serve with the same" in str(system_prompt_note({"system_prompt_sha256": fingerprint("Be brief.")}))


def test_another_tokenizer_is_refused_before_anything_is_computed(tmp_path: Path, target: Target) -> None:
    folder = saved(tmp_path, tokenizer_sha256="other", template_sha256="other", system_prompt_sha256="some")
    with pytest.raises(CheckpointError, match="trained with another tokenizer"):
        load(folder, target)
    [problem] = check_fit(str(folder), target)
    diagnosis = examine(open_checkpoint(str(folder)), target, [])
    assert diagnosis.problems == [problem]
    assert "another chat template" in diagnosis.notes[0] and "a system prompt of its own" in diagnosis.notes[1]
