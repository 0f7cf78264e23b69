"""Key records: one row for each key that waits for its target, sealed to it.

Rules: a keyId that exists is never overwritten. Records are looked up by ``key_records_key_id``, forced, because a
server would scan a small table and wait for rows that other callers have locked. They are clustered by target and
expiry, so expired ones are deleted by key ranges of the primary key. Transactions are the caller's.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from sqlalchemy import (
    ColumnElement,
    Connection,
    Select,
    and_,
    bindparam,
    delete,
    exists,
    func,
    insert,
    literal,
    literal_column,
    null,
    or_,
    select,
    text,
)

from skipbus.shared.crypto.sealing import KeyRecord
from skipbus.shared.store.engine import driver_sql
from skipbus.shared.store.listed import delete_listed
from skipbus.shared.store.schema import KEY_RECORDS as K
from skipbus.shared.store.schema import STOCK_HELD as H

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
    """The records with these keyIds, for any target, locked. Index key_records_key_id."""
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
    """Those of the keyIds that are in the store already, for any target. Index key_records_key_id."""
    return frozenset(connection.execute(_KNOWN, {"key_ids": list(key_ids)}).scalars())


def fetch_expired_exists(connection: Connection, target_id: str, now_ms: int) -> bool:
    """Whether a record of this target has expired. Prefix of the primary key."""
    return connection.execute(_EXPIRED, {"target_id": target_id, "now_ms": now_ms}).first() is not None


def fetch_key_record_exists(connection: Connection, key_id: bytes) -> bool:
    """Whether the record with this keyId is in the store. Index key_records_key_id."""
    return connection.execute(_EXISTS, {"key_id": key_id}).first() is not None


# --- expired records


class KeyRange(NamedTuple):
    """A target's records in the order of the primary key: all that expire from ``from_ms`` (UTC) on, up to the last.

    The last one is included: it expires at ``last_ms`` and has the greatest keyId of those.
    """

    target_id: str
    from_ms: int
    last_ms: int
    last_key_id: bytes

    @property
    def is_rest(self) -> bool:
        """Whether there were no more of them than these."""
        return self.last_key_id == _AFTER_ALL_KEY_IDS


class Expired(NamedTuple):
    """What a source is sent about its ``items`` expired records.

    ``payload`` is MessagePack, a list of [keyId, expiry in UTC ms, correlation id]; empty where ``items`` is 0.
    """

    source_id: str
    items: int
    payload: bytes


_AFTER_ALL_KEY_IDS = b"\xff" * 64
_LAST = (
    select(K.c.expires_ms, K.c.key_id)
    .where(
        K.c.target_id == bindparam("target_id"),
        K.c.expires_ms.between(bindparam("from_ms"), bindparam("until_ms")),
    )
    .order_by(K.c.expires_ms, K.c.key_id)
    .limit(1)
    .offset(bindparam("before"))
)
# Bounds instead of an order and a limit, with which MariaDB takes almost twice as long to delete.
_IN_RANGE = and_(
    K.c.target_id == bindparam("target_id"),
    K.c.expires_ms.between(bindparam("from_ms"), bindparam("last_ms")),
    or_(K.c.expires_ms < bindparam("last_ms"), K.c.key_id <= bindparam("last_key_id")),
)
# The server writes the MessagePack itself: to read thousands of rows only to write them again costs the driver and the
# interpreter more than the server needs to delete them.
_ENTRY: ColumnElement[bytes] = literal_column(
    "CONCAT(0x93C4, CHAR(LENGTH(key_records.key_id)), key_records.key_id, "
    "0xCF, UNHEX(LPAD(HEX(key_records.expires_ms), 16, '0')), "
    "0xD9, CHAR(LENGTH(key_records.correlation_id)), key_records.correlation_id)"
)
_LONGEST_LIST_BYTES = (3 + 64 + 9 + 2 + 64) * 50_000
_SOME_STOCK = (
    select(literal(1))
    .select_from(H)
    .with_hint(H, "FORCE INDEX (PRIMARY)")
    .where(H.c.local_id == bindparam("target_id"))
    .limit(1)
)
# Stock that its source has not given out was never issued, so its source is not notified. A subquery locks nothing.
_HELD = exists(
    select(literal(1))
    .select_from(H)
    .with_hint(H, "FORCE INDEX (PRIMARY)")
    .where(H.c.local_id == bindparam("target_id"), H.c.source_id == K.c.source_id, H.c.key_id == K.c.key_id)
)


def _by_source(count: ColumnElement[int], entry: ColumnElement[Any]) -> Select[Any]:
    entries = func.group_concat(entry.op("SEPARATOR")(literal_column("''")))
    return select(K.c.source_id, count, entries).where(_IN_RANGE).group_by(K.c.source_id).with_for_update()


_EXPIRED_BY_SOURCE = _by_source(func.count(), _ENTRY)
_EXPIRED_BUT_STOCK = _by_source(func.count(func.if_(_HELD, null(), 1)), func.if_(_HELD, null(), _ENTRY))
_LONG_ENOUGH = text(f"SET SESSION group_concat_max_len = {_LONGEST_LIST_BYTES}")
_DELETE_RANGE = delete(K).where(_IN_RANGE)


def fetch_key_range(connection: Connection, target_id: str, from_ms: int, until_ms: int, limit: int) -> KeyRange:
    """The oldest records of a target that expire between two times (UTC ms, both within), about ``limit`` at most.

    Where others were deleted in front of them a moment ago, ``from_ms`` saves the server from reading these again.
    """
    values = {"target_id": target_id, "from_ms": from_ms, "until_ms": until_ms, "before": limit - 1}
    last = connection.execute(_LAST, values).first()
    return KeyRange(target_id, from_ms, *(last or (until_ms, _AFTER_ALL_KEY_IDS)))


def fetch_expired(connection: Connection, key_range: KeyRange) -> list[Expired]:
    """The records of a key range by their sources, locked. Primary key."""
    # What is longer would be cut off without an error, and MySQL's default is 1,024 bytes.
    connection.execute(_LONG_ENOUGH)
    stock = connection.execute(_SOME_STOCK, {"target_id": key_range.target_id}).first()
    found = connection.execute(_EXPIRED_BY_SOURCE if stock is None else _EXPIRED_BUT_STOCK, key_range._asdict())
    return [
        Expired(source_id, count, _list_of(count, entries) if count else b"") for source_id, count, entries in found
    ]


def _list_of(count: int, entries: bytes) -> bytes:
    return b"\xdd" + count.to_bytes(4, "big") + entries


def delete_expired(connection: Connection, key_range: KeyRange) -> int:
    """Deletes the records of a key range; how many there were. Primary key."""
    return connection.execute(_DELETE_RANGE, key_range._asdict()).rowcount


def fetch_targets(connection: Connection) -> list[str]:
    """Every KP that has records in the store. A loose scan of the primary key: one step for each target."""
    targets: list[str] = []
    while True:
        after = targets[-1] if targets else ""
        found = connection.execute(
            select(K.c.target_id).where(K.c.target_id > after).order_by(K.c.target_id).limit(1)
        ).scalar()
        if found is None:
            return targets
        targets.append(found)
