"""keyIds that their source took back: a record that arrives after its withdrawal must not be stored."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from sqlalchemy import Connection, bindparam, select, text
from sqlalchemy.dialects.mysql import insert

from skipbus.shared.store.schema import WITHDRAWN_KEYS as W

_INSERT = insert(W).prefix_with("IGNORE")
_FETCH = (
    select(W.c.key_id)
    .with_hint(W, "FORCE INDEX (PRIMARY)")
    .where(
        W.c.local_id == bindparam("local_id"),
        W.c.source_id == bindparam("source_id"),
        W.c.key_id.in_(bindparam("key_ids", expanding=True)),
    )
)

# SQLAlchemy has no ORDER BY for DELETE.
_DELETE_EXPIRED = text(
    "DELETE FROM withdrawn_keys WHERE local_id = :local_id AND expires_ms <= :now_ms ORDER BY expires_ms LIMIT :rows"
)


def insert_withdrawn_keys(
    connection: Connection, local_id: str, source_id: str, keys: Iterable[tuple[bytes, int]]
) -> None:
    """Remembers these keys (keyId, expiry in UTC ms); one that is remembered already stays as it is."""
    rows = [
        {"local_id": local_id, "source_id": source_id, "key_id": key_id, "expires_ms": expires_ms}
        for key_id, expires_ms in keys
    ]
    if rows:
        connection.execute(_INSERT, rows)


def fetch_withdrawn_keys(
    connection: Connection, local_id: str, source_id: str, key_ids: Collection[bytes]
) -> frozenset[bytes]:
    """Which of these keys their source took back. Primary key."""
    values = {"local_id": local_id, "source_id": source_id, "key_ids": list(key_ids)}
    return frozenset(connection.execute(_FETCH, values).scalars())


def delete_expired_withdrawn(connection: Connection, local_id: str, now_ms: int, limit: int) -> int:
    """Forgets withdrawn keyIds whose records no process would store any more. Index withdrawn_keys_expires."""
    return connection.execute(_DELETE_EXPIRED, {"local_id": local_id, "now_ms": now_ms, "rows": limit}).rowcount
