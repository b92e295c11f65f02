"""EAGLE-3's network: one decoder layer that reads a token's embedding beside a feature, and drafts one token at a time.

Where the target has been, the feature is a fusion of its low, middle and high layers; where only the draft has been, it
is the layer's own output (Li et al. 2025). Training unrolls drafting for that reason, the "training-time test". State
dict names and numerics are the released checkpoints' (DeepSpec, section 2 there: the residual is the un-normed input).

With a single layer, keys and values are functions of the inputs alone. So the committed part of a sequence needs no
attention at all, and training unrolls from chosen anchors instead of from every position.

Shapes: T rows, F feature width, H hidden size, D head size, KV key-value heads, B rows of a batch, S tokens of a
sequence, A anchors of a sequence, K steps that are unrolled, V vocabulary, W draft vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dspark.drafters.block_model import Mlp, RMSNorm, Rotary, SelfAttention, TraceBatch, shape_in
from dspark.errors import CheckpointError, InvalidConfiguration
from dspark.losses import Losses, LossWeights, block_losses, cut_blocks

_EXCLUDED = -1e4  # added to logits of tokens that the draft vocabulary lacks: a probability of exactly 0


@dataclass(frozen=True)
class Eagle3Config:
    """What config.json of a drafter says about its shape; names are DeepSpec's.

    target_layer_ids      decoder layers (from 0) whose raw outputs are fused; empty: the usual three of the target
    model_type            qwen3 norms queries and keys per head; llama does not
    ttt_length            drafting steps that training unrolls
    draft_vocab_size      tokens it can draft; None: all of the target's
    norm_before_residual  the residual carries the normed feature (speculators' variant)
    trains_lm_head        its head is its own, not a copy of the target's
    """

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    target_layer_ids: tuple[int, ...]
    num_hidden_layers: int = 1
    num_target_layers: int = 0
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_position_embeddings: int = 2048
    attention_bias: bool = False
    model_type: str = "qwen3"
    ttt_length: int = 7
    draft_vocab_size: int | None = None
    norm_before_residual: bool = False
    trains_lm_head: bool = False

    def __post_init__(self) -> None:
        if self.num_hidden_layers != 1:
            raise CheckpointError(f"an EAGLE-3 drafter has one layer; num_hidden_layers is {self.num_hidden_layers}")
        if self.model_type not in ("qwen3", "llama"):
            raise CheckpointError(f"model_type of an EAGLE-3 drafter must be qwen3 or llama; got {self.model_type!r}")
        if self.ttt_length < 1:
            raise CheckpointError(f"ttt_length must be 1 or more; got {self.ttt_length}")
        if list(self.target_layer_ids) != sorted(set(self.target_layer_ids)):
            raise CheckpointError(f"target_layer_ids must be strictly increasing; got {list(self.target_layer_ids)}")
        if self.draft_vocab_size is not None and not 1 <= self.draft_vocab_size <= self.vocab_size:
            raise CheckpointError(
                f"draft_vocab_size must be 1 to {self.vocab_size}, the target's; got {self.draft_vocab_size}"
            )

    @property
    def block_size(self) -> int:
        """Draft tokens per step, as block drafters call it."""
        return self.ttt_length

    @property
    def num_features(self) -> int:
        return len(self.target_layer_ids) or 3

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Eagle3Config:
        """From config.json; a draft vocabulary that is the whole one is none."""
        values = shape_in(config, cls)
        if values.get("draft_vocab_size") == values["vocab_size"]:
            del values["draft_vocab_size"]
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """As DeepSpec's config.json has it; keys of variants that DeepSpec has not appear where they are used."""
        values = dataclasses.asdict(self)
        values["target_layer_ids"] = list(self.target_layer_ids)
        values["rope_parameters"] = {"rope_type": "default", "rope_theta": values.pop("rope_theta")}
        values |= {
            "architectures": ["Qwen3Eagle3Model" if self.model_type == "qwen3" else "LlamaEagle3Model"],
            "layer_types": ["full_attention"],
            "draft_num_hidden_layers": 1,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
        }
        return {k: v for k, v in values.items() if k not in _VARIANTS or v}


_VARIANTS = ("draft_vocab_size", "norm_before_residual", "trains_lm_head")


class Eagle3Attention(SelfAttention):
    """Reads embedding and feature side by side."""

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__(config)  # type: ignore[arg-type]  # the same names
        for name in ("q_proj", "k_proj", "v_proj"):
            width = getattr(self, name).out_features
            setattr(self, name, nn.Linear(2 * config.hidden_size, width, bias=config.attention_bias))
        if config.model_type == "llama":
            self.q_norm, self.k_norm = nn.Identity(), nn.Identity()  # type: ignore[assignment]


class Eagle3Layer(nn.Module):
    """The one layer, in the two halves between which attention happens."""

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__()
        self.norm_before_residual = config.norm_before_residual
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Eagle3Attention(config)
        self.mlp = Mlp(config)  # type: ignore[arg-type]

    def inputs(self, embeddings: Tensor, x: Tensor) -> Tensor:
        """embeddings [..., H] of tokens and features x [..., H] of the position before -> [..., 2H]."""
        return torch.cat([self.input_layernorm(embeddings), self.hidden_norm(x)], -1)

    def finish(self, x: Tensor, mixed: Tensor) -> Tensor:
        """x [..., H] as `inputs` got it, what attention gave [..., heads * D] -> the layer's output [..., H]."""
        x = (self.hidden_norm(x) if self.norm_before_residual else x) + self.self_attn.o_proj(mixed)
        return x + self.mlp(self.post_attention_layernorm(x))


class Eagle3Model(nn.Module):
    """Drafts token after token. Row i pairs the feature of position i with token i + 1 and predicts token i + 2.

    d2t [W], t2d [V]  of a reduced vocabulary: target id minus draft id of each draft token, and which ids it has
    """

    d2t: Tensor
    t2d: Tensor

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__()
        self.config = config
        self.fc = nn.Linear(config.num_features * config.hidden_size, config.hidden_size, bias=False)
        self.layers = nn.ModuleList([Eagle3Layer(config)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if config.draft_vocab_size is not None:
            self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.long))
            self.register_buffer("t2d", torch.arange(config.vocab_size) < config.draft_vocab_size)

    @property
    def layer(self) -> Eagle3Layer:
        return self.layers[0]  # type: ignore[return-value]

    @property
    def target_ids(self) -> Tensor | None:
        """[W]  the target's token id of each draft token; None: they are the same."""
        if self.config.draft_vocab_size is None:
            return None
        return torch.arange(len(self.d2t), device=self.d2t.device) + self.d2t

    def choose_vocabulary(self, target_ids: Tensor) -> None:
        """Draft only these tokens [W], such as the most frequent ones of the training text."""
        ids = target_ids.sort().values.to(self.fc.weight.device)
        if len(ids) != self.config.draft_vocab_size or len(ids.unique()) != len(ids):
            raise InvalidConfiguration(
                f"expected {self.config.draft_vocab_size} different token ids, the drafter's draft_vocab_size; "
                f"got {len(ids)}, {len(ids.unique())} of them different"
            )
        self.d2t.copy_(ids - torch.arange(len(ids), device=ids.device))
        self.t2d.zero_().index_fill_(0, ids, True)

    def rotary(self, positions: Tensor, dtype: torch.dtype) -> Rotary:
        return Rotary(positions, self.config.head_dim, self.config.rope_theta, dtype)

    def teacher_forced_hidden(self, batch: TraceBatch, embed: nn.Module) -> Tensor:
        """hidden [B, A, K, H], normed: what drafting from each anchor computes while its draft is the text itself."""
        layer, dtype = self.layer, self.fc.weight.dtype
        (size, length), steps = batch.token_ids.shape, self.config.ttt_length
        before = (batch.anchors - 1).clamp(min=0)  # the last position whose feature is there
        x = self.fc(batch.features.to(dtype))
        tokens = batch.token_ids.roll(
            -1, 1
        )  # the last row would pair with a token that is not there; no anchor sees it
        inputs = layer.inputs(embed(tokens).to(dtype), x)
        positions = torch.arange(length, device=x.device).repeat(size)
        keys, values = layer.self_attn.key_value(inputs.flatten(0, 1), self.rotary(positions, dtype))
        attend = _ChainAttention(keys.unflatten(0, (size, length)), values.unflatten(0, (size, length)), before)
        x = x.gather(1, before[..., None].expand(-1, -1, x.shape[-1]))
        outputs = []
        for k in range(steps):
            where = (before + 1 + k).clamp(max=length - 1)
            inputs = layer.inputs(embed(batch.token_ids.gather(1, where)).to(dtype), x)
            rotary = self.rotary((before + k).flatten(), dtype)
            query = layer.self_attn.query(inputs.flatten(0, 1), rotary).unflatten(0, before.shape)
            if k:  # the first step's own row is among the context's
                key, value = layer.self_attn.key_value(inputs.flatten(0, 1), rotary)
                attend.append(key.unflatten(0, before.shape), value.unflatten(0, before.shape))
            x = layer.finish(x, attend(query).flatten(-2))
            outputs.append(self.norm(x))
        return torch.stack(outputs, 2)

    def loss(self, batch: TraceBatch, embed: nn.Module, lm_head: nn.Linear, weights: LossWeights) -> Losses:
        """All a trainer needs to know. The gradient never reaches embed and lm_head.

        Against the whole law of the target, also with a reduced vocabulary: what it cannot draft counts as missed.
        """
        if self.config.trains_lm_head:
            raise InvalidConfiguration(
                "this drafter has an LM head of its own, which is loaded and run but not trained here: "
                "train one that shares the target's (trains_lm_head = false)"
            )
        hidden = self.teacher_forced_hidden(batch, embed).flatten(0, 1)
        kept = batch.kept & (batch.anchors > 0)  # the very first token has no feature before it
        blocks = cut_blocks(batch.token_ids, batch.loss_mask, batch.anchors, kept, self.config.ttt_length)
        labels, evaluated = blocks.labels.flatten(0, 1), blocks.evaluated.flatten(0, 1)
        latent = projection = None
        if self.config.draft_vocab_size is not None:
            evaluated = (evaluated & self.t2d[labels]).long().cumprod(-1).bool()
            latent = hidden.new_ones(*hidden.shape[:-1], 1)
            projection = torch.where(self.t2d, 0.0, _EXCLUDED)[:, None].to(hidden.dtype)
        where = blocks.positions.clamp(max=batch.token_ids.shape[1] - 1).flatten(1)
        rows = torch.arange(len(where), device=where.device)[:, None]
        teacher = batch.last_hidden[rows, where].view_as(hidden)
        return block_losses(hidden, latent, projection, lm_head.weight, None, teacher, labels, evaluated, weights)


class _ChainAttention:
    """Training-time attention: each anchor's chain sees the context up to its anchor, and itself so far.

    The chain's keys are its own, so they meet its queries one to one: the diagonal that extends EAGLE-3's causal mask.
    """

    def __init__(self, keys: Tensor, values: Tensor, before: Tensor) -> None:
        """keys, values [B, S, KV, D] of the context; before [B, A]: the last context position of each chain."""
        hidden = torch.arange(keys.shape[1], device=keys.device) > before[..., None]
        self.bias = torch.zeros(hidden.shape, device=keys.device).masked_fill_(hidden, float("-inf"))  # [B, A, S]
        self.keys, self.values = keys, values
        self.own: list[tuple[Tensor, Tensor]] = []

    def append(self, key: Tensor, value: Tensor) -> None:
        """key, value [B, A, KV, D] of each chain's newest token."""
        self.own.append((key, value))

    def __call__(self, query: Tensor) -> Tensor:
        """query [B, A, heads, D] -> [B, A, heads, D]."""
        kv_heads, head_dim = self.keys.shape[2:]
        q = query.unflatten(2, (kv_heads, -1)) * head_dim**-0.5  # [B, A, KV, G, D]
        scores = torch.einsum("bahgd,bshd->bahgs", q, self.keys) + self.bias[:, :, None, None]
        parts = [scores, *(torch.einsum("bahgd,bahd->bahg", q, key)[..., None] for key, _ in self.own)]
        law = torch.softmax(torch.cat([part.to(scores.dtype) for part in parts], -1), -1).to(self.values.dtype)
        length = self.keys.shape[1]
        mixed = torch.einsum("bahgs,bshd->bahgd", law[..., :length], self.values)
        for k, (_, value) in enumerate(self.own):
            mixed = mixed + law[..., length + k, None] * value[:, :, :, None]
        return mixed.flatten(2, 3)
