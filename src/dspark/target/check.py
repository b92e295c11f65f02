"""The check at load time: whether a family runs over slots as it runs alone."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from dspark.errors import UnsupportedModel
from dspark.target import attention
from dspark.target.target import Target
from dspark.types import Span

_log = logging.getLogger(__name__)
_TOLERANCES = {torch.float32: 0.02, torch.float16: 0.15}  # mean difference per standard deviation of the logits
_LOW_PRECISION_TOLERANCE = 0.3
_REQUESTS = (-1, -2)
# What a forward may raise in a model that was not made for this.
_FAILURES = (TypeError, ValueError, KeyError, IndexError, AttributeError, RuntimeError)


@torch.no_grad()
def check_parity(target: Target, plain_attention: str) -> None:
    """Read two short token sequences alone with the model's own attention, then interleaved, in chunks and with a
    rollback over slots. Raise UnsupportedModel where the logits differ beyond the dtype's rounding."""
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(target.vocab_size, (length,), generator=generator).tolist() for length in (14, 9)]
    expected = _alone(target, texts, plain_attention)
    try:
        found = _interleaved(target, texts)
    except torch.OutOfMemoryError:
        raise
    except _FAILURES as error:
        raise UnsupportedModel(
            f"{_named(target)} cannot run over the slot cache: {type(error).__name__}: {error}; choose another family"
        ) from error
    finally:
        for request in _REQUESTS:
            target.release(request)
    _refuse_stateful_layers(target)
    _refuse_differences(target, found, expected)
    _respect_unseen_windows(target)


def _alone(target: Target, texts: list[list[int]], plain_attention: str) -> list[Tensor]:
    """[n, V] each, as plain transformers computes them."""
    target.model.set_attn_implementation(plain_attention)
    try:
        inputs = [torch.tensor([text], device=target.device) for text in texts]
        return [target.model(input_ids=ids, use_cache=False).logits[0].float() for ids in inputs]
    except torch.OutOfMemoryError:
        raise
    except _FAILURES as error:
        raise UnsupportedModel(
            f"{_named(target)} fails by itself, in plain transformers: {type(error).__name__}: {error}; its config.json "
            "may be of another model or version"
        ) from error
    finally:
        target.model.set_attn_implementation(attention.NAME)


def _interleaved(target: Target, texts: list[list[int]]) -> list[Tensor]:
    """[n, V] each, read side by side; between chunks, tokens that turn out wrong must leave nothing behind."""
    pieces: list[list[Tensor]] = [[], []]
    for ends in ((6, 4), (7, 9), (14, 9)):
        spans = []
        for request, text, end in zip(_REQUESTS, texts, ends, strict=True):
            start = target.cache.length(request)
            if end > start:
                spans.append(Span(request, start, text[start:end], num_logits=end - start))
        rows = target.extend(spans).logits.float().split([span.num_logits for span in spans])
        for span, piece in zip(spans, rows, strict=True):
            pieces[_REQUESTS.index(span.request_id)].append(piece)
        wrong = [Span(span.request_id, span.start + len(span.tokens), (0, 1)) for span in spans]
        target.extend(wrong)
        for span in wrong:
            target.keep(span.request_id, span.start, ())
    return [torch.cat(piece) for piece in pieces]


def _refuse_stateful_layers(target: Target) -> None:
    """Layers that never wrote a slot keep state of their own (SSM, linear attention) or attend by their own code.
    Others keep it beside their attention (Falcon-H1), which rounding to 16 bits can hide from two short texts: they are
    known by the convolution over neighbouring tokens that such states begin with."""
    touched = set(target.cache.storage) | set(target.cache.shared)
    stateful = [
        number
        for number, layer in enumerate(target.layers)
        if number not in touched or any(isinstance(module, torch.nn.Conv1d) for module in layer.modules())
    ]
    if stateful:
        raise UnsupportedModel(
            f"{_named(target)}: layers {', '.join(map(str, stateful[:8]))} of {target.num_layers} do not keep all they "
            "know with transformers' attention interface (a state-space or linear-attention layer, or attention of the "
            "family's own), so drafts could not be verified or taken back; choose a model with plain attention"
        )


def _refuse_differences(target: Target, found: list[Tensor], expected: list[Tensor]) -> None:
    tolerance = _TOLERANCES.get(target.dtype, _LOW_PRECISION_TOLERANCE)
    for ours, plain in zip(found, expected, strict=True):
        difference = ((ours - plain).abs().mean() / plain.std()).item()
        if not difference <= tolerance:  # NaN is a difference too
            raise UnsupportedModel(
                f"{_named(target)} gives other logits over the slot cache than alone: they differ by {difference:.2g} "
                f"of their standard deviation, {tolerance} is allowed for {target.dtype}; the family keeps state or "
                "masks that spans cannot express, so choose another"
            )


def _respect_unseen_windows(target: Target) -> None:
    """A window that the config declares and no layer passes on would only be missed by texts longer than it."""
    types = getattr(target.config, "layer_types", None)
    window = getattr(target.config, "sliding_window", None)
    is_used = "sliding_attention" in types if types else getattr(target.config, "use_sliding_window", True)
    if window and is_used and window not in target.windows and window < target.max_length:
        target.max_length = int(window)
        _log.warning("%s: its sliding window is unknown to its attention layers; texts end at %d", target.name, window)


def _named(target: Target) -> str:
    return f"{target.name} ({type(target.model).__name__})"
