"""What this syncer knows of its peers, read from the store once a second: announcements, pins, who is alive.

Brings the schema up to date at the first reading that reaches the store; nothing else starts before that.
"""

from __future__ import annotations

import asyncio
import functools
from collections import Counter

from sqlalchemy import Engine

from skipbus.services.syncer import metrics
from skipbus.services.syncer.clocks import Clocks
from skipbus.shared.clock import now_ms
from skipbus.shared.crypto.keyring import Keyring, check_pinned_identity
from skipbus.shared.glance import Glance
from skipbus.shared.hop import Hop
from skipbus.shared.liveness import PeerStatus, peer_status
from skipbus.shared.logs import get_logger
from skipbus.shared.peer_directory import PeerDirectory
from skipbus.shared.settings import Settings
from skipbus.shared.store.glances import look_at_signs
from skipbus.shared.store.migrate import bring_up_to_date
from skipbus.shared.store.peers import PeerLiveness

_log = get_logger("watch")


class PeerWatch:
    """Keeps the directory fresh and tells when a peer comes, falls silent or goes."""

    def __init__(
        self, settings: Settings, engine: Engine, keyring: Keyring, directory: PeerDirectory, hop: Hop
    ) -> None:
        local_id, bus = settings.local_system_id, bool(settings.bus_peers)
        self._look = functools.partial(look_at_signs, local_id=local_id, bus=bus)
        self._glance = Glance(settings.mysql)
        self._hop = hop
        self._settings = settings
        self._keyring = keyring
        self._directory = directory
        self._statuses: dict[str, PeerStatus] = {}
        self.clocks = Clocks(engine, settings.local_system_id)
        self.ready = asyncio.Event()

    async def tick(self) -> None:
        """One reading. Raises StoreUnavailable, StoreRefused; KeyringError where the store knows another identity."""
        rows = await self._hop.run(self._read)
        self._compare({row.peer_id: row for row in rows}, now_ms())
        self.clocks.tell(rows)
        self.ready.set()

    def status(self, peer_id: str) -> PeerStatus:
        """What the peer's heartbeats said at the last reading."""
        return self._statuses.get(peer_id, "offline")

    def close(self) -> None:
        """Gives its connection back."""
        self._glance.close()

    def _read(self) -> list[PeerLiveness]:
        if not self.ready.is_set():
            bring_up_to_date(self._settings.mysql)
        self.clocks.write()
        digests, rows = self._glance.read(self._look)
        if not self._directory.is_current(digests, at_ms := now_ms()):
            self._directory.refresh(at_ms)
        check_pinned_identity(self._keyring, self._directory.pin(self._keyring.system_id))
        return rows

    def _compare(self, rows: dict[str, PeerLiveness], at_ms: int) -> None:
        statuses = {peer: _status(rows.get(peer), at_ms) for peer in self._directory.peers()}
        for peer, status in statuses.items():
            before = self._statuses.get(peer)
            if status != before:
                _tell(peer, before, status)
        self._statuses = statuses
        counts = Counter(statuses.values())
        for known in ("online", "late", "offline"):
            metrics.PEERS.labels(known).set(counts[known])


def _status(row: PeerLiveness | None, at_ms: int) -> PeerStatus:
    return peer_status(row.last_heartbeat_ms, row.heartbeat_interval_ms, at_ms) if row else "offline"


def _tell(peer: str, before: PeerStatus | None, status: PeerStatus) -> None:
    if status == "online":
        _log.info("peer online", peer=peer, before=before)
    elif before is None:
        _log.info("peer not heard yet", peer=peer)
    else:
        _log.warning(f"peer {status}", peer=peer, before=before)
