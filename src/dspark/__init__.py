"""DSpark: confidence-scheduled speculative decoding, an independent implementation.

from dspark import Engine, SamplingParams, load_drafter, load_target

target = load_target("tiny")
engine = Engine(target, load_drafter("dspark", target))
print(engine.generate(["What does river mean?"], SamplingParams(temperature=0))[0].text)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dspark.errors import (
    CheckpointError,
    DSparkError,
    InvalidConfiguration,
    InvalidRequest,
    OutOfSlots,
    UnsupportedModel,
)

if TYPE_CHECKING:
    from dspark.drafters.loading import load_drafter
    from dspark.engine.engine import Engine
    from dspark.target.loading import load_target
    from dspark.types import Delta, Draft, Drafter, Generation, Request, Round, SamplingParams, StepRecord

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "DSparkError",
    "Delta",
    "Draft",
    "Drafter",
    "Engine",
    "Generation",
    "InvalidConfiguration",
    "InvalidRequest",
    "OutOfSlots",
    "Request",
    "Round",
    "SamplingParams",
    "StepRecord",
    "UnsupportedModel",
    "load_drafter",
    "load_target",
]

# torch and transformers take seconds to import, so a name is looked up when it is first used.
_HOMES = {
    "Engine": "dspark.engine.engine",
    "load_drafter": "dspark.drafters.loading",
    "load_target": "dspark.target.loading",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES.get(name, "dspark.types")), name)


def __dir__() -> list[str]:
    return sorted(__all__)
