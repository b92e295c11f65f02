"""`dspark generate` on the embedded pair: what it writes, where, and how it ends."""

from __future__ import annotations

import io
import itertools
import json
import os
import pty
import re
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cli.command import PAIR, is_one_line_error, run, run_json, start
from dspark import Engine, SamplingParams, StepRecord
from dspark.cli.generate import _SAMPLING
from dspark.cli.main import main

Capture = pytest.CaptureFixture[str]
PROMPT = "What does the word river mean?"
SHORT = ("--max-tokens", "24", "--dtype", "float32")
LONG = ("--max-tokens", "1500", "--ignore-eos", "--seed", "1")


# -- output ---------------------------------------------------------------------------------------------------------


def test_json_is_one_object_of_this_shape(capsys: Capture) -> None:
    result = run_json(capsys, "generate", PROMPT, *SHORT, "--temperature", "0")
    assert list(result) == ["text", "token_ids", "finish_reason", "tau", "tokens_per_second", "rounds", "scheduling"]
    assert result["finish_reason"] in ("stop", "length")
    assert 1 <= len(result["token_ids"]) <= 24
    assert result["tokens_per_second"] > 0
    assert all(accepted <= verified <= drafted <= 7 for drafted, verified, accepted in result["rounds"])
    steps = result["scheduling"]["steps"]
    assert [(s["budget"], s["accepted"]) for s in steps] == [(r[1], r[2]) for r in result["rounds"]]
    assert all(s["tokens_per_second_in_hindsight"] >= s["tokens_per_second"] > 0 for s in steps[1:])
    assert result["tau"] == pytest.approx(sum(r[2] + 1 for r in result["rounds"]) / len(result["rounds"]))


def test_text_goes_to_stdout_and_the_rest_to_stderr(capsys: Capture) -> None:
    options = (*SHORT, "--seed", "3", "--scheduler", "fixed:7")
    expected = run_json(capsys, "generate", PROMPT, *options)
    code, out, err = run(capsys, "generate", PROMPT, *options)
    assert code == 0
    assert out.removesuffix("\n") == expected["text"].removesuffix("\n")
    closing_line = err.strip().splitlines()[-2]  # the last one is about scheduling
    assert re.search(r"24 tokens in [\d.]+ s \([\d.]+ tokens/s.*tau \d\.\d\d over \d+ target passes", closing_line)
    assert re.search(r"accepted/reached by draft position: \d+/\d+", closing_line)


@pytest.mark.parametrize("temperature", ["0", "0.7", "1"])
def test_speculation_changes_no_token(capsys: Capture, temperature: str) -> None:
    options = (*SHORT, "--seed", "5", "--temperature", temperature)
    plain = run_json(capsys, "generate", PROMPT, *options, "--drafter", "none")
    assert plain["tau"] == 1
    assert run_json(capsys, "generate", PROMPT, *options)["token_ids"] == plain["token_ids"]
    assert run_json(capsys, "generate", PROMPT, *options, "--scheduler", "fixed:2")["token_ids"] == plain["token_ids"]
    for way in (("--drafter", "none"), ("--scheduler", "fixed:7")):
        assert run_json(capsys, "generate", PROMPT, *options, *way, "--overlap")["token_ids"] == plain["token_ids"]


def test_compare_says_how_much_faster_and_whether_the_same(capsys: Capture) -> None:
    code, out, err = run(capsys, "generate", PROMPT, *SHORT, "--temperature", "0", "--compare")
    assert code == 0
    assert out
    assert re.search(r"speculative [\d.]+ tokens/s, plain [\d.]+ tokens/s: [\d.]+x \(.*run", err)
    assert "token ids are identical to plain decoding" in err


def test_compare_in_json(capsys: Capture) -> None:
    result = run_json(capsys, "generate", PROMPT, *SHORT, "--compare")  # no seed: both runs get the same new one
    comparison = result["compare"]
    assert comparison["identical"] is True
    assert comparison["first_difference"] is None
    assert comparison["speedup"] == pytest.approx(result["tokens_per_second"] / comparison["plain_tokens_per_second"])


def test_a_prompt_from_stdin_loses_the_newline_that_echo_adds(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    options = (*SHORT, "--temperature", "0")
    monkeypatch.setattr(sys, "stdin", io.StringIO(PROMPT + "\n"))
    assert run_json(capsys, "generate", "-", *options)["text"] == run_json(capsys, "generate", PROMPT, *options)["text"]


def test_stop_strings_raw_prompts_and_system_messages_reach_the_engine(capsys: Capture) -> None:
    options = (*SHORT, "--temperature", "0")
    text = run_json(capsys, "generate", PROMPT, *options)["text"]
    stop = text[3:6]
    assert run_json(capsys, "generate", PROMPT, *options, "--stop", stop)["text"] == text[: text.index(stop)]
    assert run_json(capsys, "generate", PROMPT, *options, "--raw")["text"] != text
    run_json(capsys, "generate", PROMPT, *options, "--system", "Answer in one word.")


def test_help_names_the_real_defaults() -> None:
    defaults = SamplingParams()
    for name, (kind, text) in _SAMPLING.items():
        if named := re.search(r"\(default ([\d.]+)", text):
            assert kind(named[1]) == getattr(defaults, name.replace("-", "_"))


# -- terminals and pipes ----------------------------------------------------------------------------------------------


def test_a_pipe_gets_plain_text() -> None:
    process = start("generate", PROMPT, *SHORT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0
    assert out
    assert b"\x1b" not in out + err


@pytest.mark.parametrize(("env", "colours"), [({}, True), ({"NO_COLOR": "1"}, False)], ids=["colour", "NO_COLOR"])
def test_a_terminal_sees_which_tokens_were_drafted(capsys: Capture, env: dict[str, str], colours: bool) -> None:
    options = (*SHORT, "--temperature", "0", "--scheduler", "fixed:7")
    expected = run_json(capsys, "generate", PROMPT, *options)
    assert sum(accepted for _, _, accepted in expected["rounds"]) > 0, "this test needs accepted draft tokens"
    ours, theirs = pty.openpty()
    process = start("generate", PROMPT, *options, stdout=theirs, env={"TERM": "xterm", "NO_COLOR": "", **env})
    process.communicate(timeout=120)
    os.close(theirs)
    shown = os.read(ours, 65536).decode().replace("\r\n", "\n")
    os.close(ours)
    assert ("\x1b[32m" in shown) == colours
    assert re.sub(r"\x1b\[\d+m", "", shown).removesuffix("\n") == expected["text"].removesuffix("\n")


def test_ctrl_c_keeps_what_was_printed() -> None:
    process = start("generate", PROMPT, *LONG)
    assert process.stdout and process.stderr
    first = process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert (first + out).strip()
    assert re.search(rb"interrupted: \d+ tokens in .* tokens/s.* tau ", err)
    assert b"Traceback" not in err


def test_ctrl_c_still_gives_the_object(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    step, num_steps = Engine.step, itertools.count()

    def interrupted_step(engine: Engine) -> StepRecord:
        if next(num_steps) == 5:
            raise KeyboardInterrupt
        return step(engine)

    monkeypatch.setattr(Engine, "step", interrupted_step)
    code, out, _ = run(capsys, "generate", PROMPT, *LONG, "--json", "--compare")
    assert code == 130
    result = json.loads(out)
    assert result["finish_reason"] == "cancelled"
    assert 5 <= len(result["token_ids"]) <= 5 * 8
    assert len(result["rounds"]) == 4, "the first pass reads the prompt"


def test_a_reader_that_leaves_ends_the_run_quietly() -> None:
    process = start("generate", PROMPT, *LONG)
    assert process.stdout and process.stderr
    process.stdout.read(1)
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(timeout=60) == 141
    assert b"Traceback" not in err
    assert b"BrokenPipe" not in err


def test_a_text_that_fills_the_context_says_why_it_ends(capsys: Capture, tmp_path: Path) -> None:
    folder = shutil.copytree(PAIR / "target", tmp_path / "short")
    config = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": 40}
    (folder / "config.json").write_text(json.dumps(config))
    asked = ("generate", PROMPT, "--target", str(folder), "--ignore-eos", "--seed", "1")
    code, _, err = run(capsys, *asked, "--max-tokens", "100")
    assert code == 0 and "fill the 40 tokens" in err
    assert "fill the" not in run(capsys, *asked, "--max-tokens", "5")[2]


# -- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((PROMPT, "--temperature", "nan"), "temperature"),
        ((PROMPT, "--temperature", "-1"), "temperature"),
        ((PROMPT, "--temperature", "inf"), "temperature"),
        ((PROMPT, "--top-p", "0"), "top_p"),
        ((PROMPT, "--max-tokens", "0"), "max_tokens"),
        ((PROMPT, "--stop", ""), "stop"),
        ((PROMPT, "--threads", "0"), "--threads"),
        ((PROMPT, "--raw", "--system", "Be kind"), "--system"),
        (("",), "empty"),
        (("", "--raw"), "empty"),
        (("", "--system", "Be kind"), "empty"),
        (("river " * 3000,), "tokens"),
        ((PROMPT, "--drafter", "oracle"), "oracle"),
        ((PROMPT, "--drafter", "no/such/folder"), "no/such/folder"),
        ((PROMPT, "--drafter", "missing.py:make"), "missing.py"),
        ((PROMPT, "--target", "./no/such/folder"), "no/such/folder"),
        ((PROMPT, "--scheduler", "clairvoyant"), "clairvoyant"),
        ((PROMPT, "--scheduler", "fixed:-1"), "fixed"),
        ((PROMPT, "--deterministic", "--tree", "9"), "--tree"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(capsys: Capture, argv: tuple[str, ...], message: str) -> None:
    code, out, err = run(capsys, "generate", *argv)
    assert code == 2
    assert out == ""
    assert is_one_line_error(err)
    assert message in err


@pytest.mark.parametrize(
    "argv",
    [
        ("generate", PROMPT, "--scheduler", "fixed:-1"),
        ("generate", PROMPT, "--scheduler", "optimal", "--rule", "rejection"),
        ("generate", PROMPT, "--drafter", "oracle"),
        ("generate", PROMPT, "--drafter", "missing.py:make"),
        ("generate", PROMPT, "--drafter", "dspark", "--target", "elsewhere"),
        ("generate", PROMPT, "--temperature", "-1"),
        ("generate", PROMPT, "--overlap"),
        ("chat", "--overlap", "--scheduler", "optimal"),
        ("generate", PROMPT, "--overlap", "--drafter", "none", "--rule", "rejection"),
        ("serve", "--overlap"),
        ("generate", ""),
        ("chat", "--top-p", "2"),
        ("compare", "none", "dspark,scheduler=fixed"),
        ("compare", "none", "dspark", "--temperature", "nan"),
        ("verify-lossless", "--drafter", "oracle"),
        ("verify-lossless", "--temperature", "0", "-1"),
        ("compare", "none", "dspark", "--prompts", "1"),
        ("generate", PROMPT, "--deterministic", "--compile"),
        ("serve", "--deterministic", "--compile"),
        ("verify-lossless", "--deterministic", "--compile"),
        ("doctor", "tiny", "tiny"),
    ],
)
def test_what_can_be_refused_is_refused_before_a_model_is_loaded(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, argv: tuple[str, ...]
) -> None:
    monkeypatch.setattr("dspark.target.loading.load_target", lambda *_, **__: pytest.fail("a model is being loaded"))
    code, _, err = run(capsys, *argv)
    assert code == 2 and is_one_line_error(err)


@pytest.mark.parametrize(
    "argv", [["frobnicate"], ["generate"], ["generate", PROMPT, "--top-k", "many"], ["generate", PROMPT, "--x"]]
)
def test_a_wrong_command_line_is_exit_code_2(capsys: Capture, argv: list[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(argv)
    assert error.value.code == 2
    assert "usage: dspark" in capsys.readouterr().err


def test_without_a_verb_it_says_what_there_is(capsys: Capture) -> None:
    code, out, err = run(capsys)
    assert code == 2 and not out and "generate" in err and "verify-lossless" in err


def _empty(folder: Path) -> None:
    pass


def _broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def _broken_weights(folder: Path) -> None:
    shutil.copytree(PAIR / "target", folder, dirs_exist_ok=True)
    (folder / "model.safetensors").write_bytes(b"not weights")


@pytest.mark.parametrize("make", [_empty, _broken_config, _broken_weights])
def test_a_folder_that_cannot_be_read_is_named(capsys: Capture, tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path)
    code, _, err = run(capsys, "generate", PROMPT, "--target", str(tmp_path))
    assert code == 2
    assert is_one_line_error(err)
    assert str(tmp_path) in err


def test_without_a_chat_template_raw_is_the_way(capsys: Capture, tmp_path: Path) -> None:
    shutil.copytree(PAIR / "target", tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("chat_template*"))
    code, _, err = run(capsys, "generate", PROMPT, "--target", str(tmp_path), *SHORT)
    assert code == 2
    assert is_one_line_error(err)
    assert "--raw" in err
    assert run_json(capsys, "generate", PROMPT, "--target", str(tmp_path), *SHORT, "--raw")["tau"] == 1
