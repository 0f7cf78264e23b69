"""Facts about the logs: what every line holds, what no line ever holds, and how lines reach stdout."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

import orjson
import pytest

from skipbus.shared.line_writer import LineWriter
from skipbus.shared.log_rendering import cause_chain, json_renderer, plain, redactor, utc_timestamp
from skipbus.shared.logs import new_correlation_id
from skipbus.shared.secret import Secret

ROOT = Path(__file__).parents[2]
PASSWORD = 'pa"ss\\wörd/ %'
BUS_PASSWORD = "bus password"
PREPARE = f"""
import asyncio, logging, os, sys, threading, warnings
from skipbus.shared.config import load_settings
from skipbus.shared.logs import *
from skipbus.shared.secret import Secret
settings = load_settings({{
    "SKIP_LOCAL_SYSTEM_ID": "KP_Alice", "SKIP_REMOTE_SYSTEM_ID_1": "KP_Bob", "MYSQL_USER": "u",
    "MYSQL_DATABASE": "d", "MYSQL_PASSWORD": {PASSWORD!r},
    "RABBITMQ_URL": "amqp://user:bus%20password@127.0.0.1:1/",
    **dict(pair.split("=") for pair in sys.argv[1:]),
}})
configure_logging(settings, "api", [Secret("hunter22"), Secret("")])
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
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line.pop("timestamp"))
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


def test_the_timestamp_is_utc_to_the_millisecond() -> None:
    assert utc_timestamp(1_634_567_890.1239) == "2021-10-18T14:38:10.123Z"
    assert utc_timestamp(0) == "1970-01-01T00:00:00.000Z"


def test_the_correlation_id_of_the_request_stands_in_each_of_its_lines_and_in_no_other() -> None:
    script = """
import structlog
async def handle(name):
    CORRELATION_ID.set(name)
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


def test_a_librarys_wrong_arguments_do_not_lose_the_line() -> None:
    assert line_of("logging.getLogger('x').error('%d', 'text')")["event"] == "%d"


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
    script = "thread = threading.Thread(target=lambda: 1 / 0, name='lane-1'); thread.start(); thread.join()"
    line = line_of(script)
    assert (line["thread"], line["error"]) == ("lane-1", "ZeroDivisionError: division by zero")


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

SPELLINGS = """
from urllib.parse import quote, quote_plus
password = settings.mysql.password.reveal()
log.info(password, plain="a" + password + "b", shown=repr(password), quoted=quote(password, safe=""))
log.info("x", plus=quote_plus(password), nested={"list": [password, {password: 1}]}, settings=settings)
log.info("x", **{password: 1})
logging.getLogger("library").error("cannot %s %r", password, [password])
logging.getLogger("library").error("url %s", settings.rabbitmq_url.reveal())
log.info("bus password and bus%20password and hunter22")
try:
    raise ValueError(password)
except ValueError:
    log.exception("failed")
"""


@pytest.mark.parametrize("environment", ["production", "development"])
def test_a_known_secret_never_comes_out_however_it_is_spelt(environment: str) -> None:
    out = output_of(SPELLINGS, f"SKIP_ENV={environment}")
    assert out.count("***") >= 14
    for part in (r"pa[^a-z]+ss", r"ss[^a-z]+w", r"w[^o]{1,20}rd", "hunter", r"bus.{1,3}password"):
        assert not re.search(part, out), part


def test_lines_without_known_secrets_are_left_as_they_are() -> None:
    assert redactor([Secret("hunter22")])(b'{"event":"hunter 22"}') == b'{"event":"hunter 22"}'
    assert redactor([])(b"x") == b"x"


def test_of_two_secrets_the_longer_one_goes_whole_even_where_it_begins_with_the_other() -> None:
    assert redactor([Secret("abc"), Secret("abcdef")])(b"abcdef abc") == b"*** ***"


def test_a_url_brings_no_password_out_even_where_it_is_none_of_the_known_secrets() -> None:
    redact = redactor([])
    assert redact(b'"amqps://user:p%40ss@h:1/v"') == b'"amqps://user:***@h:1/v"'
    assert redact(b"http://h:8080/key a@b") == b"http://h:8080/key a@b"


def test_a_secret_goes_however_often_it_was_escaped_and_quoted() -> None:
    secret = "p\"a'\\\n/ß %+"
    redact = redactor([Secret(secret)])
    spelling = secret
    for _ in range(4):
        spelling = repr(spelling)
        assert redact(spelling.encode()).count(b"***") == 1
        assert b"a" not in redact(orjson.dumps(spelling))
        assert b"a" not in redact(json.dumps(spelling).encode())
        assert b"a" not in redact(ascii(spelling).encode())
    for quoted in (quote(secret), quote(secret, safe=""), quote_plus(secret), quote(secret).lower()):
        assert redact(quoted.encode()) == b"***"
    assert b"a" not in redact(repr(secret.encode()).encode()).removeprefix(b"b")


@pytest.mark.parametrize("secret", ["\\!", '"\\"', "a\\\\\\b", "\\\\\\", "é\n"])
def test_a_line_full_of_backslashes_does_not_make_the_search_for_secrets_slow(secret: str) -> None:
    redact = redactor([Secret(secret)])
    began = time.monotonic()
    for line in (
        b"\\" * 100_000,
        b"a" + b"\\" * 100_000,
        b"\\x" * 50_000,
        b"://" * 30_000,
        b"://a:" * 30_000,
    ):
        redact(line)
    assert time.monotonic() - began < 2


@pytest.mark.parametrize("secret", ["1", '"', ":", "event", "{", "\\"])
def test_a_secret_that_is_part_of_the_json_itself_leaves_json_without_it(secret: str) -> None:
    line = json_renderer(redactor([Secret(secret)]))(None, "info", {"event": "a1", "pid": 111, "x": '"\\'})
    assert isinstance(line, bytes)
    orjson.loads(line)
    if secret == "1":
        assert b"1" not in line


def test_a_password_of_the_bus_does_not_come_out_of_a_real_connection_attempt() -> None:
    script = """
import aio_pika
async def main():
    url = settings.rabbitmq_url.reveal()
    try:
        await aio_pika.connect(url, timeout=5)
    except Exception as error:
        log.exception("the bus cannot be reached", url=url, error_text=repr(error))
    robust = asyncio.ensure_future(aio_pika.connect_robust(url, timeout=1, reconnect_interval=0.05))
    await asyncio.sleep(0.3)
    robust.cancel()
    await asyncio.wait([robust])
logging.getLogger("aio_pika").setLevel(1)
logging.getLogger("aiormq").setLevel(1)
asyncio.run(main())
"""
    out = output_of(script, "SKIP_DEBUG=true")
    assert "the bus cannot be reached" in out
    assert '"logger":"aiormq' in out
    assert "bus%20password" not in out
    assert BUS_PASSWORD not in out


def test_octets_are_counted_and_never_shown_because_they_may_be_a_key() -> None:
    key = bytes(range(65, 97))
    shown = plain({"key": key, "list": [bytearray(key)], key: memoryview(key), "set": {key}})
    assert shown == {
        "key": "<32 bytes>",
        "list": ["<32 bytes>"],
        "<32 bytes>": "<32 bytes>",
        "set": ["<32 bytes>"],
    }


class Hostile:
    def __repr__(self) -> str:
        raise RuntimeError("no")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (Hostile(), "<Hostile that cannot be shown>"),
        ("\udc80", "\\udc80"),
        (1 << 80, str(1 << 80)),
        (Secret("x"), "***"),
        (ValueError("v"), "ValueError: v"),
        ({1: None, (2, 3): 4.5}, {"1": None, "[2, 3]": 4.5}),
        (Path("/x"), "PosixPath('/x')"),
        (True, True),
    ],
)
def test_any_value_can_be_rendered(value: object, shown: object) -> None:
    assert plain(value) == shown
    orjson.dumps(plain(value))


def test_a_value_within_itself_can_be_rendered() -> None:
    endless: list[object] = []
    endless.append(endless)
    assert b"..." in orjson.dumps(plain(endless))


# Correlation ids


def test_correlation_ids_are_short_hex_and_never_repeat() -> None:
    ids = [new_correlation_id() for _ in range(10_000)]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"[0-9a-f]{12,}", text) for text in ids)


def test_correlation_ids_of_a_forked_process_differ_from_its_parents() -> None:
    script = """
first = new_correlation_id()
read, write = os.pipe()
child = os.fork()
if not child:
    os.write(write, new_correlation_id().encode())
    os._exit(0)
os.waitpid(child, 0)
print(first[:8] != os.read(read, 100).decode()[:8])
"""
    assert output_of(script) == "True\n"


# LineWriter


class Pipe:
    """A pipe with a LineWriter at its end; `read` is what has come out of it so far."""

    def __init__(self, **options: int) -> None:
        self.reader, self.end = os.pipe()
        os.set_blocking(self.reader, False)
        self.writer = LineWriter(self.end, **options)

    def read(self) -> bytes:
        found = b""
        try:
            while part := os.read(self.reader, 1 << 20):
                found += part
        except BlockingIOError:
            pass
        return found

    def close(self) -> None:
        self.writer.close(0)
        for descriptor in (self.reader, self.end):
            with contextlib.suppress(OSError):
                os.close(descriptor)


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    made = Pipe(max_backlog_octets=10_000)
    yield made
    made.close()


class CountingWriter(LineWriter):
    """A LineWriter that counts its calls to the system."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor)
        self.calls: list[bytes] = []
        put = self._sink.put

        def count(octets: bytes) -> int:
            self.calls.append(octets)
            return put(octets)

        self._sink = replace(self._sink, put=count)


async def test_lines_of_one_iteration_of_the_event_loop_go_out_with_one_call(pipe: Pipe) -> None:
    writer = CountingWriter(pipe.end)
    for number in range(100):
        writer.write(b"line %d" % number)
    assert writer.calls == []
    await asyncio.sleep(0)
    assert len(writer.calls) == 1
    writer.write(b"next\n")
    await asyncio.sleep(0)
    assert writer.calls[1:] == [b"next\n"]
    assert pipe.read().splitlines() == [b"line %d" % n for n in range(100)] + [b"next"]


async def test_a_line_that_is_written_now_follows_those_that_were_taken_before(pipe: Pipe) -> None:
    pipe.writer.write(b"first")
    pipe.writer.write_now(b"second")
    assert pipe.read() == b"first\nsecond\n"


def test_without_an_event_loop_a_line_goes_out_at_once(pipe: Pipe) -> None:
    pipe.writer.write(b"line")
    assert pipe.read() == b"line\n"


def test_lines_after_the_close_are_counted_as_dropped(pipe: Pipe) -> None:
    pipe.writer.close()
    pipe.writer.write(b"late")
    assert pipe.writer.dropped_lines == 1
    assert pipe.read() == b""


def leave_to_an_ended_loop(writer: LineWriter, line: bytes) -> None:
    loop = asyncio.new_event_loop()
    loop.call_soon(writer.write, line)
    # The loop stops at the end of the iteration, before what that iteration scheduled.
    loop.call_soon(loop.stop)
    loop.run_forever()
    loop.close()


def test_lines_that_an_ended_event_loop_left_behind_go_out_with_those_of_the_next_one(pipe: Pipe) -> None:
    async def write() -> None:
        pipe.writer.write(b"2")
        await asyncio.sleep(0)

    leave_to_an_ended_loop(pipe.writer, b"1")
    asyncio.run(write())
    assert pipe.read() == b"1\n2\n"


def test_lines_that_an_ended_event_loop_left_behind_go_out_at_the_close(pipe: Pipe) -> None:
    leave_to_an_ended_loop(pipe.writer, b"1")
    pipe.writer.close()
    assert pipe.read() == b"1\n"


def test_no_line_is_torn_or_lost_where_threads_and_the_event_loop_write_at_once(tmp_path: Path) -> None:
    path = tmp_path / "log"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    writer = LineWriter(descriptor)

    def from_thread(name: int) -> None:
        for number in range(2000):
            writer.write_now(b"%d-%d-%s" % (name, number, b"x" * (number % 97)))

    async def from_loop() -> None:
        for number in range(2000):
            writer.write(b"0-%d-%s" % (number, b"x" * (number % 97)))
            if number % 50 == 0:
                await asyncio.sleep(0)

    with ThreadPoolExecutor() as threads:
        done = [threads.submit(from_thread, name) for name in (1, 2, 3)]
        asyncio.run(from_loop())
    assert [future.result() for future in done] == [None] * 3
    writer.close()
    os.close(descriptor)
    lines = path.read_bytes().splitlines()
    expected = {b"%d-%d-%s" % (name, n, b"x" * (n % 97)) for name in range(4) for n in range(2000)}
    assert len(lines) == len(expected)
    assert set(lines) == expected
    for name in (b"0", b"1", b"2", b"3"):
        own = [line for line in lines if line.startswith(name + b"-")]
        assert own == sorted(own, key=lambda line: int(line.split(b"-")[1]))


def test_a_log_line_within_the_writing_of_a_line_does_not_lock_up(pipe: Pipe) -> None:
    put = pipe.writer._sink.put

    def put_and_log(octets: bytes) -> int:
        if octets.startswith(b"outer"):
            pipe.writer.write_now(b"inner")
        return put(octets)

    pipe.writer._sink = replace(pipe.writer._sink, put=put_and_log)
    pipe.writer.write_now(b"outer")
    assert pipe.read() == b"outer\ninner\n"


def fill(pipe: Pipe) -> int:
    """Write lines until the pipe and the backlog are full; return how many were written."""
    fcntl.fcntl(pipe.end, fcntl.F_SETPIPE_SZ, 4096)
    count = 0
    while not pipe.writer.dropped_lines:
        pipe.writer.write_now(b"%05d %s" % (count, b"x" * 90))
        count += 1
    return count


def test_a_reader_that_has_stopped_blocks_nobody_and_lines_beyond_the_backlog_are_counted(pipe: Pipe) -> None:
    began = time.monotonic()
    written = fill(pipe)
    assert time.monotonic() - began < 5
    for _ in range(10):
        pipe.writer.write_now(b"x" * 96)
    dropped = pipe.writer.dropped_lines
    assert dropped == 11
    received = b""
    while part := pipe.read():
        received += part
        pipe.writer.flush()
    lines = received.splitlines()
    assert len(lines) == written + 10 - dropped
    assert lines == [b"%05d %s" % (number, b"x" * 90) for number in range(len(lines))]


def test_a_reader_that_goes_on_gets_whole_lines_from_the_backlog_and_then_new_ones(pipe: Pipe) -> None:
    fill(pipe)
    received = b""
    while part := pipe.read():
        received += part
        pipe.writer.flush()
    pipe.writer.write_now(b"new")
    received += pipe.read()
    assert received.endswith(b"x\nnew\n")
    assert {len(line) for line in received.splitlines()[:-1]} == {96}


async def test_the_backlog_goes_out_by_itself_when_the_reader_goes_on(pipe: Pipe) -> None:
    fcntl.fcntl(pipe.end, fcntl.F_SETPIPE_SZ, 4096)
    for number in range(90):
        pipe.writer.write(b"%05d %s" % (number, b"x" * 90))
    received = b""
    for _ in range(100):
        await asyncio.sleep(0.01)
        received += pipe.read()
        if received.count(b"\n") == 90:
            break
    assert [line[:5] for line in received.splitlines()] == [b"%05d" % number for number in range(90)]
    assert pipe.writer.dropped_lines == 0


def test_closing_waits_for_a_slow_reader_but_not_for_long(pipe: Pipe) -> None:
    fill(pipe)
    began = time.monotonic()
    pipe.writer.close(wait_seconds=0.2)
    assert 0.1 < time.monotonic() - began < 2


@pytest.mark.parametrize("give_up", ["reader gone", "descriptor closed"])
async def test_a_broken_stdout_never_raises_and_lines_are_counted_as_dropped(pipe: Pipe, give_up: str) -> None:
    if give_up == "reader gone":
        os.close(pipe.reader)
        writer = pipe.writer
    else:
        spare = os.dup(pipe.end)
        os.close(spare)
        writer = LineWriter(spare)
    writer.write_now(b"1")
    writer.write(b"2")
    writer.write(b"3")
    await asyncio.sleep(0)
    writer.close()
    assert writer.dropped_lines == 3


def test_a_full_disk_never_raises_and_lines_are_counted_as_dropped() -> None:
    descriptor = os.open("/dev/full", os.O_WRONLY)
    writer = LineWriter(descriptor)
    writer.write(b"1")
    os.close(descriptor)
    assert writer.dropped_lines == 1


def test_the_pipe_of_other_processes_is_not_made_non_blocking(pipe: Pipe) -> None:
    pipe.writer.write(b"x")
    assert os.get_blocking(pipe.end)


def test_a_socket_as_stdout_blocks_nobody_either() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        writer = LineWriter(ours.fileno(), max_backlog_octets=1000)
        for _ in range(20_000):
            writer.write(b"x" * 100)
            if writer.dropped_lines:
                break
        assert writer.dropped_lines
        assert theirs.recv(101) == b"x" * 100 + b"\n"
        writer.close(0)


def test_lines_taken_last_still_come_out_when_the_process_ends() -> None:
    script = """
async def main():
    line_writer().write(b"taken last")
    asyncio.get_running_loop().stop()
loop = asyncio.new_event_loop()
loop.create_task(main()).add_done_callback(lambda task: None)
loop.run_forever()
loop.close()
"""
    assert output_of(script) == "taken last\n"


def test_a_forked_process_does_not_repeat_what_its_parent_has_not_written_yet() -> None:
    script = """
async def main():
    line_writer().write(b"parent")
    child = os.fork()
    if not child:
        line_writer().flush()
        line_writer().write_now(b"child")
        os._exit(0)
    os.waitpid(child, 0)
asyncio.run(main())
"""
    assert output_of(script) == "child\nparent\n"


def test_configuring_twice_writes_each_line_once() -> None:
    script = "configure_logging(settings, 'syncer'); log.info('x'); logging.getLogger('x').error('y')"
    assert [line["service"] for line in lines_of(script)] == ["syncer", "syncer"]
