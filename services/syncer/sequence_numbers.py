"""Sequence numbers of envelopes: unique and growing, also after a restart, a takeover and the loss of the store.

A number is the time in microseconds, or one more than the last one where that is greater. Peers take a heartbeat whose
number does not grow for a recording, and an envelope whose number they have seen for a copy of that one. A syncer that
takes over has a clock of its own, which may be behind that of the one before. So the elected one notes in the store up
to which number it may have used some, ahead of using them, and its successor goes on after that.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from sqlalchemy import Engine

from skipbus.shared.store import peers
from skipbus.shared.store.engine import driver_errors

# How far ahead numbers are noted: half of it may pass without the store. A syncer that was killed wastes the unused.
RESERVED_US = 30_000_000


def _clock_us() -> int:
    return time.time_ns() // 1000


class SequenceNumbers:
    """Hands out the numbers of one syncer, to any thread."""

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
