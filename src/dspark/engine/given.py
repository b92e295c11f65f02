"""What users hand an engine, held to what it asks of it: what is wrong is said at once, and not in the midst of a step."""

from __future__ import annotations

from numbers import Integral
from typing import Any

from dspark.errors import InvalidConfiguration

_OF_A_DRAFTER = ("propose", "release", "length", "feature_layers")


def refuse_names(target: object, drafter: object) -> None:
    """Raise InvalidConfiguration for what stands for a target or a drafter and is none."""
    if isinstance(target, str):
        raise InvalidConfiguration(f"Engine takes a target and not its name: Engine(load_target({target!r}), ...)")
    if isinstance(drafter, str):
        raise InvalidConfiguration(
            f"Engine takes a drafter and not its name: Engine(target, load_drafter({drafter!r}, target))"
        )
    if isinstance(drafter, type):
        raise InvalidConfiguration(f"Engine takes a drafter and not its class: Engine(target, {drafter.__name__}(...))")


def features_for(drafter: Any, num_layers: int) -> tuple[int, ...]:
    """The layers of a target with so many whose outputs a drafter reads. InvalidConfiguration for what is no drafter."""
    what = type(drafter).__name__
    if lacking := [name for name in _OF_A_DRAFTER if not hasattr(drafter, name)]:
        raise InvalidConfiguration(f"{what} is no drafter: it has no {', '.join(lacking)} (docs/generate.md has one)")
    if not isinstance(drafter.length, Integral) or drafter.length < 0:
        raise InvalidConfiguration(
            f"the length of {what}, the most tokens of a draft, must be an integer, 0 or more; got {drafter.length!r}"
        )
    try:
        layers = tuple(drafter.feature_layers)
    except TypeError:
        layers = (drafter.feature_layers,)
    if not all(isinstance(layer, Integral) and -1 <= int(layer) < num_layers for layer in layers):
        raise InvalidConfiguration(
            f"the feature_layers of {what} must be layers of the target, 0 to {num_layers - 1} (-1: its embeddings), "
            f"or () for none; got {drafter.feature_layers!r}"
        )
    return tuple(int(layer) for layer in layers)
