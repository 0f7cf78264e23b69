"""The api's hot path: key records in and out, as steps, and the writing of a transaction in one round trip.

Statements are put together here, not by the driver, because escaping costs more than sealing. What makes that
safe: every value of a row goes in as an integer or as a hexadecimal literal (``bytes.hex``), so no text of
anybody's ever stands in a statement. The connections allow several statements in one packet and are used for
nothing else. What is sent for a key that is issued alone is prepared (``PREPARED``) instead, its values beside it.

Indexes: records are found by ``key_records_key_id`` (forced, or a small table would be scanned and rows of
others locked), wrapping keys by primary key, commit tokens by ``outbox_token``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

from skipbus.shared.crypto.sealing import KeyRecord, SealedWrappingKey
from skipbus.shared.store.literals import hex_list, hexes
from skipbus.shared.store.packets import (
    INSERT_EVENT,
    INSERT_RECORD_AFTER,
    OutboxRow,
    commit,
    commit_in_two,
    delete_listed,
    insert_event,
    insert_outbox_rows,
    insert_record_after_insertion,
    insert_records,
    insert_wrapping_keys,
)
from skipbus.shared.store.steps import Command, Statement, Steps, octets, text

PREPARED = (INSERT_EVENT, INSERT_RECORD_AFTER)
_RECORD = (octets, text, text, int, int, octets, octets, octets, text)
_WRAPPING_KEY = (octets, text, text, octets, int, octets, octets)


def commit_issued(
    make_records: Callable[[], Sequence[KeyRecord]],
    wrapping_keys: Sequence[SealedWrappingKey],
    events: Sequence[OutboxRow],
) -> Steps[None]:
    """Inserts the wrapping keys that are new, the events, and sealed keys; commits.

    The keys are made while the server inserts the events. No key is committed without its event. An event alone may be,
    where its key alone cannot be inserted: then a key is counted that nobody was given. Raises CommitUnknown,
    StoreRefused and what ``make_records`` raises; after any of them the connection must go.
    """
    first: Command = insert_event(events[0]) if len(events) == 1 else insert_outbox_rows(events)
    if wrapping_keys:
        first = f"{insert_wrapping_keys(wrapping_keys)};{insert_outbox_rows(events)}"
    return commit_in_two(first, partial(_commit_records, make_records))


def _commit_records(make_records: Callable[[], Sequence[KeyRecord]]) -> tuple[Command, ...]:
    records = make_records()
    if len(records) == 1:
        return insert_record_after_insertion(records[0]), "COMMIT"
    return (f"{insert_records(records, after_insertion=True)};COMMIT",)


def fetch_for_claim(key_ids: Iterable[bytes]) -> Steps[dict[bytes, KeyRecord]]:
    """The records with these keyIds, whoever they are for, locked until the transaction ends."""
    rows = yield Statement(
        "SELECT key_id, source_id, target_id, size_bits, expires_ms, wrapping_key_id, nonce, sealed, "
        "correlation_id FROM key_records FORCE INDEX (key_records_key_id) "
        f"WHERE key_id IN ({hex_list(key_ids)}) FOR UPDATE",
        _RECORD,
    )
    return {row[0]: KeyRecord(*row) for row in rows}


def fetch_wrapping_keys(wrapping_key_ids: Iterable[bytes]) -> Steps[list[SealedWrappingKey]]:
    """These wrapping keys, still sealed. Primary key."""
    rows = yield Statement(
        "SELECT wrapping_key_id, source_id, target_id, epoch_id, expires_ms, sealed, signature "
        f"FROM wrapping_keys WHERE wrapping_key_id IN ({hex_list(wrapping_key_ids)})",
        _WRAPPING_KEY,
    )
    return [SealedWrappingKey(*row) for row in rows]


def commit_claimed(key_ids: Sequence[bytes], events: Sequence[OutboxRow], token: bytes) -> Steps[None]:
    """Deletes the records that ``fetch_for_claim`` locked, inserts the events, and commits. Errors as above."""
    deletion = delete_listed("key_records", "key_records_key_id", "key_id", hexes(key_ids))
    return commit([deletion, insert_outbox_rows(events, token)])


def end_without_change() -> Steps[None]:
    """Ends a transaction that found nothing to do, and its locks."""
    yield Statement("ROLLBACK")


def fetch_is_placed(key_id: bytes) -> Steps[bool]:
    """Whether the record with this keyId is in the store."""
    rows = yield Statement(
        f"SELECT 1 FROM key_records FORCE INDEX (key_records_key_id) WHERE key_id = 0x{key_id.hex()}", (int,)
    )
    yield from end_without_change()
    return bool(rows)


def fetch_commit_token(token: bytes) -> Steps[bool]:
    """Whether the transaction that carried this token was committed (and its events not yet acknowledged)."""
    rows = yield Statement(f"SELECT 1 FROM outbox WHERE token = 0x{token.hex()}", (int,))
    yield from end_without_change()
    return bool(rows)
