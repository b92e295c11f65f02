"""Errors as OpenAI's clients expect them: a status, and {"error": {message, type, param, code}}."""

from __future__ import annotations

import http
import logging
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from dspark.errors import DSparkError, EngineLost, InvalidRequest, PromptTooLong, QueueFull, ShuttingDown
from dspark.serve import wire

log = logging.getLogger(__name__)

_FIELDS = {
    field.alias or name
    for model in vars(wire).values()
    if isinstance(model, type) and issubclass(model, BaseModel)
    for name, field in model.model_fields.items()
}
_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}


class ApiError(Exception):
    """An answer that is an error. `param` names the field that is wrong."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers: dict[str, str] = {}

    @property
    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, headers=self.headers)


def as_api_error(error: Exception, param: str | None = None) -> ApiError:
    """How a client is told of an exception; anything unforeseen is a 500 that gives nothing away."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFull):
        refusal = ApiError(429, str(error), code="queue_full")
        refusal.headers["Retry-After"] = str(error.retry_seconds)
        return refusal
    if isinstance(error, ShuttingDown):
        return ApiError(503, str(error), code="shutting_down")
    if isinstance(error, EngineLost):
        return ApiError(503, str(error), code="engine_lost")
    if isinstance(error, PromptTooLong):
        return ApiError(400, str(error), param, "context_length_exceeded")  # clients look for it, and shorten
    if isinstance(error, InvalidRequest):
        return ApiError(400, str(error), param)
    if isinstance(error, DSparkError):
        return ApiError(500, str(error))
    if isinstance(error, RecursionError):
        return ApiError(400, "something in the body is nested too deeply")
    return ApiError(500, "the server failed on this request; its log says why", code="internal_error")


def add_handlers(app: FastAPI) -> None:
    """Have everything that can go wrong in a route answered in this shape."""

    async def known(_: Request, error: Exception) -> JSONResponse:
        return as_api_error(error).response()

    async def unforeseen(request: Request, error: Exception) -> JSONResponse:
        return as_api_error(error).response()  # Starlette logs the traceback

    async def malformed(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        if "json" not in request.headers.get("content-type", ""):  # FastAPI reads no other: a web page could send it
            return ApiError(400, "the body is not read without the header Content-Type: application/json").response()
        return _validation_error(error).response()

    async def http_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        message = str(error.detail or http.HTTPStatus(error.status_code).phrase)
        if error.status_code == 400:  # of FastAPI alone: a body that is no UTF-8, or numbers without end
            message = "the body cannot be read: it must be JSON in UTF-8"
        if error.status_code == 404:
            message = f"nothing is served at {request.url.path}: the API begins with /v1, and /openapi.json lists it"
        answer = ApiError(error.status_code, message)
        answer.headers.update(error.headers or {})
        return answer.response()

    app.add_exception_handler(ApiError, known)
    app.add_exception_handler(DSparkError, known)
    app.add_exception_handler(RecursionError, known)
    app.add_exception_handler(RequestValidationError, malformed)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(Exception, unforeseen)


def _validation_error(error: RequestValidationError) -> ApiError:
    """The first complaint, with the field's path; what came is not repeated, since it may be long or private."""
    errors = error.errors()
    of_first_field = [each for each in errors if each["loc"][:2] == errors[0]["loc"][:2]]
    # Every member of a union complains: the one that got furthest into what came is the one that was meant.
    first = max(of_first_field, key=lambda each: len(_path(each["loc"])))
    path = _path(first["loc"])
    if not path and first["type"] in ("missing", "model_attributes_type"):
        return ApiError(400, "the body must be a JSON object")
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {first.get('ctx', {}).get('error', 'it cannot be parsed')}")
    if first["type"] == "extra_forbidden":
        unknown = ".".join([*_path(first["loc"][:-1]), str(first["loc"][-1])])
        return ApiError(400, f"unknown field {unknown!r}: it is not supported here", unknown, "unknown_field")
    field = ".".join(path) or None
    if first["type"] == "literal_error":
        taken = first["ctx"]["expected"].replace("False", "false").replace("True", "true")
        return ApiError(400, f"{field}: only {taken} is supported here", field)
    message = first["msg"].removeprefix("Value error, ")
    return ApiError(400, f"{field}: {message}" if field else message, field)


def _path(location: Sequence[int | str]) -> list[str]:
    """Fields and places. Pydantic names members of unions besides, which mean nothing to a client."""
    return [str(part) for part in location[1:] if isinstance(part, int) or part in _FIELDS]
