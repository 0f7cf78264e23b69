"""Reports of a KP's own processes that they work, for /health and for the operator. All by primary key."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

from sqlalchemy import Connection, Engine, bindparam, delete, select
from sqlalchemy.dialects.mysql import insert

from skipbus.shared.clock import now_ms
from skipbus.shared.store.engine import driver_errors
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


def this_instance() -> str:
    """The name of this process among those of its role: host and process id."""
    return f"{socket.gethostname()}:{os.getpid()}"


def report_process(engine: Engine, local_id: str, role: str, state: str) -> None:
    """Says that this process works, and how. Blocks. Raises StoreUnavailable, StoreRefused."""
    with driver_errors(), engine.begin() as connection:
        upsert_process(connection, local_id, role, this_instance(), now_ms(), state)


def upsert_process(connection: Connection, local_id: str, role: str, instance: str, seen_ms: int, detail: str) -> None:
    """Says that a process works. Primary key."""
    seen = {"local_id": local_id, "role": role, "instance": instance, "seen_ms": seen_ms, "detail": detail[:255]}
    connection.execute(_SIGN, seen)


def fetch_processes(connection: Connection, local_id: str) -> list[ProcessSeen]:
    """All processes of a KP that said something lately. Prefix of the primary key."""
    rows = connection.execute(_SEEN, {"local_id": local_id})
    return [ProcessSeen(row.role, row.instance, row.seen_ms, row.detail) for row in rows]


def delete_expired_processes(connection: Connection, local_id: str, before_ms: int) -> None:
    """Forgets processes that fell silent. Prefix of the primary key: a KP has a handful."""
    connection.execute(delete(T).where(T.c.local_id == local_id, T.c.seen_ms < before_ms))
