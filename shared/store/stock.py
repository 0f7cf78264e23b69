"""Stock: keys that this KP has placed at a peer ahead of need. This side keeps a copy of each, sealed to itself.

Clustered by peer and expiry, so that the oldest usable ones are one short stretch of the primary key. Claims pass over
rows that another process holds: any of them will do. A row counts as placed once the peer has acknowledged the outbox
row with its token (the syncer writes that).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, func, select

from skipbus.shared.crypto.sealing import KeyRecord, SealedWrappingKey
from skipbus.shared.store.literals import hexes, name
from skipbus.shared.store.packets import (
    OutboxRow,
    commit,
    delete_listed,
    insert_outbox_rows,
    insert_wrapping_keys,
)
from skipbus.shared.store.schema import STOCK as S
from skipbus.shared.store.steps import Statement, Steps, octets

_COPY = (octets, int, int, octets, octets, octets)


@dataclass(frozen=True, slots=True)
class StockLevel:
    """How many usable keys are at a peer, and how many more are on their way to it."""

    placed: int = 0
    in_flight: int = 0


def claim_stock(local_id: str, peer_id: str, usable_until_ms: int, limit: int) -> Steps[list[KeyRecord]]:
    """The placed keys that expire first of those that live until ``usable_until_ms``; locked, those of others left out.

    Own copies: source and target are ``local_id``, and they open with the peer's id as their context. Primary key.
    """
    rows = yield Statement(
        "SELECT key_id, size_bits, expires_ms, wrapping_key_id, nonce, sealed FROM stock FORCE INDEX (PRIMARY) "
        f"WHERE local_id = {name(local_id)} AND peer_id = {name(peer_id)} AND expires_ms >= {usable_until_ms:d} "
        f"AND placed_ms IS NOT NULL ORDER BY expires_ms LIMIT {limit:d} FOR UPDATE SKIP LOCKED",
        _COPY,
    )
    return [
        KeyRecord(key_id, local_id, local_id, size_bits, expires_ms, wrapping_key_id, nonce, sealed, "")
        for key_id, size_bits, expires_ms, wrapping_key_id, nonce, sealed in rows
    ]


def commit_given_out(taken: Sequence[KeyRecord], rows: Sequence[OutboxRow]) -> Steps[None]:
    """Deletes stock that ``claim_stock`` locked, inserts the events, and commits. Index stock_key_id.

    Raises CommitUnknown or StoreRefused; after any of them the connection must go.
    """
    # By the primary key the server may walk through rows of the same expiry that other processes have locked.
    deletion = delete_listed("stock", "stock_key_id", "key_id", hexes(record.key_id for record in taken))
    return commit([deletion, insert_outbox_rows(rows)])


def commit_stocked(
    copies: Sequence[KeyRecord], wrapping_keys: Sequence[SealedWrappingKey], row: OutboxRow
) -> Steps[None]:
    """Inserts own copies of new stock, wrapping keys that are new, and the row that carries it to the peer; commits.

    Errors as above.
    """
    first = [insert_wrapping_keys(wrapping_keys)] if wrapping_keys else []
    return commit([*first, _insert_copies(copies, row), insert_outbox_rows([row])])


def fetch_stock_levels(connection: Connection, local_id: str, peer_id: str, usable_until_ms: int) -> StockLevel:
    """Counts a peer's stock that lives until ``usable_until_ms``. One stretch of the primary key."""
    statement = select(func.count(), func.count(S.c.placed_ms)).where(
        S.c.local_id == local_id, S.c.peer_id == peer_id, S.c.expires_ms >= usable_until_ms
    )
    total, placed = connection.execute(statement).one()
    return StockLevel(placed, total - placed)


def _insert_copies(copies: Sequence[KeyRecord], row: OutboxRow) -> str:
    token = "NULL" if row.token is None else f"0x{row.token.hex()}"
    values = ",".join(
        f"({name(row.local_id)},{name(row.peer_id)},{r.expires_ms},0x{r.key_id.hex()},{r.size_bits},"
        f"0x{r.wrapping_key_id.hex()},0x{r.nonce.hex()},0x{r.sealed.hex()},{token})"
        for r in copies
    )
    return (
        "INSERT INTO stock (local_id, peer_id, expires_ms, key_id, size_bits, wrapping_key_id, nonce, sealed, token) "
        f"VALUES {values}"
    )
