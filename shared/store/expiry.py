"""What the janitor deletes: expired key records and stale wrapping keys, in batches that hold locks for milliseconds.

Records are clustered by target and expiry, so a batch reads and deletes one short stretch of the primary key.
"""

from __future__ import annotations

from typing import NamedTuple

import orjson
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


class ExpiredKey(NamedTuple):
    """An expired record, by what its source is told of it. A tuple, because thousands are made at a time."""

    key_id: bytes
    source_id: str
    expires_ms: int
    correlation_id: str


# One value instead of thousands of rows, which the driver would read one by one.
_EXPIRED = text(
    "SELECT JSON_ARRAYAGG(JSON_ARRAY(HEX(key_id), source_id, expires_ms, correlation_id)) FROM (SELECT key_id, "
    "source_id, expires_ms, correlation_id FROM key_records WHERE target_id = :target_id AND expires_ms <= :now_ms "
    "ORDER BY expires_ms, key_id LIMIT :rows FOR UPDATE) AS stretch"
)


def fetch_expired_keys(connection: Connection, target_id: str, now_ms: int, limit: int) -> list[ExpiredKey]:
    """The oldest expired records of a target, locked until the transaction ends; in any order. Primary key."""
    found = connection.execute(_EXPIRED, {"target_id": target_id, "now_ms": now_ms, "rows": limit}).scalar()
    return [ExpiredKey(bytes.fromhex(key_id), *rest) for key_id, *rest in orjson.loads(found or "[]")]


def delete_expired_keys(connection: Connection, target_id: str, expired: list[ExpiredKey]) -> int:
    """Deletes the records that ``fetch_expired_keys`` has locked: one stretch of the primary key."""
    return connection.execute(
        _DELETE_STRETCH,
        {"target_id": target_id, "until_ms": max(key.expires_ms for key in expired), "rows": len(expired)},
    ).rowcount


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
