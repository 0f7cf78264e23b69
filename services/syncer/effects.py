"""What verified envelopes do to the store: all of a batch in one transaction, each at most once.

Envelopes with events are remembered in the inbox in the transaction of their effect; one that is there already
has none. A heartbeat must bear a greater number than the last one, so a recorded heartbeat cannot make a dead peer
look alive; one that the broker itself hands out twice is nobody's attack. The other types do the same however
often they come.

No transaction is about many more than MAX_KEYS keys, whatever a peer sends at a time. What an envelope of more events
than that does to keys can be done twice without harm, so all but the last of it is done ahead, in transactions of its
own; and of many acknowledgements the rest is done afterwards.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import TypeVar

from sqlalchemy import Connection, Engine

from skipbus.services.syncer.examination import Accepted
from skipbus.services.syncer.key_effects import Aftermath, KeyEffects, KnownWrappingKeys
from skipbus.services.syncer.payloads import Acknowledgement, Capabilities, Complaint, Events, Heartbeat
from skipbus.services.syncer.placed_keys import PlacedKeys
from skipbus.shared.crypto.epochs import MAX_CLOCK_SKEW_MS, has_lost_epochs
from skipbus.shared.errors import SealBroken
from skipbus.shared.liveness import OFFLINE_AFTER_INTERVALS
from skipbus.shared.protocol.announcements import Announcement, read_announcement
from skipbus.shared.protocol.envelopes import EnvelopeType, Header
from skipbus.shared.store import inbox, outbox, peers
from skipbus.shared.store.announcements import (
    delete_bus_announcement,
    fetch_bus_announcement,
    upsert_announcement,
    upsert_bus_announcement,
)
from skipbus.shared.store.engine import driver_errors

# Whose events these are: keys that the peer issued for the local KP, gave out of the local KP's, or saw expire.
_COUNTERS = {
    EnvelopeType.KEY_ISSUED: "inbound_issued",
    EnvelopeType.KEY_RETRIEVED: "retrieved",
    EnvelopeType.KEY_EXPIRED: "expired",
}


# About as many keys are stored, deleted or noted in one transaction: locks for some tens of milliseconds.
MAX_KEYS = 2_000
# Envelopes whose acknowledgement is taken to the store in one transaction.
MAX_NUMBERS = 32
T = TypeVar("T")
_TOUCHING = frozenset({EnvelopeType.KEY_WITHDRAWN, EnvelopeType.KEY_ISSUED})


class Verdict(Enum):
    """What came of a verified envelope."""

    HANDLED = "handled"
    DUPLICATE = "duplicate"
    STALE = "stale"
    REPLAYED = "replayed"
    KEY_EXISTS = "key_exists"


@dataclass(frozen=True, slots=True)
class Applied:
    """A committed batch: a verdict for each envelope, and what other processes are told now."""

    verdicts: list[Verdict]
    aftermath: Aftermath


def keys_touched(accepted: Accepted) -> int:
    """How many rows of keys an envelope is about."""
    match accepted.payload:
        case PlacedKeys(records):
            return len(records)
        case Events() as events if accepted.header.type in _TOUCHING:
            return len(events.entries)
        case _:
            return 1


def portions(batch: Sequence[T], touched: Callable[[T], int]) -> Iterator[list[T]]:
    """What goes into a transaction each: in their order, as many as are about MAX_KEYS keys together, one at least."""
    portion, keys = list[T](), 0
    for one in batch:
        if portion and keys + touched(one) > MAX_KEYS:
            yield portion
            portion, keys = [], 0
        portion.append(one)
        keys += touched(one)
    if portion:
        yield portion


class Effects:
    """Writes to one KP's part of the store. ``bus_ids`` are the peers that have a store of their own."""

    def __init__(self, engine: Engine, local_id: str, bus_ids: Collection[str] = ()) -> None:
        self._engine = engine
        self._local_id = local_id
        self._bus_ids = frozenset(bus_ids)
        self._known = KnownWrappingKeys()

    def apply(self, batch: Sequence[Accepted], now_ms: int, *, again: bool) -> Applied:
        """Commits what the batch does; one verdict for each. Raises StoreUnavailable, StoreRefused.

        ``again`` says that an earlier try may have been committed: then a number that is known is no attack.
        """
        rest = [self._apply_ahead(accepted, now_ms) for accepted in batch]
        with driver_errors(), self._engine.begin() as connection:
            keys = KeyEffects(connection, self._local_id, now_ms, self._known)
            transaction = _Transaction(connection, self._local_id, self._bus_ids, keys, now_ms, again)
            verdicts = transaction.apply(rest)
        self._known.note(keys.stored_wrapping_keys)
        for sender, numbers in transaction.left:
            self._acknowledge(sender, numbers, now_ms, keys.aftermath)
        return Applied(verdicts, keys.aftermath)

    def _apply_ahead(self, accepted: Accepted, now_ms: int) -> Accepted:
        """Commits what so many events do to keys, but for the last MAX_KEYS of them, which are still to be done."""
        events = accepted.payload
        if not isinstance(events, Events) or keys_touched(accepted) <= MAX_KEYS:
            return accepted
        header = accepted.header
        with driver_errors(), self._engine.begin() as connection:
            if inbox.fetch_is_in_inbox(connection, self._local_id, header.sender, header.number):
                return accepted
        ahead, last = events.entries[:-MAX_KEYS], events.entries[-MAX_KEYS:]
        for start in range(0, len(ahead), MAX_KEYS):
            part = replace(events, count=0, entries=ahead[start : start + MAX_KEYS])
            with driver_errors(), self._engine.begin() as connection:
                keys = KeyEffects(connection, self._local_id, now_ms, self._known)
                transaction = _Transaction(connection, self._local_id, self._bus_ids, keys, now_ms, again=True)
                transaction.apply_part(header, part)
        return replace(accepted, payload=replace(events, entries=last))

    def _acknowledge(self, sender: str, numbers: Sequence[int], now_ms: int, aftermath: Aftermath) -> None:
        """What of an acknowledgement was too much for the transaction that it came in."""
        left: list[tuple[str, Sequence[int]]] = [(sender, numbers)]
        while left:
            with driver_errors(), self._engine.begin() as connection:
                keys = KeyEffects(connection, self._local_id, now_ms, self._known, aftermath)
                transaction = _Transaction(connection, self._local_id, self._bus_ids, keys, now_ms, again=True)
                transaction.apply_acknowledgement(*left.pop())
            left += transaction.left

    def hear_refusal(self, peer_id: str, complaint: Complaint, now_ms: int) -> Aftermath:
        """Commits what follows from a refusal that did not come as an envelope. Raises as ``apply``."""
        with driver_errors(), self._engine.begin() as connection:
            keys = KeyEffects(connection, self._local_id, now_ms, self._known)
            keys.hear_refusal(peer_id, complaint)
        return keys.aftermath


class _Transaction:
    def __init__(
        self,
        connection: Connection,
        local_id: str,
        bus_ids: frozenset[str],
        keys: KeyEffects,
        now_ms: int,
        again: bool,
    ) -> None:
        self._connection = connection
        self._keys = keys
        self._local_id = local_id
        self._bus_ids = bus_ids
        self._now_ms = now_ms
        self._again = again
        self._counts: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
        self._acknowledged: dict[str, set[int]] = defaultdict(set)
        self._beats: dict[str, tuple[Accepted, Heartbeat]] = {}
        self._skews: dict[str, Accepted] = {}
        self._last_numbers: dict[str, int] = {}
        # Acknowledgements that are still to be taken to the store: sender, numbers.
        self.left: list[tuple[str, Sequence[int]]] = []

    def apply(self, batch: Sequence[Accepted]) -> list[Verdict]:
        beating = {one.header.sender for one in batch if isinstance(one.payload, Heartbeat)}
        if beating:
            self._last_numbers = peers.fetch_heartbeat_numbers(self._connection, self._local_id, beating)
        verdicts = [self._one(accepted) for accepted in batch]
        self._write()
        return verdicts

    def apply_part(self, header: Header, events: Events) -> None:
        """What some events of an envelope do to keys, without the envelope's being handled by that."""
        self._touch_keys(header, events)
        self._write()

    def apply_acknowledgement(self, sender: str, numbers: Sequence[int]) -> None:
        """These envelopes are acknowledged; what is too much is ``left``."""
        self._acknowledged[sender].update(numbers)
        self._write()

    def _one(self, accepted: Accepted) -> Verdict:
        match accepted.payload:
            case Events() as events:
                return self._count(accepted, events)
            case PlacedKeys() as placed:
                return self._store(accepted, placed)
            case Complaint() as complaint:
                self._keys.hear_refusal(accepted.header.sender, complaint)
            case Heartbeat() as heartbeat:
                return self._beat(accepted, heartbeat)
            case Acknowledgement(numbers):
                self._acknowledged[accepted.header.sender].update(numbers)
            case Capabilities(bytes() as body) if accepted.announcement is not None:
                self._write_announcement(accepted.announcement, body)
            case _:
                pass
        return Verdict.HANDLED

    def _write_announcement(self, announcement: Announcement, body: bytes) -> None:
        # Other KPs of this store would take what stands in the common table for that of a KP which reads this store.
        if announcement.system_id in self._bus_ids:
            self._compare_with_stored(announcement)
            upsert_bus_announcement(self._connection, self._local_id, announcement, body)
        else:
            upsert_announcement(self._connection, announcement, body)

    def _compare_with_stored(self, announcement: Announcement) -> None:
        """What was stored under an identity that is configured no more gives way, however new it says it is.

        And stock that the peer cannot open any more is dropped before anybody is answered with a key of it.
        """
        peer_id = announcement.system_id
        stored = fetch_bus_announcement(self._connection, self._local_id, peer_id)
        if stored is None:
            return
        try:
            known = read_announcement(stored)
        except SealBroken:
            known = None
        if known is None or known.public_key != announcement.public_key:
            delete_bus_announcement(self._connection, self._local_id, peer_id)
            self._keys.drop_stock(peer_id, "it has another identity now")
        elif announcement.issued_ms > known.issued_ms and has_lost_epochs(
            known.epochs, announcement.epochs, self._now_ms
        ):
            self._keys.drop_stock(peer_id, "it has lost epochs before their end")

    def _count(self, accepted: Accepted, events: Events) -> Verdict:
        header = accepted.header
        if not self._is_new(header):
            return Verdict.DUPLICATE
        self._touch_keys(header, events)
        if header.type in _COUNTERS:
            self._counts[header.sender][_COUNTERS[header.type]] += events.count
        return Verdict.HANDLED

    def _touch_keys(self, header: Header, events: Events) -> None:
        if header.type is EnvelopeType.KEY_WITHDRAWN:
            self._counts[header.sender]["inbound_withdrawn"] += self._keys.withdraw(header, events)
        elif header.type is EnvelopeType.KEY_ISSUED and header.sender in self._bus_ids:
            self._keys.release_stock(header, events)

    def _store(self, accepted: Accepted, placed: PlacedKeys) -> Verdict:
        header = accepted.header
        if not self._is_new(header):
            return Verdict.DUPLICATE
        issued = self._keys.store(header, placed)
        if issued is None:
            # It is refused, so it was not handled: its number stays free.
            inbox.delete_inbox(self._connection, self._local_id, header.sender, header.number)
            return Verdict.KEY_EXISTS
        self._counts[header.sender]["inbound_issued"] += issued
        return Verdict.HANDLED

    def _is_new(self, header: Header) -> bool:
        return inbox.insert_inbox(self._connection, self._local_id, header.sender, header.number, self._now_ms)

    def _beat(self, accepted: Accepted, heartbeat: Heartbeat) -> Verdict:
        header = accepted.header
        if header.number <= self._last_numbers.get(header.sender, 0):
            return Verdict.DUPLICATE if accepted.redelivered or self._again else Verdict.REPLAYED
        # What lay in the queue while nobody could read it says nothing of the present.
        kept_ms = OFFLINE_AFTER_INTERVALS * heartbeat.interval_ms + MAX_CLOCK_SKEW_MS
        if header.date_ms < self._now_ms - kept_ms:
            # Nor is the peer taken for living, but its clock may be what is wrong.
            self._skews[header.sender] = accepted
            return Verdict.STALE
        self._last_numbers[header.sender] = header.number
        self._beats[header.sender] = (accepted, heartbeat)
        return Verdict.HANDLED

    def _write(self) -> None:
        for sender, numbers in self._acknowledged.items():
            self._write_acknowledged(sender, sorted(numbers))
        # Peers in one order in every transaction, so that two of them wait for each other less often.
        senders = sorted(self._counts.keys() | self._beats.keys() | self._skews.keys())
        if senders and self._beats.keys() == set(senders) and not self._counts:
            beats = [self._beat_of(sender) for sender in senders]
            peers.upsert_heartbeats(self._connection, self._local_id, beats, self._now_ms)
            return
        for sender in senders:
            counts = {name: count for name, count in self._counts[sender].items() if count}
            if counts:
                peers.add_to_counters(self._connection, self._local_id, sender, counts)
            if sender in self._beats:
                peers.upsert_heartbeats(self._connection, self._local_id, [self._beat_of(sender)], self._now_ms)
            elif sender in self._skews:
                late = self._skews[sender]
                peers.upsert_clock_skew(
                    self._connection, self._local_id, sender, late.header.number, late.clock_skew_ms
                )

    def _write_acknowledged(self, sender: str, numbers: Sequence[int]) -> None:
        now, later = numbers[:MAX_NUMBERS], numbers[MAX_NUMBERS:]
        if later:
            self.left.append((sender, later))
        if sender not in self._bus_ids:
            outbox.delete_acknowledged(self._connection, self._local_id, sender, now)
            return
        issued, more = self._keys.acknowledge(sender, now, MAX_KEYS)
        self._counts[sender]["issued"] += issued
        if more:
            self.left.append((sender, now))

    def _beat_of(self, sender: str) -> peers.ReceivedHeartbeat:
        accepted, heartbeat = self._beats[sender]
        return peers.ReceivedHeartbeat(sender, accepted.header.number, heartbeat.interval_ms, accepted.clock_skew_ms)
