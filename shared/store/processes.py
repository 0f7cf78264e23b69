"""Signs of life of a KP's own processes, for /health and for the operator. All by primary key."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection, bindparam, delete, select
from sqlalchemy.dialects.mysql import insert

from skipbus.shared.store.schema import PROCESSES as T


@dataclass(frozen=True)
class ProcessSeen:
    """When (UTC ms) a process last said that it works, and what it said of itself."""

    role: str
    instance: str
    seen_ms: int
    detail: str


# Built once: executed every few seconds.
_SIGN = insert(T)
_SIGN = _SIGN.on_duplicate_key_update(seen_ms=_SIGN.inserted.seen_ms, detail=_SIGN.inserted.detail)
_SEEN = select(T.c.role, T.c.instance, T.c.seen_ms, T.c.detail).where(T.c.local_id == bindparam("local_id"))


def upsert_process(connection: Connection, local_id: str, role: str, instance: str, now_ms: int, detail: str) -> None:
    """Says that a process works. Primary key."""
    seen = {"local_id": local_id, "role": role, "instance": instance, "seen_ms": now_ms, "detail": detail[:255]}
    connection.execute(_SIGN, seen)


def fetch_processes(connection: Connection, local_id: str) -> list[ProcessSeen]:
    """All processes of a KP that said something lately. Prefix of the primary key."""
    rows = connection.execute(_SEEN, {"local_id": local_id})
    return [ProcessSeen(row.role, row.instance, row.seen_ms, row.detail) for row in rows]


def delete_expired_processes(connection: Connection, local_id: str, before_ms: int) -> int:
    """Forgets processes that fell silent. Prefix of the primary key: a KP has a handful."""
    return connection.execute(delete(T).where(T.c.local_id == local_id, T.c.seen_ms < before_ms)).rowcount
