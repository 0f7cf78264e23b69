"""The earlier server's extra pages: ``GET /health`` and ``GET /status/sync``. Both answer whatever is down.

The store is read once a second in a thread, so that no request has to ask. While the store is away the last reading
stays, with its age. The first reading that reaches the store brings its schema up to date.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from aiohttp import web
from sqlalchemy import Connection

from skipbus.services.api.http.access_log import Entry
from skipbus.services.api.http.responses import json_response
from skipbus.services.api.links.bus import BusLink
from skipbus.shared.clock import now_ms
from skipbus.shared.crypto.epochs import current_epoch
from skipbus.shared.crypto.keyring import Keyring, check_pinned_identity
from skipbus.shared.liveness import peer_status, process_states
from skipbus.shared.peer_directory import PeerDirectory
from skipbus.shared.settings import Settings, project_version
from skipbus.shared.store.migrate import bring_up_to_date
from skipbus.shared.store.peers import PeerRow, fetch_peer_rows
from skipbus.shared.store.processes import ProcessSeen, fetch_processes
from skipbus.shared.store.servers import servers_of

# Signs of life come once per heartbeat interval.
_PROCESS_LATE_INTERVALS = 3
# A reading every second: three missed ones, or one that hangs, and the store counts as away.
STORE_AWAY_AFTER_MS = 3000


@dataclass(frozen=True)
class Reading:
    """One reading: when (UTC ms), and what stood in the store."""

    at_ms: int
    peers: tuple[PeerRow, ...]
    processes: tuple[ProcessSeen, ...]


class StoreView:
    """What this process knows of the store."""

    def __init__(self, settings: Settings, keyring: Keyring, directory: PeerDirectory) -> None:
        self._settings = settings
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
        reading = self._directory.refresh_with(now_ms(), self._read)
        check_pinned_identity(self._keyring, self._directory.pin(self._keyring.system_id))
        self.reading = reading

    def _read(self, connection: Connection) -> Reading:
        local_id = self._settings.local_system_id
        peers, processes = fetch_peer_rows(connection, local_id), fetch_processes(connection, local_id)
        return Reading(now_ms(), tuple(peers), tuple(processes))


class StatusPages:
    """Shows what ``StoreView`` read last."""

    def __init__(
        self,
        settings: Settings,
        directory: PeerDirectory,
        view: StoreView,
        warnings: Callable[[], list[str]],
        bus: BusLink | None,
    ) -> None:
        """``warnings`` gives sentences about what does not work in full."""
        self._settings = settings
        self._directory = directory
        self._view = view
        self._warnings = warnings
        self._bus = bus
        self._version = project_version()

    async def get_health(self, entry: Entry, _query: str) -> web.Response:
        """200 while keys can be served, else 503; what is missing stands in the body and in the log."""
        faults = self._faults()
        entry.reason = "; ".join(faults) or None
        worker_states = self._process_states(self._view.reading)
        body = {
            "status": "error" if faults else "ok" if set(worker_states.values()) == {"ok"} else "degraded",
            "timestamp": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "database": "ok" if self._view.store_present else "error",
            **self._servers(),
            "version": self._version,
            "localSystemID": self._settings.local_system_id,
            "epoch": "ok" if self._view.epoch_present else "missing",
            **worker_states,
            "faults": faults,
            "warnings": self._warnings() + (self._bus.warnings() if self._bus is not None else []),
        }
        return json_response(body, 503 if faults else 200)

    def _servers(self) -> dict[str, str]:
        """The servers in use: with several of them an operator must see which."""
        database = {"database_server": servers_of(self._settings.mysql).current}
        return database | ({"broker_server": self._bus.broker_server} if self._bus is not None else {})

    async def get_status_sync(self, _entry: Entry, _query: str) -> web.Response:
        """Every peer: whether it lives, and how many keys were issued for it, wait, were retrieved, have expired."""
        rows = {row.peer_id: row for row in self._view.reading.peers}
        names = sorted(rows.keys() | set(self._directory.peers()))
        # Judged by the time of the reading while that is fresh: a second more would make short heartbeats look late.
        at_ms = self._view.reading.at_ms if self._view.store_present else now_ms()
        return json_response(
            {
                "sync_enabled": True,
                "local_system_id": self._settings.local_system_id,
                "peer_count": len(names),
                "peers": {name: self._peer(name, rows.get(name), at_ms) for name in names},
                "database": "ok" if self._view.store_present else "error",
                "as_of": self._view.reading.at_ms / 1000,
            }
        )

    def _faults(self) -> list[str]:
        faults = []
        if not self._view.store_present:
            faults.append("the key store does not answer")
        elif not self._view.epoch_present:
            faults.append("this key provider has announced no epoch for the present time: is its janitor running?")
        return faults

    def _process_states(self, reading: Reading) -> dict[str, str]:
        limit_ms = max(self._settings.heartbeat_seconds * _PROCESS_LATE_INTERVALS, 3) * 1000
        return process_states(reading.processes, now_ms() - round(limit_ms))

    def _peer(self, name: str, row: PeerRow | None, at_ms: int) -> dict[str, object]:
        row = row or PeerRow(name, None, 0, 0, 0, 0, 0, 0, 0)
        settings = self._settings.peers.get(name)
        shown: dict[str, object] = {
            "endpoint": (settings.endpoint if settings else None) or "",
            "status": peer_status(row.last_heartbeat_ms, row.heartbeat_interval_ms, at_ms),
            "last_heartbeat": _seconds(row.last_heartbeat_ms),
            "link": self._settings.link_of(name),
            "announced": self._directory.get(name) is not None,
            "identity_conflict": name in self._directory.conflicts(),
            "clock_skew_seconds": _seconds(row.clock_skew_ms),
            "last_refusal": row.last_refusal,
            "last_refusal_at": _seconds(row.last_refusal_ms),
        }
        if self._bus is not None and self._bus.covers(name):
            shown["stock"] = self._bus.shown(name)
        inbound = _counts(row.inbound_issued, row.inbound_retrieved, row.inbound_expired, row.inbound_withdrawn)
        # Keys count as issued here when the peer has acknowledged them, and most that are withdrawn never were.
        counts = _counts(row.issued, row.retrieved, row.expired, 0) | {"withdrawn": row.withdrawn}
        return shown | counts | {"inbound": inbound}


def _seconds(ms: int | None) -> float | None:
    return None if ms is None else ms / 1000


def _counts(issued: int, retrieved: int, expired: int, withdrawn: int) -> dict[str, int]:
    # Different KPs report them at different times: a retrieval may arrive before its issue.
    waiting = max(0, issued - retrieved - expired - withdrawn)
    return {
        "issued": issued,
        "waiting": waiting,
        "retrieved": retrieved,
        "expired": expired,
        "withdrawn": withdrawn,
    }
