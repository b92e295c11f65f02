"""Correct all confidences of a drafter on disk by one number: its confidence head's bias, and not a bit besides."""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dspark.checkpoints.folder import Checkpoint
from dspark.errors import CheckpointError

BIAS = "confidence_head.proj.bias"


def add_to_confidence_bias(folder: Path, bias: float) -> None:
    """Add `bias` to the logit of every confidence; a kill in between leaves the old file or the new one."""
    checkpoint = Checkpoint(str(folder), folder)
    if BIAS not in checkpoint.tensors:
        raise CheckpointError(f"{folder} has no {BIAS}: expected a drafter with a confidence head")
    file = checkpoint.tensors[BIAS].file
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    tensors[BIAS] = (tensors[BIAS].double() + bias).to(tensors[BIAS].dtype)
    partial = file.with_name(file.name + ".partial")
    try:
        save_file(tensors, partial, metadata=metadata)
        shutil.copymode(file, partial)
        partial.replace(file)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise CheckpointError(f"{file} cannot be written ({error}); it is as it was") from error
