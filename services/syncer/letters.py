"""Puts outbox rows into envelopes: which of them share one, and what then stands in it. Blocking, for a thread.

Keys that are placed at a bus peer travel with the wrapping keys that they need, so that an envelope can be stored by
itself. A wrapping key that was read once is kept in memory, because every envelope of its epoch needs it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from skipbus.services.syncer.outgoing import Letter
from skipbus.services.syncer.payloads import Events, Payload, pack_events, read_payload
from skipbus.services.syncer.placed_keys import MAX_RECORDS, MAX_WRAPPING_KEYS, PlacedKeys, pack_placed_keys
from skipbus.services.syncer.row_types import SEALED_TYPES, envelope_type, keys_expire_ms
from skipbus.shared.crypto.sealing import SealedWrappingKey
from skipbus.shared.errors import EnvelopeRefused
from skipbus.shared.logs import get_logger
from skipbus.shared.protocol import encoding
from skipbus.shared.store.messages import OutboxEntry, OutboxEnvelope
from skipbus.shared.store.outbox import KEY_STOCKED

MAX_PAYLOAD_BYTES = 256 * 1024
# A row's keys are sealed under two wrapping keys at most, where one ends within it.
MAX_SEALED_ROWS = MAX_WRAPPING_KEYS // 2
_MAX_KNOWN = 4_096
_MALFORMED = (ValueError, TypeError, LookupError, EnvelopeRefused)

FetchWrappingKeys = Callable[[Collection[bytes]], Iterable[SealedWrappingKey]]

_log = get_logger("letters")


def gather(rows: Iterable[OutboxEntry]) -> list[list[OutboxEntry]]:
    """Rows of one peer and one type together, no more than an envelope takes unless one row has it.

    Only the first group of each peer and type is given; the rest of its rows are for the next time.
    """
    groups: dict[tuple[str, str], _Group] = {}
    for row in rows:
        key = (row.peer_id, row.type)
        groups.setdefault(key, _Group()).offer(row)
    return [group.rows for group in groups.values()]


class _Group:
    """Takes rows in their order until one does not fit, and none after that."""

    def __init__(self) -> None:
        self.rows: list[OutboxEntry] = []
        self._size = 0
        self._items = 0
        self._full = False

    def offer(self, row: OutboxEntry) -> None:
        self._size += row.payload_bytes
        self._items += row.items
        sealed = row.type in SEALED_TYPES
        too_many = sealed and (self._items > MAX_RECORDS or len(self.rows) >= MAX_SEALED_ROWS)
        self._full = self._full or bool(self.rows and (self._size > MAX_PAYLOAD_BYTES or too_many))
        if not self._full:
            self.rows.append(row)


class LetterMaker:
    """Remembers wrapping keys of the local KP; of one thread at a time."""

    def __init__(self) -> None:
        self._known: dict[bytes, SealedWrappingKey] = {}

    def make(self, fetch: FetchWrappingKeys, envelope: OutboxEnvelope, payloads: Sequence[bytes]) -> Letter | None:
        """The letter of these rows' payloads; ``fetch`` is asked for wrapping keys that are not known.

        None where they hold what no release of ours wrote: that must not keep others from being sent.
        """
        try:
            return self._letter(fetch, envelope, payloads)
        except _MALFORMED as error:
            _log.debug("malformed outbox row", reason=str(error))
        _log.error("outbox rows are malformed", peer=envelope.peer_id, number=envelope.number, type=envelope.type)
        return None

    def _letter(self, fetch: FetchWrappingKeys, envelope: OutboxEnvelope, payloads: Sequence[bytes]) -> Letter:
        kind = envelope_type(envelope.type)
        payload = self._payload(fetch, envelope.type, payloads)
        said = read_payload(kind, payload)
        expire_ms = keys_expire_ms(envelope.type, entries_of(said))
        return Letter(kind, envelope.peer_id, payload, envelope.number, expire_ms, told_of(said))

    def _payload(self, fetch: FetchWrappingKeys, row_type: str, payloads: Sequence[bytes]) -> bytes:
        if row_type not in SEALED_TYPES:
            return pack_events(payloads)
        records = [record for payload in payloads for record in encoding.unpack(payload, max_items=MAX_RECORDS)]
        needed = self._wrapping_keys(fetch, records)
        return pack_placed_keys(records, needed, stock=row_type == KEY_STOCKED)

    def _wrapping_keys(self, fetch: FetchWrappingKeys, records: Sequence[Any]) -> list[SealedWrappingKey]:
        wanted = dict.fromkeys(record[4] for record in records)
        missing = [wrapping_key_id for wrapping_key_id in wanted if wrapping_key_id not in self._known]
        if missing:
            is_full = len(self._known) + len(missing) > _MAX_KNOWN
            found = {one.wrapping_key_id: one for one in fetch(list(wanted) if is_full else missing)}
            self._known = found if is_full else self._known | found
        # One that is gone has expired, and so have the keys under it: such rows are malformed by now.
        return [self._known[wrapping_key_id] for wrapping_key_id in wanted if wrapping_key_id in self._known]


def entries_of(payload: Payload) -> Sequence[list[Any]]:
    """What an envelope says of each of its keys."""
    match payload:
        case Events():
            return payload.entries
        case PlacedKeys():
            return payload.records
        case _:
            return ()


def told_of(payload: Payload) -> tuple[int, tuple[str, ...]]:
    """How many keys an envelope is about, and the first requests that they came from."""
    match payload:
        case Events(count, correlation_ids):
            return count, correlation_ids
        case PlacedKeys():
            return len(payload.records), payload.correlation_ids
        case _:
            return 0, ()
