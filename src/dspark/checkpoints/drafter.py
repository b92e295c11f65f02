"""Read and write block drafters in DeepSpec's layout, strictly: a tensor too many is an error like a tensor too few."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dspark.checkpoints.dialects import MODELS, canonical
from dspark.checkpoints.folder import Checkpoint
from dspark.drafters.block_model import BlockConfig, BlockModel
from dspark.errors import CheckpointError
from dspark.target.target import Target

SHARED = ("embed_tokens.weight", "lm_head.weight")  # DeepSpec stores copies of the target's


@dataclass(frozen=True)
class LoadedDrafter:
    """embed_tokens and lm_head are the target's own modules unless the checkpoint's were asked for."""

    model: BlockModel
    embed_tokens: nn.Module
    lm_head: nn.Module


def load_block_drafter(
    checkpoint: Checkpoint,
    target: Target,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    own_embeddings: bool = False,
) -> LoadedDrafter:
    """Read a drafter for this target.

    dtype, device   None: the target's
    own_embeddings  keep the checkpoint's embedding and head where they differ from the target's, instead of refusing
    """
    config = read_config(checkpoint)
    if problems := [*unfit(config, target), *tensor_problems(checkpoint, empty_model(checkpoint, config))]:
        raise CheckpointError(
            f"the drafter {checkpoint.name} does not fit {target.name}: {'; '.join(problems)}. "
            "Use a drafter trained for this target, and check the copy if tensors are missing"
        )
    dtype, device = dtype or target.dtype, device or target.device
    model = empty_model(checkpoint, config)
    tensors = checkpoint.read(list(model.state_dict()))
    model.load_state_dict({name: t.to(device, dtype) for name, t in tensors.items()}, strict=True, assign=True)
    model.requires_grad_(False).eval()
    embed_tokens, lm_head = target.model.get_input_embeddings(), target.model.get_output_embeddings()
    different = [name for name in SHARED if name in checkpoint.tensors and not _is_targets(checkpoint, name, target)]
    if different and not own_embeddings:
        raise CheckpointError(
            f"the drafter {checkpoint.name} was made for another target: its {' and '.join(different)} differ from "
            f"{target.name}'s. Use the target it was trained for, or pass own_embeddings=True to keep its own "
            "(acceptance will be lower)"
        )
    for name in different:
        weight = checkpoint.read([name])[name].to(device, dtype)
        if name == "embed_tokens.weight":
            embed_tokens = OwnEmbedding(weight, float(getattr(embed_tokens, "scalar_embed_scale", 1.0)))
        else:
            lm_head = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            lm_head.weight = nn.Parameter(weight, requires_grad=False)
    return LoadedDrafter(model, embed_tokens, lm_head)


def save_drafter(model: BlockModel, folder: str | Path, dtype: torch.dtype = torch.bfloat16, **extra: Any) -> None:
    """Write config.json and model.safetensors. `extra` goes into the config.

    Embedding and head are left out: they are the target's, and the loader takes them from there.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {**model.config.to_dict(), "dtype": str(dtype).removeprefix("torch."), **extra}
    tensors = {name: t.detach().to("cpu", dtype).contiguous() for name, t in model.state_dict().items()}
    save_file(tensors, folder / "model.partial", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "model.partial").rename(folder / "model.safetensors")


def read_config(checkpoint: Checkpoint) -> BlockConfig:
    config = canonical(checkpoint.config, checkpoint.name)
    try:
        read = MODELS[config["architectures"][0]][0].from_dict(config)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.name}: {error}") from error
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{checkpoint.name}: a value in config.json has the wrong type ({error})") from error
    for field in dataclasses.fields(read):
        value = getattr(read, field.name)
        if field.type == "int" and (not isinstance(value, int) or value < 0):
            raise CheckpointError(
                f"{checkpoint.name}: {field.name} in config.json must be a whole number, 0 or more; got {value!r}"
            )
    return read


def empty_model(checkpoint: Checkpoint, config: BlockConfig) -> BlockModel:
    """The model without storage: names and shapes only."""
    architecture = canonical(checkpoint.config, checkpoint.name)["architectures"][0]
    with torch.device("meta"):
        return MODELS[architecture][1](config)


def unfit(config: BlockConfig, target: Target) -> list[str]:
    """Why a drafter of this shape cannot serve this target; empty if it can."""
    problems = []
    if config.hidden_size != target.hidden_size:
        problems.append(f"it is {config.hidden_size} wide and the target {target.hidden_size}")
    if config.vocab_size != target.vocab_size:
        problems.append(f"its vocabulary has {config.vocab_size} tokens and the target's {target.vocab_size}")
    if config.num_target_layers and config.num_target_layers != target.num_layers:
        problems.append(
            f"it was trained on {config.num_target_layers} target layers and this target has {target.num_layers}"
        )
    elif config.target_layer_ids[-1] >= target.num_layers - 1:
        problems.append(
            f"it wants the output of layer {config.target_layer_ids[-1]}; of this target's "
            f"{target.num_layers} layers features can come from -1 (the embedding) to {target.num_layers - 2}: "
            "the last one's output is known after the final norm only"
        )
    if not 0 <= config.mask_token_id < target.vocab_size:
        problems.append(f"its mask token {config.mask_token_id} is not among the target's {target.vocab_size} tokens")
    return problems


def tensor_problems(checkpoint: Checkpoint, model: BlockModel) -> list[str]:
    """Tensors that are missing, too many or of another shape; empty if the file is exactly this model."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    shared = (model.config.vocab_size, model.config.hidden_size)
    found = {name: header.shape for name, header in checkpoint.tensors.items()}
    problems = []
    if missing := sorted(expected.keys() - found.keys()):
        problems.append(f"{_some(missing)} missing from the file")
    if unexpected := sorted(found.keys() - expected.keys() - set(SHARED)):
        problems.append(f"{_some(unexpected)} in the file, but not in a drafter of this config")
    for name, shape in found.items():
        wanted = shared if name in SHARED else expected.get(name, shape)
        if shape != wanted:
            problems.append(f"{name} has shape {list(shape)}, expected {list(wanted)}")
    return problems


class OwnEmbedding(nn.Module):
    """An embedding of the checkpoint's own, scaled as the target scales its own."""

    def __init__(self, weight: Tensor, scale: float) -> None:
        super().__init__()
        self.weight, self.scale = nn.Parameter(weight, requires_grad=False), scale

    def forward(self, ids: Tensor) -> Tensor:
        rows = nn.functional.embedding(ids, self.weight)
        return rows if self.scale == 1.0 else rows * torch.tensor(self.scale, dtype=rows.dtype)


def _is_targets(checkpoint: Checkpoint, name: str, target: Target) -> bool:
    """Whether the stored copy is the target's own tensor, in the dtype in which the target runs."""
    embedding = (
        target.model.get_input_embeddings() if name == "embed_tokens.weight" else target.model.get_output_embeddings()
    )
    ours: Tensor = embedding.weight
    stored = checkpoint.read([name])[name]
    return ours.shape == stored.shape and all(torch.equal(a, b) for a, b in _chunks(ours, stored))


def _chunks(ours: Tensor, stored: Tensor, rows: int = 8192) -> Iterator[tuple[Tensor, Tensor]]:
    """Pieces in one dtype, so that comparing needs no second copy of a large table."""
    for start in range(0, len(ours), rows):
        yield ours[start : start + rows], stored[start : start + rows].to(ours.device, ours.dtype)


def _some(names: list[str], at_most: int = 4) -> str:
    return ", ".join(names[:at_most]) + (
        f" and {len(names) - at_most} more are" if len(names) > at_most else " is" if len(names) == 1 else " are"
    )
