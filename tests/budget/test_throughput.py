"""The schedulers that weigh tokens against seconds, next to the plainest programs that say what they should do."""

from __future__ import annotations

import random
from itertools import product

import numpy as np
import pytest
import torch

from dspark.budget.baselines import StartupTable, TokensPerBatch
from dspark.budget.prefix_scheduler import along_paths, falling_survival, parent_survival, survival_of
from dspark.budget.throughput import EarlyStop, Lagged, Optimal
from dspark.types import Draft, Load, StepRecord


class Staircase:
    """Seconds by tokens: a base, a slope, and a step up every `width` tokens."""

    def __init__(self, base: float = 1.0, slope: float = 0.0, width: int = 4, rise: float = 0.0) -> None:
        self.base, self.slope, self.width, self.rise = base, slope, width, rise

    def seconds(self, tokens, requests, context_tokens, is_reading=False):
        tokens = np.asarray(tokens)
        return self.base + self.slope * tokens + self.rise * np.ceil(tokens / self.width)


class Listed:
    """Steps per second by tokens, as in the paper's examples; `first` tokens have the first number."""

    def __init__(self, steps_per_second, first: int) -> None:
        self.steps_per_second, self.first = np.array(steps_per_second), first

    def seconds(self, tokens, requests, context_tokens, is_reading=False):
        where = np.clip(np.asarray(tokens) - self.first, 0, len(self.steps_per_second) - 1)
        return 1 / self.steps_per_second[where]


def random_chain(rng: random.Random, num_requests: int, length: int) -> Draft:
    levels = [0.0, 0.3, 0.5, 0.5, 0.8, 0.9, 1.0, 1.0]  # ties, certainties and impossibilities among them
    pick = lambda: rng.choice(levels) if rng.random() < 0.5 else rng.random()  # noqa: E731
    confidence = torch.tensor([[pick() for _ in range(length)] for _ in range(num_requests)], dtype=torch.double)
    sizes = torch.tensor([rng.randint(0, length) for _ in range(num_requests)], dtype=torch.long)
    return Draft(torch.zeros(num_requests, length, dtype=torch.long), sizes, confidence.view(num_requests, length))


def random_tree(rng: random.Random, num_requests: int, length: int) -> Draft:
    draft = random_chain(rng, num_requests, length)
    parents = [[rng.randint(-1, k - 1) for k in range(length)] for _ in range(num_requests)]
    return Draft(draft.tokens, draft.sizes, draft.confidence, torch.tensor(parents, dtype=torch.long).view(-1, length))


def random_cost(rng: random.Random) -> Staircase:
    return Staircase(rng.uniform(0.1, 3), rng.choice([0, rng.uniform(0, 0.3)]), rng.randint(1, 5), rng.uniform(0, 1))


def survival(draft: Draft) -> torch.Tensor:
    return falling_survival(draft, survival_of(draft, draft.confidence))


def literal_algorithm_1(confidence, sizes, seconds, num_requests: int, draft_seconds: float):
    """The paper's listing, one admission after the other, a confidence read only when its parent was admitted.

    Returns lengths by request and the log of what was read.
    """
    lengths, read = [0] * num_requests, {(r, 0) for r in range(num_requests) if sizes[r]}
    reach = {r: confidence(r, 0) for r, _ in read}
    tokens, tau = num_requests, float(num_requests)
    best = tau / (seconds(tokens) + draft_seconds)
    while any(reach.values()):
        r = min(reach, key=lambda r: (-reach[r], lengths[r], r))
        rate = (tau + reach[r]) / (seconds(tokens + 1) + draft_seconds)
        if rate <= best:
            break
        lengths[r], tokens, tau, best = lengths[r] + 1, tokens + 1, tau + reach[r], rate
        if lengths[r] < sizes[r]:
            read.add((r, lengths[r]))
            reach[r] *= confidence(r, lengths[r])
        else:
            del reach[r]
    return lengths, read


@pytest.mark.parametrize("seed", range(300))
def test_early_stop_is_the_papers_listing_and_knows_no_more(seed):
    rng = random.Random(seed)
    num_requests, length = rng.randint(1, 5), rng.randint(1, 6)
    draft, cost = random_chain(rng, num_requests, length), random_cost(rng)
    load = Load(num_requests, num_requests, draft_seconds=rng.choice([0.0, 1.0]))
    seconds = lambda tokens: float(cost.seconds(tokens, 1, 0))  # noqa: E731
    confidence = lambda r, j: float(draft.confidence[r, j])  # noqa: E731
    lengths, read = literal_algorithm_1(confidence, draft.sizes.tolist(), seconds, num_requests, load.draft_seconds)
    keep = EarlyStop(cost).choose(draft, survival(draft), load)
    assert keep.tolist() == [[j < lengths[r] for j in range(length)] for r in range(num_requests)]
    # Whatever was not read may be anything: the same tokens are chosen.
    for _ in range(5):
        for r, j in product(range(num_requests), range(length)):
            if (r, j) not in read:
                draft.confidence[r, j] = rng.choice([0.0, 1.0, rng.random()])
        assert torch.equal(EarlyStop(cost).choose(draft, survival(draft), load), keep)


def rate_of(keep, survival, cost, load) -> float:
    seconds = float(cost.seconds(load.base_tokens + int(keep.sum()), load.num_requests, 0)) + load.draft_seconds
    return (len(keep) + float((survival * keep).sum())) / seconds


@pytest.mark.parametrize("make", [random_chain, random_tree])
@pytest.mark.parametrize("seed", range(60))
def test_optimal_is_the_best_of_all_closed_choices(make, seed):
    rng = random.Random(seed)
    draft, cost = make(rng, 2, 4), random_cost(rng)
    believed, load = survival(draft), Load(2, 2, draft_seconds=0.5)
    best = 0.0
    for bits in product([False, True], repeat=8):
        keep = torch.tensor(bits).view(2, 4)
        is_closed = bool((~keep | (parent_survival(draft, keep.double()) > 0)).all())
        if is_closed and not bool((keep & ~draft.real).any()):
            best = max(best, rate_of(keep, believed, cost, load))
    chosen = Optimal(cost).choose(draft, believed, load)
    assert not bool((chosen & ~draft.real).any())
    assert bool((~chosen | (parent_survival(draft, chosen.double()) > 0)).all())
    assert rate_of(chosen, believed, cost, load) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("make", [random_chain, random_tree])
@pytest.mark.parametrize("kind", [EarlyStop, Lagged, Optimal, StartupTable, TokensPerBatch])
def test_every_choice_is_closed_and_real(make, kind):
    rng = random.Random(7)
    for _ in range(30):
        scheduler = kind(random_cost(rng))
        for _ in range(4):
            num_requests = rng.randint(0, 4)
            draft = make(rng, num_requests, 5)
            keep = scheduler.choose(draft, survival(draft), Load(num_requests, num_requests))
            assert keep.shape == draft.tokens.shape and keep.dtype == torch.bool
            assert not bool((keep & ~draft.real).any())
            assert bool((~keep | (parent_survival(draft, keep.double()) > 0)).all())


def test_limits_of_cost():
    """Free tokens are all verified, and none where every token costs as much as a step."""
    draft = random_chain(random.Random(1), 4, 5)
    believed, load = survival(draft).clamp(max=0.999), Load(4, 4)
    for kind in (Optimal, EarlyStop):
        assert torch.equal(kind(Staircase()).choose(draft, believed, load), draft.real & (believed > 0))
        assert not kind(Staircase(base=0.0, slope=1.0)).choose(draft, believed, load).any()


def test_longer_drafts_when_idle_than_when_busy():
    draft = Draft(torch.zeros(1, 7, dtype=torch.long), torch.tensor([7]), torch.full((1, 7), 0.8))
    knee = Listed([1.0] * 24 + [24 / n for n in range(25, 2000)], first=1)  # no dearer up to 24 tokens, then linear
    lengths = []
    for num_requests in (1, 2, 4, 8, 16, 32, 64):
        many = Draft(*(t.expand(num_requests, *t.shape[1:]) for t in (draft.tokens, draft.sizes, draft.confidence)))
        keep = Optimal(knee).choose(many, survival(many), Load(num_requests, num_requests))
        lengths.append(int(keep.sum()) / num_requests)
    assert lengths[0] == 7 and lengths[-1] == 0
    assert lengths == sorted(lengths, reverse=True)


def test_a_staircase_stops_the_early_stop_and_not_the_optimum():
    """Mean over random cases: the paper's greedy stop keeps about nine tenths of the optimum on stairs of 4 tokens."""
    rng, shares = random.Random(0), []
    for _ in range(200):
        draft = random_chain(rng, 4, 7)
        load, cost = Load(4, 4), Staircase(base=0.5, width=4, rise=0.25)
        rates = [
            rate_of(kind(cost).choose(draft, survival(draft), load), survival(draft), cost, load)
            for kind in (EarlyStop, Optimal)
        ]
        assert rates[0] <= rates[1] * (1 + 1e-12)
        shares.append(rates[0] / rates[1])
    assert 0.8 < sum(shares) / len(shares) < 0.97


def test_lagged_takes_the_number_from_two_steps_ago_and_the_order_from_now():
    cost, load = Listed([1, 0.9, 0.8, 0.4, 0.2], first=2), Load(2, 2)
    scheduler = Lagged(cost)
    good = Draft(torch.zeros(2, 2, dtype=torch.long), torch.tensor([2, 2]), torch.tensor([[0.9, 0.9], [0.9, 0.9]]))
    poor = Draft(good.tokens, good.sizes, torch.tensor([[0.1, 0.1], [0.2, 0.1]]))
    other = Draft(good.tokens, good.sizes, torch.tensor([[0.5, 0.1], [0.7, 0.9]]))
    chosen = [int(scheduler.choose(d, survival(d), load).sum()) for d in (good, poor, poor)]
    assert chosen == [4, 4, 2]  # all until there is history, then what would have been best for `good`
    assert int(Optimal(cost).choose(good, survival(good), load).sum()) == 2
    # The budget is that of `poor` now: nothing, however good the draft.
    assert not scheduler.choose(other, survival(other), load).any()
    keep = Lagged(cost)
    for d in (good, good):
        keep.choose(d, survival(d), load)
    assert keep.choose(other, survival(other), load).tolist() == [[False, False], [True, True]]


def test_lagged_does_not_know_the_step_it_decides_about():
    """The number of tokens is the same whatever the confidences of this step and the last one are."""
    rng = random.Random(3)
    for _ in range(50):
        cost, load, counts = random_cost(rng), Load(3, 3), set()
        old = [random_chain(rng, 3, 4) for _ in range(3)]
        for _ in range(4):
            scheduler = Lagged(cost)
            for draft in old:
                scheduler.choose(draft, survival(draft), load)
            for _ in range(2):
                now = Draft(old[0].tokens, torch.full((3,), 4), torch.rand(3, 4).clamp(0.01))
                counts.add((_, int(scheduler.choose(now, survival(now), load).sum())))
        assert len(counts) == 2


def test_prompts_make_tokens_dearer_but_are_not_charged_to_them():
    class Knee:
        def seconds(self, tokens, requests, context_tokens, is_reading=False):
            return 1.0 + 0.2 * np.maximum(0, np.asarray(tokens) - 64)

    draft = Draft(torch.zeros(1, 4, dtype=torch.long), torch.tensor([4]), torch.full((1, 4), 0.6))
    alone = Optimal(Knee()).choose(draft, survival(draft), Load(1, 1))
    beside = Optimal(Knee()).choose(draft, survival(draft), Load(257, 2, num_prompt_tokens=256))
    assert (int(alone.sum()), int(beside.sum())) == (4, 2)  # 0.216 tokens for 0.2 s do not pay at a rate of 1.4


def test_one_length_for_all_from_how_drafts_fared():
    scheduler = TokensPerBatch(Staircase(base=1.0, slope=0.05))
    draft = Draft(torch.zeros(3, 4, dtype=torch.long), torch.tensor([4, 4, 2]))
    load, right = Load(3, 3), torch.tensor([[True, True, False, False]] * 3)
    assert torch.equal(scheduler.choose(draft, survival_of(draft, right.float()), load), draft.real)
    for _ in range(20):
        scheduler.observe(StepRecord(kept=draft.real, accepted_nodes=right & draft.real))
    assert scheduler.choose(draft, draft.real.double(), load).tolist() == right.tolist()


def test_the_startup_table_stays_as_it_was():
    class Slower(Staircase):
        calls = 0

        def seconds(self, tokens, requests, context_tokens, is_reading=False):
            self.calls += 1
            return super().seconds(tokens, requests, context_tokens) * self.calls

    draft = random_chain(random.Random(2), 3, 4)
    scheduler = StartupTable(cost := Slower(slope=0.1))
    first = scheduler.choose(draft, survival(draft), Load(3, 3))
    assert torch.equal(scheduler.choose(draft, survival(draft), Load(3, 3)), first) and cost.calls == 1


def test_paths_carry_values():
    tree = random_tree(random.Random(5), 2, 6)
    by_hand = torch.ones(2, 6, dtype=torch.double)
    for b, k in product(range(2), range(6)):
        node = k
        while node >= 0:
            by_hand[b, k] *= tree.confidence[b, node]
            node = int(tree.parents[b, node])
    assert torch.allclose(survival_of(tree, tree.confidence), by_hand)
    start = torch.ones(2, dtype=torch.long)
    assert torch.equal(along_paths(tree, start, lambda before, k: before + 1), tree.depth + 1)
