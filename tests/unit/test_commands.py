"""Facts about what is sent to the server: one packet a command, values beside a prepared statement or in its text."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pymysql.err
import pytest

from skipbus.shared.errors import StoreUnavailable
from skipbus.shared.store.commands import MAX_PAYLOAD_BYTES, packets, prepare
from skipbus.shared.store.steps import Bound

INSERT = Bound("INSERT INTO t VALUES (?,?,?)", (-2, "é'", b"\0?"))


def test_statements_of_a_command_that_is_text_go_as_they_are() -> None:
    assert packets(["A;B", "COMMIT"], {}) == (b"\x04\0\0\0\3A;B" + b"\x07\0\0\0\3COMMIT", 2)


def test_a_prepared_statement_goes_as_its_number_and_its_values() -> None:
    head = b"\x17" + (7).to_bytes(4, "little") + b"\0" + b"\1\0\0\0"
    types = b"\x08\0" + b"\xfd\0" + b"\xfc\0"
    values = b"\xfe" + b"\xff" * 7 + b"\x03\xc3\xa9'" + b"\x02\0?"
    payload = head + b"\0" + b"\1" + types + values
    assert packets([INSERT], {INSERT.sql: 7}) == (bytes([len(payload)]) + b"\0\0\0" + payload, 1)


@pytest.mark.parametrize("ids", [{}, {"another statement": 7}])
def test_a_statement_that_is_not_prepared_goes_as_text_without_any_of_its_texts(ids: dict[str, int]) -> None:
    sent, count = packets([INSERT], ids)
    assert sent[4:] == b"\3INSERT INTO t VALUES (-2,_utf8mb4 0xc3a927,0x003f)"
    assert count == 1


def test_where_one_is_not_prepared_all_go_in_one_command_that_ends_at_the_first_error() -> None:
    sent, count = packets([INSERT, "COMMIT"], {})
    assert sent[4:] == b"\3INSERT INTO t VALUES (-2,_utf8mb4 0xc3a927,0x003f);COMMIT"
    assert count == 1
    sent, count = packets([INSERT, "COMMIT"], {INSERT.sql: 7})
    assert sent.endswith(b"\x07\0\0\0\3COMMIT")
    assert count == 2


@pytest.mark.parametrize(
    ("size", "length"),
    [(0, "00"), (250, "fa"), (251, "fcfb00"), (2**16 - 1, "fcffff"), (2**16, "fd000001"), (2**24 - 1, "fdffffff"),
     (2**24, "fe0000000100000000")],
)  # fmt: skip
def test_the_length_of_a_value_stands_before_it(size: int, length: str) -> None:
    sent, _ = packets([Bound("?", (b"x" * size,))], {"?": 1})
    assert bytes.fromhex("01fc00" + length) + b"x" * min(size, 20) in sent


@pytest.mark.parametrize("columns", range(1, 20))
def test_there_is_a_bit_for_each_value_that_says_it_is_not_null(columns: int) -> None:
    sent, _ = packets([Bound("?", (1,) * columns)], {"?": 1})
    assert sent[14:] == bytes(-(-columns // 8)) + b"\1" + b"\x08\0" * columns + (b"\1" + bytes(7)) * columns


@pytest.mark.parametrize("beyond", [-1, 0, 1])
def test_a_command_of_the_greatest_length_is_followed_by_a_packet_that_ends_it(beyond: int) -> None:
    sent, _ = packets(["x" * (MAX_PAYLOAD_BYTES - 1 + beyond)], {})
    first = int.from_bytes(sent[:3], "little")
    assert (first, sent[3]) == (MAX_PAYLOAD_BYTES + min(beyond, 0), 0)
    rest = sent[4 + first :]
    assert rest == {-1: b"", 0: b"\0\0\0\1", 1: b"\1\0\0\1x"}[beyond]


def refusing(error: Exception, *, still_open: bool = True) -> Any:  # noqa: ANN401 -- stands where a connection would
    def refuse(_command: int, _sql: str) -> None:
        raise error

    return cast("Any", SimpleNamespace(_execute_command=refuse, open=still_open))


def test_what_a_server_will_not_prepare_is_left_to_its_text() -> None:
    assert prepare(refusing(pymysql.err.OperationalError(1461, "too many")), ["INSERT"]) == {}


def test_an_answer_that_is_too_short_leaves_the_statement_to_its_text() -> None:
    answer = SimpleNamespace(get_all_data=lambda: b"\0\1")
    connection = SimpleNamespace(_execute_command=lambda *_: None, _read_packet=lambda: answer, open=True)
    assert prepare(cast("Any", connection), ["INSERT"]) == {}


@pytest.mark.parametrize(
    "connection",
    [
        refusing(pymysql.err.OperationalError(2013, "lost")),
        refusing(pymysql.err.InternalError("Packet sequence number wrong"), still_open=False),
    ],
)
def test_a_server_that_goes_while_it_prepares_is_told_of(connection: Any) -> None:  # noqa: ANN401 -- as above
    with pytest.raises(StoreUnavailable):
        prepare(connection, ["INSERT"])
