"""Draft layers in the manner of Gemma 4: norms before and after, one projection for keys and values, partial RoPE.

Drafters use the geometry of the target's full-attention layers only (global_head_dim, num_global_key_value_heads).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dspark.drafters.block_model import Attend, BlockConfig, BlockModel, Mlp


@dataclass(frozen=True)
class Gemma4BlockConfig(BlockConfig):
    """head_dim and num_key_value_heads are the global ones.

    attention_k_eq_v       there is no v_proj: values are the raw key projection
    partial_rotary_factor  share of a head that is rotated
    """

    attention_k_eq_v: bool = True
    partial_rotary_factor: float = 0.25

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Gemma4BlockConfig:
        own = dict(config)
        for name, whole in (("head_dim", "global_head_dim"), ("num_key_value_heads", "num_global_key_value_heads")):
            if own.get(whole) is not None:
                own[name] = own[whole]
        # Beside the nested values a saved config has "rope_theta": null and "rope_type": "default": leftovers.
        rope = own.get("rope_parameters") or {}
        rope = rope.get("full_attention") or rope
        own.setdefault("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0))
        values = {f.name: getattr(BlockConfig.from_dict(own), f.name) for f in dataclasses.fields(BlockConfig)}
        extra = {key: own[key] for key in ("attention_k_eq_v", "partial_rotary_factor") if key in own}
        return cls(**values, **extra)

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        theta = values["rope_parameters"]["rope_theta"]
        nested = {
            "rope_type": "proportional",
            "partial_rotary_factor": values.pop("partial_rotary_factor"),
            "rope_theta": theta,
        }
        del values["hidden_act"]
        return values | {
            "architectures": ["Gemma4DSparkModel"],
            "model_type": "gemma4_text",
            "hidden_activation": "gelu_pytorch_tanh",
            "global_head_dim": self.head_dim,
            "num_global_key_value_heads": self.num_key_value_heads,
            "rope_parameters": {"full_attention": nested},
        }


class WideRMSNorm(nn.Module):
    """RMS norm whose weight multiplies in fp32, before rounding; times a constant. size 0: no weight."""

    def __init__(self, size: int, eps: float, gain: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size)) if size else None
        self.eps, self.gain = eps, gain

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        if self.weight is not None:
            wide = wide * self.weight.to(wide.dtype)
        return (wide if self.gain == 1.0 else wide * self.gain).to(x.dtype)


class ProportionalRotary:
    """Rotates the slowest-turning part of a head not at all; cos and sin [T, 1, D]."""

    def __init__(self, positions: Tensor, config: Gemma4BlockConfig, dtype: torch.dtype) -> None:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        num_turning = int(config.partial_rotary_factor * config.head_dim // 2)
        steps = torch.arange(0, 2 * num_turning, 2, dtype=wide, device=positions.device) / config.head_dim
        frequencies = F.pad(config.rope_theta**-steps, (0, config.head_dim // 2 - num_turning))
        angles = positions.to(wide)[:, None] * frequencies
        angles = torch.cat([angles, angles], -1)[:, None]
        self.cos, self.sin = angles.cos().to(dtype), angles.sin().to(dtype)

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, heads, D] -> the same, rotated."""
        first, second = x.chunk(2, -1)
        return x * self.cos + torch.cat([-second, first], -1) * self.sin


class Gemma4Attention(nn.Module):
    """Queries, keys and values of a layer; values may come from the keys' projection."""

    def __init__(self, config: Gemma4BlockConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        width, kv_width = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=config.attention_bias)
        self.v_proj = (
            None if config.attention_k_eq_v else nn.Linear(config.hidden_size, kv_width, bias=config.attention_bias)
        )
        self.o_proj = nn.Linear(width, config.hidden_size, bias=config.attention_bias)
        # Scores are not scaled, but every `attend` scales by D^-0.5: the gain undoes that before q is rounded.
        self.q_norm = WideRMSNorm(config.head_dim, config.rms_norm_eps, gain=config.head_dim**0.5)
        self.k_norm = WideRMSNorm(config.head_dim, config.rms_norm_eps)
        self.v_norm = WideRMSNorm(0, config.rms_norm_eps)

    def query(self, x: Tensor, rotary: ProportionalRotary) -> Tensor:
        return rotary(self.q_norm(self.q_proj(x).unflatten(-1, (-1, self.head_dim))))

    def key_value(self, x: Tensor, rotary: ProportionalRotary) -> tuple[Tensor, Tensor]:
        key = self.k_proj(x)
        value = key if self.v_proj is None else self.v_proj(x)
        key, value = (projected.unflatten(-1, (-1, self.head_dim)) for projected in (key, value))
        return rotary(self.k_norm(key)), self.v_norm(value)


class Gemma4Mlp(Mlp):
    """The gated network with Gemma's activation."""

    def forward(self, x: Tensor) -> Tensor:
        gated: Tensor = F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x)
        return self.down_proj(gated)


class Gemma4Layer(nn.Module):
    """A draft layer with the three methods of Qwen3Layer; layer_scalar [1] multiplies its whole output."""

    def __init__(self, config: Gemma4BlockConfig) -> None:
        super().__init__()
        self.config = config
        self.input_layernorm = WideRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = WideRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.pre_feedforward_layernorm = WideRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_feedforward_layernorm = WideRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Gemma4Attention(config)
        self.mlp = Gemma4Mlp(config)
        self.layer_scalar: Tensor
        self.register_buffer("layer_scalar", torch.ones(1))

    def rotary(self, positions: Tensor, dtype: torch.dtype) -> ProportionalRotary:
        return ProportionalRotary(positions, self.config, dtype)

    def key_value(self, context: Tensor, rotary: ProportionalRotary) -> tuple[Tensor, Tensor]:
        return self.self_attn.key_value(context, rotary)

    def forward(self, x: Tensor, rotary: ProportionalRotary, layer: int, attend: Attend) -> Tensor:
        y = self.input_layernorm(x)
        key, value = self.self_attn.key_value(y, rotary)
        mixed = attend(layer, self.self_attn.query(y, rotary), key, value)
        x = x + self.post_attention_layernorm(self.self_attn.o_proj(mixed.flatten(-2)))
        z = self.mlp(self.pre_feedforward_layernorm(x))
        return (x + self.post_feedforward_layernorm(z)) * self.layer_scalar


class Gemma4BlockModel(BlockModel):
    """The embedding handed in is Gemma's own, which multiplies by sqrt(H) itself."""

    layer_class = Gemma4Layer

    def __init__(self, config: Gemma4BlockConfig) -> None:
        super().__init__(config)
        self.hidden_norm = WideRMSNorm(config.hidden_size, config.rms_norm_eps)  # type: ignore[assignment]
        self.norm = WideRMSNorm(config.hidden_size, config.rms_norm_eps)  # type: ignore[assignment]
