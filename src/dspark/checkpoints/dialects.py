"""One canonical form of a drafter's config.json, DeepSpec's, and one adapter for every other dialect.

Tensor names agree between the stacks, the configs do not. A wrong guess about layer ids or about what a slot predicts
gives a drafter that is hardly ever right and never an error, so whatever a dialect leaves open is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dspark.drafters.block_model import BlockConfig, BlockModel
from dspark.drafters.gemma4_layer import Gemma4BlockConfig, Gemma4BlockModel
from dspark.errors import CheckpointError

MODELS: dict[str, tuple[type[BlockConfig], type[BlockModel]]] = {
    "Qwen3DSparkModel": (BlockConfig, BlockModel),
    "Gemma4DSparkModel": (Gemma4BlockConfig, Gemma4BlockModel),
}
_BY_MODEL_TYPE = {"qwen3": "Qwen3DSparkModel", "gemma4_text": "Gemma4DSparkModel"}

Config = Mapping[str, Any]


def dialect(config: Config) -> str | None:
    """Which stack wrote this drafter's config; None: it is no drafter's."""
    architecture = (config.get("architectures") or [""])[0]
    if "speculators_model_type" in config or architecture.endswith("Speculator"):
        return "speculators"
    if "Eagle" in architecture:
        return "EAGLE-3"
    if architecture in MODELS:
        return "DeepSpec"
    if architecture == "DFlashDraftModel":
        return "z-lab DFlash"
    if "dflash_config" in config:
        return "SpecForge"
    return "AngelSpec" if architecture == "DSparkDraftModel" else None


def canonical(config: Config, name: str) -> dict[str, Any]:
    """The same drafter as DeepSpec would have written it. name is for messages."""
    written_by = dialect(config)
    if written_by is None:
        raise CheckpointError(
            f"{name} is no drafter: expected architectures to be one of {', '.join(MODELS)}; "
            f"got {config.get('architectures')}"
        )
    if written_by not in _ADAPTERS:
        raise CheckpointError(f"{name} is a drafter in the {written_by} layout, which {_REFUSED[written_by]}")
    adapted = _ADAPTERS[written_by](config, name)
    _refuse_unsupported(adapted, name)
    return adapted


def _from_deepspec(config: Config, name: str) -> dict[str, Any]:
    return dict(config)


def _from_specforge(config: Config, name: str) -> dict[str, Any]:
    """The head's settings lie in dflash_config; layer ids and slots mean the same."""
    return {**config, **config["dflash_config"], "architectures": [_architecture(config, name)]}


def _from_speculators(config: Config, name: str) -> dict[str, Any]:
    """The backbone lies in transformer_layer_config; layer ids count hidden states, the first being the embedding."""
    if config.get("speculators_model_type", "dspark") not in ("dspark", "dflash"):
        raise CheckpointError(
            f"{name}: expected the speculators_model_type dspark or dflash; got {config['speculators_model_type']!r}"
        )
    if not config.get("sample_from_anchor", False):
        raise CheckpointError(
            f"{name}: sample_from_anchor is {config.get('sample_from_anchor', 'absent')}, so the anchor's slot "
            "predicts nothing; this project reads drafters whose anchor slot predicts the first token. "
            "Set it to true only if the drafter was trained so"
        )
    backbone = dict(config.get("transformer_layer_config") or {})
    if "aux_hidden_state_layer_ids" not in config:
        raise CheckpointError(f"{name}: expected aux_hidden_state_layer_ids in a speculators config; it is not there")
    reduced = config.get("draft_vocab_size")
    if reduced is not None and reduced != backbone.get("vocab_size"):
        raise CheckpointError(
            f"{name}: its vocabulary is reduced to {reduced} of {backbone.get('vocab_size')} tokens, "
            "which is not supported yet; use a drafter with the full vocabulary"
        )
    adapted = {**backbone, **{key: value for key, value in config.items() if value is not None}}
    adapted["target_layer_ids"] = [i - 1 for i in config["aux_hidden_state_layer_ids"]]
    adapted["architectures"] = [_architecture(backbone, name)]
    return adapted


_ADAPTERS: dict[str, Callable[[Config, str], dict[str, Any]]] = {
    "DeepSpec": _from_deepspec,
    "SpecForge": _from_specforge,
    "speculators": _from_speculators,
}
_REFUSED = {
    "EAGLE-3": "is not supported yet; use a DSpark or DFlash drafter",
    "z-lab DFlash": "is not supported: its anchor slot predicts nothing. Use a DFlash drafter that DeepSpec trained",
    "AngelSpec": "is not supported: its config does not say what a slot predicts. Convert it to DeepSpec's layout",
}


def _architecture(config: Config, name: str) -> str:
    model_type = config.get("model_type")
    if model_type not in _BY_MODEL_TYPE:
        raise CheckpointError(
            f"{name}: expected a backbone of model_type {' or '.join(_BY_MODEL_TYPE)}; got {model_type!r}"
        )
    return _BY_MODEL_TYPE[model_type]


def _refuse_unsupported(config: Config, name: str) -> None:
    """Settings that change what the layers compute and that this project does not compute."""
    expected_activation = "gelu_pytorch_tanh" if "Gemma4" in config["architectures"][0] else "silu"
    activation = config.get("hidden_activation") or config.get("hidden_act") or expected_activation
    if activation != expected_activation:
        raise CheckpointError(f"{name}: expected the activation {expected_activation}; got {activation!r}")
    if others := sorted({str(t) for t in config.get("layer_types") or ()} - {"full_attention"}):
        raise CheckpointError(
            f"{name}: expected full_attention in every draft layer; layer_types also has {', '.join(others)}"
        )
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope = rope.get("full_attention") or rope
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("default", "proportional"):
        raise CheckpointError(
            f"{name}: expected default or proportional RoPE; got {kind!r}, which is not supported yet"
        )
