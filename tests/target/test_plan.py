"""What one chain alone asks for is laid out by a way of its own: the same as the way of all others gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dspark.target.kv_cache import KVCache
from dspark.target.lone_chain import LoneChains
from dspark.target.plan import make_plan, read_spans
from dspark.types import Span


@pytest.mark.parametrize(("start", "num_tokens"), [(0, 1), (0, 5), (9, 1), (9, 2), (70, 16)])
def test_one_chain_alone_is_laid_out_like_any(start: int, num_tokens: int) -> None:
    cache = KVCache(256)
    cache.reserve(1, 3)  # so that slots are not positions
    cache.reserve(2, start)
    write = cache.reserve(2, num_tokens)
    spans = [Span(2, start, list(range(num_tokens)), num_logits=num_tokens)]
    inputs = read_spans(spans, write)
    usual = make_plan(spans, inputs, cache, for_graph=True)
    lone = LoneChains()
    lone.lay_out(
        Span(2, start + 1, [7] * num_tokens, num_logits=num_tokens), write + 1, np.arange(3)
    )  # nothing of it stays
    plan, given = lone.lay_out(spans[0], write, cache.slots_of(2))
    for tensor, array in zip(given, (inputs.token_ids, inputs.positions, inputs.logit_rows), strict=True):
        assert tensor.dtype == torch.long and tensor.tolist() == array.tolist()
    assert plan.write.tolist() == write.tolist() and plan.is_for_graph == usual.is_for_graph
    own, other = plan.groups[0], usual.groups[0]
    assert plan.is_for_graph == (start + num_tokens > 1)
    for name in ("rows", "back", "tokens", "sees_all", "is_causal", "shape"):
        assert getattr(own, name) == getattr(other, name), name
    assert torch.equal(own.slots, other.slots) and own.visibility.num_keys == other.visibility.num_keys
    for name in ("starts", "positions", "inside", "firsts"):
        mine, theirs = getattr(own.visibility, name), getattr(other.visibility, name)
        assert mine is theirs if theirs is None else torch.equal(mine, theirs) and mine.dtype == theirs.dtype, name
