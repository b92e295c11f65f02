"""What an operator decides about the server, apart from the engine behind it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ServeSettings:
    """Names, keys and limits.

    model_names      what /v1/models lists; a request may name any of them
    api_keys         one of them must come as `Authorization: Bearer`; none: no key is asked for
    cors_origins     web pages that may call the API from a browser; ("*",) is every page
    max_body_bytes   of one HTTP request
    body_seconds     a body must have come in full by then
    max_choices      answers per request: prompts times n
    max_stops        stop strings per request
    max_top_logprobs alternatives per token
    max_grammar_bytes  of a JSON schema, as JSON
    max_tools        functions per request
    request_seconds  a request that takes longer is cancelled
    seed             for requests that name none; None draws a new one for each
    log_text         put prompts and answers into the log, too
    """

    model_names: tuple[str, ...]
    api_keys: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    max_body_bytes: int = 4 * 2**20
    body_seconds: float = 30.0
    max_choices: int = 32
    max_stops: int = 16
    max_top_logprobs: int = 20
    max_grammar_bytes: int = 2**16
    max_tools: int = 128
    request_seconds: float = 600.0
    seed: int | None = None
    log_text: bool = False
