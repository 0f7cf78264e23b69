"""What verified envelopes do to the store: all of a batch in one transaction, each at most once.

Envelopes with events are remembered in the inbox in the transaction of their effect; one that is there already
has none. A heartbeat must bear a greater number than the last one, so a recorded heartbeat cannot make a dead peer
look alive; one that the broker itself hands out twice is nobody's attack. The other types do the same however
often they come.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from enum import Enum

from sqlalchemy import Connection, Engine

from services.syncer.examination import Accepted
from services.syncer.payloads import Acknowledgement, Capabilities, Events, Heartbeat
from shared.database import driver_errors
from shared.envelopes import EnvelopeType, Header
from shared.epochs import MAX_CLOCK_SKEW_MS
from shared.liveness import OFFLINE_AFTER_INTERVALS
from shared.store import messages
from shared.store.peers import upsert_announcement

# Whose events these are: keys that the peer issued for the local KP, gave out of the local KP's, or saw expire.
_COUNTERS = {
    EnvelopeType.KEY_ISSUED: "inbound_issued",
    EnvelopeType.KEY_RETRIEVED: "retrieved",
    EnvelopeType.KEY_EXPIRED: "expired",
}


class Verdict(Enum):
    """What came of a verified envelope."""

    HANDLED = "handled"
    DUPLICATE = "duplicate"
    STALE = "stale"
    REPLAYED = "replayed"


class Effects:
    """Writes to one KP's part of the store."""

    def __init__(self, engine: Engine, local_id: str) -> None:
        self._engine = engine
        self._local_id = local_id

    def apply(self, batch: Sequence[Accepted], now_ms: int, *, again: bool) -> list[Verdict]:
        """Commits what the batch does; one verdict for each. Raises StoreUnavailable, StoreRefused.

        ``again`` says that an earlier try may have been committed: then a number that is known is no attack.
        """
        with driver_errors(), self._engine.begin() as connection:
            return _Transaction(connection, self._local_id, now_ms, again).apply(batch)


class _Transaction:
    def __init__(self, connection: Connection, local_id: str, now_ms: int, again: bool) -> None:
        self._connection = connection
        self._local_id = local_id
        self._now_ms = now_ms
        self._again = again
        self._counts: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
        self._acknowledged: dict[str, set[int]] = defaultdict(set)
        self._beats: dict[str, tuple[Header, Heartbeat]] = {}
        self._last_numbers: dict[str, int] = {}

    def apply(self, batch: Sequence[Accepted]) -> list[Verdict]:
        beating = {one.header.sender for one in batch if isinstance(one.payload, Heartbeat)}
        if beating:
            self._last_numbers = messages.fetch_heartbeat_numbers(self._connection, self._local_id, beating)
        verdicts = [self._one(accepted) for accepted in batch]
        self._write()
        return verdicts

    def _one(self, accepted: Accepted) -> Verdict:
        match accepted.payload:
            case Events() as events:
                return self._count(accepted, events)
            case Heartbeat() as heartbeat:
                return self._beat(accepted, heartbeat)
            case Acknowledgement(numbers):
                self._acknowledged[accepted.header.sender].update(numbers)
            case Capabilities(bytes() as body) if accepted.announcement is not None:
                upsert_announcement(self._connection, accepted.announcement, body)
            case _:
                pass
        return Verdict.HANDLED

    def _count(self, accepted: Accepted, events: Events) -> Verdict:
        header = accepted.header
        new = messages.insert_inbox(self._connection, self._local_id, header.sender, header.number, self._now_ms)
        if not new:
            return Verdict.DUPLICATE
        self._counts[header.sender][_COUNTERS[header.type]] += events.count
        return Verdict.HANDLED

    def _beat(self, accepted: Accepted, heartbeat: Heartbeat) -> Verdict:
        header = accepted.header
        if header.number <= self._last_numbers.get(header.sender, 0):
            return Verdict.DUPLICATE if accepted.redelivered or self._again else Verdict.REPLAYED
        # What lay in the queue while nobody could read it says nothing of the present.
        kept_ms = OFFLINE_AFTER_INTERVALS * heartbeat.interval_ms + MAX_CLOCK_SKEW_MS
        if header.date_ms < self._now_ms - kept_ms:
            return Verdict.STALE
        self._last_numbers[header.sender] = header.number
        self._beats[header.sender] = (header, heartbeat)
        return Verdict.HANDLED

    def _write(self) -> None:
        for sender, numbers in self._acknowledged.items():
            messages.delete_acknowledged(self._connection, self._local_id, sender, numbers)
        # Peers in one order in every transaction, so that two of them wait for each other less often.
        for sender in sorted(self._counts.keys() | self._beats.keys()):
            if sender in self._counts:
                messages.add_to_counters(self._connection, self._local_id, sender, dict(self._counts[sender]))
            if sender in self._beats:
                self._write_beat(*self._beats[sender])

    def _write_beat(self, header: Header, heartbeat: Heartbeat) -> None:
        messages.upsert_heartbeat(
            self._connection, self._local_id, header.sender, header.number, heartbeat.interval_ms, self._now_ms
        )
