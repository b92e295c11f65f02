"""Over HTTP: the same request gives the same text with its prefix found or not, streamed or not, alone or among others."""

from __future__ import annotations

import asyncio

from dspark import Engine, load_drafter
from serve.conftest import serving
from serve.test_storms import OTHERS, streamed, together, whole

SYSTEM = {"role": "system", "content": "You are a helpful assistant who answers in one sentence and never in two."}


def body_of(*contents: str, seed: int = 5) -> dict:
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    return {"messages": [SYSTEM, *turns], "temperature": 1, "seed": seed, "max_tokens": 16}


def test_a_hit_changes_no_text_and_is_told(target, served):
    first = body_of("What is a river?")
    answer = together(served, lambda client: whole(client, first))
    second = body_of("What is a river?", answer, "Tom has 3 apples.")
    expected = [answer, together(served, lambda client: whole(client, second))]

    async def crowd(client):
        others = [whole(client, body_of(OTHERS[i % 5], seed=i)) for i in range(29)]
        ours = [whole(client, first), streamed(client, first), streamed(client, second), whole(client, second)]
        return (await asyncio.gather(*others[:15], *ours, *others[15:]))[15:19]

    with serving(Engine(target, load_drafter("dspark", target), prefix_tokens=2048)) as remembering:

        def found(body):
            usage = remembering.client.chat.completions.create(model="tiny", **body).usage
            return usage.prompt_tokens_details.cached_tokens

        assert found(first) == 0
        assert [together(remembering, lambda client, b=b: whole(client, b)) for b in (first, second)] == expected
        assert found(second) > found(first) > 0
        assert together(remembering, crowd) == [expected[0], expected[0], expected[1], expected[1]]
