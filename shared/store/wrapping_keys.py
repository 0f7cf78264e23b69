"""Wrapping keys, each sealed to one epoch of its target and signed by its source."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, fields

from sqlalchemy import Connection, bindparam, select, text
from sqlalchemy.dialects.mysql import insert

from skipbus.shared.crypto.sealing import SealedWrappingKey
from skipbus.shared.store.schema import WRAPPING_KEYS as W

_INSERT = insert(W)
# One that an interrupted commit has stored already is the same one.
_INSERT = _INSERT.on_duplicate_key_update(expires_ms=W.c.expires_ms)
_FETCH = select(*(W.c[field.name] for field in fields(SealedWrappingKey))).where(
    W.c.wrapping_key_id.in_(bindparam("wrapping_key_ids", expanding=True))
)

# SQLAlchemy has no ORDER BY for DELETE.
_DELETE_EXPIRED = text("DELETE FROM wrapping_keys WHERE expires_ms <= :now_ms ORDER BY expires_ms LIMIT :rows")


def insert_wrapping_keys(connection: Connection, wrapping_keys: Sequence[SealedWrappingKey]) -> None:
    """Inserts sealed wrapping keys; one whose id exists stays as it is. Primary key."""
    if wrapping_keys:
        connection.execute(_INSERT, [asdict(wrapping_key) for wrapping_key in wrapping_keys])


def fetch_sealed_wrapping_keys(connection: Connection, wrapping_key_ids: Collection[bytes]) -> list[SealedWrappingKey]:
    """These wrapping keys, still sealed. Primary key."""
    rows = connection.execute(_FETCH, {"wrapping_key_ids": list(wrapping_key_ids)})
    return [SealedWrappingKey(*row) for row in rows]


def delete_expired_wrapping_keys(connection: Connection, now_ms: int, limit: int) -> int:
    """Deletes wrapping keys whose epoch's private half is destroyed. Index wrapping_keys_expires."""
    return connection.execute(_DELETE_EXPIRED, {"now_ms": now_ms, "rows": limit}).rowcount
