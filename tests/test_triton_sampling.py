"""The fused sampler against the reference: the same tokens from the same logits, and the law they come from."""

from __future__ import annotations

import pytest
import torch
from scipy import stats
from torch import Tensor

pytest.importorskip("triton")

from dspark import triton_sampling
from dspark.noise import COUPLED, DRAFT
from dspark.sampling import KeyedDraws
from dspark.triton_sampling import draw

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def fused(scores: Tensor, temperature: Tensor, seeds: list[int], positions: list[int], stream: int) -> Tensor:
    places = (torch.tensor(values, device=DEVICE) for values in (seeds, positions))
    return draw(scores.to(DEVICE), temperature.to(DEVICE), *places, stream).cpu()


@pytest.mark.parametrize("vocab_size", [1, 3, 67, 4097, 9001])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_same_tokens_as_the_reference(vocab_size: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    scores = (3 * torch.randn(6, vocab_size, generator=generator)).to(dtype)
    scores[1, : vocab_size // 2] = float("-inf")
    temperature = torch.tensor([0.0, 1.0, 0.3, 2.0, 1.0, 0.0]).to(torch.promote_types(dtype, torch.float32))[:, None]
    seeds, positions = [0, 1, 2**62 + 5, 2**40, 7, 9], [0, 5, 1023, 100_000, 3, 4]
    stream = COUPLED if dtype == torch.float32 else DRAFT
    expected = KeyedDraws(vocab_size).tokens(scores.float(), temperature, seeds, positions, stream)
    assert fused(scores, temperature, seeds, positions, stream).tolist() == expected.tolist()


def test_of_equals_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_sampling, "_QUADS", 4)
    scores = torch.zeros(3, 50)
    scores[1, [20, 21, 49]] = 1.0
    scores[2] = float("-inf")
    scores[2, 33:] = -1e30
    assert fused(scores, torch.zeros(3, 1), [1, 2, 3], [0, 0, 0], COUPLED).tolist() == [0, 20, 33]


def test_logits_that_are_no_numbers_give_a_token_all_the_same() -> None:
    scores = torch.randn(3, 5000)
    scores[1], scores[2, :4990] = float("nan"), float("nan")
    tokens = fused(scores, torch.tensor([[0.0], [1.0], [1.0]]), [1, 2, 3], [0, 0, 0], COUPLED)
    assert (tokens >= 0).all() and (tokens < 5000).all()


def test_the_sampler_draws_through_it(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, temperature, numbers = (
        torch.randn(3, 40),
        torch.ones(3, 1),
        ([-1, 2**64 - 1, 2**63 - 1], [4, 4, 5], COUPLED),
    )
    draws = KeyedDraws(40, DEVICE)
    expected = KeyedDraws(40).tokens(scores, temperature, *numbers)
    monkeypatch.setattr(draws, "_draw", draw)
    assert draws.tokens(scores.to(DEVICE), temperature.to(DEVICE), *numbers).tolist() == expected.tolist()


def test_the_law() -> None:
    """A χ² test over the positions of one seed."""
    num_draws, scores = 160, torch.tensor([0.0, 1.0, -1.0, 0.5, 2.0, float("-inf"), -0.5])
    rows, temperature = scores.expand(num_draws, -1), torch.full((num_draws, 1), 1.6)
    drawn = fused(rows, temperature, [11] * num_draws, list(range(num_draws)), COUPLED)
    expected = torch.softmax(scores.double() / 1.6, 0) * num_draws
    counts = drawn.bincount(minlength=7)
    assert counts[5] == 0
    possible = [0, 1, 2, 3, 4, 6]
    assert stats.chisquare(counts[possible].numpy(), expected[possible].numpy()).pvalue > 1e-3
