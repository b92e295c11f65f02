"""Random little models whose output provably depends on the whole prompt, and drafters that know how to be right."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from dspark.budget.capacity import Capacity
from dspark.target.loading import load_target
from dspark.target.target import Target
from dspark.types import Draft, Request, Rule, StepRecord

VOCAB_SIZE = 61


def random_target(
    folder: Path, seed: int = 0, num_layers: int = 3, vocab_size: int = VOCAB_SIZE, context: int = 256
) -> Target:
    """A Qwen3 with attention scaled up: at the usual initialisation it would be nearly a bigram and hide cache bugs."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=context,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=None,
        tie_word_embeddings=False,
    )
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(25)
            layer.self_attn.v_proj.weight.mul_(8)
        model.lm_head.weight.mul_(6)
    model.save_pretrained(folder)
    target = load_target(str(folder), dtype="float32", device="cpu")
    _plain[target] = model.eval()
    return target


_plain: WeakKeyDictionary[Target, Qwen3ForCausalLM] = WeakKeyDictionary()


@torch.no_grad()
def reference_logits(target: Target, tokens: Sequence[int]) -> Tensor:
    """[S, V] by one forward of transformers' own model, without any cache."""
    return _plain[target](torch.tensor([list(tokens)])).logits[0]


@torch.no_grad()
def reference_features(target: Target, tokens: Sequence[int], layers: Sequence[int]) -> Tensor:
    """[S, F] by one forward of transformers' own model; hidden_states[i + 1] is what layer i put out."""
    states = _plain[target](torch.tensor([list(tokens)]), output_hidden_states=True).hidden_states
    return torch.cat([states[i + 1][0] for i in layers], -1)


class Known(Capacity):
    """Costs that no clock decides."""

    def seconds(self, tokens: Any, requests: int, context_tokens: int, is_reading: bool = False) -> Any:
        return 1.0 + 0.1 * np.asarray(tokens)

    def draft_seconds(self, requests: int, context_tokens: int) -> float:
        return 0.3 + 0.05 * requests

    def observe(self, record: StepRecord) -> None:
        pass


class OracleDrafter:
    """Proposes what plain decoding is known to say, with some tokens spoiled, as a chain or as a tree with decoys.

    Right often enough that long accepted paths, partial ones and outright misses all occur.
    """

    feature_layers: tuple[int, ...] = ()

    def __init__(
        self, texts: Sequence[Sequence[int]], length: int = 5, tree: bool = False, error: float = 0.25
    ) -> None:
        self.texts, self.depth, self.tree, self.error = [list(t) for t in texts], length, tree, error
        self.length = 2 * length if tree else length
        self.random = random.Random(0)

    def propose(self, requests: Sequence[Request], rule: Rule) -> Draft:
        tokens = torch.zeros(len(requests), self.length, dtype=torch.long)
        parents = torch.zeros(len(requests), self.length, dtype=torch.long)
        sizes = torch.zeros(len(requests), dtype=torch.long)
        for b, request in enumerate(requests):
            known = next((t for t in self.texts if t[: len(request.tokens)] == request.tokens), request.tokens)
            path = known[len(request.tokens) : len(request.tokens) + self.random.randint(0, self.depth)]
            spoiled = [self.random.randrange(VOCAB_SIZE) if self.random.random() < self.error else t for t in path]
            if not self.tree:
                tokens[b, : len(spoiled)], parents[b] = (
                    torch.tensor(spoiled, dtype=torch.long),
                    torch.arange(self.length) - 1,
                )
                sizes[b] = len(spoiled)
                continue
            parent = -1
            for depth, token in enumerate(path):  # the right token and a decoy, in either order, under the right parent
                pair = [token, (token + 1 + self.random.randrange(VOCAB_SIZE - 1)) % VOCAB_SIZE]
                self.random.shuffle(pair)
                tokens[b, 2 * depth : 2 * depth + 2] = torch.tensor(pair)
                parents[b, 2 * depth : 2 * depth + 2] = parent
                parent = 2 * depth + pair.index(token)
            sizes[b] = 2 * len(path)
        return Draft(tokens, sizes, parents=parents if self.tree else None)

    def release(self, request_id: int) -> None:
        pass
