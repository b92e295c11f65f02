"""The command as a whole on the smallest shape, and what it says of its aims."""

from __future__ import annotations

import json

import pytest

from benchmarks import gpu
from benchmarks.gpu_overlap import OverlapRow
from benchmarks.gpu_report import DecodeRow, aims
from benchmarks.gpu_sections import RoundRow, step_sizes


def test_sections_end_in_one_file(tmp_path, capsys):
    few = ["--most-tokens", "2", "--requests", "1,2", "--contexts", "16", "--repeats", "2", "--minutes", "1"]
    file = tmp_path / "gpu.json"
    gpu.main(
        [
            "--shape",
            "tiny",
            "--device",
            "cpu",
            "--sections",
            "steps,captured,tilings,kernels,overlap,rounds",
            *few,
            "--json",
            str(file),
        ]
    )
    found = json.loads(file.read_text())
    assert [(r["requests"], r["tokens"], r["context"]) for r in found["steps"]] == [(1, 1, 16), (2, 2, 16)]
    assert [(r["requests"], r["tokens"]) for r in found["captured"]] == [(1, 1), (2, 2)]
    assert all(r["captured"] > 0 and r["compiled"] is None for r in found["captured"])
    assert found["tilings"] == []  # nothing to tune without CUDA
    assert [(r["what"], r["tokens"]) for r in found["kernels"]] == [("attention", n) for n in (1, 8, 2, 16)]
    assert [(r["requests"], r["policy"]) for r in found["overlap"]] == [
        (n, policy) for n in (1, 2) for policy in ("off", "fixed:7")
    ]
    assert all(r["is_same"] and r["plain"] > 0 and 0 < r["host"] <= r["overlapped"] for r in found["overlap"])
    assert [r["requests"] for r in found["rounds"]] == [1, 2]
    assert all(r["floor"] > 0 and r["seconds"] > 0 for r in found["steps"])
    assert "replayed: tau 4.73" in found["machine"]["acceptance"]
    assert "aim at most 1.25x" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [["--sections", "stepz"], ["--peers", "eager,vllm"], ["--shape", "gpt-5"]])
def test_unknown_words_are_refused(wrong, capsys):
    with pytest.raises(SystemExit) as ended:
        gpu.parse(wrong)
    assert ended.value.code == 2
    assert wrong[1].split(",")[-1] in capsys.readouterr().err


def test_sizes_cover_plain_steps_and_drafts_at_every_context():
    sizes = step_sizes(512, [512, 2048])
    some = {(1, 8, 512), (64, 8, 512), (1, 128, 512), (32, 8, 2048), (1, 1, 2048)}
    assert {(n, 1, 512) for n in (1, 8, 512)} | some <= set(sizes)
    assert max(n * each for n, each, _ in sizes) == 512


def test_aims_are_judged_by_what_was_found():
    row = RoundRow(1, 512, plain=4.0, draft=1.0, verify=3.8, plain_floor=3.4, draft_floor=0.5, plain_busy=1, busy=0.9)
    rates = {"ours: plain": 100.0, "ours: dspark@fixed:3": 200.0, "ours: dspark@auto": 190.0}
    decode = DecodeRow(64, rates, 500.0, {}, 1, [])
    reached = {line: is_reached for is_reached, line in aims({"rounds": [row], "decode": [decode]})}
    assert list(reached.values()) == [True, False, True, True, False]
    assert "64 requests: auto over the best fixed length 0.95x, aim 0.98x" in reached


def test_loops_are_compared_where_a_device_tells_how_busy_it_is():
    row = OverlapRow(4, 512, "off", 5.0, 4.0, host=1.5, plain_busy=0.8, busy=0.98, floor=3.0, is_same=False)
    assert [is_reached for is_reached, _ in aims({"overlap": [row]})] == [False, True, True]
