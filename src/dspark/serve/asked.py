"""What a request body asks the engine for: its limits checked, its conversation, its grammar, its voices."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from dspark.errors import InvalidRequest
from dspark.serve.faults import ApiError
from dspark.serve.grammar import Grammars
from dspark.serve.nesting import check_nesting
from dspark.serve.settings import ServeSettings
from dspark.serve.tools import NamedVoice, PlainVoice, RequiredVoice, TaggedVoice, Voice
from dspark.serve.wire import ChatRequest, CompletionRequest, Message, NamedTool, ResponseFormat
from dspark.types import Grammar, SamplingParams

_GOLDEN = 0x9E3779B97F4A7C15  # spreads the seeds of several choices over 64 bits


def check_limits(body: ChatRequest | CompletionRequest, settings: ServeSettings) -> None:
    """Raise ApiError (400) for a body that asks for more than the operator allows, or for things that do not go together."""
    num_prompts = 1 if isinstance(body, ChatRequest) else len(body.prompts)
    if not num_prompts:
        raise ApiError(400, "prompt: at least one is needed", "prompt")
    if num_prompts * body.n > settings.max_choices:
        raise ApiError(400, f"n: at most {settings.max_choices} answers in one request, prompts times n", "n")
    if len(body.stops) > settings.max_stops:
        raise ApiError(400, f"stop: at most {settings.max_stops} strings; got {len(body.stops)}", "stop")
    if not all(token.isdecimal() and len(token) < 10 for token in body.logit_bias or {}):
        raise ApiError(400, "logit_bias: keys must be token ids", "logit_bias")
    name = "top_logprobs" if isinstance(body, ChatRequest) else "logprobs"
    if (getattr(body, name) or 0) > settings.max_top_logprobs:
        raise ApiError(400, f"{name}: at most {settings.max_top_logprobs}", name)
    if isinstance(body, ChatRequest):
        if body.top_logprobs and not body.logprobs:
            raise ApiError(400, "top_logprobs: needs logprobs to be true", "top_logprobs")
        if len(body.tools or ()) > settings.max_tools:
            raise ApiError(400, f"tools: at most {settings.max_tools}; got {len(body.tools or ())}", "tools")
    max_tokens = most_tokens(body)
    if max_tokens is not None and body.min_tokens > max_tokens:
        raise ApiError(400, f"min_tokens: at most max_tokens, which is {max_tokens}", "min_tokens")
    if isinstance(body, CompletionRequest):
        if max_tokens == 0 and not body.echo:
            raise ApiError(400, "max_tokens: 0 needs echo to be true, else nothing is asked for", "max_tokens")
        if body.echo and body.stream and body.logprobs is not None:
            raise ApiError(400, "echo: with logprobs it needs stream to be false", "echo")
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options: needs stream to be true", "stream_options")


def most_tokens(body: ChatRequest | CompletionRequest) -> int | None:
    """How many may be written; None: as far as the context reaches."""
    if isinstance(body, ChatRequest):
        return body.max_completion_tokens or body.max_tokens
    return 16 if body.max_tokens is None else body.max_tokens  # OpenAI's default


def conversation(messages: list[Message]) -> list[dict[str, Any]]:
    """Messages as chat templates expect them: plain text, and arguments of calls as objects."""
    turns = []
    for place, message in enumerate(messages):
        content = message.content
        if isinstance(content, list):
            content = "".join(part.text for part in content)
        if content is None and message.role != "assistant":
            raise ApiError(400, f"messages.{place}.content: text is needed", f"messages.{place}.content")
        role = "system" if message.role == "developer" else message.role  # templates know the older name
        turn: dict[str, Any] = {"role": role, "content": content or ""}
        if message.name is not None:
            turn["name"] = message.name
        if message.tool_call_id is not None:
            turn["tool_call_id"] = message.tool_call_id
        if message.tool_calls:
            turn["tool_calls"] = [
                {"id": call.id, "type": "function", "function": _as_object(call.function.name, call.function.arguments)}
                for call in message.tool_calls
            ]
        turns.append(turn)
    return turns


def _as_object(name: str, arguments: str) -> dict[str, Any]:
    try:
        check_nesting(arguments.encode(errors="surrogatepass"), "what is in arguments")
        return {"name": name, "arguments": json.loads(arguments)}
    except ValueError:
        return {"name": name, "arguments": arguments}


def shown_tools(body: ChatRequest) -> list[dict[str, Any]]:
    """The functions that the model is told of."""
    if body.tool_choice == "none":
        return []
    return [tool.model_dump(exclude_none=True) for tool in body.tools or ()]


def template_variables(body: ChatRequest) -> dict[str, Any]:
    """What the chat template is told besides."""
    given = {} if body.chat_template_kwargs is None else body.chat_template_kwargs.model_dump(exclude_none=True)
    return given if body.reasoning_effort is None else {**given, "reasoning_effort": body.reasoning_effort}


def grammar_of(
    body: ChatRequest | CompletionRequest, grammars: Callable[[], Grammars], max_bytes: int
) -> Grammar | None:
    """The grammar that response_format or tool_choice ask for. Takes a moment: not for the event loop."""
    functions = _forced_functions(body) if isinstance(body, ChatRequest) else None
    kind = "tools" if functions is not None else "response_format"
    schema = functions if functions is not None else _response_schema(body.response_format)
    if schema is None:
        return None
    for name in ("ignore_eos", "min_tokens"):
        if getattr(body, name):
            raise ApiError(400, f"{name}: {kind} says where the output ends, so the two exclude each other", name)
    size = len(json.dumps(schema))
    if size > max_bytes:
        raise ApiError(400, f"{kind}: the schema has {size} bytes; at most {max_bytes} are taken", kind)
    try:
        if functions is None:
            return grammars().json_schema(schema)
        if isinstance(body, ChatRequest) and isinstance(body.tool_choice, NamedTool):
            return grammars().json_schema(functions[body.tool_choice.function.name])
        return grammars().calls(functions)
    except InvalidRequest as error:
        raise ApiError(400, f"{kind}: {error}", kind) from error


def _response_schema(wanted: ResponseFormat | None) -> Mapping[str, Any] | bool | None:
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return {"type": "object"}
    if wanted.json_schema is None or wanted.json_schema.schema_ is None:
        field = "response_format.json_schema.schema"
        raise ApiError(400, f"{field}: is needed with type json_schema", field)
    return wanted.json_schema.schema_


def _forced_functions(body: ChatRequest) -> dict[str, Mapping[str, Any]] | None:
    """name -> schema of the arguments, where the model must call one of them."""
    choice = body.tool_choice
    if choice is not None and choice != "none" and not body.tools:
        raise ApiError(400, "tool_choice: needs tools", "tool_choice")
    if choice is None or choice in ("none", "auto"):
        return None
    functions = {tool.function.name: _arguments(tool.function.parameters) for tool in body.tools or ()}
    if isinstance(choice, NamedTool) and choice.function.name not in functions:
        raise ApiError(400, f"tool_choice: no tool is named {choice.function.name!r}", "tool_choice.function.name")
    return functions


def _arguments(parameters: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """The schema of a function's arguments, which are an object; without parameters there are none, as OpenAI has it."""
    if parameters is None:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    return {"type": "object", **parameters}


def voice_of(body: ChatRequest | CompletionRequest) -> Voice:
    """How the text of one choice is to be read."""
    if not isinstance(body, ChatRequest) or not body.tools or body.tool_choice == "none":
        return PlainVoice()
    if isinstance(body.tool_choice, NamedTool):
        return NamedVoice(body.tool_choice.function.name)
    return RequiredVoice() if body.tool_choice == "required" else TaggedVoice()


def params_of(
    body: ChatRequest | CompletionRequest, max_length: int, grammar: Grammar | None, seed: int | None = None
) -> list[SamplingParams]:
    """One for each of the n choices. The first has the seed as given, so n = 1 says the same as the first of several."""
    max_tokens, scored = most_tokens(body), None
    if max_tokens is None:
        max_tokens = max(max_length, body.min_tokens)
    if isinstance(body, ChatRequest):
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
    else:
        logprobs = body.logprobs
        if body.echo and (logprobs is not None or max_tokens == 0):
            scored = logprobs or 0
    params = body.params(max_tokens, logprobs, scored)
    params = replace(params, grammar=grammar, seed=seed if params.seed is None else params.seed)
    if params.seed is None:
        return [params] * body.n
    return [replace(params, seed=(params.seed + i * _GOLDEN) % 2**64) for i in range(body.n)]
