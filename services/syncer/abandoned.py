"""Withdraws keys on demand whose api has died before it could answer or take them back. Blocking, for a thread.

As long as their row stands in the outbox nobody can have been answered with them. Whoever takes the row away decides:
the peer's acknowledgement that they are placed, an api or this that they are withdrawn.
"""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Engine

from skipbus.shared.clock import now_ms
from skipbus.shared.protocol import encoding
from skipbus.shared.protocol.envelopes import EnvelopeType
from skipbus.shared.store import messages
from skipbus.shared.store.engine import driver_errors
from skipbus.shared.store.outbox import KEY_PLACED


def withdraw_abandoned(engine: Engine, local_id: str, peer_id: str, numbers: Sequence[int]) -> int:
    """Takes back the keys of these envelopes; how many there were. Raises StoreUnavailable, StoreRefused."""
    with driver_errors(), engine.begin() as connection:
        rows = messages.fetch_envelope_rows(connection, local_id, peer_id, numbers)
        ids = [row.id for row in rows if row.type == KEY_PLACED]
        if not ids:
            return 0
        keys = [key for payload in messages.fetch_row_payloads(connection, ids) for key in _keys(payload)]
        messages.delete_rows(connection, ids)
        if keys:
            kind = EnvelopeType.KEY_WITHDRAWN.value
            messages.insert_outbox(connection, local_id, peer_id, kind, encoding.pack(keys), len(keys), now_ms())
        return len(keys)


def _keys(payload: bytes) -> list[list[object]]:
    """What a withdrawal says of the keys of a row: keyId, expiry, correlation id."""
    try:
        return [[record[0], record[2], record[3]] for record in encoding.unpack(payload)]
    except (ValueError, TypeError, IndexError):
        return []  # no release of ours wrote it, and the relay has told of it
