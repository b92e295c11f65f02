"""A checkpoint as it lies on disk: config.json and safetensors files, read header first."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dspark.errors import CheckpointError
from dspark.target.loading import resolve

_STEP = re.compile(r"step_(\d+)")


@dataclass(frozen=True)
class TensorHeader:
    """dtype as safetensors spells it: BF16, F32, ..."""

    shape: tuple[int, ...]
    dtype: str
    file: Path

    @property
    def numel(self) -> int:
        """How many numbers the tensor has."""
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True)
class Checkpoint:
    """One folder with config.json and weights. Nothing is read before it is asked for."""

    name: str
    path: Path

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json, whatever its dialect."""
        file = self.path / "config.json"
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{self.name}: config.json cannot be read ({error}); expected one JSON object. Copy it again"
            ) from error
        if not isinstance(config, dict):
            raise CheckpointError(f"{self.name}: config.json must be one JSON object; got a {type(config).__name__}")
        return config

    def with_config(self, **changes: Any) -> Checkpoint:
        """The same weights, read as if config.json said otherwise."""
        other = Checkpoint(self.name, self.path)
        other.__dict__["config"] = {**self.config, **changes}
        return other

    @property
    def architecture(self) -> str:
        """The first architecture that config.json names; ? where it names none."""
        return str((self.config.get("architectures") or ["?"])[0])

    @cached_property
    def files(self) -> list[Path]:
        """The safetensors files: one, or those that the index names."""
        single, index = self.path / "model.safetensors", self.path / "model.safetensors.index.json"
        if single.is_file():
            return [single]
        if index.is_file():
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            if missing := [name for name in names if not (self.path / name).is_file()]:
                raise CheckpointError(
                    f"{self.name}: the index names {', '.join(missing)}, which is not there; the copy is incomplete"
                )
            return [self.path / name for name in names]
        found = ", ".join(sorted(p.name for p in self.path.iterdir())[:6])
        raise CheckpointError(f"{self.name}: expected model.safetensors (or its index) in {self.path}; found {found}")

    @cached_property
    def tensors(self) -> Mapping[str, TensorHeader]:
        """By name: what the files say of each tensor, without reading it."""
        headers = {}
        for file in self.files:
            try:
                with safe_open(file, framework="pt") as opened:
                    for name in opened.keys():  # noqa: SIM118  it is no mapping
                        piece = opened.get_slice(name)
                        headers[name] = TensorHeader(tuple(piece.get_shape()), str(piece.get_dtype()), file)
            except (OSError, SafetensorError) as error:
                raise CheckpointError(
                    f"{self.name}: {file.name} is not a readable safetensors file ({error}); copy or download it again"
                ) from error
        return headers

    def read(self, names: list[str]) -> dict[str, Tensor]:
        """The tensors of these names."""
        read: dict[str, Tensor] = {}
        for file in self.files:
            with safe_open(file, framework="pt") as opened:
                read |= {name: opened.get_tensor(name) for name in names if self.tensors[name].file == file}
        return read

    @property
    def num_bytes(self) -> int:
        """Of the weights on disk."""
        return sum(file.stat().st_size for file in self.files)


def open_checkpoint(name_or_path: str, revision: str | None = None) -> Checkpoint:
    """A folder with config.json, a training run's folder (its newest step), an embedded model's name, or a hub id."""
    path = Path(name_or_path).expanduser()
    if path.is_dir() and not (path / "config.json").is_file() and (step := _newest_step(path)) is not None:
        return Checkpoint(name_or_path, step)
    found = Path(resolve(name_or_path))
    if found.is_dir():
        return Checkpoint(name_or_path, found)
    try:
        fetched = snapshot_download(
            name_or_path, revision=revision, allow_patterns=["config.json", "*.safetensors", "*.safetensors.index.json"]
        )
    except (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{name_or_path} is not a local folder and could not be fetched from the hub ({reason}); "
            "check the spelling and the network"
        ) from error
    return Checkpoint(name_or_path, Path(fetched))


def _newest_step(run: Path) -> Path | None:
    """Of a folder that DeepSpec's trainer wrote: step_latest, else the highest step_<N>."""
    latest = run / "step_latest"
    if (latest / "config.json").is_file():
        return latest.resolve()
    steps = {int(m[1]): p for p in run.iterdir() if (m := _STEP.fullmatch(p.name)) and (p / "config.json").is_file()}
    return steps[max(steps)] if steps else None
