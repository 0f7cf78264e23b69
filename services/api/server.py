"""The HTTP server around the methods: limits, timeouts, malformed requests, and the end of a connection.

aiohttp's low-level server does the protocol. What is added here: answers to broken HTTP in JSON, a bound on the
number of connections (the one that has been idle for longest makes room), a timeout for a request that never
ends, and one for a client that does not read its answer. The two overridden classes use aiohttp's own names for
what a connection is doing; ``tests/system/test_hostile_clients.py`` holds that against the pinned version.
"""

from __future__ import annotations

import asyncio
import resource
from collections.abc import Callable
from typing import Any, cast

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from skipbus.services.api.access_log import Entry, log_request
from skipbus.services.api.responses import RouteError, error_response
from skipbus.services.api.tls.callers import Caller
from skipbus.services.api.tls.reading import TooMuchBesideData
from skipbus.shared.lifecycle import next_tick
from skipbus.shared.logging import get_logger, new_correlation_id

MAX_LINE_BYTES = 2048
MAX_FIELD_BYTES = 4096
MAX_HEADERS = 64
ANSWER_TIMEOUT_SECONDS = 30.0
# More than any answer has. TLS talks by itself too: a client may ask for new keys without end (RFC 8446, 4.6.3).
_MAX_UNTAKEN_BYTES = 65_536
_SWEEP_SECONDS = 1.0
# Files that are not connections: the store, logs, libraries.
_RESERVED_FILES = 128

_log = get_logger("server")


class Connection(RequestHandler):
    """One client's connection."""

    __slots__ = ("busy_count", "busy_since", "caller", "client", "lost", "made_at", "partial_since", "when_gone")

    def __init__(self, *args: Any, **options: Any) -> None:  # noqa: ANN401 -- handed through
        super().__init__(*args, **options)
        self.partial_since = 0.0
        self.busy_since = 0.0
        self.busy_count = -1
        self.made_at = self._loop.time()
        self.caller: Caller | None = None
        # Kept for TLS, whose transport no longer tells it when the connection is lost.
        self.client = "-"
        self.lost = False
        self.when_gone: Callable[[], None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Works out who is calling, once for all requests of the connection; nobody is known without TLS."""
        tls = transport.get_extra_info("ssl_object")
        # First, so that no request is ever served to a TLS client of whom this has failed: nobody is unlimited.
        self.caller = None if tls is None else tls.caller
        super().connection_made(transport)
        if tls is not None:
            self.client = _client(self)

    def connection_lost(self, exc: BaseException | None) -> None:
        """Tells whoever counts connections."""
        if isinstance(exc, TooMuchBesideData):
            _log.warning("connection ended", client=self.client, identity=_shown(self.caller), reason=exc.args[0])
        super().connection_lost(exc)
        self.lost = True
        if self.when_gone is not None:
            self.when_gone()
            self.when_gone = None

    def when_lost(self, action: Callable[[], None]) -> None:
        """Has ``action`` called once when the connection is lost, at once if it is."""
        if self.lost:
            action()
        else:
            self.when_gone = action

    def data_received(self, data: bytes) -> None:
        """Notes since when a request has been coming in that is not complete."""
        super().data_received(data)
        if self._messages:
            self.partial_since = 0.0
        elif not self.partial_since:
            self.partial_since = self._loop.time()

    def request_complete(self) -> None:
        """Its body is read to the end: what comes after that is another request."""
        self.partial_since = 0.0

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

    @property
    def idle(self) -> bool:
        """Whether the connection waits for a request."""
        return self._waiter is not None and not self._waiter.done()

    def expectant(self, now: float, grace_seconds: float) -> bool:
        """Whether its first request may still be on its way: the connection is new and has had none."""
        return self._request_count == 0 and not self.lost and now - self.made_at < grace_seconds

    def overdue(self, now: float, header_timeout_seconds: float) -> str | None:
        """Why the connection should be ended now, if it should."""
        if self.idle:
            self.busy_count = -1
            if self.partial_since and now - self.partial_since > header_timeout_seconds:
                return f"a request was not complete within {header_timeout_seconds:g} s"
            return "what it asks for in TLS is not taken" if self._untaken_bytes() > _MAX_UNTAKEN_BYTES else None
        if self.busy_count != self._request_count:
            self.busy_count, self.busy_since = self._request_count, now
        elif now - self.busy_since > ANSWER_TIMEOUT_SECONDS:
            return f"an answer was not taken within {ANSWER_TIMEOUT_SECONDS:g} s"
        return None

    def _untaken_bytes(self) -> int:
        """What waits in memory for a TLS client to read. Of the plain port nothing does while it is idle."""
        if self.caller is None or self.transport is None:
            return 0
        return cast(asyncio.WriteTransport, self.transport).get_write_buffer_size()


class BoundedServer(web.Server):
    """Makes ``Connection`` objects, at most ``max_connections`` of them at a time."""

    def __init__(
        self,
        *args: Any,  # noqa: ANN401 -- handed through
        max_connections: int,
        header_timeout_seconds: float,
        **options: Any,  # noqa: ANN401 -- handed through
    ) -> None:
        super().__init__(
            *args,
            # aiohttp would log a request after its answer has left; access_log does it before.
            access_log=None,
            max_line_size=MAX_LINE_BYTES,
            max_field_size=MAX_FIELD_BYTES,
            max_headers=MAX_HEADERS,
            # No encryptor's method has a body, and /sync reads its own: there is never one to wait for.
            lingering_time=0.0,
            # Nobody has to send anything compressed, and a few bytes could become as many as memory holds.
            auto_decompress=False,
            **options,
        )
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.max_connections = max(1, min(max_connections, files - _RESERVED_FILES))
        self._header_timeout_seconds = header_timeout_seconds
        self.evicted = 0

    @property
    def connection_count(self) -> int:
        """How many connections there are now."""
        return len(self._connections)

    def __call__(self) -> RequestHandler:
        if len(self._connections) >= self.max_connections:
            self._make_room()
        return Connection(self, loop=self._loop, **self._kwargs)

    def _make_room(self) -> None:
        # Connections stand in order of their beginning: the first idle one has been there for longest. Where none
        # is idle the oldest goes all the same, or clients that never read would be as many as they like.
        idle = (c for c in self._connections if isinstance(c, Connection) and c.idle)
        victim = next(idle, next(iter(self._connections)))
        # Its entry goes only when the loop has run; a second call in this turn must find another.
        del self._connections[victim]
        _abort(victim)
        self.evicted += 1

    def any_expectant(self, grace_seconds: float) -> bool:
        """Whether some client has only just connected and is about to ask."""
        now = self._loop.time()
        return any(isinstance(c, Connection) and c.expectant(now, grace_seconds) for c in self.connections)

    async def sweep(self, stop: asyncio.Event) -> None:
        """Ends overdue connections, every second, until ``stop``."""
        while not stop.is_set():
            now, evicted = self._loop.time(), self.evicted
            for connection in self.connections:
                reason = isinstance(connection, Connection) and connection.overdue(now, self._header_timeout_seconds)
                if reason:
                    _log.warning("connection ended", client=_client(connection), reason=reason)
                    _abort(connection)
            now = self._loop.time()
            await asyncio.sleep(next_tick(now, _SWEEP_SECONDS) - now)
            if self.evicted > evicted:
                _log.warning("connections evicted", count=self.evicted - evicted, limit=self.max_connections)


def _client(connection: RequestHandler) -> str:
    peername = connection.peername
    return str(peername[0]) if isinstance(peername, tuple) else "-"


def _shown(caller: Caller | None) -> str:
    return "-" if caller is None else caller.shown


def _abort(connection: RequestHandler) -> None:
    # close() would wait for the client to take what is written; one that does not read never does.
    transport = connection.transport
    connection.force_close()
    if transport is not None:
        # uvloop's transports have asyncio's methods but are none of its classes: isinstance would say no.
        cast(asyncio.WriteTransport, transport).abort()
