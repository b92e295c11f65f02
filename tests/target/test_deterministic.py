"""What a deterministic target takes and refuses. That it keeps its word is in engine/test_deterministic.py."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dspark.errors import InvalidConfiguration, UnsupportedModel
from dspark.target import native
from dspark.target.deterministic import FixedOrder, make_deterministic, product
from dspark.types import Span

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")


@pytest.mark.parametrize("num_rows", [0, 1, 7, 8, 9, 40])
def test_tiles_give_each_row_the_bits_that_it_has_alone(num_rows: int) -> None:
    torch.manual_seed(0)
    layer, rows = nn.Linear(96, 50), torch.randn(1, num_rows, 96)
    found = product(layer, rows)
    torch.testing.assert_close(found, layer(rows))
    assert all(torch.equal(found[:, r : r + 1], product(layer, rows[:, r : r + 1])) for r in range(num_rows))


@pytest.mark.parametrize("function", [F.silu, F.gelu, torch.tanh, torch.Tensor.cos])
def test_functions_give_each_row_the_bits_that_it_has_alone(function: Any) -> None:
    torch.manual_seed(0)
    rows = torch.randn(900, 43)
    with FixedOrder():
        found = function(rows)
        assert all(torch.equal(found[r], function(rows[r])) for r in range(len(rows)))
    torch.testing.assert_close(found, function(rows))


@needs_compiler
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gemma3_text"])
def test_families_of_linear_layers_are_taken_and_stay_what_they_were(make_pair: Any, family: str) -> None:
    pair, text = make_pair(family), [5, 9, 2, 7, 1, 30, 8, 11, 4, 3, 60, 12, 13, 14, 15, 16, 17, 18, 19]
    make_deterministic(pair.target)
    rows = pair.target.extend([Span(1, 0, text, num_logits=len(text))]).logits
    torch.testing.assert_close(rows, pair.logits(text), atol=1e-4, rtol=1e-4)


@needs_compiler
@pytest.mark.parametrize("family", ["gpt2", "qwen3_moe"])
def test_products_that_cannot_be_tiled_are_refused(make_pair: Any, family: str) -> None:
    with pytest.raises(UnsupportedModel, match="multiplies weights in"):
        make_deterministic(make_pair(family).target)


@needs_compiler
def test_a_part_that_depends_on_its_company_is_found(make_pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    target = make_pair("llama").target
    norm = target.model.model.norm
    plain = norm.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = plain(x)
        return y * (1 + 1e-6 * x.shape[1])

    monkeypatch.setattr(norm, "forward", forward)
    with pytest.raises(UnsupportedModel, match="other logits in one forward"):
        make_deterministic(target)


@needs_compiler
def test_trees_and_graphs_are_refused(make_pair: Any) -> None:
    target = make_pair("llama").target
    make_deterministic(target)
    with pytest.raises(InvalidConfiguration, match="chains"):
        target.extend([Span(1, 0, (1, 2, 3), parents=(-1, 0, 0))])
    assert target.num_free_slots == target.cache.limit
    with pytest.raises(InvalidConfiguration, match="uncompiled"):
        target.compile()


def test_without_its_kernel_it_says_what_is_missing(make_pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing_there() -> Any:
        return False

    monkeypatch.setattr(native, "load", nothing_there)
    with pytest.raises(InvalidConfiguration, match="C\\+\\+ compiler"):
        make_deterministic(make_pair("llama").target)
