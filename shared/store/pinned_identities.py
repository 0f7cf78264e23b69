"""Which identity an observer accepts for a KP. All by primary key.

Over a store link the first announced identity is pinned (trust on first use), and only an operator changes the pin.
Another identity that is presented under the same name is kept beside the pin for the operator; nothing else uses it.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection, select, update
from sqlalchemy.dialects.mysql import insert

from skipbus.shared.store.schema import PINNED_IDENTITIES as P


@dataclass(frozen=True)
class Pin:
    """The identity that an observer accepts for a KP, and another that was presented since (UTC ms), if any."""

    public_key: bytes
    presented_key: bytes | None
    presented_ms: int | None = None


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
    """Pins on first use; returns the key that is pinned, which is another one where another process was first."""
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
    """Keeps another identity, presented under a pinned name, for the operator. Primary key."""
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
    """Keeps for the operator that another identity than the configured one was presented. Primary key.

    The configured identity decides; nothing else reads this row.
    """
    fresh = {"public_key": configured_key, "presented_key": presented_key, "presented_ms": now_ms}
    statement = insert(P).values(observer_id=observer_id, subject_id=subject_id, pinned_ms=now_ms, **fresh)
    connection.execute(statement.on_duplicate_key_update(fresh))
