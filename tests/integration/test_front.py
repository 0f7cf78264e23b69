"""The front gives each connection to one api, waits for one, and changes it only while nobody has answered."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from sandbox.ports import LOOPBACK, free_port
from skipbus.services.front.passing import Backends, Passage

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def serving(port: int, serve: Serve) -> AsyncIterator[None]:
    async with await asyncio.start_server(serve, LOOPBACK, port):
        yield


@asynccontextmanager
async def front(*ports: int) -> AsyncIterator[int]:
    """The front before apis on these ports; its own port."""
    backends, port = Backends([(LOOPBACK, backend) for backend in ports]), free_port()

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await Passage(backends, reader, writer).run()

    async with serving(port, take):
        yield port


def api(name: bytes) -> Serve:
    """Answers each line with its name and the line, until the client ends."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            writer.write(name + b":" + line)
        writer.close()

    return serve


async def mute(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Takes the first octets and ends without a word, as one that is about to end."""
    await reader.read(10)
    writer.transport.abort()


async def mute_after_a_word(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read(10)
    writer.write(b"half an ")
    await writer.drain()
    writer.close()


async def ask(port: int, *lines: bytes) -> bytes:
    """What comes back for these lines, to the end of the connection."""
    reader, writer = await asyncio.open_connection(LOOPBACK, port)
    try:
        for line in lines:
            writer.write(line)
            await asyncio.sleep(0.05)
        writer.write_eof()
        return await asyncio.wait_for(reader.read(), 10)
    finally:
        writer.close()


async def test_connections_go_to_each_api_in_turn() -> None:
    a, b = free_port(), free_port()
    async with serving(a, api(b"A")), serving(b, api(b"B")), front(a, b) as port:
        assert sorted([await ask(port, b"x\n") for _ in range(4)]) == [b"A:x\n", b"A:x\n", b"B:x\n", b"B:x\n"]


async def test_an_api_that_is_not_there_is_passed_over() -> None:
    a, gone = free_port(), free_port()
    async with serving(a, api(b"A")), front(gone, a) as port:
        assert [await ask(port, b"x\n") for _ in range(3)] == [b"A:x\n"] * 3


async def test_a_connection_is_held_until_an_api_is_there() -> None:
    a = free_port()
    async with front(a) as port:
        asked = asyncio.create_task(ask(port, b"x\n"))
        await asyncio.sleep(1.0)
        assert not asked.done()
        async with serving(a, api(b"A")):
            assert await asked == b"A:x\n"


@pytest.mark.parametrize("attempt", range(4))
async def test_what_an_api_ended_without_a_word_is_given_to_another_whole(attempt: int) -> None:
    a, b = free_port(), free_port()
    async with serving(a, mute), serving(b, api(b"B")), front(a, b) as port:
        for _ in range(attempt % 2):
            await ask(port, b"turn\n")
        assert await ask(port, b"first\n", b"second\n") == b"B:first\nB:second\n"


async def test_what_an_api_began_to_answer_is_given_to_no_other() -> None:
    a, b = free_port(), free_port()
    async with serving(a, mute_after_a_word), serving(b, api(b"B")), front(a, b) as port:
        answers = {await ask(port, b"x\n") for _ in range(4)}
    assert answers == {b"half an ", b"B:x\n"}


async def test_a_client_that_nobody_wants_is_ended() -> None:
    a, b = free_port(), free_port()
    async with serving(a, mute), serving(b, mute), front(a, b) as port:
        assert await ask(port, b"x\n") == b""
