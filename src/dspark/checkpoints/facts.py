"""What a folder is, without loading it, and whether a drafter fits a target."""

from __future__ import annotations

from typing import Any

from dspark.checkpoints.dialects import canonical, dialect
from dspark.checkpoints.drafter import SHARED, for_target, misfits, read_config, stored_tensors
from dspark.checkpoints.folder import Checkpoint, open_checkpoint
from dspark.checkpoints.prompt_format import vocabulary_problems
from dspark.drafters.block_model import BlockConfig
from dspark.drafters.eagle3_model import Eagle3Config
from dspark.target.loading import load_tokenizer
from dspark.target.target import Target


def describe(path: str) -> dict[str, Any]:
    """Facts about a target or a drafter: what it is, its shape and its size on disk."""
    checkpoint = open_checkpoint(path)
    written_by = dialect(checkpoint.config)
    return _describe_target(checkpoint) if written_by is None else _describe_drafter(checkpoint, written_by)


def check_fit(path: str, target: Target) -> list[str]:
    """Every reason why the drafter or draft model at `path` cannot serve this target; empty if it can."""
    checkpoint = open_checkpoint(path)
    if dialect(checkpoint.config) is None:
        vocab_size = int(_text_config(checkpoint).get("vocab_size") or 0)
        return vocabulary_problems(vocab_size, load_tokenizer(checkpoint.name, str(checkpoint.path), {}), target)
    config = for_target(read_config(checkpoint), target)
    return misfits(checkpoint, config, target)


def _describe_drafter(checkpoint: Checkpoint, written_by: str) -> dict[str, Any]:
    config, stored = read_config(checkpoint), stored_tensors(checkpoint)
    is_copy = {name: name in SHARED and not getattr(config, "trains_lm_head", False) for name in stored}
    return {
        "kind": "drafter",
        "architecture": checkpoint.architecture,
        "dialect": written_by,
        "backbone": str(canonical(checkpoint.config, checkpoint.name)["architectures"][0]),
        "parameters": sum(header.numel for name, header in stored.items() if not is_copy[name]),
        "copied_from_target": sum(header.numel for name, header in stored.items() if is_copy[name]),
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        **(_describe_block(config) if isinstance(config, BlockConfig) else _describe_eagle3(config)),
        "target_layers": config.num_target_layers or None,
        **_storage(checkpoint),
    }


def _describe_block(config: BlockConfig) -> dict[str, Any]:
    return {
        "block_size": config.block_size,
        "head": config.markov_head_type if config.markov_rank else "none",
        "head_rank": config.markov_rank,
        "confidence_head": config.enable_confidence_head,
        "feature_layers": list(config.target_layer_ids),
        "mask_token_id": config.mask_token_id,
    }


def _describe_eagle3(config: Eagle3Config) -> dict[str, Any]:
    return {
        "trained_steps": config.ttt_length,
        "draft_vocab_size": config.draft_vocab_size or config.vocab_size,
        "confidence_head": False,
        "feature_layers": list(config.target_layer_ids) or "the target's usual three",
    }


def _describe_target(checkpoint: Checkpoint) -> dict[str, Any]:
    config = _text_config(checkpoint)
    return {
        "kind": "target",
        "architecture": checkpoint.architecture,
        "parameters": sum(header.numel for header in checkpoint.tensors.values()),
        "layers": config.get("num_hidden_layers"),
        "hidden_size": config.get("hidden_size"),
        "vocab_size": config.get("vocab_size"),
        "max_length": config.get("max_position_embeddings"),
        **_storage(checkpoint),
    }


def _storage(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "dtype": sorted({header.dtype for header in checkpoint.tensors.values()}),
        "bytes_on_disk": checkpoint.num_bytes,
    }


def _text_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """Of a model with several parts the language model's."""
    return {**checkpoint.config, **checkpoint.config.get("text_config", {})}
