"""From one stack's checkpoint to another's: the same tensors, bit for bit, under the names and the config they expect."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from dspark.checkpoints.dialects import DrafterConfig, dialect
from dspark.checkpoints.drafter import (
    SHARED,
    empty_model,
    for_target,
    is_targets,
    read_config,
    read_tensors,
    stored_tensors,
    tensor_problems,
    unfit,
    write_checkpoint,
)
from dspark.checkpoints.exports import HEAD, WRITERS, Drafter
from dspark.checkpoints.folder import Checkpoint
from dspark.checkpoints.prompt_format import NOTED
from dspark.errors import CheckpointError, InvalidConfiguration
from dspark.target.target import Target


@dataclass(frozen=True)
class Conversion:
    """What was done: dialects, and which tensors the source and the result hold."""

    written_by: str
    to: str
    folder: Path
    num_tensors: int
    num_bytes: int
    added: list[str]
    left_out: list[str]


def convert(
    source: Checkpoint, to: str, out: str | Path, target: Target | None = None, verifier: str | None = None
) -> Conversion:
    """Write `source` as another stack would have.

    to        one of WRITERS
    target    its target; needed where embedding or head must be added, and to leave out copies of them
    verifier  what to call the target in the config; None: the target's own name
    """
    if to not in WRITERS:
        raise InvalidConfiguration(f"expected one of {', '.join(WRITERS)} to convert to; got {to!r}")
    out = Path(out)
    if out.exists() and any(out.iterdir() if out.is_dir() else [out]):
        raise InvalidConfiguration(f"{out} is there and not empty; name a new folder")
    config, tensors = _read(source, target)
    own = None
    if target is not None:
        ids = _target_ids(config, tensors)
        own = frozenset(name for name in SHARED if name in tensors and not is_targets(source, name, target, ids))
        for name in SHARED:
            tensors.setdefault(name, _of_target(name, target, ids).to(tensors["fc.weight"].dtype))
    architecture = None if target is None else type(target.model).__name__
    verifier_name = verifier or (None if target is None else target.name)
    values, written = WRITERS[to](Drafter(source.name, config, tensors, own, (verifier_name, architecture)))
    noted = {key: source.config[key] for key in NOTED if key in source.config}  # for us: other stacks do not ask
    try:
        write_checkpoint(out, {**values, **noted}, written)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{out} could not be written ({error}): make room, or name another folder") from error
    before, after = set(source.tensors), set(written)
    return Conversion(
        written_by=str(dialect(source.config)),
        to=to,
        folder=out,
        num_tensors=len(written),
        num_bytes=sum(t.numel() * t.element_size() for t in written.values()),
        added=sorted(after - before),
        left_out=sorted(before - after),
    )


def _read(source: Checkpoint, target: Target | None) -> tuple[DrafterConfig, dict[str, Tensor]]:
    config = read_config(source)
    problems = []
    if target is not None:
        config = for_target(config, target)
        problems = unfit(config, target)
        config = dataclasses.replace(config, num_target_layers=target.num_layers)
    if problems := [*problems, *tensor_problems(source, config)]:
        raise CheckpointError(
            f"{source.name} cannot be converted: {'; '.join(problems)}. Check the copy, and the target if one was named"
        )
    return config, read_tensors(source, list(stored_tensors(source)))


def _target_ids(config: DrafterConfig, tensors: dict[str, Tensor]) -> Tensor | None:
    if "d2t" not in empty_model(config).state_dict():
        return None
    return torch.arange(len(tensors["d2t"])) + tensors["d2t"]


def _of_target(name: str, target: Target, ids: Tensor | None) -> Tensor:
    model = target.model
    weight: Tensor = (model.get_output_embeddings() if name == HEAD else model.get_input_embeddings()).weight.detach()
    return weight[ids.to(weight.device)] if name == HEAD and ids is not None else weight
