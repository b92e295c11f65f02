"""The fastest tiling is found with few questions, once per card; a file that does not fit is never believed."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import pytest

from dspark.target import tilings
from dspark.target.tilings import SHAPES, Geometry, Shape, Tiling

LAYER = Geometry(32, 8, 128, 128, "bfloat16")
CARD = {"card": "of a test", "kernel": "1"}
START = Tiling(16, 64, 256)


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tilings, "known", {})
    return tmp_path


def best_for(shape: Shape) -> Tiling:
    """Of a made-up card."""
    return Tiling(32 if shape.queries > 1 else 16, 128, 1024 if shape.context > 4096 else 128, 8, 3)


def seconds(shape: Shape, tiling: Tiling) -> float:
    """Apart from what it likes best, this card has no room for the largest tiles."""
    assert shape in SHAPES and tiling.split % tiling.keys == 0
    if tiling.rows == 64 and tiling.keys == 128:
        return math.inf
    best = best_for(shape)
    return 1.0 + sum(getattr(tiling, name) != getattr(best, name) for name in tilings._CHOICES)


def test_every_shape_gets_its_fastest() -> None:
    asked: list[tuple[Shape, Tiling]] = []

    def counted(shape: Shape, tiling: Tiling) -> float:
        asked.append((shape, tiling))
        return seconds(shape, tiling)

    assert tilings.measure(lambda _: START, counted) == {shape: best_for(shape) for shape in SHAPES}
    assert len(asked) <= 16 * len(SHAPES)


def test_a_card_is_measured_once() -> None:
    num_measured = 0

    def measured() -> dict[Shape, Tiling]:
        nonlocal num_measured
        num_measured += 1
        return {shape: best_for(shape) for shape in SHAPES}

    for machine, layer, expected in (
        (CARD, LAYER, 1),
        (CARD, LAYER, 1),
        (CARD | {"card": "of another kind"}, LAYER, 2),
        (CARD, Geometry(32, 4, 128, 128, "bfloat16"), 3),
        (CARD, LAYER, 3),
    ):
        tilings.known.clear()  # another process
        tilings.find(layer, machine, measured)
        assert tilings.known == {layer: {shape: best_for(shape) for shape in SHAPES}}
        assert num_measured == expected


@pytest.mark.parametrize("wrong", ["", "[]", '{"about": {}, "fastest": []}', "a tiling of another version"])
def test_a_file_that_does_not_fit_is_measured_anew(caches: Path, wrong: str, caplog: pytest.LogCaptureFixture) -> None:
    fastest = {Shape(1, 1, 512): START}
    tilings.find(LAYER, CARD, lambda: fastest)
    (path,) = caches.rglob("*.json")
    right = path.read_text()
    changed = json.loads(right)
    changed["fastest"][0]["tiling"]["num_ctas"] = 2
    path.write_text(json.dumps(changed) if wrong.startswith("a ") else wrong)
    tilings.known.clear()
    with caplog.at_level(logging.WARNING):
        tilings.find(LAYER, CARD, lambda: fastest)
    assert [record.message.startswith("measuring tilings anew") for record in caplog.records] == [True]
    assert tilings.known == {LAYER: fastest} and path.read_text() == right


def test_the_nearest_shape_speaks_for_others() -> None:
    shapes = (Shape(1, 1, 512), Shape(1, 8, 512), Shape(64, 1, 8192), Shape(1, 512, 512))
    tilings.known[LAYER] = {shape: Tiling(16, 16, 16 * n) for n, shape in enumerate(shapes)}
    near = {(1, 1, 100): 0, (2, 1, 900): 0, (1, 6, 300): 1, (256, 2, 9000): 2, (1, 17, 40): 3, (1, 16, 512): 1}
    for sizes, n in near.items():
        assert tilings.fastest_known(LAYER, Shape(*sizes)) == Tiling(16, 16, 16 * n)
    assert tilings.fastest_known(Geometry(8, 8, 64, 64, "float16"), shapes[0]) is None
