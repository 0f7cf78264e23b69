"""Keys on their way to a bus peer, as the api sees them: outbox rows with sealed keys, found again by their token.

That a ``key.placed`` row is gone means that the peer has stored its keys: only its acknowledgement takes the row away,
or a withdrawal, and whoever withdraws is the one who would have answered. Rows are found by ``outbox_token``, forced,
or a small table would be scanned and rows of others locked.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from pymysql.connections import Connection

from shared.database import commit_errors
from shared.sealing import SealedWrappingKey
from shared.store.packets import (
    OutboxRow,
    fetch,
    fetch_and_end,
    hex_list,
    insert_outbox_rows,
    insert_wrapping_keys,
    run_all,
    text,
)

# Types of outbox rows that are no envelope types: the syncer makes key.issued envelopes of them (docs/wire.md).
KEY_PLACED = "key.placed"
KEY_STOCKED = "key.stocked"


def commit_placing(
    connection: Connection, wrapping_keys: Sequence[SealedWrappingKey], rows: Sequence[OutboxRow]
) -> None:
    """Inserts the wrapping keys that are new and the rows with sealed keys, and commits.

    Raises CommitUnknown, StoreUnavailable or StoreRefused; after any of them the connection must go.
    """
    statements = [insert_wrapping_keys(wrapping_keys)] if wrapping_keys else []
    with commit_errors():
        run_all(connection, [*statements, insert_outbox_rows(rows), "COMMIT"])


def fetch_waiting_tokens(connection: Connection, tokens: Collection[bytes]) -> set[bytes]:
    """Those of the tokens whose ``key.placed`` row still waits for the peer. Index outbox_token."""
    return {row[0] for row in fetch_and_end(connection, _by_token(tokens))}


def fetch_for_withdrawal(connection: Connection, tokens: Collection[bytes]) -> set[bytes]:
    """As ``fetch_waiting_tokens``; these rows are locked until the transaction ends."""
    return {row[0] for row in fetch(connection, f"{_by_token(tokens)} FOR UPDATE")}


def commit_withdrawn(connection: Connection, tokens: Collection[bytes], rows: Sequence[OutboxRow]) -> None:
    """Deletes the rows that ``fetch_for_withdrawal`` locked, inserts ``key.withdrawn`` rows, and commits.

    Errors as ``commit_placing``. Index outbox_token.
    """
    statements = []
    if tokens:
        statements.append(f"DELETE o FROM outbox AS o FORCE INDEX (outbox_token) WHERE o.token IN ({hex_list(tokens)})")
    if rows:
        statements.append(insert_outbox_rows(rows))
    with commit_errors():
        run_all(connection, [*statements, "COMMIT"])


def delete_held(connection: Connection, local_id: str, key_ids_by_source: dict[str, list[bytes]]) -> None:
    """Keys that were handed out are no source's waiting stock any more; committed. Primary key."""
    statements = [
        f"DELETE h FROM stock_held AS h FORCE INDEX (PRIMARY) WHERE h.local_id = {text(local_id)} "
        f"AND h.source_id = {text(source_id)} AND h.key_id IN ({hex_list(key_ids)})"
        for source_id, key_ids in key_ids_by_source.items()
    ]
    with commit_errors():
        run_all(connection, [*statements, "COMMIT"])


def _by_token(tokens: Collection[bytes]) -> str:
    return (
        "SELECT token FROM outbox FORCE INDEX (outbox_token) "
        f"WHERE token IN ({hex_list(tokens)}) AND type = {text(KEY_PLACED)}"
    )
