"""What the janitor deletes: expired key records and stale wrapping keys, in batches that hold locks for milliseconds.

Records are clustered by target and expiry, so a batch reads and deletes one short stretch of the primary key.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection, bindparam, select, text

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


@dataclass(frozen=True, slots=True)
class ExpiredKey:
    """An expired record, by what its source is told of it."""

    key_id: bytes
    source_id: str
    expires_ms: int
    correlation_id: str


_EXPIRED = (
    select(K.c.key_id, K.c.source_id, K.c.expires_ms, K.c.correlation_id)
    .where(K.c.target_id == bindparam("target_id"), K.c.expires_ms <= bindparam("now_ms"))
    .order_by(K.c.expires_ms, K.c.key_id)
    .limit(bindparam("rows"))
    .with_for_update()
)


def fetch_expired_keys(connection: Connection, target_id: str, now_ms: int, limit: int) -> list[ExpiredKey]:
    """The oldest expired records of a target, locked until the transaction ends. Primary key."""
    rows = connection.execute(_EXPIRED, {"target_id": target_id, "now_ms": now_ms, "rows": limit})
    return [ExpiredKey(*row) for row in rows]


def delete_expired_keys(connection: Connection, target_id: str, expired: list[ExpiredKey]) -> int:
    """Deletes the records that ``fetch_expired_keys`` has locked: one stretch of the primary key."""
    return connection.execute(
        _DELETE_STRETCH,
        {"target_id": target_id, "until_ms": expired[-1].expires_ms, "rows": len(expired)},
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
