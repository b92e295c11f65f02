"""`dspark verify-lossless` on the embedded pair: what it says and its exit code."""

from __future__ import annotations

import json
import shutil

import pytest

from cli.command import is_one_line_error, run, run_json
from dspark.types import Verdict
from dspark.verify import Coupled

FEW = ("--prompts", "2", "--max-tokens", "12", "--dtype", "float32", "--batch", "2", "--temperature", "1")


def test_the_embedded_pair_is_lossless(capsys):
    code, out, _ = run(capsys, "verify-lossless", *FEW)
    assert code == 0
    assert "2 of 2 texts identical" in out and out.rstrip().endswith("lossless")


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_a_deterministic_target_needs_no_excuse_in_bfloat16(capsys):
    few = ("--prompts", "3", "--max-tokens", "16", "--dtype", "bfloat16", "--batch", "3", "--temperature", "0")
    result = run_json(capsys, "verify-lossless", *few, "--deterministic")
    assert result["lossless"] and result["token_checks"][0]["identical"] == 3
    assert result["draft_tokens_accepted"] > 0


def test_it_says_where_no_draft_token_was_read(capsys):
    code, _, err = run(capsys, "verify-lossless", *FEW, "--scheduler", "fixed:0")
    assert code == 0 and "at temperature 1 the scheduler fixed:0 had no draft token read" in err
    code, _, err = run(capsys, "verify-lossless", *FEW)
    assert code == 0 and "had no draft token read" not in err


def test_json(capsys):
    result = run_json(capsys, "verify-lossless", *FEW, "--rule", "rejection", "--samples", "40", "--batch", "20")
    assert result["lossless"] and not result["token_checks"]
    assert result["law_checks"][0]["samples"] == 40


def test_a_broken_rule_is_found_and_kept(capsys, monkeypatch, tmp_path):
    rule = Coupled.verify

    def careless(self, draft, keep, logits, requests):
        return Verdict(keep.clone(), rule(self, draft, keep, logits, requests).next_tokens)

    monkeypatch.setattr(Coupled, "verify", careless)
    kept = tmp_path / "kept.jsonl"
    code, out, _ = run(capsys, "verify-lossless", *FEW, "--keep", str(kept))
    assert code == 1
    assert "UNEXPLAINED" in out and "NOT lossless" in out
    trace = json.loads(kept.read_text().splitlines()[0])
    assert trace["token_ids"] != trace["plain_token_ids"] and not trace["explained"]


@pytest.mark.parametrize("bad", [("--prompts", "0"), ("--batch", "0"), ("--prompts-file", "no/such/file")])
def test_mistakes_are_one_line(capsys, bad):
    code, _, err = run(capsys, "verify-lossless", *bad)
    assert code == 2 and is_one_line_error(err)
