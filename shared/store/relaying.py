"""What the syncer does while an encryptor waits, as steps: at most one packet that reads, and one that commits.

A key on demand passes three transactions here: its outbox row is numbered, its record is stored at the target, its
acknowledgement takes the row away. Statements are put together from integers and hexadecimal literals only
(``packets``): nothing that a peer sent ever stands in one as text. Rows of the outbox are found by indexes that are
forced, or a small table would be scanned and rows of others locked.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from skipbus.shared.crypto.sealing import KeyRecord
from skipbus.shared.hints import Hint
from skipbus.shared.store.literals import hex_list, name
from skipbus.shared.store.messages import SHORT_PAYLOAD_BYTES, EnvelopeRow, OutboxEntry
from skipbus.shared.store.packets import commit, commit_and_read, delete_listed, insert_records
from skipbus.shared.store.placing import KEY_PLACED
from skipbus.shared.store.steps import Statement, Steps, octets, text

_ENTRY = (int, text, text, int, int, octets, octets)
_ENVELOPE_ROW = (int, text, int, octets)


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


def commit_received(
    local_id: str,
    source_id: str,
    number: int,
    records: Sequence[KeyRecord],
    at_ms: int,
    *,
    meanwhile: Callable[[], None] | None = None,
) -> Steps[None]:
    """Remembers an envelope, stores its keys, counts them as issued by the source, and commits; all or nothing.

    Raises StoreRefused where the envelope or a keyId exists, or the source has taken one of the keys back; errors as
    ``commit_numbered`` otherwise. Primary keys.
    """
    # A value that is two rows is an error (1242): the shortest way to make one packet fail for what it finds.
    ids = hex_list(record.key_id for record in records)
    received_ms = (
        f"(SELECT {at_ms:d} UNION ALL SELECT 0 FROM withdrawn_keys FORCE INDEX (PRIMARY) "
        f"WHERE local_id = {name(local_id)} AND source_id = {name(source_id)} AND key_id IN ({ids}))"
    )
    remembered = (
        "INSERT INTO inbox (local_id, sender_id, envelope_no, received_ms) "
        f"VALUES ({name(local_id)},{name(source_id)},{number:d},{received_ms})"
    )
    counted = _add_to_counters(local_id, source_id, {"inbound_issued": len(records)})
    return commit([remembered, insert_records(records), *counted], meanwhile)


def lock_envelope_rows(local_id: str, peer_id: str, numbers: Collection[int]) -> Steps[list[EnvelopeRow]]:
    """The rows of a peer's envelopes, locked until the transaction ends. Index outbox_envelope."""
    wanted = ",".join(f"{number:d}" for number in numbers)
    rows = yield Statement(
        "SELECT id, type, items, IFNULL(token, '') FROM outbox FORCE INDEX (outbox_envelope) "
        f"WHERE local_id = {name(local_id)} AND peer_id = {name(peer_id)} AND envelope_no IN ({wanted}) FOR UPDATE",
        _ENVELOPE_ROW,
    )
    return [EnvelopeRow(row_id, type_, items, token or None) for row_id, type_, items, token in rows]


def commit_acknowledged(
    local_id: str,
    peer_id: str,
    row_ids: Sequence[int],
    counts: Mapping[str, int],
    *,
    unlocked_of: int | None = None,
) -> Steps[None]:
    """Takes rows that ``lock_envelope_rows`` locked out of the outbox, counts, and commits. Primary keys.

    Rows that are not locked, but known to be those of the envelope ``unlocked_of``, somebody may have taken away: then
    nothing is counted and nothing committed, and StoreRefused raised. Errors as ``commit_numbered`` otherwise.
    """
    ids = [f"{row_id:d}" for row_id in row_ids]
    whose, if_changed = dict[str, str](), None
    if unlocked_of is not None:
        whose = {"local_id": name(local_id), "peer_id": name(peer_id), "envelope_no": f"{unlocked_of:d}"}
        if_changed = len(ids)
    deletion = [delete_listed("outbox", "PRIMARY", "id", ids, **whose)] if ids else []
    return commit([*deletion, *_add_to_counters(local_id, peer_id, counts, if_changed=if_changed)])


def _add_to_counters(
    local_id: str, peer_id: str, counts: Mapping[str, int], *, if_changed: int | None = None
) -> list[str]:
    """A statement that adds to the named counters; none where there is nothing to add. Primary key.

    It fails unless the one before it has changed ``if_changed`` rows.
    """
    added = {column: count for column, count in counts.items() if count}
    if not added:
        return []
    values = ",".join(f"{count:d}" for count in added.values())
    sums = ",".join(f"{column} = {column} + {count:d}" for column, count in added.items())
    # No column may be NULL, and the session is strict about it.
    owner = name(local_id) if if_changed is None else f"IF(ROW_COUNT() = {if_changed:d},{name(local_id)},NULL)"
    statement = (
        f"INSERT INTO peers (local_id, peer_id, {','.join(added)}) VALUES ({owner},{name(peer_id)},{values}) "
        f"ON DUPLICATE KEY UPDATE {sums}"
    )
    return [statement]
