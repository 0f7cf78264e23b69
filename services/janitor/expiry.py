"""Zeroizes expired keys: deletes their records in batches that hold locks for milliseconds, and notifies their sources.

Records of this KP are deleted within a second of their expiry. Records of other KPs in the same store are left to
their own janitors and deleted here only a minute after their expiry, so that a KP that never comes back leaves no keys
in the store. A sealed key is unreadable in any case once its epoch's private half is destroyed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from sqlalchemy import Connection, Engine

from skipbus.shared.logging import get_logger
from skipbus.shared.protocol.envelopes import EnvelopeType
from skipbus.shared.store.engine import driver_errors
from skipbus.shared.store.key_records import Expired, delete_expired, fetch_expired, fetch_key_range, fetch_targets
from skipbus.shared.store.outbox import OutboxRow, insert_outbox_rows

BATCH = 4000
ABANDONED_AFTER_MS = 60_000
# Pauses between batches leave the store to the api. A million keys still go in less than a minute. A pause is at least
# half of the batch's time, so that callers do not notice on a slow machine, and at most two and a half times as long:
# issuing a key costs the store more than three times as much as deleting it, so deleting keeps up.
PACE_PER_SECOND = 18_000
MIN_PAUSE_RATIO = 0.5
MAX_PAUSE_RATIO = 2.5

_log = get_logger("expiry")


class Zeroizer:
    """Deletes expired records, one batch after another, while ``go_on`` returns true."""

    def __init__(self, engine: Engine, local_id: str, go_on: Callable[[], bool]) -> None:
        self._engine = engine
        self._local_id = local_id
        self._go_on = go_on

    def zeroize_own(self, now_ms: int) -> int:
        """Deletes all records of this KP that expired before ``now_ms`` (UTC ms), and returns their number."""
        return self._zeroize(self._local_id, now_ms)

    def zeroize_abandoned(self, now_ms: int) -> int:
        """Deletes records of other KPs that expired more than a minute ago, and returns their number."""
        with driver_errors(), self._engine.connect() as connection:
            others = [target for target in fetch_targets(connection) if target != self._local_id]
        return sum(self._zeroize(target, now_ms - ABANDONED_AFTER_MS) for target in others)

    def _zeroize(self, target_id: str, until_ms: int) -> int:
        total, from_ms, is_rest = 0, 0, False
        while not is_rest and self._go_on():
            started = time.monotonic()
            with driver_errors(), self._engine.begin() as connection:
                key_range = fetch_key_range(connection, target_id, from_ms, until_ms, BATCH)
                # Only the keys' own target notifies their sources.
                if target_id == self._local_id:
                    self._notify(connection, fetch_expired(connection, key_range), until_ms)
                total += delete_expired(connection, key_range)
            from_ms, is_rest = key_range.last_ms, key_range.is_rest
            if not is_rest:
                time.sleep(pause_seconds(time.monotonic() - started))
        if total:
            _log.info("keys zeroized", target=target_id, count=total)
        return total

    def _notify(self, connection: Connection, expired: Sequence[Expired], at_ms: int) -> None:
        rows = [
            OutboxRow(self._local_id, e.source_id, EnvelopeType.KEY_EXPIRED.value, e.payload, e.items, at_ms)
            for e in expired
            if e.items
        ]
        insert_outbox_rows(connection, rows)


def pause_seconds(worked_seconds: float) -> float:
    """The pause after a full batch that took ``worked_seconds``."""
    paced = BATCH / PACE_PER_SECOND - worked_seconds
    return min(max(paced, worked_seconds * MIN_PAUSE_RATIO), worked_seconds * MAX_PAUSE_RATIO)
