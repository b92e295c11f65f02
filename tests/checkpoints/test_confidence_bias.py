"""A confidence head's bias is corrected on disk: every confidence moves by it, and nothing else does."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints.test_drafter import CONFIG
from dspark.checkpoints import open_checkpoint, save_drafter
from dspark.checkpoints.confidence_bias import BIAS, add_to_confidence_bias
from dspark.checkpoints.drafter import read_config, read_tensors, tensor_problems
from dspark.drafters.block_model import BlockModel
from dspark.errors import CheckpointError


def saved(folder: Path, **changes: object) -> BlockModel:
    torch.manual_seed(0)
    model = BlockModel(dataclasses.replace(CONFIG, **changes))
    torch.nn.init.normal_(model.state_dict()["fc.weight"])
    save_drafter(model, folder, torch.float32)
    return model


@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn"])
def test_confidences_move_and_nothing_else(tmp_path: Path, kind: str) -> None:
    model = saved(tmp_path, markov_head_type=kind)
    before, config = load_file(tmp_path / "model.safetensors"), (tmp_path / "config.json").read_bytes()
    add_to_confidence_bias(tmp_path, -0.25)
    after = load_file(tmp_path / "model.safetensors")
    assert list(after) == list(before)
    assert [name for name in before if not torch.equal(before[name], after[name])] == [BIAS]
    assert (tmp_path / "config.json").read_bytes() == config and not list(tmp_path.glob("*.partial"))
    checkpoint = open_checkpoint(str(tmp_path))
    assert not tensor_problems(checkpoint, read_config(checkpoint))
    hidden, e = torch.randn(3, CONFIG.hidden_size), torch.randn(3, CONFIG.markov_rank)
    stated = model.confidence(hidden, e)
    model.load_state_dict(read_tensors(checkpoint, list(model.state_dict())))
    assert stated is not None
    torch.testing.assert_close(model.confidence(hidden, e), stated - 0.25)


def test_of_several_files_one_is_written(tmp_path: Path) -> None:
    saved(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    files = {"a.safetensors": {n: t for n, t in tensors.items() if n != BIAS}, "b.safetensors": {BIAS: tensors[BIAS]}}
    for name, content in files.items():
        save_file(content, tmp_path / name)
    index = {"weight_map": {name: file for file, content in files.items() for name in content}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    written = (tmp_path / "a.safetensors").stat().st_mtime_ns
    add_to_confidence_bias(tmp_path, 0.5)
    assert (tmp_path / "a.safetensors").stat().st_mtime_ns == written
    assert float(load_file(tmp_path / "b.safetensors")[BIAS]) == float(tensors[BIAS]) + 0.5


def test_a_drafter_without_the_head_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, enable_confidence_head=False)
    with pytest.raises(CheckpointError, match="with a confidence head"):
        add_to_confidence_bias(tmp_path, 0.1)
