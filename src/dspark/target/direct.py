"""A compiled function without the compiler's own way in, which for a small step costs as much as several kernels."""

from __future__ import annotations

import inspect
import logging
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch

from dspark.target.linears import Product, join_linears

_log = logging.getLogger(__name__)

Outputs = tuple[Any, ...]  # tensors, then Nones


class Direct:
    """torch.compile of a function of tensors, for callers who know that all their calls fit one graph.

    Before each call the compiler asks of every argument whether it still fits, unpacks it and passes it through layers of
    wrappers. Here the first call compiles as usual, and from then on the arguments are read in the order in which the
    graph takes them. The function gives a tuple of tensors, Nones last, and may only write what a second call with the
    same arguments writes again: the first call runs both ways, and whenever they differ, or the compiler does not say
    where its inputs come from, every call goes the usual way.

    Packed layers that read the same are joined.
    """

    def __init__(self, function: Callable[..., Outputs], name: str) -> None:
        # The compiler keeps graphs by code object, and only a few for each: every function has one of its own.
        code = function.__code__.replace(co_name=name)
        own = types.FunctionType(code, function.__globals__, name, None, function.__closure__)
        self._compiled = torch.compile(own, fullgraph=True, backend=self._build, options=few_guards())
        self._graph: Callable[[list[Any]], Sequence[Any]] | None = None
        self._arguments = tuple(f"L['{argument}']" for argument in inspect.signature(function).parameters)
        self._read: Callable[[Mapping[str, Any]], list[Any]] | None = None
        self._num_missing = 0
        self._products: list[Product] = []
        self.is_direct = False

    def __call__(self, **arguments: Any) -> Outputs:
        return self._call(arguments) if self.is_direct else self.build(**arguments)

    def build(self, **arguments: Any) -> Outputs:
        """A call whose arguments may need another graph, which then is the one from here on."""
        outputs: Outputs = self._compiled(**arguments)
        self._num_missing = sum(output is None for output in outputs)
        self.is_direct = self._read is not None and _are_equal(outputs, self._call(arguments))
        return outputs

    def _call(self, arguments: Mapping[str, Any]) -> Outputs:
        assert self._read is not None and self._graph is not None
        return (*self._graph(self._read(arguments)), *(None,) * self._num_missing)

    def _build(self, graph: torch.fx.GraphModule, examples: Sequence[Any], **options: Any) -> Callable[..., Any]:
        """What torch.compile calls: inductor, and a note of where the graph's inputs come from."""
        from torch._inductor import compile_fx  # takes a second, which only who compiles should wait for

        def compile_inner(*inner: Any, **settings: Any) -> Any:
            """What there is between this and the whole is for gradients and for inputs that are weights."""
            core = compile_fx.compile_fx_inner(*inner, **settings)
            if len(inner[1]) == len(examples):
                self._graph = core
            return core

        self._products, self._graph = join_linears(graph.graph), None
        graph.recompile()
        whole = cast(Callable[..., Any], compile_fx.compile_fx(graph, examples, inner_compile=compile_inner))
        self._graph = self._graph or (lambda inputs: whole(*inputs))
        try:
            places = [node.meta["grapharg"].source.name for node in graph.graph.nodes if node.op == "placeholder"]
            names = [place if isinstance(place, str) else place() for place in places]  # a method in some versions
            # Weights that were not frozen, say, and whatever else the function finds outside.
            if foreign := [name for name in names if not name.startswith(self._arguments)]:
                raise KeyError(f"inputs that are no arguments: {', '.join(foreign)}")
            self._read = eval(f"lambda L: [{', '.join(names)}]")  # such as L['ids'] or L['ids'].size()[1]
        except (AttributeError, KeyError, SyntaxError) as error:
            self._read = None
            _log.info("compiled steps are called the usual way: %r", error)
        return whole


def few_guards() -> dict[str, Any]:
    """Options of torch.compile: ask at a call about its tensors and sizes only, not whether a frozen model has changed.

    Hundreds of questions about modules and globals cost up to a tenth of a small step.
    """
    can_choose = hasattr(torch.compiler, "skip_guard_on_all_nn_modules_unsafe")  # came with guard_filter_fn
    asked = ("TENSOR_MATCH", "SHAPE_ENV")
    return {"guard_filter_fn": lambda guards: [guard.guard_type in asked for guard in guards]} if can_choose else {}


def _are_equal(outputs: Outputs, others: Outputs) -> bool:
    return len(outputs) == len(others) and all(
        x is y if x is None or y is None else torch.equal(x.nan_to_num(), y.nan_to_num())
        for x, y in zip(outputs, others, strict=True)
    )
