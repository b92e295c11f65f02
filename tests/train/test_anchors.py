"""Anchors against the rule spelled out: this token and the next one are both the assistant's."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from dspark.train.anchors import choose_anchors

masks = st.integers(1, 24).flatmap(
    lambda n: st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=1, max_size=4)
)


@given(masks, st.integers(1, 12), st.integers(0, 5))
def test_anchors_are_candidates_once_each_and_as_many_as_there_may_be(
    rows: list[list[bool]], num: int, seed: int
) -> None:
    anchors, kept = choose_anchors(torch.tensor(rows), num, torch.Generator().manual_seed(seed))
    for row, own, used in zip(rows, anchors.tolist(), kept.tolist(), strict=True):
        allowed = {i for i in range(len(row) - 1) if row[i] and row[i + 1]}
        chosen = [anchor for anchor, is_used in zip(own, used, strict=True) if is_used]
        assert set(chosen) <= allowed and chosen == sorted(set(chosen))
        assert len(chosen) == min(num, len(allowed))
        assert all(anchor == 0 for anchor, is_used in zip(own, used, strict=True) if not is_used)


def test_the_first_anchor_is_the_first_answer_token_and_the_last_has_one_after_it() -> None:
    mask = torch.tensor([[False, False, False, True, True, True, True]])  # three of prompt, four of answer
    anchors, kept = choose_anchors(mask, 100)
    assert anchors[kept].tolist() == [3, 4, 5]


def test_every_candidate_is_equally_likely() -> None:
    mask = torch.ones(1, 11, dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(11)
    for _ in range(1000):
        counts[choose_anchors(mask, 3, generator)[0][0]] += 1
    assert counts[10] == 0 and (counts[:10] - 300).abs().max() < 5 * (1000 * 0.3 * 0.7) ** 0.5
