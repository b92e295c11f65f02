from __future__ import annotations

import asyncio

import pytest
from pydantic_core import to_json

from dspark.serve.body import Body, Outbox
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


async def a_turn_of_the_loop() -> None:
    await asyncio.sleep(0)


def test_what_one_turn_of_the_loop_brings_is_written_together_after_it() -> None:
    async def run() -> None:
        order, outbox = list[tuple[str, bytes]](), Outbox()

        def client(name: str):
            async def send(message) -> None:
                order.append((name, message["body"]))

            return Body(send, outbox)

        one, other = client("one"), client("other")
        for piece in (b"a", b"", b"b"):
            one.write(piece)
            other.write(piece)
        assert order == []
        await a_turn_of_the_loop()
        assert order == [("one", b"ab"), ("other", b"ab")]  # and nobody has waited
        one.write(b"c")
        await one.end()
        await a_turn_of_the_loop()
        assert order[2:] == [("one", b"c")]

    asyncio.run(run())


def test_where_it_can_be_written_at_once_nothing_else_is_asked() -> None:
    async def run() -> None:
        client, written, can = Client(), list[bytes](), [True]
        body = Body(client.send, Outbox(), lambda data: can[0] and written.append(data) is None)
        for now in (True, False, True):
            can[0] = now
            body.write(b"a")
            await a_turn_of_the_loop()
        assert written == [b"a", b"a"] and client.got == [b"a"]

    asyncio.run(run())


def test_a_body_that_cannot_be_written_costs_no_other(caplog) -> None:
    async def run() -> None:
        async def broken(message) -> None:
            raise RuntimeError("no such transport")

        client, outbox = Client(), Outbox()
        for send in (broken, client.send):
            Body(send, outbox).write(b"a")
        await a_turn_of_the_loop()
        assert client.got == [b"a"] and "could not be written" in caplog.text

    asyncio.run(run())


def test_pieces_keep_their_order_when_the_client_stops_reading_and_goes_on() -> None:
    async def run() -> None:
        client = Client()
        body = Body(client.send, Outbox())
        body.write(b"a")
        await a_turn_of_the_loop()
        client.reads.clear()
        for piece in (b"b", b"c", b"d"):
            body.write(piece)
            await a_turn_of_the_loop()
        ending = asyncio.ensure_future(body.end())
        await a_turn_of_the_loop()
        assert client.got == [b"a"]
        client.reads.set()
        await ending
        assert b"".join(client.got) == b"abcd" and client.has_ended
        assert client.got[:2] == [b"a", b"b"]

    asyncio.run(run())


def test_what_a_client_never_read_is_given_up() -> None:
    async def run() -> None:
        client = Client()
        body = Body(client.send, Outbox())
        client.reads.clear()
        for piece in (b"a", b"b"):
            body.write(piece)
            await a_turn_of_the_loop()
        body.close()
        body.write(b"c")
        await a_turn_of_the_loop()
        client.reads.set()
        await a_turn_of_the_loop()
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
