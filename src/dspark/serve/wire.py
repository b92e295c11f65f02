"""Request bodies, as OpenAI's clients write them. Unknown fields are errors; a few known ones change nothing here."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from dspark.types import SamplingParams

_Text = Annotated[str, StringConstraints(min_length=1)]
_TokenId = Annotated[int, Field(ge=0, strict=True)]
_Number = Annotated[float, Field(ge=-(10.0**6), le=10.0**6)]
_INT64 = 2**63
_LEAST_TOP_P = 1e-9


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, body: Any) -> Any:
        """OpenAI's API takes null for any field that may be left out, and clients write it."""
        return {name: value for name, value in body.items() if value is not None} if isinstance(body, dict) else body


class StreamOptions(_Body):
    include_usage: bool = False
    continuous_usage_stats: bool = Field(
        default=False, description="with include_usage: the tokens so far in every chunk"
    )
    include_obfuscation: bool | None = Field(default=None, description="changes nothing")


class JsonSchema(_Body):
    name: str = ""
    description: str | None = None
    schema_: dict[str, Any] | bool | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(_Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Function(_Body):
    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]{1,128}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(_Body):
    type: Literal["function"]
    function: Function


class NamedFunction(_Body):
    name: str


class NamedTool(_Body):
    type: Literal["function"]
    function: NamedFunction


class CalledFunction(BaseModel):
    name: str
    arguments: str = "{}"


class ToolCall(BaseModel):
    id: str = ""
    type: Literal["function"] = "function"
    function: CalledFunction


class TextPart(BaseModel):
    """Of a message. Hints for other servers' caches, which some clients add, are ignored."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One turn. Fields that a chat template has no use for are ignored, as OpenAI's own replies carry some of them."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None


class TemplateVariables(_Body):
    """What chat templates of models that think ask for; others take no note of it."""

    enable_thinking: bool | None = None
    thinking: bool | None = None


class _Generate(_Body):
    """What both kinds of completion share."""

    model: str | None = None
    n: int = Field(1, ge=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1, le=2**31)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, ge=0, le=1, description="0: only the likeliest token")
    stop: _Text | list[_Text] | None = None
    seed: int | None = Field(None, ge=-_INT64, lt=_INT64)
    presence_penalty: _Number | None = None
    frequency_penalty: _Number | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    # beyond OpenAI's, by the names that other servers use
    top_k: int | None = Field(None, ge=-1, le=2**31)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=1e-6, le=1e6)
    ignore_eos: bool = False
    stop_token_ids: list[_TokenId] | None = None
    min_tokens: int = Field(0, ge=0, le=2**31, description="nothing ends the text before so many")
    traffic_class: str | None = Field(None, max_length=64, description="kind of traffic, for beliefs of its own")
    dspark: bool = Field(False, description="report what speculation did, under the key `dspark`")
    # accepted and without any effect
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    # accepted only where they ask for nothing
    skip_special_tokens: Literal[True] | None = None
    use_beam_search: Literal[False] | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def params(self, max_tokens: int, logprobs: int | None, prompt_logprobs: int | None = None) -> SamplingParams:
        """The sampling parameters asked for; what was left out keeps its default."""
        given = {
            "temperature": self.temperature,
            "top_k": None if self.top_k is None else max(self.top_k, 0),
            "top_p": self.top_p if self.top_p is None else max(self.top_p, _LEAST_TOP_P),
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "logit_bias": {int(token): bias for token, bias in (self.logit_bias or {}).items()},
            "stop": self.stops,
            "stop_token_ids": tuple(self.stop_token_ids or ()),
            "seed": self.seed,
            "traffic_class": self.traffic_class,
        }
        return SamplingParams(
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            ignore_eos=self.ignore_eos,
            **{name: value for name, value in given.items() if value is not None},  # type: ignore[arg-type]
        )


class ChatRequest(_Generate):
    """POST /v1/chat/completions"""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0)
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    chat_template_kwargs: TemplateVariables | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    # accepted and without any effect
    parallel_tool_calls: bool | None = None
    modalities: list[Literal["text"]] | None = None
    prediction: dict[str, Any] | None = Field(None, description="a guess of the answer: drafters make their own")
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class CompletionRequest(_Generate):
    """POST /v1/completions"""

    prompt: _Text | list[_Text] | list[_TokenId] | list[list[_TokenId]]
    max_tokens: int | None = Field(None, ge=0, le=2**31, description="0 only with echo: the prompt is all there is")
    logprobs: int | None = Field(None, ge=0)
    echo: bool = Field(False, description="begin with the prompt, and with logprobs say those of its tokens, too")
    response_format: ResponseFormat | None = None
    # accepted only where they ask for nothing
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt  # type: ignore[return-value]


class TokenizeRequest(_Body):
    """POST /tokenize: a raw text, or a conversation through the chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None


class DetokenizeRequest(_Body):
    """POST /detokenize"""

    model: str | None = None
    tokens: list[_TokenId]
