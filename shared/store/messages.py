"""Outbox, inbox and the peers' counters: what the KPs tell each other, and what came of it.

An outbox row is written in the transaction of the event that it tells of; an inbox row in the transaction
that has an envelope's effect. Rows become an envelope when they share a number, which never changes after
that; they go when the peer has acknowledged it. Transactions are the callers'.

The lifetimes stand here because they depend on each other: an envelope that is sent again bears its old
number and a new date, so the inbox must remember numbers for longer than any outbox row may live.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from sqlalchemy import ColumnElement, Connection, and_, delete, func, select, update
from sqlalchemy.dialects.mysql import insert

from shared.envelopes import MAX_AGE_MS
from shared.epochs import MAX_CLOCK_SKEW_MS
from shared.schema import INBOX as I
from shared.schema import OUTBOX as O
from shared.schema import PEERS as P

# A peer that is away for longer than this misses what was to be told; its keys have expired long since.
OUTBOX_LIFETIME_MS = 24 * 3_600_000
INBOX_LIFETIME_MS = OUTBOX_LIFETIME_MS + MAX_AGE_MS + 2 * MAX_CLOCK_SKEW_MS


@dataclass(frozen=True)
class OutboxEntry:
    """An outbox row that is in no envelope yet; its payload stays in the store."""

    id: int
    peer_id: str
    type: str
    items: int
    payload_bytes: int


@dataclass(frozen=True)
class OutboxEnvelope:
    """The rows of one envelope taken together; ``sent_ms`` is None until the broker had it once."""

    peer_id: str
    number: int
    type: str
    items: int
    attempts: int
    sent_ms: int | None


@dataclass(frozen=True)
class PeerRow:
    """A peer as ``local_id`` sees it. Inbound: keys that the peer made for ``local_id``."""

    peer_id: str
    endpoint: str
    last_heartbeat_ms: int | None
    heartbeat_interval_ms: int
    issued: int
    retrieved: int
    expired: int
    inbound_issued: int
    inbound_retrieved: int
    inbound_expired: int


# --- outbox: written by api and janitor


def insert_outbox(
    connection: Connection, local_id: str, peer_id: str, kind: str, payload: bytes, items: int, now_ms: int
) -> None:
    """An event for a peer, committed with whatever it tells of. Primary key."""
    connection.execute(
        O.insert().values(
            local_id=local_id, peer_id=peer_id, type=kind, payload=payload, items=items, created_ms=now_ms
        )
    )


# --- outbox: numbered, sent and acknowledged by the syncer


def claim_unnumbered(connection: Connection, local_id: str, limit: int) -> list[OutboxEntry]:
    """The oldest rows that are in no envelope, locked for this transaction. Index outbox_unsent.

    Rows that another transaction holds are passed over: a writer who has yet to commit keeps nobody waiting.
    """
    statement = (
        select(O.c.id, O.c.peer_id, O.c.type, O.c["items"], func.length(O.c.payload).label("payload_bytes"))
        .with_hint(O, "FORCE INDEX (outbox_unsent)")
        .where(O.c.local_id == local_id, O.c.envelope_no.is_(None), O.c.sent_ms.is_(None))
        .order_by(O.c.id)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    return [OutboxEntry(*row) for row in connection.execute(statement)]


def fetch_last_number(connection: Connection, local_id: str, peer_id: str) -> int:
    """The greatest number that the peer has yet to acknowledge, or 0. Index outbox_envelope."""
    statement = select(func.max(O.c.envelope_no)).where(O.c.local_id == local_id, O.c.peer_id == peer_id)
    return int(connection.execute(statement).scalar() or 0)


def update_numbers(connection: Connection, row_ids: Sequence[int], number: int) -> None:
    """Makes one envelope of the rows. Primary key."""
    connection.execute(update(O).where(O.c.id.in_(row_ids)).values(envelope_no=number))


def fetch_envelopes(connection: Connection, local_id: str) -> list[OutboxEnvelope]:
    """All envelopes that are not acknowledged: read once, when a syncer takes over. Index outbox_envelope."""
    statement = (
        select(
            O.c.peer_id,
            O.c.envelope_no,
            func.max(O.c.type),
            func.sum(O.c["items"]),
            func.max(O.c.attempts),
            func.max(O.c.sent_ms),
        )
        .where(O.c.local_id == local_id, O.c.envelope_no.is_not(None))
        .group_by(O.c.peer_id, O.c.envelope_no)
    )
    return [
        OutboxEnvelope(peer_id, number, type_, int(items), attempts, sent_ms)
        for peer_id, number, type_, items, attempts, sent_ms in connection.execute(statement)
    ]


def fetch_payloads(connection: Connection, local_id: str, peer_id: str, number: int) -> list[bytes]:
    """One envelope's payloads in row order; none once it is acknowledged. Index outbox_envelope."""
    statement = select(O.c.payload).where(_is_envelope(local_id, peer_id, number)).order_by(O.c.id)
    return list(connection.execute(statement).scalars())


def update_sent(connection: Connection, local_id: str, peer_id: str, numbers: Collection[int], now_ms: int) -> None:
    """The broker has had these envelopes once more. Index outbox_envelope."""
    connection.execute(
        update(O)
        .where(O.c.local_id == local_id, O.c.peer_id == peer_id, O.c.envelope_no.in_(numbers))
        .values(sent_ms=now_ms, attempts=O.c.attempts + 1)
    )


def delete_acknowledged(connection: Connection, local_id: str, peer_id: str, numbers: Collection[int]) -> int:
    """The peer has stored these envelopes: their rows go. Returns how many rows. Index outbox_envelope."""
    return connection.execute(
        delete(O).where(O.c.local_id == local_id, O.c.peer_id == peer_id, O.c.envelope_no.in_(numbers))
    ).rowcount


def delete_expired_outbox(connection: Connection, local_id: str, before_ms: int, limit: int) -> int:
    """Gives up rows made before ``before_ms`` (now - OUTBOX_LIFETIME_MS). Index outbox_created."""
    statement = delete(O).where(O.c.local_id == local_id, O.c.created_ms < before_ms)
    return connection.execute(statement.with_dialect_options(mysql_limit=limit)).rowcount


# --- inbox


def insert_inbox(connection: Connection, local_id: str, sender_id: str, number: int, now_ms: int) -> bool:
    """Remembers an envelope in the transaction of its effect; False where it was known. Primary key."""
    statement = insert(I).prefix_with("IGNORE")
    values = {"local_id": local_id, "sender_id": sender_id, "envelope_no": number, "received_ms": now_ms}
    return connection.execute(statement.values(values)).rowcount == 1


def delete_expired_inbox(connection: Connection, local_id: str, before_ms: int, limit: int) -> int:
    """Forgets envelopes from before ``before_ms`` (now - INBOX_LIFETIME_MS). Index inbox_received."""
    statement = delete(I).where(I.c.local_id == local_id, I.c.received_ms < before_ms)
    return connection.execute(statement.with_dialect_options(mysql_limit=limit)).rowcount


# --- peers


def add_to_counters(connection: Connection, local_id: str, peer_id: str, counts: dict[str, int]) -> None:
    """Adds to the named counters of ``PeerRow``. Primary key."""
    statement = insert(P).values(local_id=local_id, peer_id=peer_id, **counts)
    connection.execute(statement.on_duplicate_key_update({name: P.c[name] + count for name, count in counts.items()}))


def fetch_heartbeat_numbers(connection: Connection, local_id: str, peer_ids: Iterable[str]) -> dict[str, int]:
    """The number of the last heartbeat that was accepted of each peer. Primary key."""
    statement = select(P.c.peer_id, P.c.last_heartbeat_no).where(
        P.c.local_id == local_id, P.c.peer_id.in_(list(peer_ids))
    )
    return {row.peer_id: row.last_heartbeat_no for row in connection.execute(statement)}


def upsert_heartbeat(
    connection: Connection, local_id: str, peer_id: str, number: int, interval_ms: int, now_ms: int
) -> None:
    """A peer lives. Primary key."""
    fresh = {"last_heartbeat_no": number, "last_heartbeat_ms": now_ms, "heartbeat_interval_ms": interval_ms}
    statement = insert(P).values(local_id=local_id, peer_id=peer_id, **fresh)
    connection.execute(statement.on_duplicate_key_update(fresh))


def fetch_peer_rows(connection: Connection, local_id: str) -> list[PeerRow]:
    """All that is known of the peers of ``local_id``. Prefix of the primary key."""
    columns = [P.c[name] for name in PeerRow.__dataclass_fields__]
    return [PeerRow(*row) for row in connection.execute(select(*columns).where(P.c.local_id == local_id))]


def _is_envelope(local_id: str, peer_id: str, number: int) -> ColumnElement[bool]:
    return and_(O.c.local_id == local_id, O.c.peer_id == peer_id, O.c.envelope_no == number)
