"""Facts about the server's answers: read however they are cut, and refused where they are not what was asked for."""

from __future__ import annotations

import pymysql.err
import pytest

from skipbus.shared.store.results import MAX_PACKET_BYTES, Answer, Rows
from skipbus.shared.store.steps import octets, text

MORE = 0x0008
COLUMNS = (octets, text, int)


def packets(*payloads: bytes) -> bytes:
    return b"".join(
        len(payload).to_bytes(3, "little") + bytes([number & 0xFF]) + payload
        for number, payload in enumerate(payloads, start=1)
    )


def ok(status: int = 0, last_id: bytes = b"\0") -> bytes:
    return b"\0\1" + last_id + status.to_bytes(2, "little") + b"\0\0"


def end(status: int = 0) -> bytes:
    return b"\xfe\0\0" + status.to_bytes(2, "little")


def error(code: int, words: bytes) -> bytes:
    return b"\xff" + code.to_bytes(2, "little") + b"#HY000" + words


def value(data: bytes) -> bytes:
    return bytes([len(data)]) + data if len(data) < 251 else b"\xfc" + len(data).to_bytes(2, "little") + data


def row(*values: bytes) -> bytes:
    return b"".join(map(value, values))


def rows_of(data: bytes, columns: tuple[object, ...] = (), chunk: int = 1) -> Rows:
    answer = Answer(columns)  # type: ignore[arg-type]
    starts = range(0, len(data), chunk)
    complete = [answer.feed(data[start : start + chunk]) for start in starts]
    assert complete == [False] * (len(complete) - 1) + [True]
    return answer.rows


@pytest.mark.parametrize("chunk", [1, 7, 10**6])
def test_three_statements_are_answered_when_the_last_one_is(chunk: int) -> None:
    ids = [b"\7", b"\xfc\1\2", b"\xfe" + bytes(8)]
    for last_id in ids:
        assert rows_of(packets(ok(MORE), ok(MORE, last_id), ok()), chunk=chunk) == []


@pytest.mark.parametrize("chunk", [1, 7, 10**6])
def test_two_packets_are_answered_when_the_last_statement_of_the_second_is(chunk: int) -> None:
    data = packets(ok(MORE), ok()) + packets(ok(MORE), ok())
    answer = Answer(())
    answer.expect(1)
    complete = [answer.feed(data[start : start + chunk]) for start in range(0, len(data), chunk)]
    assert complete == [False] * (len(complete) - 1) + [True]


@pytest.mark.parametrize("data", [packets(ok()) + packets(ok()) + b"x", packets(ok(), ok())])
def test_what_follows_the_second_packets_answer_and_a_second_answer_out_of_sequence_are_refused(data: bytes) -> None:
    answer = Answer(())
    answer.expect(1)
    with pytest.raises(pymysql.err.InterfaceError):
        answer.feed(data)


@pytest.mark.parametrize("chunk", [1, 7, 10**6])
def test_rows_are_read_as_the_statement_says(chunk: int) -> None:
    long = b"\xff\xfe" * 300
    found = [row(b"\0\1", "é".encode(), b"12"), row(long, b"", b"-3"), row(b"", b"x" * 250, b"0")]
    data = packets(b"\3", *[b"column"] * 3, end(), *found, end())
    assert rows_of(data, COLUMNS, chunk) == [(b"\0\1", "é", 12), (long, "", -3), (b"", "x" * 250, 0)]


def test_more_rows_than_a_sequence_number_holds_are_read() -> None:
    data = packets(b"\1", b"column", end(), *[row(b"5")] * 1000, end())
    assert rows_of(data, (int,), 4096) == [(5,)] * 1000


@pytest.mark.parametrize("before", [[], [ok(MORE)], [ok(MORE), ok(MORE)]])
def test_an_error_of_any_of_the_statements_is_raised(before: list[bytes]) -> None:
    with pytest.raises(pymysql.err.OperationalError) as caught:
        rows_of(packets(*before, error(1213, b"Deadlock found")))
    assert caught.value.args[0] == 1213


@pytest.mark.parametrize("before", [[b"\3"], [b"\3", *[b"column"] * 3, end()], [b"\3", b"column"]])
def test_an_error_in_place_of_columns_or_rows_is_raised(before: list[bytes]) -> None:
    with pytest.raises(pymysql.err.OperationalError):
        rows_of(packets(*before, error(1317, b"Query execution was interrupted")), COLUMNS)


DAMAGED = {
    "a file is asked for": (packets(b"\xfb/etc/passwd"), ()),
    "rows nobody asked for": (packets(b"\1"), ()),
    "fewer columns": (packets(b"\2"), COLUMNS),
    "more columns than said": (packets(b"\3", *[b"column"] * 4), COLUMNS),
    "an empty packet": (packets(b""), ()),
    "an OK cut short": (packets(b"\0\1\0\0"), ()),
    "an error cut short": (packets(b"\xff\1"), ()),
    "a NULL": (packets(b"\3", *[b"column"] * 3, end(), b"\1a\1b\xfb"), COLUMNS),
    "a value longer than its row": (packets(b"\3", *[b"column"] * 3, end(), b"\1a\1b\x09c"), COLUMNS),
    "no number": (packets(b"\3", *[b"column"] * 3, end(), row(b"", b"", b"x")), COLUMNS),
    "no text": (packets(b"\3", *[b"column"] * 3, end(), row(b"", b"\xff", b"1")), COLUMNS),
    "out of sequence": (packets(ok(MORE), ok())[:3] + b"\2" + ok(), ()),
    "more than was asked for": (packets(ok(), ok()), ()),
    "a packet without an end": ((MAX_PACKET_BYTES + 1).to_bytes(3, "little") + b"\1", ()),
}


@pytest.mark.parametrize(("data", "columns"), DAMAGED.values(), ids=DAMAGED)
def test_whatever_else_comes_ends_the_connection(data: bytes, columns: tuple[object, ...]) -> None:
    answer = Answer(columns)  # type: ignore[arg-type]
    with pytest.raises(pymysql.err.InterfaceError):
        answer.feed(data)
