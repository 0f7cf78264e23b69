"""What this process knows of the store, read once a second in a thread, so that no request has to ask.

Health, status and the choice of an epoch all come from the last reading. While the store is away the last
reading stays, with its age. The store's schema is brought up to date by the first reading that reaches it.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from sqlalchemy import Engine

from skipbus.shared.clock import now_ms
from skipbus.shared.crypto.epochs import current_epoch
from skipbus.shared.crypto.keyring import Keyring, check_pinned_identity
from skipbus.shared.peer_directory import PeerDirectory
from skipbus.shared.settings import Settings
from skipbus.shared.store.engine import driver_errors
from skipbus.shared.store.migrate import bring_up_to_date
from skipbus.shared.store.peers import PeerRow, fetch_peer_rows
from skipbus.shared.store.processes import ProcessSeen, fetch_processes

# A reading every second: three missed ones, or one that hangs, and the store counts as away.
STORE_AWAY_AFTER_MS = 3000


@dataclass(frozen=True)
class Reading:
    """One reading: when (UTC ms), and what stood in the store."""

    at_ms: int
    peers: tuple[PeerRow, ...]
    processes: tuple[ProcessSeen, ...]


class StoreView:
    """Reads the store for the api."""

    def __init__(self, settings: Settings, engine: Engine, keyring: Keyring, directory: PeerDirectory) -> None:
        self._settings = settings
        self._engine = engine
        self._keyring = keyring
        self._directory = directory
        self._schema_checked = False
        self.reading = Reading(0, (), ())

    @property
    def store_present(self) -> bool:
        """Whether the store answered lately."""
        return now_ms() - self.reading.at_ms < STORE_AWAY_AFTER_MS

    @property
    def epoch_present(self) -> bool:
        """Whether this KP has announced an epoch for the present time, so that peers can seal to it."""
        own = self._directory.get(self._settings.local_system_id)
        return own is not None and current_epoch(own.epochs, now_ms()) is not None

    async def refresh(self) -> None:
        """One reading. Raises BackendError while the store is away, KeyringError for one it does not know."""
        await asyncio.to_thread(self._refresh)

    def _refresh(self) -> None:
        if not self._schema_checked:
            bring_up_to_date(self._settings.mysql)
            self._schema_checked = True
        local_id = self._settings.local_system_id
        with driver_errors(), self._engine.connect() as connection:
            peers, processes = fetch_peer_rows(connection, local_id), fetch_processes(connection, local_id)
        reading = Reading(now_ms(), tuple(peers), tuple(processes))
        self._directory.refresh(now_ms())
        check_pinned_identity(self._keyring, self._directory.pin(self._keyring.system_id))
        self.reading = reading
