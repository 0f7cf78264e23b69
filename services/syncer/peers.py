"""What this syncer knows of its peers, read from the store once a second: announcements, pins, liveness, clocks.

Brings the schema up to date at the first reading that reaches the store; nothing else starts before that. A clock that
is too far off is reported by peer and amount. Such lines are limited, because anybody who can delay messages could
cause them. Accepted heartbeats record the peer's clock themselves; here are envelopes that were rejected by their date.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterable, Mapping

from sqlalchemy import Connection

from skipbus.services.syncer import metrics
from skipbus.shared.clock import now_ms
from skipbus.shared.crypto.epochs import MAX_CLOCK_SKEW_MS
from skipbus.shared.crypto.keyring import Keyring, check_pinned_identity
from skipbus.shared.liveness import PeerStatus, peer_status
from skipbus.shared.logging import get_logger
from skipbus.shared.peer_directory import PeerDirectory
from skipbus.shared.settings import Settings
from skipbus.shared.store.migrate import bring_up_to_date
from skipbus.shared.store.peers import PeerLiveness, fetch_liveness, upsert_clock_skew

CLOCK_REMINDER_SECONDS = 600.0

_log = get_logger("peers")


class PeerWatch:
    """Keeps the directory fresh, and logs when a peer comes, is late or goes. Of one event loop."""

    def __init__(self, settings: Settings, keyring: Keyring, directory: PeerDirectory) -> None:
        self._settings = settings
        self._keyring = keyring
        self._directory = directory
        self._statuses: dict[str, PeerStatus] = {}
        self.clocks = PeerClocks(settings.local_system_id)
        self.ready = asyncio.Event()

    async def tick(self) -> None:
        """One reading. Raises StoreUnavailable, StoreRefused; KeyringError where the store knows another identity."""
        rows = await asyncio.to_thread(self._read)
        self._compare({row.peer_id: row for row in rows}, now_ms())
        self.clocks.report(rows)
        self.ready.set()

    def status(self, peer_id: str) -> PeerStatus:
        """What the peer's heartbeats said at the last reading."""
        return self._statuses.get(peer_id, "offline")

    def _read(self) -> list[PeerLiveness]:
        if not self.ready.is_set():
            bring_up_to_date(self._settings.mysql)
        rows = self._directory.refresh_with(now_ms(), self._read_liveness)
        check_pinned_identity(self._keyring, self._directory.pin(self._keyring.system_id))
        return rows

    def _read_liveness(self, connection: Connection) -> list[PeerLiveness]:
        self.clocks.record(connection)
        return fetch_liveness(connection, self._settings.local_system_id)

    def _compare(self, rows: Mapping[str, PeerLiveness], at_ms: int) -> None:
        statuses = {peer: _status(rows.get(peer), at_ms) for peer in self._directory.peers()}
        for peer, status in statuses.items():
            before = self._statuses.get(peer)
            if status != before:
                _log_status(peer, before, status)
        self._statuses = statuses
        counts = Counter(statuses.values())
        for known in ("online", "late", "offline"):
            metrics.PEERS.labels(known).set(counts[known])


class PeerClocks:
    """``note`` on the event loop, ``record`` in a thread."""

    def __init__(self, local_id: str) -> None:
        self._local_id = local_id
        self._noted: dict[str, tuple[int, int]] = {}
        self._reminded: dict[str, float] = {}

    def note(self, peer_id: str, number: int, clock_skew_ms: int) -> None:
        """A peer's envelope was rejected for its date, after its signature was verified."""
        self._noted[peer_id] = (number, clock_skew_ms)

    def record(self, connection: Connection) -> None:
        """Stores what was noted since the last call, for the operator."""
        noted, self._noted = self._noted, {}
        for peer_id in sorted(noted):
            upsert_clock_skew(connection, self._local_id, peer_id, *noted[peer_id])

    def report(self, rows: Iterable[PeerLiveness]) -> None:
        """A line for each peer whose clock is too far off, at first and every ten minutes."""
        now = time.monotonic()
        for row in rows:
            skew_ms = row.clock_skew_ms or 0
            if abs(skew_ms) <= MAX_CLOCK_SKEW_MS:
                self._reminded.pop(row.peer_id, None)
            elif now - self._reminded.get(row.peer_id, -CLOCK_REMINDER_SECONDS) >= CLOCK_REMINDER_SECONDS:
                self._reminded[row.peer_id] = now
                _log.warning(
                    "clocks differ by too much",
                    peer=row.peer_id,
                    clock=_clock_words(skew_ms),
                    limit_seconds=MAX_CLOCK_SKEW_MS // 1000,
                )


def _status(row: PeerLiveness | None, at_ms: int) -> PeerStatus:
    return peer_status(row.last_heartbeat_ms, row.heartbeat_interval_ms, at_ms) if row else "offline"


def _log_status(peer: str, before: PeerStatus | None, status: PeerStatus) -> None:
    if status == "online":
        _log.info("peer online", peer=peer, before=before)
    elif before is None:
        _log.info("peer not heard yet", peer=peer)
    else:
        _log.warning(f"peer {status}", peer=peer, before=before)


def _clock_words(clock_skew_ms: int) -> str:
    """The amount and the direction, as an operator reads it."""
    seconds = abs(clock_skew_ms) / 1000
    return f"{seconds:.1f} s {'behind' if clock_skew_ms > 0 else 'ahead of'} the local one"
