"""What the janitor deletes: expired key records and stale wrapping keys, in batches that hold locks for milliseconds.

Records are clustered by target and expiry, so a batch reads and deletes one short stretch of the primary key.
"""

from __future__ import annotations

from typing import NamedTuple

from sqlalchemy import Connection, select, text

from skipbus.shared.store.schema import KEY_RECORDS as K

# SQLAlchemy has no ORDER BY for DELETE.
_DELETE_HELD = text(
    "DELETE FROM stock_held WHERE local_id = :local_id AND expires_ms <= :now_ms ORDER BY expires_ms LIMIT :rows"
)
_DELETE_WITHDRAWN = text(
    "DELETE FROM withdrawn_keys WHERE local_id = :local_id AND expires_ms <= :now_ms ORDER BY expires_ms LIMIT :rows"
)
_DELETE_WRAPPING_KEYS = text("DELETE FROM wrapping_keys WHERE expires_ms <= :now_ms ORDER BY expires_ms LIMIT :rows")


class Stretch(NamedTuple):
    """A target's records in the order of the primary key: all that expire at or after ``from_ms`` and up to the last.

    That one is included: it expires at ``last_ms`` and has the greatest keyId of those, or would have.
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
    """What a source is told of ``told`` expired records of its own.

    ``payload`` is MessagePack, a list of [keyId, expiry in UTC ms, correlation id]; empty where ``told`` is 0.
    """

    source_id: str
    told: int
    payload: bytes


_AFTER_ALL_KEY_IDS = b"\xff" * 64
_LAST = text(
    "SELECT expires_ms, key_id FROM key_records WHERE target_id = :target_id "
    "AND expires_ms BETWEEN :from_ms AND :until_ms ORDER BY expires_ms, key_id LIMIT 1 OFFSET :before"
)
# Bounds instead of an order and a limit, with which MariaDB takes almost twice as long to delete; and no alias, with
# which it takes a tenth longer.
_IN_STRETCH = (
    "key_records.target_id = :target_id AND key_records.expires_ms BETWEEN :from_ms AND :last_ms "
    "AND (key_records.expires_ms < :last_ms OR key_records.key_id <= :last_key_id)"
)
# The server writes the MessagePack itself: to read thousands of rows only to write them again costs the driver and the
# interpreter more than the server needs to delete them.
_ENTRY = (
    "CONCAT(0x93C4, CHAR(LENGTH(key_records.key_id)), key_records.key_id, "
    "0xCF, UNHEX(LPAD(HEX(key_records.expires_ms), 16, '0')), "
    "0xD9, CHAR(LENGTH(key_records.correlation_id)), key_records.correlation_id)"
)
_LONGEST_LIST_BYTES = (3 + 64 + 9 + 2 + 64) * 50_000
_EXPIRED = text(
    f"SELECT source_id, COUNT(*), GROUP_CONCAT({_ENTRY} SEPARATOR '') "
    f"FROM key_records WHERE {_IN_STRETCH} GROUP BY source_id FOR UPDATE"
)
# Stock that its source has not given out was issued to nobody, so nobody is told of it. A subquery locks nothing.
_HELD = (
    "EXISTS (SELECT 1 FROM stock_held AS h FORCE INDEX (PRIMARY) WHERE h.local_id = :target_id "
    "AND h.source_id = key_records.source_id AND h.key_id = key_records.key_id)"
)
_EXPIRED_BUT_STOCK = text(
    f"SELECT source_id, COUNT(IF({_HELD}, NULL, 1)), GROUP_CONCAT(IF({_HELD}, NULL, {_ENTRY}) SEPARATOR '')"
    f" FROM key_records WHERE {_IN_STRETCH} GROUP BY source_id FOR UPDATE"
)
_SOME_STOCK = text("SELECT 1 FROM stock_held FORCE INDEX (PRIMARY) WHERE local_id = :target_id LIMIT 1")
_LONG_ENOUGH = text(f"SET SESSION group_concat_max_len = {_LONGEST_LIST_BYTES}")
_DELETE_STRETCH = text(f"DELETE FROM key_records WHERE {_IN_STRETCH}")


def fetch_stretch(connection: Connection, target_id: str, from_ms: int, until_ms: int, limit: int) -> Stretch:
    """The oldest records of a target that expire between two times (UTC ms, both within), about ``limit`` at most.

    Where others were deleted in front of them a moment ago, ``from_ms`` spares the server to pass over these again.
    """
    values = {"target_id": target_id, "from_ms": from_ms, "until_ms": until_ms, "before": limit - 1}
    last = connection.execute(_LAST, values).first()
    return Stretch(target_id, from_ms, *(last or (until_ms, _AFTER_ALL_KEY_IDS)))


def fetch_expired(connection: Connection, stretch: Stretch) -> list[Expired]:
    """The records of a stretch by their sources, locked until the transaction ends. Primary key."""
    # What is longer would be cut off without an error, and MySQL's default is 1,024 bytes.
    connection.execute(_LONG_ENOUGH)
    stock = connection.execute(_SOME_STOCK, {"target_id": stretch.target_id}).first()
    found = connection.execute(_EXPIRED if stock is None else _EXPIRED_BUT_STOCK, stretch._asdict())
    return [Expired(source_id, told, _list_of(told, entries) if told else b"") for source_id, told, entries in found]


def _list_of(count: int, entries: bytes) -> bytes:
    return b"\xdd" + count.to_bytes(4, "big") + entries


def delete_expired(connection: Connection, stretch: Stretch) -> int:
    """Deletes the records of a stretch; how many there were. Primary key."""
    return connection.execute(_DELETE_STRETCH, stretch._asdict()).rowcount


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
