"""Keys on their way to a bus peer, as the api sees them, as steps: outbox rows with sealed keys, found by their token.

That a ``key.placed`` row is gone means that the peer has stored its keys: only its acknowledgement takes the row away,
or a withdrawal, and whoever withdraws is the one who would have answered. Rows are found by ``outbox_token``, forced,
or a small table would be scanned and rows of others locked.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from skipbus.shared.crypto.sealing import SealedWrappingKey
from skipbus.shared.store.literals import hex_list, hexes, name
from skipbus.shared.store.packets import (
    OutboxRow,
    commit,
    delete_listed,
    insert_outbox_rows,
    insert_wrapping_keys,
)
from skipbus.shared.store.steps import Statement, Steps, octets

# Types of outbox rows that are no envelope types: the syncer makes key.issued envelopes of them (docs/protocol.md).
KEY_PLACED = "key.placed"
KEY_STOCKED = "key.stocked"


def commit_placing(wrapping_keys: Sequence[SealedWrappingKey], rows: Sequence[OutboxRow]) -> Steps[None]:
    """Inserts the wrapping keys that are new and the rows with sealed keys, and commits.

    Raises CommitUnknown or StoreRefused; after any of them the connection must go.
    """
    first = [insert_wrapping_keys(wrapping_keys)] if wrapping_keys else []
    return commit([*first, insert_outbox_rows(rows)])


def fetch_waiting_tokens(tokens: Collection[bytes]) -> Steps[set[bytes]]:
    """Those of the tokens whose ``key.placed`` row still waits for the peer. Index outbox_token."""
    # Its transaction locks nothing, and is over in the same round trip.
    rows = yield Statement(f"{_by_token(tokens)};COMMIT", (octets,))
    return {row[0] for row in rows}


def fetch_for_withdrawal(tokens: Collection[bytes]) -> Steps[set[bytes]]:
    """As ``fetch_waiting_tokens``; these rows are locked until the transaction ends."""
    rows = yield Statement(f"{_by_token(tokens)} FOR UPDATE", (octets,))
    return {row[0] for row in rows}


def commit_withdrawn(tokens: Collection[bytes], rows: Sequence[OutboxRow]) -> Steps[None]:
    """Deletes the rows that ``fetch_for_withdrawal`` locked, inserts ``key.withdrawn`` rows, and commits.

    Errors as ``commit_placing``. Index outbox_token.
    """
    deletion = [delete_listed("outbox", "outbox_token", "token", hexes(tokens))] if tokens else []
    insertion = [insert_outbox_rows(rows)] if rows else []
    return commit([*deletion, *insertion])


def delete_held(local_id: str, key_ids_by_source: Mapping[str, Sequence[bytes]]) -> Steps[None]:
    """Keys that were handed out are no source's waiting stock any more; committed. Primary key."""
    return commit(
        [
            delete_listed(
                "stock_held", "PRIMARY", "key_id", hexes(key_ids), local_id=name(local_id), source_id=name(source_id)
            )
            for source_id, key_ids in key_ids_by_source.items()
        ]
    )


def _by_token(tokens: Collection[bytes]) -> str:
    return (
        "SELECT token FROM outbox FORCE INDEX (outbox_token) "
        f"WHERE token IN ({hex_list(tokens)}) AND type = {name(KEY_PLACED)}"
    )
