"""Losses against hand computations, and the fused gradient against autograd's."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dspark.losses import (
    LossWeights,
    ProjectedLoss,
    block_losses,
    capped,
    cut_blocks,
    l1_and_cross_entropy,
    position_weights,
)

HIDDEN, RANK, VOCAB, SIZE = 6, 3, 11, 7


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def law(logits: list[float]) -> list[float]:
    total = sum(math.exp(x) for x in logits)
    return [math.exp(x) / total for x in logits]


@pytest.mark.parametrize("hole", [None, 3])
def test_total_is_what_one_computes_by_hand(hole: int | None) -> None:
    """exp(-j/4), a cumulative AND, weighted means with 1e-6 in the denominator, 0.1 CE + 0.9 L1 + 1.0 BCE; no 1/2 in L1."""
    tokens = torch.arange(1, 11)[None] % VOCAB  # 10 tokens
    mask = torch.ones(1, 10, dtype=torch.bool)
    if hole is not None:
        mask[0, 1 + hole + 1] = False  # the label of position `hole` of the first block
    anchors, kept = torch.tensor([[1, 5, 0]]), torch.tensor([[True, True, False]])
    blocks = cut_blocks(tokens, mask, anchors, kept, SIZE)
    first = SIZE if hole is None else hole
    second = 4 if hole is None else 4 if 1 + hole + 1 < 6 else 0  # anchor 5 predicts tokens 6 .. 9
    assert blocks.evaluated.sum(-1).tolist() == [[first, second, 0]]

    head, projection = draw(VOCAB, HIDDEN, seed=1), draw(VOCAB, RANK, seed=2)
    hidden, latent, teacher = draw(3, SIZE, HIDDEN, seed=3), draw(3, SIZE, RANK, seed=4), draw(3, SIZE, HIDDEN, seed=5)
    confidence = draw(3, SIZE, seed=6)
    got = block_losses(
        hidden, latent, projection, head, confidence, teacher, blocks.labels[0], blocks.evaluated[0], LossWeights()
    )

    sums = [0.0, 0.0, 0.0, 0.0]
    for block in range(2):
        for j in range([first, second][block]):
            weight = math.exp(-j / 4)
            q = law((head @ hidden[block, j] + projection @ latent[block, j]).tolist())
            p = law((head @ teacher[block, j]).tolist())
            label = int(tokens[0, [1, 5][block] + 1 + j])
            l1 = sum(abs(a - b) for a, b in zip(q, p, strict=True))
            survives, c = 1 - l1 / 2, 1 / (1 + math.exp(-confidence[block, j].item()))
            bce = -survives * math.log(c) - (1 - survives) * math.log(1 - c)
            for i, term in enumerate([1, -math.log(q[label]), l1, bce]):
                sums[i] += weight * term
    ce, l1, bce = (x / (sums[0] + 1e-6) for x in sums[1:])
    assert got.total.item() == pytest.approx(0.1 * ce + 0.9 * l1 + 1.0 * bce, rel=1e-6)
    assert got.cross_entropy.item() == pytest.approx(ce, rel=1e-6)
    assert got.l1.item() == pytest.approx(l1, rel=1e-6)
    assert got.confidence.item() == pytest.approx(bce, rel=1e-6)
    assert got.num_positions == first + second


def test_hole_takes_the_rest_of_the_block() -> None:
    tokens = torch.zeros(1, 12, dtype=torch.long)
    mask = torch.ones(1, 12, dtype=torch.bool)
    mask[0, 5] = False
    evaluated = cut_blocks(tokens, mask, torch.tensor([[2, 6]]), torch.ones(1, 2, dtype=torch.bool), 5).evaluated[0]
    assert evaluated.tolist() == [[True, True, False, False, False], [True] * 5]


def test_sequence_shorter_than_a_block() -> None:
    tokens = torch.tensor([[4, 5, 6]])
    blocks = cut_blocks(
        tokens, torch.ones(1, 3, dtype=torch.bool), torch.tensor([[1]]), torch.ones(1, 1, dtype=torch.bool), 7
    )
    assert blocks.evaluated[0, 0].tolist() == [True] + [False] * 6
    assert (blocks.labels[0, 0, 0], blocks.previous[0, 0, 0]) == (6, 5)


def test_weights_decay_by_four_positions() -> None:
    weights = position_weights(torch.ones(1, 7, dtype=torch.bool), 4.0)[0]
    assert torch.allclose(weights, torch.tensor([math.exp(-j / 4) for j in range(7)]))


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("with_head", [True, False])
def test_fused_loss_equals_the_plain_one(softcap: float | None, with_head: bool) -> None:
    """Values and all three gradients, with chunks that do not divide the rows."""
    rows = 10
    hidden, head, teacher = draw(rows, HIDDEN, seed=1), draw(VOCAB, HIDDEN, seed=2), draw(rows, HIDDEN, seed=3)
    latent, projection = draw(rows, RANK, seed=4), draw(VOCAB, RANK, seed=5)
    labels = torch.arange(rows) % VOCAB
    ce_weights, l1_weights = draw(rows, seed=6).abs(), draw(rows, seed=7).abs()
    inputs = [hidden, latent, projection] if with_head else [hidden]
    for tensor in inputs:
        tensor.requires_grad_()
    fused, ce, l1 = ProjectedLoss.apply(
        hidden,
        latent if with_head else None,
        projection if with_head else None,
        head,
        teacher,
        labels,
        ce_weights,
        l1_weights,
        softcap,
        4,
    )
    logits = capped(hidden @ head.T, softcap) + (latent @ projection.T if with_head else 0)
    plain_l1, plain_ce = l1_and_cross_entropy(logits, torch.softmax(capped(teacher @ head.T, softcap), -1), labels)
    plain = (plain_l1 * l1_weights).sum() + (plain_ce * ce_weights).sum()
    assert torch.allclose(l1, plain_l1) and torch.allclose(ce, plain_ce) and torch.allclose(fused, plain)
    for ours, theirs in zip(
        torch.autograd.grad(fused * 3, inputs), torch.autograd.grad(plain * 3, inputs), strict=True
    ):
        assert torch.allclose(ours, theirs, atol=1e-12)


def test_fused_gradient_equals_finite_differences() -> None:
    hidden, latent, projection = (
        draw(*shape, seed=i).requires_grad_() for i, shape in enumerate([(5, 6), (5, 3), (11, 3)])
    )
    head, teacher, weights = draw(VOCAB, 6, seed=8), draw(5, 6, seed=9), draw(5, seed=10).abs()

    def total(*inputs: Tensor) -> Tensor:
        return ProjectedLoss.apply(*inputs, head, teacher, torch.arange(5), weights, weights.flip(0), None, 2)[0]

    assert torch.autograd.gradcheck(total, (hidden, latent, projection))


def test_only_the_confidence_label_is_detached() -> None:
    """BCE alone must reach the features through the logit (released code), and not through the label."""
    head, teacher, w = draw(VOCAB, HIDDEN, seed=1), draw(2, SIZE, HIDDEN, seed=2), draw(HIDDEN, seed=3)
    hidden = draw(2, SIZE, HIDDEN, seed=4).requires_grad_()
    labels, evaluated = torch.zeros(2, SIZE, dtype=torch.long), torch.ones(2, SIZE, dtype=torch.bool)
    losses = block_losses(hidden, None, None, head, hidden @ w, teacher, labels, evaluated, LossWeights(0.0, 0.0, 1.0))
    (gradient,) = torch.autograd.grad(losses.total, hidden)

    l1, _ = l1_and_cross_entropy(
        (hidden @ head.T).flatten(0, 1), torch.softmax(teacher @ head.T, -1).flatten(0, 1), labels.flatten()
    )
    weights = position_weights(evaluated, 4.0).flatten()
    bce = F.binary_cross_entropy_with_logits((hidden @ w).flatten(), 1 - l1.detach() / 2, reduction="none")
    (expected,) = torch.autograd.grad((bce * weights).sum() / (weights.sum() + 1e-6), hidden)
    assert gradient.abs().max() > 1e-3 and torch.allclose(gradient, expected, rtol=1e-5)
