"""Outgoing envelopes: which outbox rows share one, what its payload is, and what its rows count as.

Most rows have the name of their envelope type. Those of a bus link with another name differ in what happens when they
are acknowledged, withdrawn or rejected, not in what the peer is sent. Sealed keys travel with the wrapping keys that
they need, so that a peer can store each envelope by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from skipbus.shared.crypto.sealing import SealedWrappingKey
from skipbus.shared.errors import EnvelopeRefused
from skipbus.shared.logging import get_logger
from skipbus.shared.protocol import encoding
from skipbus.shared.protocol.envelopes import EnvelopeType
from skipbus.shared.protocol.payloads import MAX_EVENTS, Events, Payload, pack_events, read_payload
from skipbus.shared.protocol.placed_keys import MAX_KEYS, MAX_WRAPPING_KEYS, PlacedKeys, pack_placed_keys
from skipbus.shared.store.outbox import KEY_PLACED, KEY_STOCKED, OutboxEnvelope, UnsentRow

MAX_PAYLOAD_BYTES = 256 * 1024
# A row's keys are sealed under two wrapping keys at most, where one ends within it.
MAX_SEALED_ROWS = MAX_WRAPPING_KEYS // 2
# Stock that is taken back was never issued to anybody, so it does not count as withdrawn.
STOCK_DROPPED = "stock.dropped"
SEALED_TYPES = frozenset({KEY_PLACED, KEY_STOCKED})
_COUNTED_ONLY = frozenset({EnvelopeType.KEY_RETRIEVED.value, EnvelopeType.KEY_EXPIRED.value})
_MAX_KNOWN = 4_096
_MALFORMED = (ValueError, TypeError, LookupError, EnvelopeRefused)
_ENVELOPE_TYPES = {
    KEY_PLACED: EnvelopeType.KEY_ISSUED,
    KEY_STOCKED: EnvelopeType.KEY_ISSUED,
    STOCK_DROPPED: EnvelopeType.KEY_WITHDRAWN,
}
# What the local KP issued for the peer or took back, gave out of the peer's keys, or saw expire of them. Keys on
# demand count as issued when the peer has acknowledged them: until then they may be taken back.
_COUNTERS = {
    EnvelopeType.KEY_ISSUED.value: "issued",
    EnvelopeType.KEY_WITHDRAWN.value: "withdrawn",
    EnvelopeType.KEY_RETRIEVED.value: "inbound_retrieved",
    EnvelopeType.KEY_EXPIRED.value: "inbound_expired",
}
# Where an entry of such rows has the expiry (UTC ms) of its key. Once it has passed there is nothing left to store, to
# delete or to take back at the peer. That a key was retrieved or has expired is still news after that. Keys on demand
# are not here because the api takes a row that is gone for placed.
_EXPIRY_AT = {
    EnvelopeType.KEY_ISSUED.value: 2,
    EnvelopeType.KEY_WITHDRAWN.value: 1,
    KEY_STOCKED: 2,
    STOCK_DROPPED: 1,
}

FetchWrappingKeys = Callable[[Collection[bytes]], Iterable[SealedWrappingKey]]

_log = get_logger("outbox")


@dataclass(frozen=True, slots=True)
class OutgoingEnvelope:
    """An envelope before it is signed; ``number`` is None where a new one will do.

    ``keys_expire_ms`` (UTC) is when the last key expires that it is about, where it is pointless after that;
    ``items`` and ``correlation_ids`` are for the log.
    """

    type: EnvelopeType
    target: str
    payload: bytes
    number: int | None = None
    keys_expire_ms: int | None = None
    items: int = 0
    correlation_ids: tuple[str, ...] = ()


class Outcome(Enum):
    """What became of an envelope; ``HELD_UP`` and ``LOST`` may have arrived all the same.

    Only HTTPS reports a rejection at once. ``HELD_UP``: the broker answers, but not for the queue of this peer.
    """

    TAKEN = "taken"
    NO_QUEUE = "no_queue"
    HELD_UP = "held_up"
    REJECTED = "refused"
    LOST = "lost"


def envelope_type(row_type: str) -> EnvelopeType:
    """The envelope that such rows become. ValueError for a type that no release of ours writes."""
    return _ENVELOPE_TYPES.get(row_type) or EnvelopeType(row_type)


def counter_when_numbered(row_type: str) -> str | None:
    """The counter in the peer's row that such rows are added to when they are put into an envelope."""
    return _COUNTERS.get(row_type)


def keys_expire_ms(row_type: str, entries: Sequence[Sequence[Any]]) -> int | None:
    """When (UTC ms) the last of the keys expires that such rows are about; None where that makes no difference."""
    place = _EXPIRY_AT.get(row_type)
    return None if place is None or not entries else max(entry[place] for entry in entries)


def group_rows(rows: Iterable[UnsentRow]) -> list[list[UnsentRow]]:
    """Rows of one peer and one type together, no more than an envelope takes unless one row has it.

    Only the first group of each peer and type is given; the rest of its rows are for the next time.
    """
    groups: dict[tuple[str, str], _Group] = {}
    for row in rows:
        groups.setdefault((row.peer_id, row.type), _Group()).offer(row)
    return [group.rows for group in groups.values()]


class _Group:
    """Takes rows in their order until one does not fit, and none after that."""

    def __init__(self) -> None:
        self.rows: list[UnsentRow] = []
        self._size = 0
        self._items = 0
        self._full = False

    def offer(self, row: UnsentRow) -> None:
        self._size += row.payload_bytes
        self._items += row.items
        too_many = self._items > (MAX_EVENTS if row.type in _COUNTED_ONLY else MAX_KEYS)
        too_many |= row.type in SEALED_TYPES and len(self.rows) >= MAX_SEALED_ROWS
        self._full = self._full or bool(self.rows and (self._size > MAX_PAYLOAD_BYTES or too_many))
        if not self._full:
            self.rows.append(row)


class EnvelopeBuilder:
    """Makes outgoing envelopes of outbox rows. Remembers wrapping keys, because all envelopes of an epoch need them.

    Of one thread at a time.
    """

    def __init__(self) -> None:
        self._known: dict[bytes, SealedWrappingKey] = {}

    def build(
        self, fetch: FetchWrappingKeys, envelope: OutboxEnvelope, payloads: Sequence[bytes]
    ) -> OutgoingEnvelope | None:
        """The envelope of these rows' payloads; ``fetch`` is asked for wrapping keys that are not known.

        None where they hold what no release of ours wrote: that must not keep others from being sent.
        """
        try:
            return self._build(fetch, envelope, payloads)
        except _MALFORMED as error:
            _log.debug("malformed outbox row", reason=str(error))
        _log.error("outbox rows are malformed", peer=envelope.peer_id, number=envelope.number, type=envelope.type)
        return None

    def _build(self, fetch: FetchWrappingKeys, envelope: OutboxEnvelope, payloads: Sequence[bytes]) -> OutgoingEnvelope:
        kind = envelope_type(envelope.type)
        payload = self._payload(fetch, envelope.type, payloads)
        content = read_payload(kind, payload)
        expire_ms = keys_expire_ms(envelope.type, _entries_of(content))
        requests = content.correlation_ids if isinstance(content, Events | PlacedKeys) else ()
        return OutgoingEnvelope(kind, envelope.peer_id, payload, envelope.number, expire_ms, envelope.items, requests)

    def _payload(self, fetch: FetchWrappingKeys, row_type: str, payloads: Sequence[bytes]) -> bytes:
        if row_type not in SEALED_TYPES:
            return pack_events(payloads)
        records = [record for payload in payloads for record in encoding.unpack(payload, max_items=MAX_KEYS)]
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


def _entries_of(payload: Payload) -> Sequence[list[Any]]:
    """What an envelope says of each of its keys."""
    match payload:
        case Events():
            return payload.entries
        case PlacedKeys():
            return payload.records
        case _:
            return ()
