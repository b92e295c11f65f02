"""What this machine keeps for the next start: where it lies, and files that are run later, which nobody else may write."""

from __future__ import annotations

import hashlib
import os
import tempfile
from contextlib import suppress
from pathlib import Path

_DIGEST = 32  # bytes


def folder() -> Path:
    """A folder of the user's caches (XDG base directories)."""
    if caches := os.environ.get("XDG_CACHE_HOME"):
        return Path(caches) / "dspark"
    try:
        return Path.home() / ".cache" / "dspark"
    except RuntimeError:  # no HOME, and a user that the system does not know, as in some containers
        return Path(tempfile.gettempdir()) / f"dspark-{os.getuid()}"


def is_own(info: os.stat_result) -> bool:
    """Whether nobody but this user, or root, can have written a file."""
    return os.name != "posix" or (info.st_uid in (0, os.getuid()) and not info.st_mode & 0o022)


def read(path: Path) -> bytes:
    """What `write` has written. Raises OSError where there is no file, or not the whole of it, or others can write it."""
    with path.open("rb") as file:
        if not is_own(os.fstat(file.fileno())):
            raise PermissionError("others can write it")
        digest, content = file.read(_DIGEST), file.read()
    if digest != _digest_of(content):
        raise OSError("it is not whole")
    with suppress(OSError):
        os.utime(path)  # used now
    return content


def write(path: Path, content: bytes, most: int) -> None:
    """Keep it, for this user alone. Raises OSError, and leaves nothing behind then.

    most  bytes in the file's folder: beyond that, what has not been used for longest goes. Who uses it has read it whole.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, own = tempfile.mkstemp(dir=path.parent)  # two processes may write at once: the rename is atomic
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(_digest_of(content) + content)
        os.replace(own, path)
    except BaseException:
        os.unlink(own)
        raise
    total = 0
    for _, size, used in sorted(_uses(path.parent), reverse=True):
        total += size
        if total > most:
            used.unlink(missing_ok=True)


def _uses(folder: Path) -> list[tuple[int, int, Path]]:
    """Of each file when it was used, its size and its path; what others throw away meanwhile is not there."""
    uses = []
    for path in folder.iterdir():
        with suppress(FileNotFoundError):
            info = path.stat()
            uses.append((info.st_mtime_ns, info.st_size, path))
    return uses


def _digest_of(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_DIGEST).digest()
