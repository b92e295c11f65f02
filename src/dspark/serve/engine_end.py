"""The engine's process: steps the engine, hears what the server asks, and sends all that a step brought in one message."""

from __future__ import annotations

import gc
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from dspark.errors import DSparkError, ShuttingDown
from dspark.serve.messages import Message, packed, received
from dspark.serve.relay import Relay

if TYPE_CHECKING:
    from dspark.serve.backend import Watched
    from dspark.serve.grammar import Grammars
    from dspark.types import Delta, Request, SamplingParams

    Asked = tuple[
        int, list[int], SamplingParams, bool, str | None
    ]  # number, prompt, parameters, raw, text of a grammar

log = logging.getLogger(__name__)

# Of a request its number, the tokens that came and which of them were drafted. Where there is more: text, a reason to end,
# log-probabilities, a grammar's fault, and facts with the last.
Part = tuple[Any, ...]

# How long a thread that hears the server waits for the engine's thread to give up the interpreter: every first token
# waits for it. Only few ever ask, so short turns cost next to nothing.
SWITCH_SECONDS = 0.0001


def run_engine(line: socket.socket, make: Callable[..., Watched], arguments: Sequence[Any]) -> None:
    """What the process does from its start to its end: the server's closing of the line, or its death."""
    # The server is told to end, and tells us. It had us ignore this until now; what we start should not.
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda *_: None)
    end = EngineEnd(line)
    try:
        _step_until_told_otherwise(end, make, arguments)
    finally:
        end.close()


def _step_until_told_otherwise(end: EngineEnd, make: Callable[..., Watched], arguments: Sequence[Any]) -> None:
    hearing = threading.Thread(target=end.hear, name="dspark-line", daemon=True)
    hearing.start()
    try:
        watched = make(*arguments)
    except DSparkError as error:
        end.send("refused", str(error))
        return
    gc.freeze()  # models and libraries stay: no collection has to look through them, which takes tenths of a second
    sys.setswitchinterval(SWITCH_SECONDS)
    end.begin(watched)
    watched.worker.wait()
    if not watched.worker.is_draining:
        sys.exit("dspark: the engine's thread has ended, and nobody asked it to")
    hearing.join()
    gc.unfreeze()  # libraries complain of what is left when the interpreter ends


class EngineEnd:
    """One end of the line. The other is `engine_process.EngineProcess`, whose numbers name the requests here.

    What takes longer than a moment is done beside the thread that hears: grammars on one thread, pages on another.
    """

    def __init__(self, line: socket.socket) -> None:
        self._line, self._relay = line, Relay(line)
        self._watched: Watched | None = None
        self._taking: dict[int, Future[dict[int, Request]]] = {}  # requests handed in and not ended, by number
        self._held: list[tuple[Any, ...]] = []  # of the worker's thread
        self._compiling, self._showing = ThreadPoolExecutor(1, "dspark-grammar"), ThreadPoolExecutor(1, "dspark-page")

    def begin(self, watched: Watched) -> None:
        self._worker, self._watched = watched.worker, watched
        self._worker.on_delivered.append(self._send_held)
        admission = self._worker.admission
        limits = (admission.max_running, admission.max_waiting, self._worker.stuck_seconds)
        self.send("ready", self._worker.engine.intake, *limits)

    def send(self, *message: Any) -> None:
        self._relay.send(packed(message))

    def close(self) -> None:
        """Nothing more is sent; waits for what has been."""
        self._relay.close()

    def hear(self) -> None:
        """Do what the server asks until it has gone."""
        try:
            for name, *arguments in received(self._line):
                getattr(self, f"hear_{name}")(*arguments)
        finally:
            if self._watched is None:
                os._exit(1)  # in the midst of loading, for nobody
            self._worker.close()
            if self._worker.is_alive:
                os._exit(1)  # stuck in a step, for nobody

    # -- what the server may ask -----------------------------------------------------------------------------------------

    def hear_submit(self, asked: Sequence[Asked]) -> None:
        taking: Future[dict[int, Request]] = Future()
        self._taking |= dict.fromkeys((number for number, *_ in asked), taking)
        if any(grammar is not None for *_, grammar in asked):
            self._compiling.submit(self._take, asked, taking)
        else:
            self._take(asked, taking)

    def hear_cancel(self, number: int) -> None:
        if taking := self._taking.get(number):
            taking.add_done_callback(lambda taken: self._cancel(taken.result().get(number)))

    def hear_cancel_all(self) -> None:
        self._worker.cancel_all()

    def hear_drain(self) -> None:
        self._compiling.submit(self._worker.begin_drain)  # after the grammars of requests that were taken before

    def hear_show(self, number: int, what: str) -> None:
        self._showing.submit(self._show, number, what)

    # -- how it is done --------------------------------------------------------------------------------------------------

    def _take(self, asked: Sequence[Asked], taking: Future[dict[int, Request]]) -> None:
        requests: dict[int, Request] = {}
        try:
            for number, tokens, params, raw, grammar in asked:
                if grammar is not None:
                    params = replace(params, grammar=self._grammars.compile(grammar))
                request = requests[number] = self._worker.engine.prepare(tokens, params, raw)
                if not params.stop:  # the server makes text of tokens; only stop strings are watched for here
                    request.text = None
            sinks = [partial(self._hold, number, request) for number, request in requests.items()]
            self._worker.submit(list(requests.values()), sinks)
        except Exception as error:  # whatever it was, those who wait must hear of it
            if not isinstance(error, ShuttingDown):
                log.exception("%d requests fail before they have begun", len(asked))
            reason = "cancelled" if isinstance(error, ShuttingDown) else "error"
            self.send("step", [part_of(number, ended(reason)) for number, *_ in asked])
            for number, *_ in asked:
                del self._taking[number]
            requests = {}  # none of them is there to be cancelled
        taking.set_result(requests)

    def _cancel(self, request: Request | None) -> None:
        if request is not None:
            self._worker.cancel(request)

    @cached_property
    def _grammars(self) -> Grammars:
        from dspark.serve.grammar import Grammars

        intake = self._worker.engine.intake
        return Grammars(intake.tokenizer, intake.vocab_size, intake.end_token_ids)

    def _hold(self, number: int, request: Request, delta: Delta) -> None:
        facts: dict[str, Any] | None = None
        if delta.finish_reason is not None:
            facts = {"rounds": request.rounds, "num_prompt_found": request.num_prompt_found}
            if request.prompt_logprobs:
                facts["prompt_logprobs"] = request.prompt_logprobs
            del self._taking[number]
        self._held.append(part_of(number, delta, facts))

    def _send_held(self) -> None:
        held, self._held = self._held, []
        self.send("step", held)

    def _show(self, number: int, what: str) -> None:
        assert self._watched is not None
        shown: Message
        try:
            if what == "is_stuck":
                shown = (self._worker.is_stuck, None)
            else:
                shown = (getattr(self._watched, what)(), None)
        except Exception as error:  # the server's answer says that it failed, and the log why
            log.exception("%s cannot be shown", what)
            shown = (None, str(error))
        self.send("shown", number, *shown)


def part_of(number: int, delta: Delta, facts: dict[str, Any] | None = None) -> Part:
    """What a step brought for a request. Plain tuples are pickled in a quarter of the time, and most say only which tokens."""
    text, tokens, is_drafted, *more = delta
    if text or any(more):
        return number, tokens, is_drafted, text, *more, facts
    return number, tokens, is_drafted


def ended(reason: str) -> Delta:
    """The last that is heard of a request that got no further."""
    from dspark.types import Delta

    return Delta("", [], [], reason)
