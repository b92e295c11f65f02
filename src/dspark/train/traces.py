"""Training examples from what the target wrote: batches of similar length, and the target's states over them.

States are made online, by one forward of the frozen target per batch. Storing them would take 2.5 kB per token for the
tiny pair and 30 kB for a 4B target.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dspark.errors import InvalidConfiguration

SHARDS = "**/shard-*.safetensors"


@dataclass(frozen=True)
class Text:
    """One prompt with its answer: token_ids [S] int32, of which the first prompt_length are the prompt."""

    token_ids: Tensor
    prompt_length: int


def read_texts(folder: Path, min_answer: int = 4, max_length: int = 4096) -> list[Text]:
    """All rows of all shards below the folder, in the order of their names; answers too short to learn from are left out."""
    paths = sorted(folder.glob(SHARDS))
    if not paths:
        raise InvalidConfiguration(
            f"expected shards written by `python -m dspark.train.regenerate` below {folder}; there are none"
        )
    texts = []
    for path in paths:
        shard = load_file(path)
        rows = shard["token_ids"].split(shard["lengths"].tolist())
        for row, prompt_length in zip(rows, shard["prompt_lengths"].tolist(), strict=True):
            if min(len(row), max_length) - prompt_length >= min_answer:
                texts.append(Text(row[:max_length], prompt_length))
    if not texts:
        raise InvalidConfiguration(
            f"expected answers of at least {min_answer} tokens below {folder}; none of its rows has one: "
            "write text with more tokens per prompt (max_new), or raise max_length"
        )
    return texts


def split_validation(texts: Sequence[Text], num_validation: int, seed: int = 0) -> tuple[list[Text], list[Text]]:
    """(train, validation): a random choice that depends on the texts and the seed only."""
    order = list(texts)
    random.Random(seed).shuffle(order)
    return order[num_validation:], order[:num_validation]


def batches(texts: Sequence[Text], tokens_per_batch: int, rng: random.Random, pool: int = 2048) -> Iterator[list[Text]]:
    """One pass in random order: batches of similar lengths, tokens_per_batch with padding at most (or a single text)."""
    order = rng.sample(list(texts), len(texts))
    for first in range(0, len(order), pool):
        near = sorted(order[first : first + pool], key=lambda text: len(text.token_ids))
        made: list[list[Text]] = []
        for text in reversed(near):  # longest first: each batch is as wide as its first text
            if made and len(made[-1][0].token_ids) * (len(made[-1]) + 1) <= tokens_per_batch:
                made[-1].append(text)
            else:
                made.append([text])
        rng.shuffle(made)
        yield from made


def pad(texts: Sequence[Text]) -> tuple[Tensor, Tensor]:
    """(token_ids [B, S], loss_mask [B, S]), padded on the right; the mask marks answers."""
    width = max(len(text.token_ids) for text in texts)
    token_ids = torch.zeros(len(texts), width, dtype=torch.long)
    loss_mask = torch.zeros(len(texts), width, dtype=torch.bool)
    for row, text in enumerate(texts):
        token_ids[row, : len(text.token_ids)] = text.token_ids.long()
        loss_mask[row, text.prompt_length : len(text.token_ids)] = True
    return token_ids, loss_mask


class TargetStates:
    """Reads texts with the frozen target and returns what drafters learn from."""

    def __init__(self, model: Any, layer_ids: Sequence[int]) -> None:
        """model: a causal LM of transformers; layer_ids as in target_layer_ids, -1 for the embedding."""
        self.model = model
        self.layer_ids = tuple(layer_ids)
        self.caught: dict[int, Tensor] = {}
        backbone = model.model
        for index in self.layer_ids:
            module: nn.Module = backbone.embed_tokens if index == -1 else backbone.layers[index]
            module.register_forward_hook(self._catch(index))

    def _catch(self, index: int) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            self.caught[index] = output[0] if isinstance(output, tuple) else output

        return hook

    @torch.no_grad()
    def __call__(self, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """token_ids [B, S] padded on the right (a causal model never looks there) -> features [B, S, F], last_hidden [B, S, H]."""
        last_hidden = self.model.model(input_ids=token_ids, use_cache=False).last_hidden_state
        features = torch.cat([self.caught[index] for index in self.layer_ids], -1)
        self.caught.clear()
        return features, last_hidden
