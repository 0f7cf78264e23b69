"""The outbox in the store, as the elected syncer sees it: rows become envelopes. Blocking: for threads.

An envelope gets its number in a committed transaction before it is sent, and keeps it. A crash between commit and
sending leaves a numbered envelope that was never sent; the next elected syncer sends it. The counters of what this KP
did are added to in the transaction that numbers, so an event counts once however often it is sent. Sealed keys travel
with the wrapping keys that they need, so that a peer can store each envelope by itself. Rows are deleted when the peer
has acknowledged them (``apply``), or when they are withdrawn or expired.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple, cast

from sqlalchemy import Connection, Engine

from skipbus.services.syncer.leader import SequenceNumbers
from skipbus.services.syncer.peer_queue import Unacknowledged
from skipbus.services.syncer.transport import OutgoingEnvelope
from skipbus.shared.clock import now_ms
from skipbus.shared.crypto.sealing import SealedWrappingKey
from skipbus.shared.errors import EnvelopeRefused
from skipbus.shared.logging import get_logger
from skipbus.shared.protocol import encoding
from skipbus.shared.protocol.envelopes import EnvelopeType
from skipbus.shared.protocol.payloads import MAX_EVENTS, Events, pack_events, read_payload
from skipbus.shared.protocol.placed_keys import MAX_KEYS, MAX_WRAPPING_KEYS, PlacedKeys, pack_placed_keys
from skipbus.shared.settings import Settings
from skipbus.shared.store import outbox
from skipbus.shared.store.engine import driver_errors
from skipbus.shared.store.outbox import KEY_PLACED, KEY_STOCKED, OutboxEnvelope, OutboxRow, UnsentRow
from skipbus.shared.store.peers import add_to_counters
from skipbus.shared.store.wrapping_keys import fetch_sealed_wrapping_keys

MAX_ROWS = 500
# After this many timeouts the api that placed keys on demand has withdrawn them, or is dead.
ABANDONED_AFTER_TIMEOUTS = 3
MAX_PAYLOAD_BYTES = 256 * 1024
# A row's keys are sealed under two wrapping keys at most, where one ends within it.
MAX_SEALED_ROWS = MAX_WRAPPING_KEYS // 2
# Stock that is taken back was never issued, so it does not count as withdrawn.
STOCK_DROPPED = "stock.dropped"
SEALED_TYPES = frozenset({KEY_PLACED, KEY_STOCKED})
_COUNTED_ONLY = frozenset({EnvelopeType.KEY_RETRIEVED.value, EnvelopeType.KEY_EXPIRED.value})
_MAX_KNOWN = 4_096
_MALFORMED = (ValueError, TypeError, LookupError, EnvelopeRefused)

FetchWrappingKeys = Callable[[Collection[bytes]], Iterable[SealedWrappingKey]]

_log = get_logger("outbox")


class RowType(NamedTuple):
    """What rows of one type become, and what they count as.

    ``counter`` in the peer's row is added to when they are put into an envelope: what the local KP issued for the peer
    or took back, gave out of the peer's keys, or saw expire of them. ``expiry_at`` is where an entry has the expiry
    (UTC ms) of its key, after which there is nothing left to store, to delete or to take back at the peer.
    """

    envelope: EnvelopeType
    counter: str | None = None
    expiry_at: int | None = None

    def keys_expire_ms(self, entries: Sequence[Sequence[Any]]) -> int | None:
        """When (UTC ms) the last of these keys expires; None where that makes no difference."""
        place = self.expiry_at
        return None if place is None or not entries else max(entry[place] for entry in entries)


ROW_TYPES = {
    "key.issued": RowType(EnvelopeType.KEY_ISSUED, "issued", 2),
    "key.withdrawn": RowType(EnvelopeType.KEY_WITHDRAWN, "withdrawn", 1),
    # That a key was retrieved or has expired is still news after its expiry.
    "key.retrieved": RowType(EnvelopeType.KEY_RETRIEVED, "inbound_retrieved"),
    "key.expired": RowType(EnvelopeType.KEY_EXPIRED, "inbound_expired"),
    # Keys on demand may be taken back until the peer has acknowledged them, so they count then. They have no expiry
    # here because the api takes a row that is gone for placed.
    KEY_PLACED: RowType(EnvelopeType.KEY_ISSUED),
    KEY_STOCKED: RowType(EnvelopeType.KEY_ISSUED, expiry_at=2),
    STOCK_DROPPED: RowType(EnvelopeType.KEY_WITHDRAWN, expiry_at=1),
}


class Outbox:
    """Of one KP. ``number_new_rows`` is for one thread at a time; each method raises StoreUnavailable, StoreRefused."""

    def __init__(self, settings: Settings, engine: Engine, numbers: SequenceNumbers) -> None:
        self.abandoned_after_seconds = ABANDONED_AFTER_TIMEOUTS * settings.sync_timeout_seconds
        self._engine = engine
        self._local_id = settings.local_system_id
        self._numbers = numbers
        self._builder = EnvelopeBuilder()

    def fetch_unacknowledged(self) -> list[OutboxEnvelope]:
        """All envelopes that are numbered. Numbers grow after them even where the clock was set back."""
        with driver_errors(), self._engine.connect() as connection:
            found = outbox.fetch_envelopes(connection, self._local_id)
        self._numbers.next(max((envelope.number for envelope in found), default=0))
        return found

    def number_new_rows(self) -> tuple[list[Unacknowledged], bool]:
        """Makes envelopes of the oldest new rows; the envelopes, and whether there may be more rows."""
        with driver_errors(), self._engine.begin() as connection:
            rows = outbox.claim_unsent_rows(connection, self._local_id, MAX_ROWS)
            groups = group_rows(rows)
            numbered = [self._number(connection, group) for group in groups]
        return numbered, sum(map(len, groups)) < len(rows) or len(rows) == MAX_ROWS

    def _number(self, connection: Connection, group: Sequence[UnsentRow]) -> Unacknowledged:
        row_ids, items = [row.id for row in group], sum(row.items for row in group)
        envelope = OutboxEnvelope(group[0].peer_id, self._numbers.next(), group[0].type, items, 0, None)
        payloads = outbox.fetch_row_payloads(connection, row_ids)
        fetch_wrapping_keys = functools.partial(fetch_sealed_wrapping_keys, connection)
        one = Unacknowledged(envelope, self._builder.build(fetch_wrapping_keys, envelope, payloads))
        one.note_content(one.content)
        outbox.update_numbered(connection, row_ids, envelope.number)
        known = ROW_TYPES.get(envelope.type)
        if known and known.counter and items:
            add_to_counters(connection, self._local_id, envelope.peer_id, {known.counter: items})
        return one

    def read(self, envelopes: Sequence[Unacknowledged]) -> dict[int, OutgoingEnvelope]:
        """The content of envelopes, by number; without those whose rows are gone, or malformed and noted as such."""
        contents: dict[int, OutgoingEnvelope] = {}
        builder = EnvelopeBuilder()
        with driver_errors(), self._engine.connect() as connection:
            fetch_wrapping_keys = functools.partial(fetch_sealed_wrapping_keys, connection)
            for one in envelopes:
                payloads = outbox.fetch_payloads(connection, self._local_id, one.envelope.peer_id, one.number)
                if payloads:
                    content = builder.build(fetch_wrapping_keys, one.envelope, payloads)
                    one.note_content(content)
                    if content is not None:
                        contents[one.number] = content
        return contents

    def record_attempts(self, peer_id: str, attempts: Sequence[tuple[int, int]]) -> None:
        """Records that these numbers were sent once more, each at its time (UTC ms)."""
        by_time = sorted(attempts, key=lambda attempt: attempt[1])
        for sent_ms, sent_together in groupby(by_time, key=lambda attempt: attempt[1]):
            numbers = [number for number, _ in sent_together]
            with driver_errors(), self._engine.begin() as connection:
                outbox.update_sent(connection, self._local_id, peer_id, numbers, sent_ms)

    def delete(self, peer_id: str, numbers: Collection[int]) -> None:
        """Gives envelopes up."""
        with driver_errors(), self._engine.begin() as connection:
            outbox.delete_acknowledged(connection, self._local_id, peer_id, numbers)

    def withdraw_abandoned(self, peer_id: str, numbers: Collection[int]) -> int:
        """Takes back keys on demand whose api has died before it could answer or withdraw them; how many there were.

        As long as their row is in the outbox no caller can have been answered with them. Deleting the row decides: the
        peer's acknowledgement that they are placed, an api or this method that they are withdrawn.
        """
        with driver_errors(), self._engine.begin() as connection:
            rows = outbox.fetch_envelope_rows(connection, self._local_id, peer_id, numbers)
            ids = [row.id for row in rows if row.type == KEY_PLACED]
            if not ids:
                return 0
            keys = [key for payload in outbox.fetch_row_payloads(connection, ids) for key in _withdrawn(payload)]
            outbox.delete_rows(connection, ids)
            outbox.insert_outbox_rows(connection, list(self._withdrawals(peer_id, keys)))
            return len(keys)

    def _withdrawals(self, peer_id: str, keys: Sequence[list[object]]) -> Iterator[OutboxRow]:
        at_ms = now_ms()
        for start in range(0, len(keys), MAX_KEYS):
            some = keys[start : start + MAX_KEYS]
            yield OutboxRow.of(self._local_id, peer_id, EnvelopeType.KEY_WITHDRAWN, some, at_ms)


def _withdrawn(payload: bytes) -> list[list[object]]:
    """What a withdrawal says of the keys of a row: keyId, expiry, correlation id."""
    try:
        return [[record[0], record[2], record[3]] for record in encoding.unpack(payload)]
    except (ValueError, TypeError, IndexError):
        return []  # no release of ours wrote it, and the log has it already


# --- which rows share an envelope


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
        _log.error(
            "outbox rows are malformed",
            peer=envelope.peer_id,
            number=envelope.number,
            type=envelope.type,
            effect="they are not sent; a janitor deletes them within 24 h",
        )
        return None

    def _build(self, fetch: FetchWrappingKeys, envelope: OutboxEnvelope, payloads: Sequence[bytes]) -> OutgoingEnvelope:
        row_type = ROW_TYPES[envelope.type]
        payload = self._payload(fetch, envelope.type, payloads)
        content = cast(Events | PlacedKeys, read_payload(row_type.envelope, payload))
        return OutgoingEnvelope(
            row_type.envelope,
            envelope.peer_id,
            payload,
            envelope.number,
            row_type.keys_expire_ms(content.entries if isinstance(content, Events) else content.records),
            envelope.items,
            content.correlation_ids,
        )

    def _payload(self, fetch: FetchWrappingKeys, row_type: str, payloads: Sequence[bytes]) -> bytes:
        if row_type not in SEALED_TYPES:
            return pack_events(payloads)
        records = [record for payload in payloads for record in encoding.unpack(payload)]
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
