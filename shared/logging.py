"""The logs of a process: set up once, one line for each event, ours and the libraries' alike, on standard output.

Rules: JSON lines in production, readable ones in development. Every line has `timestamp`, `level`, `event`, `service`,
`system_id` and `pid`; within a request also its `correlation_id`. A log call never raises and never waits for standard
output: a thread writes a bounded queue, and what does not fit is dropped and counted. A `Secret` shows as `***` and
bytes show as their number, because they may be a key. Levels at which a library logs credentials stay off.
"""

from __future__ import annotations

import atexit
import itertools
import logging
import os
import queue
import re
import secrets
import select
import sys
import threading
import time
import traceback
from types import TracebackType
from typing import cast

import orjson
import structlog
from structlog.contextvars import bind_contextvars, merge_contextvars
from structlog.processors import TimeStamper, add_log_level
from structlog.stdlib import ProcessorFormatter, add_logger_name
from structlog.typing import EventDict, FilteringBoundLogger, Processor

from skipbus.shared.settings import Settings

# At debug, aiormq logs the frames that it sends, the password among them; at info, sqlalchemy logs statements with
# their values, and alembic logs what it assumes, at every start.
_INFO, _WARNING = ("aiormq", "aio_pika"), ("sqlalchemy", "alembic")
_LIBRARY_LEVELS = dict.fromkeys(_INFO, logging.INFO) | dict.fromkeys(_WARNING, logging.WARNING)
_MAX_CAUSES = 8
_MAX_MESSAGE_LENGTH = 300
_MAX_TRACEBACK_LENGTH = 20_000
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f]")
MAX_LINES = 10_000
_MAX_LINES_PER_WRITE = 256
_GATHER_SECONDS = 0.002
_END = b""
_console = structlog.dev.ConsoleRenderer(colors=os.isatty(1), sort_keys=False)
_id_prefix = secrets.token_hex(4)
_id_counter = itertools.count()


class LogQueue:
    """Takes lines for a file descriptor. ``dropped_lines`` counts those that were given up."""

    def __init__(self, descriptor: int = 1, max_lines: int = MAX_LINES) -> None:
        self.dropped_lines = 0
        self._descriptor = descriptor
        self._max_lines = max_lines
        # Without a bound of its own, because the lock of queue.Queue is not safe in a signal handler.
        self._lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        # A daemon: a reader that has stopped must not keep the process from ending.
        self._writer = threading.Thread(target=self._write_lines, name="log", daemon=True)

    def start(self) -> None:
        """Starts the thread, once. Lines that were taken before wait in the queue."""
        if not self._writer.is_alive():
            self._writer.start()

    def put(self, line: bytes) -> None:
        """Takes one line, without its line end."""
        if self._lines.qsize() < self._max_lines:
            self._lines.put(line + b"\n")
        else:
            self.dropped_lines += 1

    def close(self, wait_seconds: float = 0.5) -> None:
        """Waits until everything is written, at most ``wait_seconds``. Later lines are dropped and counted."""
        self._max_lines = 0
        self._lines.put(_END)
        if self._writer.is_alive():
            self._writer.join(wait_seconds)

    def _write_lines(self) -> None:
        lines: list[bytes] = []
        while _END not in lines:
            lines = [self._lines.get()]
            # Lines that follow soon go out with it: waking this thread for each would cost more than the line itself.
            time.sleep(_GATHER_SECONDS)
            while len(lines) < _MAX_LINES_PER_WRITE and not self._lines.empty():
                lines.append(self._lines.get())
            self._write(b"".join(lines))

    def _write(self, octets: bytes) -> None:
        while octets:
            try:
                octets = octets[os.write(self._descriptor, octets) :]
            except BlockingIOError:
                # Another process has made the pipe non-blocking for all that share it.
                select.select([], [self._descriptor], [])
            except OSError:
                # The reader is gone, or the disk is full.
                self.dropped_lines += octets.count(b"\n")
                return


log_queue = LogQueue()


def configure_logging(settings: Settings, service: str) -> None:
    """Sets up the logs of this process, before anything else is done."""
    level = logging.getLevelNamesMapping()[settings.log_level.upper()]
    fields: list[Processor] = [merge_contextvars, add_logger_name, add_log_level, TimeStamper(fmt="iso", utc=True)]
    processors = [*fields, explain_exception, _common_fields_first(service, settings.local_system_id)]
    render = render_for_people if settings.environment == "development" else render_json
    structlog.configure(
        processors=[*processors, render],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=_Output,
        cache_logger_on_first_use=True,
    )
    _configure_libraries(processors, render, level)
    sys.excepthook = _log_uncaught
    threading.excepthook = _log_uncaught_in_thread
    log_queue.start()
    atexit.register(log_queue.close)
    if settings.service_links:
        get_logger("settings").info("variables ignored, an orchestrator set them", names=settings.service_links)


def get_logger(name: str) -> FilteringBoundLogger:
    """A logger whose lines carry `logger=name`. It may be made at import, before the set-up."""
    return cast(FilteringBoundLogger, structlog.get_logger(name))


def new_correlation_id() -> str:
    """An id for one request: 8 hex digits of this process, and 4 or more of a counter."""
    return f"{_id_prefix}{next(_id_counter):04x}"


def log_correlation_id(correlation_id: str) -> None:
    """Puts the id into every later line of this task, and of the tasks that it makes."""
    bind_contextvars(correlation_id=correlation_id)


class _Output:
    """Where structlog puts the rendered lines of one logger, whatever their level."""

    def __init__(self, name: str = "") -> None:
        self.name = name
        self.debug = self.info = self.warning = self.error = self.critical = log_queue.put


class _LibraryHandler(logging.Handler):
    """Puts rendered records of libraries into the same queue."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            log_queue.put(self.format(record).encode())
        except Exception:  # noqa: BLE001 -- as logging's own handlers do, for wrong arguments of a library
            self.handleError(record)


def _configure_libraries(processors: list[Processor], render: Processor, level: int) -> None:
    formatters = [ProcessorFormatter.remove_processors_meta, render, lambda _logger, _method, line: line.decode()]
    handler = _LibraryHandler()
    handler.setFormatter(ProcessorFormatter(foreign_pre_chain=processors, processors=formatters))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for name, least in _LIBRARY_LEVELS.items():
        logging.getLogger(name).setLevel(max(level, least))
    logging.captureWarnings(True)


def _common_fields_first(service: str, system_id: str) -> Processor:
    common = {"service": service, "system_id": system_id, "pid": os.getpid()}
    first = dict.fromkeys(("timestamp", "level", "event")) | common
    # Once more at the end: no field of an event replaces one of these.
    return lambda _logger, _method, event: {**first, **event, **common}


def explain_exception(_logger: object, _method: str, event: EventDict) -> EventDict:
    """Turns `exc_info` into `error`, the chain of causes in one line, and `traceback`, without local variables."""
    given = event.pop("exc_info", None)
    error = sys.exception() if given is True else given[1] if isinstance(given, tuple) else given
    if isinstance(error, BaseException):
        event["error"] = cause_chain(error)
        # Of a long one the end is kept: it names the exception.
        event["traceback"] = "".join(traceback.format_exception(error))[-_MAX_TRACEBACK_LENGTH:]
    return event


def cause_chain(error: BaseException) -> str:
    """The exception and its causes in one line, the outermost first."""
    links: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in links and len(links) < _MAX_CAUSES:
        links.append(link)
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    return "; caused by ".join(map(_one_line, links))


def _one_line(error: BaseException) -> str:
    try:
        text = " ".join(str(error).split())[:_MAX_MESSAGE_LENGTH]
    except Exception:  # noqa: BLE001 -- the text of an exception must not cost the line about it
        text = "its message cannot be shown"
    if isinstance(error, BaseExceptionGroup):
        text += f" [{', '.join(map(_one_line, error.exceptions))}]"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def render_json(_logger: object, _method: str, event: EventDict) -> bytes:
    """The last processor in production."""
    try:
        return orjson.dumps(event, default=shown)
    except TypeError:
        # A lone surrogate, which a client can send and UTF-8 cannot carry, or a value that contains itself.
        return orjson.dumps({name: _plain(value) for name, value in event.items()})


def shown(value: object) -> object:
    """What the log shows of a value that JSON does not know."""
    if isinstance(value, bytes | bytearray | memoryview):
        return f"<{len(value)} bytes>"
    if isinstance(value, set | frozenset):
        return list(value)
    try:
        return cause_chain(value) if isinstance(value, BaseException) else repr(value)
    except Exception:  # noqa: BLE001 -- whatever is in an event, the line must come
        return f"<{type(value).__name__}>"


def _plain(value: object) -> object:
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    is_small_number = isinstance(value, int | float) and abs(value) < 1 << 53
    return value if is_small_number else f"<{type(value).__name__}>"


def render_for_people(logger: object, method: str, event: EventDict) -> bytes:
    """The last processor in development. Control characters are escaped: a client must not steer the terminal."""
    fields: EventDict = orjson.loads(render_json(logger, method, event))
    below = fields.pop("traceback", "").splitlines()
    fields = {name: _visible(value) if isinstance(value, str) else value for name, value in fields.items()}
    if below:
        fields["exception"] = "\n".join(map(_visible, below))
    return _console(logger, method, fields).encode()


def _visible(text: str) -> str:
    return _CONTROLS.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def _log_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        get_logger("uncaught").critical("the process ends by an exception", exc_info=(kind, error, trace))


def _log_uncaught_in_thread(found: threading.ExceptHookArgs) -> None:
    thread = found.thread.name if found.thread else "unknown"
    get_logger("uncaught").critical("a thread ended by an exception", thread=thread, exc_info=found.exc_value)
