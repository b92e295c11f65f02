import random

import pytest
from scipy.stats import chi2_contingency

from dspark.evaluate.statistics import g_test


def sample(weights, n, seed):
    return random.Random(seed).choices(range(len(weights)), weights, k=n)


def test_as_scipy_has_it():
    a, b = sample([5, 3, 2], 400, 1), sample([5, 2, 3], 300, 2)
    table = [[s.count(x) for s in (a, b)] for x in range(3)]
    expected = chi2_contingency(table, correction=False, lambda_="log-likelihood")
    found = g_test(a, b)
    assert (found.statistic, found.degrees) == (pytest.approx(expected.statistic), expected.dof)
    assert found.p == pytest.approx(expected.pvalue)


def test_rare_categories_are_tested_together():
    a, b = [0] * 50 + list(range(100, 115)), [0] * 50 + list(range(200, 215))
    assert (g_test(a, b).degrees, g_test(a, b).p) == (1, pytest.approx(1.0))


def test_one_category_says_nothing():
    assert g_test([1, 1], [1]).p == 1.0


def test_p_of_equal_laws_is_uniform_and_of_others_small():
    ps = [g_test(sample([4, 3, 2, 1], 300, s), sample([4, 3, 2, 1], 300, 10_000 + s)).p for s in range(200)]
    assert 0.4 < sum(ps) / len(ps) < 0.6 and 5 <= sum(p < 0.1 for p in ps) <= 40
    assert g_test(sample([4, 3, 2, 1], 1000, 1), sample([1, 3, 2, 4], 1000, 2)).p < 1e-10
