"""What drafters start from: a head from texts says what follows what in them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dspark.drafters.block_model import BlockConfig, BlockModel
from dspark.errors import InvalidConfiguration
from dspark.train.start import WHERE_IT_FITS, start, start_head_from_texts
from dspark.train.texts import Text

VOCAB = 12


def model_of(rank: int, head: str = "vanilla") -> BlockModel:
    shape = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    return BlockModel(
        BlockConfig(
            **shape,
            head_dim=4,
            vocab_size=VOCAB,
            target_layer_ids=(0,),
            block_size=4,
            mask_token_id=3,
            markov_rank=rank,
            markov_head_type=head,
        )
    )


def biases(model: BlockModel) -> torch.Tensor:
    """[V, V] of previous and next token."""
    return model.markov_head.markov_w2(model.markov_head.markov_w1.weight).detach()


def test_a_head_of_full_rank_has_the_shrunk_ratios_of_the_answers_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    texts = [Text.after_prompt(torch.randint(0, VOCAB, (30,), generator=generator), 5) for _ in range(20)]
    texts[3].loss_mask[10:15] = False
    counts = torch.zeros(VOCAB, VOCAB)
    for text in texts:
        for i in range(len(text) - 1):
            counts[text.token_ids[i], text.token_ids[i + 1]] += bool(text.loss_mask[i + 1])
    law = (counts.sum(0) + 0.5) / (counts.sum(0) + 0.5).sum()
    model = model_of(rank=VOCAB)
    start_head_from_texts(model, texts)
    torch.testing.assert_close(biases(model), (1 + counts / (20 * law)).log(), atol=1e-4, rtol=1e-4)


def test_a_head_of_low_rank_knows_what_comes_next() -> None:
    """Of tokens that follow each other in threes: 0 1 2 0 1 2, or 3 4 5 3 4 5, and so on."""
    ring = torch.arange(VOCAB) // 3 * 3 + (torch.arange(VOCAB) + 1) % 3
    texts = []
    for first in range(VOCAB):
        tokens = [first]
        for _ in range(40):
            tokens.append(int(ring[tokens[-1]]))
        texts.append(Text.after_prompt(torch.tensor(tokens), 1))
    model = model_of(rank=VOCAB - 1)
    start_head_from_texts(model, texts)
    assert torch.equal(biases(model).argmax(-1), ring)
    assert float(model.markov_head.markov_w1.weight.detach().norm(dim=1).mean()) == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize(("rank", "head"), [(0, "vanilla"), (8, "rnn")])
def test_other_heads_are_refused(rank: int, head: str) -> None:
    texts = [Text.after_prompt(torch.arange(10), 2)]
    with pytest.raises(InvalidConfiguration, match="for the vanilla Markov head"):
        start_head_from_texts(model_of(rank, head), texts)


@pytest.mark.parametrize(("family", "is_like_llama"), [("llama", True), ("gpt2", False)])
def test_a_recipe_for_any_target_copies_layers_where_it_fits(
    caplog: pytest.LogCaptureFixture, family: str, is_like_llama: bool
) -> None:
    shape = dict(vocab_size=VOCAB, hidden_size=8, num_hidden_layers=3, num_attention_heads=2)
    config = AutoConfig.for_model(family, **shape, intermediate_size=8, num_key_value_heads=1, head_dim=4)
    target, model = AutoModelForCausalLM.from_config(config), model_of(rank=2)
    settings = SimpleNamespace(start_from=None, start_from_target=True, start_head_from_texts=False)
    if is_like_llama:
        start(model, settings, target, [])
    else:
        drawn = [p.clone() for p in model.parameters()]
        with pytest.raises(InvalidConfiguration, match="built like Llama or Qwen3"):
            start(model, settings, target, [])
        assert all(map(torch.equal, drawn, model.parameters()))  # refused before anything is changed
    settings.start_from_target = WHERE_IT_FITS
    start(model, settings, target, [])
    assert bool(model.layers[0].mlp.down_proj.weight.any()) == is_like_llama
    assert ("starting from drawn weights" in caplog.text) == (not is_like_llama)
