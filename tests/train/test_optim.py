"""Optimisers: every parameter has exactly one, Muon steps in all directions alike, the mean forgets its start."""

from __future__ import annotations

import torch
from torch import nn

from dspark.train.optim import RunningMean, make_optimizers, orthogonalised, trapezoid


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.deep, self.lm_head = nn.Embedding(7, 4), nn.Linear(4, 6), nn.Linear(4, 7, bias=False)
        self.norm = nn.LayerNorm(4)


def test_every_parameter_has_one_optimiser_and_tables_are_not_orthogonalised() -> None:
    model = Model()
    rest, muon = make_optimizers(model, 0.02, 0.004, 0.1)
    taken = [[id(p) for g in o.param_groups for p in g["params"]] for o in (rest, muon)]
    assert sorted(taken[0] + taken[1]) == sorted(id(p) for p in model.parameters())
    assert taken[1] == [id(model.deep.weight)]


def test_the_orthogonalised_have_singular_values_near_one() -> None:
    torch.manual_seed(0)
    for shape in ((2, 24, 8), (2, 8, 24)):
        values = torch.linalg.svdvals(orthogonalised(torch.randn(shape)))
        assert float(values.min()) > 0.5 and float(values.max()) < 1.4


def test_the_rate_rises_stays_and_falls() -> None:
    rates = [trapezoid(step, 100, 0.1, 0.4) for step in range(100)]
    assert rates[0] == 0.1 and rates[9:61] == [1.0] * 52 and rates[80] == 0.5 and 0 < rates[99] < 0.03


def test_the_mean_follows_and_forgets_where_it_began() -> None:
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(1000.0)
    mean = RunningMean(model, 0.9)
    model.weight.data.fill_(3.0)
    for _ in range(200):
        mean.update(model)
    assert abs(float(mean.mean["weight"]) - 3.0) < 1e-3
