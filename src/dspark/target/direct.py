"""A compiled function without the compiler's own way in, which for a small step costs as much as several kernels."""

from __future__ import annotations

import inspect
import logging
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch

from dspark.target.entry import Call, Read, reader, way_in
from dspark.target.kept_graphs import KeptGraph, KeptGraphs
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

    kept  where graphs of earlier processes are found, and those of this one are put
    """

    def __init__(self, function: Callable[..., Outputs], name: str, kept: KeptGraphs | None = None) -> None:
        # The compiler keeps graphs by code object, and only a few for each: every function has one of its own.
        code = function.__code__.replace(co_name=f"{name}_{id(self)}".replace(" ", "_"))
        own = types.FunctionType(code, function.__globals__, code.co_name, None, function.__closure__)
        self._name, self._kept = name, kept
        self._compiled = torch.compile(own, fullgraph=True, backend=self._build, options=few_guards())
        self._arguments = tuple(f"L['{argument}']" for argument in inspect.signature(function).parameters)
        self._run: Call | None = None
        self._read: Read | None = None
        self._num_missing = 0
        self._products: list[Product] = []  # of all graphs there have been: the compiler may still have them called
        self._source: str | None = None  # of what `_run` runs, if that is all there is to it
        self._inputs, self._weights = list[str](), dict[str, Any]()
        self.is_direct = False

    def __call__(self, **arguments: Any) -> Outputs:
        return self._call(arguments) if self.is_direct else self.build(**arguments)

    def build(self, **arguments: Any) -> Outputs:
        """A call whose arguments may need another graph, which then is the one from here on."""
        if self._kept is not None and (found := self._kept.find(self._name, arguments)) and self._take(*found):
            return self._call(arguments)
        outputs: Outputs = self._compiled(**arguments)
        self._num_missing = sum(output is None for output in outputs)
        self.is_direct = self._read is not None and _are_equal(outputs, self._call(arguments))
        if self.is_direct and self._kept is not None and self._source is not None:
            joined = [([part.number for part in product.parts], product.number) for product in self._products]
            graph = KeptGraph(self._source, self._inputs, self._num_missing, joined, self._weights)
            self._kept.keep(self._name, arguments, graph)
        return outputs

    def _call(self, arguments: Mapping[str, Any]) -> Outputs:
        assert self._read is not None and self._run is not None
        return (*self._run(self._read(arguments)), *(None,) * self._num_missing)

    def _take(self, graph: KeptGraph, weights: dict[str, Any]) -> bool:
        """Have a graph that was kept. Whether it can be had in this process."""
        products = [Product.joined(parts) for parts, _ in graph.joined]
        if [product.number for product in products] != [number for _, number in graph.joined]:
            return False  # somebody else has the numbers that it calls its weights by
        module = types.ModuleType("dspark_kept_graph")
        exec(graph.source, module.__dict__)
        module.__dict__.update(weights)
        self._hold(products)
        self._num_missing, self._weights = graph.num_missing, weights
        self._enter(module.call, graph.inputs)
        self.is_direct = True
        return True

    def _hold(self, products: list[Product]) -> None:
        self._products = list(dict.fromkeys(self._products + products))

    def _enter(self, call: Call, inputs: list[str]) -> None:
        self._run, takes_tensors = way_in(call, self._weights)
        self._inputs, self._read = inputs, reader(inputs, takes_tensors)

    def _build(self, graph: torch.fx.GraphModule, examples: Sequence[Any], **options: Any) -> Callable[..., Any]:
        """What torch.compile calls: inductor, and a note of what it made and where the inputs come from."""
        from torch._inductor import compile_fx  # takes a second, which only who compiles should wait for

        cores: list[Any] = []

        def compile_inner(*inner: Any, **settings: Any) -> Any:
            """What there is between this and the whole is for gradients and for inputs that are weights."""
            core = compile_fx.compile_fx_inner(*inner, **settings)
            if len(inner[1]) == len(examples):
                cores.append(core)
                self._weights = _weights_of(core, inner[0])
            return core

        self._hold(join_linears(graph.graph))
        self._read, self._source, self._weights = None, None, {}
        graph.recompile()
        whole = cast(Callable[..., Any], compile_fx.compile_fx(graph, examples, inner_compile=compile_inner))
        core = cores[0] if cores else lambda inputs: whole(*inputs)
        try:
            places = [node.meta["grapharg"].source.name for node in graph.graph.nodes if node.op == "placeholder"]
            names = [place if isinstance(place, str) else place() for place in places]  # a method in some versions
            # Weights that were not frozen, say, and whatever else the function finds outside.
            if foreign := [name for name in names if not name.startswith(self._arguments)]:
                raise KeyError(f"inputs that are no arguments: {', '.join(foreign)}")
            call = getattr(core, "current_callable", None)
            if call is None or getattr(core, "inputs_to_check", None):
                self._enter(core, names)
            else:
                self._enter(call, names)
                self._source = getattr(core, "source_code", None)
        except (AttributeError, KeyError, SyntaxError) as error:
            self._read = None
            _log.info("compiled steps are called the usual way: %r", error)
        return whole


def _weights_of(core: Any, graph: torch.fx.GraphModule) -> dict[str, Any]:
    """The tensors that inductor's graph reads beside its inputs, by the names that its source has for them."""
    frozen = getattr(core, "frozen_param_names", None) or {}
    return {**(getattr(core, "constants", None) or {}), **{name: getattr(graph, own) for name, own in frozen.items()}}


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
