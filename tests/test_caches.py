"""Files that are run later: whole, from nobody else, and not more of them than was asked for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dspark import caches

posix = pytest.mark.skipif(os.name != "posix", reason="owners and modes are POSIX")
MOST = 10_000


def test_what_is_written_is_read(tmp_path: Path) -> None:
    for content in (b"one", b"another"):
        caches.write(tmp_path / "new" / "file", content, MOST)
        assert caches.read(tmp_path / "new" / "file") == content
    with pytest.raises(FileNotFoundError):
        caches.read(tmp_path / "other")


def test_what_is_cut_short_or_changed_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    caches.write(path, b"content", MOST)
    whole = path.read_bytes()
    for other in (b"", whole[:10], whole[:-1], whole[:-1] + b"x", bytes(len(whole))):
        path.write_bytes(other)
        with pytest.raises(OSError, match="not whole"):
            caches.read(path)


@posix
def test_what_others_can_have_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "file"
    umask = os.umask(0o002)  # usual where every user has a group
    try:
        caches.write(path, b"content", MOST)
    finally:
        os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o600 and path.parent.stat().st_mode & 0o777 == 0o700
    for mode in (0o664, 0o602):
        path.chmod(mode)
        with pytest.raises(PermissionError, match="others"):
            caches.read(path)
    path.chmod(0o644)
    assert caches.read(path) == b"content"
    owner = path.stat().st_uid
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    if owner != 0:  # root may do as it likes anyway
        with pytest.raises(PermissionError, match="others"):
            caches.read(path)


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def replace(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="no space left"):
        caches.write(tmp_path / "file", b"content", MOST)
    assert not list(tmp_path.iterdir())


def test_what_has_not_been_used_for_longest_goes(tmp_path: Path) -> None:
    for number, name in enumerate("abcd"):
        caches.write(tmp_path / name, bytes(3000), MOST if name < "d" else 1 << 20)
        os.utime(tmp_path / name, (number + 1, number + 1))
    caches.read(tmp_path / "a")
    caches.write(tmp_path / "e", bytes(3000), MOST)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "d", "e"]


def test_without_a_home_there_is_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert caches.folder().is_absolute()
