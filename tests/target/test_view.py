"""A view of the cache: attention over it is dense attention under the mask, and reads no key outside of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dspark.target import attention
from dspark.target.captured import Limits
from dspark.target.plan import View, inside_of, make_plan, positions_of, read_spans
from dspark.types import Span
from target.conftest import VOCAB, Pair
from target.tape import TapeRecorder
from target.test_kernels import load

MakePair = Callable[..., Pair]
VIEW = View(3, 4)  # narrower than the families' own windows of 7
# After 8 tokens a window of 7 still sees the third one, from later on none of the first.
SPANS = [
    Span(0, 40, (5, 6, 7), num_logits=3),
    Span(1, 8, (9,), num_logits=1),
    Span(2, 2, (11, 12), num_logits=2),
    Span(3, 90, (13, 14, 15, 16, 17, 18), num_logits=6),
    Span(4, 15, (19, 20, 21), parents=(-1, 0, 0), num_logits=3),
]
ATOL = 1e-4


@pytest.fixture(params=["torch", "c++"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How attention is computed. The kernels by themselves, in double precision too: test_kernels.py."""
    kernel = None if request.param == "torch" else load(request.param)
    monkeypatch.setattr(attention, "kernel_for", lambda *_: kernel)


def text_of(span: Span) -> list[int]:
    """What the request has cached before the span."""
    generator = torch.Generator().manual_seed(span.request_id)
    return torch.randint(3, VOCAB, (span.start,), generator=generator).tolist()


def read_prefixes(pair: Pair, spans: list[Span]) -> None:
    for span in spans:
        pair.target.extend([Span(span.request_id, 0, text_of(span))])


def visible(span: Span, view: View, window: int | None) -> Tensor:
    """[S, S]  who sees whom in the request's text: the cached tokens all before them, the span's no more than the view."""
    start, size = span.start, len(span.tokens)
    seen = torch.ones(start + size, start + size).tril().bool()
    key = torch.arange(start)
    seen[start:, :start] = (key < view.num_first) | (key >= start - max(0, view.num_last - size))
    seen[start:, start:] = torch.from_numpy(inside_of(span, size))
    positions = torch.cat([key, torch.from_numpy(positions_of(span))])
    return seen if window is None else seen & (positions[:, None] - positions < window)


def dense(pair: Pair, span: Span, view: View = VIEW) -> Tensor:
    """[n, V]  the plain model's logits of the span, by one forward without a cache under such a mask."""
    config, dtype = pair.plain.config, next(pair.plain.parameters()).dtype
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention" if config.model_type == "mistral" else ""])
    masks = {}
    for kind in kinds:
        window = config.sliding_window if kind == "sliding_attention" else None
        hidden = ~visible(span, view, window)
        masks[kind] = torch.zeros((1, 1, *hidden.shape), dtype=dtype).masked_fill(hidden, -math.inf)
    mask: Any = masks if len(kinds) > 1 else masks[kinds.pop()]
    tokens = torch.tensor([[*text_of(span), *span.tokens]])
    positions = torch.tensor([[*range(span.start), *positions_of(span)]])
    output = pair.plain(input_ids=tokens, position_ids=positions, attention_mask=mask, use_cache=False)
    return output.logits[0, span.start :]


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gemma4_text", "gpt_oss", "gpt2"])
def test_attention_over_a_view_is_dense_attention_under_its_mask(family: str, pair_of: Callable[[str], Pair]) -> None:
    """Alone and side by side, chains and trees, longer than the view's window and shorter than all of it."""
    pair = pair_of(family)
    read_prefixes(pair, SPANS)
    seeing = pair.target.seeing(VIEW)
    expected = [dense(pair, span) for span in SPANS]
    together = seeing.extend(SPANS).logits.split([len(span.tokens) for span in SPANS])
    for span, found, wanted in zip(SPANS, together, expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=ATOL, rtol=0)
        seeing.keep(span.request_id, span.start, ())
        torch.testing.assert_close(seeing.extend([span]).logits, wanted, atol=ATOL, rtol=0)
        seeing.keep(span.request_id, span.start, ())
    everything = View(0, 1000)
    assert (dense(pair, SPANS[3], everything) - expected[3]).abs().max() > 0.01  # else a view would be as good as none


@pytest.mark.usefixtures("path")
def test_what_is_outside_of_a_view_is_not_read(make_pair: MakePair) -> None:
    pair = make_pair("gemma2")
    read_prefixes(pair, SPANS)
    seeing = pair.target.seeing(VIEW)
    expected = seeing.extend(SPANS).logits
    for span in SPANS:
        seeing.keep(span.request_id, span.start, ())
        outside = pair.target.cache.slots_of(span.request_id)[VIEW.num_first : span.start - VIEW.num_last + 1]
        for tensor in (tensor for layer in pair.target.cache.storage.values() for tensor in layer):
            tensor[torch.from_numpy(outside.copy())] = math.nan
    torch.testing.assert_close(seeing.extend(SPANS).logits, expected, atol=0, rtol=0)


@pytest.mark.parametrize("context", [20, 100, 3000])
def test_a_step_reads_as_many_keys_whatever_the_context(context: int, make_pair: MakePair) -> None:
    cache = make_pair("llama", num_slots=7000).target.cache
    slots = cache.reserve(1, context + 1)
    cache.reserve(2, context + 1)
    view, spans = View(4, 12), [Span(1, context, (5,)), Span(2, context, (6,))]
    for some in (spans[:1], spans):
        plan = make_plan(some, read_spans(some, slots[-len(some) :]), cache, view=view)
        (group,) = plan.groups
        assert group.slots.shape == (len(some), 16)
        assert group.slots[0].tolist() == [*slots[:4], *slots[-12:]]
        assert group.visibility.starts.tolist() == [15] * len(some)


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_replayed_steps_honour_it(family: str, make_pair: MakePair) -> None:
    """One recording serves the whole cache and a view of it."""
    pair, tape = make_pair(family), TapeRecorder()
    read_prefixes(pair, SPANS)
    pair.target.capture(tape)
    pair.target._compiled[()].limits = Limits(least_context=128)
    seeing, everything = pair.target.seeing(VIEW), View(0, 1000)
    for span in SPANS[:2]:
        for target, view in ((pair.target, everything), (seeing, VIEW)):
            found = target.extend([span]).logits
            torch.testing.assert_close(found, dense(pair, span, view), atol=ATOL, rtol=0)
            target.keep(span.request_id, span.start, ())
    assert (tape.num_recordings, tape.num_replays) == (2, 4)
