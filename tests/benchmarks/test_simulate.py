"""The simulation: seconds that are known, and seconds that have to be learned from noisy steps."""

from __future__ import annotations

from statistics import mean

import pytest
import torch

from benchmarks.simulate import MACHINES, Recorded, simulate


@pytest.fixture(scope="module")
def recorded():
    """A drafter that says 0.8 for each token and is right."""
    torch.manual_seed(0)
    hits = torch.rand(4, 50, 7) < 0.8
    accepted = hits.long().cumprod(-1).sum(-1)
    return [Recorded(torch.full((50, 7), 0.8), own.tolist()) for own in accepted]


@pytest.mark.parametrize("noise", [None, 0.1])
def test_auto_drafts_where_it_pays_and_not_elsewhere(recorded, noise):
    def speed(policy: str, num_requests: int) -> float:
        seeds = (1, 2, 3) if noise else (1,)  # what is learned from ten noisy steps is partly luck
        return mean(simulate(policy, MACHINES["smooth"](), recorded, num_requests, 120, noise, s) for s in seeds)

    few, some, many = ({p: speed(p, n) for p in ("off", "fixed:7", "auto")} for n in (1, 32, 256))
    assert few["fixed:7"] > 1.5 * few["off"] and many["fixed:7"] < 0.7 * many["off"]
    assert few["auto"] > 0.97 * few["fixed:7"] and some["auto"] > 0.97 * some["fixed:7"]
    assert many["auto"] > 0.97 * many["off"]
