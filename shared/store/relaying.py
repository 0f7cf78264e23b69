"""What the syncer does while an encryptor waits, as steps: at most one packet that reads, and one that commits.

A key on demand passes one transaction here: its outbox row is numbered. Statements are put together from integers and
hexadecimal literals only (``packets``). Rows of the outbox are found by indexes that are forced, or a small table would
be scanned and rows of others locked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from skipbus.shared.hints import Hint
from skipbus.shared.store.literals import name
from skipbus.shared.store.messages import SHORT_PAYLOAD_BYTES, OutboxEntry
from skipbus.shared.store.packets import commit, commit_and_read
from skipbus.shared.store.placing import KEY_PLACED
from skipbus.shared.store.steps import Statement, Steps, octets, text

_ENTRY = (int, text, text, int, int, octets, octets)


@dataclass(frozen=True, slots=True)
class Numbered:
    """Rows of one peer that become an envelope, and what they add to its counters (``PeerRow``)."""

    peer_id: str
    number: int
    row_ids: Sequence[int]
    counts: Mapping[str, int]


def claim_unnumbered(local_id: str, limit: int) -> Steps[list[OutboxEntry]]:
    """The oldest rows that are in no envelope, locked until the transaction ends. Index outbox_unsent.

    Rows that another transaction holds are passed over: a writer who has yet to commit keeps nobody waiting.
    """
    # A payload that is short spares a round trip for what somebody waits for; at most 4 MB for 500 rows.
    rows = yield Statement(
        "SELECT id, peer_id, type, items, LENGTH(payload), "
        f"IF(LENGTH(payload) <= {SHORT_PAYLOAD_BYTES}, payload, ''), IFNULL(token, '') "
        "FROM outbox FORCE INDEX (outbox_unsent) "
        f"WHERE local_id = {name(local_id)} AND envelope_no IS NULL AND sent_ms IS NULL "
        f"ORDER BY id LIMIT {limit:d} FOR UPDATE SKIP LOCKED",
        _ENTRY,
    )
    return [
        OutboxEntry(row_id, peer_id, type_, items, size, payload or None, token or None)
        for row_id, peer_id, type_, items, size, payload, token in rows
    ]


def fetch_claimed_payloads(row_ids: Sequence[int]) -> Steps[list[bytes]]:
    """The payloads of these rows, in their order. Primary key."""
    wanted = ",".join(f"{row_id:d}" for row_id in row_ids)
    rows = yield Statement(f"SELECT payload FROM outbox WHERE id IN ({wanted}) ORDER BY id", (octets,))
    return [row[0] for row in rows]


def commit_numbered(
    local_id: str, envelopes: Sequence[Numbered], meanwhile: Callable[[], None] | None = None
) -> Steps[None]:
    """Makes envelopes of rows that ``claim_unnumbered`` locked, counts them, and commits. Primary keys.

    Raises CommitUnknown or StoreRefused; after any of them the connection must go.
    """
    statements: list[str] = []
    for envelope in envelopes:
        wanted = ",".join(f"{row_id:d}" for row_id in envelope.row_ids)
        statements.append(f"UPDATE outbox SET envelope_no = {envelope.number:d} WHERE id IN ({wanted})")
        statements += _add_to_counters(local_id, envelope.peer_id, envelope.counts)
    return commit(statements, meanwhile)


def commit_told(
    local_id: str, hint: Hint, number: int, meanwhile: Callable[[], None] | None = None
) -> Steps[int | None]:
    """Makes an envelope of the row that a hint tells of, and commits; the row's id, None where there is no such row.

    A row that is yet to be committed is waited for, one that is yet to be inserted is not. Index outbox_token.
    Errors as ``commit_numbered``.
    """
    token = f"0x{hint.token.hex()}"
    update = (
        f"UPDATE outbox FORCE INDEX (outbox_token) SET envelope_no = {number:d} WHERE token = {token} "
        f"AND local_id = {name(local_id)} AND peer_id = {name(hint.peer_id)} AND type = {name(KEY_PLACED)} "
        f"AND items = 1 AND payload = 0x{hint.payload.hex()} AND envelope_no IS NULL AND sent_ms IS NULL"
    )
    found = f"SELECT id FROM outbox FORCE INDEX (outbox_token) WHERE token = {token} AND envelope_no = {number:d}"
    rows = yield from commit_and_read([update, found], (int,), meanwhile)
    return rows[0][0] if rows else None


def _add_to_counters(local_id: str, peer_id: str, counts: Mapping[str, int]) -> list[str]:
    """A statement that adds to the named counters; none where there is nothing to add. Primary key."""
    added = {column: count for column, count in counts.items() if count}
    if not added:
        return []
    values = ",".join(f"{count:d}" for count in added.values())
    sums = ",".join(f"{column} = {column} + {count:d}" for column, count in added.items())
    statement = (
        f"INSERT INTO peers (local_id, peer_id, {','.join(added)}) VALUES ({name(local_id)},{name(peer_id)},{values}) "
        f"ON DUPLICATE KEY UPDATE {sums}"
    )
    return [statement]
