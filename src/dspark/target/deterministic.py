"""Batch-invariant forwards: a token's logits have the same bits alone, in a draft, and beside other requests.

A matrix product adds up in another order when it has more rows, attention when a span has more tokens, and on CPU the
last few numbers of a tensor go through another exponential than the rest. So here products run on tiles of a fixed
number of rows, functions on pieces without such a rest, and attention on short pieces of spans, through the kernel over
slots, whose order depends on a token's own keys alone. All else works row by row; where it does not, a check finds out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from dspark.errors import InvalidConfiguration, UnsupportedModel
from dspark.target import kernels, native
from dspark.target.target import Target
from dspark.types import Span

_ROWS_ON_CPU, _ROWS_ELSEWHERE = 8, 64  # as many as cost hardly more than one there
_LANES = 64  # numbers that a CPU works on at a time; a multiple for every dtype
_MOST_ON_ONE_THREAD = 32768  # larger tensors are cut for threads, wherever that falls
_FUNCTIONS = {"silu", "gelu", "sigmoid", "tanh", "softplus", "exp", "erf", "cos", "sin"}
_TEXT, _BESIDE = -1, (-2, -3)


class FixedOrder(TorchFunctionMode):
    """While it is on, a row of a function has the same bits whatever rows are beside it."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in _FUNCTIONS and args[0].device.type == "cpu":
            return _in_pieces(func, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _in_pieces(func: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """func(x [..., H]), elementwise, on pieces that no thread divides and that leave no rest."""
    width = x.shape[-1]
    rows = F.pad(x.reshape(-1, width).contiguous(), (0, -width % _LANES))
    num_rows = max(1, (_MOST_ON_ONE_THREAD - 1) // rows.shape[1])
    pieces = [func(part, *args, **kwargs) for part in rows.split(num_rows)]
    joined = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    return joined[:, :width].reshape(x.shape)


def product(layer: nn.Linear, x: Tensor) -> Tensor:
    """layer(x [..., H]), a fixed number of rows at a time; missing ones are zeros."""
    weight, bias = layer.weight, layer.bias
    rows = x.reshape(-1, weight.shape[1])
    num_rows, tile = len(rows), _ROWS_ON_CPU if x.device.type == "cpu" else _ROWS_ELSEWHERE
    if missing := -num_rows % tile:
        rows = F.pad(rows, (0, 0, 0, missing))
    if len(rows) == tile:
        y = F.linear(rows, weight, bias)
    else:
        y = torch.cat([F.linear(part, weight, bias) for part in rows.split(tile)])
    return y[:num_rows].view(*x.shape[:-1], weight.shape[0])


def make_deterministic(target: Target) -> None:
    """Let every forward of this target be batch-invariant, from now on; its cache must be empty.

    Raises UnsupportedModel where weights are multiplied outside of linear layers, or where bits differ all the same.
    """
    has_kernel = native.load() if target.device.type == "cpu" else kernels.on_cuda is not None
    if not has_kernel:
        raise InvalidConfiguration(
            f"deterministic needs the kernel for attention over slots, and it is not there for {target.device}: install "
            "a C++ compiler (CPU) or Triton (CUDA), or leave deterministic out"
        )
    for name, module in target.model.named_modules():
        _refuse_other_products(target, name, module)
    for module in target.model.modules():
        if type(module) is nn.Linear:
            module.forward = partial(product, module)  # type: ignore[method-assign]
        elif not [*module.children(), *module.parameters()]:  # an activation, or rotations
            module.forward = _in_fixed_order(module.forward)
    target.is_deterministic = True
    _check(target)


def _in_fixed_order(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with FixedOrder():
            return forward(*args, **kwargs)

    return run


def _refuse_other_products(target: Target, name: str, module: Any) -> None:
    if type(module) is nn.Linear or isinstance(module, nn.Embedding):
        return
    if any(weight.dim() > 1 for weight in module.parameters(recurse=False)):
        raise UnsupportedModel(
            f"{target.name} multiplies weights in {name} ({type(module).__name__}), where rows cannot be cut into tiles; "
            "deterministic takes models of plain linear layers: leave it out, or choose another model"
        )


@torch.no_grad()
def _check(target: Target) -> None:
    """Read a text token by token alone, in one span, and in pieces beside other requests: all bits must agree."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(target.vocab_size, (24,), generator=generator).tolist()
    try:
        alone = _logits(target, text, range(1, len(text) + 1))
        at_once = _logits(target, text, (len(text),))
        for request, length in zip(_BESIDE, (3, 21), strict=True):
            target.extend([Span(request, 0, text[:length])])
        in_company = _logits(target, text, (5, 6, 23, len(text)))
    finally:
        for request in (_TEXT, *_BESIDE):
            target.release(request)
    for found, how in ((at_once, "in one forward"), (in_company, "beside other requests")):
        if not torch.equal(found, alone):
            raise UnsupportedModel(
                f"{target.name} ({type(target.model).__name__}, {target.dtype}) gives other logits {how} than token by "
                "token: a part of it besides products and attention depends on what it computes together; leave "
                "deterministic out, or choose another model or dtype"
            )


def _logits(target: Target, text: list[int], ends: Sequence[int]) -> Tensor:
    """[S, V]  of the text, read up to each of `ends` in turn; requests that are there read two tokens meanwhile."""
    pieces, start = [], 0
    for end in ends:
        spans = [Span(_TEXT, start, text[start:end], num_logits=end - start)]
        for request in _BESIDE:
            if length := target.cache.length(request):
                spans.append(Span(request, length, text[:2], num_logits=1))
        pieces.append(target.extend(spans).logits[: end - start])
        start = end
    target.release(_TEXT)
    return torch.cat(pieces)
