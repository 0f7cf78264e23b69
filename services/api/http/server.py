"""The HTTP server around the methods: limits, timeouts, malformed requests, and the end of a connection.

aiohttp's low-level server does the protocol. What is added here: answers to broken HTTP in JSON, a bound on the
number of connections (the one that has been idle for longest makes room), a timeout for a request that never
ends, and one for a client that does not read its answer. Only public names of aiohttp are used; some of them are not
documented, so ``tests/system/test_hostile_clients.py`` tests each bound against the pinned version.
"""

from __future__ import annotations

import asyncio
import resource
import time
from collections.abc import Awaitable, Callable
from typing import Any, cast

from aiohttp import StreamReader, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http import RawRequestMessage
from aiohttp.web_protocol import RequestHandler

from skipbus.services.api.http.access_log import Entry, log_request
from skipbus.services.api.http.responses import RouteError, error_response
from skipbus.services.api.tls.callers import Caller
from skipbus.services.api.tls.handshake import TooMuchBesideData
from skipbus.shared.lifecycle import next_tick
from skipbus.shared.logging import get_logger, new_correlation_id

MAX_LINE_BYTES = 2048
MAX_FIELD_BYTES = 4096
MAX_HEADERS = 64
ANSWER_TIMEOUT_SECONDS = 30.0
# More than any answer has. TLS also answers KeyUpdate requests (RFC 8446, 4.6.3), which a client may send without end.
_MAX_UNSENT_BYTES = 65_536
_SWEEP_SECONDS = 1.0
# Files that are not connections: the store, logs, libraries.
_RESERVED_FILES = 128

_log = get_logger("server")


class Connection(RequestHandler):
    """One client's connection: idle, receiving a request, or answering one. Times are monotonic."""

    __slots__ = ("answering", "caller", "client", "lost", "on_lost", "since", "unused_since")

    def __init__(self, *args: Any, **options: Any) -> None:  # noqa: ANN401 -- handed through
        super().__init__(*args, **options)
        self.answering = False
        # When the request that is being received or answered began; 0 while the connection is idle.
        self.since = 0.0
        # When it was made, or had its last answer.
        self.unused_since = time.monotonic()
        self.caller: Caller | None = None
        # Kept, since a TLS transport no longer knows it when the connection is lost.
        self.client = "-"
        self.lost = False
        self.on_lost: Callable[[], None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Identifies the caller, once for all requests of the connection; without TLS there is none."""
        tls = transport.get_extra_info("ssl_object")
        # First, so that no request is served to a TLS client whose identification has failed.
        self.caller = None if tls is None else tls.caller
        super().connection_made(transport)
        peername = self.peername
        self.client = str(peername[0]) if isinstance(peername, tuple) else "-"

    def connection_lost(self, exc: BaseException | None) -> None:
        """Logs an end that the client forced, and calls what ``when_lost`` was given."""
        if isinstance(exc, TooMuchBesideData):
            identity = "-" if self.caller is None else self.caller.shown
            _log.warning("connection ended", client=self.client, identity=identity, reason=exc.args[0])
        super().connection_lost(exc)
        self.lost = True
        if self.on_lost is not None:
            self.on_lost()
            self.on_lost = None

    def when_lost(self, action: Callable[[], None]) -> None:
        """Has ``action`` called once when the connection is lost, or now if it is lost already."""
        if self.lost:
            action()
        else:
            self.on_lost = action

    def data_received(self, data: bytes) -> None:
        """Notes since when a request has been coming in."""
        if data and not self.since:  # aiohttp calls this without data to go on with what it holds
            self.since = time.monotonic()
        super().data_received(data)

    def request_begun(self) -> None:
        """A request is complete but for its body, and is answered now."""
        self.answering = True
        self.since = time.monotonic()

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Writes the answer. A connection that closes with it is answering until the client has taken all of it."""
        finished = await super().finish_response(request, resp, start_time)
        if finished[0].keep_alive:
            self.answering, self.since, self.unused_since = False, 0.0, time.monotonic()
        return finished

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,  # noqa: ARG002 -- aiohttp's words may quote what the client sent
    ) -> web.StreamResponse:
        """Answers what aiohttp could not parse, or an error that escaped, in JSON and without a stack trace."""
        if status < 500:
            error = RouteError(400, "the request is not well-formed HTTP, or a line or header of it is too long")
        else:
            error = RouteError(500, "internal error")
            _log.error("request failed", exc_info=exc)
        if request.writer.output_size > 0:
            raise ConnectionError("an answer was begun already")
        entry = Entry(new_correlation_id(), self.caller)
        entry.reason = f"{error} ({type(exc).__name__})"
        response = error_response(error, entry.correlation_id)
        response.force_close()
        log_request(request, entry, response.status)
        return response

    def expects_request(self, now: float, grace_seconds: float) -> bool:
        """Whether a request may be on its way: the connection is new, or had an answer just now."""
        return not self.answering and not self.lost and now - self.unused_since < grace_seconds

    def overdue(self, now: float, header_timeout_seconds: float) -> str | None:
        """Why the connection should be ended now, if it should."""
        if self.answering or self.transport is None:  # without one, aiohttp has closed it after a long idle time
            self.since = self.since or now
            late = now - self.since > ANSWER_TIMEOUT_SECONDS
            return f"an answer was not taken within {ANSWER_TIMEOUT_SECONDS:g} s" if late else None
        if self.since and now - self.since > header_timeout_seconds:
            return f"a request was not complete within {header_timeout_seconds:g} s"
        return "what it asks for in TLS is not taken" if self._unsent_bytes() > _MAX_UNSENT_BYTES else None

    def _unsent_bytes(self) -> int:
        """What waits in memory for a TLS client to read. Of the plain port nothing does while it is idle."""
        return 0 if self.caller is None or self.transport is None else self.transport.get_write_buffer_size()


class BoundedServer(web.Server):
    """Makes ``Connection`` objects, at most ``max_connections`` of them at a time."""

    def __init__(
        self,
        handler: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]],
        *,
        max_connections: int,
        header_timeout_seconds: float,
        keepalive_seconds: float,
    ) -> None:
        super().__init__(handler, request_factory=_begin_request)
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.max_connections = max(1, min(max_connections, files - _RESERVED_FILES))
        self._header_timeout_seconds = header_timeout_seconds
        self._keepalive_seconds = keepalive_seconds
        self.evicted = 0
        # In the order of their beginning.
        self._open: dict[Connection, asyncio.Transport] = {}

    @property
    def connection_count(self) -> int:
        """How many connections there are now."""
        return len(self._open)

    def __call__(self) -> Connection:
        if len(self._open) >= self.max_connections:
            self._make_room()
        return Connection(
            self,
            loop=asyncio.get_running_loop(),
            keepalive_timeout=self._keepalive_seconds,
            # aiohttp would log a request after its answer has left; access_log does it before.
            access_log=None,
            max_line_size=MAX_LINE_BYTES,
            max_field_size=MAX_FIELD_BYTES,
            max_headers=MAX_HEADERS,
            # No encryptor's method has a body, and /sync reads its own: there is never one to wait for.
            lingering_time=0.0,
            # No client has to compress anything, and a few bytes could become as many as memory holds.
            auto_decompress=False,
        )

    def connection_made(self, handler: RequestHandler, transport: asyncio.Transport) -> None:
        """Counts a connection."""
        super().connection_made(handler, transport)
        self._open[cast(Connection, handler)] = transport

    def connection_lost(self, handler: RequestHandler, exc: BaseException | None = None) -> None:
        """Counts it no longer."""
        super().connection_lost(handler, exc)
        self._open.pop(cast(Connection, handler), None)

    def expects_requests(self, grace_seconds: float) -> bool:
        """Whether some client has only just connected, or was answered just now, and may be about to ask."""
        now = time.monotonic()
        return any(connection.expects_request(now, grace_seconds) for connection in self._open)

    async def sweep(self, stop: asyncio.Event) -> None:
        """Ends overdue connections, every second, until ``stop``."""
        loop = asyncio.get_running_loop()
        while not stop.is_set():
            evicted = self.evicted
            self._end_overdue(time.monotonic())
            await asyncio.sleep(next_tick(loop.time(), _SWEEP_SECONDS) - loop.time())
            if self.evicted > evicted:
                _log.warning("connections evicted", count=self.evicted - evicted, limit=self.max_connections)

    def _end_overdue(self, now: float) -> None:
        for connection in list(self._open):
            reason = connection.overdue(now, self._header_timeout_seconds)
            if reason is not None:
                _log.warning("connection ended", client=connection.client, reason=reason)
                self._abort(connection)

    def _make_room(self) -> None:
        # Connections stand in order of their beginning: the first idle one has been there for longest. Where none
        # is idle the oldest goes all the same, or clients that never read would be as many as they like.
        idle = (connection for connection in self._open if not connection.answering)
        self._abort(next(idle, next(iter(self._open))))
        self.evicted += 1

    def _abort(self, connection: Connection) -> None:
        # Not close(), which waits for the client to take what is written: one that does not read never does.
        # Removed here: connection_lost comes only when the loop has run, and a second call must find another.
        transport = self._open.pop(connection)
        connection.force_close()
        transport.abort()


def _begin_request(
    message: RawRequestMessage,
    payload: StreamReader,
    protocol: RequestHandler,
    writer: AbstractStreamWriter,
    task: asyncio.Task[None],
) -> web.BaseRequest:
    """Called by aiohttp for each request, also for one that it could not parse."""
    cast(Connection, protocol).request_begun()
    return web.BaseRequest(message, payload, protocol, writer, task, asyncio.get_running_loop())
