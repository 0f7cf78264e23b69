"""Sealed wrapping keys as the syncer reads them, to send them with the keys that need them."""

from __future__ import annotations

from collections.abc import Collection

from sqlalchemy import Connection, select

from skipbus.shared.crypto.sealing import SealedWrappingKey
from skipbus.shared.store.schema import WRAPPING_KEYS as W


def fetch_sealed_wrapping_keys(connection: Connection, wrapping_key_ids: Collection[bytes]) -> list[SealedWrappingKey]:
    """These wrapping keys, still sealed. Primary key."""
    statement = select(
        W.c.wrapping_key_id, W.c.source_id, W.c.target_id, W.c.epoch_id, W.c.expires_ms, W.c.sealed, W.c.signature
    ).where(W.c.wrapping_key_id.in_(wrapping_key_ids))
    return [SealedWrappingKey(*row) for row in connection.execute(statement)]
