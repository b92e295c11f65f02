"""What drafters learn from: the target's states over a text, made by one forward of the frozen target per batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dspark.errors import UnsupportedModel
from dspark.target import attention
from dspark.target.modules import decoder_layers

_TOLERANCE = 0.05  # of the logits' norm; rounding in bfloat16 gives 0.01


class TargetStates:
    """Reads texts with the frozen target and returns what drafters learn from.

    scale  the target's logits are its head's times this (Cohere, Granite); the last hidden state carries it, so the
           teacher's law is softmax(head(last_hidden))
    """

    def __init__(self, model: Any, layer_ids: Sequence[int]) -> None:
        """model: a causal LM of transformers; layer_ids as in target_layer_ids, -1 for what the first layer reads."""
        self.model, self.layer_ids = model, tuple(layer_ids)
        self._attend_plainly()
        self.caught: dict[int, Tensor] = {}
        self.decoder = model.get_decoder()
        layers = decoder_layers(model, model.config.get_text_config(decoder=True).num_hidden_layers)
        for index in self.layer_ids:
            if index == -1:
                layers[0].register_forward_pre_hook(self._catch_input, with_kwargs=True)
            else:
                layers[index].register_forward_hook(self._catch(index))
        self.scale = 1.0
        self.scale = self._measured_scale()

    def _attend_plainly(self) -> None:
        supported = getattr(self.model, "_supports_sdpa", False)
        self.model.set_attn_implementation("sdpa" if supported else "eager")

    @contextmanager
    def over_slots(self) -> Iterator[None]:
        """Lend the model of a Target to an engine: inside the block it attends over the slot cache again."""
        self.model.set_attn_implementation(attention.NAME)
        try:
            yield
        finally:
            self._attend_plainly()

    def _catch(self, index: int) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            self.caught[index] = output[0] if isinstance(output, tuple) else output

        return hook

    def _catch_input(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.caught[-1] = args[0] if args else kwargs["hidden_states"]

    @torch.no_grad()
    def __call__(self, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """token_ids [B, S] padded on the right (a causal model never looks there) -> features [B, S, F], last_hidden [B, S, H]."""
        last_hidden = self.decoder(input_ids=token_ids, use_cache=False).last_hidden_state
        features = torch.cat([self.caught[index] for index in self.layer_ids], -1)
        self.caught.clear()
        return features, last_hidden if self.scale == 1.0 else last_hidden * self.scale

    @torch.no_grad()
    def _measured_scale(self) -> float:
        """How the model gets from its head to its logits; refuses what is more than a factor and a softcap."""
        head, config = self.model.get_output_embeddings(), self.model.config.get_text_config(decoder=True)
        name = type(self.model).__name__
        if getattr(head, "bias", None) is not None and head.bias.any():
            raise UnsupportedModel(
                f"the LM head of {name} has a bias, which the losses do not know; choose another target"
            )
        token_ids = torch.arange(1, 17, device=head.weight.device)[None] % head.weight.shape[0]
        logits = self.model(input_ids=token_ids, use_cache=False).logits.float()
        found = head(self(token_ids)[1]).float()
        cap = getattr(config, "final_logit_softcapping", None)
        found = found if cap is None else torch.tanh(found / cap) * cap
        scale = float((logits * found).sum() / (found * found).sum())
        error = float((logits - scale * found).norm() / logits.norm())
        if not error <= _TOLERANCE:  # NaN is an error too
            raise UnsupportedModel(
                f"the logits of {name} are not its LM head over its last state (they differ by {error:.2g} of their "
                "norm), so its law cannot be taught; choose another target"
            )
        return 1.0 if abs(scale - 1) < 0.01 else scale
