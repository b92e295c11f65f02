"""What drafters learn from: the target's states over a text, made by one forward of the frozen target per batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


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
