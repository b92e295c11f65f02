"""Prompts of our own for checks that need some text and no data."""

from __future__ import annotations

from typing import Any

from dspark.engine.text import Prompt

_SHAPES = (
    "A baker makes {a} trays of {b} rolls and sells 17 of them. How many are left? Answer step by step.",
    "Write a Python function `add_{a}` that adds {a} to every number of a list and drops those above {b}.",
    "What does the word river mean? Use it in {b} sentences.",
    "Hi, I'd like {b} large lattes with oat milk and {a} blueberry muffins please.",
    "Explain to a child of {b} years why the sky is blue.",
    "Count from {a} to {b}{a}, one number per line.",
    "Translate into French: there are {a} apples on the table and {b} cats under it.",
    "Write a short story about a ship with {a} sails and {b} sailors.",
)


def built_in(num_prompts: int) -> list[str]:
    """So many different prompts, the same ones every time."""
    return [_SHAPES[i % len(_SHAPES)].format(a=3 + i, b=5 + i // 2) for i in range(num_prompts)]


def fitting(tokenizer: Any, vocab_size: int, num_prompts: int) -> tuple[list[Prompt], bool]:
    """Built-in prompts as this target can read them, and whether they go in without a chat template."""
    if tokenizer is None:
        return [[(7 * i + 3 * k) % vocab_size for k in range(8)] for i in range(num_prompts)], False
    return list(built_in(num_prompts)), getattr(tokenizer, "chat_template", None) is None
