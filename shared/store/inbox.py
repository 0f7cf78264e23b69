"""The inbox: which envelopes were handled, each written in the transaction of its effect. Table inbox.

An envelope that is sent again has its old number and a new date. So the inbox remembers a number for longer than any
outbox row lives, plus the age at which an envelope is refused.
"""

from __future__ import annotations

from sqlalchemy import Connection, bindparam, delete
from sqlalchemy.dialects.mysql import insert

from skipbus.shared.crypto.epochs import MAX_CLOCK_SKEW_MS
from skipbus.shared.protocol.envelopes import MAX_AGE_MS
from skipbus.shared.store.outbox import OUTBOX_LIFETIME_MS
from skipbus.shared.store.schema import INBOX as I

INBOX_LIFETIME_MS = OUTBOX_LIFETIME_MS + MAX_AGE_MS + 2 * MAX_CLOCK_SKEW_MS

_INSERT = insert(I).prefix_with("IGNORE")
_DELETE = delete(I).where(
    I.c.local_id == bindparam("local_id"),
    I.c.sender_id == bindparam("sender_id"),
    I.c.envelope_no == bindparam("number"),
)


def insert_inbox(connection: Connection, local_id: str, sender_id: str, number: int, now_ms: int) -> bool:
    """Remembers an envelope in the transaction of its effect; False where it was known. Primary key."""
    values = {"local_id": local_id, "sender_id": sender_id, "envelope_no": number, "received_ms": now_ms}
    return connection.execute(_INSERT, values).rowcount == 1


def delete_inbox(connection: Connection, local_id: str, sender_id: str, number: int) -> None:
    """Forgets an envelope that is rejected, in the transaction that had remembered it. Primary key."""
    connection.execute(_DELETE, {"local_id": local_id, "sender_id": sender_id, "number": number})


def delete_expired_inbox(connection: Connection, local_id: str, before_ms: int, limit: int) -> int:
    """Forgets envelopes from before ``before_ms`` (now - INBOX_LIFETIME_MS). Index inbox_received."""
    statement = delete(I).where(I.c.local_id == local_id, I.c.received_ms < before_ms)
    return connection.execute(statement.with_dialect_options(mysql_limit=limit)).rowcount
