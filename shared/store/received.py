"""A bus peer's keys at their target: stored sealed as they came, taken back, given out of stock.

Statements on many keys are put together here from integers and hexadecimal literals only (``packets``), because an
envelope brings thousands of keys and binding each value would cost more than storing it. Transactions are the
callers'. Indexes: ``key_records_key_id`` (keyIds are unique in a store, whoever they are for); primary keys otherwise.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

from sqlalchemy import Connection

from skipbus.shared.crypto.sealing import KeyRecord, SealedWrappingKey
from skipbus.shared.store.literals import hex_list, text
from skipbus.shared.store.packets import insert_records, insert_wrapping_keys

# Keys in one statement: of the order of 100 kB.
_CHUNK = 2_000
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class KnownKeys:
    """Which of some keyIds stand in the store already, and which their source has taken back."""

    stored: frozenset[bytes]
    withdrawn: frozenset[bytes]


def fetch_known_keys(connection: Connection, local_id: str, source_id: str, key_ids: Collection[bytes]) -> KnownKeys:
    """Looks keyIds of a source up, before they are stored."""
    listed = hex_list(key_ids)
    rows = connection.exec_driver_sql(
        f"SELECT 0, key_id FROM key_records FORCE INDEX (key_records_key_id) WHERE key_id IN ({listed}) "
        f"UNION ALL SELECT 1, key_id FROM withdrawn_keys FORCE INDEX (PRIMARY) WHERE local_id = {text(local_id)} "
        f"AND source_id = {text(source_id)} AND key_id IN ({listed})"
    ).all()
    return KnownKeys(
        frozenset(key_id for withdrawn, key_id in rows if not withdrawn),
        frozenset(key_id for withdrawn, key_id in rows if withdrawn),
    )


def insert_received_keys(connection: Connection, records: Sequence[KeyRecord]) -> None:
    """Stores sealed keys. Fails as a whole where a keyId exists: nothing is ever overwritten."""
    connection.exec_driver_sql(insert_records(records))


def insert_received_wrapping_keys(connection: Connection, wrapping_keys: Sequence[SealedWrappingKey]) -> bool:
    """Stores wrapping keys; False where another one stands under one of the ids, which then stays as it is.

    Acknowledging keys whose wrapping key is not the one that they were sealed under would lose them.
    """
    connection.exec_driver_sql(insert_wrapping_keys(wrapping_keys))
    stored = connection.exec_driver_sql(
        "SELECT wrapping_key_id, source_id, target_id, epoch_id, expires_ms, sealed, signature FROM wrapping_keys "
        f"WHERE wrapping_key_id IN ({hex_list(w.wrapping_key_id for w in wrapping_keys)})"
    )
    return {SealedWrappingKey(*row) for row in stored} == set(wrapping_keys)


def delete_withdrawn_records(connection: Connection, local_id: str, source_id: str, key_ids: Collection[bytes]) -> int:
    """Deletes what is still here of the keys that their source takes back. Returns how many were.

    Only that source's own keys for this KP: nobody can take back another's.
    """
    return sum(
        connection.exec_driver_sql(
            "DELETE k FROM key_records AS k FORCE INDEX (key_records_key_id) "
            f"WHERE k.key_id IN ({hex_list(chunk)}) AND k.source_id = {text(source_id)} "
            f"AND k.target_id = {text(local_id)}"
        ).rowcount
        for chunk in _chunks(key_ids)
    )


def insert_withdrawn_keys(
    connection: Connection, local_id: str, source_id: str, keys: Sequence[tuple[bytes, int]]
) -> None:
    """Remembers taken-back keys (keyId, expiry in UTC ms), so that a record that comes later is not stored."""
    for chunk in _chunks(keys):
        rows = ",".join(
            f"({text(local_id)},{text(source_id)},0x{key_id.hex()},{expires_ms:d})" for key_id, expires_ms in chunk
        )
        connection.exec_driver_sql(
            f"INSERT IGNORE INTO withdrawn_keys (local_id, source_id, key_id, expires_ms) VALUES {rows}"
        )


def _chunks(values: Collection[_T]) -> Iterator[list[_T]]:
    left = iter(values)
    while chunk := list(islice(left, _CHUNK)):
        yield chunk
