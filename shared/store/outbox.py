"""The outbox: rows for peers, each committed in the transaction that has the effect it reports.

Rows become an envelope when they get a common number, which never changes after that. They are deleted when the peer
has acknowledged the envelope. Rows are looked up by indexes that are forced where a server would scan a small table and
wait for rows that other callers have locked. Transactions are the callers'.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sqlalchemy import Connection, bindparam, delete, func, insert, select, update

from skipbus.shared.protocol import encoding
from skipbus.shared.store.engine import driver_sql
from skipbus.shared.store.listed import delete_listed
from skipbus.shared.store.schema import OUTBOX as T

# Types of rows that are no envelope types: keys on demand and stock, sealed to a bus peer.
KEY_PLACED = "key.placed"
KEY_STOCKED = "key.stocked"
TOKEN_BYTES = 16
# A peer that is away for longer than this misses what it was to be sent; the keys have expired long since.
OUTBOX_LIFETIME_MS = 24 * 3_600_000


class OutboxRow(NamedTuple):
    """A row for a peer; ``payload`` is MessagePack, ``items`` its length, ``created_ms`` UTC.

    A ``token`` is TOKEN_BYTES random bytes, by which the writer finds the row again.
    """

    local_id: str
    peer_id: str
    type: str
    payload: bytes
    items: int
    created_ms: int
    token: bytes | None = None

    @classmethod
    def of(
        cls,
        local_id: str,
        peer_id: str,
        kind: str,
        items: Sequence[object],
        created_ms: int,
        token: bytes | None = None,
    ) -> OutboxRow:
        """A row that reports these items."""
        return cls(local_id, peer_id, kind, encoding.pack(items), len(items), created_ms, token)


@dataclass(frozen=True, slots=True)
class UnsentRow:
    """A row that is in no envelope yet."""

    id: int
    peer_id: str
    type: str
    items: int
    payload_bytes: int


@dataclass(frozen=True, slots=True)
class OutboxEnvelope:
    """The rows of one envelope together; ``sent_ms`` (UTC) is None until it was sent once."""

    peer_id: str
    number: int
    type: str
    items: int
    attempts: int
    sent_ms: int | None


@dataclass(frozen=True, slots=True)
class EnvelopeRow:
    """A row of an envelope."""

    id: int
    type: str
    items: int
    token: bytes | None


_INSERT = driver_sql(insert(T), OutboxRow._fields)
_TOKENS = (
    select(T.c.token)
    .with_hint(T, "FORCE INDEX (outbox_token)")
    .where(T.c.token.in_(bindparam("tokens", expanding=True)))
)
_CLAIM_UNSENT = (
    select(T.c.id, T.c.peer_id, T.c.type, T.c["items"], func.length(T.c.payload))
    .with_hint(T, "FORCE INDEX (outbox_unsent)")
    .where(T.c.local_id == bindparam("local_id"), T.c.envelope_no.is_(None), T.c.sent_ms.is_(None))
    .order_by(T.c.id)
    .limit(bindparam("most"))
    .with_for_update(skip_locked=True)
)
_NUMBER = (
    update(T)
    .with_hint("FORCE INDEX (PRIMARY)")
    .where(T.c.id.in_(bindparam("row_ids", expanding=True)))
    .values(envelope_no=bindparam("number"))
)
_PAYLOADS_OF_ROWS = select(T.c.payload).where(T.c.id.in_(bindparam("row_ids", expanding=True))).order_by(T.c.id)
_ENVELOPES = (
    select(
        T.c.peer_id,
        T.c.envelope_no,
        func.max(T.c.type),
        func.sum(T.c["items"]),
        func.max(T.c.attempts),
        func.max(T.c.sent_ms),
    )
    .where(T.c.local_id == bindparam("local_id"), T.c.envelope_no.is_not(None))
    .group_by(T.c.peer_id, T.c.envelope_no)
)
_OF_PEER = (T.c.local_id == bindparam("local"), T.c.peer_id == bindparam("peer"))
_PAYLOADS = select(T.c.payload).where(*_OF_PEER, T.c.envelope_no == bindparam("number")).order_by(T.c.id)
_SENT = (
    update(T)
    .where(*_OF_PEER, T.c.envelope_no.in_(bindparam("numbers", expanding=True)))
    .values(sent_ms=bindparam("at_ms"), attempts=T.c.attempts + 1)
)
_ENVELOPE_ROWS = (
    select(T.c.id, T.c.type, T.c["items"], T.c.token)
    .with_hint(T, "FORCE INDEX (outbox_envelope)")
    .where(*_OF_PEER, T.c.envelope_no.in_(bindparam("numbers", expanding=True)))
    .with_for_update()
)
_ROWS_OF_TOKENS = (
    select(T.c.id, T.c.token, T.c.envelope_no)
    .with_hint(T, "FORCE INDEX (outbox_token)")
    .where(T.c.token.in_(bindparam("tokens", expanding=True)))
    .with_for_update()
)


# --- written with an event


def insert_outbox_rows(connection: Connection, rows: Sequence[OutboxRow]) -> None:
    """Inserts rows for peers."""
    if rows:
        connection.exec_driver_sql(_INSERT, [row._asdict() for row in rows])


def fetch_tokens(connection: Connection, tokens: Collection[bytes]) -> set[bytes]:
    """Those of the tokens whose row is in the outbox: not when the peer has acknowledged it. Index outbox_token."""
    return set(connection.execute(_TOKENS, {"tokens": list(tokens)}).scalars()) if tokens else set()


# --- numbered and sent


def claim_unsent_rows(connection: Connection, local_id: str, limit: int) -> list[UnsentRow]:
    """The oldest rows that are in no envelope, locked. Index outbox_unsent.

    Rows that another transaction has locked are skipped: a writer that has not committed yet delays no other.
    """
    return [UnsentRow(*row) for row in connection.execute(_CLAIM_UNSENT, {"local_id": local_id, "most": limit})]


def update_numbered(connection: Connection, row_ids: Sequence[int], number: int) -> None:
    """Makes one envelope of rows that ``claim_unsent_rows`` has locked. Primary key."""
    connection.execute(_NUMBER, {"row_ids": row_ids, "number": number})


def fetch_row_payloads(connection: Connection, row_ids: Sequence[int]) -> list[bytes]:
    """The payloads of these rows, in their order. Primary key."""
    return list(connection.execute(_PAYLOADS_OF_ROWS, {"row_ids": row_ids}).scalars())


def fetch_envelopes(connection: Connection, local_id: str) -> list[OutboxEnvelope]:
    """All envelopes that are not acknowledged: read when a syncer takes over. Index outbox_envelope."""
    return [
        OutboxEnvelope(peer_id, number, type_, int(items), attempts, sent_ms)
        for peer_id, number, type_, items, attempts, sent_ms in connection.execute(_ENVELOPES, {"local_id": local_id})
    ]


def fetch_payloads(connection: Connection, local_id: str, peer_id: str, number: int) -> list[bytes]:
    """One envelope's payloads in row order; none once it is acknowledged. Index outbox_envelope."""
    wanted = {"local": local_id, "peer": peer_id, "number": number}
    return list(connection.execute(_PAYLOADS, wanted).scalars())


def update_sent(connection: Connection, local_id: str, peer_id: str, numbers: Collection[int], now_ms: int) -> None:
    """These envelopes were sent once more. Index outbox_envelope."""
    wanted = {"local": local_id, "peer": peer_id, "numbers": list(numbers), "at_ms": now_ms}
    connection.execute(_SENT, wanted)


# --- acknowledged, withdrawn, given up


def delete_acknowledged(connection: Connection, local_id: str, peer_id: str, numbers: Collection[int]) -> None:
    """Deletes the rows of these envelopes. Index outbox_envelope."""
    delete_listed(
        connection, T.name, "outbox_envelope", "envelope_no", list(numbers), local_id=local_id, peer_id=peer_id
    )


def fetch_envelope_rows(
    connection: Connection, local_id: str, peer_id: str, numbers: Collection[int]
) -> list[EnvelopeRow]:
    """The rows of a peer's envelopes, locked. Index outbox_envelope."""
    wanted = {"local": local_id, "peer": peer_id, "numbers": list(numbers)}
    return [EnvelopeRow(*row) for row in connection.execute(_ENVELOPE_ROWS, wanted)]


def delete_rows(connection: Connection, row_ids: Sequence[int]) -> int:
    """Deletes rows that the caller has locked; how many there were. Primary key."""
    return delete_listed(connection, T.name, "PRIMARY", "id", row_ids)


def delete_stocked_rows(connection: Connection, local_id: str, peer_id: str) -> None:
    """Takes back what carries stock to a peer. Prefix of index outbox_envelope."""
    connection.execute(delete(T).where(T.c.local_id == local_id, T.c.peer_id == peer_id, T.c.type == KEY_STOCKED))


def fetch_rows_of_tokens(connection: Connection, tokens: Collection[bytes]) -> list[tuple[int, bytes, int | None]]:
    """Row id, token and number (None while it is in no envelope) of rows with these tokens, locked. outbox_token."""
    rows = connection.execute(_ROWS_OF_TOKENS, {"tokens": list(tokens)}) if tokens else ()
    return [(row.id, row.token, row.envelope_no) for row in rows]


def fetch_waiting(connection: Connection, local_id: str, peer_id: str) -> tuple[int, int | None]:
    """How many rows wait for the peer, and when (UTC ms) the oldest was made. Prefix of index outbox_envelope."""
    statement = select(func.count(), func.min(T.c.created_ms)).where(T.c.local_id == local_id, T.c.peer_id == peer_id)
    count, oldest_ms = connection.execute(statement).one()
    return count, oldest_ms


def delete_expired_outbox(connection: Connection, local_id: str, before_ms: int, limit: int) -> int:
    """Gives up rows made before ``before_ms`` (now - OUTBOX_LIFETIME_MS). Index outbox_created.

    Not those that carry stock: they go with it, or it would count as on its way for ever.
    """
    statement = delete(T).where(T.c.local_id == local_id, T.c.created_ms < before_ms, T.c.type != KEY_STOCKED)
    return connection.execute(statement.with_dialect_options(mysql_limit=limit)).rowcount
