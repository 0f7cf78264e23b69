"""Whose clock is too far from the local one: told by name and amount, and kept for the operator.

Every accepted heartbeat shows it as well as one way can, and is written with the heartbeat (``effects``). What
stands here is for envelopes that were refused by their date, and for the log. The lines are limited: anybody who can
delay messages could cause them.
"""

from __future__ import annotations

import time

from sqlalchemy import Engine

from skipbus.shared.crypto.epochs import MAX_CLOCK_SKEW_MS
from skipbus.shared.logs import get_logger
from skipbus.shared.store.engine import driver_errors
from skipbus.shared.store.peers import PeerLiveness, upsert_clock_skew

REMINDER_SECONDS = 600.0

_log = get_logger("clocks")


class Clocks:
    """``note`` on the event loop, ``write`` in a thread; of one KP's peers."""

    def __init__(self, engine: Engine, local_id: str) -> None:
        self._engine = engine
        self._local_id = local_id
        self._noted: dict[str, tuple[int, int]] = {}
        self._told: dict[str, float] = {}

    def note(self, peer_id: str, number: int, clock_skew_ms: int) -> None:
        """A peer's envelope was refused by its date, after its signature was verified."""
        self._noted[peer_id] = (number, clock_skew_ms)

    def write(self) -> None:
        """Keeps what was noted since the last call. Raises StoreUnavailable, StoreRefused."""
        noted, self._noted = self._noted, {}
        if noted:
            with driver_errors(), self._engine.begin() as connection:
                for peer_id in sorted(noted):
                    upsert_clock_skew(connection, self._local_id, peer_id, *noted[peer_id])

    def tell(self, rows: list[PeerLiveness]) -> None:
        """A line for each peer whose clock is too far off, at first and every ten minutes."""
        now = time.monotonic()
        for row in rows:
            if abs(row.clock_skew_ms or 0) <= MAX_CLOCK_SKEW_MS:
                self._told.pop(row.peer_id, None)
            elif now - self._told.get(row.peer_id, -REMINDER_SECONDS) >= REMINDER_SECONDS:
                self._told[row.peer_id] = now
                _log.warning(
                    "clocks differ by too much",
                    peer=row.peer_id,
                    clock=clock_words(row.clock_skew_ms or 0),
                    limit_seconds=MAX_CLOCK_SKEW_MS // 1000,
                )


def clock_words(clock_skew_ms: int) -> str:
    """The amount and the direction, as an operator reads it."""
    seconds = abs(clock_skew_ms) / 1000
    return f"{seconds:.1f} s {'behind' if clock_skew_ms > 0 else 'ahead of'} the local one"
