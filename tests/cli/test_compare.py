"""`dspark compare` on the embedded pair: what it finds, keeps and refuses."""

from __future__ import annotations

import json

import pytest

from tests.cli.command import is_one_line_error, run, run_json

FEW = ("--prompts", "4", "--max-tokens", "16", "--repeats", "1", "--dtype", "float32")


def test_drafters_write_the_same_text_in_fewer_passes(capsys):
    found = run_json(capsys, "compare", "none", "dspark,scheduler=fixed:7", *FEW)
    plain, drafted = found["runs"]
    assert plain["tau"] == 1 and drafted["tau"] > 1.2
    (comparison,) = found["comparisons"]
    assert comparison["same_text"] == 1
    assert comparison["tau"]["value"] == pytest.approx(drafted["tau"])
    ratio = drafted["tokens_per_second"] / plain["tokens_per_second"]
    assert comparison["speed"]["value"] == pytest.approx(ratio)


def test_a_kept_run_is_a_gate_for_the_next_one(capsys, tmp_path):
    kept, gate, prompts = (str(tmp_path / name) for name in ("run.json", "gate.toml", "prompts.jsonl"))
    with open(prompts, "w") as file:
        for i in range(4):
            file.write(
                json.dumps(
                    {
                        "prompt": f"Tom has {i} apples and buys 7 more. How many apples does he have?",
                        "domain": "math" if i % 2 else "chat",
                    }
                )
                + "\n"
            )
    few = (*FEW[2:], "--prompts-file", prompts)
    with open(gate, "w") as file:
        file.write("[tau]\nmax_drop = 0.0\n[same_text]\nat_least = 1.0\n")
    code, _, err = run(capsys, "compare", "dspark,scheduler=fixed:7", "--save", kept, *few)
    assert code == 0, err
    code, out, _ = run(capsys, "compare", "dspark,scheduler=fixed:7", "--against", kept, "--gate", gate, *few)
    assert code == 0 and "REGRESSION" not in out and "no regression" in out and "on math" in out
    code, out, _ = run(capsys, "compare", "none", "--against", kept, "--gate", gate, *few)
    assert code == 1 and "REGRESSION: tau of none" in out
    code, _, err = run(capsys, "compare", "none", "--against", kept, *FEW)
    assert code == 2 and is_one_line_error(err) and "same prompts" in err and "decoding" not in err


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("none",), "two setups"),
        (("none", "none"), "once"),
        (("none", "dspark,length=3"), "length"),
        (("none", "dspark", "--repeats", "0"), "--repeats"),
        (("none", "dspark", "--gate", "nowhere.toml"), "no gate"),
        (("none", "--against", "nowhere.json"), "no saved run"),
        (("none", "dspark", "--prompts", "1"), "two batches"),
        (("none", "dspark", "--prompts-file", "nowhere.txt"), "cannot be read"),
    ],
)
def test_mistakes_are_one_line(capsys, arguments, why):
    code, _, err = run(capsys, "compare", *arguments)
    assert code == 2 and is_one_line_error(err) and why in err, err
