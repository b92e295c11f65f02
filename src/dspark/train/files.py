"""Files that are whole or not there: a kill or a full disk never leaves half of one."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Write the path that is handed out; at the end of the block it takes the place of `path` in one step."""
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        _to_disk(partial)
    except Exception:
        partial.unlink(missing_ok=True)  # on a full disk its room is needed
        raise
    os.replace(partial, path)


def move_files(source: Path, folder: Path, names: Iterable[str]) -> None:
    """Move whole files out of a folder of drafts, which is removed; each takes its place in one step."""
    for name in names:
        _to_disk(source / name)
    for name in names:
        os.replace(source / name, folder / name)
    for rest in source.iterdir():
        rest.unlink()
    source.rmdir()


def _to_disk(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())  # the data must be on the disk before the name is
