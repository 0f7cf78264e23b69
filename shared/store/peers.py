"""What is known of key providers: announcements, pinned identities. All by primary key.

The pin is the root of trust over a store link: learned from the first announcement seen, it changes only
by an operator's hand. Whatever else presents itself under that name is kept beside the pin for the
operator to look at, and is not used.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection, bindparam, delete, func, literal_column, select, union_all, update
from sqlalchemy.dialects.mysql import insert

from skipbus.shared.protocol.announcements import Announcement, digest
from skipbus.shared.store.schema import ANNOUNCEMENTS as A
from skipbus.shared.store.schema import BUS_ANNOUNCEMENTS as B
from skipbus.shared.store.schema import PINNED_IDENTITIES as P


@dataclass(frozen=True)
class Pin:
    """The identity that ``observer`` accepts for a KP, and another that was presented since (UTC ms), if any."""

    public_key: bytes
    presented_key: bytes | None
    presented_ms: int | None = None


def upsert_announcement(connection: Connection, announcement: Announcement, body: bytes) -> None:
    """Stores a KP's announcement unless a newer one is there. Primary key."""
    statement = insert(A).values(
        system_id=announcement.system_id,
        digest=digest(body),
        body=body,
        issued_ms=announcement.issued_ms,
    )
    # MySQL assigns from left to right: issued_ms must be compared before it is replaced, hence last.
    newer = statement.inserted.issued_ms >= A.c.issued_ms
    connection.execute(
        statement.on_duplicate_key_update(
            [
                ("digest", func.if_(newer, statement.inserted.digest, A.c.digest)),
                ("body", func.if_(newer, statement.inserted.body, A.c.body)),
                ("issued_ms", func.greatest(statement.inserted.issued_ms, A.c.issued_ms)),
            ]
        )
    )


def fetch_announcement_digests(connection: Connection) -> dict[str, bytes]:
    """system id -> digest of all announcements in the store: one row a KP."""
    return {row.system_id: row.digest for row in connection.execute(_DIGESTS)}


# Put together once, because they are asked again and again.
_DIGESTS = select(A.c.system_id, A.c.digest)
_ALL_DIGESTS = union_all(
    select(literal_column("0"), A.c.system_id, A.c.digest),
    select(literal_column("1"), B.c.system_id, B.c.digest).where(B.c.local_id == bindparam("local_id")),
)


def fetch_all_digests(connection: Connection, local_id: str) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """``fetch_announcement_digests``, and the same of what bus peers announced to ``local_id``, in one round trip.

    Prefix of the primary key for the latter.
    """
    rows = connection.execute(_ALL_DIGESTS, {"local_id": local_id}).all()
    return {row[1]: row[2] for row in rows if not row[0]}, {row[1]: row[2] for row in rows if row[0]}


def fetch_announcement(connection: Connection, system_id: str) -> bytes | None:
    """One KP's announcement as it was signed. Primary key."""
    body: bytes | None = connection.execute(select(A.c.body).where(A.c.system_id == system_id)).scalar()
    return body


def fetch_announcement_issued_ms(connection: Connection, system_id: str) -> int:
    """When (UTC ms) the stored announcement was issued, 0 where there is none. Primary key."""
    return connection.execute(select(A.c.issued_ms).where(A.c.system_id == system_id)).scalar() or 0


def delete_announcement(connection: Connection, system_id: str) -> None:
    """Forgets a KP that is gone for good. Primary key."""
    connection.execute(delete(A).where(A.c.system_id == system_id))


def upsert_bus_announcement(connection: Connection, local_id: str, announcement: Announcement, body: bytes) -> None:
    """Stores what a bus peer announced to ``local_id`` alone, unless a newer one is there. Primary key."""
    statement = insert(B).values(
        local_id=local_id,
        system_id=announcement.system_id,
        digest=digest(body),
        body=body,
        issued_ms=announcement.issued_ms,
    )
    # MySQL assigns from left to right: issued_ms must be compared before it is replaced, hence last.
    newer = statement.inserted.issued_ms >= B.c.issued_ms
    connection.execute(
        statement.on_duplicate_key_update(
            [
                ("digest", func.if_(newer, statement.inserted.digest, B.c.digest)),
                ("body", func.if_(newer, statement.inserted.body, B.c.body)),
                ("issued_ms", func.greatest(statement.inserted.issued_ms, B.c.issued_ms)),
            ]
        )
    )


def delete_bus_announcement(connection: Connection, local_id: str, system_id: str) -> None:
    """Makes room for a peer's announcement under another identity than before. Primary key."""
    connection.execute(delete(B).where(B.c.local_id == local_id, B.c.system_id == system_id))


def fetch_bus_announcement(connection: Connection, local_id: str, system_id: str) -> bytes | None:
    """What a bus peer announced to ``local_id``, as it was signed. Primary key."""
    statement = select(B.c.body).where(B.c.local_id == local_id, B.c.system_id == system_id)
    body: bytes | None = connection.execute(statement).scalar()
    return body


def fetch_pin(connection: Connection, observer_id: str, subject_id: str) -> Pin | None:
    """What ``observer_id`` pinned for ``subject_id``. Primary key."""
    row = connection.execute(
        select(P.c.public_key, P.c.presented_key, P.c.presented_ms).where(
            P.c.observer_id == observer_id, P.c.subject_id == subject_id
        )
    ).one_or_none()
    return Pin(*row) if row else None


def fetch_pins(connection: Connection, observer_id: str) -> dict[str, Pin]:
    """All that ``observer_id`` pinned, by subject. Prefix of the primary key."""
    rows = connection.execute(
        select(P.c.subject_id, P.c.public_key, P.c.presented_key, P.c.presented_ms).where(
            P.c.observer_id == observer_id
        )
    )
    return {row.subject_id: Pin(row.public_key, row.presented_key, row.presented_ms) for row in rows}


def insert_pin(connection: Connection, observer_id: str, subject_id: str, public_key: bytes, now_ms: int) -> bytes:
    """Pins at first sight; returns the key that is pinned, which is another one when somebody was first."""
    statement = insert(P).values(
        observer_id=observer_id, subject_id=subject_id, public_key=public_key, pinned_ms=now_ms
    )
    connection.execute(statement.on_duplicate_key_update(subject_id=P.c.subject_id))
    pinned: bytes = connection.execute(
        select(P.c.public_key).where(P.c.observer_id == observer_id, P.c.subject_id == subject_id)
    ).scalar_one()
    return pinned


def update_presented_key(
    connection: Connection, observer_id: str, subject_id: str, public_key: bytes, now_ms: int
) -> None:
    """Keeps another identity, presented under a pinned name, for an operator to judge. Primary key."""
    connection.execute(
        update(P)
        .where(P.c.observer_id == observer_id, P.c.subject_id == subject_id)
        .values(presented_key=public_key, presented_ms=now_ms)
    )


def update_pin(connection: Connection, observer_id: str, subject_id: str, public_key: bytes, now_ms: int) -> None:
    """An operator accepts another identity for ``subject_id``. Primary key."""
    connection.execute(
        update(P)
        .where(P.c.observer_id == observer_id, P.c.subject_id == subject_id)
        .values(public_key=public_key, pinned_ms=now_ms, presented_key=None, presented_ms=None)
    )


def upsert_presented(
    connection: Connection, observer_id: str, subject_id: str, configured_key: bytes, presented_key: bytes, now_ms: int
) -> None:
    """For an operator to read: another identity than the configured one was presented. Primary key.

    The configured identity decides; this row decides nothing.
    """
    fresh = {"public_key": configured_key, "presented_key": presented_key, "presented_ms": now_ms}
    statement = insert(P).values(observer_id=observer_id, subject_id=subject_id, pinned_ms=now_ms, **fresh)
    connection.execute(statement.on_duplicate_key_update(fresh))
