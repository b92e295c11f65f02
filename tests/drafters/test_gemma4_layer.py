"""Gemma 4's draft layers against transformers' own, given the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Gemma4TextConfig
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextModel

from dspark.drafters.block import BlockDrafter
from dspark.drafters.gemma4_layer import Gemma4BlockConfig, Gemma4BlockModel
from dspark.sampling import KeyedDraws
from dspark.types import Request, SamplingParams
from dspark.verify import Coupled

VOCAB, HIDDEN, BLOCK, NUM_CONTEXT = 41, 32, 5, 9
CAP = 0.5


class ContextFirst:
    """In place of transformers' cache: remembers keys and values, or puts the remembered ones first."""

    def __init__(self) -> None:
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, key: Tensor, value: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if layer not in self.kept:
            self.kept[layer] = key, value
            return key, value
        k, v = self.kept[layer]
        return torch.cat([k, key], 2), torch.cat([v, value], 2)


@pytest.fixture
def theirs() -> Gemma4TextModel:
    torch.manual_seed(0)
    config = Gemma4TextConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        global_head_dim=8,
        num_global_key_value_heads=1,
        attention_k_eq_v=True,
        layer_types=["full_attention"] * 2,
        hidden_size_per_layer_input=0,
        num_kv_shared_layers=0,
        pad_token_id=None,
        attn_implementation="eager",
    )
    model = Gemma4TextModel(config).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    for layer in model.layers:
        layer.layer_scalar.fill_(0.7)
    return model


@torch.no_grad()
def test_draft_equals_transformers_layers(theirs: Gemma4TextModel) -> None:
    config = Gemma4BlockConfig.from_dict(
        {
            **theirs.config.to_dict(),
            "target_layer_ids": [1],
            "block_size": BLOCK,
            "mask_token_id": 3,
            "markov_rank": 6,
            "global_head_dim": 8,
            "num_global_key_value_heads": 1,
            "attention_k_eq_v": True,
            "final_logit_softcapping": CAP,
            "rope_theta": None,
        }
    )
    assert (config.head_dim, config.num_key_value_heads, config.rope_theta, config.partial_rotary_factor) == (
        8,
        1,
        1e6,
        0.25,
    )
    ours = Gemma4BlockModel(config).double().eval()
    nn.init.normal_(ours.head.markov_w2.weight)
    ours.layers.load_state_dict(theirs.layers.state_dict())
    ours.norm.load_state_dict(theirs.norm.state_dict())
    lm_head = nn.Linear(HIDDEN, VOCAB, bias=False).double()

    features = torch.randn(NUM_CONTEXT, HIDDEN, dtype=torch.float64)
    context, cache = ours.context(features)[None], ContextFirst()
    rotary = theirs.rotary_emb(context, torch.arange(NUM_CONTEXT)[None], "full_attention")
    for layer in theirs.layers:
        layer.self_attn(context, rotary, None, {}, past_key_values=cache)
    ids = torch.tensor([[11, 3, 3, 3, 3]])
    x = theirs.embed_tokens(ids)
    assert not torch.allclose(x, theirs.embed_tokens.weight[ids]), "Gemma's embedding scales itself"
    rotary = theirs.rotary_emb(x, torch.arange(NUM_CONTEXT, NUM_CONTEXT + BLOCK)[None], "full_attention")
    for layer in theirs.layers:
        x = layer(x, None, {}, rotary, None, past_key_values=cache)
    base = torch.tanh(lm_head(theirs.norm(x))[0] / CAP) * CAP

    drafter = BlockDrafter(ours, theirs.embed_tokens, lm_head)
    seen: list[Tensor] = []

    class Listening(Coupled):
        def draft(self, logits, requests, previous):  # type: ignore[no-untyped-def]
            seen.append(logits[0])
            return super().draft(logits, requests, previous)

    request = Request(
        0,
        [*range(NUM_CONTEXT), 11],
        SamplingParams(temperature=0.0, top_k=5),
        1,
        num_cached=NUM_CONTEXT,
        features=features,
    )
    tokens = drafter.propose([request], Listening(KeyedDraws(VOCAB))).tokens[0].tolist()
    previous = torch.tensor([11, *tokens[:-1]])
    expected = base + ours.head.markov_w2(ours.head.markov_w1(previous))  # the bias comes after the softcap
    torch.testing.assert_close(torch.stack(seen).double(), expected, atol=1e-5, rtol=1e-5)
    assert torch.stack(seen).abs().max() > CAP, "the bias is not capped"


def test_partial_rotation_leaves_the_rest_alone() -> None:
    config = Gemma4BlockConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=16,
        vocab_size=4,
        target_layer_ids=(0,),
        block_size=2,
        mask_token_id=0,
        partial_rotary_factor=0.25,
    )
    rotary = Gemma4BlockModel(config).rotary(torch.tensor([5]), torch.float32)
    x = torch.randn(1, 1, 16)
    same = (rotary(x) == x)[0, 0].tolist()
    assert same == ([False] * 2 + [True] * 6) * 2
