"""What measurements are true of: seconds of this hardware, these models and versions; beliefs of these models alone."""

from __future__ import annotations

import hashlib
import logging
import platform
from pathlib import Path

import torch

from dspark.budget import calibration
from dspark.budget.beliefs import LiveBeliefs
from dspark.target.target import Target
from dspark.types import Drafter

log = logging.getLogger(__name__)


def fingerprint(target: Target, drafter: Drafter, is_compiled: bool, is_overlapped: bool = False) -> dict[str, str]:
    """Seconds measured under one fingerprint mean nothing under another."""
    ahead = {"loop": "overlapped"} if is_overlapped else {}  # a phase's seconds are then not those of its work
    return ahead | {
        "hardware": _hardware(target.device),
        "threads": str(torch.get_num_threads()) if target.device.type == "cpu" else "-",
        "target": _model(target),
        "drafter": f"{type(drafter).__name__} {drafter.length} {list(drafter.feature_layers)}",
        "dtype": str(target.dtype).removeprefix("torch."),
        "compiled": "deterministic" if target.is_deterministic else str(is_compiled),
        "torch": torch.__version__,
    }


def live_beliefs(target: Target, drafter: Drafter, rule: str) -> LiveBeliefs:
    """Beliefs about this pair that start from the drafter's own calibration, if it has one."""
    known: calibration.Calibration | None = getattr(drafter, "calibration", None)
    if known is not None and known.origin is not None and known.origin.rule != rule:
        log.warning(
            "the drafter is calibrated for the %s rule and this is the %s rule: its confidences are off until they have "
            "been learned from; dspark calibrate --rule %s mends that",
            known.origin.rule,
            rule,
            rule,
        )
    folder: Path | None = getattr(drafter, "folder", None)
    weights = f"{type(drafter).__name__} {drafter.length}" if folder is None else calibration.fingerprint(folder)
    identity = hashlib.sha256(f"{_model(target)} {weights} {rule}".encode()).hexdigest()[:16]
    return LiveBeliefs(known, max(1, drafter.length), identity=identity)


def _model(target: Target) -> str:
    facts = [(name, value) for name, value in target.config.to_dict().items() if not name.startswith("_")]
    shape = hashlib.sha256(str(sorted(facts, key=str)).encode()).hexdigest()[:8]
    return f"{target.name} {target.num_parameters} {shape}"


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpus = Path("/proc/cpuinfo")
    if cpus.exists():
        for line in cpus.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
