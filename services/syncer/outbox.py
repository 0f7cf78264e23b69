"""Carries the outbox: gathers its rows into envelopes, sends them, and sends them again until they are acknowledged.

Order: an envelope gets its number in a committed transaction before it is sent, and keeps it. A crash between
commit and sending leaves a numbered envelope that was never sent, which whoever takes over sends. The counters
of what this KP did are added to in the transaction that numbers, so an event counts once however often it is sent.

Which envelopes wait for an acknowledgement is kept in memory, because looking through all of them every second
would cost more the longer a peer is away. Memory may be behind the store, never ahead of it: an envelope whose
rows are gone is dropped when its turn comes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from itertools import groupby

from sqlalchemy import Connection, Engine

from services.syncer import metrics
from services.syncer.leader import Leader
from services.syncer.numbers import Numbers
from services.syncer.outgoing import Letter, Outcome, Outgoing
from services.syncer.payloads import Events, pack_events, read_payload
from services.syncer.schedule import is_due
from services.syncer.watch import PeerWatch
from shared.clock import now_ms
from shared.database import driver_errors
from shared.envelopes import EnvelopeType
from shared.errors import EnvelopeRefused
from shared.logs import get_logger
from shared.store import messages
from shared.store.messages import OutboxEntry, OutboxEnvelope

MAX_ROWS = 500
MAX_PAYLOAD_BYTES = 256 * 1024
CHUNK = 32
# Whose events these are: what the local KP issued for the peer, gave out of the peer's keys, or saw expire of them.
_LOCAL_COUNTERS = {
    EnvelopeType.KEY_ISSUED.value: "issued",
    EnvelopeType.KEY_RETRIEVED.value: "inbound_retrieved",
    EnvelopeType.KEY_EXPIRED.value: "inbound_expired",
}

_log = get_logger("outbox")
_Key = tuple[str, int]


@dataclass(frozen=True)
class _Ready:
    """An envelope that is about to be sent."""

    waiting: OutboxEnvelope
    letter: Letter
    events: Events


class Relay:
    """Works only while this syncer is the elected one."""

    def __init__(
        self,
        engine: Engine,
        local_id: str,
        leader: Leader,
        watch: PeerWatch,
        outgoing: Outgoing,
        numbers: Numbers,
        stopping: Callable[[], bool],
    ) -> None:
        self._engine = engine
        self._local_id = local_id
        self._leader = leader
        self._watch = watch
        self._outgoing = outgoing
        self._numbers = numbers
        self._stopping = stopping
        self._waiting: dict[_Key, OutboxEnvelope] = {}
        self._unrouted: set[_Key] = set()
        self._term = 0

    async def tick(self) -> None:
        """Numbers what is new and sends what is due. Raises StoreUnavailable, StoreRefused."""
        if not self._leader.elected:
            return
        if self._term != self._leader.term:
            term = self._leader.term
            self._waiting = await asyncio.to_thread(self._read_waiting)
            self._term = term
        more = True
        while more and not self._stopping():
            numbered, more = await asyncio.to_thread(self._number)
            self._waiting.update((_key(envelope), envelope) for envelope in numbered)
            await self._send_due()
        metrics.OUTBOX.set(len(self._waiting))

    def forget(self, peer_id: str, numbers: Collection[int]) -> None:
        """The peer has acknowledged these envelopes, and their rows are gone."""
        for number in numbers:
            self._forget((peer_id, number))

    def _read_waiting(self) -> dict[_Key, OutboxEnvelope]:
        with driver_errors(), self._engine.connect() as connection:
            found = messages.fetch_envelopes(connection, self._local_id)
        return {_key(envelope): envelope for envelope in found}

    def _number(self) -> tuple[list[OutboxEnvelope], bool]:
        """Makes envelopes of the oldest rows; the envelopes, and whether there may be more rows."""
        with driver_errors(), self._engine.begin() as connection:
            rows = messages.claim_unnumbered(connection, self._local_id, MAX_ROWS)
            numbered = [self._number_group(connection, group) for group in gather(rows)]
        taken = sum(count for _, count in numbered)
        return [envelope for envelope, _ in numbered], taken < len(rows) or len(rows) == MAX_ROWS

    def _number_group(self, connection: Connection, group: list[OutboxEntry]) -> tuple[OutboxEnvelope, int]:
        peer_id, kind = group[0].peer_id, group[0].type
        items = sum(row.items for row in group)
        number = self._numbers.next(messages.fetch_last_number(connection, self._local_id, peer_id))
        messages.update_numbers(connection, [row.id for row in group], number)
        if kind in _LOCAL_COUNTERS:
            counts = {_LOCAL_COUNTERS[kind]: items}
            messages.add_to_counters(connection, self._local_id, peer_id, counts)
        return OutboxEnvelope(peer_id, number, kind, items, 0, None), len(group)

    async def _send_due(self) -> None:
        at_ms = now_ms()
        due = [envelope for envelope in self._waiting.values() if self._is_due(envelope, at_ms)]
        due.sort(key=lambda envelope: envelope.number)
        for start in range(0, len(due), CHUNK):
            if self._stopping() or not await self._send(due[start : start + CHUNK]):
                return

    def _is_due(self, envelope: OutboxEnvelope, at_ms: int) -> bool:
        if self._outgoing.is_held_up(envelope.peer_id):
            return False
        peer = self._watch.status(envelope.peer_id)
        unrouted = _key(envelope) in self._unrouted
        return is_due(envelope.attempts, envelope.sent_ms, peer, at_ms, unrouted=unrouted)

    async def _send(self, envelopes: list[OutboxEnvelope]) -> bool:
        """Sends these; False where the broker is away, so that the rest can wait."""
        ready = await asyncio.to_thread(self._open_letters, envelopes)
        self._drop(set(envelopes) - {one.waiting for one in ready})
        outcomes = await self._outgoing.send([one.letter for one in ready])
        sent_ms = now_ms()
        sent = []
        for one, outcome in zip(ready, outcomes, strict=True):
            _tell_sent(one, outcome)
            if outcome in (Outcome.TAKEN, Outcome.NO_QUEUE):
                sent.append(one.waiting)
                self._note_attempt(one.waiting, sent_ms, outcome)
        await asyncio.to_thread(self._store_attempts, sent, sent_ms)
        return Outcome.LOST not in outcomes

    def _open_letters(self, envelopes: list[OutboxEnvelope]) -> list[_Ready]:
        ready = []
        with driver_errors(), self._engine.connect() as connection:
            for envelope in envelopes:
                payloads = messages.fetch_payloads(connection, self._local_id, envelope.peer_id, envelope.number)
                one = _make_ready(envelope, payloads) if payloads else None
                if one is not None:
                    ready.append(one)
        return ready

    def _drop(self, gone: Iterable[OutboxEnvelope]) -> None:
        for envelope in gone:
            self._forget(_key(envelope))

    def _forget(self, key: _Key) -> None:
        self._waiting.pop(key, None)
        self._unrouted.discard(key)

    def _note_attempt(self, envelope: OutboxEnvelope, sent_ms: int, outcome: Outcome) -> None:
        key = _key(envelope)
        self._unrouted.discard(key)
        # Not where the acknowledgement was faster than this.
        if key in self._waiting:
            self._waiting[key] = replace(envelope, attempts=envelope.attempts + 1, sent_ms=sent_ms)
            if outcome is Outcome.NO_QUEUE:
                self._unrouted.add(key)

    def _store_attempts(self, sent: list[OutboxEnvelope], sent_ms: int) -> None:
        if not sent:
            return
        with driver_errors(), self._engine.begin() as connection:
            for peer_id, numbers in _by_peer(sent):
                messages.update_sent(connection, self._local_id, peer_id, numbers, sent_ms)


def gather(rows: Iterable[OutboxEntry]) -> list[list[OutboxEntry]]:
    """Rows of one peer and one type together, no more than MAX_PAYLOAD_BYTES of payload unless one row has it.

    Only the first group of each peer and type is given; the rest of its rows are for the next time.
    """
    groups: dict[tuple[str, str], list[OutboxEntry]] = {}
    sizes: dict[tuple[str, str], int] = {}
    for row in rows:
        key = (row.peer_id, row.type)
        size = sizes.get(key, 0) + row.payload_bytes
        if key not in groups or size <= MAX_PAYLOAD_BYTES:
            groups.setdefault(key, []).append(row)
        sizes[key] = size
    return list(groups.values())


def _make_ready(envelope: OutboxEnvelope, payloads: list[bytes]) -> _Ready | None:
    """None where a row holds what no release of ours wrote: it must not keep the others from being sent."""
    try:
        letter = Letter(EnvelopeType(envelope.type), envelope.peer_id, pack_events(payloads), envelope.number)
        events = read_payload(letter.type, letter.payload)
        if isinstance(events, Events):
            return _Ready(envelope, letter, events)
    except (ValueError, EnvelopeRefused) as error:
        _log.debug("malformed outbox row", reason=str(error))
    _log.error("outbox rows are malformed", peer=envelope.peer_id, number=envelope.number, type=envelope.type)
    return None


def _tell_sent(one: _Ready, outcome: Outcome) -> None:
    tell = _log.info if outcome is Outcome.TAKEN and one.waiting.attempts == 0 else _log.debug
    tell(
        "events sent",
        type=one.waiting.type,
        peer=one.waiting.peer_id,
        number=one.waiting.number,
        items=one.events.count,
        attempt=one.waiting.attempts + 1,
        outcome=outcome.value,
        correlation_ids=one.events.correlation_ids,
    )


def _by_peer(envelopes: Iterable[OutboxEnvelope]) -> list[tuple[str, list[int]]]:
    ordered = sorted(envelopes, key=lambda envelope: envelope.peer_id)
    groups = groupby(ordered, key=lambda envelope: envelope.peer_id)
    return [(peer_id, [envelope.number for envelope in group]) for peer_id, group in groups]


def _key(envelope: OutboxEnvelope) -> _Key:
    return envelope.peer_id, envelope.number
