"""The HAProxy configuration that is shipped: it spreads connections, leaves out an api that is down, and waits for one.

The apis are played by servers that answer each line with their name; in one test they are real ones.
"""

from __future__ import annotations

import asyncio
import re
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from urllib.request import urlopen

import pytest

from sandbox.front import Front
from sandbox.ports import LOOPBACK, free_port
from tests.system.tls_api import TlsApi, s_client

# A check that fails or succeeds is noticed in half a second; this is ample for a loaded machine.
NOTICED_SECONDS = 2.0
# What a connection to a host that does not answer costs (`timeout connect`).
CONNECT_SECONDS = 0.5


@asynccontextmanager
async def serving(port: int, name: bytes) -> AsyncIterator[None]:
    """An api; connections that are open at its end are ended with it."""
    open_ones: set[asyncio.StreamWriter] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        open_ones.add(writer)
        with suppress(ConnectionError):
            while line := await reader.readline():
                writer.write(name + b":" + line)
        writer.close()

    server = await asyncio.start_server(serve, LOOPBACK, port)
    try:
        yield
    finally:
        server.close()
        for writer in open_ones:
            writer.transport.abort()


async def ask(made: Front, seconds: float = 10.0) -> bytes:
    """The answer to one line, over a connection of its own."""
    async with asyncio.timeout(seconds):
        reader, writer = await asyncio.open_connection(LOOPBACK, made.port)
        try:
            writer.write(b"x\n")
            return await reader.readline()
        finally:
            writer.close()


async def test_connections_go_to_each_api_in_turn(tmp_path: Path) -> None:
    a, b = free_port(), free_port()
    async with serving(a, b"A"), serving(b, b"B"):
        with Front(tmp_path, [a, b]) as made:
            answers = [await ask(made) for _ in range(6)]
    assert sorted(answers) == [b"A:x\n"] * 3 + [b"B:x\n"] * 3


async def test_an_api_that_is_down_is_left_out_until_it_is_back(tmp_path: Path) -> None:
    a, b = free_port(), free_port()
    async with serving(b, b"B"):
        with Front(tmp_path, [a, b]) as made:
            assert [await ask(made) for _ in range(8)] == [b"B:x\n"] * 8
            async with serving(a, b"A"):
                await asyncio.sleep(NOTICED_SECONDS)
                assert {await ask(made) for _ in range(4)} == {b"A:x\n", b"B:x\n"}


async def test_the_end_of_an_api_costs_new_connections_nothing(tmp_path: Path) -> None:
    """It ends between two checks, so that a connection is the first to notice."""
    a, b = free_port(), free_port()
    async with AsyncExitStack() as outer, serving(b, b"B"):
        async with serving(a, b"A"):
            made = outer.enter_context(Front(tmp_path, [a, b]))
            assert {await ask(made) for _ in range(4)} == {b"A:x\n", b"B:x\n"}
        assert [await ask(made) for _ in range(6)] == [b"B:x\n"] * 6


@contextmanager
def silent(port: int) -> Iterator[None]:
    """A host that does not answer: the kernel drops what asks for a connection."""
    with ExitStack() as at_end:
        listener = at_end.enter_context(socket.create_server((LOOPBACK, port), backlog=0))
        for _ in range(3):
            waiting = at_end.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        yield


async def test_only_the_first_connection_waits_for_an_api_that_has_become_silent(tmp_path: Path) -> None:
    """The first one takes the api out, long before the next check would."""
    a, b = free_port(), free_port()
    async with AsyncExitStack() as outer, serving(b, b"B"):
        async with serving(a, b"A"):
            made = outer.enter_context(Front(tmp_path, [a, b]))
            assert {await ask(made) for _ in range(4)} == {b"A:x\n", b"B:x\n"}
        outer.enter_context(silent(a))
        waited = [await seconds_of(ask(made)) for _ in range(8)]
    assert sum(seconds > CONNECT_SECONDS / 2 for seconds in waited) <= 1, waited


async def seconds_of(asking: Awaitable[bytes]) -> float:
    """How long it takes until B has answered."""
    started = time.monotonic()
    assert await asking == b"B:x\n"
    return time.monotonic() - started


async def test_connections_wait_while_no_api_is_there(tmp_path: Path) -> None:
    a, b = free_port(), free_port()
    async with AsyncExitStack() as outer:
        async with serving(a, b"A"), serving(b, b"B"):
            made = outer.enter_context(Front(tmp_path, [a, b]))
            assert {await ask(made) for _ in range(4)} == {b"A:x\n", b"B:x\n"}
        # Between two checks, and when both are known to be down.
        for pause in (0.0, NOTICED_SECONDS):
            await asyncio.sleep(pause)
            asked = [asyncio.create_task(ask(made, 30)) for _ in range(8)]
            await asyncio.sleep(5)
            assert not any(one.done() for one in asked)
            async with serving(b, b"B"):
                assert await asyncio.gather(*asked) == [b"B:x\n"] * 8


async def test_an_operator_sees_the_apis_in_its_metrics(tmp_path: Path) -> None:
    a, b = free_port(), free_port()
    async with serving(a, b"A"):
        with Front(tmp_path, [a, b]) as made:
            await asyncio.sleep(NOTICED_SECONDS)
            text = await asyncio.to_thread(read_metrics, made)
    assert re.search(r'haproxy_server_status\{proxy="apis",server="api-a",state="UP"\} 1', text)
    assert re.search(r'haproxy_server_status\{proxy="apis",server="api-b",state="DOWN"\} 1', text)


def read_metrics(made: Front) -> str:
    with urlopen(f"http://{LOOPBACK}:{made.status_port}/metrics", timeout=10) as answer:
        return str(answer.read().decode())


@pytest.fixture
def apis(tmp_path: Path) -> Iterator[list[TlsApi]]:
    """Two real ones of one key provider, with the same keys and certificates."""
    with TlsApi(tmp_path / "a") as one, TlsApi(tmp_path / "b") as other:
        yield [one, other]


def test_tls_ends_in_the_api_and_checks_leave_no_line_in_its_log(apis: list[TlsApi], tmp_path: Path) -> None:
    with Front(tmp_path, [api.port for api in apis]) as made:
        # Long enough for a few checks.
        time.sleep(3 * NOTICED_SECONDS)
        for arguments in (["-tls1_3", *apis[0].certificate()], ["-tls1_2", *apis[0].psk()]):
            assert [s_client(made.port, *arguments).served for _ in range(2)] == [True] * 2
    for api in apis:
        proofs = [line["proof"] for line in api.lines("request")]
        assert sorted(proofs) == ["certificate", "psk"]
        assert api.refusals() == 0
