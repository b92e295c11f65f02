"""Which prompts a measurement reads: JSON lines, or the small set below; and how they become token ids.

The built-in prompts are our own, in the style of the text the embedded pair was trained on, so that a clone measures
something without any data. Numbers to publish come from held-out prompts (`--prompts`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Evaluation sets whose file name does not say the domain.
_DOMAIN_OF_FILE = {"gsm8k": "math", "svamp": "math", "humaneval": "code", "mbpp": "code", "mt-bench": "chat"}

_MATH = (
    "A baker makes 12 trays of 8 rolls. She sells 70 rolls before noon and half of the rest later. How many are left?",
    "Tom reads 14 pages on Monday and twice as many on Tuesday. How many pages did he read in the two days?",
    "A ticket costs $9 for an adult and $4 for a child. How much do 3 adults and 6 children pay together?",
    "There are 45 apples in a crate. 7 of them are bad. Two shops share the rest equally. How many does each shop get?",
    "Maria saves $15 every week. After 8 weeks she buys a coat for $64. How much money does she have left?",
    "A pump fills 6 liters each minute and a leak loses 2. How many minutes does it take to fill 240 liters?",
    "Ben has 5 boxes with 24 pencils each. He gives 13 pencils to each of 4 friends. How many pencils does he keep?",
    "A train travels 60 miles per hour for 3 hours, then 45 miles per hour for 2 hours. How far does it travel in all?",
)
_CODE = (  # function, what it does, an example
    ("count_vowels", "Return how many vowels the text contains.", ">>> count_vowels('banana')\n3"),
    ("second_largest", "Return the second largest number of a list.", ">>> second_largest([4, 9, 7])\n7"),
    ("is_palindrome", "Check whether a string reads the same backwards.", ">>> is_palindrome('level')\nTrue"),
    ("running_total", "Return the partial sums of the given numbers.", ">>> running_total([1, 2, 3])\n[1, 3, 6]"),
    ("merge_sorted", "Merge two sorted lists into one.", ">>> merge_sorted([1, 4], [2, 3])\n[1, 2, 3, 4]"),
    ("gcd", "Compute the greatest common divisor of two positive integers.", ">>> gcd(12, 18)\n6"),
    ("word_lengths", "Map every word of a sentence to its length.", ">>> word_lengths('a fox')\n{'a': 1, 'fox': 3}"),
    ("binary_search", "Return the index of an item in a sorted list, or -1.", ">>> binary_search([1, 3, 5], 5)\n2"),
)
_CHAT = (
    "What does the `sort` command do?",
    "Show me the `tar` command to do this: Extract an archive into a folder of your choice",
    "What does the `ping` command do?",
    'What does "harbor" mean?',
    'What does "gentle" mean?',
    "Hi, I'd like a large latte with oat milk and one blueberry muffin please",
    "Can I get two iced coffees for Anna, one of them without sugar?",
    "Portugal: what can you tell me about climate?",
)


@dataclass(frozen=True)
class Prompt:
    """One user turn and the domain it is reported under."""

    domain: str
    text: str


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as every contender reads it."""

    domain: str
    token_ids: tuple[int, ...]


def built_in() -> list[Prompt]:
    code = [
        f"Write a Python function `{function}` that does the following.\n\n{purpose}\n\n{example}"
        for function, purpose, example in _CODE
    ]
    return [Prompt(d, text) for d, texts in (("math", _MATH), ("code", code), ("chat", _CHAT)) for text in texts]


def load(path: Path) -> list[Prompt]:
    """Prompts of one .jsonl file, or of every .jsonl file in a folder.

    A row holds "turns" (the first is taken), "conversations" or "messages" (up to the first user turn), "prompt" or
    "question"; its domain is its "domain", else follows from the file's name.
    """
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"expected .jsonl files in {path}, found none")
    prompts = []
    for file in files:
        domain = _DOMAIN_OF_FILE.get(file.stem, file.stem)
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            if line.strip():
                row = json.loads(line)
                prompts.append(Prompt(row.get("domain", domain), _first_user_turn(row, f"{file.name}:{number}")))
    return prompts


def _first_user_turn(row: Mapping[str, Any], place: str) -> str:
    if turns := row.get("turns"):
        return turns[0]
    for messages in (row.get("conversations"), row.get("messages")):
        for message in messages or ():
            if message["role"] == "user":
                return message["content"]
    if text := row.get("prompt") or row.get("question"):
        return text
    raise ValueError(f"{place}: expected one of turns, conversations, messages, prompt, question; got {sorted(row)}")


def by_turns(prompts: Sequence[Any]) -> list[Any]:
    """One of each domain, then the next of each, so that any first few cover all domains."""
    by_domain: dict[str, list[Any]] = {}
    for prompt in prompts:
        by_domain.setdefault(prompt.domain, []).append(prompt)
    longest = max(map(len, by_domain.values()), default=0)
    return [of_domain[i] for i in range(longest) for of_domain in by_domain.values() if i < len(of_domain)]


def encode(prompts: Sequence[Prompt], tokenizer: Any, max_prompt_tokens: int) -> list[EncodedPrompt]:
    """Through the chat template where there is one. Prompts longer than the limit are left out."""
    encoded = []
    for prompt in prompts:
        text = prompt.text
        if getattr(tokenizer, "chat_template", None):
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
            )
        token_ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(token_ids) <= max_prompt_tokens:
            encoded.append(EncodedPrompt(prompt.domain, tuple(token_ids)))
    return encoded


def groups_of(prompts: Sequence[EncodedPrompt], size: int, count: int) -> list[list[EncodedPrompt]]:
    """`count` groups of `size` prompts that run side by side; the list is read round and round when it is too short."""
    return [[prompts[(start * size + i) % len(prompts)] for i in range(size)] for start in range(count)]


def fingerprint(prompts: Sequence[EncodedPrompt]) -> str:
    """Twelve hexadecimal digits by which a reader can tell that two runs read the same prompts."""
    return hashlib.sha256(json.dumps([p.token_ids for p in prompts]).encode()).hexdigest()[:12]
