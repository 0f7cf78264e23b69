"""The api's hot path: key records in and out, as steps, a whole transaction in one round trip.

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
from functools import lru_cache

from shared.errors import CommitUnknown, StoreUnavailable
from shared.sealing import KeyRecord, SealedWrappingKey
from shared.store.steps import Statement, Steps, octets, text

_RECORD = (octets, text, text, int, int, octets, octets, octets, text)
_WRAPPING_KEY = (octets, text, text, octets, int, octets, octets)
_INSERT_RECORDS = (
    "INSERT INTO key_records (target_id, expires_ms, key_id, source_id, size_bits, wrapping_key_id, "
    "nonce, sealed, correlation_id) VALUES "
)
_INSERT_EVENTS = "INSERT INTO outbox (local_id, peer_id, type, payload, items, token, created_ms) VALUES "


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
    records: Sequence[KeyRecord],
    wrapping_keys: Sequence[SealedWrappingKey],
    events: Sequence[OutboxEvent],
    token: bytes,
) -> Steps[None]:
    """Inserts sealed keys, the wrapping keys that are new, and the events, and commits.

    Raises CommitUnknown or StoreRefused; after any of them the connection must go.
    """
    first = [_insert_wrapping_keys(wrapping_keys)] if wrapping_keys else []
    return _commit([*first, _insert_records(records), _insert_events(events, token)])


def fetch_for_claim(key_ids: Iterable[bytes]) -> Steps[dict[bytes, KeyRecord]]:
    """The records with these keyIds, whoever they are for, locked until the transaction ends."""
    rows = yield Statement(
        "SELECT key_id, source_id, target_id, size_bits, expires_ms, wrapping_key_id, nonce, sealed, "
        "correlation_id FROM key_records FORCE INDEX (key_records_key_id) "
        f"WHERE key_id IN ({_hex_list(key_ids)}) FOR UPDATE",
        _RECORD,
    )
    return {row[0]: KeyRecord(*row) for row in rows}


def fetch_wrapping_keys(wrapping_key_ids: Iterable[bytes]) -> Steps[list[SealedWrappingKey]]:
    """These wrapping keys, still sealed. Primary key."""
    rows = yield Statement(
        "SELECT wrapping_key_id, source_id, target_id, epoch_id, expires_ms, sealed, signature "
        f"FROM wrapping_keys WHERE wrapping_key_id IN ({_hex_list(wrapping_key_ids)})",
        _WRAPPING_KEY,
    )
    return [SealedWrappingKey(*row) for row in rows]


def commit_claimed(key_ids: Sequence[bytes], events: Sequence[OutboxEvent], token: bytes) -> Steps[None]:
    """Deletes the records that ``fetch_for_claim`` locked, inserts the events, and commits. Errors as above."""
    return _commit([_delete_records(key_ids), _insert_events(events, token)])


def end_without_change() -> Steps[None]:
    """Ends a transaction that found nothing to do, and its locks."""
    yield Statement("ROLLBACK")


def fetch_commit_token(token: bytes) -> Steps[bool]:
    """Whether the transaction that carried this token was committed (and its events not yet acknowledged)."""
    rows = yield Statement(f"SELECT 1 FROM outbox WHERE token = 0x{token.hex()}", (int,))
    yield from end_without_change()
    return bool(rows)


def _commit(statements: Sequence[str]) -> Steps[None]:
    try:
        yield Statement(";".join((*statements, "COMMIT")))
    except StoreUnavailable as error:
        # A connection that breaks here leaves unknown whether it was committed.
        raise CommitUnknown("the connection to the store broke during a commit") from error


def _insert_records(records: Sequence[KeyRecord]) -> str:
    rows = ",".join(
        f"({_id(r.target_id)},{r.expires_ms},0x{r.key_id.hex()},{_id(r.source_id)},{r.size_bits},"
        f"0x{r.wrapping_key_id.hex()},0x{r.nonce.hex()},0x{r.sealed.hex()},{_text(r.correlation_id)})"
        for r in records
    )
    return _INSERT_RECORDS + rows


def _delete_records(key_ids: Sequence[bytes]) -> str:
    if len(key_ids) == 1:
        return f"DELETE FROM key_records WHERE key_id = 0x{key_ids[0].hex()}"
    # Not "key_id IN (...)": MariaDB scans a small table for that, whatever index it is told to use, and then waits
    # for the locks of other callers. From the list to the table there is one way only.
    wanted = " UNION ALL ".join(f"SELECT 0x{key_id.hex()} AS key_id" for key_id in key_ids)
    return (
        f"DELETE k FROM ({wanted}) AS w STRAIGHT_JOIN key_records AS k FORCE INDEX (key_records_key_id) "
        "ON k.key_id = w.key_id"
    )


def _insert_wrapping_keys(wrapping_keys: Sequence[SealedWrappingKey]) -> str:
    rows = ",".join(
        f"(0x{w.wrapping_key_id.hex()},{_id(w.source_id)},{_id(w.target_id)},0x{w.epoch_id.hex()},"
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
        f"({_id(e.local_id)},{_id(e.peer_id)},{_id(e.type)},0x{e.payload.hex()},{e.items},"
        f"{f'0x{token.hex()}' if first else 'NULL'},{e.created_ms})"
        for first, e in zip([True] + [False] * len(events), events, strict=False)
    )
    return _INSERT_EVENTS + rows


def _text(value: str) -> str:
    return f"_utf8mb4 0x{value.encode().hex()}" if value else "''"


# The same few ids and types stand in every statement.
_id = lru_cache(maxsize=4096)(_text)


def _hex_list(values: Iterable[bytes]) -> str:
    return ",".join(f"0x{value.hex()}" for value in values)
