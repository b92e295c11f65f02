"""Answers are the engine's own, token by token; a run that is stopped anywhere loses nothing and doubles nothing."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import dspark
from dspark.target.target import Target
from dspark.train.answers import AnswerSettings, EngineAnswerer, Tally, answer_records
from dspark.train.records import Malformed, Record
from dspark.train.remote import ServerAnswerer
from dspark.train.rendering import Renderer
from dspark.train.texts import read_log, read_texts

SETTINGS = AnswerSettings(temperatures=(0.7, 1.0), max_new=12, max_prompt=100, text_prompt=5, batch=3)


def asks(*questions: str) -> tuple[dict[str, str], ...]:
    turns = [[{"role": "user", "content": q}, {"role": "assistant", "content": "to be replaced"}] for q in questions]
    return tuple(message for turn in turns for message in turn)


RECORDS: list[Record | Malformed] = [
    Record("one", "x, line 1", asks("What is 1 + 2?")),
    Malformed("x, line 2", "no JSON"),
    Record("two", "x, line 3", asks("What is 3?", "Sure?")),
    Record("none", "x, line 4", ({"role": "assistant", "content": "Hello"},)),
    Record("long", "x, line 5", asks("word " * 200)),
    Record("text", "x, line 6", text="Every sentence brings other letters together."),
    *(Record(f"r{i}", f"x, line {7 + i}", asks(f"Print word number {i}.")) for i in range(4)),
]


@pytest.fixture(scope="module")
def target(target_folder: Path) -> Target:
    return dspark.load_target(target_folder, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def renderer(target_folder: Path) -> Renderer:
    return Renderer(AutoTokenizer.from_pretrained(target_folder))


@pytest.fixture
def answerer(target: Target, renderer: Renderer) -> EngineAnswerer:
    return EngineAnswerer(dspark.Engine(target, dspark.load_drafter("ngram", target)), renderer)


def test_every_record_is_accounted_for_and_every_turn_answered(
    answerer: EngineAnswerer, target: Target, tmp_path: Path
) -> None:
    tally = answer_records(iter(RECORDS), answerer, SETTINGS, tmp_path)
    assert (tally.written, tally.failed, tally.skipped, tally.num_records) == (7, 0, 3, len(RECORDS))
    entries = read_log(tmp_path / "answers.jsonl")
    assert sorted(entries) == list(range(len(RECORDS)))
    assert (entries[1]["reason"], entries[3]["reason"]) == ("no JSON", "no user turn")
    assert entries[4]["reason"] in {reason for _, reason in tally.reasons} and "tokens" in entries[4]["reason"]
    plain = dspark.Engine(target)
    for index, entry in entries.items():
        record = RECORDS[index]
        if entry["status"] != "written" or not isinstance(record, Record) or record.text is not None:
            continue
        said = entry["conversations"]
        for turn in range(len(said) // 2):
            alone = plain.generate([said[: 2 * turn + 1]], SETTINGS.params(index, turn))[0]
            assert said[2 * turn + 1]["content"] == alone.text
            spans = [text["token_ids"][begin:end] for text in entry["texts"] for begin, end in text["answers"]]
            assert spans[turn] == alone.token_ids
            assert entry["truncated"] or alone.finish_reason == "stop"
    assert tally.truncated == sum(bool(e.get("truncated")) for e in entries.values()) > 0
    assert tally.tokens == sum(text.num_learned for text in read_texts(tmp_path, min_answer=1))
    assert entries[5]["texts"][0]["answers"][0][0] == SETTINGS.text_prompt


@pytest.mark.parametrize("num_done", [1, 4, 9])
def test_a_run_that_is_stopped_ends_as_if_it_had_not_been(
    num_done: int, answerer: EngineAnswerer, tmp_path: Path
) -> None:
    answer_records(iter(RECORDS), answerer, SETTINGS, tmp_path / "whole")

    def stop(tally: Tally) -> None:
        if tally.num_records == num_done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        answer_records(iter(RECORDS), answerer, SETTINGS, tmp_path / "cut", stop)
    for request in [*answerer.engine.batcher.running, *answerer.engine.batcher.waiting]:
        answerer.engine.cancel(request)
    log = tmp_path / "cut" / "answers.jsonl"
    with log.open("a", encoding="utf-8") as file:
        file.write('{"index": 0, "status": "wri')  # killed in the middle of a line
    tally = answer_records(iter(RECORDS), answerer, SETTINGS, tmp_path / "cut")
    assert tally.num_records == len(RECORDS)
    whole, cut = (read_log(tmp_path / run / "answers.jsonl") for run in ("whole", "cut"))
    assert whole == cut
    assert len(log.read_text(encoding="utf-8").splitlines()) == len(RECORDS)


class Server(BaseHTTPRequestHandler):
    """Answers like OpenAI's API; breaks on demand."""

    broken: bool = False
    asked: list[dict[str, Any]] = []  # noqa: RUF012  shared with the test on purpose

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body)
        is_chat = self.path.endswith("chat/completions")
        if self.broken and "What is 3" in str(body):
            self.send_error(400, "not today")
            return
        said = "It is so." if is_chat else " go on"
        choice: dict[str, Any] = {"message": {"content": said}} if is_chat else {"text": said}
        payload = json.dumps({"choices": [{**choice, "finish_reason": "stop"}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Server.asked.clear()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def test_a_server_answers_and_what_it_refuses_is_asked_again_next_time(
    url: str, renderer: Renderer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answerer = ServerAnswerer(url, "big", renderer)
    monkeypatch.setattr(Server, "broken", True)
    first = answer_records(iter(RECORDS), answerer, SETTINGS, tmp_path)
    assert (first.written, first.failed, first.skipped) == (7, 1, 2)
    assert "400" in read_log(tmp_path / "answers.jsonl")[2]["reason"]
    monkeypatch.setattr(Server, "broken", False)
    num_asked = len(Server.asked)
    second = answer_records(iter(RECORDS), answerer, SETTINGS, tmp_path)
    assert (second.written, second.failed, second.skipped) == (8, 0, 2)
    assert len(Server.asked) - num_asked == 2  # its two turns
    two = read_log(tmp_path / "answers.jsonl")[2]
    assert [m["content"] for m in two["conversations"]] == ["What is 3?", "It is so.", "Sure?", "It is so."]
    decode = renderer.tokenizer.decode
    [text] = two["texts"]
    assert [decode(text["token_ids"][b:e]) for b, e in text["answers"]] == ["It is so.<|im_end|>"] * 2
    [plain] = read_log(tmp_path / "answers.jsonl")[5]["texts"]
    assert decode(plain["token_ids"][plain["answers"][0][0] :]) == " go on"
    assert {body["model"] for body in Server.asked} == {"big"}


def test_nobody_there_is_a_failure_of_the_record_and_not_of_the_run(
    renderer: Renderer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dspark.train.remote._SECONDS_BETWEEN", 0.0)
    answerer = ServerAnswerer("http://127.0.0.1:9/v1", "big", renderer)
    tally = answer_records(islice(iter(RECORDS), 1), answerer, SETTINGS, tmp_path)
    assert (tally.failed, tally.num_records) == (1, 1)
    assert "3 tries failed" in read_log(tmp_path / "answers.jsonl")[0]["reason"]
