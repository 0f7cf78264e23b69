"""Key records: one row for each key that waits for its target, sealed to it.

Rules: a keyId that exists is never overwritten. Records are looked up by ``key_records_key_id``, forced, because a
server would scan a small table and wait for rows that other callers have locked. Transactions are the caller's.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from sqlalchemy import Connection, bindparam, insert, literal, select

from skipbus.shared.crypto.sealing import KeyRecord
from skipbus.shared.store.engine import driver_sql
from skipbus.shared.store.listed import delete_listed
from skipbus.shared.store.schema import KEY_RECORDS as K

_INDEX = "key_records_key_id"
_INSERT = driver_sql(insert(K), KeyRecord._fields)
_CLAIM = driver_sql(
    select(*(K.c[name] for name in KeyRecord._fields))
    .with_hint(K, f"FORCE INDEX ({_INDEX})")
    # The driver binds a list to one name.
    .where(K.c.key_id.op("IN")(bindparam("key_ids")))
    .with_for_update()
)
_KNOWN = (
    select(K.c.key_id)
    .with_hint(K, f"FORCE INDEX ({_INDEX})")
    .where(K.c.key_id.in_(bindparam("key_ids", expanding=True)))
)
_EXPIRED = (
    select(literal(1)).where(K.c.target_id == bindparam("target_id"), K.c.expires_ms <= bindparam("now_ms")).limit(1)
)
_EXISTS = select(literal(1)).with_hint(K, f"FORCE INDEX ({_INDEX})").where(K.c.key_id == bindparam("key_id"))


def insert_key_records(connection: Connection, records: Sequence[KeyRecord]) -> None:
    """Inserts sealed keys. Fails as a whole where a keyId exists."""
    connection.exec_driver_sql(_INSERT, [record._asdict() for record in records])


def claim_key_records(connection: Connection, key_ids: Collection[bytes]) -> dict[bytes, KeyRecord]:
    """The records with these keyIds, whoever they are for, locked. Index key_records_key_id."""
    records = map(KeyRecord._make, connection.exec_driver_sql(_CLAIM, {"key_ids": tuple(key_ids)}))
    return {record.key_id: record for record in records}


def delete_key_records(connection: Connection, key_ids: Sequence[bytes]) -> int:
    """Deletes the records with these keyIds; how many there were. Index key_records_key_id."""
    return delete_listed(connection, K.name, _INDEX, "key_id", key_ids)


def delete_key_records_of_source(
    connection: Connection, target_id: str, source_id: str, key_ids: Sequence[bytes]
) -> int:
    """Deletes these records where they are that source's for that target; how many. Index key_records_key_id."""
    return delete_listed(connection, K.name, _INDEX, "key_id", key_ids, target_id=target_id, source_id=source_id)


def fetch_known_key_ids(connection: Connection, key_ids: Collection[bytes]) -> frozenset[bytes]:
    """Those of the keyIds that are in the store already, whoever they are for. Index key_records_key_id."""
    return frozenset(connection.execute(_KNOWN, {"key_ids": list(key_ids)}).scalars())


def fetch_expired_exists(connection: Connection, target_id: str, now_ms: int) -> bool:
    """Whether a record of this target has expired. Prefix of the primary key."""
    return connection.execute(_EXPIRED, {"target_id": target_id, "now_ms": now_ms}).first() is not None


def fetch_key_record_exists(connection: Connection, key_id: bytes) -> bool:
    """Whether the record with this keyId is in the store. Index key_records_key_id."""
    return connection.execute(_EXISTS, {"key_id": key_id}).first() is not None
