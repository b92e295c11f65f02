"""The C++ kernels: noise and tokens, bit for bit those of torch, and life without a compiler. Attention is in test_kernels.py."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from dspark import noise, sampling
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


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("vocab_size", [1, 5, 16, 63, 1000, 20_000])
def test_the_largest_is_the_same_as_without_the_kernel(vocab_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Among scores that are nearly or wholly equal, excluded, infinite or no numbers, hot and cold."""
    assert native.load()
    numbers = torch.Generator().manual_seed(vocab_size)
    rows = torch.empty(48, vocab_size).exponential_(generator=numbers).log_().neg_()
    heats = torch.tensor([0.0, 0.3, 0.7, 1.0]).repeat(12)[:, None]
    scores = torch.randn(48, vocab_size, generator=numbers)
    scores[8:24] = 3.0 - heats[8:24] * rows[8:24]  # all sums within a rounding of 3
    scores[24:28] = scores[24:28].round()
    scores[28:32] = float("-inf")
    scores[32:36].masked_fill_(torch.rand(4, vocab_size, generator=numbers) < 0.5, float("-inf"))
    for row in range(36, 44):
        odd = torch.randint(vocab_size, (2,), generator=numbers)
        scores[row, odd] = float("nan") if row < 40 else float("inf")
    sampled, greedy = [], []
    for kernel in (torch.ops.dspark.largest.default, None):
        monkeypatch.setattr(noise, "largest", kernel)
        sampled.append(sampling._largest(scores, heats, rows))
        greedy.append(sampling._largest(scores.T.contiguous().T, heats, None))
    assert torch.equal(*sampled) and torch.equal(*greedy)
    assert vocab_size < 16 or not torch.equal(sampled[0], greedy[0])


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
