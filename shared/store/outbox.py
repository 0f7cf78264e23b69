"""The outbox: rows for peers, each committed in the transaction that has the effect it reports."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from sqlalchemy import Connection, bindparam, insert, literal, select

from skipbus.shared.store.schema import OUTBOX as T

_INSERT = insert(T)
_TOKEN = select(literal(1)).select_from(T).where(T.c.token == bindparam("token"))


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
