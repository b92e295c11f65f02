"""What is counted on our side, and which exports vLLM's CPU build can run."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from benchmarks.vllm_acceptance import method_for, rounds_until
from dspark.checkpoints import open_checkpoint
from dspark.checkpoints.convert import convert

PAIR = Path(__file__).parents[2] / "pairs" / "tiny"


@pytest.mark.parametrize(
    ("num_tokens", "counted"),
    [(1, []), (2, [3]), (5, [3]), (6, [3, 0]), (7, [3, 0, 2]), (9, [3, 0, 2]), (10, [3, 0, 2, 1])],
)
def test_rounds_count_whole_if_they_begin_before_the_end(num_tokens, counted):
    assert rounds_until([3, 0, 2, 1], num_tokens) == counted


def test_a_block_drafter_without_a_head_becomes_vllms_dflash(tmp_path):
    convert(open_checkpoint(str(PAIR / "dflash")), "speculators", tmp_path / "d")
    assert method_for(tmp_path / "d") == "dflash"
    config = json.loads((tmp_path / "d" / "config.json").read_text())
    assert config["speculators_model_type"] == "dflash" and config["aux_hidden_state_layer_ids"] == [4, 7, 11, 13]
    assert (
        load_file(tmp_path / "d" / "model.safetensors").keys() == open_checkpoint(str(PAIR / "dflash")).tensors.keys()
    )


def test_a_head_that_vllm_would_leave_out_is_refused(tmp_path):
    convert(open_checkpoint(str(PAIR / "dspark")), "speculators", tmp_path / "d")
    with pytest.raises(SystemExit, match="refuses DSpark"):
        method_for(tmp_path / "d")
