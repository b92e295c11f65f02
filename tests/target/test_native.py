"""The C++ kernels: noise, bit for bit that of torch, and life without a compiler. Attention is in test_kernels.py."""

from __future__ import annotations

import shutil

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
