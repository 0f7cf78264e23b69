"""Claims of stock as steps, for the lanes of the api. Goes with them (``shared.store.stock``)."""

from __future__ import annotations

from collections.abc import Sequence

from skipbus.shared.crypto.sealing import KeyRecord, SealedWrappingKey
from skipbus.shared.store.literals import hexes, name
from skipbus.shared.store.packets import (
    OutboxRow,
    commit,
    delete_listed,
    insert_outbox_rows,
    insert_wrapping_keys,
)
from skipbus.shared.store.steps import Statement, Steps, octets

_COPY = (octets, int, int, octets, octets, octets)


def claim_stock_steps(local_id: str, peer_id: str, usable_until_ms: int, limit: int) -> Steps[list[KeyRecord]]:
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
    """Deletes stock that ``claim_stock_steps`` locked, inserts the events, and commits. Index stock_key_id.

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
