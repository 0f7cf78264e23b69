"""The access log: one line for each request, with the reason of a refusal, since routers tell their operators nothing.

Rules: the line enters the log's queue before the answer is written, at every ``SKIP_LOG_LEVEL``. A path is shown as
its route. Of a keyId the log shows the first 12 digits, enough to find a key again and too few to fetch it. A path that
is no route is cut, and long runs of hex in it are masked. Query strings are not logged, only the remoteSystemID once it
has been checked.
"""

from __future__ import annotations

import logging
import re
from time import perf_counter
from typing import cast

import structlog
from aiohttp.web import BaseRequest
from structlog.typing import FilteringBoundLogger

from skipbus.services.api.metrics import observe_request
from skipbus.services.api.tls.callers import Caller

_SHOWN_KEY_ID_DIGITS = 12
_LONG_HEX = re.compile(r"[0-9a-fA-F]{16,}")

_log = cast(
    FilteringBoundLogger,
    structlog.wrap_logger(
        None,
        # The reason of a refusal is logged whatever the level is: no router reports it.
        wrapper_class=structlog.make_filtering_bound_logger(logging.NOTSET),
        logger_factory_args=("access",),
    ),
)


class Entry:
    """What the log says of one request beyond what HTTP says."""

    __slots__ = (
        "caller",
        "correlation_id",
        "issue_correlation_id",
        "key_id",
        "reason",
        "remote_system_id",
        "route",
        "started",
    )

    def __init__(self, correlation_id: str, caller: Caller | None = None) -> None:
        self.caller = caller
        self.correlation_id = correlation_id
        self.started = perf_counter()
        self.route: str | None = None
        self.key_id: str | None = None
        self.remote_system_id: str | None = None
        self.reason: str | None = None
        self.issue_correlation_id: str | None = None


def log_request(request: BaseRequest, entry: Entry, status: int) -> None:
    """Logs and counts one request. Call it when the answer is known and before it is written."""
    seconds = perf_counter() - entry.started
    observe_request(entry.route, status, seconds)
    log = _log.info if status < 400 else _log.warning
    log(
        "request",
        method=request.method[:16],
        path=shown_path(request, entry),
        status=status,
        duration_ms=round(seconds * 1000, 3),
        client=request.remote,
        correlation_id=entry.correlation_id,
        **_known(entry),
    )


def _known(entry: Entry) -> dict[str, str]:
    """The fields that only some requests have."""
    fields = {
        "remote_system_id": entry.remote_system_id,
        "reason": entry.reason,
        "issued_as": entry.issue_correlation_id,
    }
    if entry.caller is not None:
        fields |= {"identity": entry.caller.shown, "proof": entry.caller.proof}
    return {name: value for name, value in fields.items() if value is not None}


def shown_path(request: BaseRequest, entry: Entry) -> str:
    """The path as the log may show it."""
    if entry.key_id is not None and entry.route is not None:
        return f"{entry.route}/{entry.key_id[:_SHOWN_KEY_ID_DIGITS]}…"
    if entry.route is not None:
        return entry.route
    path = request.raw_path.partition("?")[0][:64]
    return _LONG_HEX.sub("…", path.encode("ascii", "backslashreplace").decode())
