"""Prunes everything else that grows: old wrapping keys, outbox and inbox rows, notes on expired keys, and processes
without a sign of life.
"""

from __future__ import annotations

from collections.abc import Callable

from sqlalchemy import Connection, Engine

from skipbus.shared.crypto.epochs import MAX_CLOCK_SKEW_MS
from skipbus.shared.logging import get_logger
from skipbus.shared.store.engine import driver_errors
from skipbus.shared.store.inbox import INBOX_LIFETIME_MS, delete_expired_inbox
from skipbus.shared.store.outbox import OUTBOX_LIFETIME_MS, delete_expired_outbox
from skipbus.shared.store.processes import delete_expired_processes
from skipbus.shared.store.stock import delete_expired_held
from skipbus.shared.store.withdrawn_keys import delete_expired_withdrawn
from skipbus.shared.store.wrapping_keys import delete_expired_wrapping_keys

_ROWS = 1000
_PROCESS_LIFETIME_MS = 3_600_000
# A record is stored until its expiry by either clock, so its withdrawal must be remembered for so long.
WITHDRAWN_KEPT_MS = 2 * MAX_CLOCK_SKEW_MS

_NOT_ACKNOWLEDGED = "a peer has not acknowledged them within 24 h; run 'skipctl peer check'"

_log = get_logger("pruning")


def prune(engine: Engine, local_id: str, now_ms: int, go_on: Callable[[], bool]) -> None:
    """Deletes old rows, one bounded batch in each transaction. Raises StoreUnavailable, StoreRefused."""
    _in_batches(engine, go_on, lambda c: delete_expired_wrapping_keys(c, now_ms, _ROWS))
    _in_batches(engine, go_on, lambda c: delete_expired_inbox(c, local_id, now_ms - INBOX_LIFETIME_MS, _ROWS))
    _in_batches(engine, go_on, lambda c: delete_expired_held(c, local_id, now_ms, _ROWS))
    _in_batches(engine, go_on, lambda c: delete_expired_withdrawn(c, local_id, now_ms - WITHDRAWN_KEPT_MS, _ROWS))
    given_up = _in_batches(
        engine, go_on, lambda c: delete_expired_outbox(c, local_id, now_ms - OUTBOX_LIFETIME_MS, _ROWS)
    )
    if given_up:
        _log.warning("events given up", count=given_up, reason=_NOT_ACKNOWLEDGED)
    with driver_errors(), engine.begin() as connection:
        delete_expired_processes(connection, local_id, now_ms - _PROCESS_LIFETIME_MS)


def _in_batches(engine: Engine, go_on: Callable[[], bool], delete: Callable[[Connection], int]) -> int:
    total = 0
    while go_on():
        with driver_errors(), engine.begin() as connection:
            count = delete(connection)
        total += count
        if count < _ROWS:
            break
    return total
