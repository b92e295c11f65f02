"""Traffic and machine change at the same step: within 200 steps beliefs and prices are right again."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from budget.simulated_serving import World, request
from dspark.budget.beliefs import LiveBeliefs
from dspark.budget.capacity import Capacity
from dspark.budget.prefix_scheduler import falling_survival
from dspark.budget.throughput import Optimal
from dspark.types import Load, StepRecord


class Serving:
    """The engine's step without models: believe, choose, verify, learn. Steps take what `seconds_of` says, and noise."""

    def __init__(self, seed: int) -> None:
        self.live, self.capacity, self.slowness = LiveBeliefs(num_positions=7, seed=seed), Capacity(), 1.0
        self.sizes: list[int] = []  # tokens of each step
        self.scheduler, self.noise = Optimal(self.capacity), random.Random(seed)

    def seconds_of(self, tokens: np.ndarray) -> np.ndarray:
        return self.slowness * (2e-3 + 1e-4 * tokens)

    def run(self, world: World, num_steps: int) -> None:
        for step in range(num_steps):
            first = 1000 * (step // 20)  # every 20 steps new requests come
            requests = [request(first + b) for b in range(world.num_requests)]
            draft, truth = world.draft()
            load = Load(len(requests), len(requests), 100 * len(requests), self.slowness * 1e-3)
            survival = falling_survival(draft, self.live.survival(draft, requests))
            chosen = self.scheduler.choose(draft, survival, load)
            kept = chosen.clone()
            kept[self.live.wants_whole(len(requests))] = True
            right = torch.rand(truth.shape, generator=world.generator) < truth
            accepted = (right & kept).long().cumprod(1).bool()
            tokens = len(requests) + int(kept.sum())
            self.sizes.append(tokens)
            taken = float(self.seconds_of(np.array(tokens))) * self.noise.lognormvariate(0, 0.1)
            record = StepRecord([r.id for r in requests], num_tokens=tokens, num_asked=len(requests), load=load)
            record.kept, record.chosen, record.accepted_nodes = kept, chosen, accepted
            record.seconds = {"draft": load.draft_seconds, "target": taken}
            for learner in (self.live, self.capacity):
                learner.observe(record)

    def cost_error(self) -> float:
        """Mean over the sizes of the last steps."""
        sizes = np.array(sorted(self.sizes[-50:]))
        return float(np.mean(np.abs(self.capacity.seconds(sizes, 8, 800) / self.seconds_of(sizes) - 1)))


@pytest.mark.parametrize("slowness", [2.0, 0.5])
@pytest.mark.parametrize("seed", range(4))
def test_within_200_steps_of_a_switch_beliefs_and_prices_are_right_again(seed: int, slowness: float) -> None:
    serving = Serving(seed)
    serving.run(World(num_requests=8), 400)
    assert serving.cost_error() < 0.10
    after = World(num_requests=8, slope=0.5, offsets=(-0.8,) * 7, seed=5 + seed)
    serving.slowness = slowness
    assert after.calibration_error(serving.live) > 0.08 and serving.cost_error() > 0.4
    serving.run(after, 200)
    assert after.calibration_error(serving.live) < 0.03
    assert serving.cost_error() < 0.10
