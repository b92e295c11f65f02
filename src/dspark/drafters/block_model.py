"""The parallel drafter's network: DFlash's backbone, a sequential head and a confidence head (paper 3.1, 3.2.1).

State dict names and numerics are those of the released checkpoints (DeepSpec). Embedding and LM head are the target's:
they are handed in and are never parameters here. Who attends to what is the caller's business: the runtime keeps keys
and values in slots, training builds them per sequence, and both run `block` below.

Shapes: T tokens of many requests end to end, F feature width, H hidden size, D head size, KV key-value heads,
B rows, S tokens of a sequence, A anchors of a sequence, K block size, r rank of the sequential head, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dspark.drafters.block_attention import Attend, attention_of_blocks
from dspark.drafters.heads import ConfidenceHead, MarkovHead, NoHead, make_head
from dspark.errors import CheckpointError
from dspark.losses import Losses, LossWeights, block_losses, cut_blocks


def shape_in(config: Mapping[str, Any], kind: type) -> dict[str, Any]:
    """What a drafter's config.json says of the fields of `kind`: keys of other purposes are left alone, missing ones named."""
    values = {f.name: config[f.name] for f in dataclasses.fields(kind) if f.name in config}
    rope = config.get("rope_parameters") or {}
    theta = rope.get("full_attention", rope).get("rope_theta") or config.get("rope_theta")
    if theta is not None:
        values["rope_theta"] = float(theta)
    if values.get("head_dim") is None and {"hidden_size", "num_attention_heads"} <= values.keys():
        values["head_dim"] = values["hidden_size"] // values["num_attention_heads"]
    required = [f.name for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING]
    if missing := [name for name in required if name not in values]:
        raise CheckpointError(
            f"expected the keys {', '.join(missing)} in the drafter's config.json; they are not there"
        )
    return {**values, "target_layer_ids": tuple(values["target_layer_ids"])}


@dataclass(frozen=True)
class BlockConfig:
    """What config.json of a drafter says about its shape; names are DeepSpec's.

    target_layer_ids            decoder layers (from 0) whose raw outputs are the features; -1 is the embedding
    block_size                  input slots, anchor first; as many tokens are drafted
    markov_rank                 0: no sequential head (DFlash)
    confidence_head_with_markov the confidence head also sees W1[previous token]
    final_logit_softcapping     applied to the base logits, before the head's bias
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    target_layer_ids: tuple[int, ...]
    block_size: int
    mask_token_id: int
    num_target_layers: int = 0
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_position_embeddings: int = 2048
    attention_bias: bool = False
    markov_rank: int = 0
    markov_head_type: str = "vanilla"
    enable_confidence_head: bool = False
    confidence_head_with_markov: bool = False
    final_logit_softcapping: float | None = None

    def __post_init__(self) -> None:
        if not self.target_layer_ids or list(self.target_layer_ids) != sorted(set(self.target_layer_ids)):
            raise CheckpointError(f"target_layer_ids must be strictly increasing; got {list(self.target_layer_ids)}")
        if self.target_layer_ids[0] < -1 or (
            self.num_target_layers and self.target_layer_ids[-1] >= self.num_target_layers - 1
        ):
            raise CheckpointError(
                f"target_layer_ids must lie in -1 .. {self.num_target_layers - 2}: the last layer's output is not kept "
                f"before the final norm; got {list(self.target_layer_ids)}"
            )

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> BlockConfig:
        """From config.json."""
        return cls(**shape_in(config, cls))

    def to_dict(self) -> dict[str, Any]:
        """As config.json has it: with architectures, and without the keys that DFlash lacks."""
        values = dataclasses.asdict(self)
        values["target_layer_ids"] = list(self.target_layer_ids)
        values["rope_parameters"] = {"rope_type": "default", "rope_theta": values.pop("rope_theta")}
        values["layer_types"] = ["full_attention"] * self.num_hidden_layers
        values |= {
            "architectures": ["Qwen3DSparkModel"],
            "model_type": "qwen3",
            "hidden_act": "silu",
            "tie_word_embeddings": False,
        }
        if self.markov_rank == 0:
            del values["markov_head_type"]
        if not self.enable_confidence_head:
            del values["confidence_head_with_markov"]
        if self.final_logit_softcapping is None:
            del values["final_logit_softcapping"]
        return values


class RMSNorm(nn.Module):
    """Scale to unit root mean square, computed in fp32 as transformers does."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


class Rotary:
    """Rotation of q and k at absolute positions; cos and sin [T, 1, D] are made once per forward."""

    def __init__(self, positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> None:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        steps = torch.arange(0, head_dim, 2, dtype=wide, device=positions.device) / head_dim
        angles = positions.to(wide)[:, None] * theta**-steps
        angles = torch.cat([angles, angles], -1)[:, None]
        self.cos, self.sin = angles.cos().to(dtype), angles.sin().to(dtype)

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, heads, D] -> the same, rotated."""
        first, second = x.chunk(2, -1)
        return x * self.cos + torch.cat([-second, first], -1) * self.sin


class SelfAttention(nn.Module):
    """Projections and per-head norms of one Qwen3-style layer; the attention itself is the caller's `attend`."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        width, kv_width = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=config.attention_bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=config.attention_bias)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def query(self, x: Tensor, rotary: Rotary) -> Tensor:
        """Rotated queries [T, heads, D] of x [T, H]."""
        return rotary(self.q_norm(self.q_proj(x).unflatten(-1, (-1, self.head_dim))))

    def key_value(self, x: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """Rotated keys and values [T, KV, D] of x [T, H]."""
        key = self.k_norm(self.k_proj(x).unflatten(-1, (-1, self.head_dim)))
        return rotary(key), self.v_proj(x).unflatten(-1, (-1, self.head_dim))


class Mlp(nn.Module):
    """The gated feed-forward network."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Qwen3Layer(nn.Module):
    """One draft layer. Another family is another class with these three methods.

    rotary(positions, dtype)       how this layer's queries and keys are rotated
    key_value(context, rotary)     keys and values of context rows: neither passed through the layers nor normed again
    forward(x, rotary, layer, attend)
    """

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.theta = config.rope_theta
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = SelfAttention(config)
        self.mlp = Mlp(config)

    def rotary(self, positions: Tensor, dtype: torch.dtype) -> Rotary:
        return Rotary(positions, self.self_attn.head_dim, self.theta, dtype)

    def key_value(self, context: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        return self.self_attn.key_value(context, rotary)

    def forward(self, x: Tensor, rotary: Rotary, layer: int, attend: Attend) -> Tensor:
        y = self.input_layernorm(x)
        key, value = self.self_attn.key_value(y, rotary)
        mixed = attend(layer, self.self_attn.query(y, rotary), key, value)
        x = x + self.self_attn.o_proj(mixed.flatten(-2))
        return x + self.mlp(self.post_attention_layernorm(x))


@dataclass(frozen=True)
class TraceBatch:
    """Training examples of one target: what it wrote and what it thought while writing.

    token_ids [B, S]   right-padded; loss_mask [B, S] marks the answer's tokens
    features [B, S, F] raw outputs of the wanted layers
    last_hidden [B, S, H]  the target's normed last state, which its LM head turns into the law of the next token
    anchors [B, A]     where blocks start; kept [B, A] is false for fillers
    """

    token_ids: Tensor
    loss_mask: Tensor
    features: Tensor
    last_hidden: Tensor
    anchors: Tensor
    kept: Tensor


class BlockModel(nn.Module):
    """Drafts block_size tokens in one pass over [anchor, mask, mask, …], given the target's features before the anchor."""

    layer_class: type[nn.Module] = Qwen3Layer

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.config = config
        self.fc = nn.Linear(len(config.target_layer_ids) * config.hidden_size, config.hidden_size, bias=False)
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.layers = nn.ModuleList(self.layer_class(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.markov_head = make_head(config.markov_head_type, config.vocab_size, config.hidden_size, config.markov_rank)
        with_markov = config.confidence_head_with_markov and config.markov_rank > 0
        num_features = config.hidden_size + (config.markov_rank if with_markov else 0)
        self.confidence_head = ConfidenceHead(num_features) if config.enable_confidence_head else None

    @property
    def head(self) -> MarkovHead | NoHead:
        """The sequential head; without one, an object that adds nothing."""
        return self.markov_head

    def rotary(self, positions: Tensor, dtype: torch.dtype) -> Rotary:
        """One for all draft layers: every family gives them one geometry."""
        return self.layers[0].rotary(positions, dtype)  # type: ignore[operator]

    def context(self, features: Tensor) -> Tensor:
        """features [T, F] -> context [T, H] (eq. 2)."""
        return self.hidden_norm(self.fc(features))

    def context_keys_values(self, context: Tensor, positions: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Per layer k [T, KV, D] (normed and rotated) and v [T, KV, D] of context rows [T, H] at positions [T]."""
        rotary = self.rotary(positions, context.dtype)
        return [layer.key_value(context, rotary) for layer in self.layers]  # type: ignore[operator]

    def block(self, embeddings: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """embeddings [T, H] of anchors and masks at positions [T] -> hidden [T, H], normed, one per drafted token."""
        x, rotary = embeddings, self.rotary(positions, embeddings.dtype)
        for index, layer in enumerate(self.layers):
            x = layer(x, rotary, index, attend)
        return self.norm(x)

    def base_logits(self, hidden: Tensor, lm_head: nn.Module) -> Tensor:
        """hidden [..., H] -> the backbone's own logits [..., V], before the sequential head's bias."""
        logits: Tensor = lm_head(hidden)
        cap = self.config.final_logit_softcapping
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def confidence(self, hidden: Tensor, e: Tensor | None) -> Tensor | None:
        """hidden [..., H], e = W1[previous] [..., r] -> logit [...] of being accepted (eq. 7); None without that head."""
        if self.confidence_head is None:
            return None
        with_markov = self.config.confidence_head_with_markov and e is not None
        return self.confidence_head(torch.cat([hidden, e], -1) if with_markov else hidden)  # type: ignore[list-item]

    def block_inputs(self, anchor_tokens: Tensor) -> Tensor:
        """anchor tokens [...] -> input ids [..., K]: the anchor and masks."""
        ids = anchor_tokens.new_full((*anchor_tokens.shape, self.config.block_size), self.config.mask_token_id)
        ids[..., 0] = anchor_tokens
        return ids

    def teacher_forced_hidden(self, batch: TraceBatch, embed: nn.Module) -> Tensor:
        """hidden [B, A, K, H] of all blocks of a batch at once; each sees what it would see while decoding."""
        size, width, num_anchors = self.config.block_size, batch.token_ids.shape[1], batch.anchors.shape[1]
        num_rows = len(batch.token_ids)
        context = self.context(batch.features.flatten(0, 1))
        context_positions = torch.arange(width, device=context.device).repeat(num_rows)
        cached = self.context_keys_values(context, context_positions)
        attend = attention_of_blocks(cached, batch.anchors, size)
        ids = self.block_inputs(batch.token_ids.gather(1, batch.anchors))
        positions = batch.anchors[:, :, None] + torch.arange(size, device=context.device)
        hidden = self.block(embed(ids.flatten()).to(context.dtype), positions.flatten(), attend)
        return hidden.view(num_rows, num_anchors, size, -1)

    def loss(self, batch: TraceBatch, embed: nn.Module, lm_head: nn.Linear, weights: LossWeights) -> Losses:
        """All a trainer needs to know (eq. 9-12). The gradient never reaches embed and lm_head."""
        hidden = self.teacher_forced_hidden(batch, embed).flatten(0, 1)
        blocks = cut_blocks(batch.token_ids, batch.loss_mask, batch.anchors, batch.kept, self.config.block_size)
        latent, e = self.head.latents(blocks.previous.flatten(0, 1), hidden)
        where = blocks.positions.clamp(max=batch.token_ids.shape[1] - 1).flatten(1)
        rows = torch.arange(len(where), device=where.device)[:, None]
        projection = None if self.head.markov_w2 is None else self.head.markov_w2.weight
        seen, e_seen = hidden, e
        if weights.detach_confidence:
            seen, e_seen = hidden.detach(), None if e is None else e.detach()
        return block_losses(
            hidden,
            latent,
            projection,
            lm_head.weight,
            self.confidence(seen, e_seen),
            batch.last_hidden[rows, where].view_as(hidden),
            blocks.labels.flatten(0, 1),
            blocks.evaluated.flatten(0, 1),
            weights,
            softcap=self.config.final_logit_softcapping,
        )
