"""The outbox in the store, as the elected syncer sees it. Blocking: for threads.

An envelope gets its number in a committed transaction before it is sent, and keeps it. A crash between commit and
sending leaves a numbered envelope that was never sent; the next elected syncer sends it. The counters of what this KP
did are added to in the transaction that numbers, so an event counts once however often it is sent. Rows go when the
peer has acknowledged them (``apply``), or when they are withdrawn or pointless.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Sequence
from itertools import groupby

from sqlalchemy import Connection, Engine

from skipbus.services.syncer.outgoing import EnvelopeBuilder, OutgoingEnvelope, counter_when_numbered, group_rows
from skipbus.services.syncer.peer_queue import Unacknowledged
from skipbus.services.syncer.sequence_numbers import SequenceNumbers
from skipbus.shared.clock import now_ms
from skipbus.shared.protocol import encoding
from skipbus.shared.protocol.envelopes import EnvelopeType
from skipbus.shared.protocol.placed_keys import MAX_KEYS
from skipbus.shared.settings import Settings
from skipbus.shared.store import outbox
from skipbus.shared.store.engine import driver_errors
from skipbus.shared.store.outbox import KEY_PLACED, OutboxEnvelope, OutboxRow, UnsentRow
from skipbus.shared.store.peers import add_to_counters
from skipbus.shared.store.wrapping_keys import fetch_sealed_wrapping_keys

MAX_ROWS = 500
# After this many timeouts the api that placed keys on demand has withdrawn them, or is dead.
ABANDONED_AFTER_TIMEOUTS = 3


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
        counter = counter_when_numbered(envelope.type)
        if counter and items:
            add_to_counters(connection, self._local_id, envelope.peer_id, {counter: items})
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

        As long as their row is in the outbox nobody can have been answered with them. Whoever deletes the row decides:
        the peer's acknowledgement that they are placed, an api or this that they are withdrawn.
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
        kind, at_ms = EnvelopeType.KEY_WITHDRAWN.value, now_ms()
        for start in range(0, len(keys), MAX_KEYS):
            some = keys[start : start + MAX_KEYS]
            yield OutboxRow(self._local_id, peer_id, kind, encoding.pack(some), len(some), at_ms)


def _withdrawn(payload: bytes) -> list[list[object]]:
    """What a withdrawal says of the keys of a row: keyId, expiry, correlation id."""
    try:
        return [[record[0], record[2], record[3]] for record in encoding.unpack(payload)]
    except (ValueError, TypeError, IndexError):
        return []  # no release of ours wrote it, and the log has it already
