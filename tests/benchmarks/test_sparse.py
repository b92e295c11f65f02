"""The acceptance above which a draft pays."""

from __future__ import annotations

import pytest

from benchmarks.sparse import least_acceptance


def test_it_is_rho_where_reading_a_draft_costs_no_more_than_reading_a_token() -> None:
    assert least_acceptance(1, 0.4, 1.0) == pytest.approx(0.4, abs=1e-3)
    assert least_acceptance(2, 0.4, 1.0) > 0.4  # 2 rho = a + a^2


def test_it_is_where_tokens_per_pass_are_worth_their_cost() -> None:
    alpha = 0.8
    tokens = 1 + alpha + alpha**2 + alpha**3 + alpha**4
    assert least_acceptance(4, (tokens - 1.7) / 4, 1.7) == pytest.approx(alpha, abs=1e-3)


def test_nothing_pays_what_costs_more_than_all_its_tokens() -> None:
    assert least_acceptance(4, 1.0, 1.1) > 1
