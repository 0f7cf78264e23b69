"""Carries the outbox: gathers its rows into envelopes, sends them, and sends them again until they are acknowledged.

Order: an envelope gets its number in a committed transaction before it is sent, and keeps it. A crash between
commit and sending leaves a numbered envelope that was never sent, which whoever takes over sends. The counters
of what this KP did are added to in the transaction that numbers, so an event counts once however often it is sent.

Which envelopes wait for an acknowledgement is kept in memory, because looking through all of them every second
would cost more the longer a peer is away. Memory may be behind the store, never ahead of it: an envelope whose
rows are gone is dropped when its turn comes. What is new is sent as soon as a notification tells of it; what is due
again is looked for once a second. How often something was sent is written down afterwards, if it still waits then.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import groupby

from sqlalchemy import Connection, Engine

from skipbus.services.syncer import metrics
from skipbus.services.syncer.abandoned import withdraw_abandoned
from skipbus.services.syncer.leader import Leader
from skipbus.services.syncer.letters import LetterMaker, gather
from skipbus.services.syncer.lines import Line, Sending, Waiting
from skipbus.services.syncer.outgoing import Letter, Outgoing
from skipbus.services.syncer.row_types import counter_when_numbered
from skipbus.services.syncer.watch import PeerWatch
from skipbus.shared.clock import now_ms
from skipbus.shared.crypto.epochs import MAX_CLOCK_SKEW_MS
from skipbus.shared.errors import BackendError, StoreRefused, StoreUnavailable
from skipbus.shared.lifecycle import next_beat
from skipbus.shared.logs import get_logger
from skipbus.shared.settings import Settings
from skipbus.shared.store import messages, peers
from skipbus.shared.store.engine import driver_errors
from skipbus.shared.store.messages import OutboxEntry, OutboxEnvelope
from skipbus.shared.store.outbox import KEY_PLACED
from skipbus.shared.store.wrapping_keys import fetch_sealed_wrapping_keys

MAX_ROWS = 500
TICK_SECONDS = 1.0
# How often the store is asked for envelopes that this syncer does not know of: another one may have numbered them
# in the moment in which it lost the election.
READ_AGAIN_SECONDS = 60.0
# After this many timeouts whoever waited for keys on demand has given up, or is dead.
ABANDONED_AFTER_TIMEOUTS = 3
# After the expiry of the last key that an envelope speaks of; by then it has passed by whatever clock.
POINTLESS_AFTER_MS = 2 * MAX_CLOCK_SKEW_MS
# Envelopes of one peer that are read in one round only to learn when they become pointless.
MAX_UNREAD = 16
# Envelopes whose rows are deleted in one transaction.
MAX_DROPPED = 32

_log = get_logger("outbox")


class Relay:
    """Works only while this syncer is the elected one."""

    def __init__(
        self,
        settings: Settings,
        engine: Engine,
        leader: Leader,
        watch: PeerWatch,
        outgoing: Outgoing,
        stopping: Callable[[], bool],
        wake_up: asyncio.Event,
    ) -> None:
        """``wake_up`` is set by whoever knows of new rows."""
        self._engine = engine
        self._local_id = settings.local_system_id
        self._leader = leader
        self._watch = watch
        self._outgoing = outgoing
        self._numbers = outgoing.numbers
        self._stopping = stopping
        self._abandoned_seconds = ABANDONED_AFTER_TIMEOUTS * settings.sync_timeout_seconds
        self._lines: dict[str, Line] = {}
        self._sending = Sending(self._open_letters, watch.status, outgoing, stopping)
        self._letters = LetterMaker()
        self._malformed: set[tuple[str, int]] = set()
        self._wake_up = wake_up
        self._term = 0
        self._read_at = 0.0
        self._tick_at = 0.0
        self._refused = False

    def wake(self) -> None:
        """There are new rows in the outbox."""
        self._wake_up.set()

    def forget(self, peer_id: str, numbers: Collection[int]) -> None:
        """The peer has acknowledged these envelopes, and their rows are gone."""
        line = self._lines.get(peer_id)
        if line is not None:
            line.forget(numbers)

    def note_refused(self, peer_id: str, number: int) -> None:
        """The peer does not take this envelope: it is left alone for a while."""
        line = self._lines.get(peer_id)
        if line is not None:
            line.note_refused(number)

    async def run(self, stop: asyncio.Event) -> None:
        """Until ``stop``; then what is on its way is still sent."""
        waking = asyncio.create_task(self._wake_at(stop), name="wake outbox")
        try:
            async with self._sending.running():
                while not stop.is_set():
                    await self._quietly()
                    await self._pause()
        finally:
            waking.cancel()

    async def _quietly(self) -> None:
        """One round, without a word on a store that is away: the watch tells of that, once for all."""
        try:
            await self._round()
            self._refused = False
        except StoreUnavailable as error:
            _log.debug("store away", what="outbox", reason=str(error))
        except StoreRefused as error:
            if not self._refused:
                _log.warning("backend away", what="outbox", reason=str(error))
            self._refused = True

    async def _wake_at(self, stop: asyncio.Event) -> None:
        await stop.wait()
        self._wake_up.set()

    async def _pause(self) -> None:
        """Until there are new rows, or the next tick."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(self._tick_at):
                await self._wake_up.wait()

    async def _round(self) -> None:
        self._wake_up.clear()
        now = asyncio.get_running_loop().time()
        due = now >= self._tick_at
        if due:
            self._tick_at = next_beat(now, TICK_SECONDS)
        if not self._leader.elected:
            return
        await self._take_over()
        await self._number_all()
        if due:
            await self._tick()

    async def _take_over(self) -> None:
        term, now = self._leader.term, time.monotonic()
        if self._term == term and now - self._read_at < READ_AGAIN_SECONDS:
            return
        try:
            found = await asyncio.to_thread(self._read_waiting)
        except BackendError as error:
            if self._term != term:
                raise
            # Only to be sure that nothing was missed: new rows must not wait for it.
            _log.debug("waiting envelopes not read again", reason=str(error))
            self._read_at = now
            return
        if self._term != term:
            self._lines = {}
            self._malformed.clear()
        # Numbers grow even where the clock was set back meanwhile.
        self._numbers.next(max((envelope.number for envelope in found), default=0))
        for envelope in found:
            line = self._line(envelope.peer_id)
            if (envelope.peer_id, envelope.number) not in self._malformed:
                line.add(Waiting(envelope))
        self._term, self._read_at = term, now

    def _read_waiting(self) -> list[OutboxEnvelope]:
        with driver_errors(), self._engine.connect() as connection:
            return messages.fetch_envelopes(connection, self._local_id)

    async def _number_all(self) -> None:
        more = True
        while more and not self._stopping():
            numbered, more = await asyncio.to_thread(self._number)
            self._queue(numbered)

    def _queue(self, numbered: Sequence[Waiting]) -> None:
        for waiting in numbered:
            line = self._line(waiting.peer_id)
            line.add(waiting)
            if not waiting.malformed:
                self._sending.queue(line, [waiting])
        self._note_malformed(numbered)

    async def _tick(self) -> None:
        """What follows from time alone: what is due again, what was abandoned, what is to be written down."""
        at_ms = now_ms()
        for line in self._lines.values():
            self._sending.queue(line, line.due(self._watch.status(line.peer_id), at_ms))
        metrics.OUTBOX.set(sum(len(line.waiting) for line in self._lines.values()))
        if attempts := [taken for line in self._lines.values() if (taken := line.take_attempts())]:
            await asyncio.to_thread(self._store_attempts, attempts)
        await self._withdraw_abandoned()
        await self._drop_pointless(at_ms - POINTLESS_AFTER_MS)
        self._lines = {peer_id: line for peer_id, line in self._lines.items() if line.waiting or line.busy}

    def _line(self, peer_id: str) -> Line:
        line = self._lines.get(peer_id)
        if line is None:
            line = self._lines[peer_id] = Line(peer_id)
        return line

    def _number(self) -> tuple[list[Waiting], bool]:
        """Makes envelopes of the oldest rows; the envelopes, and whether there may be more rows."""
        with driver_errors(), self._engine.begin() as connection:
            rows = messages.claim_unsent_rows(connection, self._local_id, MAX_ROWS)
            groups = gather(rows)
            numbered = [self._number_group(connection, group) for group in groups]
        return numbered, sum(map(len, groups)) < len(rows) or len(rows) == MAX_ROWS

    def _number_group(self, connection: Connection, group: list[OutboxEntry]) -> Waiting:
        row_ids = [row.id for row in group]
        items = sum(row.items for row in group)
        envelope = OutboxEnvelope(group[0].peer_id, self._numbers.next(), group[0].type, items, 0, None)
        payloads = messages.fetch_row_payloads(connection, row_ids)
        waiting = Waiting(envelope)
        waiting.put(self._letters.make(functools.partial(fetch_sealed_wrapping_keys, connection), envelope, payloads))
        messages.update_numbered(connection, row_ids, envelope.number)
        counter = counter_when_numbered(envelope.type)
        if counter and items:
            peers.add_to_counters(connection, self._local_id, envelope.peer_id, {counter: items})
        return waiting

    def _note_malformed(self, numbered: Iterable[Waiting]) -> None:
        """They stay in the store for an operator to look at, and are not looked at here again."""
        for waiting in numbered:
            if waiting.malformed:
                self._malformed.add((waiting.peer_id, waiting.number))
                self.forget(waiting.peer_id, [waiting.number])

    async def _open_letters(self, envelopes: list[Waiting]) -> dict[int, Letter]:
        """By number; without those whose rows are gone or malformed. Raises StoreUnavailable, StoreRefused."""
        letters, malformed = await asyncio.to_thread(self._read_letters, envelopes)
        self._note_malformed(malformed)
        return letters

    def _read_letters(self, envelopes: list[Waiting]) -> tuple[dict[int, Letter], list[Waiting]]:
        letters: dict[int, Letter] = {}
        malformed: list[Waiting] = []
        maker = LetterMaker()
        with driver_errors(), self._engine.connect() as connection:
            fetch_wrapping_keys = functools.partial(fetch_sealed_wrapping_keys, connection)
            for one in envelopes:
                payloads = messages.fetch_payloads(connection, self._local_id, one.peer_id, one.number)
                letter = maker.make(fetch_wrapping_keys, one.envelope, payloads) if payloads else None
                if letter is not None:
                    one.note_read(letter)
                    letters[one.number] = letter
                elif payloads:
                    one.malformed = True
                    malformed.append(one)
        return letters, malformed

    def _store_attempts(self, attempts: list[list[tuple[str, int, int]]]) -> None:
        for of_line in attempts:
            # Envelopes that were sent at one time are written down together.
            for (peer_id, sent_ms), group in groupby(sorted(of_line), key=lambda one: one[:2]):
                with driver_errors(), self._engine.begin() as connection:
                    numbers = [number for _, _, number in group]
                    messages.update_sent(connection, self._local_id, peer_id, numbers, sent_ms)

    async def _withdraw_abandoned(self) -> None:
        """Keys on demand that nobody has settled: their api has died, and must not find them placed later."""
        before = time.monotonic() - self._abandoned_seconds
        for line in self._lines.values():
            numbers = [w.number for w in line.waiting.values() if w.envelope.type == KEY_PLACED and w.seen_at < before]
            if not numbers:
                continue
            count = await asyncio.to_thread(withdraw_abandoned, self._engine, self._local_id, line.peer_id, numbers)
            line.forget(numbers)
            if count:
                _log.warning("keys withdrawn that nobody waits for any more", peer=line.peer_id, count=count)
                self.wake()

    async def _drop_pointless(self, before_ms: int) -> None:
        """What speaks only of keys that had expired then: a peer that acknowledges nothing must not gather it."""
        for line in self._lines.values():
            if unread := line.unread(MAX_UNREAD):
                letters = await self._open_letters(unread)
                line.forget({one.number for one in unread} - letters.keys())
            numbers = line.pointless(before_ms)
            for start in range(0, len(numbers), MAX_DROPPED):
                await asyncio.to_thread(self._delete, line.peer_id, numbers[start : start + MAX_DROPPED])
            line.forget(numbers)
            if numbers:
                _log.info("not acknowledged while the keys lived, given up", peer=line.peer_id, envelopes=len(numbers))

    def _delete(self, peer_id: str, numbers: Collection[int]) -> None:
        with driver_errors(), self._engine.begin() as connection:
            messages.delete_acknowledged(connection, self._local_id, peer_id, numbers)
