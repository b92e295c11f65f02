"""Structured output with speculation: it conforms, and it is what plain decoding with the same grammar says."""

from __future__ import annotations

import json
import random

import openai
import pytest
import torch

from dspark import Engine, SamplingParams, load_drafter
from dspark.engine.worker import Worker
from dspark.errors import InvalidRequest
from dspark.serve.grammar import Grammars
from dspark.types import Draft
from engine.models import OracleDrafter

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "count": {"type": "integer", "minimum": 0, "maximum": 999},
        "kind": {"enum": ["river", "lake"]},
    },
    "required": ["name", "count", "kind"],
    "additionalProperties": False,
}
PROMPT = "What is a river?"
MESSAGES = [{"role": "user", "content": PROMPT}]
WEATHER = {"type": "object", "properties": {"city": {"enum": ["Oslo", "Lima"]}}, "required": ["city"]}
WEATHER |= {"additionalProperties": False}
TIME = {"type": "object", "properties": {"zone": {"$ref": "#/$defs/Z"}}, "required": ["zone"]}
TIME |= {"additionalProperties": False, "$defs": {"Z": {"enum": ["UTC", "CET"]}}}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "time", "parameters": TIME}},
]


@pytest.fixture(scope="module")
def grammars(target):
    return Grammars(target.tokenizer, target.vocab_size, target.end_token_ids)


def params(grammar, seed, **settings):
    return SamplingParams(**{"max_tokens": 80, "seed": seed, **settings}, grammar=grammar)


class Spoiler(OracleDrafter):
    """Right at times; otherwise anything, whatever the grammar thinks of it."""

    def propose(self, requests, rule) -> Draft:
        draft = super().propose(requests, rule)
        rng = self.random
        wild = torch.tensor([[rng.randrange(4096) for _ in row] for row in draft.tokens.tolist()], dtype=torch.long)
        return Draft(
            torch.where(torch.rand(draft.tokens.shape) < 0.2, wild, draft.tokens), draft.sizes, parents=draft.parents
        )


@pytest.mark.parametrize("settings", [dict(temperature=0), dict(temperature=1), dict(temperature=0.8, top_k=3)])
@pytest.mark.parametrize("tree", [False, True])
def test_any_draft_gives_plain_decodings_output(target, grammars, settings, tree):
    torch.manual_seed(0)
    grammar = grammars.json_schema(SCHEMA)
    each = [params(grammar, seed, **settings) for seed in range(4)]
    plain = Engine(target).generate([PROMPT] * 4, each)
    for generation in plain:
        value = json.loads(generation.text)
        assert set(value) == {"name", "count", "kind"}
        assert generation.finish_reason == "stop"
        assert 0 <= value["count"] <= 999
    texts = [g.prompt_token_ids + g.token_ids for g in plain]
    engine = Engine(target, Spoiler(texts, tree=tree, error=0.0), "fixed:10")
    speculative = engine.generate([PROMPT] * 4, each)
    assert [g.token_ids for g in speculative] == [g.token_ids for g in plain]
    assert sum(r.accepted for g in speculative for r in g.rounds) > 20
    assert any(r.accepted < r.verified for g in speculative for r in g.rounds)


@pytest.mark.parametrize("name", ["dspark", "draft"])
def test_the_pairs_drafters_draft_within_the_grammar(target, grammars, name):
    grammar = grammars.json_schema(SCHEMA)
    each = [params(grammar, seed) for seed in range(3)] + [SamplingParams(max_tokens=80, seed=9)]
    plain = Engine(target).generate([PROMPT] * 4, each)
    speculative = Engine(target, load_drafter(name, target)).generate([PROMPT] * 4, each)
    assert [g.token_ids for g in speculative] == [g.token_ids for g in plain]
    assert sum(r.accepted for g in speculative[:3] for r in g.rounds) > 0


def test_the_rejection_rule_keeps_to_the_grammar_too(target, grammars):
    engine = Engine(target, load_drafter("dspark", target), rule="rejection")
    for generation in engine.generate([PROMPT] * 3, [params(grammars.json_schema(SCHEMA), s) for s in range(3)]):
        assert json.loads(generation.text)["kind"] in ("river", "lake")


def test_a_matcher_answers_by_its_tokens_alone(target, grammars):
    """Jumping about between paths, invalid ones and ended ones included, is as if each had been walked to afresh."""
    grammar = grammars.json_schema(SCHEMA)
    (generation,) = Engine(target).generate([PROMPT], params(grammar, 1))
    good, rng = generation.token_ids, random.Random(0)
    wanderer = grammar.matcher()
    for _ in range(60):
        path = good[: rng.randrange(len(good) + 1)]
        if rng.random() < 0.4:
            path = path + [rng.randrange(4096) for _ in range(rng.randrange(1, 4))]
        assert torch.equal(wanderer.allowed(path), grammar.matcher().allowed(path))
    assert not wanderer.allowed(good[:-2]).all()
    assert wanderer.allowed(good[:-1])[list(target.end_token_ids)].all()
    assert wanderer.fault is None


def chat(served, **body):
    return served.client.chat.completions.create(
        model="tiny", **{"messages": MESSAGES, "max_tokens": 120, "seed": 3, **body}
    )


class DeadEnd:
    """Two tokens of a kind, and then nothing at all."""

    text = "dead end"

    def __init__(self, vocab_size):
        self.vocab_size = vocab_size

    def matcher(self):
        return self

    def allowed(self, tokens):
        mask = torch.zeros(self.vocab_size, dtype=torch.bool)
        mask[300:310] = len(tokens) < 2
        return mask


@pytest.mark.parametrize("drafter", ["none", "dspark"])
def test_a_grammar_that_allows_nothing_ends_the_text_with_a_word_of_it(target, drafter):
    engine, deltas = Engine(target, load_drafter(drafter, target), "fixed:7"), []
    worker = Worker(engine).start()
    request = engine.prepare(PROMPT, params(DeadEnd(target.vocab_size), 0))
    worker.submit([request], [deltas.append])
    assert worker.drain(60)
    assert request.finish_reason == "stop" and len(request.generated) == 3
    assert all(300 <= token < 310 for token in request.generated[:2]) and request.generated[2] in target.end_token_ids
    assert "no token" in deltas[-1].fault


def test_response_formats(served):
    schema = {"type": "json_schema", "json_schema": {"name": "water", "schema": SCHEMA, "strict": True}}
    answer = chat(served, response_format=schema, extra_body={"dspark": True})
    assert set(json.loads(answer.choices[0].message.content)) == {"name", "count", "kind"}
    assert answer.choices[0].dspark["drafted"] > 0
    chunks = chat(served, response_format=schema, stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == answer.choices[0].message.content
    bias = {"response_format": {"type": "json_object"}, "logit_bias": {"96": 20}}  # "}": an end in sight
    assert isinstance(json.loads(chat(served, **bias).choices[0].message.content), dict)


def test_a_named_tool_is_called(served):
    choice = {"type": "function", "function": {"name": "weather"}}
    message = chat(served, tools=TOOLS, tool_choice=choice).choices[0].message
    (call,) = message.tool_calls
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments)["city"] in ("Oslo", "Lima")
    assert message.content is None
    streamed, reasons = "", []
    for chunk in chat(served, tools=TOOLS, tool_choice=choice, stream=True):
        for part in chunk.choices[0].delta.tool_calls or ():
            streamed += part.function.arguments
        reasons.append(chunk.choices[0].finish_reason)
    assert streamed == call.function.arguments
    assert reasons[-1] == "tool_calls"


def test_some_tool_is_called_where_one_is_required(served):
    names = set()
    for seed in range(4):
        choice = chat(served, tools=TOOLS, tool_choice="required", seed=seed).choices[0]
        (call,) = choice.message.tool_calls
        arguments = json.loads(call.function.arguments)
        assert arguments in ({"city": "Oslo"}, {"city": "Lima"}, {"zone": "UTC"}, {"zone": "CET"})
        assert ("city" in arguments) == (call.function.name == "weather")
        assert choice.finish_reason == "tool_calls"
        names.add(call.function.name)
    turn = {"role": "assistant", "content": None, "tool_calls": [call.model_dump()]}
    result = {"role": "tool", "tool_call_id": call.id, "content": "12:00"}
    assert chat(served, messages=[*MESSAGES, turn, result], max_tokens=3).choices[0].message.content is not None


def test_arguments_are_an_object_and_none_without_parameters(served):
    number = {"properties": {"size": {"type": "integer"}}, "required": ["size"], "additionalProperties": False}
    tools = [{"type": "function", "function": {"name": "now"}}, {"type": "function", "function": {"name": "go"}}]
    tools[1]["function"]["parameters"] = number  # of no type: any JSON, by the letter
    bias = {"96": 20}  # "}": an end in sight
    for name, fields in (("now", set()), ("go", {"size"})):
        choice = {"type": "function", "function": {"name": name}}
        (call,) = chat(served, tools=tools, tool_choice=choice, logit_bias=bias).choices[0].message.tool_calls
        assert json.loads(call.function.arguments).keys() == fields
    (call,) = chat(served, tools=tools, tool_choice="required", logit_bias=bias).choices[0].message.tool_calls
    assert isinstance(json.loads(call.function.arguments), dict)


def test_what_is_wrong_with_a_schema_is_said_in_a_line(grammars):
    for schema, words in (({"$ref": "#"}, "no text begins it"), ({"type": "string", "pattern": "("}, "unclosed group")):
        with pytest.raises(InvalidRequest, match=words) as refused:
            grammars.json_schema(schema)
        assert "\n" not in str(refused.value) and len(str(refused.value)) < 400


def test_schemas_that_are_too_much(served):
    wide = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(5000)}}
    for schema in (wide, {"$ref": "https://example.org/schema.json"}, {"$ref": "file:///etc/passwd"}):
        with pytest.raises(openai.BadRequestError) as refused:
            chat(served, response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})
        assert refused.value.param == "response_format"
