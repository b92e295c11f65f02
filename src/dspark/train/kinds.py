"""From the recipe's [drafter] table and the target's own shape to a drafter's config: one small table of kinds.

A model class needs `config.target_layer_ids`, `layers`, and `loss(batch, embed, lm_head, weights)`; the trainer asks
for nothing else. A newcomer is an architecture in `checkpoints.dialects.MODELS`, and a name here if it wants one.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping
from typing import Any

from dspark.checkpoints.dialects import MODELS
from dspark.errors import InvalidConfiguration

# kind: (architecture, what is set where the recipe says nothing)
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "dspark": (
        "Qwen3DSparkModel",
        {"block_size": 7, "markov_rank": 256, "enable_confidence_head": True, "confidence_head_with_markov": True},
    ),
    "dflash": ("Qwen3DSparkModel", {"block_size": 7, "markov_rank": 0, "enable_confidence_head": False}),
    "eagle3": ("Qwen3Eagle3Model", {"num_hidden_layers": 1}),
}
_NEVER_TEXT = re.compile(r"reserved|unused|placeholder|extra_id|dummy", re.IGNORECASE)
_NUM_FEATURES = 5  # layers, as released


def make_config(table: Mapping[str, Any], shape: Mapping[str, Any], tokenizer: Any, where: str) -> tuple[str, Any]:
    """(architecture, config) for the [drafter] table; shape as `shape_of` gives it."""
    own = dict(table)
    kind, architecture = own.pop("kind", None), own.pop("architecture", None)
    if kind is not None and kind not in KINDS:
        raise InvalidConfiguration(f"{where}: kind must be one of {', '.join(KINDS)}; got {kind!r}")
    if kind is None and architecture is None:
        kind = "dspark" if own.get("markov_rank", 1) else "dflash"
    default_architecture, defaults = KINDS[kind] if kind else (architecture, {})
    architecture = architecture or default_architecture
    if architecture not in MODELS:
        raise InvalidConfiguration(f"{where}: architecture must be one of {', '.join(MODELS)}; got {architecture!r}")
    config_class = MODELS[architecture][0]
    names = [field.name for field in dataclasses.fields(config_class)]
    for key in own:
        if key not in names:
            near = difflib.get_close_matches(key, names, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: kind, architecture, {', '.join(names)}"
            raise InvalidConfiguration(f"unknown key {key!r} in {where}: {hint}")
    values = {**shape, **defaults, **own}
    values.setdefault("num_hidden_layers", 2)
    values.setdefault("target_layer_ids", spread_layers(shape["num_target_layers"]))
    if "mask_token_id" in names and "mask_token_id" not in values:
        values["mask_token_id"] = find_mask_token(tokenizer, shape["vocab_size"], where)
    return architecture, config_class.from_dict(values)


def shape_of(config: Any) -> dict[str, Any]:
    """What a drafter takes over from its target's text config, by the names every family answers to."""
    layers = getattr(config, "per_layer_config", None)
    layer = layers[-1] if layers else config  # where layers differ (Gemma 4) the last one, which sees everything
    hidden_size, heads = int(config.hidden_size), int(layer.num_attention_heads)
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention") or rope
    head_dim = getattr(layer, "head_dim", None) or hidden_size // heads
    shape = {
        "hidden_size": hidden_size,
        "intermediate_size": getattr(layer, "intermediate_size", None) or 4 * hidden_size,
        "num_attention_heads": heads,
        "num_key_value_heads": getattr(layer, "num_key_value_heads", None) or heads,
        "head_dim": int(head_dim),
        "vocab_size": int(config.vocab_size),
        "num_target_layers": int(config.num_hidden_layers),
        "rms_norm_eps": getattr(config, "rms_norm_eps", None) or 1e-6,
        "rope_theta": float(rope.get("rope_theta") or getattr(config, "rope_theta", None) or 10000.0),
        "max_position_embeddings": int(getattr(config, "max_position_embeddings", None) or 2048),
        "final_logit_softcapping": getattr(config, "final_logit_softcapping", None),
    }
    return {name: value for name, value in shape.items() if value is not None}


def spread_layers(num_layers: int) -> list[int]:
    """Up to five layers spread over the target's depth, the last one left out: 1, 9, 17, 25, 33 of 36, as released."""
    first, last = (1, num_layers - 3) if num_layers >= 8 else (0, num_layers - 2)
    if last < first:
        return [-1]
    steps = min(_NUM_FEATURES, last - first + 1)
    return sorted({first + round(i * (last - first) / max(1, steps - 1)) for i in range(steps)})


def find_mask_token(tokenizer: Any, vocab_size: int, where: str) -> int:
    """A token that no text contains: the tokenizer's mask, the first id it does not know, or one it keeps unused.

    Where there is none of these: the unknown token of a tokenizer that spells in bytes what it does not know, the
    padding, or the end token, after which nothing is drafted.
    """
    if tokenizer is not None:
        own = tokenizer.mask_token_id
        if own is not None and own < vocab_size:
            return int(own)
        vocabulary = tokenizer.get_vocab()
        known = {*vocabulary.values()}  # ids may leave gaps
        unknown = next((token_id for token_id in range(vocab_size) if token_id not in known), None)
        if unknown is not None:
            return unknown
        for token_id, token in sorted(tokenizer.added_tokens_decoder.items()):
            if _NEVER_TEXT.search(str(token)):
                return int(token_id)
        spelt = tokenizer.unk_token_id if "<0x00>" in vocabulary else None
        for token_id in (spelt, tokenizer.pad_token_id):
            if token_id not in (None, tokenizer.bos_token_id, tokenizer.eos_token_id):
                return int(token_id)
        if tokenizer.eos_token_id is not None:
            return int(tokenizer.eos_token_id)
    raise InvalidConfiguration(
        f"{where}: expected mask_token_id, an id that no text contains; this tokenizer has no token of that kind: "
        "name one that your texts never use"
    )
