"""A card that Triton does not work on is found out at once, said once, and served without it."""

from __future__ import annotations

import logging
import subprocess

import pytest
import torch

pytest.importorskip("triton")

from dspark import cards, triton_probe

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def test_the_smallest_kernel_works() -> None:
    triton_probe.probe(DEVICE)
    assert cards.runs_triton(DEVICE)


@pytest.mark.parametrize(
    "fault",
    [RuntimeError("Failed to find C compiler.\nPlease"), subprocess.CalledProcessError(1, "gcc"), ImportError("a")],
)
def test_a_machine_without_what_it_takes(
    fault: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(device: torch.device) -> None:
        raise fault

    monkeypatch.setattr(triton_probe, "probe", fail)
    cards.runs_triton.cache_clear()
    with caplog.at_level(logging.WARNING, "dspark.cards"):
        assert [cards.runs_triton(DEVICE) for _ in range(2)] == [False, False]
    cards.runs_triton.cache_clear()
    (line,) = caplog.messages
    assert line.startswith(f"{DEVICE} runs without Triton's kernels, slower: {str(fault).splitlines()[0]}")
