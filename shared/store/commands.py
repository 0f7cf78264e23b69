"""Puts into packets what a line sends: statements as text, and prepared ones with their values. Pure, but ``prepare``.

A prepared statement saves the server the reading of its text, which for one key takes as long as storing it; its values
go as they are, in the protocol's binary form.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import pymysql.err
from pymysql.connections import Connection
from pymysql.constants import COMMAND, FIELD_TYPE

from skipbus.shared.errors import StoreUnavailable
from skipbus.shared.logs import get_logger
from skipbus.shared.store.engine import translated
from skipbus.shared.store.steps import Bound, Command, text_of

MAX_PAYLOAD_BYTES = 2**24 - 1
_log = get_logger("commands")


def packets(commands: Sequence[Command], statement_ids: Mapping[str, int]) -> tuple[bytes, int]:
    """The commands one after another, and how many they are.

    Where one of them is bound and not prepared, all go as text in a single command, which ends at the first error.
    """
    payloads = [_payload(command, statement_ids) for command in commands]
    if None in payloads:
        payloads = [b"\x03" + ";".join(map(text_of, commands)).encode()]
    return b"".join([_packets(payload) for payload in payloads if payload]), len(payloads)


def prepare(connection: Connection, statements: Iterable[str]) -> dict[str, int]:
    """Has the server prepare statements, for this connection; their ids by their texts. Blocks.

    A server, or a proxy in front of it, that refuses one is sent its text each time. Raises StoreUnavailable.
    """
    return {sql: number for sql in statements if (number := _prepared(connection, sql)) is not None}


def _prepared(connection: Connection, sql: str) -> int | None:
    # PyMySQL prepares nothing itself; its names are held by a test.
    driver: Any = connection
    try:
        driver._execute_command(COMMAND.COM_STMT_PREPARE, sql)  # noqa: SLF001 -- see above
        number, columns, parameters = struct.unpack_from("<IHH", driver._read_packet().get_all_data(), 1)  # noqa: SLF001
        for count in (columns, parameters):
            # Their descriptions, and a packet that ends them.
            for _ in range(count + 1 if count else 0):
                driver._read_packet()  # noqa: SLF001
    except (pymysql.err.Error, OSError, struct.error) as error:
        ours = translated(error)
        if isinstance(ours, StoreUnavailable):
            raise ours from error
        if not connection.open:
            raise StoreUnavailable("the connection to the store broke while a statement was prepared") from error
        _log.warning("statement not prepared", reason=str(ours))
        return None
    return int(number)


def _payload(command: Command, statement_ids: Mapping[str, int]) -> bytes | None:
    if isinstance(command, str):
        return b"\x03" + command.encode()
    number = statement_ids.get(command.sql)
    return None if number is None else _execution(number, command)


def _execution(number: int, command: Bound) -> bytes:
    """COM_STMT_EXECUTE, the types of the values with it."""
    kinds, parts = [], [b""]
    for value in command.values:
        if isinstance(value, int):
            kinds.append(FIELD_TYPE.LONGLONG)
            parts.append(value.to_bytes(8, "little", signed=True))
            continue
        if isinstance(value, str):
            kinds.append(FIELD_TYPE.VAR_STRING)
            octets = value.encode()
        else:
            kinds.append(FIELD_TYPE.BLOB)
            octets = value
        parts.append(_length(len(octets)))
        parts.append(octets)
    parts[0] = _head(number, tuple(kinds))
    return b"".join(parts)


@lru_cache(maxsize=64)
def _head(number: int, kinds: tuple[int, ...]) -> bytes:
    """What stands before the values: no cursor, once, none of them is NULL, and their types."""
    nulls = bytes((len(kinds) + 7) // 8)
    types = b"".join(struct.pack("<H", kind) for kind in kinds)
    return struct.pack("<BIBI", COMMAND.COM_STMT_EXECUTE, number, 0, 1) + nulls + b"\x01" + types


def _length(octets: int) -> bytes:
    if octets < 0xFB:
        return octets.to_bytes(1, "little")
    if octets < 2**16:
        return b"\xfc" + octets.to_bytes(2, "little")
    if octets < 2**24:
        return b"\xfd" + octets.to_bytes(3, "little")
    return b"\xfe" + octets.to_bytes(8, "little")


def _packets(payload: bytes) -> bytes:
    """One command, cut into packets; one of the greatest length says that another follows."""
    size = len(payload)
    if size < MAX_PAYLOAD_BYTES:
        return size.to_bytes(4, "little") + payload
    parts = [payload[start : start + MAX_PAYLOAD_BYTES] for start in range(0, size + 1, MAX_PAYLOAD_BYTES)]
    return b"".join(len(part).to_bytes(3, "little") + bytes([n & 0xFF]) + part for n, part in enumerate(parts))
