"""Compiled graphs on disk, so that a machine compiles the steps of a model once and not at every start.

What the compiler makes of a function is a text, Python around C++. It is kept with where its inputs come from, what has
to hold of their sizes and which weights it reads, under a key of everything else it depends on: versions, processor,
threads and the compiler's settings, our sources and those of the model, its weights, and the kinds of the arguments.
"""

from __future__ import annotations

import hashlib
import io
import logging
import math
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from dspark import caches
from dspark.target import native

_log = logging.getLogger(__name__)

_LARGEST_OWN = 64 * 2**20  # bytes of tensors that are kept with a graph, such as tables that the compiler has made
_MOST = 256 * 2**20  # bytes of all graphs: about a megabyte for each model and version
_PLAIN = (bool, int, float, str, type(None), torch.dtype)
_VERSIONED = ("dspark", "torch", "transformers")  # what comes from them is told by their versions, or hashed anyway


@dataclass(frozen=True)
class KeptGraph:
    """A graph as text.

    source        a module that builds it: `call`
    inputs        where `call` finds its inputs: expressions over the arguments, L
    conditions    what it takes for granted of their sizes and strides: such expressions, too
    num_missing   outputs that are None and come last
    joined        products made for it, as the numbers that were joined and the number that came of it
    weights       by the name that the source knows a tensor by, the model's name of it, or the tensor itself
    """

    source: str
    inputs: list[str]
    conditions: list[str]
    num_missing: int
    joined: list[tuple[list[int], int]]
    weights: dict[str, str | Tensor]

    def fits(self, arguments: Mapping[str, Any]) -> bool:
        """Whether the conditions hold."""
        return all(eval(condition, {"L": arguments, "math": math}) for condition in self.conditions)


class KeptGraphs:
    """The graphs of one model.

    modules  all that they run, by names of their own
    facts    whatever else they depend on, as text
    """

    def __init__(self, modules: Mapping[str, nn.Module], *facts: object) -> None:
        every = {f"{part}.{name}": m for part, module in modules.items() for name, m in module.named_modules()}
        for name, module in every.items():
            _refuse_what_hides(name, module)
        self._tensors = {
            f"{name}.{own}": tensor.detach()
            for name, module in every.items()
            for own, tensor in {**vars(module), **module._parameters, **module._buffers}.items()
            if isinstance(tensor, Tensor)
        }
        digest = hashlib.blake2b(digest_size=16)
        settings = [
            {own: value for own, value in vars(module).items() if isinstance(value, _PLAIN)}
            for module in every.values()
        ]
        for fact in (*_environment(), *modules.values(), settings, *facts):
            digest.update(repr(fact).encode())
        for path in sorted(_sources({type(module) for module in every.values()})):
            digest.update(path.read_bytes())
        for name, tensor in self._tensors.items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(_bytes_of(tensor))
        self._digest = digest.digest()
        self._has_warned = False

    def find(self, name: str, arguments: Mapping[str, Any]) -> tuple[KeptGraph, dict[str, Tensor]] | None:
        """A graph for these arguments with the tensors that it reads, if there is one."""
        path = self._path(name, arguments)
        try:
            content = caches.read(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._warn("a kept graph cannot be read and is made anew: %s: %s", path, str(error))
            return None
        graph = KeptGraph(**torch.load(io.BytesIO(content), weights_only=True))
        if not graph.fits(arguments):
            return None
        return graph, {n: self._tensors[w] if isinstance(w, str) else w for n, w in graph.weights.items()}

    def keep(self, name: str, arguments: Mapping[str, Any], graph: KeptGraph) -> None:
        """Keep it, with tensors of the model by name. Where that cannot be, it is compiled again the next time."""
        named = {_place(tensor): found for found, tensor in self._tensors.items()}
        weights: dict[str, Any] = {}
        for own, weight in graph.weights.items():
            if not isinstance(weight, Tensor) or weight.layout != torch.strided:
                return  # packed by the library for its own kernels, which is nothing to be written down
            weights[own] = named.get(_place(weight), weight)
        if sum(w.nbytes for w in weights.values() if isinstance(w, Tensor)) > _LARGEST_OWN:
            return
        content = io.BytesIO()
        torch.save({**vars(graph), "weights": weights}, content)
        try:
            caches.write(self._path(name, arguments), content.getvalue(), _MOST)
        except OSError as error:
            self._warn("compiled graphs cannot be kept: %s", str(error))

    def _warn(self, *message: object) -> None:
        """Once: what is wrong with one file of a folder may well be with all of them."""
        _log.log(logging.DEBUG if self._has_warned else logging.WARNING, *message)
        self._has_warned = True

    def _path(self, name: str, arguments: Mapping[str, Any]) -> Path:
        key = hashlib.blake2b(self._digest + repr((name, _kind_of(arguments))).encode(), digest_size=16)
        return folder() / f"{key.hexdigest()}.pt"


def folder() -> Path:
    """Where graphs are kept."""
    return caches.folder() / "graphs"


def kept_graphs(modules: Mapping[str, nn.Module], *facts: object) -> KeptGraphs | None:
    """Those of a model on CPU; None where it cannot be told what they depend on, or there is no compiler."""
    tensors = [tensor for module in modules.values() for tensor in module.parameters()]
    if any(tensor.device.type != "cpu" for tensor in tensors):
        return None
    try:
        return KeptGraphs(modules, *facts)
    except (OSError, RuntimeError, TypeError, subprocess.SubprocessError) as error:  # TypeError: no tensor of numbers
        _log.info("compiled graphs are not kept: %s", str(error))
        return None


def _environment() -> tuple[object, ...]:
    from torch._inductor import config  # takes a second, which only who compiles should wait for

    vectors = os.environ.get("ATEN_CPU_CAPABILITY")  # as the compiler asks for it
    of_torch = vectors, torch.get_num_threads(), torch.get_default_dtype(), config.get_hash()
    return *native.machine(), sys.version, transformers.__version__, *of_torch


def _refuse_what_hides(name: str, module: nn.Module) -> None:
    """RuntimeError for what a module does that neither its class nor its settings tell."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    strange = [hook for hook in hooks if (getattr(hook, "__module__", None) or "").split(".")[0] not in _VERSIONED]
    if strange or "forward" in vars(module):
        raise RuntimeError(f"{name} is hooked, or has a forward of its own")


def _sources(kinds: Iterable[type[nn.Module]]) -> set[Path]:
    """Files that say what modules of these kinds do, those of drafting and verifying among them.

    A model that came with code of its own may call what lies beside it.
    """
    ours = [Path(__file__).parents[1] / part for part in ("target", "drafters")]
    found = {path for folder in ours for end in ("py", "cpp") for path in folder.rglob(f"*.{end}")}
    parts = (part for kind in kinds for part in (*kind.__mro__, kind.forward))  # whoever has put it there
    names = {getattr(part, "__module__", "") for part in parts}
    for name in names:
        if file := getattr(sys.modules.get(name), "__file__", None):
            found.add(Path(file))
            if name.split(".")[0] not in _VERSIONED:
                found.update(Path(file).parent.glob("*.py"))
    return found


def _bytes_of(tensor: Tensor) -> memoryview:
    array: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def _place(tensor: Tensor) -> tuple[object, ...]:
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def _kind_of(value: Any) -> object:
    """What tells graphs apart: all about the arguments but the sizes that the compiler was told will change."""
    if isinstance(value, Tensor):
        free = getattr(value, "_dynamo_dynamic_indices", set()) | getattr(value, "_dynamo_weak_dynamic_indices", set())
        sizes = [
            None if dim in free and size > 1 else size for dim, size in enumerate(value.shape)
        ]  # 0 and 1 are fixed
        return str(value.dtype), sizes, value.is_contiguous()
    if isinstance(value, Mapping):
        return [(name, _kind_of(inner)) for name, inner in value.items()]
    if isinstance(value, (list, tuple)):
        return [_kind_of(inner) for inner in value]
    return value
