"""Facts about connections whose client does not take the rest of an answer, when nothing else is left to do for it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from aiohttp import web

from skipbus.services.api.http import server
from skipbus.services.api.http.server import BoundedServer

# More than the kernel takes, and less than what makes the server wait for its client.
BODY = bytes(60_000)
SMALL_BUFFER = 4096


async def large_answer(request: web.BaseRequest) -> web.Response:
    assert request.transport is not None
    connected: socket.socket = request.transport.get_extra_info("socket")
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL_BUFFER)
    return web.Response(body=BODY)


@asynccontextmanager
async def running(keepalive_seconds: float) -> AsyncIterator[tuple[BoundedServer, int]]:
    bounded = BoundedServer(
        large_answer, max_connections=10, header_timeout_seconds=5, keepalive_seconds=keepalive_seconds
    )
    runner = web.ServerRunner(bounded, handle_signals=False, shutdown_timeout=1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    stop = asyncio.Event()
    sweeping = asyncio.create_task(bounded.sweep(stop))
    try:
        yield bounded, runner.addresses[0][1]
    finally:
        stop.set()
        await sweeping
        await runner.cleanup()


async def ask_and_never_read(port: int, headers: bytes) -> socket.socket:
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BUFFER)
    client.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(client, ("127.0.0.1", port))
    await loop.sock_sendall(client, b"GET / HTTP/1.1\r\nHost: a\r\n" + headers + b"\r\n")
    return client


@pytest.mark.parametrize(
    ("headers", "keepalive_seconds"),
    [(b"Connection: close\r\n", 60), (b"", 0.2)],
    ids=["closed with its answer", "closed after an idle time"],
)
async def test_a_connection_that_is_closed_is_ended_though_its_client_never_takes_the_rest(
    monkeypatch: pytest.MonkeyPatch, headers: bytes, keepalive_seconds: float
) -> None:
    monkeypatch.setattr(server, "ANSWER_TIMEOUT_SECONDS", 1.0)
    async with running(keepalive_seconds) as (bounded, port):
        with await ask_and_never_read(port, headers):
            await asyncio.sleep(0.6)
            # It is not ended at once: a slow client has its time.
            assert bounded.connection_count == 1
            async with asyncio.timeout(6):
                while bounded.connection_count:  # noqa: ASYNC110 -- the sweep tells nobody
                    await asyncio.sleep(0.05)
