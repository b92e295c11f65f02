"""Let the target answer the prompts its drafter will be trained on (paper 5.1).

A drafter is scored on what the target writes, so it learns from that and not from human text. Every user turn is
answered in turn, each with the target's own answers before it. What is done is appended to one log, so a run that is
stopped goes on where it was, with nothing lost and nothing doubled: written + failed + skipped = read.
"""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from dspark.engine.engine import Engine
from dspark.engine.text import has_chat_template
from dspark.errors import InvalidConfiguration, InvalidRequest
from dspark.train.records import Malformed, Record
from dspark.train.rendering import Renderer
from dspark.train.texts import ANSWERS, read_log
from dspark.types import Request, SamplingParams


@dataclass(frozen=True)
class AnswerSettings:
    """How answers are sampled.

    temperatures   one is drawn per record; repeat a value to give it more weight
    max_prompt     longest prompt in tokens; a conversation ends before a longer one
    max_new        tokens of one answer at most; an answer that reaches this is marked as truncated
    text_prompt    tokens of a plain text that the target continues
    batch          records answered side by side
    system         system prompt of conversations that have none; use the one that will be served
    """

    temperatures: tuple[float, ...] = (1.0,)
    max_prompt: int = 2048
    max_new: int = 512
    text_prompt: int = 64
    batch: int = 32
    system: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_prompt", "max_new", "text_prompt", "batch"):
            if getattr(self, name) < 1:
                raise InvalidConfiguration(f"{name} must be 1 or more; got {getattr(self, name)}")
        if not self.temperatures:
            raise InvalidConfiguration("give at least one temperature")

    def params(self, index: int, turn: int) -> SamplingParams:
        """What one answer is drawn with: a function of the record's place alone, so the batch does not matter."""
        rng = random.Random(f"{self.seed}/{index}")
        temperature = rng.choice(self.temperatures)
        seed = random.Random(f"{self.seed}/{index}/{turn}").getrandbits(62)
        return SamplingParams(temperature=temperature, max_tokens=self.max_new, seed=seed)


@dataclass
class Job:
    """One record being answered. texts: token ids and [begin, end) of answers, as the log has them."""

    index: int
    record: Record
    messages: list[dict[str, str]] = field(default_factory=list)
    left: list[Mapping[str, str]] = field(default_factory=list)  # turns of the input that are still to come
    texts: list[dict[str, Any]] = field(default_factory=list)
    turn: int = 0
    is_truncated: bool = False
    ending: str = ""  # why it ended before its last turn, if it did

    def to_next_question(self) -> bool:
        """Take messages over up to the next user turn; false when there is none left."""
        while self.left:
            message = dict(self.left.pop(0))
            if message["role"] != "assistant":
                self.messages.append(message)
            if message["role"] == "user":
                return True
        return False

    def add(self, prompt: Sequence[int], answer: Sequence[int], content: str, is_truncated: bool) -> None:
        """One answer. Where its prompt goes on from the text so far, token by token, they are one text."""
        so_far = self.texts[-1]["token_ids"] if self.texts else []
        span = [len(prompt), len(prompt) + len(answer)]
        if so_far and list(prompt[: len(so_far)]) == so_far:
            self.texts[-1]["answers"].append(span)
            self.texts[-1]["token_ids"] = [*prompt, *answer]
        else:
            self.texts.append({"token_ids": [*prompt, *answer], "answers": [span]})
        self.messages.append({"role": "assistant", "content": content})
        self.is_truncated |= is_truncated
        self.turn += 1

    def entry(self) -> dict[str, Any]:
        """Its line in the log."""
        if not self.texts:
            return {"index": self.index, "id": self.record.id, "status": "skipped", "reason": self.ending}
        entry: dict[str, Any] = {"index": self.index, "id": self.record.id, "status": "written"}
        if self.record.text is None:
            entry["conversations"] = self.messages
        else:
            entry["text"] = self.messages[-1]["content"]
        if self.ending:
            entry["ended_early"] = self.ending
        return {**entry, "truncated": self.is_truncated, "texts": self.texts}


class Answerer(Protocol):
    """Whoever answers: the engine in this process, or a server."""

    def run(self, jobs: Iterator[Job], settings: AnswerSettings, done: Callable[[dict[str, Any]], None]) -> None:
        """Answer every job and hand its log entry to `done`."""
        ...


class EngineAnswerer:
    """This project's engine: batched, speculative, token ids exactly as they were drawn."""

    def __init__(self, engine: Engine, renderer: Renderer) -> None:
        self.engine, self.renderer = engine, renderer

    def run(self, jobs: Iterator[Job], settings: AnswerSettings, done: Callable[[dict[str, Any]], None]) -> None:
        """As Answerer.run, many records at a time."""
        running: list[tuple[Request, Job]] = []
        is_empty = False
        while running or not is_empty:
            while len(running) < settings.batch and not is_empty:
                job = next(jobs, None)
                is_empty = job is None
                if job is not None:
                    self._ask(job, settings, running, done)
            if running:
                self.engine.step()
            for request, job in [pair for pair in running if pair[0].finish_reason is not None]:
                running.remove((request, job))
                result = self.engine.result(request)
                job.add(result.prompt_token_ids, result.token_ids, result.text, result.finish_reason == "length")
                self._ask(job, settings, running, done)

    def _ask(
        self,
        job: Job,
        settings: AnswerSettings,
        running: list[tuple[Request, Job]],
        done: Callable[[dict[str, Any]], None],
    ) -> None:
        """Submit the next question of a job, or hand the job in."""
        request = self._submit(job, settings)
        if request is None:
            done(job.entry())
        else:
            running.append((request, job))

    def _submit(self, job: Job, settings: AnswerSettings) -> Request | None:
        prompt: Any
        if job.record.text is not None:
            if job.turn:
                return None
            ids = self.renderer.tokenizer(job.record.text, verbose=False)["input_ids"]
            prompt = ids[: settings.text_prompt]
        elif not has_chat_template(self.renderer.tokenizer):
            job.ending = "a conversation, and this tokenizer has no chat template: it can only go on with plain texts"
            return None
        else:
            if job.is_truncated or not job.to_next_question():
                job.ending = "" if job.texts else "no user turn"
                return None
            prompt = self.renderer.with_system(job.messages)
        try:
            is_raw = job.record.text is not None
            request = self.engine.submit(prompt, settings.params(job.index, job.turn), raw=is_raw)
        except InvalidRequest as error:
            job.ending = str(error)
            return None
        if request.num_prompt_tokens > settings.max_prompt:
            self.engine.cancel(request)
            job.ending = f"the prompt has more than {settings.max_prompt} tokens (--max-prompt)"
            return None
        return request


@dataclass
class Tally:
    """What became of the input."""

    written: int = 0
    failed: int = 0
    skipped: int = 0
    truncated: int = 0
    tokens: int = 0  # answered tokens
    reasons: Counter[tuple[str, str]] = field(default_factory=Counter)  # (failed or skipped, why)

    def add(self, entry: Mapping[str, Any]) -> None:
        """Count an entry of the log."""
        setattr(self, entry["status"], getattr(self, entry["status"]) + 1)
        self.truncated += bool(entry.get("truncated"))
        if entry["status"] != "written":
            self.reasons[entry["status"], entry["reason"]] += 1
        self.tokens += sum(end - begin for text in entry.get("texts", ()) for begin, end in text["answers"])

    @property
    def counts(self) -> dict[str, int]:
        """What is noted beside the texts."""
        numbers = {name: number for name, number in vars(self).items() if isinstance(number, int)}
        return {**numbers, "read": self.num_records}

    @property
    def num_records(self) -> int:
        """Written, failed and skipped."""
        return self.written + self.failed + self.skipped


def answer_records(
    records: Iterator[Record | Malformed],
    answerer: Answerer,
    settings: AnswerSettings,
    out: Path,
    report: Callable[[Tally], None] = lambda tally: None,
) -> Tally:
    """Answer everything that the log in `out` does not have yet; entries that failed before are tried again."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / ANSWERS
    before = read_log(path) if path.exists() else {}
    _drop_unfinished_line(path)
    tally, num_read = Tally(), 0
    with path.open("a", encoding="utf-8") as log:

        def done(entry: dict[str, Any]) -> None:
            log.write(json.dumps(entry, ensure_ascii=False) + "\n")
            log.flush()
            tally.add(entry)
            report(tally)

        def jobs() -> Iterator[Job]:
            nonlocal num_read
            for index, found in enumerate(records):
                num_read += 1
                if (entry := before.get(index)) is not None and entry["status"] != "failed":
                    tally.add(entry)
                elif isinstance(found, Malformed):
                    done({"index": index, "where": found.where, "status": "skipped", "reason": found.reason})
                else:
                    yield Job(index, found, left=[dict(message) for message in found.messages])

        answerer.run(jobs(), settings, done)
        os.fsync(log.fileno())
    assert tally.num_records == num_read, f"{tally} does not add up to {num_read} records read"
    return tally


def _drop_unfinished_line(path: Path) -> None:
    """What was being written when the process died."""
    if path.exists() and not (content := path.read_bytes()).endswith(b"\n") and content:
        with path.open("r+b") as file:
            file.truncate(content.rfind(b"\n") + 1)
