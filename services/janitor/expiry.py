"""Zeroizes expired keys: deletes their records in batches that hold locks for milliseconds, and tells their sources.

The records of this KP go within a second of their expiry. Those of other KPs in the same store are left to their
own janitors, and swept up only when they should have been gone for a minute: a KP that is gone for good must not
leave its keys lying in a store that others go on using. What was sealed is unreadable all the same once its
epoch's private half is destroyed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from sqlalchemy import Connection, Engine

from skipbus.shared.logs import get_logger
from skipbus.shared.protocol.envelopes import EnvelopeType
from skipbus.shared.store.engine import driver_errors
from skipbus.shared.store.expiry import Expired, delete_expired, fetch_expired, fetch_stretch, fetch_targets
from skipbus.shared.store.packets import OutboxRow, insert_outbox_rows

BATCH = 4000
ABANDONED_AFTER_MS = 60_000
# Between batches the api has the store to itself: so long that a million keys take less than a minute, but for no less
# than half of the time that a batch took, or the api's callers would notice on a slow machine, and for no more than two
# and a half times as long: to issue a key takes the store over three times as long as to delete it, so it keeps up.
PACE_PER_SECOND = 18_000
LEAST_REST_RATIO = 0.5
GREATEST_REST_RATIO = 2.5

_log = get_logger("expiry")


class Zeroizer:
    """Deletes what has expired, one batch after another, as long as ``go_on`` says so."""

    def __init__(self, engine: Engine, local_id: str, go_on: Callable[[], bool]) -> None:
        self._engine = engine
        self._local_id = local_id
        self._go_on = go_on

    def zeroize_own(self, now_ms: int) -> int:
        """Deletes all records of this KP that had expired at ``now_ms``; how many."""
        return self._zeroize(self._local_id, now_ms)

    def zeroize_abandoned(self, now_ms: int) -> int:
        """Deletes records of other KPs that expired over a minute ago; how many."""
        with driver_errors(), self._engine.connect() as connection:
            others = [target for target in fetch_targets(connection) if target != self._local_id]
        return sum(self._zeroize(target, now_ms - ABANDONED_AFTER_MS) for target in others)

    def _zeroize(self, target_id: str, until_ms: int) -> int:
        total, from_ms, is_rest = 0, 0, False
        while not is_rest and self._go_on():
            started = time.monotonic()
            with driver_errors(), self._engine.begin() as connection:
                stretch = fetch_stretch(connection, target_id, from_ms, until_ms, BATCH)
                # A peer is told by the KP that the keys were for; whoever sweeps up for another says nothing.
                if target_id == self._local_id:
                    self._tell(connection, fetch_expired(connection, stretch), until_ms)
                total += delete_expired(connection, stretch)
            from_ms, is_rest = stretch.last_ms, stretch.is_rest
            if not is_rest:
                time.sleep(rest_seconds(time.monotonic() - started))
        if total:
            _log.info("keys zeroized", target=target_id, count=total)
        return total

    def _tell(self, connection: Connection, expired: Sequence[Expired], at_ms: int) -> None:
        rows = [
            OutboxRow(self._local_id, e.source_id, EnvelopeType.KEY_EXPIRED, e.payload, e.told, at_ms)
            for e in expired
            if e.told
        ]
        if rows:
            # As a literal: the driver takes milliseconds to escape a hundred thousand bytes.
            connection.exec_driver_sql(insert_outbox_rows(rows))


def rest_seconds(worked_seconds: float) -> float:
    """The pause after a whole batch that took ``worked_seconds``."""
    paced = BATCH / PACE_PER_SECOND - worked_seconds
    return min(max(paced, worked_seconds * LEAST_REST_RATIO), worked_seconds * GREATEST_REST_RATIO)
