"""What generates asks for no gradients, whoever calls it."""

from __future__ import annotations

import pytest
import torch

from dspark.gradients import without_gradients


def test_no_gradients_whatever_the_caller_has_them_set_to() -> None:
    @without_gradients
    def is_recorded(*, of: torch.Tensor) -> bool:
        return (2 * of).requires_grad

    x = torch.ones(1, requires_grad=True)
    assert not is_recorded(of=x) and (2 * x).requires_grad
    with torch.no_grad():
        assert not is_recorded(of=x) and not torch.is_grad_enabled()


def test_gradients_are_back_after_a_failure() -> None:
    @without_gradients
    def fail() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fail()
    assert torch.is_grad_enabled()
