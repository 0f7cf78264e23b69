"""The access log: one line a request, with the reason of a refusal, since routers tell their operators nothing.

Paths stand there as routes; of a keyId only the first 12 digits, enough to find a key again and too few to fetch
it. A path that is no route is cut, and long runs of hex in it are masked. Query strings are not logged, only the
remoteSystemID once it has been checked.
"""

from __future__ import annotations

import asyncio
import functools
import re
from logging import Logger
from time import perf_counter
from time import time as clock

import orjson
from aiohttp.abc import AbstractAccessLogger
from aiohttp.web import BaseRequest, StreamResponse

from skipbus.services.api.afterwards import Afterwards
from skipbus.services.api.metrics import observe_request
from skipbus.services.api.tls.callers import Caller
from skipbus.shared.log_rendering import utc_timestamp
from skipbus.shared.logs import line_writer

_SHOWN_KEY_ID_DIGITS = 12
_LONG_HEX = re.compile(r"[0-9a-fA-F]{16,}")
ENTRY = "skipbus.entry"


class Entry:
    """What the log says of one request beyond what HTTP says."""

    __slots__ = ("caller", "correlation_id", "issued_as", "key_id", "reason", "remote_system_id", "route", "started")

    def __init__(self, correlation_id: str, caller: Caller | None = None) -> None:
        self.caller = caller
        self.correlation_id = correlation_id
        self.started = perf_counter()
        self.route: str | None = None
        self.key_id: str | None = None
        self.remote_system_id: str | None = None
        self.reason: str | None = None
        self.issued_as: str | None = None


class AccessLine:
    """Renders access lines: JSON with ``constant`` in every one, or words for whoever develops."""

    def __init__(self, constant: dict[str, object], *, readable: bool = False) -> None:
        self._constant = constant
        self._readable = readable

    def render(self, request: BaseRequest, response: StreamResponse, seconds: float, at: float) -> bytes:
        """One line, without its end; ``at`` is Unix time in seconds."""
        fields = self._fields(request, response, seconds, at)
        return _readable(fields) if self._readable else orjson.dumps(fields)

    def _fields(self, request: BaseRequest, response: StreamResponse, seconds: float, at: float) -> dict[str, object]:
        entry = request.get(ENTRY)
        fields: dict[str, object] = {
            "timestamp": utc_timestamp(at),
            "level": "info" if response.status < 400 else "warning",
            "event": "request",
            **self._constant,
            "method": request.method[:16],
            "path": shown_path(request, entry),
            "status": response.status,
            "duration_ms": round(seconds * 1000, 3),
            "client": request.remote,
        }
        if entry is not None:
            fields["correlation_id"] = entry.correlation_id
            for name in ("remote_system_id", "reason", "issued_as"):
                value = getattr(entry, name)
                if value is not None:
                    fields[name] = value
            if entry.caller is not None:
                fields["identity"] = entry.caller.shown
                fields["proof"] = entry.caller.proof
        return fields


def _readable(fields: dict[str, object]) -> bytes:
    first = ("timestamp", "level", "method", "path", "status", "duration_ms")
    rest = (f"{name}={value}" for name, value in fields.items() if name not in (*first, "event"))
    return " ".join([*(str(fields[name]) for name in first), *rest]).encode()


def shown_path(request: BaseRequest, entry: Entry | None) -> str:
    """The path as the log may show it."""
    if entry is None:
        return "-"
    if entry.key_id is not None and entry.route is not None:
        return f"{entry.route}/{entry.key_id[:_SHOWN_KEY_ID_DIGITS]}…"
    if entry.route is not None:
        return entry.route
    path = request.raw_path.partition("?")[0][:64]
    return _LONG_HEX.sub("…", path.encode("ascii", "backslashreplace").decode())


class AccessLogger(AbstractAccessLogger):
    """aiohttp's hook. Lines are made and written when there is time for them (``Afterwards``)."""

    line = AccessLine({})
    afterwards: Afterwards

    def __init__(self, logger: Logger, log_format: str) -> None:
        super().__init__(logger, log_format)
        # One logger a connection: the loop is asked for once, not for every line.
        self._write = functools.partial(line_writer().write_soon, loop=asyncio.get_running_loop())

    def log(self, request: BaseRequest, response: StreamResponse, time: float) -> None:
        """One line for one answered request; ``time`` is its duration in seconds, in whole milliseconds."""
        entry = request.get(ENTRY)
        seconds = time if entry is None else perf_counter() - entry.started
        self.afterwards.put(functools.partial(self._tell, request, response, seconds, clock()))

    def _tell(self, request: BaseRequest, response: StreamResponse, seconds: float, at: float) -> None:
        entry = request.get(ENTRY)
        observe_request(entry.route if entry is not None else None, response.status, seconds)
        self._write(self.line.render(request, response, seconds, at))
