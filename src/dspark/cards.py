"""What a CUDA card can run, as it is installed here."""

from __future__ import annotations

import importlib
import logging
import subprocess
from functools import cache

import torch

_log = logging.getLogger(__name__)


@cache
def runs_triton(device: torch.device) -> bool:
    """Whether Triton's kernels work there. Installed is not enough: it compiles them with the machine's C compiler,
    against Python's headers, for a driver that may be too old."""
    try:
        importlib.import_module("dspark.triton_probe").probe(device)
    except (ImportError, RuntimeError, OSError, AssertionError, subprocess.SubprocessError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        _log.warning("%s runs without Triton's kernels, slower: %s", device, reason[0])
        return False
    return True
