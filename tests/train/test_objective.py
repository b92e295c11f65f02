"""The whole objective of a drafter: against its plain form, and blind to what lies ahead."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from benchmarks.training import dense_loss
from dspark.drafters.block_model import BlockConfig, BlockModel, TraceBatch
from dspark.losses import Losses, LossWeights

CONFIG = BlockConfig(
    hidden_size=12,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=4,
    vocab_size=19,
    target_layer_ids=(0, 2),
    block_size=4,
    mask_token_id=18,
    markov_rank=3,
    enable_confidence_head=True,
    confidence_head_with_markov=True,
)
LENGTH = 14


class Case:
    """A random model, two texts (one with a hole in its mask) and their traces, in float64."""

    def __init__(self, head: str = "vanilla") -> None:
        generator = torch.Generator().manual_seed(3)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        torch.manual_seed(0)
        self.model = BlockModel(dataclasses.replace(CONFIG, markov_head_type=head)).double()
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(0.2 * draw(*parameter.shape))
        self.embed = nn.Embedding(19, 12).double().requires_grad_(False)
        self.lm_head = nn.Linear(12, 19, bias=False).double().requires_grad_(False)
        mask = torch.ones(2, LENGTH, dtype=torch.bool)
        mask[:, :3] = False
        mask[1, 8] = False
        ids = torch.randint(18, (2, LENGTH), generator=generator)
        anchors = torch.tensor([[3, 6, 11], [4, 9, 0]])
        kept = torch.tensor([[True, True, True], [True, True, False]])
        self.batch = TraceBatch(ids, mask, draw(2, LENGTH, 24), draw(2, LENGTH, 12), anchors, kept)

    def loss(self, weights: LossWeights, batch: TraceBatch | None = None) -> Losses:
        return self.model.loss(batch or self.batch, self.embed, self.lm_head, weights)


@pytest.mark.parametrize("head", ["vanilla", "gated", "rnn"])
def test_value_and_gradient_are_those_of_the_plain_form(head: str) -> None:
    case = Case(head)
    parameters = list(case.model.parameters())
    fused = case.loss(LossWeights()).total
    dense = dense_loss(case.model, case.batch, case.embed, _Double(case.lm_head), LossWeights())
    assert abs(float(fused.detach()) - float(dense.detach())) < 1e-6  # the position weights are float32
    for ours, theirs in zip(
        torch.autograd.grad(fused, parameters), torch.autograd.grad(dense, parameters), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


class _Double:
    """A head whose weight says that it is wide enough already."""

    def __init__(self, lm_head: nn.Linear) -> None:
        self.weight = lm_head.weight.detach()
        self.weight.float = lambda: lm_head.weight.detach()  # type: ignore[method-assign]


def test_the_confidence_heads_own_gradient_is_too() -> None:
    """Its weights do not move the label."""
    case, weights = Case(), LossWeights(cross_entropy=0.0, total_variation=0.0)
    assert case.model.confidence_head is not None
    _agrees(lambda: case.loss(weights).total, list(case.model.confidence_head.parameters()))


def _agrees(total: Callable[[], Tensor], parameters: list[nn.Parameter], step: float = 1e-6) -> None:
    """Along random directions of each parameter in turn."""
    gradients = torch.autograd.grad(total(), parameters)
    generator = torch.Generator().manual_seed(1)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        values = []
        with torch.no_grad():
            for move in (step, -2 * step):
                parameter.add_(direction, alpha=move)
                values.append(float(total()))
            parameter.add_(direction, alpha=step)
        assert (values[0] - values[1]) / (2 * step) == pytest.approx(
            float((gradient * direction).sum()), rel=1e-4, abs=1e-7
        )


def test_swapping_what_lies_ahead_of_a_block_changes_nothing_in_it() -> None:
    """Tokens, features and states from the last label on are other ones; and the context ends before the anchor."""
    case = Case()
    one = dataclasses.replace(case.batch, anchors=torch.tensor([[5], [5]]), kept=torch.ones(2, 1, dtype=torch.bool))
    one.loss_mask[:] = True
    before = case.loss(LossWeights(), one)
    ids, features, hidden = (t.clone() for t in (one.token_ids, one.features, one.last_hidden))
    ids[:, 10:] = ids[:, 10:].flip(1)
    features[:, 5:] += 7.0
    hidden[:, 9:] += 7.0
    after = case.loss(LossWeights(), dataclasses.replace(one, token_ids=ids, features=features, last_hidden=hidden))
    assert float(before.total.detach()) == float(after.total.detach())
    features[:, 4] += 1e-3
    seen = case.loss(LossWeights(), dataclasses.replace(one, token_ids=ids, features=features, last_hidden=hidden))
    assert float(seen.total.detach()) != float(before.total.detach())


def test_nothing_to_learn_from_is_a_loss_of_zero_without_a_gradient() -> None:
    """A record with no assistant turn that got into a batch all the same."""
    case = Case()
    empty = dataclasses.replace(case.batch, loss_mask=torch.zeros_like(case.batch.loss_mask))
    losses = case.loss(LossWeights(), empty)
    assert float(losses.total.detach()) == 0.0 and losses.num_positions == 0
    gradients = torch.autograd.grad(losses.total, list(case.model.parameters()), allow_unused=True)
    assert all(g is None or not g.any() for g in gradients)
