from __future__ import annotations

import asyncio

import pytest
from pydantic_core import to_json

from dspark.serve.body import Body
from dspark.serve.replies import Head, around_text, event


class Client:
    """Takes what a server sends; while it `is_slow`, the server waits."""

    def __init__(self) -> None:
        self.got, self.reads = list[bytes](), asyncio.Event()
        self.reads.set()
        self.has_ended = False

    async def send(self, message) -> None:
        await self.reads.wait()
        self.got.append(message["body"])
        self.has_ended = not message["more_body"]


def test_pieces_are_out_at_once_where_the_client_reads() -> None:
    async def run() -> None:
        client = Client()
        body = Body(client.send)
        for piece in (b"a", b"", b"b"):
            body.write(piece)
        assert client.got == [b"a", b"b"] and not client.has_ended  # and nobody has waited
        await body.end()
        assert client.has_ended

    asyncio.run(run())


def test_pieces_keep_their_order_when_the_client_stops_reading_and_goes_on() -> None:
    async def run() -> None:
        client = Client()
        body = Body(client.send)
        body.write(b"a")
        client.reads.clear()
        for piece in (b"b", b"c", b"d"):
            body.write(piece)
        ending = asyncio.ensure_future(body.end())
        await asyncio.sleep(0)
        assert client.got == [b"a"]
        client.reads.set()
        await ending
        assert b"".join(client.got) == b"abcd" and client.has_ended
        assert client.got[:2] == [b"a", b"b"]

    asyncio.run(run())


def test_what_a_client_never_read_is_given_up() -> None:
    async def run() -> None:
        client = Client()
        body = Body(client.send)
        client.reads.clear()
        body.write(b"a")
        await asyncio.sleep(0)
        body.close()
        await asyncio.sleep(0)
        client.reads.set()
        await asyncio.sleep(0)
        assert client.got == [] and len(asyncio.all_tasks()) == 1

    asyncio.run(run())


@pytest.mark.parametrize("model", ["tiny", 'a "" name, "content":""', ""])
@pytest.mark.parametrize("kind", ["chat.completion", "text_completion"])
def test_two_events_of_a_choice_differ_in_their_text_alone(kind: str, model: str) -> None:
    def written(text: str) -> bytes:
        said = {"delta": {"content": text}} if kind == "chat.completion" else {"text": text}
        return event(head.chunk([{"index": 3, **said, "logprobs": None, "finish_reason": None}]))

    head = Head(kind, model)
    before, after = around_text(written(""))
    for text in ("river", 'a "quoted" \\ \n', "😀", '""'):
        assert before + to_json(text) + after == written(text)
