"""The C++ kernels for CPU: built once per machine with the compiler that torch.compile needs anyway."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shlex
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.utils import cpp_extension

from dspark import caches, noise

_log = logging.getLogger(__name__)

_SOURCES = [
    Path(__file__).parent / "csrc" / name for name in ("slot_attention.cpp", "keyed_noise.cpp", "small_linear.cpp")
]
_FLAGS = ["-std=c++20", "-O3", "-march=native", "-fopenmp", "-fPIC", "-fno-math-errno", "-Wno-attributes"]
_ABI = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"

attend_slots = None  # torch.ops.dspark.attend_slots once `load` has succeeded
small_linear = None  # torch.ops.dspark.small_linear then, on processors that can


@cache
def load() -> bool:
    """Make the kernels available, compiling them if this machine has not yet (ten to twenty seconds). Whether it worked."""
    global attend_slots, small_linear
    try:
        torch.ops.load_library(_build())
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        _log.warning(
            "attention and sampling run without their C++ kernels, slower (%s); with g++ installed they are compiled once",
            reason.strip().splitlines()[-1],
        )
        return False
    torch.library.register_fake("dspark::attend_slots", attended_shape)
    attend_slots = torch.ops.dspark.attend_slots
    noise.keyed_uniform, noise.largest = torch.ops.dspark.keyed_uniform, torch.ops.dspark.largest.default
    if hasattr(torch.ops.dspark, "small_linear"):  # the processor has bfloat16 dot products
        torch.library.register_fake("dspark::small_linear", lambda x, number, width: x.new_empty(*x.shape[:-1], width))
        small_linear = torch.ops.dspark.small_linear
    return True


def machine() -> tuple[str, ...]:
    """What compiled code depends on: processor, compiler and torch. Raises OSError or SubprocessError without a compiler."""
    command = [*_compiler(), "--version"]
    version = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    return _ABI, torch.__version__, version, _processor()


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "g++"))


def _build() -> Path:
    """The library's path; its name says what it was made from, so another torch, compiler or processor has its own."""
    include = [f"-I{path}" for path in cpp_extension.include_paths()]
    link = [f"-L{path}" for path in cpp_extension.library_paths()] + ["-lc10", "-ltorch_cpu"]
    parts = [*(source.read_text() for source in _SOURCES), *_FLAGS, *machine()]
    path = caches.folder() / f"kernels-{hashlib.sha256(' '.join(parts).encode()).hexdigest()[:16]}.so"
    if path.exists() and caches.is_own(path.stat()):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    # Two processes may build at once: the rename is atomic.
    with tempfile.TemporaryDirectory(dir=path.parent) as beside:
        built = Path(beside) / path.name
        objects = [built.with_name(f"{source.stem}.o") for source in _SOURCES]
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # one after the other they can take half a minute
            each = zip(_SOURCES, objects, strict=True)
            list(pool.map(_run, ([*_FLAGS, _ABI, *include, "-c", str(text), "-o", str(o)] for text, o in each)))
        _run([*_FLAGS, "-shared", *map(str, objects), "-o", str(built), *link])
        built.chmod(0o755)  # nobody else's to write, whatever the umask: what is loaded is code
        built.rename(path)
    return path


def _run(arguments: list[str]) -> None:
    subprocess.run([*_compiler(), *arguments], capture_output=True, text=True, check=True, timeout=600)


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def attended_shape(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    starts: Tensor,
    positions: Tensor,
    inside: Tensor | None,
    rows: Tensor | None,
    back: Tensor | None,
    *_: object,
) -> Tensor:
    """What a kernel over slots gives, without its values: for tracing."""
    count = positions.shape[0] * positions.shape[1] if back is None else back.shape[0]
    return query.new_empty(count, query.shape[1], values.shape[2])
