"""`dspark serve` as a process: how it starts, what it refuses, and that SIGTERM loses nothing."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from cli.command import PAIR, is_one_line_error, run, running_in_group, start
from dspark.cli.serve import add_arguments, watched_engine
from dspark.errors import InvalidConfiguration

CHAT = {"messages": [{"role": "user", "content": "What is a river?"}], "temperature": 0}


@contextmanager
def running(*argv: str, **env: str) -> Iterator[tuple[str, object, list[str]]]:
    """(url, process, lines of stderr so far) of a server on a free port."""
    options = ("--port", "0", "--dtype", "float32", "--threads", "1", *argv)
    process = start("serve", *options, env=env, start_new_session=True)
    lines: list[str] = []
    ready = threading.Event()

    def read() -> None:
        for line in process.stderr:
            lines.append(line.decode())
            if "Ctrl-C ends it" in lines[-1]:
                ready.set()

    reader = threading.Thread(target=read)
    reader.start()
    try:
        assert ready.wait(60), "".join(lines)
        url = re.search(r"http://\S+", next(line for line in lines if "serving" in line)).group()
        httpx.get(url + "/ready", timeout=10).raise_for_status()
        yield url, process, lines
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(30)
        deadline = time.monotonic() + 30
        while running_in_group(process.pid) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not running_in_group(process.pid)
        reader.join(30)
        process.stdout.close()
        process.stderr.close()


def test_options_hold_and_sigterm_finishes_what_runs_and_what_waits(tmp_path: Path) -> None:
    beliefs = tmp_path / "beliefs.json"
    options = ("--max-num-seqs", "2", "--served-model-name", "mine", "--max-model-len", "200", "--seed", "5")
    (tmp_path / "keys").write_text("another\n")
    options += ("--beliefs", str(beliefs), "--api-key-file", str(tmp_path / "keys"))
    with running(*options, DSPARK_API_KEY="key", XDG_CACHE_HOME=str(tmp_path)) as (url, process, lines):
        headers = {"Authorization": "Bearer key"}
        assert httpx.get(url + "/v1/models").status_code == 401
        assert httpx.get(url + "/v1/models", headers={"Authorization": "Bearer another"}).status_code == 200
        models = httpx.get(url + "/v1/models", headers=headers).json()["data"]
        assert [(m["id"], m["max_model_len"]) for m in models] == [("mine", 200)]
        sampled = {**CHAT, "temperature": 1, "max_tokens": 20}
        replies = [httpx.post(url + "/v1/chat/completions", json=sampled, headers=headers, timeout=60) for _ in "ab"]
        assert len({reply.json()["choices"][0]["message"]["content"] for reply in replies}) == 1  # --seed
        assert "vllm:spec_decode_num_drafts_total" in httpx.get(url + "/metrics").text
        body = {**CHAT, "max_tokens": 150, "ignore_eos": True, "stream": True}
        texts: dict[int, str] = {}
        begun = threading.Barrier(5)

        def call(i: int) -> None:
            with httpx.stream("POST", url + "/v1/chat/completions", json=body, headers=headers, timeout=60) as reply:
                events = reply.iter_lines()
                texts[i] = next(events)
                begun.wait(60)
                texts[i] += "\n".join(events)

        threads = [threading.Thread(target=call, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        begun.wait(60)
        os.killpg(process.pid, signal.SIGTERM)  # as Ctrl-C in a terminal does: the engine's process gets it, too
        for thread in threads:
            thread.join(60)
        assert process.wait(60) == 0
        contents = {
            "".join(re.findall(r'"content":("(?:[^"\\]|\\.)*")', text)).replace('""', "") for text in texts.values()
        }
        assert len(texts) == 4
        assert len(contents) == 1, "the same request, the same text, however it waited"
        assert all('"finish_reason":"length"' in text and "[DONE]" in text for text in texts.values())
        assert "Traceback" not in "".join(lines)
    logged = [json.loads(line) for line in lines if line.startswith("{")]
    assert sum(entry.get("completion_tokens") == 150 for entry in logged) == 4
    assert any("4 requests are being finished" in entry["message"] for entry in logged)
    assert "river" not in "".join(lines)
    assert json.loads(beliefs.read_text())["classes"][""]["num_rounds"] > 0  # what was learned outlives the process
    (costs,) = (tmp_path / "dspark" / "capacity").glob("*.json")
    assert json.loads(costs.read_text())["decoding"]["places"]


def test_a_tokenizers_own_code_and_what_a_killed_engine_leaves(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(PAIR / "target", folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.Own"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "own.py").write_text("from transformers import PreTrainedTokenizerFast as T\nclass Own(T): pass\n")
    with running(str(folder), "--trust-remote-code", HF_HOME=str(tmp_path)) as (url, process, lines):
        assert httpx.post(url + "/tokenize", json={"prompt": "a river"}).json()["count"] > 1
        for pid in running_in_group(process.pid):
            if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)
        assert process.wait(60) == 1
    assert any("exit code -9" in line for line in lines)


def test_what_is_not_installed_is_said_before_anything_is_loaded(capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    monkeypatch.setattr("dspark.serve.engine_process.EngineProcess.__init__", pytest.fail)
    code, _, err = run(capsys, "serve", "--port", "0")
    assert (code, is_one_line_error(err)) == (2, True)
    assert 'serving needs llguidance: pip install "dspark[serve]"' in err


@pytest.mark.parametrize(("option", "name"), [("--scheduler", "fixd:7"), ("--drafter", "dsprak")])
def test_names_that_mean_nothing_are_refused_before_anything_is_loaded(option: str, name: str, monkeypatch) -> None:
    monkeypatch.setattr("dspark.cli.serve.open_target", lambda *_, **__: pytest.fail("a target is loaded"))
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    args = parser.parse_args([option, name])
    with pytest.raises(InvalidConfiguration, match=name):
        watched_engine(args)


def test_bad_options_are_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        code, _, err = run(capsys, "serve", "--port", str(taken.getsockname()[1]))
        assert (code, is_one_line_error(err), "cannot listen on" in err) == (2, True, True)
    (tmp_path / "keys").write_text("\n")
    for argv, words in (
        (("--api-key-file", str(tmp_path / "none")), "--api-key-file cannot be read"),
        (("--api-key-file", str(tmp_path / "keys")), "holds no key"),
        (("--api-key", ""), "--api-key is empty"),
        (("--host", "nowhere.invalid"), "cannot listen on"),
        (("--port", "0", str(tmp_path / "no-model")), "no-model"),
    ):
        code, _, err = run(capsys, "serve", *argv)
        assert (code, is_one_line_error(err), words in err) == (2, True, True), err


def test_chat_keeps_the_conversation(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from dspark import Engine, SamplingParams, load_target

    lines = ["What is a river?", "", "And a lake?", "x" * 20_000, "/new", "And a lake?", "/quit", "never read"]
    monkeypatch.setattr("builtins.input", lambda prompt: lines.pop(0))
    code, out, err = run(capsys, "chat", "--temperature", "0", "--max-tokens", "12", "--dtype", "float32")
    assert (code, lines) == (0, ["never read"])
    assert "tau" in err
    assert "error: the prompt has" in err
    engine = Engine(load_target("tiny", dtype="float32"))
    params = SamplingParams(temperature=0, max_tokens=12)

    def answer(*turns: str) -> str:
        roles = ("user", "assistant", "user")
        conversation = [{"role": r, "content": t} for r, t in zip(roles, turns, strict=False)]
        return engine.generate([conversation], params)[0].text

    first = answer("What is a river?")
    second = answer("What is a river?", first, "And a lake?")
    assert out == f"{first}\n{second}\n{answer('And a lake?')}\n"
