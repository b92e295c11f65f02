"""A CUDA device that is none: tensors that say they lie on `cuda:1`, hold their values on the host, and behave as there.

It refuses what CUDA refuses (operators over tensors of two devices, numpy), keeps the pinned memory that copies still
read under guard, lets nobody see what a copy brings before it was waited for, and writes down every copy between host
and device with the line of dspark that asked for it.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from math import inf
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import cpp_extension
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
DEVICE = torch.device("cuda:1")  # not the current one: whoever says "cuda" alone means another

_COPIES = {"_to_copy", "copy_", "copy", "_copy_from"}
_WAITS_FOR_VALUES = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal"}
_TAKES_INDICES = {"index", "index_put", "index_put_", "_unsafe_index", "_unsafe_index_put", "_index_put_impl_"}
_LIKE = ("_like", "new_empty", "new_zeros", "new_ones", "new_full", "new_empty_strided")


@dataclass(frozen=True)
class Copy:
    """kind: `to host`, `to device` (from memory that is not pinned: both make the host wait), `queued` (from pinned
    memory), `coming` (into pinned memory), `wait` (an operator whose result's size is read back, or an event after which
    the device was told nothing), `late` (an event after which it was: it works on while the host waits)."""

    kind: str
    num_bytes: int
    operator: str
    line: str


@dataclass(repr=False)
class Ledger:
    """What went between host and device, and what may not be overwritten yet."""

    copies: list[Copy] = field(default_factory=list)
    pinned: dict[int, Tensor] = field(default_factory=dict)  # by address; kept, so that no address comes twice
    now: int = 0  # operations that the device was told to do
    in_flight: list[tuple[int, Tensor, Tensor]] = field(
        default_factory=list
    )  # since when; being read, and what it held
    coming: list[tuple[int, Tensor, Tensor]] = field(
        default_factory=list
    )  # since when; being written, and what it gets

    def write(self, kind: str, tensor: Tensor, operator: str) -> None:
        self.copies.append(Copy(kind, tensor.numel() * tensor.element_size(), operator, _line()))
        if kind in ("to host", "to device", "wait"):
            self.settle()

    def settle(self, until: float = inf) -> None:
        """The device has done what it was told until then: only now may its sources have changed, or results be there."""
        for since, source, held in self.in_flight:
            is_same = since > until or torch.equal(source, held)
            assert is_same, "pinned memory was overwritten while a copy to the device still read it"
        for since, place, value in self.coming:
            if since <= until:
                place.copy_(value)
        self.in_flight, self.coming = ([x for x in xs if x[0] > until] for xs in (self.in_flight, self.coming))

    def of(self, *kinds: str) -> list[Copy]:
        return [copy for copy in self.copies if copy.kind in kinds]


_ledger = Ledger()


class OnDevice(Tensor):
    """A tensor on `cuda:1`; `value` is what it holds."""

    value: Tensor

    @staticmethod
    def __new__(cls, value: Tensor) -> OnDevice:
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            value.size(),
            strides=value.stride(),
            storage_offset=value.storage_offset(),
            dtype=value.dtype,
            device=DEVICE,
        )

    def __init__(self, value: Tensor) -> None:
        assert type(value) is Tensor
        self.value = value

    def data_ptr(self) -> int:
        return self.value.data_ptr()

    def tolist(self) -> Any:  # torch refuses it to subclasses
        return self.cpu().tolist()

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"OnDevice({tuple(self.shape)}, {self.dtype})"

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    ours = [x for x in tensors if isinstance(x, OnDevice)]
    place = kwargs.get("device")
    wanted = None if place is None else torch.device(place)
    if wanted is not None and wanted.type == "cuda":
        assert wanted == DEVICE, f"{func} puts a tensor on {wanted}, and the target is on {DEVICE}"
    elif not ours:
        return func(*args, **kwargs)
    name = func.overloadpacket.__name__
    _ledger.now += 1
    if name in _COPIES:
        return _copy(name, func, args, kwargs, tensors, wanted)
    _check_devices(name, func, args, tensors, ours)
    if name == "_fused_sdp_choice":
        return 0  # the one of plain products: others are chosen by device
    if name in _WAITS_FOR_VALUES or (name == "repeat_interleave" and len(ours) == len(tensors)):
        _ledger.write("to host" if name == "_local_scalar_dense" else "wait", ours[0], name)
    on_host = wanted is not None and wanted.type == "cpu"
    return _plainly(func, args, kwargs, on_host)


def _plainly(func: Any, args: Any, kwargs: dict[str, Any], on_host: bool = False) -> Any:
    """Run it over the values; what comes out is on the device, and what was changed in place is still itself."""
    known = {id(x.value): x for x in tree_leaves((args, kwargs)) if isinstance(x, OnDevice)}
    values, named = tree_map(_value, (args, {k: v for k, v in kwargs.items() if k != "pin_memory"}))
    if "device" in named:
        named["device"] = torch.device("cpu")
    outputs = func(*values, **named)
    for x in known.values():
        assert x.shape == x.value.shape, f"{func} changed a tensor's shape in place"
    if on_host:
        return outputs
    return tree_map(
        lambda x: (known[id(x)] if id(x) in known else OnDevice(x)) if isinstance(x, Tensor) else x, outputs
    )


def _copy(name: str, func: Any, args: Any, kwargs: dict[str, Any], tensors: list[Tensor], wanted: Any) -> Any:
    """From host to device, the other way round, or on the device."""
    target = tensors[0].device if name != "_to_copy" or wanted is None else wanted
    source = tensors[-1] if name in ("copy_", "copy") else tensors[0]
    is_queued = bool(kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
    if source.device.type == "cpu" and target.type == "cuda":
        storage = source.untyped_storage().data_ptr()
        if is_queued and storage in _ledger.pinned:
            _ledger.in_flight.append((_ledger.now, source, source.clone()))
            _ledger.write("queued", source, name)
        elif source.numel():
            _ledger.write("to device", source, name)
    elif source.device.type == "cuda" and target.type == "cpu" and is_queued:
        place = args[0]
        assert place.untyped_storage().data_ptr() in _ledger.pinned, "a copy into memory that is not pinned waits"
        _ledger.coming.append((_ledger.now, place, _value(source).clone()))
        _ledger.write("coming", source, name)
        return place.fill_(-1 if place.dtype.is_signed else 255)  # what was there before, for all that anybody knows
    elif source.device.type == "cuda" and target.type == "cpu":
        _ledger.write("to host", source, name)
    if name == "copy_" and target.type == "cpu":
        return args[0].copy_(_value(args[1]))
    return _plainly(func, args, kwargs, on_host=target.type == "cpu")


def _check_devices(name: str, func: Any, args: Any, tensors: list[Tensor], ours: list[OnDevice]) -> None:
    """As CUDA does: numbers may come from the host, and so may indices, for which the host waits."""
    if name.endswith(_LIKE):
        return
    foreign = [x for x in tensors if not isinstance(x, OnDevice) and x.dim() > 0]
    if name in _TAKES_INDICES:
        indices = [x for x in args[1] if x is not None]
        for index in indices:
            if index.device.type == "cpu":
                _ledger.write("to device", index, name)
                foreign = [x for x in foreign if x is not index]
        is_fill = name.startswith("index_put") and args[2].numel() == 1
        if any(index.dtype in (torch.bool, torch.uint8) for index in indices) and not is_fill:
            _ledger.write("wait", indices[0], name)
    assert not foreign or not ours, f"{func} takes tensors of two devices: {[tuple(x.shape) for x in tensors]}"


def _value(x: Any) -> Any:
    return x.value if isinstance(x, OnDevice) else x


def _line() -> str:
    """The innermost line of dspark that is being run, and wants a copy."""
    frame = sys._getframe(1)
    while frame is not None:
        _, inside, path = frame.f_code.co_filename.rpartition("/src/dspark/")
        if inside and path != "transfer.py":
            return f"{path}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return "?"


class _Dispatch(TorchDispatchMode):
    """Tensors that are made on the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """Pinned memory, which a torch without CUDA does not have, and attention as the CPU computes it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.pop("pin_memory", False):
            tensor = func(*args, **kwargs)
            _ledger.pinned[tensor.untyped_storage().data_ptr()] = tensor
            return tensor
        if func is torch.nn.functional.scaled_dot_product_attention and not torch.is_grad_enabled():
            are_ours = [isinstance(x, OnDevice) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            assert all(are_ours) or not any(are_ours), "attention over tensors of two devices"
            values, named = tree_map(_value, (args, kwargs))
            return OnDevice(func(*values, **named)) if any(are_ours) else func(*args, **kwargs)
        return func(*args, **kwargs)


class _Event:
    def __init__(self, *_: Any, **__: Any) -> None:
        self.since: int | None = None

    def record(self, stream: Any = None) -> None:
        """An event that is recorded elsewhere than the copies waits for none of them."""
        assert stream is not None and stream.device == DEVICE, "an event of the current device, which is another one"
        self.since = _ledger.now

    def synchronize(self) -> None:
        """An event that was never recorded is over."""
        if self.since is not None:
            kind = "late" if _ledger.now > self.since else "wait"
            _ledger.copies.append(Copy(kind, 0, "synchronize", _line()))
            _ledger.settle(self.since)


@cache
def _load_guard() -> None:
    """Indexing switches to the tensor's device first, and a torch without CUDA does not know how."""
    guard = "C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>)"
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "guard.cpp", Path(folder) / "guard.so"
        source.write_text(f"#include <c10/core/impl/DeviceGuardImplInterface.h>\n{guard}\n")
        include = [f"-I{path}" for path in cpp_extension.include_paths()]
        link = [f"-L{path}" for path in cpp_extension.library_paths()] + ["-lc10"]
        abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
        command = ["g++", "-std=c++20", "-fPIC", "-shared", abi, *include, str(source), "-o", str(library), *link]
        subprocess.run(command, check=True, timeout=120)
        torch.ops.load_library(library)


@contextmanager
def pretend_cuda(patch: Any) -> Iterator[Ledger]:
    """Meanwhile there is CUDA. patch: pytest's monkeypatch."""
    _load_guard()
    stand_ins: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True,
        "_lazy_init": lambda: None,
        "device_count": lambda: 2,
        "current_device": lambda: 0,
        "get_device_name": lambda *_: "pretended",
        "get_device_properties": lambda *_: SimpleNamespace(major=9, minor=0, total_memory=2**34),
        "get_device_capability": lambda *_: (9, 0),
        "mem_get_info": lambda *_: (2**33, 2**34),
        "max_memory_allocated": lambda *_: 2**30,
        "is_bf16_supported": lambda *_: True,
        "synchronize": lambda *_: _ledger.settle(),
        "Event": _Event,
        "current_stream": lambda device=None: SimpleNamespace(device=device or torch.device("cuda:0")),
    }
    for name, stand_in in stand_ins.items():
        patch.setattr(torch.cuda, name, stand_in)
    _ledger.__init__()  # type: ignore[misc]
    lifts, overwrites = torch._C._only_lift_cpu_tensors(), torch.__future__.get_overwrite_module_params_on_conversion()
    torch._C._set_only_lift_cpu_tensors(True)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with _Functions(), _Dispatch():
            yield _ledger
    finally:
        torch._C._set_only_lift_cpu_tensors(lifts)
        torch.__future__.set_overwrite_module_params_on_conversion(overwrites)
