"""Owns the logs of a process: set up once, one line an event, ours and the libraries' alike, on stdout.

Rules: JSON lines in production, readable ones in development; every line has `timestamp`, `level`,
`event`, `service`, `system_id` and `pid`; within a request also its `correlation_id`. Known secrets never
come out, and the libraries' levels that show messages or credentials stay off.
Leaves to others: rendering (`shared/log_rendering.py`), writing (`shared/line_writer.py`), what is worth a line.
"""

from __future__ import annotations

import atexit
import itertools
import logging
import os
import secrets as random_source
import sys
import threading
from collections.abc import Iterable
from contextvars import ContextVar
from types import TracebackType
from typing import cast

import structlog
from structlog.contextvars import merge_contextvars
from structlog.typing import EventDict, FilteringBoundLogger, Processor

from skipbus.shared.config import Settings
from skipbus.shared.line_writer import LineWriter
from skipbus.shared.log_rendering import (
    console_renderer,
    explain_exception,
    fields,
    json_renderer,
    redactor,
    show_plainly,
    utc_timestamp,
)
from skipbus.shared.secret import Secret

__all__ = [
    "CORRELATION_ID",
    "LineWriter",
    "configure_logging",
    "get_logger",
    "line_writer",
    "new_correlation_id",
    "utc_timestamp",
]

# The id of the request or message that is being handled. Set it once for each; tasks inherit it.
CORRELATION_ID: ContextVar[str | None] = ContextVar("correlation_id", default=None)

# At debug, aiormq writes the frames that it sends, the log-in with the password among them; at info,
# sqlalchemy writes statements with their values.
# alembic tells at info what it assumes, at every start.
_LIBRARY_FLOORS = {
    "aiormq": logging.INFO,
    "aio_pika": logging.INFO,
    "sqlalchemy": logging.WARNING,
    "alembic": logging.WARNING,
}


class _Process:
    """What belongs to this process and not to its parent: the writer, and the ids' prefix and counter."""

    writer: LineWriter | None = None
    id_prefix = random_source.token_hex(4)
    id_counter = itertools.count()


def configure_logging(settings: Settings, service: str, secrets: Iterable[Secret] = ()) -> None:
    """Set up the logs of this process, once, before anything else is done.

    `secrets` are kept out of every line, and so are the password of the store and the URL of the bus.
    """
    writer = line_writer()
    level = logging.getLevelNamesMapping()[settings.log_level.upper()]
    redact = redactor([settings.mysql.password, settings.rabbitmq_url, *secrets])
    if settings.environment == "development":
        render = console_renderer(redact, colors=os.isatty(1))
    else:
        render = json_renderer(redact)
    chain = _chain(fields(service, settings.local_system_id), render)
    _configure_structlog(chain, level, writer)
    _configure_standard_library(chain, level, writer)
    _log_what_nobody_caught()


def get_logger(name: str) -> FilteringBoundLogger:
    """A logger whose lines carry `logger=name`. It may be made at import, before the set-up."""
    return cast(FilteringBoundLogger, structlog.get_logger(name))


def line_writer() -> LineWriter:
    """The one writer on stdout that all lines of this process go through."""
    if _Process.writer is None:
        _Process.writer = LineWriter(1)
        atexit.register(_Process.writer.close)
    return _Process.writer


def new_correlation_id() -> str:
    """An id for one request: 8 hex digits of this process, and 4 or more of a counter."""
    return f"{_Process.id_prefix}{next(_Process.id_counter):04x}"


def _renew_after_fork() -> None:
    # A forked child would go on counting under the same prefix, and so give out its parent's ids again.
    _Process.id_prefix = random_source.token_hex(4)
    _Process.id_counter = itertools.count()
    if _Process.writer is not None:
        _Process.writer.forget()


os.register_at_fork(after_in_child=_renew_after_fork)


def _chain(add_fields: Processor, render: Processor) -> list[Processor]:
    return [merge_contextvars, _add_origin, add_fields, explain_exception, show_plainly, render]


def _add_origin(logger: object, _method: str, event: EventDict) -> EventDict:
    if isinstance(logger, _Output):
        event["logger"] = logger.name
    correlation_id = CORRELATION_ID.get()
    if correlation_id is not None:
        event.setdefault("correlation_id", correlation_id)
    return event


class _Output:
    """What structlog hands rendered lines to."""

    def __init__(self, writer: LineWriter, name: str) -> None:
        self.name = name
        self.msg = writer.write_now

    def __getattr__(self, _level: str) -> object:
        # One line goes the same way at every level.
        return self.msg


def _configure_structlog(chain: list[Processor], level: int, writer: LineWriter) -> None:
    structlog.configure(
        processors=chain,
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=lambda name="": _Output(writer, name),
        cache_logger_on_first_use=True,
    )


class _StandardHandler(logging.Handler):
    """Brings the records of libraries through the same chain."""

    def __init__(self, chain: list[Processor], writer: LineWriter) -> None:
        super().__init__()
        self._chain = chain
        self._writer = writer

    def emit(self, record: logging.LogRecord) -> None:
        event: EventDict = {"event": _message(record), "logger": record.name, "exc_info": record.exc_info}
        line: object = event
        for process in self._chain:
            line = process(None, record.levelname.lower(), cast(EventDict, line))
        self._writer.write_now(cast(bytes, line))


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except Exception:  # noqa: BLE001 -- a library's wrong arguments must not end what was being done
        return str(record.msg)


def _configure_standard_library(chain: list[Processor], level: int, writer: LineWriter) -> None:
    root = logging.getLogger()
    root.handlers[:] = [_StandardHandler(chain, writer)]
    root.setLevel(level)
    for name, floor in _LIBRARY_FLOORS.items():
        logging.getLogger(name).setLevel(max(level, floor))
    logging.captureWarnings(True)


def _log_what_nobody_caught() -> None:
    """Exceptions that end the process or a thread come out as a line too, not as a bare traceback."""
    sys.excepthook = _log_uncaught
    threading.excepthook = _log_uncaught_in_thread


def _log_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        return
    get_logger("uncaught").critical("the process ends by an exception", exc_info=(kind, error, trace))


def _log_uncaught_in_thread(found: threading.ExceptHookArgs) -> None:
    thread = found.thread.name if found.thread else "unknown"
    get_logger("uncaught").critical(
        "a thread ended by an exception", thread=thread, exc_info=(found.exc_type, found.exc_value, None)
    )
