"""Outbox, inbox and the peers' counters: what the KPs tell each other, and what came of it.

An outbox row is written in the transaction of the event that it tells of; an inbox row in the transaction
that has an envelope's effect. Rows become an envelope when they share a number, which never changes after
that; they go when the peer has acknowledged it. Transactions are the callers'.

What is asked for each key, each heartbeat or each second is put together once, because building a statement takes
several times as long as sending it.

The lifetimes stand here because they depend on each other: an envelope that is sent again bears its old
number and a new date, so the inbox must remember numbers for longer than any outbox row may live.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from sqlalchemy import ColumnElement, Connection, Select, and_, bindparam, delete, func, select, update
from sqlalchemy.dialects.mysql import Insert, insert

from skipbus.shared.crypto.epochs import MAX_CLOCK_SKEW_MS
from skipbus.shared.protocol.envelopes import MAX_AGE_MS
from skipbus.shared.store.literals import name
from skipbus.shared.store.packets import delete_listed
from skipbus.shared.store.schema import INBOX as I
from skipbus.shared.store.schema import OUTBOX as O
from skipbus.shared.store.schema import PEERS as P

# A peer that is away for longer than this misses what was to be told; its keys have expired long since.
OUTBOX_LIFETIME_MS = 24 * 3_600_000
INBOX_LIFETIME_MS = OUTBOX_LIFETIME_MS + MAX_AGE_MS + 2 * MAX_CLOCK_SKEW_MS


@dataclass(frozen=True)
class OutboxEntry:
    """An outbox row that is in no envelope yet; its payload stays in the store until the row is put into one."""

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


@dataclass(frozen=True, slots=True)
class EnvelopeRow:
    """A row of a numbered envelope."""

    id: int
    type: str
    items: int
    token: bytes | None


@dataclass(frozen=True, slots=True)
class Beat:
    """What a peer's heartbeat says of it; ``clock_skew_ms`` as in ``PeerRow``."""

    peer_id: str
    number: int
    interval_ms: int
    clock_skew_ms: int = 0


@dataclass(frozen=True)
class PeerRow:
    """A peer as ``local_id`` sees it. Inbound: keys that the peer made for ``local_id``.

    ``clock_skew_ms`` is positive where the peer's clock is behind; ``last_refusal`` is what it last said of an
    envelope that it refused.
    """

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
    clock_skew_ms: int | None = None
    last_refusal: str = ""
    last_refusal_ms: int | None = None
    withdrawn: int = 0
    inbound_withdrawn: int = 0


# No system id: the row of ``peers`` that keeps up to which number this KP's own envelopes may be numbered.
NOBODY = ""


@dataclass(frozen=True, slots=True)
class PeerSigns:
    """The part of a ``PeerRow`` that heartbeats write."""

    peer_id: str
    last_heartbeat_ms: int | None
    heartbeat_interval_ms: int
    clock_skew_ms: int | None


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


_UNSENT_ROWS = (
    select(O.c.id, O.c.peer_id, O.c.type, O.c["items"], func.length(O.c.payload))
    .with_hint(O, "FORCE INDEX (outbox_unsent)")
    .where(O.c.local_id == bindparam("local_id"), O.c.envelope_no.is_(None), O.c.sent_ms.is_(None))
    .order_by(O.c.id)
    .limit(bindparam("most"))
    .with_for_update(skip_locked=True)
)


def claim_unsent_rows(connection: Connection, local_id: str, limit: int) -> list[OutboxEntry]:
    """The oldest rows that are in no envelope, locked until the transaction ends. Index outbox_unsent.

    Rows that another transaction has locked are skipped: a writer that has not committed yet delays nobody.
    """
    rows = connection.execute(_UNSENT_ROWS, {"local_id": local_id, "most": limit})
    return [OutboxEntry(*row) for row in rows]


_NUMBER_ROWS = (
    update(O)
    .with_hint("FORCE INDEX (PRIMARY)")
    .where(O.c.id.in_(bindparam("row_ids", expanding=True)))
    .values(envelope_no=bindparam("number"))
)


def update_numbered(connection: Connection, row_ids: Sequence[int], number: int) -> None:
    """Makes one envelope of rows that ``claim_unsent_rows`` has locked. Primary key."""
    connection.execute(_NUMBER_ROWS, {"row_ids": row_ids, "number": number})


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


def fetch_waiting(connection: Connection, local_id: str, peer_id: str) -> tuple[int, int | None]:
    """How many rows wait for the peer, and when (UTC ms) the oldest was made. Prefix of index outbox_envelope."""
    statement = select(func.count(), func.min(O.c.created_ms)).where(O.c.local_id == local_id, O.c.peer_id == peer_id)
    count, oldest_ms = connection.execute(statement).one()
    return count, oldest_ms


def update_sent(connection: Connection, local_id: str, peer_id: str, numbers: Collection[int], now_ms: int) -> None:
    """The broker has had these envelopes once more. Index outbox_envelope."""
    connection.execute(
        update(O)
        .where(O.c.local_id == local_id, O.c.peer_id == peer_id, O.c.envelope_no.in_(numbers))
        .values(sent_ms=now_ms, attempts=O.c.attempts + 1)
    )


def delete_acknowledged(connection: Connection, local_id: str, peer_id: str, numbers: Collection[int]) -> int:
    """The peer has stored these envelopes: their rows go. Returns how many rows. Index outbox_envelope."""
    if not numbers:
        return 0
    wanted = [f"{number:d}" for number in numbers]
    deletion = delete_listed(
        "outbox", "outbox_envelope", "envelope_no", wanted, local_id=name(local_id), peer_id=name(peer_id)
    )
    return connection.exec_driver_sql(deletion).rowcount


_ENVELOPE_ROWS = (
    select(O.c.id, O.c.type, O.c["items"], O.c.token)
    .with_hint(O, "FORCE INDEX (outbox_envelope)")
    .where(
        O.c.local_id == bindparam("local_id"),
        O.c.peer_id == bindparam("peer_id"),
        O.c.envelope_no.in_(bindparam("numbers", expanding=True)),
    )
    .with_for_update()
)


def fetch_envelope_rows(
    connection: Connection, local_id: str, peer_id: str, numbers: Collection[int]
) -> list[EnvelopeRow]:
    """The rows of a peer's envelopes, locked for this transaction. Index outbox_envelope."""
    wanted = {"local_id": local_id, "peer_id": peer_id, "numbers": list(numbers)}
    return [EnvelopeRow(*row) for row in connection.execute(_ENVELOPE_ROWS, wanted)]


def fetch_row_payloads(connection: Connection, row_ids: Sequence[int]) -> list[bytes]:
    """The payloads of these rows, in their order. Primary key."""
    statement = select(O.c.payload).where(O.c.id.in_(row_ids)).order_by(O.c.id)
    return list(connection.execute(statement).scalars())


def delete_rows(connection: Connection, row_ids: Sequence[int]) -> None:
    """Takes rows out of the outbox. Primary key."""
    if row_ids:
        connection.exec_driver_sql(delete_listed("outbox", "PRIMARY", "id", [f"{row_id:d}" for row_id in row_ids]))


def delete_stocked_rows(connection: Connection, local_id: str, peer_id: str) -> None:
    """Takes back what carries stock to a peer. Prefix of index outbox_envelope."""
    connection.execute(delete(O).where(O.c.local_id == local_id, O.c.peer_id == peer_id, O.c.type == "key.stocked"))


def fetch_rows_of_tokens(connection: Connection, tokens: Collection[bytes]) -> list[tuple[int, bytes, int | None]]:
    """Row id, token and number (None while it is in no envelope) of rows with these tokens, locked. outbox_token."""
    statement = (
        select(O.c.id, O.c.token, O.c.envelope_no)
        .with_hint(O, "FORCE INDEX (outbox_token)")
        .where(O.c.token.in_(tokens))
        .with_for_update()
    )
    return [(row.id, row.token, row.envelope_no) for row in connection.execute(statement)]


def delete_expired_outbox(connection: Connection, local_id: str, before_ms: int, limit: int) -> int:
    """Gives up rows made before ``before_ms`` (now - OUTBOX_LIFETIME_MS). Index outbox_created.

    Not those that carry stock: they go with it, or it would count as on its way for ever.
    """
    statement = delete(O).where(O.c.local_id == local_id, O.c.created_ms < before_ms, O.c.type != "key.stocked")
    return connection.execute(statement.with_dialect_options(mysql_limit=limit)).rowcount


# --- inbox


_REMEMBER = insert(I).prefix_with("IGNORE")


def insert_inbox(connection: Connection, local_id: str, sender_id: str, number: int, now_ms: int) -> bool:
    """Remembers an envelope in the transaction of its effect; False where it was known. Primary key."""
    values = {"local_id": local_id, "sender_id": sender_id, "envelope_no": number, "received_ms": now_ms}
    return connection.execute(_REMEMBER, values).rowcount == 1


def is_in_inbox(connection: Connection, local_id: str, sender_id: str, number: int) -> bool:
    """Whether an envelope was handled before. Primary key."""
    statement = select(I.c.envelope_no).where(
        I.c.local_id == local_id, I.c.sender_id == sender_id, I.c.envelope_no == number
    )
    return connection.execute(statement).first() is not None


def delete_inbox(connection: Connection, local_id: str, sender_id: str, number: int) -> None:
    """Forgets an envelope that is refused after all, in the transaction that had remembered it. Primary key."""
    connection.execute(delete(I).where(I.c.local_id == local_id, I.c.sender_id == sender_id, I.c.envelope_no == number))


def delete_expired_inbox(connection: Connection, local_id: str, before_ms: int, limit: int) -> int:
    """Forgets envelopes from before ``before_ms`` (now - INBOX_LIFETIME_MS). Index inbox_received."""
    statement = delete(I).where(I.c.local_id == local_id, I.c.received_ms < before_ms)
    return connection.execute(statement.with_dialect_options(mysql_limit=limit)).rowcount


# --- peers


def add_to_counters(connection: Connection, local_id: str, peer_id: str, counts: dict[str, int]) -> None:
    """Adds to the named counters of ``PeerRow``. Primary key."""
    connection.execute(_adding(tuple(counts)), {"local_id": local_id, "peer_id": peer_id, **counts})


@lru_cache(maxsize=256)
def _adding(names: tuple[str, ...]) -> Insert:
    statement = insert(P)
    return statement.on_duplicate_key_update({name: P.c[name] + statement.inserted[name] for name in names})


_BEAT_COLUMNS = ("last_heartbeat_no", "last_heartbeat_ms", "heartbeat_interval_ms", "clock_skew_ms")
_BEATS = insert(P)
_BEATS = _BEATS.on_duplicate_key_update({column: _BEATS.inserted[column] for column in _BEAT_COLUMNS})
_BEAT_NUMBERS = select(P.c.peer_id, P.c.last_heartbeat_no).where(
    P.c.local_id == bindparam("local_id"), P.c.peer_id.in_(bindparam("peer_ids", expanding=True))
)


def fetch_last_number(connection: Connection, local_id: str) -> int:
    """Up to which number envelopes of ``local_id`` may have been numbered; locked for this transaction. Primary key."""
    statement = select(P.c.last_heartbeat_no).where(P.c.local_id == local_id, P.c.peer_id == NOBODY)
    return connection.execute(statement.with_for_update()).scalar() or 0


def upsert_last_number(connection: Connection, local_id: str, number: int) -> None:
    """Envelopes of ``local_id`` may be numbered up to ``number`` from now on. Primary key."""
    statement = insert(P).values(local_id=local_id, peer_id=NOBODY, last_heartbeat_no=number)
    connection.execute(statement.on_duplicate_key_update(last_heartbeat_no=number))


def update_last_number(connection: Connection, local_id: str, noted: int, used: int) -> None:
    """No more than ``used`` of what was ``noted`` is used; nothing where another has noted since. Primary key."""
    own = and_(P.c.local_id == local_id, P.c.peer_id == NOBODY, P.c.last_heartbeat_no == noted)
    connection.execute(update(P).where(own).values(last_heartbeat_no=used))


def fetch_heartbeat_numbers(connection: Connection, local_id: str, peer_ids: Iterable[str]) -> dict[str, int]:
    """The number of the last heartbeat that was accepted of each peer. Primary key."""
    rows = connection.execute(_BEAT_NUMBERS, {"local_id": local_id, "peer_ids": list(peer_ids)})
    return {row.peer_id: row.last_heartbeat_no for row in rows}


def upsert_heartbeats(connection: Connection, local_id: str, beats: Iterable[Beat], now_ms: int) -> None:
    """These peers live, in the order given; where the driver can, in one round trip. Primary key."""
    rows = [
        {
            "local_id": local_id,
            "peer_id": beat.peer_id,
            "last_heartbeat_no": beat.number,
            "last_heartbeat_ms": now_ms,
            "heartbeat_interval_ms": beat.interval_ms,
            "clock_skew_ms": _within_int(beat.clock_skew_ms),
        }
        for beat in beats
    ]
    connection.execute(_BEATS, rows)


def upsert_clock_skew(connection: Connection, local_id: str, peer_id: str, number: int, clock_skew_ms: int) -> None:
    """What an envelope that was refused by its date says of the peer's clock. Primary key.

    One whose number is not above the last heartbeat's is a recording, and says nothing.
    """
    skew_ms = _within_int(clock_skew_ms)
    statement = insert(P).values(local_id=local_id, peer_id=peer_id, clock_skew_ms=skew_ms)
    newer = func.if_(P.c.last_heartbeat_no < number, skew_ms, P.c.clock_skew_ms)
    connection.execute(statement.on_duplicate_key_update(clock_skew_ms=newer))


def upsert_refusal(connection: Connection, local_id: str, peer_id: str, told: str, now_ms: int) -> None:
    """What a peer said when it refused an envelope, for the operator. Primary key."""
    fresh = {"last_refusal": told[:255], "last_refusal_ms": now_ms}
    statement = insert(P).values(local_id=local_id, peer_id=peer_id, **fresh)
    connection.execute(statement.on_duplicate_key_update(fresh))


def _within_int(milliseconds: int) -> int:
    """A peer may date its envelopes as it likes; the column holds 32 bits."""
    return max(-(2**31), min(2**31 - 1, milliseconds))


def _of_peers(fields: Iterable[str]) -> Select[Any]:
    columns = [P.c[field] for field in fields]
    return select(*columns).where(P.c.local_id == bindparam("local_id"), P.c.peer_id != NOBODY)


_PEER_ROWS = _of_peers(PeerRow.__dataclass_fields__)


def fetch_peer_rows(connection: Connection, local_id: str) -> list[PeerRow]:
    """All that is known of the peers of ``local_id``. Prefix of the primary key."""
    return [PeerRow(*row) for row in connection.execute(_PEER_ROWS, {"local_id": local_id})]


def _is_envelope(local_id: str, peer_id: str, number: int) -> ColumnElement[bool]:
    return and_(O.c.local_id == local_id, O.c.peer_id == peer_id, O.c.envelope_no == number)
