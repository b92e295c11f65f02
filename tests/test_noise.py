"""Noise is a function of (seed, position, stream, token id), and it is what it claims to be."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from dspark.noise import ACCEPT, COUPLED, DRAFT, RESIDUAL, GumbelNoise, gumbel, philox, uniform
from dspark.sampling import KeyedDraws, law

CPU = torch.device("cpu")

# Known answers of Random123 (philox4x32, 10 rounds): counter, key, words.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> tuple[int, ...]:
    return tuple(int(word, 16) for word in text.split())


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_known_answers(counter: str, key: str, expected: str) -> None:
    assert philox(words(counter), words(key)) == words(expected)
    tensors = tuple(torch.tensor([word, 0]) for word in words(counter))
    assert tuple(int(word[0]) for word in philox(tensors, words(key))) == words(expected)


def test_python_integers_and_tensors_agree() -> None:
    counters = torch.randint(0, 2**32, (50, 4), generator=torch.Generator().manual_seed(0))
    key = (0x9E3779B9, 0xFFFFFFFF)
    together = torch.stack(philox(tuple(counters.T), key), -1)
    assert together.tolist() == [list(philox(tuple(counter), key)) for counter in counters.tolist()]
    mixed = philox((counters[:, 0], 7, 3, 0), key)
    assert mixed[2].tolist() == [philox((c, 7, 3, 0), key)[2] for c in counters[:, 0].tolist()]


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63 + 5, -1])
def test_gumbel_is_made_of_philox_words(seed: int) -> None:
    noise = gumbel(seed, 9, 3, 10, DRAFT, CPU)
    for row, token in [(0, 0), (1, 5), (2, 9)]:
        key = (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF)
        word = philox((token // 4, 9 + row, DRAFT, 0), key)[token % 4]
        exact = -math.log(-math.log1p(-(word + 0.5) * 2.0**-32))
        assert float(noise[row, token]) == pytest.approx(exact, abs=1e-5)


@pytest.mark.parametrize("word", [0, 1, 2**24, 2**31, 2**32 - 129, 2**32 - 128, 2**32 - 1])
def test_gumbel_is_finite_at_the_ends(word: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dspark.noise.philox", lambda counter, key: (torch.full((1, 1), word),) * 4)
    noise = gumbel(0, 0, 1, 4, 0, CPU)
    assert noise.isfinite().all()
    assert noise[0, 0] >= -2.82 if word > 2**31 else noise[0, 0] <= 22.9
    # Added to an excluded token it must never win.
    scores = torch.tensor([[float("-inf"), -1e30, float("-inf"), float("-inf")]])
    assert int((scores + noise).argmax()) == 1


def test_gumbel_is_gumbel() -> None:
    noise = gumbel(3, 0, 50, 2001, COUPLED, CPU).double().flatten()
    assert float(noise.mean()) == pytest.approx(0.5772156649, abs=4 * math.pi / math.sqrt(6 * len(noise)))
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, rel=0.02)
    assert stats.kstest(noise.numpy(), "gumbel_r").pvalue > 1e-3


def test_uniform_is_uniform_and_below_one() -> None:
    numbers = [uniform(seed, position, ACCEPT) for seed in range(20) for position in range(100)]
    assert 0 <= min(numbers) <= max(numbers) < 1
    assert stats.kstest(numbers, "uniform").pvalue > 1e-3
    assert len(set(numbers)) == len(numbers)


@pytest.mark.parametrize("vocab_size", [3, 7, 512, 1500, 40000])
def test_rows_are_the_same_however_they_are_asked_for(vocab_size: int) -> None:
    noise = GumbelNoise(vocab_size, max_bytes=1)  # the smallest cache: rows are dropped and made again
    edge = noise.block
    seeds = [1] * 6 + [2, 2, 1, 3, 1]
    positions = [edge - 3, edge - 2, edge - 1, edge, edge + 1, edge + 2, 0, 1, edge - 1, 5 * edge, edge - 1]
    together = noise.rows(seeds, positions, COUPLED)
    for index in (4, 0, 10, 7, 9, 2, 8):
        alone = GumbelNoise(vocab_size).rows(seeds[index : index + 1], positions[index : index + 1], COUPLED)
        assert torch.equal(alone[0], together[index])
        assert torch.equal(noise.rows([seeds[index]], [positions[index]], COUPLED)[0], together[index])
    shuffled = [6, 3, 8, 0, 10, 5]
    again = noise.rows([seeds[i] for i in shuffled], [positions[i] for i in shuffled], COUPLED)
    assert torch.equal(again, together[shuffled])
    assert len(noise._blocks) <= noise.max_blocks


def test_rows_without_a_seed_are_silent_and_take_nothing() -> None:
    noise = GumbelNoise(64)
    rows = noise.rows([None, 7, 7, None, None], [3, 4, 5, 40, 41], COUPLED)
    assert torch.equal(rows[1:3], GumbelNoise(64).rows([7, 7], [4, 5], COUPLED))
    assert not rows[[0, 3, 4]].any() and len(noise._blocks) == 1


def test_greedy_rows_beside_sampled_ones_need_no_noise() -> None:
    draws, scores = KeyedDraws(64, torch.device("cpu")), torch.randn(3, 64)
    temperature = torch.tensor([[0.0], [1.0], [0.0]])
    noisy = draws.noisy(scores, temperature, [5, 6, 7], [1, 1, 1], COUPLED)
    assert torch.equal(noisy[[0, 2]], scores[[0, 2]]) and len(draws.noise._blocks) == 1
    assert torch.equal(noisy[1], scores[1] + gumbel(6, 1, 1, 64, COUPLED, torch.device("cpu"))[0])


def test_rows_of_requests_that_have_passed_are_not_kept() -> None:
    noise = GumbelNoise(64)
    for seed in range(1000):
        noise.rows([seed, -1], [0, seed % noise.block], COUPLED)
    assert len(noise._blocks) < 80 < noise.max_blocks
    assert (-1, 0, COUPLED) in noise._blocks  # one that runs


def test_seeds_positions_and_streams_are_independent() -> None:
    base = gumbel(1, 100, 1, 20000, COUPLED, CPU)[0]
    others = [
        gumbel(2, 100, 1, 20000, COUPLED, CPU)[0],
        gumbel(1 + 2**32, 100, 1, 20000, COUPLED, CPU)[0],
        gumbel(1, 101, 1, 20000, COUPLED, CPU)[0],
        *[gumbel(1, 100, 1, 20000, stream, CPU)[0] for stream in (DRAFT, RESIDUAL, ACCEPT)],
        base.roll(1),
        base.roll(4),
    ]
    pvalues = [stats.spearmanr(base.numpy(), other.numpy()).pvalue for other in others]
    assert min(pvalues) * len(pvalues) > 1e-3


def holm(pvalues: list[float], level: float = 1e-3) -> list[int]:
    """Indices of the hypotheses that Holm's procedure rejects."""
    rejected = []
    for rank, index in enumerate(sorted(range(len(pvalues)), key=pvalues.__getitem__)):
        if pvalues[index] > level / (len(pvalues) - rank):
            break
        rejected.append(index)
    return rejected


def joint_pvalue(draws: KeyedDraws, scores: torch.Tensor, temperature: float, seeds: range, first: int) -> float:
    """Chi-square of the joint law of two following positions, cells pooled to an expectation of 5."""
    places = [(seed, position) for seed in seeds for position in range(first, first + 16, 2)]
    n, vocab_size = len(places), scores.shape[-1]
    column, names = torch.full((n, 1), temperature), [seed for seed, _ in places]
    left, right = (
        draws.tokens(scores[None].expand(n, -1), column, names, [position + i for _, position in places], COUPLED)
        for i in (0, 1)
    )
    one = law(scores[None].double(), column[:1].double())[0]
    observed = torch.bincount(left * vocab_size + right, minlength=vocab_size**2).double()
    expected = n * (one[:, None] * one).flatten()
    order = expected.sort(descending=True).indices
    observed, expected = observed[order], expected[order]
    small = expected < 5
    observed = torch.cat([observed[~small], observed[small].sum()[None]])
    expected = torch.cat([expected[~small], expected[small].sum()[None]])
    filled = expected > 0
    return float(stats.chisquare(observed[filled].numpy(), expected[filled].numpy()).pvalue)


def test_token_frequencies_of_keyed_draws() -> None:
    generator = torch.Generator().manual_seed(7)
    pvalues = []
    for case in range(6):
        scores = torch.randn(8, generator=generator) * 2
        seeds = range(case * 10_000, case * 10_000 + 500)
        pvalues.append(joint_pvalue(KeyedDraws(8), scores, [0.7, 1.0, 1.5][case % 3], seeds, 37 * case))
    assert holm(pvalues) == []


def test_the_frequency_test_can_fail() -> None:
    class Shared(KeyedDraws):
        def tokens(self, scores, temperature, seeds, positions, stream):
            return super().tokens(scores, temperature, seeds, [p // 2 for p in positions], stream)

    scores = torch.randn(8, generator=torch.Generator().manual_seed(7))
    assert holm([joint_pvalue(Shared(8), scores, 1.0, range(500), 0)]) == [0]
