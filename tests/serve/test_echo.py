"""What harnesses such as lm-eval ask of /v1/completions: how likely is this very text?"""

from __future__ import annotations

import httpx
import pytest
import torch

TEXTS = ["A river is a stream of water.", "Tom has 3 apples. He buys 4 more."]


@pytest.fixture(scope="module")
def expected(target):
    """[S-1, V] log-probabilities after each token of a text but the last, by transformers' own forward."""

    @torch.no_grad()
    def logprobs(tokens):
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(target.config._name_or_path, dtype=torch.float32)
        return torch.log_softmax(model(torch.tensor([tokens])).logits[0, :-1], -1)

    return logprobs


def test_log_likelihoods_are_those_of_transformers(either, target, expected):
    prompts = [target.tokenizer(text)["input_ids"] for text in TEXTS]
    ask = dict(model="tiny", prompt=prompts, temperature=0, seed=1, logprobs=1, echo=True)
    answer = either.client.completions.create(**ask, max_tokens=1)
    alone = either.client.completions.create(**ask, max_tokens=0)
    assert (answer.usage.completion_tokens, alone.usage.completion_tokens) == (2, 0)
    for prompt, text, choice, scored in zip(prompts, TEXTS, answer.choices, alone.choices, strict=True):
        told = choice.logprobs
        assert (scored.finish_reason, scored.text) == ("length", text) and choice.text.startswith(text)
        assert len(told.tokens) == len(told.token_logprobs) == len(prompt) + 1  # with the one that was written
        assert scored.logprobs.token_logprobs == pytest.approx(told.token_logprobs[:-1])
        assert told.token_logprobs[0] is None and told.top_logprobs[0] is None
        rows = expected(prompt)
        own = rows.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
        assert told.token_logprobs[1:-1] == pytest.approx(own.tolist(), abs=1e-3)
        # as lm-eval tells whether greedy decoding would have written the text
        is_greedy = [
            p == max(top.values()) for p, top in zip(told.token_logprobs, told.top_logprobs, strict=True) if top
        ]
        assert is_greedy[:-1] == (rows.argmax(-1) == torch.tensor(prompt[1:])).tolist() and is_greedy[-1]
        assert "".join(told.tokens).startswith(text) and "".join(told.tokens) == choice.text
        assert told.text_offset == [len("".join(told.tokens[:i])) for i in range(len(told.tokens))]


def test_an_echo_comes_before_what_is_written(served):
    ask = dict(model="tiny", prompt="A river is", temperature=0, max_tokens=6, n=2)
    plain = served.client.completions.create(**ask)
    echoed = served.client.completions.create(**ask, echo=True)
    assert [c.text for c in echoed.choices] == ["A river is" + c.text for c in plain.choices]
    texts = ["", ""]
    for chunk in served.client.completions.create(**ask, echo=True, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [c.text for c in echoed.choices]


def test_min_tokens_keep_a_text_going(either):
    ask = dict(model="tiny", prompt="A river is a", temperature=0, max_tokens=40, stop=[" "])
    short = either.client.completions.create(**ask)
    long = either.client.completions.create(**ask, extra_body={"min_tokens": 30})
    assert short.usage.completion_tokens < 30 < long.usage.completion_tokens
    assert long.choices[0].text.startswith(short.choices[0].text)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 4, "min_tokens": 5}, "min_tokens"),
        ({"min_tokens": 17}, "min_tokens"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"min_tokens": 2, "response_format": {"type": "json_object"}}, "min_tokens"),
        ({"echo": True, "logprobs": 1, "stream": True}, "echo"),
        ({"echo": "yes, please"}, "echo"),
    ],
)
def test_what_cannot_be_is_refused_by_name(served, change, field):
    reply = httpx.post(served.url + "/v1/completions", json={"prompt": "Hi", **change})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, field)
