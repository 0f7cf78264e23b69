"""What envelopes of bus peers do to keys, each in the transaction of its envelope.

A record is stored only if its keyId is new, and never after its withdrawal, in whichever order the two arrive. Stock
counts as issued when its source reports that it was given out, not when it is placed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from sqlalchemy import Connection

from skipbus.services.syncer.stock_expiry import drop_rejected_stock
from skipbus.services.syncer.verify import MAX_LIFETIME_MS
from skipbus.shared.broker.notifications import NotificationKind, Notifier
from skipbus.shared.crypto.epochs import MAX_CLOCK_SKEW_MS
from skipbus.shared.crypto.sealing import SealedWrappingKey
from skipbus.shared.logging import get_logger
from skipbus.shared.protocol.envelopes import Header
from skipbus.shared.protocol.payloads import Events, Rejection
from skipbus.shared.protocol.placed_keys import MAX_KEYS, PlacedKeys
from skipbus.shared.store import key_records, outbox, peers, stock, withdrawn_keys, wrapping_keys
from skipbus.shared.store.outbox import KEY_PLACED, KEY_STOCKED

_KNOWN_SECONDS = 30.0
_MAX_KNOWN = 4_096

_log = get_logger("stock")
T = TypeVar("T")


def portions(batch: Sequence[T], size: Callable[[T], int]) -> Iterator[list[T]]:
    """The batch in its order, in parts of at most MAX_KEYS together, one element at least."""
    portion, keys = list[T](), 0
    for one in batch:
        if portion and keys + size(one) > MAX_KEYS:
            yield portion
            portion, keys = [], 0
        portion.append(one)
        keys += size(one)
    if portion:
        yield portion


@dataclass(slots=True)
class AfterCommit:
    """What the other processes of this KP are notified of once a transaction is committed."""

    stored: list[bytes] = field(default_factory=list)
    """Tokens of keys on demand that the peer has stored."""
    rejected: list[bytes] = field(default_factory=list)
    """Tokens of keys on demand whose envelope the peer has rejected."""
    arrived: list[bytes] = field(default_factory=list)
    """keyIds of keys on demand that are here now."""
    stock_changed: bool = False

    def add(self, other: AfterCommit) -> None:
        """What another transaction has done."""
        self.stored += other.stored
        self.rejected += other.rejected
        self.arrived += other.arrived
        self.stock_changed |= other.stock_changed

    def notify(self, notifier: Notifier) -> None:
        """To be called after the commit, on the event loop."""
        for kind, items in (
            (NotificationKind.STORED, self.stored),
            (NotificationKind.REJECTED, self.rejected),
            (NotificationKind.ARRIVED, self.arrived),
        ):
            if items:
                notifier.notify(kind, items)
        if self.stock_changed:
            notifier.notify(NotificationKind.STOCK)


class KnownWrappingKeys:
    """Wrapping keys that this process has stored a moment ago: every envelope brings those that it needs."""

    def __init__(self) -> None:
        self._known: dict[SealedWrappingKey, float] = {}

    def missing(self, wanted: Iterable[SealedWrappingKey]) -> list[SealedWrappingKey]:
        """Those that must be stored, or compared with what is stored."""
        return [one for one in wanted if not self._was_stored_lately(one)]

    def _was_stored_lately(self, one: SealedWrappingKey) -> bool:
        stored_at = self._known.get(one)
        return stored_at is not None and time.monotonic() - stored_at < _KNOWN_SECONDS

    def note(self, stored: Iterable[SealedWrappingKey]) -> None:
        """These are committed."""
        if len(self._known) > _MAX_KNOWN:
            self._known.clear()
        self._known.update(dict.fromkeys(stored, time.monotonic()))


class KeyChanges:
    """The part of one transaction that changes keys."""

    def __init__(self, connection: Connection, local_id: str, now_ms: int, known: KnownWrappingKeys) -> None:
        self.connection = connection
        self.local_id = local_id
        self.now_ms = now_ms
        self._known = known
        self.after_commit = AfterCommit()
        self.stored_wrapping_keys: list[SealedWrappingKey] = []

    def store(self, header: Header, placed: PlacedKeys) -> int | None:
        """Stores what a peer has placed here; how many keys count as issued, None where a keyId exists already."""
        records = placed.key_records(header)
        key_ids = [record.key_id for record in records]
        if key_records.fetch_known_key_ids(self.connection, key_ids):
            return None
        missing = self._known.missing(placed.sealed_wrapping_keys(header))
        if missing and not self._store_wrapping_keys(missing):
            return None
        self.stored_wrapping_keys += missing
        withdrawn = withdrawn_keys.fetch_withdrawn_keys(self.connection, self.local_id, header.sender, key_ids)
        wanted = [record for record in records if record.key_id not in withdrawn]
        if not wanted:
            return 0
        key_records.insert_key_records(self.connection, wanted)
        if placed.stock:
            stock.insert_stock_held(self.connection, self.local_id, header.sender, wanted)
            return 0
        self.after_commit.arrived += [record.key_id for record in wanted]
        return len(wanted)

    def note_arrived(self, placed: PlacedKeys) -> None:
        """These were stored before: who waits for one looks again."""
        if not placed.stock:
            self.after_commit.arrived += [record[0] for record in placed.records]

    def _store_wrapping_keys(self, missing: Sequence[SealedWrappingKey]) -> bool:
        """False where another wrapping key has one of the ids: keys that are sealed under this one would be lost."""
        wrapping_keys.insert_wrapping_keys(self.connection, missing)
        stored = wrapping_keys.fetch_sealed_wrapping_keys(self.connection, [w.wrapping_key_id for w in missing])
        return set(stored) == set(missing)

    def release_stock(self, header: Header, events: Events) -> None:
        """The source has given these out of its stock."""
        key_ids = [entry[0] for entry in events.entries]
        stock.delete_stock_held(self.connection, self.local_id, header.sender, key_ids)

    def withdraw(self, header: Header, events: Events) -> int:
        """The source takes these back; how many of them were issued on demand and still here."""
        latest_ms = self.now_ms + MAX_LIFETIME_MS + MAX_CLOCK_SKEW_MS
        keys = [(entry[0], min(entry[1], latest_ms)) for entry in events.entries]
        key_ids = [key_id for key_id, _ in keys]
        withdrawn_keys.insert_withdrawn_keys(self.connection, self.local_id, header.sender, keys)
        held = stock.delete_stock_held(self.connection, self.local_id, header.sender, key_ids)
        deleted = key_records.delete_key_records_of_source(self.connection, self.local_id, header.sender, key_ids)
        return max(0, deleted - held)

    def drop_stock(self, peer_id: str, reason: str) -> None:
        """The peer cannot open what is placed there: all stock is dropped, and what is in transit.

        In one transaction, however many keys: an operator's mistake causes it, and a peer gains nothing by it.
        """
        outbox.delete_stocked_rows(self.connection, self.local_id, peer_id)
        count = stock.delete_stock_of_peer(self.connection, self.local_id, peer_id)
        if count:
            self.after_commit.stock_changed = True
            _log.warning("stock dropped, the peer cannot open it", peer=peer_id, count=count, reason=reason)

    def acknowledge(self, peer_id: str, numbers: Collection[int]) -> tuple[int, bool]:
        """A bus peer has the keys of these envelopes; how many on demand are issued by that, and whether rows are left.

        Rows are left where all of them have more than MAX_KEYS keys.
        """
        found = outbox.fetch_envelope_rows(self.connection, self.local_id, peer_id, numbers)
        rows = next(portions(found, lambda row: row.items), [])
        outbox.delete_rows(self.connection, [row.id for row in rows])
        stocked = [row.token for row in rows if row.type == KEY_STOCKED and row.token]
        if stocked:
            stock.update_stock_placed(self.connection, stocked, self.now_ms)
            self.after_commit.stock_changed = True
        placed = [row for row in rows if row.type == KEY_PLACED]
        self.after_commit.stored += [row.token for row in placed if row.token]
        return sum(row.items for row in placed), len(rows) < len(found)

    def note_rejection(self, peer_id: str, rejection: Rejection) -> None:
        """A peer has rejected an envelope: recorded for the operator; the api that waits for its keys is notified."""
        words = f"{rejection.reason}: {rejection.explanation}"
        peers.upsert_rejection(self.connection, self.local_id, peer_id, words, self.now_ms)
        rows = outbox.fetch_envelope_rows(self.connection, self.local_id, peer_id, [rejection.number])
        self.after_commit.rejected += [row.token for row in rows if row.type == KEY_PLACED and row.token]
        stocked = {row.id: row.token for row in rows if row.type == KEY_STOCKED and row.token}
        # The peer will never take these keys; without them the stock is filled with others.
        if rejection.reason == "key_exists" and stocked:
            drop_rejected_stock(self.connection, self.local_id, peer_id, stocked, self.now_ms)
            self.after_commit.stock_changed = True
