"""Why there is a sequential head: of two equally likely phrases, independent positions mix the halves (paper 1, 3.1)."""

from __future__ import annotations

import torch
from torch import nn

from dspark.drafters.block_model import BlockConfig, BlockModel, TraceBatch
from dspark.losses import LossWeights

ANCHOR, PHRASES, VOCAB, HIDDEN = 5, torch.tensor([[6, 7], [8, 9]]), 10, 16
CONFIG = {
    "hidden_size": HIDDEN, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "vocab_size": VOCAB, "target_layer_ids": [0], "block_size": 2, "mask_token_id": 3,
}  # fmt: skip


def examples() -> TraceBatch:
    """After the anchor the target says "6 7" or "8 9", each half of the time, and never mixes them."""
    phrases = PHRASES.repeat(8, 1)
    token_ids = torch.cat([torch.tensor([[4, ANCHOR]]).expand(16, -1), phrases], 1)
    law = torch.zeros(16, 4, VOCAB)
    law[:, 1, PHRASES[:, 0]] = 0.5
    law[torch.arange(16), 2, phrases[:, 1]] = 1.0
    last_hidden = torch.zeros(16, 4, HIDDEN)
    last_hidden[..., :VOCAB] = law.clamp(min=1e-9).log()  # the LM head below is the identity
    torch.manual_seed(0)
    return TraceBatch(
        token_ids,
        torch.tensor([False, True, True, True]).expand(16, -1),
        torch.randn(1, 4, HIDDEN).expand(16, -1, -1),  # what was read before the anchor does not tell the phrases apart
        last_hidden,
        torch.ones(16, 1, dtype=torch.long),
        torch.ones(16, 1, dtype=torch.bool),
    )


def acceptance(rank: int) -> list[float]:
    """Of both positions, after a few seconds of training."""
    torch.manual_seed(1)
    model = BlockModel(BlockConfig.from_dict({**CONFIG, "markov_rank": rank}))
    embed, lm_head = nn.Embedding(VOCAB, HIDDEN).requires_grad_(False), nn.Linear(HIDDEN, VOCAB, bias=False)
    with torch.no_grad():
        lm_head.weight.copy_(torch.eye(VOCAB, HIDDEN))
    optimizer, batch = torch.optim.Adam(model.parameters(), 0.02), examples()
    for _ in range(250):
        losses = model.loss(batch, embed, lm_head.requires_grad_(False), LossWeights(confidence=0.0))
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
    values: list[float] = losses.acceptance.tolist()
    return values


def test_independent_positions_get_half_and_the_markov_head_nearly_all() -> None:
    independent, markov = acceptance(rank=0), acceptance(rank=4)
    assert independent[0] > 0.95 and markov[0] > 0.95
    assert independent[1] <= 0.5 + 1e-4  # the mean of 1 - TV to two different certainties cannot be more
    assert markov[1] > 0.95
