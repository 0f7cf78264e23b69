"""Which of several syncers of one KP relays the outbox and sends heartbeats: the one that holds a MySQL lock.

The election saves work. It carries no guarantee: rows are locked while they are numbered, and a peer handles an
envelope once however often it comes. ``term`` changes whenever this syncer is elected anew, so that whoever keeps
something in memory knows to read it again.
"""

from __future__ import annotations

import asyncio
import contextlib

from skipbus.services.syncer import metrics
from skipbus.services.syncer.sequence_numbers import Reservation
from skipbus.shared.errors import BackendError
from skipbus.shared.logging import get_logger
from skipbus.shared.settings import MySqlSettings
from skipbus.shared.store.election import Election

_log = get_logger("leader")


class Leader:
    """Asks once a second whether this syncer is the elected one."""

    def __init__(self, mysql: MySqlSettings, local_id: str, reservation: Reservation) -> None:
        self._reservation = reservation
        self._election = Election(mysql, f"syncer {local_id}")
        self.elected = False
        self.term = 0

    async def tick(self) -> None:
        """Holds on to the lock or tries to get it. Raises StoreUnavailable, StoreRefused: then it is not held."""
        elected = False
        try:
            elected = await asyncio.to_thread(self._try)
        finally:
            self._settle(elected)

    def close(self) -> None:
        """Gives the lock up for another syncer. Blocks."""
        if self.elected:
            with contextlib.suppress(BackendError):
                self._reservation.give_back()
        self._election.release()

    def _try(self) -> bool:
        held = self._election.held()
        if not held and not self._election.acquire():
            return False
        # Before anything is sent in this term: a peer would take numbers that were used before for a recording.
        if held and self.elected:
            self._reservation.renew()
        else:
            self._reservation.take_over()
        return True

    def _settle(self, elected: bool) -> None:
        if elected != self.elected:
            self.term += elected
            _log.info("elected" if elected else "not elected")
        self.elected = elected
        metrics.ELECTED.set(elected)
