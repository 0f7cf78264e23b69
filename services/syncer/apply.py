"""Applies verified envelopes to the store: a batch in one transaction, each envelope at most once.

An envelope with events or keys is remembered in the inbox in the transaction of its effect; a known one has none. A
heartbeat must have a greater number than the last one, so a recorded heartbeat cannot make a dead peer look alive; one
that the broker itself delivers twice is no attack. The other types do the same however often they come.

A transaction changes about MAX_KEYS keys or MAX_ENVELOPES acknowledged envelopes at most, whatever a peer sends.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import Enum

from sqlalchemy import Engine
from tenacity import retry, retry_if_exception_type, stop_after_attempt, wait_random

from skipbus.services.syncer.apply_keys import AfterCommit, KeyChanges, KnownWrappingKeys
from skipbus.services.syncer.verify import Verified
from skipbus.shared.crypto.epochs import MAX_CLOCK_SKEW_MS, has_lost_epochs
from skipbus.shared.errors import SealBroken, StoreConflict
from skipbus.shared.liveness import OFFLINE_AFTER_INTERVALS
from skipbus.shared.protocol.announcements import Announcement, read_announcement
from skipbus.shared.protocol.envelopes import EnvelopeType
from skipbus.shared.protocol.payloads import Acknowledgement, Capabilities, Events, Heartbeat, Rejection
from skipbus.shared.protocol.placed_keys import PlacedKeys
from skipbus.shared.store import announcements, inbox, outbox, peers
from skipbus.shared.store.engine import driver_errors
from skipbus.shared.store.peers import ReceivedHeartbeat

# Envelopes whose acknowledgement is applied in one transaction.
MAX_ENVELOPES = 32
# Keys that the peer issued for the local KP, gave out of the local KP's, or saw expire.
_COUNTERS = {
    EnvelopeType.KEY_ISSUED: "inbound_issued",
    EnvelopeType.KEY_RETRIEVED: "retrieved",
    EnvelopeType.KEY_EXPIRED: "expired",
}
_CHANGE_KEYS = frozenset({EnvelopeType.KEY_WITHDRAWN, EnvelopeType.KEY_ISSUED})

_retried = retry(
    retry=retry_if_exception_type(StoreConflict), stop=stop_after_attempt(5), wait=wait_random(0, 0.1), reraise=True
)


class Result(Enum):
    """What came of a verified envelope."""

    HANDLED = "handled"
    DUPLICATE = "duplicate"
    STALE = "stale"
    REPLAYED = "replayed"
    KEY_EXISTS = "key_exists"


@dataclass(frozen=True, slots=True)
class Applied:
    """A committed batch: a result for each envelope, and what other processes are notified of now."""

    results: list[Result]
    after_commit: AfterCommit


def keys_changed(one: Verified) -> int:
    """How many rows of keys an envelope is about, and one for the envelope."""
    match one.payload:
        case PlacedKeys() as placed:
            return placed.count
        case Events() as events if one.header.type in _CHANGE_KEYS:
            return events.count
        case _:
            return 1


class Applier:
    """Of one KP; ``bus_ids`` are the peers that have a store of their own. Blocking: for threads."""

    def __init__(self, engine: Engine, local_id: str, bus_ids: Collection[str]) -> None:
        self._engine = engine
        self._local_id = local_id
        self._bus_ids = frozenset(bus_ids)
        self._known = KnownWrappingKeys()

    def apply(self, batch: Sequence[Verified], now_ms: int, *, again: bool) -> Applied:
        """Commits the effects of a batch. Raises StoreUnavailable, StoreRefused.

        ``again`` says that an earlier attempt may have been committed: then a known number is no attack.
        """
        applied = self._apply(batch, now_ms, again)
        acknowledged = defaultdict[str, set[int]](set)
        for one in batch:
            if isinstance(one.payload, Acknowledgement):
                acknowledged[one.header.sender].update(one.payload.numbers)
        for sender, numbers in acknowledged.items():
            self._acknowledge(sender, sorted(numbers), now_ms, applied.after_commit)
        return applied

    @_retried
    def apply_rejection(self, peer_id: str, rejection: Rejection, now_ms: int) -> AfterCommit:
        """Commits what follows from a rejection that did not come as an envelope. Raises as ``apply``."""
        with driver_errors(), self._engine.begin() as connection:
            keys = KeyChanges(connection, self._local_id, now_ms, self._known)
            keys.note_rejection(peer_id, rejection)
        return keys.after_commit

    @_retried
    def _apply(self, batch: Sequence[Verified], now_ms: int, again: bool) -> Applied:
        if all(isinstance(one.payload, Acknowledgement) for one in batch):
            return Applied([Result.HANDLED] * len(batch), AfterCommit())
        with driver_errors(), self._engine.begin() as connection:
            keys = KeyChanges(connection, self._local_id, now_ms, self._known)
            results = _Transaction(keys, self._bus_ids, again).apply(batch)
        self._known.note(keys.stored_wrapping_keys)
        return Applied(results, keys.after_commit)

    def _acknowledge(self, peer_id: str, numbers: Sequence[int], now_ms: int, after_commit: AfterCommit) -> None:
        for start in range(0, len(numbers), MAX_ENVELOPES):
            left = True
            while left:
                left, done = self._acknowledge_some(peer_id, numbers[start : start + MAX_ENVELOPES], now_ms)
                after_commit.add(done)

    @_retried
    def _acknowledge_some(self, peer_id: str, numbers: Sequence[int], now_ms: int) -> tuple[bool, AfterCommit]:
        """One transaction; whether rows of these envelopes are left."""
        with driver_errors(), self._engine.begin() as connection:
            if peer_id not in self._bus_ids:
                outbox.delete_acknowledged(connection, self._local_id, peer_id, numbers)
                return False, AfterCommit()
            keys = KeyChanges(connection, self._local_id, now_ms, self._known)
            issued, left = keys.acknowledge(peer_id, numbers)
            if issued:
                peers.add_to_counters(connection, self._local_id, peer_id, {"issued": issued})
        return left, keys.after_commit


class _Transaction:
    """One batch, but for its acknowledgements."""

    def __init__(self, keys: KeyChanges, bus_ids: frozenset[str], again: bool) -> None:
        self._connection, self._local_id, self._now_ms = keys.connection, keys.local_id, keys.now_ms
        self._keys = keys
        self._bus_ids = bus_ids
        self._again = again
        self._counts: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
        self._heartbeats: dict[str, ReceivedHeartbeat] = {}
        self._skews: dict[str, Verified] = {}
        self._last_numbers: dict[str, int] = {}

    def apply(self, batch: Sequence[Verified]) -> list[Result]:
        senders = {one.header.sender for one in batch if isinstance(one.payload, Heartbeat)}
        if senders:
            self._last_numbers = peers.fetch_heartbeat_numbers(self._connection, self._local_id, senders)
        results = [self._apply_one(one) for one in batch]
        self._write()
        return results

    def _apply_one(self, one: Verified) -> Result:
        match one.payload:
            case Events() as events:
                return self._apply_events(one, events)
            case PlacedKeys() as placed:
                return self._store(one, placed)
            case Heartbeat() as heartbeat:
                return self._note_heartbeat(one, heartbeat)
            case Rejection() as rejection:
                self._keys.note_rejection(one.header.sender, rejection)
            case Capabilities(bytes() as body) if one.announcement is not None:
                self._write_announcement(one.announcement, body)
            case _:
                pass
        return Result.HANDLED

    def _is_new(self, one: Verified) -> bool:
        header = one.header
        return inbox.insert_inbox(self._connection, self._local_id, header.sender, header.number, self._now_ms)

    def _apply_events(self, one: Verified, events: Events) -> Result:
        header = one.header
        if not self._is_new(one):
            return Result.DUPLICATE
        counts = self._counts[header.sender]
        if header.type is EnvelopeType.KEY_WITHDRAWN:
            counts["inbound_withdrawn"] += self._keys.withdraw(header, events)
        else:
            counts[_COUNTERS[header.type]] += events.count
        if header.type is EnvelopeType.KEY_ISSUED and header.sender in self._bus_ids:
            self._keys.release_stock(header, events)
        return Result.HANDLED

    def _store(self, one: Verified, placed: PlacedKeys) -> Result:
        header = one.header
        if not self._is_new(one):
            if self._again:
                # The attempt that stored them may have failed before anybody was notified.
                self._keys.note_arrived(placed)
            return Result.DUPLICATE
        issued = self._keys.store(header, placed)
        if issued is None:
            # It is rejected, so it was not handled: its number stays free.
            inbox.delete_inbox(self._connection, self._local_id, header.sender, header.number)
            return Result.KEY_EXISTS
        self._counts[header.sender]["inbound_issued"] += issued
        return Result.HANDLED

    def _note_heartbeat(self, one: Verified, heartbeat: Heartbeat) -> Result:
        header = one.header
        if header.number <= self._last_numbers.get(header.sender, 0):
            return Result.DUPLICATE if one.redelivered or self._again else Result.REPLAYED
        # What waited in the queue while no syncer could read it says nothing about now.
        kept_ms = OFFLINE_AFTER_INTERVALS * heartbeat.interval_ms + MAX_CLOCK_SKEW_MS
        if header.date_ms < self._now_ms - kept_ms:
            # The peer does not count as living, but its clock may be what is wrong.
            self._skews[header.sender] = one
            return Result.STALE
        self._last_numbers[header.sender] = header.number
        received = ReceivedHeartbeat(header.sender, header.number, heartbeat.interval_ms, one.clock_skew_ms)
        self._heartbeats[header.sender] = received
        return Result.HANDLED

    def _write_announcement(self, announcement: Announcement, body: bytes) -> None:
        # Other KPs of this store would take what is in the common table for that of a KP which reads this store.
        if announcement.system_id in self._bus_ids:
            self._compare_with_stored(announcement)
            announcements.upsert_bus_announcement(self._connection, self._local_id, announcement, body)
        else:
            announcements.upsert_announcement(self._connection, announcement, body)

    def _compare_with_stored(self, announcement: Announcement) -> None:
        """What was stored under an identity that is no longer configured gives way, however new it says it is.

        Stock that the peer can no longer open is dropped before an encryptor is answered with a key of it.
        """
        peer_id = announcement.system_id
        stored = announcements.fetch_bus_announcement(self._connection, self._local_id, peer_id)
        if stored is None:
            return
        try:
            known = read_announcement(stored)
        except SealBroken:
            known = None
        if known is None or known.public_key != announcement.public_key:
            announcements.delete_bus_announcement(self._connection, self._local_id, peer_id)
            self._keys.drop_stock(peer_id, "it has another identity now")
        elif announcement.issued_ms > known.issued_ms and has_lost_epochs(
            known.epochs, announcement.epochs, self._now_ms
        ):
            self._keys.drop_stock(peer_id, "it has lost epochs before their end")

    def _write(self) -> None:
        """Peers in one order in every transaction, so that two of them wait for each other less often."""
        for sender in sorted(self._counts):
            counts = {name: count for name, count in self._counts[sender].items() if count}
            if counts:
                peers.add_to_counters(self._connection, self._local_id, sender, counts)
        if self._heartbeats:
            heartbeats = [self._heartbeats[sender] for sender in sorted(self._heartbeats)]
            peers.upsert_heartbeats(self._connection, self._local_id, heartbeats, self._now_ms)
        for sender in sorted(self._skews.keys() - self._heartbeats.keys()):
            number, skew_ms = self._skews[sender].header.number, self._skews[sender].clock_skew_ms
            peers.upsert_clock_skew(self._connection, self._local_id, sender, number, skew_ms)
