"""How the Triton kernel for attention cuts its work, and which cut is fastest for what on this card.

Measured once per card and kind of attention, by a handful of shapes, and kept in a file: later runs find it. What a
shape was not measured for takes the nearest one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from torch import Tensor

from dspark import caches
from dspark.target.plan import SHORT

_log = logging.getLogger(__name__)

_MOST_KEYS = 1 << 20  # of all requests in a shape: more fit no card


@dataclass(frozen=True)
class Tiling:
    """How the work is cut. Another tiling gives other bits, so where bits matter it must not depend on the batch.

    rows   query heads that share keys, worked on together; at least 16 for tensor cores
    keys   keys in a tile of the running softmax
    split  keys of one program, a multiple of `keys`; 0: all of them
    """

    rows: int
    keys: int
    split: int
    num_warps: int = 4
    num_stages: int = 2


SHORT_SPANS = Tiling(rows=16, keys=64, split=256)  # decoding and verifying: bound by reading keys and values
LONG_SPANS = Tiling(rows=64, keys=64, split=0)  # prompt chunks: enough queries to occupy the GPU without splits
# More than 256, 512, 1024 bytes in a key: shared memory holds fewer of them. The smallest cards have 64 KB of it.
WIDE_SPANS = Tiling(rows=16, keys=32, split=256)
WIDER_SPANS = Tiling(rows=16, keys=16, split=256)
WIDEST_SPANS = Tiling(rows=16, keys=16, split=256, num_stages=1)

_CHOICES: dict[str, tuple[int, ...]] = {
    "rows": (16, 32, 64),
    "split": (128, 256, 512, 1024, 2048, 0),
    "keys": (32, 64, 128),
    "num_warps": (2, 4, 8),
    "num_stages": (2, 3, 4),
}


def tiling_for(num_queries: int, bytes_per_key: int) -> Tiling:
    """By the span and the model alone, never by the batch."""
    if bytes_per_key > 256:
        return WIDE_SPANS if bytes_per_key <= 512 else WIDER_SPANS if bytes_per_key <= 1024 else WIDEST_SPANS
    return SHORT_SPANS if num_queries <= SHORT else LONG_SPANS


@dataclass(frozen=True)
class Geometry:
    """One kind of attention layer: heads, heads of keys, sizes of keys and values, and their dtype by name."""

    heads: int
    kv_heads: int
    width: int
    value_width: int
    dtype: str


def geometry_of(heads: int, keys: Tensor, values: Tensor) -> Geometry:
    """Of a layer with such storage: keys [slots, KV, D], values [slots, KV, Dv]."""
    return Geometry(heads, keys.shape[1], keys.shape[2], values.shape[2], str(keys.dtype).removeprefix("torch."))


@dataclass(frozen=True)
class Shape:
    """One call: requests, queries of each, and keys of each."""

    requests: int
    queries: int
    context: int

    def distance(self, other: Shape) -> float:
        """In doublings, all sizes together."""
        return sum(abs(math.log2(a / b)) for a, b in zip(self.sizes, other.sizes, strict=True))

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.requests, self.queries, self.context


_CONTEXTS = (512, 2048, 8192, 32768)
SHAPES = tuple(
    Shape(requests, queries, context)
    for requests, queries in ((1, 1), (1, 8), (8, 1), (8, 8), (64, 1), (64, 8), (1, 512))
    for context in _CONTEXTS
    if requests * context <= _MOST_KEYS
)

Seconds = Callable[[Shape, Tiling], float]
"""Of one call; infinite where the card lacks the room for it."""

known: dict[Geometry, dict[Shape, Tiling]] = {}  # the fastest, as far as this process has been told


def fastest_known(geometry: Geometry, shape: Shape) -> Tiling | None:
    """Of the nearest shape, short spans and long ones apart; None: nothing is known of such layers."""
    near = [other for other in known.get(geometry, ()) if (other.queries > SHORT) == (shape.queries > SHORT)]
    return known[geometry][min(near, key=shape.distance)] if near else None


def measure(start: Callable[[Shape], Tiling], seconds: Seconds) -> dict[Shape, Tiling]:
    """The fastest tiling of every shape: one choice after another, each with the best of those before."""
    return {shape: _fastest(shape, start(shape), seconds) for shape in SHAPES}


def _fastest(shape: Shape, best: Tiling, seconds: Seconds) -> Tiling:
    least = seconds(shape, best)
    for name, values in _CHOICES.items():
        for value in values:
            tiling = replace(best, **{name: value})
            if value == getattr(best, name) or tiling.split % tiling.keys:
                continue
            if (needed := seconds(shape, tiling)) < least:
                best, least = tiling, needed
    return best


def find(geometry: Geometry, machine: Mapping[str, str], measured: Callable[[], dict[Shape, Tiling]]) -> None:
    """Let `fastest_known` know about such layers: from the file of this machine, or by measuring, which is kept there.

    machine: all else that the figures depend on, the card and the kernel's source among it.
    """
    if geometry in known:
        return
    about = {**machine, **{name: str(value) for name, value in asdict(geometry).items()}}
    path = usual_path(about)
    found = _load(path, about)
    if found is None:
        begin = time.perf_counter()
        found = measured()
        _save(path, about, found)
        _log.info("measured tilings for %s in %.0f s, kept in %s", geometry, time.perf_counter() - begin, path)
    known[geometry] = found


def usual_path(about: Mapping[str, str]) -> Path:
    """A file of the user's caches (XDG base directories) whose name says what was measured where."""
    name = hashlib.sha256(json.dumps(dict(sorted(about.items()))).encode()).hexdigest()[:16]
    return caches.folder() / "tilings" / f"{name}.json"


def _load(path: Path, about: Mapping[str, str]) -> dict[Shape, Tiling] | None:
    """None, with a line in the log, where there is a file that does not fit."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["about"] != about:
            raise ValueError("it is about something else")
        return {Shape(**entry["shape"]): Tiling(**entry["tiling"]) for entry in content["fastest"]}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        _log.warning("measuring tilings anew: %s cannot be used (%s: %s)", path, type(error).__name__, error)
        return None


def _save(path: Path, about: Mapping[str, str], found: Mapping[Shape, Tiling]) -> None:
    entries = [{"shape": asdict(shape), "tiling": asdict(tiling)} for shape, tiling in found.items()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as file:
            json.dump({"about": about, "fastest": entries}, file, indent=1)
        Path(file.name).replace(path)  # two processes may measure at once
    except OSError as error:
        _log.warning("tilings cannot be kept in %s: %s", path, error.strerror)
