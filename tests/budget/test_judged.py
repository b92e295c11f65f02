"""Few tokens are judged in lists and many in arrays: by one law."""

from __future__ import annotations

import numpy as np
import pytest

from dspark.budget.judged import Judged, _in_arrays, _in_lists, judge


@pytest.mark.parametrize("with_chances", [False, True])
@pytest.mark.parametrize("is_tree", [False, True])
def test_lists_say_what_arrays_say(is_tree: bool, with_chances: bool) -> None:
    rng = np.random.default_rng(0)
    parents = np.array([rng.integers(-1, range(5)) for _ in range(40)]) if is_tree else None
    path = rng.random((40, 5)) < 0.7
    for k in range(1, 5):
        before = (
            path[:, k - 1] if parents is None else np.where(parents[:, k] < 0, True, path[range(40), parents[:, k]])
        )
        path[:, k] &= before
    kept, believed = rng.random((40, 5)) < 0.8, rng.random((40, 5))
    chances = np.where(rng.random((40, 5)) < 0.5, rng.random((40, 5)), np.nan) if with_chances else None
    few, many = (way(kept, path, parents, chances, believed) for way in (_in_lists, _in_arrays))
    assert list(few.tokens) == list(many.tokens) and few.happened == pytest.approx(many.happened, abs=0)
    assert few.misses == pytest.approx(many.misses) and few.evidence == pytest.approx(many.evidence)


def test_what_was_not_verified_or_not_reached_is_not_judged() -> None:
    believed = np.full((2, 4), 0.8)
    kept, accepted = np.array([[1, 1, 1, 0], [0, 1, 1, 1]]) > 0, np.array([[1, 0, 0, 0], [0, 0, 0, 0]]) > 0
    judged = judge(kept, accepted, None, None, believed)
    assert judged == Judged([0, 1], [1.0, 0.0], [pytest.approx(1 - 1.6), 0.0], [pytest.approx(0.32), 0.0])
