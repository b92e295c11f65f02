"""The C++ kernels: noise, bit for bit that of torch, and life without a compiler. Attention is in test_kernels.py."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from dspark import noise
from dspark.target import kernels, native


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("vocab_size", [1, 5, 64, 1000])
def test_noise_has_the_same_bits_as_without_the_kernel(vocab_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert native.load()
    for seed, position, stream in ((0, 0, 0), (2**63 - 1, 2**20 + 3, 2), (12345, 7, 1)):
        rows = []
        for kernel in (torch.ops.dspark.keyed_uniform, None):
            monkeypatch.setattr(noise, "keyed_uniform", kernel)
            rows.append(noise.gumbel(seed, position, 6, vocab_size, stream, torch.device("cpu")))
        assert torch.equal(*rows)


def test_a_missing_compiler_is_said_and_torch_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(native, "attend_slots", None)
    native.load.cache_clear()
    try:
        assert not native.load()
    finally:
        native.load.cache_clear()
    assert "no-such-compiler" in caplog.text
    assert kernels.kernel_for(torch.zeros(1, 2, 8), 1) is None


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_a_compiler_may_be_several_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "env g++")
    assert native.machine()


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX")
def test_kernels_that_others_can_have_written_are_built_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def compile(command: list[str], **_: object) -> None:
        Path(command[command.index("-o") + 1]).write_text("ours")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "machine", lambda: ("a machine",))
    monkeypatch.setattr(subprocess, "run", compile)
    umask = os.umask(0o002)  # usual where every user has a group
    try:
        path = native._build()
        assert path.stat().st_mode & 0o777 == 0o755
        path.write_text("built before")
        assert native._build().read_text() == "built before"
        path.chmod(0o775)
        assert native._build().read_text() == "ours"
    finally:
        os.umask(umask)
