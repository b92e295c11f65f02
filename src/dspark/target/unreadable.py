"""Why a folder or a hub id could not be loaded, in the words of who can mend it."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError
from transformers import AutoConfig

from dspark.errors import CheckpointError, DSparkError, InvalidConfiguration

# What a checkpoint makes transformers raise: a bad one, or one that needs a package (ImportError).
UNREADABLE = (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError, pickle.UnpicklingError)


def explained(name: str, source: str, error: Exception, options: dict[str, Any]) -> DSparkError:
    """The error to raise in place of transformers' own."""
    text = str(error).strip()
    first_line = (text.splitlines() or [type(error).__name__])[0]
    if "trust_remote_code" in text and not options.get("trust_remote_code"):
        return InvalidConfiguration(
            f"{name} needs code from its repository, which is off unless asked for: pass trust_remote_code=True "
            "(--trust-remote-code) if you trust it, or choose a model that transformers knows"
        )
    if "Unrecognized configuration class" in text:
        return InvalidConfiguration(
            f"{name} is not a causal language model (its config says {_model_type(source)}); expected one that "
            "AutoModelForCausalLM loads"
        )
    if "does not recognize this architecture" in text:
        return InvalidConfiguration(
            f"transformers {transformers.__version__} does not know the model type of {name} ({_model_type(source)}): "
            "pip install --upgrade transformers, or choose another model"
        )
    if isinstance(error, ImportError) or "pip install" in text:
        return InvalidConfiguration(f"{name} needs a package that is not installed here: {first_line}")
    if isinstance(error, pickle.UnpicklingError):
        return CheckpointError(
            f"{name} holds a pickle with other things than tensors, which is not opened, because that can run any code; "
            "save it again as safetensors where you trust it, with model.save_pretrained(folder)"
        )
    if "ignore_mismatched_sizes" in text:
        return CheckpointError(
            f"the weights of {name} have other shapes than its config.json says (the report above names them); one of "
            "the two is of another model: copy both again"
        )
    if not Path(source).is_dir() and isinstance(error, OSError):
        return CheckpointError(
            f"{name} is not a local folder and could not be fetched from the hub ({first_line}); check the spelling, the "
            "network, and whether the model needs a token, or name a local folder"
        )
    return CheckpointError(
        f"{name} could not be loaded ({type(error).__name__}: {first_line}); expected a complete folder written by "
        "save_pretrained (config.json and weights)"
    )


def not_a_model(name: str, path: Path) -> CheckpointError:
    """For a folder or file that exists and has no config.json."""
    if path.suffix == ".gguf" or (path.is_dir() and any(path.glob("*.gguf"))):
        return CheckpointError(
            f"{name} is in llama.cpp's format (GGUF); expected the folder that it was converted from"
        )
    if path.is_file():
        return CheckpointError(f"{name} is a file; a folder (config.json and weights) or a hub id was expected")
    if (path / "adapter_config.json").is_file():
        return CheckpointError(
            f"{name} is a LoRA adapter and no whole model: merge it into its base model with peft (merge_and_unload, then "
            "save_pretrained) and name the merged folder"
        )
    return CheckpointError(
        f"{name} has no config.json: a folder written by save_pretrained was expected; it has {_listing(path)}"
    )


def _model_type(source: str) -> str:
    try:
        config = AutoConfig.from_pretrained(source)
    except UNREADABLE:
        path = Path(source) / "config.json"
        return str(json.loads(path.read_text()).get("model_type")) if path.is_file() else "nothing known"
    return str(config.model_type)


def _listing(path: Path) -> str:
    names = sorted(entry.name for entry in path.iterdir())
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") if names else "nothing"
