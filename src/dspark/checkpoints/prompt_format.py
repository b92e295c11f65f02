"""Which tokens and which chat template a drafter was trained on: `dspark train` notes their hashes in its config.json.

Neither shows in a tensor's shape. Other ids for the same words make a drafter useless without an error, another template
makes it worse.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from dspark.target.target import Target

NOTED = ("tokenizer_sha256", "template_sha256", "system_prompt_sha256")  # keys of config.json

_ENOUGH_ALIKE = 0.9  # tokens that two tokenizers of one family have in common


def fingerprint(value: Any) -> str:
    """SHA-256 of a value's JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Equal where the same tokens have the same ids."""
    return fingerprint(tokenizer.get_vocab())


def template_fingerprint(tokenizer: Any) -> str:
    """Equal for equal chat templates; `none` without one."""
    template = getattr(tokenizer, "chat_template", None)
    return "none" if template is None else fingerprint(template)


def tokenizer_problems(config: Mapping[str, Any], target: Target) -> list[str]:
    """Why a drafter with this config.json cannot read the target's tokens; empty if it can, or does not say."""
    noted = config.get("tokenizer_sha256")
    if noted is None or target.tokenizer is None or noted == tokenizer_fingerprint(target.tokenizer):
        return []
    return [
        "it was trained with another tokenizer (if only names of unused tokens differ, take tokenizer_sha256 out of its "
        "config.json)"
    ]


def vocabulary_problems(vocab_size: int, tokenizer: Any, target: Target) -> list[str]:
    """Why a language model cannot draft for this target; empty if its tokens are the target's.

    Sizes say little: many families pad the tables of their larger models further, and others have as many tokens by
    chance. So tokenizers are compared where both are known; a few added tokens may differ.
    """
    if tokenizer is None or target.tokenizer is None:
        if vocab_size == target.vocab_size:
            return []
        return [f"as a draft model it needs the target's vocabulary of {target.vocab_size} tokens; it has {vocab_size}"]
    ours, theirs = tokenizer.get_vocab(), target.tokenizer.get_vocab()
    share = sum(theirs.get(token) == token_id for token, token_id in ours.items()) / max(len(ours), len(theirs))
    if share >= _ENOUGH_ALIKE:
        return []
    return [
        f"as a draft model it needs the target's vocabulary of {target.vocab_size} tokens; it has {vocab_size}, and "
        f"{share:.0%} of the tokens have the same id in both tokenizers"
    ]


def template_note(config: Mapping[str, Any], target: Target) -> str | None:
    """What to say where the drafter was trained in another chat template than the target has; None: nothing."""
    noted = config.get("template_sha256")
    if noted is None or target.tokenizer is None or noted == template_fingerprint(target.tokenizer):
        return None
    return "the drafter was trained with another chat template than the target has: acceptance in chats will be lower"


def system_prompt_note(config: Mapping[str, Any]) -> str | None:
    """What to say of the system prompt that training put before conversations; None: there was none, or nobody knows."""
    if config.get("system_prompt_sha256", "unknown") in ("unknown", fingerprint(None)):
        return None
    return "the drafter was trained with a system prompt of its own: serve with the same (`--system` of `dspark data`)"
