"""Random tiny models of many families whose output provably depends on their whole history."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dspark.target import Target

VOCAB = 97
_SHARED: dict[str, Any] = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=256,
    initializer_range=0.1,
    bos_token_id=None,
    eos_token_id=2,
    pad_token_id=None,
)
_SLIDING = ["sliding_attention", "full_attention"] * 2
_MOE: dict[str, Any] = dict(num_experts_per_tok=2, moe_intermediate_size=24)
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "mistral": dict(sliding_window=7),
    "gemma2": dict(sliding_window=7, query_pre_attn_scalar=8, attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
    "gemma3_text": dict(sliding_window=7, query_pre_attn_scalar=8, layer_types=_SLIDING),
    "gemma4_text": dict(
        sliding_window=7,
        layer_types=_SLIDING,
        global_head_dim=16,
        num_kv_shared_layers=2,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=VOCAB,
        final_logit_softcapping=3.0,
    ),
    "deepseek_v2": dict(
        num_key_value_heads=4,
        head_dim=8,
        kv_lora_rank=16,
        q_lora_rank=None,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=12,
        n_routed_experts=4,
        n_shared_experts=1,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
        topk_method="greedy",
        **_MOE,
    ),
    "gpt_oss": dict(sliding_window=7, num_local_experts=4, layer_types=_SLIDING, num_experts_per_tok=2),
    "qwen3_moe": dict(num_experts=4, **_MOE),
    "mixtral": dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
    "gpt2": dict(),
    "opt": dict(ffn_dim=48, word_embed_proj_dim=32),
    "cohere2": dict(sliding_window=7, layer_types=_SLIDING, logit_scale=0.25),
    "granite": dict(logits_scaling=2.0, attention_multiplier=0.3, residual_multiplier=0.7, embedding_multiplier=2.0),
}


def plain_model(family: str, **changes: Any) -> Any:
    """A random model in fp32 whose attention is loud, so that the last logits depend on the first tokens."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**_SHARED, **FAMILIES.get(family, {}), **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("attn", "attention")) and parameter.ndim == 2:
            parameter.data.mul_(3.0)
        if "sinks" in name:
            parameter.data.normal_(0, 1)
    return model.requires_grad_(False)


class Pair:
    """A target and the same weights as a plain transformers model, unaware of slots."""

    def __init__(self, family: str, num_slots: int = 400, **changes: Any) -> None:
        self.plain = plain_model(family, **changes)
        self.target = Target(copy.deepcopy(self.plain), name=family)
        self.target.resize(num_slots)

    def logits(self, tokens: list[int]) -> torch.Tensor:
        """[S, V]  of the plain model"""
        return self.plain(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]

    def hidden_states(self, tokens: list[int]) -> tuple[torch.Tensor, ...]:
        """Embeddings and the output of every layer, [S, H] each; the last one with the final norm applied."""
        states = self.plain(input_ids=torch.tensor([tokens]), use_cache=False, output_hidden_states=True).hidden_states
        return tuple(state[0] for state in states)

    def poison_unused_slots(self) -> None:
        """Fill every slot that no request owns with NaN, the scratch slot too."""
        cache = self.target.cache
        unused = torch.ones(cache.num_allocated + 1, dtype=torch.bool)
        for request in cache.request_ids:
            unused[torch.from_numpy(cache.slots_of(request).copy())] = False
        for pair in cache.storage.values():
            for tensor in pair:
                tensor[unused] = float("nan")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


_made: dict[str, Pair] = {}


@pytest.fixture
def pair_of() -> Iterator[Callable[[str], Pair]]:
    """pair_of(family) -> Pair, made once per session. After the test its cache must be sound, and is emptied."""
    lent: list[Pair] = []

    def lend(family: str) -> Pair:
        if family not in _made:
            _made[family] = Pair(family)
        lent.append(_made[family])
        return _made[family]

    yield lend
    for pair in lent:
        pair.target.cache.check()
        for request_id in pair.target.cache.request_ids:
            pair.target.release(request_id)


@pytest.fixture(params=list(FAMILIES))
def pair(request: pytest.FixtureRequest, pair_of: Callable[..., Pair]) -> Pair:
    return pair_of(request.param)


@pytest.fixture(scope="session")
def make_pair() -> Callable[..., Pair]:
    """make_pair(family, num_slots=400, **config) -> a Pair of the test's own."""
    return Pair
