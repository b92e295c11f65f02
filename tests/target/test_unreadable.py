"""What a newcomer's folder may be instead of a model, and what the message says to do about it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dspark.errors import CheckpointError, InvalidConfiguration
from dspark.target import load_target


@pytest.fixture(scope="module")
def folder(make_pair: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    make_pair("llama").plain.save_pretrained(path)
    return path


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def change_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def test_an_adapter_and_a_gguf_file_are_no_models(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"LoRA adapter .* merge it"):
        load_target(tmp_path)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    for path in (tmp_path, tmp_path / "model.gguf"):
        with pytest.raises(CheckpointError, match="GGUF"):
            load_target(path)


def test_weights_of_another_shape(copy: Path) -> None:
    change_config(copy, hidden_size=64)
    with pytest.raises(CheckpointError, match=r"other shapes than its config\.json says"):
        load_target(copy)


def test_a_family_that_is_too_new(copy: Path) -> None:
    change_config(copy, model_type="tomorrows_model")
    with pytest.raises(InvalidConfiguration, match=r"does not know .*tomorrows_model.*--upgrade transformers"):
        load_target(copy)


def test_a_quantised_model_without_its_package(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.quantizers.quantizer_gptq.is_optimum_available", lambda: False)
    change_config(copy, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(InvalidConfiguration, match=r"needs a package .*pip install optimum"):
        load_target(copy)


def test_what_from_pretrained_does_not_take(copy: Path) -> None:
    with pytest.raises(InvalidConfiguration, match=r"unexpected keyword argument 'load_in_8bit'.*quantization_config"):
        load_target(copy, load_in_8bit=True)
    with pytest.raises(InvalidConfiguration, match="not from a Linear"):
        load_target(torch.nn.Linear(1, 1))  # type: ignore[arg-type]


def test_a_pickle_that_would_run_code(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    torch.save({"x": Path("somewhere")}, copy / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="save it again as safetensors"):
        load_target(copy)


@pytest.mark.parametrize("device", ["tpu-v9", "cuda:99"])
def test_a_device_that_is_not_here(folder: Path, device: str) -> None:
    with pytest.raises(InvalidConfiguration, match=f"the device {device} cannot be used here"):
        load_target(folder, device=device)
