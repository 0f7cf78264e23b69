"""The outbox: rows for peers, each committed in the transaction that has the effect it reports."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

from sqlalchemy import Connection, bindparam, insert, literal, select

from skipbus.shared.store.listed import delete_listed
from skipbus.shared.store.schema import OUTBOX as T

# Types of rows that are no envelope types: keys on demand and stock, sealed to a bus peer.
KEY_PLACED = "key.placed"
KEY_STOCKED = "key.stocked"

_INSERT = insert(T)
_TOKEN = select(literal(1)).select_from(T).where(T.c.token == bindparam("token"))
_TOKENS = (
    select(T.c.token)
    .with_hint(T, "FORCE INDEX (outbox_token)")
    .where(T.c.token.in_(bindparam("tokens", expanding=True)))
)
_ROWS_OF_TOKENS = (
    select(T.c.id, T.c.token, T.c.envelope_no)
    .with_hint(T, "FORCE INDEX (outbox_token)")
    .where(T.c.token.in_(bindparam("tokens", expanding=True)))
    .with_for_update()
)


class OutboxRow(NamedTuple):
    """A row for a peer; ``payload`` is MessagePack, ``items`` its length, ``created_ms`` UTC.

    A ``token`` is 16 random bytes, by which the writer finds the row again.
    """

    local_id: str
    peer_id: str
    type: str
    payload: bytes
    items: int
    created_ms: int
    token: bytes | None = None


def insert_outbox_rows(connection: Connection, rows: Sequence[OutboxRow]) -> None:
    """Inserts rows for peers."""
    if rows:
        connection.execute(_INSERT, [row._asdict() for row in rows])


def fetch_token_exists(connection: Connection, token: bytes) -> bool:
    """Whether the row with this token is in the outbox: not when the peer has acknowledged it. Index outbox_token."""
    return connection.execute(_TOKEN, {"token": token}).first() is not None


def fetch_tokens(connection: Connection, tokens: Collection[bytes]) -> set[bytes]:
    """Those of the tokens whose row is in the outbox: not when the peer has acknowledged it. Index outbox_token."""
    return set(connection.execute(_TOKENS, {"tokens": list(tokens)}).scalars()) if tokens else set()


def fetch_rows_of_tokens(connection: Connection, tokens: Collection[bytes]) -> list[tuple[int, bytes, int | None]]:
    """Row id, token and number (None while it is in no envelope) of rows with these tokens, locked. outbox_token."""
    rows = connection.execute(_ROWS_OF_TOKENS, {"tokens": list(tokens)}) if tokens else ()
    return [(row.id, row.token, row.envelope_no) for row in rows]


def delete_rows(connection: Connection, row_ids: Sequence[int]) -> int:
    """Deletes rows that the caller has locked; how many there were. Primary key."""
    return delete_listed(connection, T.name, "PRIMARY", "id", row_ids)
