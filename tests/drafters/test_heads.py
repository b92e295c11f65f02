"""Sequential heads made ready for drawing."""

from __future__ import annotations

import pytest
import torch

from dspark.drafters.heads import MarkovHead, TabulatedHead, make_head


@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn"])
def test_a_head_for_drawing_gives_the_same_biases(kind: str) -> None:
    head = make_head(kind, 20, 8, 4)
    torch.nn.init.normal_(head.markov_w2.weight)
    drawing = head.for_drawing()
    assert isinstance(drawing, TabulatedHead) == (kind == "vanilla")
    previous, hidden = torch.tensor([3, 19, 0]), torch.randn(3, 8)
    state, expected_state = drawing.initial_state(3), head.initial_state(3)
    for _ in range(3):
        bias, e, state = drawing.step(previous, hidden, state)
        expected, expected_e, expected_state = head.step(previous, hidden, expected_state)
        torch.testing.assert_close(bias, expected)
        torch.testing.assert_close(e, expected_e)
        previous = bias.argmax(-1)


def test_a_large_vocabulary_is_not_tabulated() -> None:
    assert isinstance(make_head("vanilla", 4097, 8, 4).for_drawing(), MarkovHead)  # 4097² fp32 exceed 64 MiB
