"""What the janitor deletes: expired key records and stale wrapping keys, in batches that hold locks for milliseconds.

Records are clustered by target and expiry, so a batch reads and deletes one short stretch of the primary key.
"""

from __future__ import annotations

from typing import NamedTuple

from sqlalchemy import Connection, select, text

from shared.schema import KEY_RECORDS as K

# SQLAlchemy has no ORDER BY for DELETE. The order makes it the stretch that was read and locked before. It leaves
# out target_id, which is constant here: with it in front MariaDB sorts all that has expired for every batch.
_DELETE_STRETCH = text(
    "DELETE FROM key_records WHERE target_id = :target_id AND expires_ms <= :until_ms "
    "ORDER BY expires_ms, key_id LIMIT :rows"
)
_DELETE_HELD = text(
    "DELETE FROM stock_held WHERE local_id = :local_id AND expires_ms <= :now_ms ORDER BY expires_ms LIMIT :rows"
)
_DELETE_WITHDRAWN = text(
    "DELETE FROM withdrawn_keys WHERE local_id = :local_id AND expires_ms <= :now_ms ORDER BY expires_ms LIMIT :rows"
)
_DELETE_WRAPPING_KEYS = text("DELETE FROM wrapping_keys WHERE expires_ms <= :now_ms ORDER BY expires_ms LIMIT :rows")


class Expired(NamedTuple):
    """Expired records of one source: how many, the last expiry among them (UTC ms), and what the source is told.

    ``payload`` is MessagePack, a list of ``told`` times keyId, expiry and correlation id; empty where that is 0.
    """

    source_id: str
    records: int
    last_ms: int
    told: int
    payload: bytes


# The server writes the MessagePack itself: to read thousands of rows only to write them again costs the driver and the
# interpreter more than the server needs to delete them. An entry is [keyId, expiry, correlation id].
_ENTRY = (
    "CONCAT(0x93C4, CHAR(LENGTH(s.key_id)), s.key_id, 0xCF, UNHEX(LPAD(HEX(s.expires_ms), 16, '0')), "
    "0xD9, CHAR(LENGTH(s.correlation_id)), s.correlation_id)"
)
_LONGEST_ENTRY_BYTES = 3 + 64 + 9 + 2 + 64
# An array of up to 65,535.
_MOST = 0xFFFF
_STRETCH = (
    "(SELECT key_id, source_id, expires_ms, correlation_id FROM key_records WHERE target_id = :target_id "
    "AND expires_ms <= :now_ms ORDER BY expires_ms, key_id LIMIT :rows FOR UPDATE) AS s"
)
_EXPIRED = text(
    f"SELECT s.source_id, COUNT(*), MAX(s.expires_ms), COUNT(*), GROUP_CONCAT({_ENTRY} SEPARATOR '') FROM {_STRETCH} "
    "GROUP BY s.source_id"
)
# Stock that its source has not given out was issued to nobody, so nobody is told of it.
_EXPIRED_BUT_STOCK = text(
    "SELECT s.source_id, COUNT(*), MAX(s.expires_ms), COUNT(IF(h.key_id IS NULL, 1, NULL)), "
    f"GROUP_CONCAT(IF(h.key_id IS NULL, {_ENTRY}, NULL) SEPARATOR '') FROM {_STRETCH} "
    "LEFT JOIN stock_held AS h FORCE INDEX (PRIMARY) "
    "ON h.local_id = :target_id AND h.source_id = s.source_id AND h.key_id = s.key_id GROUP BY s.source_id"
)
_SOME_STOCK = text("SELECT 1 FROM stock_held FORCE INDEX (PRIMARY) WHERE local_id = :target_id LIMIT 1")
_LONG_ENOUGH = text(f"SET SESSION group_concat_max_len = {_LONGEST_ENTRY_BYTES * _MOST}")


def fetch_expired(connection: Connection, target_id: str, now_ms: int, limit: int) -> list[Expired]:
    """The oldest expired records of a target by their sources, locked until the transaction ends. Primary key.

    ``limit`` is 65,535 at most.
    """
    # What is longer would be cut off without an error, and MySQL's default is 1,024 bytes.
    connection.execute(_LONG_ENOUGH)
    stock = connection.execute(_SOME_STOCK, {"target_id": target_id}).first()
    values = {"target_id": target_id, "now_ms": now_ms, "rows": limit}
    found = connection.execute(_EXPIRED if stock is None else _EXPIRED_BUT_STOCK, values)
    return [
        Expired(source_id, records, last_ms, told, _list_of(told, entries) if told else b"")
        for source_id, records, last_ms, told, entries in found
    ]


def _list_of(count: int, entries: bytes) -> bytes:
    return b"\xdc" + count.to_bytes(2, "big") + entries


def delete_expired(connection: Connection, target_id: str, until_ms: int, limit: int) -> int:
    """Deletes the oldest records of a target that had expired at ``until_ms``: one stretch of the primary key."""
    return connection.execute(_DELETE_STRETCH, {"target_id": target_id, "until_ms": until_ms, "rows": limit}).rowcount


def fetch_targets(connection: Connection) -> list[str]:
    """Every KP that has records in the store. A loose scan of the primary key: one step a target."""
    targets: list[str] = []
    while True:
        after = targets[-1] if targets else ""
        found = connection.execute(
            select(K.c.target_id).where(K.c.target_id > after).order_by(K.c.target_id).limit(1)
        ).scalar()
        if found is None:
            return targets
        targets.append(found)


def delete_expired_wrapping_keys(connection: Connection, now_ms: int, limit: int) -> int:
    """Deletes wrapping keys whose epoch's private half is destroyed. Index wrapping_keys_expires."""
    return connection.execute(_DELETE_WRAPPING_KEYS, {"now_ms": now_ms, "rows": limit}).rowcount


def delete_expired_held(connection: Connection, local_id: str, now_ms: int, limit: int) -> int:
    """Forgets which records were a peer's stock, once they have expired. Index stock_held_expires."""
    return connection.execute(_DELETE_HELD, {"local_id": local_id, "now_ms": now_ms, "rows": limit}).rowcount


def delete_expired_withdrawn(connection: Connection, local_id: str, now_ms: int, limit: int) -> int:
    """Forgets withdrawn keyIds whose records nobody would store any more. Index withdrawn_keys_expires."""
    return connection.execute(_DELETE_WITHDRAWN, {"local_id": local_id, "now_ms": now_ms, "rows": limit}).rowcount
