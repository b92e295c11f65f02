"""What `/openapi.json` says of answers: their shapes, event streams, errors and keys. Requests are described by `wire`."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import FastAPI
from pydantic import BaseModel

from dspark.serve.gate import LOCKED


class CachedTokens(BaseModel):
    cached_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class Speculation(BaseModel):
    """What it did for one choice; asked for by `"dspark": true`."""

    tau: float
    target_passes: int
    drafted: int
    verified: int
    accepted: int
    accepted_per_position: list[int]
    seed: int


class NamedToken(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class TokenAndOthers(NamedToken):
    top_logprobs: list[NamedToken]


class ChatLogprobs(BaseModel):
    content: list[TokenAndOthers]
    refusal: None


class Function(BaseModel):
    name: str
    arguments: str


class Call(BaseModel):
    id: str
    type: Literal["function"]
    function: Function


class Said(BaseModel):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[Call] = []


class _Choice(BaseModel):
    index: int
    finish_reason: Literal["stop", "length", "tool_calls"]
    dspark: Speculation | None = None


class ChatChoice(_Choice):
    message: Said
    logprobs: ChatLogprobs | None


class _Completed(BaseModel):
    id: str
    created: int
    model: str
    usage: Usage


class ChatCompletion(_Completed):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class TextLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(_Choice):
    text: str
    logprobs: TextLogprobs | None


class TextCompletion(_Completed):
    object: Literal["text_completion"]
    choices: list[TextChoice]


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["dspark"] = "dspark"
    max_model_len: int


class Models(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class Tokens(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]


class Text(BaseModel):
    prompt: str


class Fault(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class Refused(BaseModel):
    """`param` names the field that is wrong."""

    error: Fault


_SAYS = {
    400: "something in the request is wrong, or not supported here",
    401: "no valid API key",
    404: "no such model",
    408: "the body did not come in time",
    413: "the body is too large",
    429: "the queue is full",
    500: "the server failed on this request",
    503: "shutting down, out of time, or without an engine",
}
_RETRY = {"Retry-After": {"description": "seconds", "schema": {"type": "integer"}}}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """For a route's `responses`."""
    answers: dict[int | str, dict[str, Any]] = {
        status: {"model": Refused, "description": _SAYS[status]} for status in statuses
    }
    if 429 in answers:
        answers[429]["headers"] = _RETRY
    return answers


def whole_or_events(whole: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """The same for an answer that comes in one object or, with `stream`, in events."""
    data = {"type": "string", "description": "a chunk as OpenAI has them, in JSON; in the last event `[DONE]`"}
    event = {"type": "object", "properties": {"data": data}, "required": ["data"]}
    content = {"text/event-stream": {"schema": event}}  # of each, in OpenAPI before 3.2
    return {200: {"model": whole, "content": content}, **errors(400, 401, 404, 408, 413, 429, 500, 503)}


def describe(app: FastAPI, has_keys: bool) -> None:
    """Have the served page say which routes ask for a key, and nothing of 422, by which FastAPI would refuse bodies."""
    written = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            page = written()
            for path, operations in page["paths"].items():
                for operation in operations.values():
                    operation["responses"].pop("422", None)
                    if has_keys and path.startswith(LOCKED):
                        operation["security"] = [{"key": []}]
            if has_keys:
                page["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        return app.openapi_schema or page

    app.openapi = openapi  # type: ignore[method-assign]  # as FastAPI's documentation has it
