"""Sends the outbox to the peers: new rows immediately, and every envelope again until it is acknowledged.

Which envelopes wait for an acknowledgement is kept in memory, because reading all of them each second would cost more
the longer a peer is away. Memory may be behind the store, never ahead of it: an envelope whose rows are gone is dropped
when its turn comes. Each peer has a queue and a task of its own, so a slow or unreachable peer never delays the others.
To a peer with an endpoint one envelope is sent at a time, and after one that could not be delivered the rest waits.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection

from skipbus.services.syncer import metrics
from skipbus.services.syncer.leader import Leader
from skipbus.services.syncer.outbox import Outbox
from skipbus.services.syncer.peer_queue import NOT_SENT, PeerQueue, Unacknowledged
from skipbus.services.syncer.peers import PeerWatch
from skipbus.services.syncer.transport import Outcome, OutgoingEnvelope, Transport
from skipbus.shared.clock import now_ms
from skipbus.shared.crypto.epochs import MAX_CLOCK_SKEW_MS
from skipbus.shared.errors import BackendError
from skipbus.shared.lifecycle import every, next_tick
from skipbus.shared.logging import get_logger

TICK_SECONDS = 1.0
# Envelopes that are signed and sent together over the bus.
CHUNK = 8
# How often the store is asked for envelopes that this syncer does not know of: another one may have numbered them
# in the moment in which it lost the election.
READ_AGAIN_SECONDS = 60.0
# After the expiry of the last key that an envelope is about; by then it has passed by any clock.
EXPIRED_AFTER_MS = 2 * MAX_CLOCK_SKEW_MS
# Envelopes of one peer that are read in one round only to learn when their keys expire.
MAX_EXPIRY_UNKNOWN = 16
# Envelopes whose rows are deleted in one transaction.
MAX_DELETED = 32
# Reading must leave connections to the store for what is more urgent.
MAX_READING = 2

_log = get_logger("outbox")


class Sender:
    """Works only while this syncer is the elected one. Of one event loop."""

    def __init__(
        self,
        outbox: Outbox,
        leader: Leader,
        peers: PeerWatch,
        transport: Transport,
        wake_up: asyncio.Event,
        stop: asyncio.Event,
    ) -> None:
        """``wake_up`` is set when there are new rows in the outbox."""
        self._outbox = outbox
        self._leader = leader
        self._peers = peers
        self._transport = transport
        self._wake_up = wake_up
        self._stop = stop
        self._queues: dict[str, PeerQueue] = {}
        self._tasks = asyncio.TaskGroup()
        self._reading = asyncio.Semaphore(MAX_READING)
        self._term = 0
        self._read_at = 0.0
        self._tick_at = 0.0

    def wake(self) -> None:
        """There are new rows in the outbox."""
        self._wake_up.set()

    def forget(self, peer_id: str, numbers: Collection[int]) -> None:
        """The peer has acknowledged these envelopes, and their rows are gone."""
        if peer_id in self._queues:
            self._queues[peer_id].forget(numbers)

    def note_rejected(self, peer_id: str, number: int) -> None:
        """The peer does not take this envelope: it is left alone for a while."""
        if peer_id in self._queues:
            self._queues[peer_id].note_rejected(number)

    async def run(self) -> None:
        """Until ``stop``; then what is on its way is still sent."""
        async with self._tasks:
            await every(self._stop, TICK_SECONDS, "outbox", self._round, quiet=True, wake=self._wake_up)

    async def _round(self) -> None:
        """Raises StoreUnavailable, StoreRefused."""
        now = asyncio.get_running_loop().time()
        due = now >= self._tick_at
        if due:
            self._tick_at = next_tick(now, TICK_SECONDS)
        if not self._leader.elected:
            return
        await self._take_over()
        await self._send_new_rows()
        if due:
            await self._tick()

    # --- what there is to send

    async def _take_over(self) -> None:
        term, now = self._leader.term, time.monotonic()
        if self._term == term and now - self._read_at < READ_AGAIN_SECONDS:
            return
        try:
            found = await asyncio.to_thread(self._outbox.fetch_unacknowledged)
        except BackendError as error:
            if self._term != term:
                raise
            # It was read to be sure that nothing was missed: new rows must not wait for it.
            _log.debug("waiting envelopes not read again", reason=str(error))
            self._read_at = now
            return
        if self._term != term:
            self._queues = {}
        for envelope in found:
            self._queue_of(envelope.peer_id).add(Unacknowledged(envelope))
        self._term, self._read_at = term, now

    async def _send_new_rows(self) -> None:
        """Until the next tick, so that a long backlog delays nothing that follows from time."""
        loop, more = asyncio.get_running_loop(), True
        while more and loop.time() < self._tick_at and not self._stop.is_set():
            numbered, more = await asyncio.to_thread(self._outbox.number_new_rows)
            for one in numbered:
                queue = self._queue_of(one.envelope.peer_id)
                queue.add(one)
                if one.idle:
                    self._send(queue, [one])
        if more:
            self.wake()

    async def _tick(self) -> None:
        """What follows from time alone: what is due again, what is recorded, what was abandoned or has expired."""
        at_ms = now_ms()
        for queue in self._queues.values():
            self._send(queue, queue.due(self._peers.status(queue.peer_id), at_ms))
        metrics.OUTBOX.set(sum(map(len, self._queues.values())))
        for queue in list(self._queues.values()):
            await self._record_attempts(queue)
            await self._withdraw_abandoned(queue)
            await self._give_up_expired(queue, at_ms - EXPIRED_AFTER_MS)
        self._queues = {peer_id: queue for peer_id, queue in self._queues.items() if queue.in_use}

    async def _record_attempts(self, queue: PeerQueue) -> None:
        if attempts := queue.take_attempts():
            await asyncio.to_thread(self._outbox.record_attempts, queue.peer_id, attempts)

    async def _withdraw_abandoned(self, queue: PeerQueue) -> None:
        """Keys on demand whose api has died: they must not be found placed later."""
        numbers = queue.abandoned(time.monotonic() - self._outbox.abandoned_after_seconds)
        if not numbers:
            return
        count = await asyncio.to_thread(self._outbox.withdraw_abandoned, queue.peer_id, numbers)
        queue.forget(numbers)
        if count:
            _log.warning("keys withdrawn: the api that requested them has ended", peer=queue.peer_id, count=count)
            self.wake()

    async def _give_up_expired(self, queue: PeerQueue, before_ms: int) -> None:
        """A peer that acknowledges nothing must not gather envelopes about keys that have expired."""
        if unknown := queue.expiry_unknown(MAX_EXPIRY_UNKNOWN):
            await self._read(queue, unknown)
        numbers = queue.expired(before_ms)
        for start in range(0, len(numbers), MAX_DELETED):
            await asyncio.to_thread(self._outbox.delete, queue.peer_id, numbers[start : start + MAX_DELETED])
        queue.forget(numbers)
        if numbers:
            _log.warning(
                "envelopes given up: their keys expired before the peer acknowledged them",
                peer=queue.peer_id,
                envelopes=len(numbers),
            )

    def _queue_of(self, peer_id: str) -> PeerQueue:
        return self._queues.setdefault(peer_id, PeerQueue(peer_id))

    # --- sending

    def _send(self, queue: PeerQueue, envelopes: Collection[Unacknowledged]) -> None:
        queue.make_ready(envelopes)
        if queue.has_ready and not queue.sending:
            queue.sending = True
            self._tasks.create_task(self._send_ready(queue), name=f"send {queue.peer_id}")

    async def _send_ready(self, queue: PeerQueue) -> None:
        """Until nothing is ready, something could not be sent, or this process stops."""
        limit = 1 if self._transport.is_https_peer(queue.peer_id) else CHUNK
        try:
            while queue.has_ready and self._transport.is_open(queue.peer_id) and not self._stop.is_set():
                if not await self._send_chunk(queue, queue.take(limit)):
                    break
        except BackendError as error:
            _log.debug("envelopes not read", peer=queue.peer_id, reason=str(error))
        finally:
            queue.postpone()
            queue.sending = False

    async def _send_chunk(self, queue: PeerQueue, chunk: list[Unacknowledged]) -> bool:
        """Whether all of it could be sent."""
        try:
            contents = await self._contents_of(queue, chunk)
            outcomes = await self._transport.send(list(contents.values()))
        finally:
            for one in chunk:
                one.release()
        at_ms = now_ms()
        for (one, content), outcome in zip(contents.items(), outcomes, strict=True):
            _log_sent(one, content, outcome)
            queue.note_sent(one, outcome, at_ms)
        return NOT_SENT.isdisjoint(outcomes)

    async def _contents_of(
        self, queue: PeerQueue, chunk: list[Unacknowledged]
    ) -> dict[Unacknowledged, OutgoingEnvelope]:
        missing = [one for one in chunk if one.content is None]
        read = await self._read(queue, missing) if missing else {}
        found = ((one, one.content or read.get(one.number)) for one in chunk)
        return {one: content for one, content in found if content is not None}

    async def _read(self, queue: PeerQueue, envelopes: list[Unacknowledged]) -> dict[int, OutgoingEnvelope]:
        """By number; those whose rows are gone are forgotten. Raises StoreUnavailable, StoreRefused."""
        async with self._reading:
            contents = await asyncio.to_thread(self._outbox.read, envelopes)
        queue.forget(one.number for one in envelopes if one.number not in contents and not one.malformed)
        return contents


def _log_sent(one: Unacknowledged, content: OutgoingEnvelope, outcome: Outcome) -> None:
    log = _log.info if outcome is Outcome.TAKEN and one.attempts == 0 else _log.debug
    log(
        "events sent",
        type=one.envelope.type,
        peer=one.envelope.peer_id,
        number=one.number,
        items=content.items,
        attempt=one.attempts + 1,
        outcome=outcome.value,
        correlation_ids=content.correlation_ids,
    )
