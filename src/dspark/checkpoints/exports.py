"""A drafter as another stack writes it: its config and the tensors that belong into the file.

Every writer gets the canonical config and the canonical tensors, with the target's embedding and head among them where
they are known, and says which of them its dialect stores. What a dialect cannot express is refused, never bent.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dspark.checkpoints.dialects import DrafterConfig
from dspark.drafters.block_model import BlockConfig
from dspark.drafters.eagle3_model import Eagle3Config
from dspark.errors import CheckpointError

_log = logging.getLogger("dspark.checkpoints")

Tensors = dict[str, Tensor]
EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Drafter:
    """What is to be written.

    tensors   canonical names; embedding and head are there if the source or a target supplied them
    own       those of the embedding and the head that are not the target's; None: no target to compare with
    verifier  the target's name and architecture, for stacks that write them down
    """

    name: str
    config: DrafterConfig
    tensors: Mapping[str, Tensor]
    own: frozenset[str] | None
    verifier: tuple[str | None, str | None]

    def need(self, tensor: str, why: str) -> Tensor:
        """A tensor that the other stack stores; `why` begins the sentence that says it is missing."""
        if tensor not in self.tensors:
            raise CheckpointError(f"{self.name}: {why} {tensor}, and this file has none: name its target with --target")
        return self.tensors[tensor]

    @property
    def body(self) -> Tensors:
        """All but embedding and head."""
        return {name: t for name, t in self.tensors.items() if name not in (EMBEDDING, HEAD)}

    @property
    def dtype(self) -> str:
        """Of the weights, as config.json names it."""
        return str(self.tensors["fc.weight"].dtype).removeprefix("torch.")


def to_own(drafter: Drafter) -> tuple[dict[str, Any], Tensors]:
    """DeepSpec's config; no copy of what the target has. Without a target to compare with, all stays."""
    left_out = set() if drafter.own is None else {EMBEDDING, HEAD} - drafter.own
    tensors = {name: t for name, t in drafter.tensors.items() if name not in left_out}
    return {**drafter.config.to_dict(), "dtype": drafter.dtype}, tensors


def to_deepspec(drafter: Drafter) -> tuple[dict[str, Any], Tensors]:
    """As DeepSpec's trainer saves it: with full copies of the target's embedding and head."""
    config = drafter.config
    if isinstance(config, Eagle3Config):
        if config.model_type != "qwen3" or config.draft_vocab_size or config.norm_before_residual:
            raise CheckpointError(
                f"{drafter.name}: DeepSpec has EAGLE-3 drafters with Qwen3's layer, the whole vocabulary and the plain "
                "residual only, and this one differs: convert it with --to speculators, specforge or dspark"
            )
        if not config.target_layer_ids:
            raise CheckpointError(f"{drafter.name}: DeepSpec's config names the feature layers: name its --target")
    for name in (EMBEDDING, HEAD):
        drafter.need(name, "DeepSpec's layout holds copies of the target's embedding and head; it lacks")
    values = {**config.to_dict(), "dtype": drafter.dtype}
    values.pop("trains_lm_head", None)
    return values, dict(drafter.tensors)


def to_specforge(drafter: Drafter) -> tuple[dict[str, Any], Tensors]:
    """SpecForge: a block drafter's settings in dflash_config; EAGLE-3 with Llama's layer, a head and its vocabulary."""
    config, body = drafter.config, drafter.body
    if isinstance(config, BlockConfig):
        values = config.to_dict()
        heads = {key: values.pop(key) for key in _BLOCK_SETTINGS if key in values}
        architecture = {"architectures": ["DSparkDraftModel"]}
        return {**values, **architecture, "dtype": drafter.dtype, "dflash_config": heads}, body
    if config.model_type != "llama" or config.norm_before_residual:
        raise CheckpointError(
            f"{drafter.name}: SpecForge's EAGLE-3 has Llama's layer (no norms of queries and keys, plain residual), "
            "and this one differs: convert it with --to speculators or dspark"
        )
    values = {
        **_backbone(config),
        "architectures": ["LlamaForCausalLMEagle3"],
        "draft_vocab_size": config.draft_vocab_size or config.vocab_size,
        "dtype": drafter.dtype,
    }
    if config.target_layer_ids:
        ids = list(config.target_layer_ids)
        values["eagle_config"] = {"use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": ids}
    tensors = {name.replace("layers.0.", "midlayer.", 1): t for name, t in body.items()}
    tensors[HEAD] = drafter.need(HEAD, "SpecForge stores the LM head of the draft vocabulary,")
    if config.draft_vocab_size is None:
        tensors["d2t"] = torch.zeros(config.vocab_size, dtype=torch.long)
        tensors["t2d"] = torch.ones(config.vocab_size, dtype=torch.bool)
    return values, tensors


def to_speculators(drafter: Drafter) -> tuple[dict[str, Any], Tensors]:
    """speculators 0.9 as vLLM 0.32 loads it: settings on top, backbone apart, layer ids that count hidden states."""
    config, own = drafter.config, drafter.own or frozenset()
    if type(config) not in (BlockConfig, Eagle3Config):
        raise CheckpointError(
            f"{drafter.name}: speculators has block drafters with Qwen3's layer only; vLLM reads this one in "
            "DeepSpec's layout: convert it with --to deepspec"
        )
    if not config.target_layer_ids:
        raise CheckpointError(
            f"{drafter.name}: its config names no feature layers, and speculators' has to: name --target"
        )
    make = _speculators_eagle3 if isinstance(config, Eagle3Config) else _speculators_block
    values, tensors = make(drafter)
    tensors |= {name: drafter.tensors[name] for name in (EMBEDDING, HEAD) if name in own}
    backbone = {**_backbone(config), "model_type": getattr(config, "model_type", "qwen3")}
    verifier = {"name_or_path": drafter.verifier[0], "architectures": [drafter.verifier[1]]}
    method = {
        "proposal_type": "greedy",
        "speculative_tokens": config.block_size,
        "verifier_accept_k": 1,
        "accept_tolerance": 0.0,
    }
    shared = {
        "speculators_version": "0.9.0",
        "dtype": drafter.dtype,
        "draft_vocab_size": getattr(config, "draft_vocab_size", None) or config.vocab_size,
        "num_target_layers": config.num_target_layers,
        "tie_word_embeddings": False,
        "speculators_config": {
            "algorithm": values["speculators_model_type"],
            "default_proposal_method": "greedy",
            "proposal_methods": [method],
            "verifier": verifier,
        },
        "transformer_layer_config": backbone,
    }
    return {**values, **shared}, tensors


def _speculators_block(drafter: Drafter) -> tuple[dict[str, Any], Tensors]:
    config, tensors = drafter.config, drafter.body
    assert isinstance(config, BlockConfig)
    values = {
        "architectures": ["DSparkSpeculator"],
        "speculators_model_type": "dspark",
        "aux_hidden_state_layer_ids": [i + 1 for i in config.target_layer_ids],
        "block_size": config.block_size,
        "mask_token_id": config.mask_token_id,
        "markov_rank": config.markov_rank,
        "markov_head_type": config.markov_head_type,
        "enable_confidence_head": config.enable_confidence_head,
        "confidence_head_with_markov": config.confidence_head_with_markov,
        "sample_from_anchor": True,  # vLLM takes an absent one for false, and is then hardly ever right
    }
    if config.markov_rank and config.markov_head_type != "vanilla":
        _log.warning("vLLM 0.32 loads vanilla sequential heads only; this one is %s", config.markov_head_type)
    if config.markov_rank == 0:
        # vLLM's DFlash lets masks only predict, so a drafter without a head goes there as DSpark with a head of zeros.
        values |= {"markov_rank": 1, "markov_head_type": "vanilla", "markov_head_is_zero": True}
        for name in ("markov_w1", "markov_w2"):
            tensors[f"markov_head.{name}.weight"] = tensors["fc.weight"].new_zeros(config.vocab_size, 1)
    return values, tensors


def _speculators_eagle3(drafter: Drafter) -> tuple[dict[str, Any], Tensors]:
    config, tensors = drafter.config, drafter.body
    assert isinstance(config, Eagle3Config)
    values = {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "eagle_aux_hidden_state_layer_ids": [i + 1 for i in config.target_layer_ids],
        "norm_before_residual": config.norm_before_residual,
        "ttt_length": config.ttt_length,
        "trains_lm_head": config.trains_lm_head,
    }
    if config.draft_vocab_size is not None or config.trains_lm_head:
        tensors[HEAD] = drafter.need(HEAD, "speculators stores the LM head of a reduced vocabulary,")
    return values, tensors


WRITERS: dict[str, Callable[[Drafter], tuple[dict[str, Any], Tensors]]] = {
    "dspark": to_own,
    "deepspec": to_deepspec,
    "speculators": to_speculators,
    "specforge": to_specforge,
}

_BLOCK_SETTINGS = (
    "block_size",
    "mask_token_id",
    "target_layer_ids",
    "markov_rank",
    "markov_head_type",
    "enable_confidence_head",
    "confidence_head_with_markov",
)


def _backbone(config: DrafterConfig) -> dict[str, Any]:
    """The transformer's own keys, as transformers' config of the family has them."""
    values = config.to_dict()
    own = (*_BLOCK_SETTINGS, "num_target_layers", "architectures", "ttt_length", "draft_vocab_size")
    variants = ("norm_before_residual", "trains_lm_head", "draft_num_hidden_layers")
    backbone = {key: value for key, value in values.items() if key not in (*own, *variants)}
    # Both spellings: stacks on transformers 4 read the flat one.
    return {**backbone, "rope_theta": config.rope_theta, "rope_scaling": None}
