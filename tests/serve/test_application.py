"""What applications do with OpenAI's own client, against the server as users run it: from outside, in two processes."""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict

import openai
from pydantic import BaseModel, Field

MESSAGES = [{"role": "user", "content": "Tom is 9 years old."}]
ASKED = {"model": "tiny", "messages": MESSAGES, "seed": 3}
ARGUMENTS = {"type": "object", "properties": {"age": {"type": "integer", "maximum": 120}}, "required": ["age"]}
TOOL = {"type": "function", "function": {"name": "note", "parameters": {**ARGUMENTS, "additionalProperties": False}}}


class Person(BaseModel):
    age: int = Field(le=120)


def test_answers_that_are_parsed(far):
    parse = far.client.chat.completions.parse
    answer = parse(**ASKED, max_tokens=60, response_format=Person)
    assert answer.choices[0].message.parsed.age <= 120
    tools = [openai.pydantic_function_tool(Person, name="note")]
    (call,) = parse(**ASKED, max_tokens=60, tools=tools, tool_choice="required").choices[0].message.tool_calls
    assert call.function.parsed_arguments.age <= 120


def test_calls_in_several_streamed_choices_and_the_turn_that_answers_one(far):
    create = far.client.chat.completions.create
    stream = create(**ASKED, n=2, tools=[TOOL], tool_choice="required", stream=True, max_tokens=60, logprobs=True)
    written, reasons, num_logprobs = defaultdict(str), {}, 0
    for chunk in stream:
        for choice in chunk.choices:
            for call in choice.delta.tool_calls or ():
                written[choice.index] += call.function.arguments
            num_logprobs += len(choice.logprobs.content) if choice.logprobs else 0
            reasons[choice.index] = choice.finish_reason
    assert [json.loads(written[index])["age"] <= 120 for index in (0, 1)] == [True, True]
    assert reasons == {0: "tool_calls", 1: "tool_calls"}
    called = create(
        **ASKED, tools=[TOOL], tool_choice={"type": "function", "function": {"name": "note"}}, max_tokens=60
    )
    message = called.choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "noted"}
    again = create(**{**ASKED, "messages": [*MESSAGES, message, result]}, tools=[TOOL], max_tokens=8)
    assert again.usage.prompt_tokens > called.usage.prompt_tokens
    assert num_logprobs > 2


def test_a_response_that_is_read_as_it_comes(far):
    with far.client.chat.completions.with_streaming_response.create(**ASKED, max_tokens=4) as response:
        assert response.headers["x-request-id"]
        assert json.loads("".join(response.iter_text()))["usage"]["completion_tokens"] == 4


def test_tasks_that_are_cancelled_and_time_outs_leave_nothing(far):
    long = {**ASKED, "max_tokens": 2000, "extra_body": {"ignore_eos": True}}

    async def application():
        async with openai.AsyncOpenAI(base_url=far.url + "/v1", api_key="any", max_retries=0) as client:
            create = client.chat.completions.create
            task = asyncio.ensure_future(create(**long))
            stream = await create(**long, stream=True)
            async for chunk in stream:
                if chunk.choices[0].delta.content:
                    break
            await stream.close()
            task.cancel()
            late = await asyncio.gather(task, create(**long, timeout=0.05), return_exceptions=True)
            return [type(outcome) for outcome in late]

    assert asyncio.run(application()) == [asyncio.CancelledError, openai.APITimeoutError]
    far.settle()
