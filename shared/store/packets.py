"""Statements that are put together here and not by the driver: literals, and a whole transaction in one packet.

For connections that allow several statements and are used for nothing else (``skipbus.shared.store.steps``), and for
statements on many keys. What makes it safe: every value goes in as an integer or as a hexadecimal literal, so no text
of anybody's ever stands in a statement. Knows how rows of the tables are written that more than one of these modules
writes to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from skipbus.shared.crypto.sealing import KeyRecord, SealedWrappingKey
from skipbus.shared.errors import CommitUnknown, StoreUnavailable
from skipbus.shared.store.literals import name, text
from skipbus.shared.store.results import Reader, Rows
from skipbus.shared.store.steps import Bound, Command, Statement, Steps

_INSERT_RECORDS = (
    "INSERT INTO key_records (target_id, expires_ms, key_id, source_id, size_bits, wrapping_key_id, nonce, sealed, "
    "correlation_id) VALUES"
)
_INSERT_OUTBOX = "INSERT INTO outbox (local_id, peer_id, type, payload, items, token, created_ms) VALUES"
# -1 after an error, 0 where nothing was to be done. No column may be NULL, and the session is strict about it.
_IF_INSERTED = "IF(ROW_COUNT() > 0,%s,NULL)"
# For one key alone, to be prepared.
INSERT_EVENT = f"{_INSERT_OUTBOX} (?,?,?,?,?,NULL,?)"
INSERT_RECORD_AFTER = f"{_INSERT_RECORDS} ({_IF_INSERTED % '?'},?,?,?,?,?,?,?,?)"


class OutboxRow(NamedTuple):
    """A row for a peer; ``payload`` is MessagePack, ``items`` its length. A ``token`` is 16 random bytes."""

    local_id: str
    peer_id: str
    type: str
    payload: bytes
    items: int
    created_ms: int
    token: bytes | None = None


def commit(statements: Sequence[str], meanwhile: Callable[[], None] | None = None) -> Steps[None]:
    """Runs the statements and commits, in one round trip; ``meanwhile`` as in ``Statement``.

    Raises CommitUnknown or StoreRefused; after any of them the connection must go.
    """
    yield from _committed(Statement(";".join((*statements, "COMMIT")), meanwhile=meanwhile))


def commit_and_read(
    statements: Sequence[str], columns: tuple[Reader, ...], meanwhile: Callable[[], None] | None = None
) -> Steps[Rows]:
    """``commit`` where one of the statements gives rows."""
    return _committed(Statement(";".join((*statements, "COMMIT")), columns, meanwhile))


def commit_in_two(first: Command, make_rest: Callable[[], Sequence[Command]]) -> Steps[None]:
    """``commit`` of what is made, with its COMMIT, while the server works on the first command."""
    yield from _committed(Statement(first, meanwhile=make_rest))


def _committed(committing: Statement) -> Steps[Rows]:
    try:
        return (yield committing)
    except StoreUnavailable as error:
        # A connection that breaks here leaves unknown whether it was committed.
        raise CommitUnknown("the connection to the store broke during a commit") from error


def insert_records(records: Sequence[KeyRecord], *, after_insertion: bool = False) -> str:
    """A statement: sealed keys. Fails as a whole where a keyId exists: nothing is ever overwritten.

    With ``after_insertion`` it fails as well where the connection's statement before it has not inserted anything.
    """
    values = ",".join(
        f"({name(r.target_id)},{r.expires_ms},0x{r.key_id.hex()},{name(r.source_id)},{r.size_bits},"
        f"0x{r.wrapping_key_id.hex()},0x{r.nonce.hex()},0x{r.sealed.hex()},{text(r.correlation_id)})"
        for r in records
    )
    if after_insertion:
        target = name(records[0].target_id)
        values = f"({_IF_INSERTED % target}{values.removeprefix(f'({target}')}"
    return f"{_INSERT_RECORDS} {values}"


def insert_record_after_insertion(r: KeyRecord) -> Bound:
    """``insert_records`` for one, ``after_insertion``."""
    sealed = (r.wrapping_key_id, r.nonce, r.sealed, r.correlation_id)
    return Bound(INSERT_RECORD_AFTER, (r.target_id, r.expires_ms, r.key_id, r.source_id, r.size_bits, *sealed))


def insert_event(row: OutboxRow) -> Bound:
    """``insert_outbox_rows`` for one, without a token."""
    return Bound(INSERT_EVENT, (row.local_id, row.peer_id, row.type, row.payload, row.items, row.created_ms))


def insert_outbox_rows(rows: Sequence[OutboxRow], token: bytes | None = None) -> str:
    """A statement: events for peers, committed with what they tell of. The first row gets the ``token``, if any."""
    values: list[str] = []
    for local_id, peer_id, event, payload, items, created_ms, own in rows:
        given, token = token or own, None
        values.append(
            f"({name(local_id)},{name(peer_id)},{name(event)},0x{payload.hex()},{items},"
            f"{f'0x{given.hex()}' if given else 'NULL'},{created_ms})"
        )
    return f"{_INSERT_OUTBOX} {','.join(values)}"


def insert_wrapping_keys(wrapping_keys: Sequence[SealedWrappingKey]) -> str:
    """A statement: sealed wrapping keys. One that an interrupted commit has stored already is the same one."""
    values = ",".join(
        f"(0x{w.wrapping_key_id.hex()},{name(w.source_id)},{name(w.target_id)},0x{w.epoch_id.hex()},"
        f"0x{w.sealed.hex()},0x{w.signature.hex()},{w.expires_ms})"
        for w in wrapping_keys
    )
    return (
        "INSERT INTO wrapping_keys (wrapping_key_id, source_id, target_id, epoch_id, sealed, signature, "
        f"expires_ms) VALUES {values} ON DUPLICATE KEY UPDATE expires_ms = wrapping_keys.expires_ms"
    )


def delete_listed(table: str, index: str, column: str, literals: Sequence[str], **others: str) -> str:
    """A statement: deletes the rows of which ``column`` is one of the literals, and each other column its literal.

    ``index`` begins with the other columns, or holds each value of ``column`` once.
    """
    where = "".join(f" AND {other} = {literal}" for other, literal in others.items())
    if len(literals) == 1:
        return f"DELETE FROM {table} WHERE {column} = {literals[0]}{where}"
    # Not "column IN (...)": MariaDB scans a small table for that, whatever index it is told to use, and then waits
    # for the locks of other callers. From the list to the table there is one way only.
    wanted = " UNION ALL ".join(f"SELECT {literal} AS wanted" for literal in literals)
    return (
        f"DELETE t FROM ({wanted}) AS w STRAIGHT_JOIN {table} AS t FORCE INDEX ({index}) "
        f"ON t.{column} = w.wanted{where}"
    )
