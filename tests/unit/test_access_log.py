"""Facts about the access log: a request's line is taken before its answer leaves, and what the line shows of a path."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from typing import NoReturn

import pytest
import structlog
from aiohttp import web
from structlog.typing import EventDict

from skipbus.services.api.app import Application
from skipbus.services.api.http import access_log
from skipbus.services.api.http.server import BoundedServer

REFUSED = {
    b"GET /nothing HTTP/1.1\r\nHost: a\r\n\r\n": 404,
    b"POST /key/1234 HTTP/1.1\r\nHost: a\r\n\r\n": 405,
    b"NO HTTP\r\n\r\n": 400,
}


class Recorder:
    """Takes access lines, slowly, and notes whether the client had its answer by then."""

    def __init__(self) -> None:
        self.lines: list[EventDict] = []
        self.answered = threading.Event()
        self.answered_before_line = False

    def take(self, _logger: object, _method: str, event: EventDict) -> NoReturn:
        time.sleep(0.1)
        self.answered_before_line |= self.answered.is_set()
        self.lines.append(event)
        raise structlog.DropEvent


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    made = Recorder()
    monkeypatch.setattr(access_log, "_log", structlog.wrap_logger(None, processors=[made.take]))
    return made


class NoMethods:
    """Stands where the methods would be: none of these requests comes so far."""

    def __getattr__(self, _name: str) -> None:
        return None


def ask(port: int, request: bytes, recorder: Recorder) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(request)
        answer = connection.recv(65536)
    recorder.answered.set()
    return answer


async def answer_of(request: bytes, recorder: Recorder) -> bytes:
    application = Application(NoMethods(), NoMethods(), NoMethods())  # type: ignore[arg-type]
    server = BoundedServer(application.handle, max_connections=10, header_timeout_seconds=5, keepalive_seconds=75)
    runner = web.ServerRunner(server, handle_signals=False)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        return await asyncio.to_thread(ask, runner.addresses[0][1], request, recorder)
    finally:
        await runner.cleanup()


@pytest.mark.parametrize(("request_bytes", "status"), REFUSED.items())
async def test_the_line_of_a_request_is_taken_before_its_answer_leaves(
    request_bytes: bytes, status: int, recorder: Recorder
) -> None:
    answer = await answer_of(request_bytes, recorder)
    (line,) = recorder.lines
    assert int(answer.split()[1]) == line["status"] == status
    assert line["reason"]
    assert not recorder.answered_before_line
