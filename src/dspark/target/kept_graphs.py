"""Compiled graphs on disk, so that a machine compiles the steps of a model once and not at every start.

What the compiler makes of a function is a text, Python around C++. It is kept with where its inputs come from and which
weights it reads, under a key of everything it depends on: versions, processor and threads, our sources and those of
the model, its weights, and of the arguments the kinds and the sizes that do not change.
"""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from dspark.target import native
from dspark.target.linears import PackedLinear

_log = logging.getLogger(__name__)

_LARGEST_OWN = 64 * 2**20  # bytes of tensors that are kept with a graph, such as tables that the compiler has made


@dataclass(frozen=True)
class KeptGraph:
    """A graph as text.

    source        a module that builds it: `call`
    inputs        where `call` finds its inputs: expressions over the arguments, L
    num_missing   outputs that are None and come last
    joined        products made for it, as the numbers that were joined and the number that came of it
    weights       by the name that the source knows a tensor by, the model's name of it, or the tensor itself
    """

    source: str
    inputs: list[str]
    num_missing: int
    joined: list[tuple[list[int], int]]
    weights: dict[str, str | Tensor]


class KeptGraphs:
    """The graphs of one model.

    modules  all that they run, by names of their own
    facts    whatever else they depend on, as text
    """

    def __init__(self, modules: Mapping[str, nn.Module], *facts: object) -> None:
        self._tensors = {
            f"{part}.{name}": tensor.detach()
            for part, module in modules.items()
            for name, tensor in (*module.named_parameters(), *module.named_buffers())
        }
        digest = hashlib.blake2b(digest_size=16)
        numbers = [m.number for module in modules.values() for m in module.modules() if isinstance(m, PackedLinear)]
        environment = (*native.machine(), sys.version, transformers.__version__, torch.get_num_threads())
        for fact in (*environment, *modules.values(), numbers, *facts):
            digest.update(repr(fact).encode())
        for path in sorted(_sources(modules.values())):
            digest.update(path.read_bytes())
        for name, tensor in self._tensors.items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(_bytes_of(tensor))
        self._digest = digest.digest()

    def find(self, name: str, arguments: Mapping[str, Any]) -> tuple[KeptGraph, dict[str, Tensor]] | None:
        """A graph for these arguments with the tensors that it reads, if there is one."""
        path = self._path(name, arguments)
        try:
            graph = KeptGraph(**torch.load(path, weights_only=True))
            weights = {
                n: self._tensors[found] if isinstance(found, str) else found for n, found in graph.weights.items()
            }
        except FileNotFoundError:
            return None
        except (OSError, RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
            _log.warning("a kept graph cannot be read and is made anew: %s: %s", path, error)
            return None
        return graph, weights

    def keep(self, name: str, arguments: Mapping[str, Any], graph: KeptGraph) -> None:
        """Keep it, with tensors of the model by name. Where that cannot be, it is compiled again the next time."""
        if any(weight.layout != torch.strided for weight in graph.weights.values() if isinstance(weight, Tensor)):
            return  # packed by the library for its own kernels, which is nothing to be written down
        named = {_place(tensor): found for found, tensor in self._tensors.items()}
        weights = {n: named.get(_place(w), w) if isinstance(w, Tensor) else w for n, w in graph.weights.items()}
        if sum(w.nbytes for w in weights.values() if isinstance(w, Tensor)) > _LARGEST_OWN:
            return
        path = self._path(name, arguments)
        own = path.with_suffix(f".{os.getpid()}")  # two processes may keep at once: the rename is atomic
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save({**asdict(graph), "weights": weights}, own)
            own.rename(path)
        except (OSError, RuntimeError) as error:
            _log.warning("a compiled graph could not be kept: %s", error)

    def _path(self, name: str, arguments: Mapping[str, Any]) -> Path:
        key = hashlib.blake2b(self._digest + repr((name, _kind_of(arguments))).encode(), digest_size=16)
        return folder() / f"{key.hexdigest()}.pt"


def folder() -> Path:
    """Where graphs are kept."""
    return native.folder() / "graphs"


def kept_graphs(modules: Mapping[str, nn.Module], *facts: object) -> KeptGraphs | None:
    """Those of a model on CPU; None where it cannot be told what they depend on, or there is no compiler."""
    tensors = [tensor for module in modules.values() for tensor in module.parameters()]
    if any(tensor.device.type != "cpu" for tensor in tensors):
        return None
    try:
        return KeptGraphs(modules, *facts)
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        _log.info("compiled graphs are not kept: %s", error)
        return None


def _sources(modules: Iterable[nn.Module]) -> set[Path]:
    """Files that say what the modules do, those of drafting and verifying among them."""
    ours = [path for part in ("target", "drafters") for path in (Path(__file__).parents[1] / part).rglob("*.[ch]*")]
    ours += [path for part in ("target", "drafters") for path in (Path(__file__).parents[1] / part).glob("*.py")]
    kinds = {type(module).__module__ for whole in modules for module in whole.modules()}
    files = [getattr(sys.modules.get(kind), "__file__", None) for kind in kinds]
    return {*ours, *(Path(file) for file in files if file)}


def _bytes_of(tensor: Tensor) -> memoryview:
    array: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def _place(tensor: Tensor) -> tuple[object, ...]:
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def _kind_of(value: Any) -> object:
    """What a graph takes for granted of its arguments: all but the sizes that the compiler was told will change."""
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
