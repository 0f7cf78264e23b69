"""Announcements of key providers: those of this store's KPs, and those that bus peers sent to one KP of it.

Two tables, because an account that can write into one must not speak for a KP of the other. All by primary key.
"""

from __future__ import annotations

from sqlalchemy import Connection, Table, bindparam, delete, func, select
from sqlalchemy.dialects.mysql import Insert, insert

from skipbus.shared.protocol.announcements import Announcement, digest
from skipbus.shared.store.schema import ANNOUNCEMENTS as A
from skipbus.shared.store.schema import BUS_ANNOUNCEMENTS as B


def _upsert(table: Table) -> Insert:
    """Stores an announcement unless a newer one is there."""
    statement = insert(table)
    new, old = statement.inserted, table.c
    newer = new.issued_ms >= old.issued_ms
    # MySQL assigns from left to right: issued_ms must be compared before it is replaced, hence last.
    return statement.on_duplicate_key_update(
        [
            ("digest", func.if_(newer, new.digest, old.digest)),
            ("body", func.if_(newer, new.body, old.body)),
            ("issued_ms", func.greatest(new.issued_ms, old.issued_ms)),
        ]
    )


_UPSERT, _UPSERT_BUS = _upsert(A), _upsert(B)
_DIGESTS = select(A.c.system_id, A.c.digest)
_DIGEST = select(A.c.digest).where(A.c.system_id == bindparam("system_id"))
_BUS_DIGESTS = select(B.c.system_id, B.c.digest).where(B.c.local_id == bindparam("local_id"))


# --- KPs of this store


def upsert_announcement(connection: Connection, announcement: Announcement, body: bytes) -> None:
    """Stores a KP's announcement unless a newer one is there. Primary key."""
    connection.execute(_UPSERT, _values(announcement, body))


def fetch_announcement_digests(connection: Connection) -> dict[str, bytes]:
    """System id -> digest of all announcements in the store: one row for each KP."""
    return {row.system_id: row.digest for row in connection.execute(_DIGESTS)}


def fetch_announcement(connection: Connection, system_id: str) -> bytes | None:
    """One KP's announcement as it was signed. Primary key."""
    body: bytes | None = connection.execute(select(A.c.body).where(A.c.system_id == system_id)).scalar()
    return body


def fetch_announcement_digest(connection: Connection, system_id: str) -> bytes | None:
    """The digest of one KP's announcement, None where it has none. Primary key."""
    stored: bytes | None = connection.execute(_DIGEST, {"system_id": system_id}).scalar()
    return stored


def fetch_announcement_issued_ms(connection: Connection, system_id: str) -> int:
    """When (UTC ms) the stored announcement was issued, 0 where there is none. Primary key."""
    return connection.execute(select(A.c.issued_ms).where(A.c.system_id == system_id)).scalar() or 0


# --- bus peers, each as it announced itself to ``local_id``


def upsert_bus_announcement(connection: Connection, local_id: str, announcement: Announcement, body: bytes) -> None:
    """Stores what a bus peer announced to ``local_id``, unless a newer one is there. Primary key."""
    connection.execute(_UPSERT_BUS, {"local_id": local_id} | _values(announcement, body))


def fetch_bus_announcement_digests(connection: Connection, local_id: str) -> dict[str, bytes]:
    """System id -> digest of what bus peers announced to ``local_id``. Prefix of the primary key."""
    rows = connection.execute(_BUS_DIGESTS, {"local_id": local_id})
    return {row.system_id: row.digest for row in rows}


def fetch_bus_announcement(connection: Connection, local_id: str, system_id: str) -> bytes | None:
    """What a bus peer announced to ``local_id``, as it was signed. Primary key."""
    statement = select(B.c.body).where(B.c.local_id == local_id, B.c.system_id == system_id)
    body: bytes | None = connection.execute(statement).scalar()
    return body


def delete_bus_announcement(connection: Connection, local_id: str, system_id: str) -> None:
    """Makes room for a peer's announcement under another identity than before. Primary key."""
    connection.execute(delete(B).where(B.c.local_id == local_id, B.c.system_id == system_id))


def _values(announcement: Announcement, body: bytes) -> dict[str, object]:
    return {
        "system_id": announcement.system_id,
        "digest": digest(body),
        "body": body,
        "issued_ms": announcement.issued_ms,
    }
