"""The api's hot path: key records in and out, on raw PyMySQL connections, a whole transaction in one round trip.

Statements are put together here, not by the driver, because escaping costs more than sealing. What makes that
safe: every value of a row goes in as an integer or as a hexadecimal literal (``bytes.hex``), so no text of
anybody's ever stands in a statement. The connections allow several statements in one packet and are used for
nothing else.

Indexes: records are found by ``key_records_key_id`` (forced, or a small table would be scanned and rows of
others locked), wrapping keys by primary key, commit tokens by ``outbox_token``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pymysql.connections import Connection

from shared.database import commit_errors, driver_errors
from shared.sealing import KeyRecord, SealedWrappingKey


@dataclass(frozen=True, slots=True)
class OutboxEvent:
    """An event for a peer, committed with what it tells of; ``payload`` is MessagePack, ``items`` its length."""

    local_id: str
    peer_id: str
    type: str
    payload: bytes
    items: int
    created_ms: int


def commit_issued(
    connection: Connection,
    records: Sequence[KeyRecord],
    wrapping_keys: Sequence[SealedWrappingKey],
    events: Sequence[OutboxEvent],
    token: bytes,
) -> None:
    """Inserts sealed keys, the wrapping keys that are new, and the events, and commits.

    Raises CommitUnknown, StoreUnavailable or StoreRefused; after any of them the connection must go.
    """
    statements = [_insert_wrapping_keys(wrapping_keys)] if wrapping_keys else []
    statements += [_insert_records(records), _insert_events(events, token), "COMMIT"]
    with commit_errors():
        _run_all(connection, statements)


def fetch_for_claim(connection: Connection, key_ids: Iterable[bytes]) -> dict[bytes, KeyRecord]:
    """The records with these keyIds, whoever they are for, locked until the transaction ends."""
    statement = (
        "SELECT key_id, source_id, target_id, size_bits, expires_ms, wrapping_key_id, nonce, sealed, "
        "correlation_id FROM key_records FORCE INDEX (key_records_key_id) "
        f"WHERE key_id IN ({_hex_list(key_ids)}) FOR UPDATE"
    )
    return {row[0]: KeyRecord(*row) for row in _rows(connection, statement)}


def fetch_wrapping_keys(connection: Connection, wrapping_key_ids: Iterable[bytes]) -> list[SealedWrappingKey]:
    """These wrapping keys, still sealed. Primary key."""
    statement = (
        "SELECT wrapping_key_id, source_id, target_id, epoch_id, expires_ms, sealed, signature "
        f"FROM wrapping_keys WHERE wrapping_key_id IN ({_hex_list(wrapping_key_ids)})"
    )
    return [SealedWrappingKey(*row) for row in _rows(connection, statement)]


def commit_claimed(
    connection: Connection, key_ids: Sequence[bytes], events: Sequence[OutboxEvent], token: bytes
) -> None:
    """Deletes the records that ``fetch_for_claim`` locked, inserts the events, and commits. Errors as above."""
    deletion = (
        f"DELETE k FROM key_records AS k FORCE INDEX (key_records_key_id) WHERE k.key_id IN ({_hex_list(key_ids)})"
    )
    with commit_errors():
        _run_all(connection, [deletion, _insert_events(events, token), "COMMIT"])


def end_without_change(connection: Connection) -> None:
    """Ends a transaction that found nothing to do, and its locks."""
    with driver_errors():
        connection.rollback()


def fetch_commit_token(connection: Connection, token: bytes) -> bool:
    """Whether the transaction that carried this token was committed (and its events not yet acknowledged)."""
    found = bool(_rows(connection, f"SELECT 1 FROM outbox WHERE token = 0x{token.hex()}"))
    end_without_change(connection)
    return found


def _insert_records(records: Sequence[KeyRecord]) -> str:
    rows = ",".join(
        f"({_text(r.target_id)},{r.expires_ms},0x{r.key_id.hex()},{_text(r.source_id)},{r.size_bits},"
        f"0x{r.wrapping_key_id.hex()},0x{r.nonce.hex()},0x{r.sealed.hex()},{_text(r.correlation_id)})"
        for r in records
    )
    return (
        "INSERT INTO key_records (target_id, expires_ms, key_id, source_id, size_bits, wrapping_key_id, "
        f"nonce, sealed, correlation_id) VALUES {rows}"
    )


def _insert_wrapping_keys(wrapping_keys: Sequence[SealedWrappingKey]) -> str:
    rows = ",".join(
        f"(0x{w.wrapping_key_id.hex()},{_text(w.source_id)},{_text(w.target_id)},0x{w.epoch_id.hex()},"
        f"0x{w.sealed.hex()},0x{w.signature.hex()},{w.expires_ms})"
        for w in wrapping_keys
    )
    # An earlier commit with an unknown end may have stored one already; it is the same one then.
    return (
        "INSERT INTO wrapping_keys (wrapping_key_id, source_id, target_id, epoch_id, sealed, signature, "
        f"expires_ms) VALUES {rows} ON DUPLICATE KEY UPDATE expires_ms = wrapping_keys.expires_ms"
    )


def _insert_events(events: Sequence[OutboxEvent], token: bytes) -> str:
    rows = ",".join(
        f"({_text(e.local_id)},{_text(e.peer_id)},{_text(e.type)},0x{e.payload.hex()},{e.items},"
        f"{f'0x{token.hex()}' if first else 'NULL'},{e.created_ms})"
        for first, e in zip([True] + [False] * len(events), events, strict=False)
    )
    return f"INSERT INTO outbox (local_id, peer_id, type, payload, items, token, created_ms) VALUES {rows}"


def _text(value: str) -> str:
    return f"_utf8mb4 0x{value.encode().hex()}" if value else "''"


def _hex_list(values: Iterable[bytes]) -> str:
    return ",".join(f"0x{value.hex()}" for value in values)


def _rows(connection: Connection, statement: str) -> tuple[tuple[Any, ...], ...]:
    with driver_errors(), connection.cursor() as cursor:
        cursor.execute(statement)
        rows: tuple[tuple[Any, ...], ...] = cursor.fetchall()
        return rows


def _run_all(connection: Connection, statements: Sequence[str]) -> None:
    with connection.cursor() as cursor:
        cursor.execute(";".join(statements))
        # Each statement's own result must be read: an error of a later one only shows there.
        while cursor.nextset():
            pass
