"""The syncer's side of stock: what the peer has acknowledged is placed, and what is too old to be useful is dropped.

By primary key, and by ``stock_token`` and ``stock_key_id``, forced, or a small table would be scanned. Making and
claiming stock is the api's (``skipbus.shared.store.stock``).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, delete, select, update

from skipbus.shared.store.literals import hexes, name
from skipbus.shared.store.packets import delete_listed
from skipbus.shared.store.schema import STOCK as S


@dataclass(frozen=True, slots=True)
class StockRow:
    """An own copy of a key in stock; ``placed`` once the peer has acknowledged it."""

    key_id: bytes
    expires_ms: int
    token: bytes
    placed: bool


def update_stock_placed(connection: Connection, tokens: Collection[bytes], now_ms: int) -> int:
    """The peer has stored what went under these tokens. Returns how many keys. Index stock_token."""
    return connection.execute(
        update(S).where(S.c.token.in_(tokens), S.c.placed_ms.is_(None)).values(placed_ms=now_ms)
    ).rowcount


def fetch_old_stock(connection: Connection, local_id: str, peer_id: str, before_ms: int, limit: int) -> list[StockRow]:
    """The oldest that expires before ``before_ms``, locked; what is being given out is passed over. Primary key."""
    statement = (
        select(S.c.key_id, S.c.expires_ms, S.c.token, S.c.placed_ms)
        .where(S.c.local_id == local_id, S.c.peer_id == peer_id, S.c.expires_ms < before_ms)
        .order_by(S.c.expires_ms, S.c.key_id)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    return [StockRow(r.key_id, r.expires_ms, r.token, r.placed_ms is not None) for r in connection.execute(statement)]


def fetch_stock_of_tokens(connection: Connection, local_id: str, tokens: Collection[bytes]) -> list[StockRow]:
    """What went under these tokens and is not placed, locked. Index stock_token."""
    statement = (
        select(S.c.key_id, S.c.expires_ms, S.c.token, S.c.placed_ms)
        .with_hint(S, "FORCE INDEX (stock_token)")
        .where(S.c.token.in_(tokens), S.c.local_id == local_id, S.c.placed_ms.is_(None))
        .with_for_update()
    )
    return [StockRow(r.key_id, r.expires_ms, r.token, False) for r in connection.execute(statement)]


def delete_stock_of(connection: Connection, local_id: str, peer_id: str) -> int:
    """Drops all own copies for a peer. Returns how many. Prefix of the primary key."""
    return connection.execute(delete(S).where(S.c.local_id == local_id, S.c.peer_id == peer_id)).rowcount


def delete_stock(connection: Connection, local_id: str, peer_id: str, rows: Sequence[StockRow]) -> None:
    """Drops these own copies. Index stock_key_id."""
    if rows:
        deletion = delete_listed(
            "stock",
            "stock_key_id",
            "key_id",
            hexes(row.key_id for row in rows),
            local_id=name(local_id),
            peer_id=name(peer_id),
        )
        connection.exec_driver_sql(deletion)
