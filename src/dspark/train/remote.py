"""Answers from any server that speaks OpenAI's protocol: the target runs elsewhere, perhaps on many machines."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from dspark.errors import DSparkError, InvalidConfiguration
from dspark.train.answers import AnswerSettings, Job
from dspark.train.records import Record
from dspark.train.rendering import Renderer, Unusable

_TRIES = 3
_SECONDS_BETWEEN = 1.0


class ServerAnswerer:
    """Asks `POST base_url/chat/completions` (plain text: `/completions`), many records at once.

    Servers give text and not token ids, so the ids are those of the rendered conversation: they can differ from what
    was drawn where the same characters have two spellings in tokens.
    """

    def __init__(self, base_url: str, model: str, renderer: Renderer, api_key: str | None = None) -> None:
        try:
            import httpx
        except ImportError as error:
            raise InvalidConfiguration('asking a server needs httpx: pip install "dspark[train]"') from error
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.client = httpx.Client(base_url=base_url.rstrip("/") + "/", headers=headers, timeout=600.0)
        self.unreachable, self.refused = httpx.TransportError, httpx.HTTPStatusError
        self.base_url, self.model, self.renderer = base_url, model, renderer

    def run(self, jobs: Iterator[Job], settings: AnswerSettings, done: Callable[[dict[str, Any]], None]) -> None:
        """As Answerer.run, with so many requests in flight as a batch has."""
        with ThreadPoolExecutor(settings.batch) as pool:
            running: set[Future[dict[str, Any]]] = set()
            for job in jobs:
                running.add(pool.submit(self._answer, job, settings))
                if len(running) >= settings.batch:
                    finished, running = wait(running, return_when=FIRST_COMPLETED)
                    for future in finished:
                        done(future.result())
            for future in running:
                done(future.result())

    def _answer(self, job: Job, settings: AnswerSettings) -> dict[str, Any]:
        try:
            if job.record.text is not None:
                return self._continue(job, settings)
            return self._converse(job, settings)
        except ServerError as error:
            return {"index": job.index, "id": job.record.id, "status": "failed", "reason": str(error)}

    def _converse(self, job: Job, settings: AnswerSettings) -> dict[str, Any]:
        while not job.is_truncated and job.to_next_question():
            asked = self.renderer.with_system(job.messages)
            choice = self._post("chat/completions", {"messages": asked}, settings, job)
            content = choice["message"]["content"] or ""
            job.messages.append({"role": "assistant", "content": content})
            job.is_truncated = choice.get("finish_reason") == "length"
            job.turn += 1
        rendered = self.renderer.render(Record(job.record.id, job.record.where, tuple(job.messages)))
        return self._entry(job, rendered if job.turn else Unusable("no user turn"))

    def _continue(self, job: Job, settings: AnswerSettings) -> dict[str, Any]:
        tokenizer, text = self.renderer.tokenizer, job.record.text or ""
        encoded = tokenizer(text, verbose=False, return_offsets_mapping=True)
        begin = encoded["offset_mapping"][: settings.text_prompt][-1][1]
        choice = self._post("completions", {"prompt": text[:begin]}, settings, job)
        job.messages.append({"role": "assistant", "content": choice["text"]})
        job.is_truncated = choice.get("finish_reason") == "length"
        whole = tokenizer(text[:begin] + choice["text"], verbose=False, return_offsets_mapping=True)
        num_prompt = sum(last <= begin for _, last in whole["offset_mapping"])
        if num_prompt == len(whole["input_ids"]):
            return self._entry(job, Unusable("the answer is empty"))
        job.texts = [{"token_ids": whole["input_ids"], "answers": [[num_prompt, len(whole["input_ids"])]]}]
        return job.entry()

    def _entry(self, job: Job, rendered: Any) -> dict[str, Any]:
        if isinstance(rendered, Unusable):
            job.ending = rendered.reason
            return job.entry()
        mask = rendered.loss_mask.tolist()
        edges = [i for i in range(len(mask) + 1) if (i < len(mask) and mask[i]) != (i > 0 and mask[i - 1])]
        answers = [list(pair) for pair in zip(edges[::2], edges[1::2], strict=True)]
        job.texts = [{"token_ids": rendered.token_ids.tolist(), "answers": answers}]
        return job.entry()

    def _post(self, path: str, body: dict[str, Any], settings: AnswerSettings, job: Job) -> dict[str, Any]:
        params = settings.params(job.index, job.turn)
        asked = {"temperature": params.temperature, "max_tokens": params.max_tokens, "seed": params.seed}
        for attempt in range(_TRIES):
            try:
                response = self.client.post(path, json={"model": self.model, **body, **asked})
                response.raise_for_status()
                choice: dict[str, Any] = response.json()["choices"][0]
                return choice
            except self.refused as error:
                if error.response.status_code < 500 and error.response.status_code != 429:
                    raise ServerError(f"{error.response.status_code}: {error.response.text[:200]}") from error
                reason = f"{error.response.status_code}: {error.response.text[:200]}"
            except self.unreachable as error:
                reason = f"{type(error).__name__}: {error}"
            except (ValueError, LookupError) as error:
                raise ServerError(f"{self.base_url}{path} did not answer like OpenAI's API ({error!r})") from error
            time.sleep(_SECONDS_BETWEEN * attempt)
        raise ServerError(f"{_TRIES} tries failed; the last: {reason}")


class ServerError(DSparkError):
    """One record that the server did not answer; others go on, and the next run asks again."""
