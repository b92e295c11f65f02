"""Files that are whole or not there: a kill or a full disk never leaves half of one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Write the path that is handed out; at the end of the block it takes the place of `path` in one step."""
    partial = path.with_name(path.name + ".partial")
    yield partial
    with partial.open("rb") as file:
        os.fsync(file.fileno())  # the data must be on the disk before the name is
    os.replace(partial, path)
