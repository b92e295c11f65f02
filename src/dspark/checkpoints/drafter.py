"""Read drafters of every dialect, strictly, and write this project's own: a tensor too many is an error like one too few."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dspark.checkpoints.dialects import MODELS, DrafterConfig, DrafterModel, canonical, canonical_tensor
from dspark.checkpoints.folder import Checkpoint, TensorHeader
from dspark.checkpoints.prompt_format import template_note, tokenizer_problems
from dspark.drafters.block_model import BlockConfig
from dspark.drafters.eagle3_model import Eagle3Config
from dspark.errors import CheckpointError
from dspark.target.target import Target

log = logging.getLogger(__name__)

SHARED = ("embed_tokens.weight", "lm_head.weight")  # DeepSpec stores copies of the target's
VOCABULARY = ("d2t", "t2d")  # EAGLE stores them even where they say nothing


@dataclass(frozen=True)
class LoadedDrafter:
    """embed_tokens and lm_head are the target's own modules unless the checkpoint's were asked for.

    With a reduced vocabulary lm_head gives logits of the draft vocabulary.
    """

    model: DrafterModel
    embed_tokens: nn.Module
    lm_head: nn.Module


def load_block_drafter(
    checkpoint: Checkpoint,
    target: Target,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    own_embeddings: bool = False,
) -> LoadedDrafter:
    """Read a trained drafter, block or EAGLE-3, for this target.

    dtype, device   None: the target's
    own_embeddings  keep the checkpoint's embedding and head where they differ from the target's, instead of refusing
    """
    config = for_target(read_config(checkpoint), target)
    if problems := misfits(checkpoint, config, target):
        raise CheckpointError(
            f"the drafter {checkpoint.name} does not fit {target.name}: {'; '.join(problems)}. "
            "Use a drafter trained for this target, and check the copy if tensors are missing"
        )
    if note := template_note(checkpoint.config, target):
        log.warning("%s: %s", checkpoint.name, note)
    dtype, device = dtype or target.dtype, device or target.device
    model = empty_model(config)
    tensors = read_tensors(checkpoint, list(model.state_dict()))
    cast = {name: t.to(device, dtype) if t.is_floating_point() else t.to(device) for name, t in tensors.items()}
    model.load_state_dict(cast, strict=True, assign=True)
    model.requires_grad_(False).eval()
    _check_vocabulary(checkpoint, model)
    embed_tokens, lm_head = target.model.get_input_embeddings(), target.model.get_output_embeddings()
    ids = vocabulary(model)
    shared = [name for name in SHARED if name in stored_tensors(checkpoint)]
    different = [name for name in shared if not is_targets(checkpoint, name, target, ids)]
    foreign = [
        name for name in different if not (name == "lm_head.weight" and getattr(config, "trains_lm_head", False))
    ]
    if foreign and not own_embeddings:
        raise CheckpointError(
            f"the drafter {checkpoint.name} was made for another target: its {' and '.join(foreign)} differ from "
            f"{target.name}'s. Use the target it was trained for, or pass own_embeddings=True to keep its own "
            "(acceptance will be lower)"
        )
    if "embed_tokens.weight" in different:
        weight = read_tensors(checkpoint, ["embed_tokens.weight"])["embed_tokens.weight"].to(device, dtype)
        embed_tokens = OwnEmbedding(weight, float(getattr(embed_tokens, "scalar_embed_scale", 1.0)))
    if "lm_head.weight" in different:
        lm_head = _linear(read_tensors(checkpoint, ["lm_head.weight"])["lm_head.weight"].to(device, dtype))
    elif ids is not None:
        lm_head = _linear(lm_head.weight.detach()[ids.to(lm_head.weight.device)].to(device, dtype))
    return LoadedDrafter(model, embed_tokens, lm_head)


def save_drafter(model: DrafterModel, folder: str | Path, dtype: torch.dtype = torch.bfloat16, **extra: Any) -> None:
    """Write config.json and model.safetensors. `extra` goes into the config.

    Embedding and head are left out: they are the target's, and the loader takes them from there.
    """
    config = {**model.config.to_dict(), "dtype": str(dtype).removeprefix("torch."), **extra}
    tensors = model.state_dict()
    write_checkpoint(folder, config, {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()})


def write_checkpoint(folder: str | Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """config.json and model.safetensors; a kill in between leaves what was there before or the whole of the new."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    on_host = {name: t.detach().to("cpu").contiguous() for name, t in tensors.items()}
    save_file(on_host, folder / "model.partial", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "model.partial").rename(folder / "model.safetensors")


def read_config(checkpoint: Checkpoint) -> DrafterConfig:
    """The drafter's shape from config.json, in the dialect of any stack. Raises CheckpointError."""
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


def for_target(config: DrafterConfig, target: Target) -> DrafterConfig:
    """The same; where an EAGLE-3 checkpoint names no layers, with the usual three of this target."""
    if config.target_layer_ids or not isinstance(config, Eagle3Config):
        return config
    n = target.num_layers
    if n < 7:
        raise CheckpointError(
            f"the drafter names no feature layers, and the usual ones (second, middle, fourth from the end) are not "
            f"three layers of a target with {n}: add eagle_config.eagle_aux_hidden_state_layer_ids to its config.json"
        )
    return dataclasses.replace(config, target_layer_ids=(1, n // 2 - 1, n - 4))


def empty_model(config: DrafterConfig) -> DrafterModel:
    """The model without storage: names and shapes only."""
    make = next(model for kind, model in MODELS.values() if kind is type(config))
    with torch.device("meta"):
        return make(config)  # type: ignore[arg-type]  # each with its own


def stored_tensors(checkpoint: Checkpoint) -> dict[str, TensorHeader]:
    """Headers by canonical name; what only spells out a default is left out."""
    found = {canonical_tensor(name): header for name, header in checkpoint.tensors.items()}
    config = checkpoint.config
    if config.get("draft_vocab_size") == _vocab_size(config):
        found = {name: header for name, header in found.items() if name not in VOCABULARY}
    if config.get("markov_head_is_zero"):
        found = {name: header for name, header in found.items() if not name.startswith("markov_head.")}
    return found


def read_tensors(checkpoint: Checkpoint, names: list[str]) -> dict[str, Tensor]:
    """Tensors by canonical name."""
    stored = {canonical_tensor(name): name for name in checkpoint.tensors}
    read = checkpoint.read([stored[name] for name in names])
    return {canonical_tensor(name): tensor for name, tensor in read.items()}


def vocabulary(model: DrafterModel) -> Tensor | None:
    """[W]  target ids of the tokens a drafter with a reduced vocabulary can draft; None: all of them."""
    return getattr(model, "target_ids", None)


def misfits(checkpoint: Checkpoint, config: DrafterConfig, target: Target) -> list[str]:
    """Every reason why this drafter cannot serve this target; empty if it can."""
    wrong_tokens = tokenizer_problems(checkpoint.config, target)
    return [*unfit(config, target), *wrong_tokens, *tensor_problems(checkpoint, config)]


def unfit(config: DrafterConfig, target: Target) -> list[str]:
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
    if isinstance(config, BlockConfig) and not 0 <= config.mask_token_id < target.vocab_size:
        problems.append(f"its mask token {config.mask_token_id} is not among the target's {target.vocab_size} tokens")
    return problems


def tensor_problems(checkpoint: Checkpoint, config: DrafterConfig) -> list[str]:
    """Tensors that are missing, too many or of another shape; empty if the file is exactly this model."""
    expected = {name: tuple(tensor.shape) for name, tensor in empty_model(config).state_dict().items()}
    table = (config.vocab_size, config.hidden_size)
    shared = {"embed_tokens.weight": table, "lm_head.weight": table}
    if reduced := getattr(config, "draft_vocab_size", None):
        shared["lm_head.weight"] = (reduced, config.hidden_size)
    found = {name: header.shape for name, header in stored_tensors(checkpoint).items()}
    problems = []
    if missing := sorted(expected.keys() - found.keys()):
        problems.append(f"{_some(missing)} missing from the file")
    if unexpected := sorted(found.keys() - expected.keys() - set(SHARED)):
        problems.append(f"{_some(unexpected)} in the file, but not in a drafter of this config")
    for name, shape in found.items():
        wanted = shared[name] if name in SHARED else expected.get(name, shape)
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


def is_targets(checkpoint: Checkpoint, name: str, target: Target, ids: Tensor | None = None) -> bool:
    """Whether the stored copy is the target's own tensor, up to rounding to the coarser dtype of the two.

    ids [W]  of a head with a reduced vocabulary: the target's rows that it should be
    """
    is_head = name == "lm_head.weight"
    embedding = target.model.get_output_embeddings() if is_head else target.model.get_input_embeddings()
    ours: Tensor = embedding.weight
    if is_head and ids is not None:
        ours = ours[ids.to(ours.device)]
    stored = read_tensors(checkpoint, [name])[name]
    return ours.shape == stored.shape and all(torch.equal(a, b) for a, b in _chunks(ours, stored))


def _check_vocabulary(checkpoint: Checkpoint, model: DrafterModel) -> None:
    ids = vocabulary(model)
    if ids is None:
        return
    known: Tensor = model.t2d  # type: ignore[assignment]
    inside = (ids >= 0) & (ids < len(known))
    if not bool(inside.all()) or len(ids.unique()) != len(ids) or int(known.sum()) != len(ids) or not known[ids].all():
        raise CheckpointError(
            f"{checkpoint.name}: d2t and t2d do not describe one vocabulary; expected d2t to hold the target id minus "
            "the draft id of every draft token, and t2d to mark just those target ids. Copy the file again"
        )


def _vocab_size(config: Mapping[str, Any]) -> Any:
    return (config.get("transformer_layer_config") or config).get("vocab_size")


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def _chunks(ours: Tensor, stored: Tensor, rows: int = 8192) -> Iterator[tuple[Tensor, Tensor]]:
    """Pieces in the coarser of the two dtypes, in which a rounded copy equals what it was rounded from."""
    dtype = min(ours.dtype, stored.dtype, key=lambda dtype: dtype.itemsize)
    for start in range(0, len(ours), rows):
        yield ours[start : start + rows].to(dtype), stored[start : start + rows].to(ours.device, dtype)


def _some(names: list[str], at_most: int = 4) -> str:
    return ", ".join(names[:at_most]) + (
        f" and {len(names) - at_most} more are" if len(names) > at_most else " is" if len(names) == 1 else " are"
    )
