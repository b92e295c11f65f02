"""The HTTP API: OpenAI's endpoints over an engine, wherever it runs."""

from __future__ import annotations

import asyncio
import copy
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import cached_property
from typing import Any, TypeVar

from fastapi import APIRouter, FastAPI
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request as HttpRequest

from dspark import __version__
from dspark.engine.marks import DraftMarks
from dspark.engine.text import Prompt, render_prompt
from dspark.errors import InvalidRequest
from dspark.serve import page
from dspark.serve.answer import Answer, EventStream, whole_response
from dspark.serve.asked import (
    check_limits,
    conversation,
    grammar_of,
    params_of,
    shown_tools,
    template_variables,
    voice_of,
)
from dspark.serve.backend import Backend
from dspark.serve.body import Outbox
from dspark.serve.faults import ApiError, add_handlers, as_api_error
from dspark.serve.gate import Gate
from dspark.serve.grammar import Grammars
from dspark.serve.openapi import (
    ChatCompletion,
    Model,
    Models,
    Text,
    TextCompletion,
    Tokens,
    describe,
    errors,
    whole_or_events,
)
from dspark.serve.replies import Head, TokenNames
from dspark.serve.run import Run
from dspark.serve.settings import ServeSettings
from dspark.serve.wire import ChatRequest, CompletionRequest, DetokenizeRequest, StreamOptions, TokenizeRequest
from dspark.types import Request

T = TypeVar("T")

_MOMENT_BYTES = 4096  # of a body whose tokenising takes about a millisecond at most


def make_app(backend: Backend, settings: ServeSettings, routers: Sequence[APIRouter] = ()) -> FastAPI:
    """The server's routes over a started engine, which the caller stops; further pages, such as a dashboard, by routers."""
    desk = Desk(backend, settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await backend.open()
        yield
        desk.close()

    app = FastAPI(title="DSpark", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.add_middleware(Gate, settings=settings)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    add_handlers(app)
    describe(app, has_keys=bool(settings.api_keys))
    _add_completions(app, desk)
    _add_models(app, desk)
    _add_state(app, backend)
    app.include_router(page.router)
    for router in routers:
        app.include_router(router)
    return app


class Desk:
    """Where requests are checked, tokenised and handed to the engine.

    What takes longer than a moment (tokenising long prompts, grammars) happens on one thread beside the event loop, never on
    both at a time, with a tokenizer of their own: those of `tokenizers` are not safe to share.
    """

    def __init__(self, backend: Backend, settings: ServeSettings) -> None:
        self.backend, self.settings = backend, settings
        self.tokenizer = copy.deepcopy(backend.intake.tokenizer)
        self.names = TokenNames(self.tokenizer)
        self.outbox = Outbox()
        self._thread = ThreadPoolExecutor(1, "dspark-text")
        self._latest: Future[Any] = Future()
        self._latest.set_result(None)

    async def beside(self, work: Callable[..., T], *arguments: Any) -> T:
        future = self._latest = self._thread.submit(work, *arguments)
        return await asyncio.shield(asyncio.wrap_future(future))  # never cancelled: `_latest` done means all are

    def close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    @cached_property
    def _grammars(self) -> Grammars:
        intake = self.backend.intake
        return Grammars(self.tokenizer, intake.vocab_size, intake.end_token_ids)

    async def answer(self, body: ChatRequest | CompletionRequest, num_bytes: int) -> Answer:
        """Check a body of this size and start its work."""
        model = self.model_named(body.model)
        check_limits(body, self.settings)
        needs_grammar = body.response_format is not None or (isinstance(body, ChatRequest) and body.tools is not None)
        if num_bytes <= _MOMENT_BYTES and not needs_grammar and self._latest.done():
            requests = self._prepare(body)  # at once: changing threads twice would take as long
        else:
            requests = await self.beside(self._prepare, body)
        run = Run(self.backend, requests, self.settings.request_seconds)
        kind = "chat.completion" if isinstance(body, ChatRequest) else "text_completion"
        return Answer(
            Head(kind, model),
            run,
            self.names,
            voice=lambda: voice_of(body),
            choices_per_prompt=body.n,
            marks=(lambda request: DraftMarks(self.tokenizer, request.context)) if body.dspark else None,
            echoed=self._echoed(body, requests),
        )

    def _echoed(self, body: ChatRequest | CompletionRequest, requests: Sequence[Request]) -> list[str]:
        """What the text of each choice begins with."""
        if not isinstance(body, CompletionRequest) or not body.echo:
            return []
        prompts = [p if isinstance(p, str) else str(self.tokenizer.decode(p)) for p in body.prompts]
        return [prompts[i // body.n] for i in range(len(requests))]

    def _prepare(self, body: ChatRequest | CompletionRequest) -> list[Request]:
        grammar = grammar_of(body, lambda: self._grammars, self.settings.max_grammar_bytes)
        each = params_of(body, self.backend.intake.max_length, grammar, self.settings.seed)
        if isinstance(body, ChatRequest):
            shown: dict[str, Any] = {"tools": shown_tools(body), "variables": template_variables(body)}
            prompts = [self.tokens("messages", conversation(body.messages), **shown)]
        else:
            prompts = [self.tokens("prompt", prompt, raw=True) for prompt in body.prompts]
        field, raw = ("messages", False) if isinstance(body, ChatRequest) else ("prompt", True)
        try:
            return [self.backend.prepare(prompt, params, raw) for prompt in prompts for params in each]
        except InvalidRequest as error:
            param = "logit_bias" if body.logit_bias and "token ids" in str(error) else field
            raise as_api_error(error, param) from error

    def tokens(self, field: str, prompt: Prompt, raw: bool = False, **shown: Any) -> list[int]:
        try:
            return render_prompt(self.tokenizer, prompt, raw and isinstance(prompt, str), **shown)
        except InvalidRequest as error:
            raise as_api_error(error, field) from error

    def model_named(self, name: str | None) -> str:
        if name is not None and name not in self.settings.model_names:
            known = ", ".join(self.settings.model_names)
            raise ApiError(404, f"no model {name!r} is served here, only {known}", "model", "model_not_found")
        return name or self.settings.model_names[0]


def _add_completions(app: FastAPI, desk: Desk) -> None:
    async def respond(body: ChatRequest | CompletionRequest, http: HttpRequest) -> Response:
        log = http.state.log
        if desk.settings.log_text:
            log["body"] = body.model_dump(exclude_defaults=True)
        answer = await desk.answer(body, len(await http.body()))
        if body.stream:
            return EventStream(answer, body.stream_options or StreamOptions(), desk.outbox, log)
        whole = await whole_response(answer, http.receive, log)
        return Response(status_code=499) if whole is None else JSONResponse(whole)

    @app.post("/v1/chat/completions", responses=whole_or_events(ChatCompletion))
    async def chat_completions(body: ChatRequest, http: HttpRequest) -> Response:
        """Answer a conversation."""
        return await respond(body, http)

    @app.post("/v1/completions", responses=whole_or_events(TextCompletion))
    async def completions(body: CompletionRequest, http: HttpRequest) -> Response:
        """Continue a text as it stands."""
        return await respond(body, http)


def _add_models(app: FastAPI, desk: Desk) -> None:
    began = int(time.time())

    def card(name: str) -> Model:
        return Model(id=name, created=began, max_model_len=desk.backend.intake.max_length)

    @app.get("/v1/models", responses=errors(401))
    async def models() -> Models:
        """The names this server answers to."""
        return Models(data=[card(name) for name in desk.settings.model_names])

    @app.get("/v1/models/{name:path}", responses=errors(401, 404))
    async def model(name: str) -> Model:
        """One of them."""
        return card(desk.model_named(name))

    refusals = errors(400, 401, 404, 408, 413, 500)

    @app.post("/tokenize", responses=refusals)
    async def tokenize(body: TokenizeRequest) -> Tokens:
        """Token ids of a raw text, or of a conversation in the chat template."""
        desk.model_named(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "prompt: exactly one of prompt and messages is needed", "prompt")
        if body.messages is not None:
            tokens = await desk.beside(desk.tokens, "messages", conversation(body.messages))
        else:
            tokens = await desk.beside(desk.tokens, "prompt", body.prompt or "", True)
        return Tokens(count=len(tokens), max_model_len=desk.backend.intake.max_length, tokens=tokens)

    @app.post("/detokenize", responses=refusals)
    async def detokenize(body: DetokenizeRequest) -> Text:
        """The text of token ids, special tokens included."""
        desk.model_named(body.model)
        vocab_size = desk.backend.intake.vocab_size
        if any(token >= vocab_size for token in body.tokens):
            raise ApiError(400, f"tokens: ids must be below {vocab_size}", "tokens")
        return Text(prompt=await desk.beside(lambda: str(desk.tokenizer.decode(body.tokens))))


def _add_state(app: FastAPI, backend: Backend) -> None:
    @app.get("/health", responses=errors(503))
    async def health() -> dict[str, str]:
        """Liveness: 503 once only a restart would help."""
        if not (backend.is_alive or backend.is_draining):
            raise ApiError(503, "the engine has ended", code="engine_lost")
        if backend.is_alive and await backend.is_stuck():
            raise ApiError(503, "the engine is stuck")
        return {"status": "ok"}

    @app.get("/ready", responses=errors(503))
    async def ready() -> dict[str, str]:
        """Readiness: whether a request that comes now is taken."""
        if backend.is_draining:
            raise ApiError(503, "shutting down: running requests are being finished", code="shutting_down")
        await health()
        return {"status": "ready"}

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": __version__}

    @app.get("/metrics", response_class=PlainTextResponse, responses=errors(500, 503))
    async def prometheus() -> Response:
        return Response(await backend.metrics(), media_type="text/plain; version=0.0.4; charset=utf-8")
