"""The outbox: what a KP has to tell its peers.

A row is written in the transaction of the event that it tells of. Rows become an envelope when they share a number,
which never changes after that; they go when the peer has acknowledged it. Transactions are the callers'.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from sqlalchemy import ColumnElement, Connection, and_, bindparam, delete, func, select, update

from skipbus.shared.store.literals import name
from skipbus.shared.store.packets import delete_listed
from skipbus.shared.store.schema import OUTBOX as O

# A peer that is away for longer than this misses what was to be told; its keys have expired long since.
OUTBOX_LIFETIME_MS = 24 * 3_600_000


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


def _is_envelope(local_id: str, peer_id: str, number: int) -> ColumnElement[bool]:
    return and_(O.c.local_id == local_id, O.c.peer_id == peer_id, O.c.envelope_no == number)
