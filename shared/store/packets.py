"""Statements that are put together here and not by the driver: literals, and a whole transaction in one packet.

For the statements of a bus link on raw PyMySQL connections that allow several statements and are used for nothing
else. What makes it safe: every value goes in as an integer or as a hexadecimal literal, so no text of anybody's ever
stands in a statement. Knows how rows of the tables are written that more than one of these modules writes to.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pymysql.connections import Connection

from shared.database import driver_errors
from shared.sealing import SealedWrappingKey


@dataclass(frozen=True, slots=True)
class OutboxRow:
    """A row for a peer; ``payload`` is MessagePack, ``items`` its length. A ``token`` is 16 random bytes."""

    local_id: str
    peer_id: str
    type: str
    payload: bytes
    items: int
    created_ms: int
    token: bytes | None = None


def insert_outbox_rows(rows: Sequence[OutboxRow]) -> str:
    """A statement: events for peers, committed with what they tell of."""
    values = ",".join(
        f"({text(r.local_id)},{text(r.peer_id)},{text(r.type)},0x{r.payload.hex()},{r.items},"
        f"{'NULL' if r.token is None else '0x' + r.token.hex()},{r.created_ms})"
        for r in rows
    )
    return f"INSERT INTO outbox (local_id, peer_id, type, payload, items, token, created_ms) VALUES {values}"


def insert_wrapping_keys(wrapping_keys: Sequence[SealedWrappingKey]) -> str:
    """A statement: sealed wrapping keys. One that an interrupted commit has stored already is the same one."""
    values = ",".join(
        f"(0x{w.wrapping_key_id.hex()},{text(w.source_id)},{text(w.target_id)},0x{w.epoch_id.hex()},"
        f"0x{w.sealed.hex()},0x{w.signature.hex()},{w.expires_ms})"
        for w in wrapping_keys
    )
    return (
        "INSERT INTO wrapping_keys (wrapping_key_id, source_id, target_id, epoch_id, sealed, signature, "
        f"expires_ms) VALUES {values} ON DUPLICATE KEY UPDATE expires_ms = wrapping_keys.expires_ms"
    )


def text(value: str) -> str:
    """A text as a literal."""
    return f"_utf8mb4 0x{value.encode().hex()}" if value else "''"


def hex_list(values: Iterable[bytes]) -> str:
    """Byte strings as literals with commas between them."""
    return ",".join(f"0x{value.hex()}" for value in values)


def fetch(connection: Connection, statement: str) -> tuple[tuple[Any, ...], ...]:
    """The rows of one statement."""
    with driver_errors(), connection.cursor() as cursor:
        cursor.execute(statement)
        rows: tuple[tuple[Any, ...], ...] = cursor.fetchall()
        return rows


def fetch_and_end(connection: Connection, statement: str) -> tuple[tuple[Any, ...], ...]:
    """The rows of one statement that locks nothing; its transaction is over, in the same round trip."""
    with driver_errors(), connection.cursor() as cursor:
        cursor.execute(f"{statement};COMMIT")
        rows: tuple[tuple[Any, ...], ...] = cursor.fetchall()
        while cursor.nextset():
            pass
        return rows


def run_all(connection: Connection, statements: Sequence[str]) -> None:
    """Runs the statements in one packet."""
    with connection.cursor() as cursor:
        cursor.execute(";".join(statements))
        # Each statement's own result must be read: an error of a later one only shows there.
        while cursor.nextset():
            pass
