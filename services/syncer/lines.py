"""One line of envelopes for each peer, and the sending: a peer that is away or slow holds up no other.

Over the bus several envelopes of a peer are on their way at once. To a peer with an endpoint there is one at a time,
and after one that could not be delivered the rest waits too, so that what is sent in order arrives in order. Within
what is ready, keys that an encryptor waits for go first.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import islice

from skipbus.services.syncer.outgoing import Letter, Outcome, Outgoing
from skipbus.services.syncer.row_types import urgency
from skipbus.services.syncer.schedule import is_due
from skipbus.shared.clock import now_ms
from skipbus.shared.errors import BackendError
from skipbus.shared.liveness import PeerStatus
from skipbus.shared.logs import get_logger
from skipbus.shared.store.messages import OutboxEnvelope

CHUNK = 32
# Chunks of one peer that are being sent at the same time.
IN_FLIGHT = 4
# Envelopes of one peer whose content is kept in memory until it is sent; that of others is read again.
MAX_HELD_LETTERS = 16
# Envelopes of one peer that are sent again in one round: one that acknowledges nothing must not keep this KP signing.
MAX_DUE = 256
_NOT_SENT = frozenset({Outcome.LOST, Outcome.HELD_UP})

_log = get_logger("outbox")


@dataclass(slots=True, eq=False)
class Waiting:
    """An envelope that is not acknowledged. ``letter`` is there when it was just made, ``seen_at`` is monotonic.

    ``read`` says that its content was read once, and ``keys_expire_ms`` is the letter's, known since then.
    """

    envelope: OutboxEnvelope
    letter: Letter | None = None
    seen_at: float = field(default_factory=time.monotonic)
    attempts: int = 0
    sent_ms: int | None = None
    unrouted: bool = False
    refused: bool = False
    queued: bool = False
    malformed: bool = False
    read: bool = False
    keys_expire_ms: int | None = None

    def __post_init__(self) -> None:
        self.attempts, self.sent_ms = self.envelope.attempts, self.envelope.sent_ms

    def put(self, letter: Letter | None) -> None:
        """It was just made; None where its rows are malformed."""
        self.letter, self.malformed = letter, letter is None
        if letter is not None:
            self.note_read(letter)

    def note_read(self, letter: Letter) -> None:
        """This is its content."""
        self.read, self.keys_expire_ms = True, letter.keys_expire_ms

    @property
    def peer_id(self) -> str:
        return self.envelope.peer_id

    @property
    def number(self) -> int:
        return self.envelope.number


class Line:
    """What waits for one peer: all of it, and what is ready to be sent."""

    def __init__(self, peer_id: str) -> None:
        self.peer_id = peer_id
        self.waiting: dict[int, Waiting] = {}
        self.ready: list[Waiting] = []
        self.sending = 0
        self._attempts: dict[int, int] = {}

    @property
    def busy(self) -> bool:
        """Whether anything is ready or on its way."""
        return bool(self.ready or self.sending or self._attempts)

    def add(self, waiting: Waiting) -> None:
        """One more; nothing where it is known already."""
        self.waiting.setdefault(waiting.number, waiting)

    def forget(self, numbers: Iterable[int]) -> None:
        """These wait no longer."""
        for number in numbers:
            self.waiting.pop(number, None)
            self._attempts.pop(number, None)

    def note_refused(self, number: int) -> None:
        """The peer does not take it."""
        waiting = self.waiting.get(number)
        if waiting is not None:
            waiting.refused = True

    def due(self, status: PeerStatus, at_ms: int) -> list[Waiting]:
        """What is to be sent, now or again, and is not on its way; of much of it the first MAX_DUE."""
        due = (
            one
            for one in self.waiting.values()
            if not one.queued
            and is_due(one.attempts, one.sent_ms, status, at_ms, unrouted=one.unrouted, refused=one.refused)
        )
        return list(islice(due, MAX_DUE))

    def unread(self, limit: int) -> list[Waiting]:
        """Of which it is not known when they become pointless: a syncer that is gone has numbered them."""
        return list(islice((one for one in self.waiting.values() if not one.read and not one.queued), limit))

    def pointless(self, before_ms: int) -> list[int]:
        """Numbers of what speaks only of keys that had expired at ``before_ms`` and is not on its way."""
        return [
            one.number
            for one in self.waiting.values()
            if one.keys_expire_ms is not None and one.keys_expire_ms < before_ms and not one.queued
        ]

    def take(self, limit: int) -> list[Waiting]:
        """The next ones to send."""
        taken, self.ready = self.ready[:limit], self.ready[limit:]
        return taken

    def put_off(self) -> None:
        """What is ready is left for the next tick."""
        for one in self.ready:
            one.queued, one.letter = False, None
        self.ready = []

    def note_sent(self, one: Waiting, outcome: Outcome, at_ms: int) -> None:
        """What became of one that was sent."""
        one.queued, one.letter = False, None
        if outcome in _NOT_SENT:
            return
        one.attempts, one.sent_ms = one.attempts + 1, at_ms
        one.unrouted = outcome is Outcome.NO_QUEUE
        one.refused = outcome is Outcome.REFUSED
        # Not where the acknowledgement was faster than this.
        if one.number in self.waiting:
            self._attempts[one.number] = at_ms

    def take_attempts(self) -> list[tuple[str, int, int]]:
        """Peer, time and number of what was sent since the last call and still waits."""
        attempts, self._attempts = self._attempts, {}
        return [(self.peer_id, sent_ms, number) for number, sent_ms in attempts.items()]


class Sending:
    """Sends what is ready. ``open_letters`` reads the content of envelopes from the store, by number."""

    def __init__(
        self,
        open_letters: Callable[[list[Waiting]], Awaitable[dict[int, Letter]]],
        status: Callable[[str], PeerStatus],
        outgoing: Outgoing,
        stopping: Callable[[], bool],
    ) -> None:
        self._open_letters = open_letters
        self._status = status
        self._outgoing = outgoing
        self._stopping = stopping
        self._tasks: asyncio.TaskGroup | None = None
        # Reading must leave connections to the store for what is more urgent.
        self._reading = asyncio.Semaphore(2)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Sends for as long as the block runs, and what is on its way after that."""
        async with asyncio.TaskGroup() as self._tasks:
            yield

    def queue(self, line: Line, envelopes: Collection[Waiting]) -> None:
        """These are to be sent now."""
        if not envelopes and not line.ready:
            return
        for one in envelopes:
            one.queued = True
            if len(line.ready) >= MAX_HELD_LETTERS:
                one.letter = None
        line.ready.extend(envelopes)
        line.ready.sort(key=lambda one: (urgency(one.envelope.type), one.number))
        self._start(line)

    def _start(self, line: Line) -> None:
        in_flight = 1 if self._outgoing.has_link(line.peer_id) else IN_FLIGHT
        while line.ready and line.sending < in_flight and self._tasks is not None and not self._stopping():
            if not self._outgoing.is_open(line.peer_id):
                line.put_off()
                return
            chunk = line.take(1 if in_flight == 1 else CHUNK)
            line.sending += 1
            self._tasks.create_task(self._send(line, chunk), name=f"send {line.peer_id}")

    async def _send(self, line: Line, chunk: list[Waiting]) -> None:
        sent = False
        try:
            sent = await self._send_chunk(line, chunk)
        except BackendError as error:
            _log.debug("envelopes not read", peer=line.peer_id, reason=str(error))
        finally:
            line.sending -= 1
            for one in chunk:
                one.queued, one.letter = False, None
        if sent:
            self._start(line)
        else:
            line.put_off()

    async def _send_chunk(self, line: Line, chunk: list[Waiting]) -> bool:
        """Whether all of it could be sent."""
        letters = await self._letters_of(line, chunk)
        outcomes = await self._outgoing.send([letter for _, letter in letters])
        at_ms = now_ms()
        for (one, letter), outcome in zip(letters, outcomes, strict=True):
            _tell_sent(one, letter, outcome)
            line.note_sent(one, outcome, at_ms)
        return _NOT_SENT.isdisjoint(outcomes)

    async def _letters_of(self, line: Line, chunk: list[Waiting]) -> list[tuple[Waiting, Letter]]:
        """With their content, without those that were acknowledged or withdrawn meanwhile."""
        still = [one for one in chunk if one.number in line.waiting]
        unread = [one for one in still if one.letter is None]
        opened: dict[int, Letter] = {}
        if unread:
            async with self._reading:
                opened = await self._open_letters(unread)
            line.forget({one.number for one in unread} - opened.keys())
        found = ((one, one.letter or opened.get(one.number)) for one in still)
        return [(one, letter) for one, letter in found if letter is not None]


def _tell_sent(one: Waiting, letter: Letter, outcome: Outcome) -> None:
    count, correlation_ids = letter.told
    tell = _log.info if outcome is Outcome.TAKEN and one.attempts == 0 else _log.debug
    tell(
        "events sent",
        type=one.envelope.type,
        peer=one.peer_id,
        number=one.number,
        items=count,
        attempt=one.attempts + 1,
        outcome=outcome.value,
        correlation_ids=correlation_ids,
    )
