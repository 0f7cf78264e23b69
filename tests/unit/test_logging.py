"""Facts about the logs: what every line holds, what no line ever holds, and how lines reach stdout."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import orjson
import pytest

from skipbus.shared.logging import LogQueue, cause_chain, new_correlation_id, render_json
from skipbus.shared.settings import Secret

ROOT = Path(__file__).parents[2]
PASSWORD = 'pa"ss\\wörd/ %'
BUS_PASSWORD = "bus password"
PREPARE = f"""
import asyncio, logging, os, sys, threading, time, warnings
from skipbus.shared.settings import load_settings
from skipbus.shared.logging import configure_logging, get_logger, log_correlation_id, log_queue
settings = load_settings({{
    "SKIP_LOCAL_SYSTEM_ID": "KP_Alice", "SKIP_REMOTE_SYSTEM_ID_1": "KP_Bob", "MYSQL_USER": "u",
    "MYSQL_DATABASE": "d", "MYSQL_PASSWORD": {PASSWORD!r},
    "RABBITMQ_URL": "amqp://user:bus%20password@127.0.0.1:1/",
    **dict(pair.split("=") for pair in sys.argv[1:]),
}})
configure_logging(settings, "api")
log = get_logger("test")
"""


def output_of(script: str, *environ: str, expect: int = 0) -> str:
    """What a process with configured logs writes to stdout. Its stderr stays empty."""
    done = subprocess.run(
        [sys.executable, "-c", PREPARE + script, *environ],
        cwd=ROOT,
        capture_output=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stderr.decode()) == (expect, "")
    return done.stdout.decode()


def lines_of(script: str, *environ: str, expect: int = 0) -> list[dict[str, Any]]:
    return [orjson.loads(line) for line in output_of(script, *environ, expect=expect).splitlines()]


def line_of(script: str, *environ: str, expect: int = 0) -> dict[str, Any]:
    (line,) = lines_of(script, *environ, expect=expect)
    return line


# What every line holds


def test_a_line_is_one_json_object_with_the_common_fields_first() -> None:
    line = line_of("log.info('key issued', peer='KP_Bob', size_bits=256)")
    assert list(line)[:6] == ["timestamp", "level", "event", "service", "system_id", "pid"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", line.pop("timestamp"))
    assert isinstance(line.pop("pid"), int)
    assert line == {
        "level": "info",
        "event": "key issued",
        "service": "api",
        "system_id": "KP_Alice",
        "logger": "test",
        "peer": "KP_Bob",
        "size_bits": 256,
    }


def test_the_pid_is_that_of_the_process_that_writes_the_line() -> None:
    own, reported = output_of("print(os.getpid(), flush=True); log.info('x')").splitlines()
    assert orjson.loads(reported)["pid"] == int(own)


def test_a_bound_field_cannot_replace_a_common_one() -> None:
    assert line_of("log.info('x', service='syncer', pid=1)")["service"] == "api"


def test_the_correlation_id_of_the_request_stands_in_each_of_its_lines_and_in_no_other() -> None:
    script = """
import structlog
async def handle(name):
    log_correlation_id(name)
    await asyncio.sleep(0)
    log.info("handled", name=name)
    logging.getLogger("library").info("handled")
async def main():
    await asyncio.gather(handle("a"), handle("b"))
    log.info("outside")
asyncio.run(main())
with structlog.contextvars.bound_contextvars(correlation_id="c"):
    log.info("bound")
"""
    ids = [line.get("correlation_id") for line in lines_of(script)]
    assert ids == ["a", "a", "b", "b", None, "c"]


@pytest.mark.parametrize(
    ("environ", "levels"),
    [
        (("SKIP_LOG_LEVEL=error",), ["error"]),
        (("SKIP_LOG_LEVEL=warning",), ["warning", "error"]),
        ((), ["info", "warning", "error"]),
        (("SKIP_DEBUG=true", "SKIP_LOG_LEVEL=error"), ["debug", "info", "warning", "error"]),
    ],
)
def test_lines_below_the_level_are_left_out_for_our_loggers_and_the_libraries(
    environ: tuple[str, ...], levels: list[str]
) -> None:
    script = "for level in ('debug', 'info', 'warning', 'error'): getattr({}, level)('x')"
    assert [line["level"] for line in lines_of(script.format("log"), *environ)] == levels
    library = "logging.getLogger('aiohttp.server')"
    assert [line["level"] for line in lines_of(script.format(library), *environ)] == levels


@pytest.mark.parametrize("name", ["aiohttp.server", "aio_pika", "aiormq.connection", "alembic", "asyncio"])
def test_libraries_go_through_the_same_renderer(name: str) -> None:
    line = line_of(f"logging.getLogger({name!r}).warning('%s of %d', 'one', 2)")
    assert (line["event"], line["level"], line["logger"]) == ("one of 2", "warning", name)
    assert (line["service"], line["system_id"]) == ("api", "KP_Alice")


def test_warnings_go_through_the_same_renderer() -> None:
    line = line_of("warnings.warn('old habit')")
    assert line["logger"] == "py.warnings"
    assert "old habit" in line["event"]


def test_a_librarys_wrong_arguments_end_nothing() -> None:
    script = "sys.stderr = sys.stdout\nlogging.getLogger('x').error('%d', 'text')\nlog.info('next')"
    out = output_of(script)
    assert "--- Logging error ---" in out
    assert '"event":"next"' in out


def test_the_log_in_frames_and_statements_that_libraries_show_at_low_levels_stay_off() -> None:
    script = """
logging.getLogger("aiormq.connection").debug("frame")
logging.getLogger("aio_pika.robust_connection").debug("frame")
logging.getLogger("sqlalchemy.engine.Engine").info("INSERT")
"""
    assert lines_of(script, "SKIP_DEBUG=true") == []


def test_development_lines_are_for_people_and_still_whole() -> None:
    out = output_of("log.info('key issued', peer='KP_Bob')", "SKIP_ENV=development")
    assert re.search(r"Z \[info +\] key issued +\[test\] service=api system_id=KP_Alice pid=\d+ peer=KP_Bob\n", out)
    assert "\x1b" not in out


def test_a_log_injection_by_control_characters_makes_no_second_line_and_steers_no_terminal() -> None:
    script = r"log.info('path \r\n[info] forged', path='/\n\x1b[2J\x9b')"
    (line,) = output_of(script, "SKIP_ENV=development").splitlines()
    assert "\x1b" not in line
    assert "\x9b" not in line
    assert len(output_of(script).splitlines()) == 1


# Exceptions


RAISE = """
def inner():
    password = "a local secret"
    raise OSError(5, "refused\\nby the host")
def outer():
    try:
        inner()
    except OSError as error:
        raise RuntimeError("the store cannot be reached") from error
"""


def test_an_exception_is_a_one_line_chain_of_causes_and_a_traceback_without_locals() -> None:
    script = RAISE + "try:\n    outer()\nexcept RuntimeError:\n    log.exception('failed')"
    line = line_of(script)
    chain = "RuntimeError: the store cannot be reached; caused by OSError: [Errno 5] refused by the host"
    assert line["error"] == chain
    assert line["level"] == "error"
    assert line["traceback"].startswith("Traceback (most recent call last):\n")
    assert "in inner" in line["traceback"]
    assert "a local secret" not in output_of(script)
    assert "exc_info" not in line


def test_a_librarys_exception_is_explained_in_the_same_way() -> None:
    script = RAISE + "try:\n    outer()\nexcept RuntimeError:\n    logging.getLogger('x').exception('failed')"
    line = line_of(script)
    assert line["error"].startswith("RuntimeError: the store cannot be reached; caused by OSError")
    assert "in inner" in line["traceback"]


def test_in_development_the_traceback_stands_below_its_line() -> None:
    script = RAISE + "try:\n    outer()\nexcept RuntimeError:\n    log.exception('failed')"
    out = output_of(script, "SKIP_ENV=development")
    assert "\nTraceback (most recent call last):\n" in out
    assert "a local secret" not in out


def test_what_nobody_caught_becomes_a_line_and_the_process_still_fails() -> None:
    line = line_of("raise ExceptionGroup('tasks', [ValueError('a'), KeyError('b')])", expect=1)
    assert (line["level"], line["logger"]) == ("critical", "uncaught")
    assert line["error"] == "ExceptionGroup: tasks (2 sub-exceptions) [ValueError: a, KeyError: 'b']"


def test_what_nobody_caught_in_a_thread_becomes_a_line() -> None:
    script = "thread = threading.Thread(target=lambda: 1 / 0, name='worker-1'); thread.start(); thread.join()"
    line = line_of(script)
    assert (line["thread"], line["error"]) == ("worker-1", "ZeroDivisionError: division by zero")


def test_a_chain_of_causes_ends_where_it_comes_back_to_itself_or_is_suppressed() -> None:
    first, second = ValueError("first"), ValueError("second")
    first.__cause__, second.__cause__ = second, first
    assert cause_chain(first) == "ValueError: first; caused by ValueError: second"
    third = ValueError()
    third.__context__, third.__suppress_context__ = first, True
    assert cause_chain(third) == "ValueError"


def test_a_context_without_a_cause_is_part_of_the_chain_and_long_messages_are_cut() -> None:
    outer = ValueError("x" * 10_000)
    outer.__context__ = KeyError("k")
    assert cause_chain(outer) == f"ValueError: {'x' * 300}; caused by KeyError: 'k'"


# What no line ever holds


def test_a_secret_shows_as_stars_wherever_it_stands_in_an_event() -> None:
    script = """
password = settings.mysql.password
log.info(f"x {password}", a=password, b=[password], c={"d": password}, settings=settings)
logging.getLogger("library").error("cannot %s %r", password, [password])
"""
    for environment in ("production", "development"):
        out = output_of(script, f"SKIP_ENV={environment}")
        assert out.count("***") >= 7
        assert PASSWORD not in out
        assert BUS_PASSWORD not in out


def test_a_password_of_the_bus_does_not_come_out_of_a_real_connection_attempt() -> None:
    script = """
import aio_pika
async def main():
    url = settings.rabbitmq_url.reveal()
    try:
        await aio_pika.connect(url, timeout=5)
    except Exception as error:
        log.exception("the bus cannot be reached", error_text=repr(error))
    robust = asyncio.ensure_future(aio_pika.connect_robust(url, timeout=1, reconnect_interval=0.05))
    await asyncio.sleep(0.3)
    robust.cancel()
    await asyncio.wait([robust])
asyncio.run(main())
"""
    out = output_of(script, "SKIP_DEBUG=true")
    assert "the bus cannot be reached" in out
    assert '"logger":"aio' in out
    assert "bus%20password" not in out
    assert BUS_PASSWORD not in out


def json_of(**fields: object) -> dict[str, Any]:
    line = render_json(None, "info", fields)
    loaded: dict[str, Any] = orjson.loads(line)
    return loaded


def test_bytes_are_counted_and_never_shown_because_they_may_be_a_key() -> None:
    key = bytes(range(65, 97))
    assert json_of(key=key, list=[bytearray(key)], map={"x": {key}, "y": memoryview(key)}) == {
        "key": "<32 bytes>",
        "list": ["<32 bytes>"],
        "map": {"x": ["<32 bytes>"], "y": "<32 bytes>"},
    }
    assert json_of(event="x", map={key: key}) == {"event": "x", "map": "<dict>"}


class Hostile:
    def __repr__(self) -> str:
        raise RuntimeError("no")


class HostileError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (Hostile(), "<Hostile>"),
        (HostileError(), "HostileError: its message cannot be shown"),
        ("\udc80", "?"),
        (1 << 80, "<int>"),
        (Secret("x"), "***"),
        (ValueError("v"), "ValueError: v"),
        ({"a": None, "x": (4.5,)}, {"a": None, "x": [4.5]}),
        (Path("/x"), "PosixPath('/x')"),
        (True, True),
    ],
)
def test_any_value_can_be_rendered(value: object, shown: object) -> None:
    assert json_of(value=value) == {"value": shown}


def test_a_value_that_contains_itself_costs_no_other_field() -> None:
    endless: list[object] = []
    endless.append(endless)
    assert json_of(event="x\udc80", count=3, endless=endless) == {"event": "x?", "count": 3, "endless": "<list>"}


# Correlation ids


def test_correlation_ids_are_short_hex_and_never_repeat() -> None:
    ids = [new_correlation_id() for _ in range(10_000)]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"[0-9a-f]{12,}", text) for text in ids)


# LogQueue


class Pipe:
    """A pipe with a LogQueue at its end."""

    def __init__(self, max_lines: int = 10_000) -> None:
        self.reader, self.end = os.pipe()
        fcntl.fcntl(self.end, fcntl.F_SETPIPE_SZ, 4096)
        self._received = b""
        self.queue = LogQueue(self.end, max_lines)
        self.queue.start()

    def read_lines(self, count: int) -> list[bytes]:
        """Waits until there are as many lines in all; the last one may not be whole yet."""
        while self._received.count(b"\n") < count:
            self._received += os.read(self.reader, 1 << 20)
        return self._received.splitlines()

    def close(self) -> None:
        # The reader goes first: it ends a thread that waits for it.
        for descriptor in (self.reader, self.end):
            with contextlib.suppress(OSError):
                os.close(descriptor)
        self.queue.close()


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    made = Pipe(max_lines=100)
    yield made
    made.close()


LINE = b"x" * 1000


def stop_reading(pipe: Pipe) -> None:
    """Puts lines until the pipe and the queue are full, and the thread that writes is blocked."""
    deadline = time.monotonic() + 10
    full = False
    while not full:
        for _ in range(200):
            pipe.queue.put(LINE)
        time.sleep(0.1)  # the thread takes what it can
        dropped = pipe.queue.dropped_lines
        pipe.queue.put(LINE)
        full = pipe.queue.dropped_lines > dropped
        assert time.monotonic() < deadline


def test_lines_come_out_whole_and_in_order(pipe: Pipe) -> None:
    for number in range(50):
        pipe.queue.put(b"line %d" % number)
    assert pipe.read_lines(50) == [b"line %d" % number for number in range(50)]


def test_a_reader_that_has_stopped_blocks_nobody_and_lines_beyond_the_bound_are_counted(pipe: Pipe) -> None:
    began = time.monotonic()
    stop_reading(pipe)
    before = pipe.queue.dropped_lines
    for _ in range(10_000):
        pipe.queue.put(LINE)
    assert time.monotonic() - began < 5
    assert pipe.queue.dropped_lines == before + 10_000


def test_a_reader_that_goes_on_gets_what_waited_and_then_new_lines(pipe: Pipe) -> None:
    stop_reading(pipe)
    count, refused = 1, pipe.queue.dropped_lines
    pipe.queue.put(b"new")
    while pipe.queue.dropped_lines > refused:
        # The thread holds lines too: the queue has room once it has taken them.
        count, refused = len(pipe.read_lines(count)) + 1, pipe.queue.dropped_lines
        pipe.queue.put(b"new")
    while (lines := pipe.read_lines(count))[-1] != b"new":
        count += 1
    assert set(lines) == {LINE, b"new"}


def test_closing_writes_what_waits(pipe: Pipe) -> None:
    pipe.queue.put(b"last")
    pipe.queue.close()
    assert pipe.read_lines(1) == [b"last"]


def test_closing_waits_for_a_slow_reader_but_not_for_long(pipe: Pipe) -> None:
    stop_reading(pipe)
    began = time.monotonic()
    pipe.queue.close(wait_seconds=0.2)
    assert 0.1 < time.monotonic() - began < 2


def test_lines_after_the_close_are_counted_as_dropped(pipe: Pipe) -> None:
    pipe.queue.close()
    pipe.queue.put(b"late")
    assert pipe.queue.dropped_lines == 1


@pytest.mark.parametrize("broken", ["reader gone", "descriptor closed", "disk full"])
def test_a_broken_stdout_never_raises_and_lines_are_counted_as_dropped(broken: str) -> None:
    reader, descriptor = os.pipe()
    os.close(reader)
    if broken == "descriptor closed":
        os.close(descriptor)
    if broken == "disk full":
        os.close(descriptor)
        descriptor = os.open("/dev/full", os.O_WRONLY)
    broken_queue = LogQueue(descriptor)
    for _ in range(3):
        broken_queue.put(b"line")
    broken_queue.start()
    broken_queue.close(5)
    assert broken_queue.dropped_lines == 3
    with contextlib.suppress(OSError):
        os.close(descriptor)


def test_a_pipe_that_another_process_made_non_blocking_loses_no_line(pipe: Pipe) -> None:
    os.set_blocking(pipe.end, False)
    for number in range(100):
        pipe.queue.put(b"%04d" % number + LINE)
    assert [line[:4] for line in pipe.read_lines(100)] == [b"%04d" % number for number in range(100)]


def test_no_line_is_torn_or_lost_where_many_threads_log(tmp_path: Path) -> None:
    path = tmp_path / "log"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    queue = LogQueue(descriptor)
    queue.start()

    def put(name: int) -> None:
        for number in range(2000):
            queue.put(b"%d-%d-%s" % (name, number, b"x" * (number % 97)))

    with ThreadPoolExecutor() as threads:
        list(threads.map(put, range(4)))
    queue.close(10)
    os.close(descriptor)
    lines = path.read_bytes().splitlines()
    assert len(lines) == 8000
    for name in range(4):
        own = [line for line in lines if line.startswith(b"%d-" % name)]
        assert own == [b"%d-%d-%s" % (name, n, b"x" * (n % 97)) for n in range(2000)]


def test_a_process_whose_reader_has_stopped_goes_on_and_ends() -> None:
    script = "for _ in range(20_000): log.info('x' * 100)\nsys.stderr.write('done')"
    began = time.monotonic()
    with subprocess.Popen(
        [sys.executable, "-c", PREPARE + script], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.wait(60) == 0
        assert process.stderr is not None
        assert process.stderr.read() == b"done"
    assert time.monotonic() - began < 30


def test_lines_taken_last_still_come_out_when_the_process_ends() -> None:
    lines = lines_of("for number in range(5000): log.info('x', number=number)")
    assert [line["number"] for line in lines] == list(range(5000))


def test_configuring_twice_writes_each_line_once() -> None:
    script = "configure_logging(settings, 'syncer'); log.info('x'); logging.getLogger('x').error('y')"
    assert [line["service"] for line in lines_of(script)] == ["syncer", "syncer"]
