"""One canonical form of a drafter's config.json, DeepSpec's, and one adapter for every other dialect.

Tensor names nearly agree between the stacks, the configs do not. A wrong guess about layer ids or about what a slot
predicts gives a drafter that is hardly ever right and never an error, so whatever a dialect leaves open is refused, and
`dspark doctor` measures what a checkpoint means.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from dspark.drafters.block_model import BlockConfig, BlockModel
from dspark.drafters.eagle3_model import Eagle3Config, Eagle3Model
from dspark.drafters.gemma4_layer import Gemma4BlockConfig, Gemma4BlockModel
from dspark.errors import CheckpointError

DrafterConfig: TypeAlias = BlockConfig | Eagle3Config
DrafterModel: TypeAlias = BlockModel | Eagle3Model

MODELS: dict[str, tuple[type[DrafterConfig], type[DrafterModel]]] = {
    "Qwen3DSparkModel": (BlockConfig, BlockModel),
    "Gemma4DSparkModel": (Gemma4BlockConfig, Gemma4BlockModel),
    "Qwen3Eagle3Model": (Eagle3Config, Eagle3Model),
    "LlamaEagle3Model": (Eagle3Config, Eagle3Model),  # not among DeepSpec's: EAGLE's own layer, without head norms
}
_BLOCK = {"qwen3": "Qwen3DSparkModel", "gemma4_text": "Gemma4DSparkModel"}
_EAGLE3 = {"qwen3": "Qwen3Eagle3Model", "llama": "LlamaEagle3Model"}
_EAGLE_NAMES = ("LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM")

Config = Mapping[str, Any]


def dialect(config: Config) -> str | None:
    """Which stack wrote this drafter's config; None: it is no drafter's."""
    architecture = (config.get("architectures") or [""])[0]
    if "speculators_model_type" in config or architecture.endswith("Speculator"):
        return "speculators"
    if architecture in MODELS:
        return "DeepSpec"
    if architecture in _EAGLE_NAMES or (architecture == "LlamaForCausalLM" and "draft_vocab_size" in config):
        return "EAGLE"
    if "Eagle" in architecture:
        return "another EAGLE"
    if architecture == "DFlashDraftModel":
        return "z-lab DFlash"
    if "dflash_config" in config:
        return "SpecForge"
    return "AngelSpec" if architecture == "DSparkDraftModel" else None


def require_dialect(config: Config, name: str) -> str:
    """Who wrote it; CheckpointError for what is no trained drafter."""
    written_by = dialect(config)
    if written_by is None:
        raise CheckpointError(
            f"{name} is no drafter that was trained as one: expected the architecture {', '.join(MODELS)} in its config.json; "
            f"got {config.get('architectures')}"
        )
    return written_by


def canonical(config: Config, name: str) -> dict[str, Any]:
    """The same drafter as DeepSpec would have written it. name is for messages."""
    written_by = require_dialect(config, name)
    if written_by not in _ADAPTERS:
        raise CheckpointError(f"{name} is a drafter in the {written_by} layout, which {_REFUSED[written_by]}")
    adapted = _ADAPTERS[written_by](config, name)
    _refuse_unsupported(adapted, name)
    return adapted


def canonical_tensor(stored: str) -> str:
    """A tensor's name as DeepSpec has it: EAGLE and SpecForge call the one layer `midlayer`."""
    return stored.replace("midlayer.", "layers.0.", 1) if stored.startswith("midlayer.") else stored


def _from_deepspec(config: Config, name: str) -> dict[str, Any]:
    return dict(config)


def _from_specforge(config: Config, name: str) -> dict[str, Any]:
    """The head's settings lie in dflash_config; layer ids and slots mean the same."""
    return {**config, **config["dflash_config"], "architectures": [_architecture(config, _BLOCK, name)]}


def _from_eagle(config: Config, name: str) -> dict[str, Any]:
    """EAGLE's release and SpecForge: Llama's layer, an LM head of its own, layer ids that count decoder layers from 0.

    Without ids they are the usual three of the target, known once the target is.
    """
    ids = (config.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids") or []
    if config.get("target_hidden_size", config.get("hidden_size")) != config.get("hidden_size"):
        raise CheckpointError(
            f"{name}: it is {config.get('hidden_size')} wide and its target {config['target_hidden_size']}, "
            "which is not supported; use a drafter as wide as its target"
        )
    adapted = {"trains_lm_head": True, "target_layer_ids": ids, **config}
    adapted.pop("num_target_layers", None)
    return {**adapted, "model_type": "llama", "architectures": [_EAGLE3["llama"]]}


def _from_speculators(config: Config, name: str) -> dict[str, Any]:
    """The backbone lies in transformer_layer_config; layer ids count hidden states, the first being the embedding."""
    kind = config.get("speculators_model_type", "dspark")
    if kind not in ("dspark", "dflash", "eagle3"):
        raise CheckpointError(f"{name}: expected the speculators_model_type dspark, dflash or eagle3; got {kind!r}")
    backbone = dict(config.get("transformer_layer_config") or {})
    own = {key: value for key, value in config.items() if value is not None}
    adapted = {**backbone, **own}
    if kind == "eagle3":
        return _eagle3_of_speculators(adapted, backbone, name)
    if not config.get("sample_from_anchor", False):
        raise CheckpointError(
            f"{name}: sample_from_anchor is {config.get('sample_from_anchor', 'absent')}, so the anchor's slot "
            "predicts nothing; this project reads drafters whose anchor slot predicts the first token. "
            "Set it to true only if the drafter was trained so"
        )
    if "aux_hidden_state_layer_ids" not in config:
        raise CheckpointError(f"{name}: expected aux_hidden_state_layer_ids in a speculators config; it is not there")
    reduced = config.get("draft_vocab_size")
    if reduced is not None and reduced != backbone.get("vocab_size"):
        raise CheckpointError(
            f"{name}: its vocabulary is reduced to {reduced} of {backbone.get('vocab_size')} tokens, "
            "which block drafters cannot have yet; use a drafter with the full vocabulary"
        )
    adapted["target_layer_ids"] = [i - 1 for i in config["aux_hidden_state_layer_ids"]]
    adapted["architectures"] = [_architecture(backbone, _BLOCK, name)]
    if config.get("markov_head_is_zero"):  # vLLM knows no drafter of this kind without a head
        adapted["markov_rank"] = 0
    return adapted


def _eagle3_of_speculators(adapted: dict[str, Any], backbone: Config, name: str) -> dict[str, Any]:
    for key in ("norm_before_fc", "fc_norm", "norm_output"):
        if adapted.get(key):
            raise CheckpointError(f"{name}: {key} is {adapted[key]}, which is not supported; expected it to be off")
    ids = adapted.get("eagle_aux_hidden_state_layer_ids") or []
    return {
        "trains_lm_head": True,
        "norm_before_residual": True,  # what an absent key means to vLLM
        **adapted,
        "model_type": backbone.get("model_type", "llama"),
        "target_layer_ids": [i - 1 for i in ids],
        "architectures": [_architecture({"model_type": "llama", **backbone}, _EAGLE3, name)],
    }


_ADAPTERS: dict[str, Callable[[Config, str], dict[str, Any]]] = {
    "DeepSpec": _from_deepspec,
    "SpecForge": _from_specforge,
    "EAGLE": _from_eagle,
    "speculators": _from_speculators,
}
_REFUSED = {
    "another EAGLE": "is not supported; use one with Qwen3's or Llama's layer (Qwen3Eagle3Model, LlamaForCausalLMEagle3)",
    "z-lab DFlash": "is not supported: its anchor slot predicts nothing. Use a DFlash drafter that DeepSpec trained",
    "AngelSpec": "is not supported: its config does not say what a slot predicts. Convert it to DeepSpec's layout",
}


def _architecture(config: Config, by_model_type: Mapping[str, str], name: str) -> str:
    model_type = config.get("model_type", "")
    if model_type not in by_model_type:
        raise CheckpointError(
            f"{name}: expected a backbone of model_type {' or '.join(by_model_type)}; got {model_type!r}"
        )
    return by_model_type[model_type]


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
