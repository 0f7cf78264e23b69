"""Which of several syncers of one KP sends the outbox and heartbeats, and the sequence numbers that it may use.

The elected one holds a lease. The election saves work and carries no guarantee: rows are locked while they are
numbered, and a peer handles an envelope once however often it comes. Numbers are unique and growing, also after a
restart, a takeover and the loss of the store: peers reject a heartbeat whose number does not grow, and ignore an
envelope whose number they have seen. So the elected syncer notes in the store up to which number it may use, before it
uses them, and its successor continues after that.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable

from sqlalchemy import Engine

from skipbus.services.syncer import metrics
from skipbus.shared.errors import BackendError
from skipbus.shared.logging import get_logger
from skipbus.shared.store import peers
from skipbus.shared.store.election import Election
from skipbus.shared.store.engine import driver_errors

# Reserve 30 s of numbers; renew after 15 s. A killed syncer leaves unused numbers.
RESERVED_US = 30_000_000

_log = get_logger("leader")


def _clock_us() -> int:
    return time.time_ns() // 1000


class SequenceNumbers:
    """The numbers of one syncer, for any thread: the time in microseconds, or one more than the last number."""

    def __init__(self, clock_us: Callable[[], int] = _clock_us) -> None:
        self._clock_us = clock_us
        self._lock = threading.Lock()
        self._last = 0

    @property
    def last(self) -> int:
        """The greatest one that was handed out."""
        return self._last

    @property
    def upcoming(self) -> int:
        """What would be handed out now."""
        return max(self._clock_us(), self._last + 1)

    def next(self, known: int = 0) -> int:
        """A number greater than all handed out before and than ``known``."""
        with self._lock:
            self._last = max(self.upcoming, known + 1)
            return self._last


class Reservation:
    """What the store knows of the elected syncer's numbers. Blocking, for one thread at a time."""

    def __init__(self, engine: Engine, local_id: str, numbers: SequenceNumbers) -> None:
        self._engine = engine
        self._local_id = local_id
        self._numbers = numbers
        self._until = 0

    def take_over(self) -> None:
        """Before this syncer, newly elected, sends anything. Raises StoreUnavailable, StoreRefused."""
        with driver_errors(), self._engine.begin() as connection:
            used = peers.fetch_last_number(connection, self._local_id)
            if used != self._until:
                self._numbers.next(used)
            self._until = self._numbers.upcoming + RESERVED_US
            peers.upsert_last_number(connection, self._local_id, self._until)

    def renew(self) -> None:
        """Once a second while elected. Raises StoreUnavailable, StoreRefused."""
        until = self._numbers.upcoming + RESERVED_US
        if until - self._until < RESERVED_US // 2:
            return
        with driver_errors(), self._engine.begin() as connection:
            peers.upsert_last_number(connection, self._local_id, until)
        self._until = until

    def give_back(self) -> None:
        """At the end: what was not used is the successor's. Raises StoreUnavailable, StoreRefused."""
        with driver_errors(), self._engine.begin() as connection:
            peers.update_last_number(connection, self._local_id, self._until, self._numbers.last)


class Leader:
    """Asks once a second whether this syncer is the elected one. Each election begins a new ``term``."""

    def __init__(self, engine: Engine, local_id: str, reservation: Reservation) -> None:
        self._reservation = reservation
        self._election = Election(engine, f"syncer {local_id}")
        self._noted = False
        self.term = 0

    @property
    def elected(self) -> bool:
        """Whether this syncer is the elected one. It finds out by its own clock that its lease is over."""
        return self._noted and self._election.elected

    async def tick(self) -> None:
        """Holds on to the lease or tries to get it. Raises StoreUnavailable, StoreRefused: then it is not elected."""
        elected = False
        try:
            elected = await asyncio.to_thread(self._try)
        finally:
            self._note(elected)

    def close(self) -> None:
        """Gives the lease back for another syncer. Blocks."""
        if self._noted:
            with contextlib.suppress(BackendError):
                self._reservation.give_back()
        self._election.release()

    def _try(self) -> bool:
        held = self._election.elected
        if not self._election.tick():
            return False
        # Before anything is sent in this term: a peer would take numbers that were used before for a recording.
        if held and self._noted:
            self._reservation.renew()
        else:
            self._reservation.take_over()
        return True

    def _note(self, elected: bool) -> None:
        if elected != self._noted:
            self.term += elected
            _log.info("elected" if elected else "not elected", task="send envelopes")
        self._noted = elected
        metrics.ELECTED.set(elected)
