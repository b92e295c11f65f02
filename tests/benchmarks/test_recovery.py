"""The recovery benchmark on the embedded pair: every step is seen, on both sides of the switch."""

from __future__ import annotations

import math

import torch

from benchmarks import recovery
from dspark import load_drafter, load_target


def test_a_switch_is_seen_step_by_step(monkeypatch):
    monkeypatch.setattr(recovery, "BEFORE", 12)
    monkeypatch.setattr(recovery, "AFTER", 8)
    monkeypatch.setattr(recovery, "WINDOW", 4)
    monkeypatch.setattr(recovery, "_SHOWN_BEFORE", 8)
    target = load_target("tiny")
    drafter = load_drafter("dspark", target)
    threads = torch.get_num_threads()
    seen = recovery.switch(target, drafter, [[5, 6, 7]], [[8, 9]], threads=threads, num=2, seed=0)
    assert torch.get_num_threads() == threads
    assert len(seen.believed) == len(seen.cost_error) == 20
    known, happened = torch.cat(seen.known), torch.cat(seen.happened)
    assert known.any() and not (happened & ~known).any() and (~happened[known]).any()
    errors = recovery.curves([seen])
    assert errors["steps"] == [-6, -2, 2, 6]
    assert all(0 <= e <= 1 for name in ("calibration", "chance") for e in errors[name])
    assert all(math.isfinite(e) for e in errors["cost"])
    assert not target.cache.limit - target.num_free_slots  # whoever was cut off holds nothing
