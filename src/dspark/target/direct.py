"""A compiled function without the compiler's own way in, which for a small step costs as much as several kernels."""

from __future__ import annotations

import inspect
import logging
import types
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, cast

import torch

from dspark.target.entry import Call, Read, reader, way_in
from dspark.target.kept_graphs import KeptGraph, KeptGraphs
from dspark.target.linears import Product, join_linears

_log = logging.getLogger(__name__)

Outputs = tuple[Any, ...]  # tensors, then Nones


class Way(NamedTuple):
    """How a graph is called.

    run, read    its outputs from a list of inputs, and that list from the arguments
    num_missing  outputs that are None and come last
    """

    run: Call
    read: Read
    num_missing: int

    def __call__(self, arguments: Mapping[str, Any]) -> Outputs:
        return (*self.run(self.read(arguments)), *(None,) * self.num_missing)


@dataclass(frozen=True)
class Built:
    """A graph that the compiler has made, and what is kept of it; without a source, nothing is."""

    run: Call
    read: Read
    inputs: list[str]
    source: str | None = None
    conditions: list[str] = field(default_factory=list)
    weights: dict[str, Any] = field(default_factory=dict)


class Direct:
    """torch.compile of a function of tensors, for callers who know which of their calls fit one graph.

    Before each call the compiler asks of every argument whether it still fits, unpacks it and passes it through layers of
    wrappers. Here the first call of a kind compiles as usual, and from then on the arguments are read in the order in which
    its graph takes them. The function gives a tuple of tensors, Nones last, and may only write what a second call with the
    same arguments writes again: the first call runs both ways, and where they differ, or the compiler does not say
    where its inputs come from, all calls of the kind go the usual way. No tensor may be two of the arguments.

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
        self._ways: dict[Hashable, Way | None] = {}  # by kinds of calls; None: the usual one
        self._ran: Built | None = None  # what the compiler called last
        self._products: list[Product] = []  # of all graphs there have been: the compiler may still have them called

    def __call__(self, kind: Hashable = None, /, **arguments: Any) -> Outputs:
        """kind: what the caller tells graphs apart by. A kind's first call finds its graph, or builds it."""
        way = self._ways.get(kind)
        if way is not None:
            return way(arguments)
        return self._compiled(**arguments) if kind in self._ways else self._first(kind, arguments)

    @property
    def is_direct(self) -> bool:
        """Whether all kinds that there have been are called directly."""
        return bool(self._ways) and None not in self._ways.values()

    def _first(self, kind: Hashable, arguments: Mapping[str, Any]) -> Outputs:
        if found := self._take(arguments):
            self._ways[kind], outputs = found
            return outputs
        self._ran = None
        outputs = self._compiled(**arguments)
        built, num_missing = self._ran, sum(output is None for output in outputs)
        way = None if built is None else Way(built.run, built.read, num_missing)
        self._ways[kind] = way if way is not None and _are_equal(outputs, way(arguments)) else None
        if built is not None and self._ways[kind] is not None:
            self._keep(built, num_missing, arguments)
        return outputs

    def _take(self, arguments: Mapping[str, Any]) -> tuple[Way, Outputs] | None:
        """The way into a graph that was kept, and what it gives; None where there is none that can be had here."""
        if self._kept is None:
            return None
        try:
            found = self._kept.find(self._name, arguments)
            if found is None:
                return None
            graph, weights = found
            products = [Product.joined(parts) for parts, _ in graph.joined]
            if [product.number for product in products] != [number for _, number in graph.joined]:
                return None  # somebody else has the numbers that it calls its weights by
            module = types.ModuleType("dspark_kept_graph")
            exec(graph.source, module.__dict__)
            module.__dict__.update(weights)
            run, takes_tensors = way_in(module.call, weights)
            way = Way(run, reader(graph.inputs, takes_tensors), graph.num_missing)
            outputs = way(arguments)
        except Exception as error:  # noqa: BLE001  # of whatever kind: it is only a shorter way to what can be compiled
            _log.warning("a kept graph cannot be called and is made anew: %s", _line(error))
            return None
        self._hold(products)
        return way, outputs

    def _keep(self, built: Built, num_missing: int, arguments: Mapping[str, Any]) -> None:
        if self._kept is None or built.source is None:
            return
        joined = [([part.number for part in product.parts], product.number) for product in self._products]
        graph = KeptGraph(built.source, built.inputs, built.conditions, num_missing, joined, built.weights)
        self._kept.keep(self._name, arguments, graph)

    def _hold(self, products: list[Product]) -> None:
        self._products = list(dict.fromkeys(self._products + products))

    def _build(self, graph: torch.fx.GraphModule, examples: Sequence[Any], **options: Any) -> Callable[..., Any]:
        """What torch.compile calls: inductor, and a note of what it made and where the inputs come from."""
        from torch._inductor import compile_fx  # takes a second, which only who compiles should wait for

        cores: list[Any] = []

        def compile_inner(*inner: Any, **settings: Any) -> Any:
            """What there is between this and the whole is for gradients and for inputs that are weights."""
            core = compile_fx.compile_fx_inner(*inner, **settings)
            if len(inner[1]) == len(examples):
                cores.append((core, _weights_of(core, inner[0])))
            return core

        self._hold(join_linears(graph.graph))
        graph.recompile()
        whole = cast(Callable[..., Any], compile_fx.compile_fx(graph, examples, inner_compile=compile_inner))
        built: Built | None = None
        try:
            built = self._built(graph, *cores[-1] if cores else (lambda inputs: whole(*inputs), {}))
        except (AttributeError, KeyError, SyntaxError) as error:
            _log.info("compiled steps are called the usual way: %r", error)

        def run(*inputs: Any) -> Any:
            self._ran = built
            return whole(*inputs)

        return run

    def _built(self, graph: torch.fx.GraphModule, core: Any, weights: dict[str, Any]) -> Built:
        """Raises KeyError, AttributeError or SyntaxError where the compiler does not say what is needed."""
        names = [_name_of(node.meta["grapharg"].source) for node in graph.graph.nodes if node.op == "placeholder"]
        # Weights that were not frozen, say, and whatever else the function finds outside.
        if foreign := [name for name in names if not name.startswith(self._arguments)]:
            raise KeyError(f"inputs that are no arguments: {', '.join(foreign)}")
        call = getattr(core, "current_callable", None)
        if call is None or getattr(core, "inputs_to_check", None):
            return Built(core, reader(names, sizes_as_tensors=False), names)
        run, takes_tensors = way_in(call, weights)
        built = Built(run, reader(names, takes_tensors), names)
        try:
            return replace(built, source=core.source_code, conditions=_conditions(self._arguments), weights=weights)
        except Exception as error:  # noqa: BLE001  # the compiler's own interfaces, which may be others in other versions
            _log.info("a compiled graph is not kept: %s", _line(error))
            return built


def _conditions(arguments: tuple[str, ...]) -> list[str]:
    """What a graph that was compiled just now takes for granted of sizes and strides of these arguments."""
    from torch._guards import TracingContext

    shapes: Any = TracingContext.get().fake_mode.shape_env  # type: ignore[union-attr]
    own = [(one.fake, one.source) for one in shapes.tracked_fakes if _name_of(one.source).startswith(arguments)]
    found: list[str] = shapes.produce_guards(
        [fake for fake, _ in own], [where for _, where in own], ignore_static=False
    )
    return found


def _name_of(source: Any) -> str:
    name: str = source.name if isinstance(source.name, str) else source.name()  # a method in some versions
    return name


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


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
