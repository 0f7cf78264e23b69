"""The status of a peer, from its heartbeats, and of a KP's own processes, from their signs of life. Pure.

A peer is online until two of its own intervals have passed without a heartbeat, then late, and offline after five. The
interval is the peer's own, so that KPs with different settings are compared correctly.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from skipbus.shared.store.processes import ProcessSeen

PeerStatus = Literal["online", "late", "offline"]
LATE_AFTER_INTERVALS = 2
OFFLINE_AFTER_INTERVALS = 5


def peer_status(last_heartbeat_ms: int | None, interval_ms: int, now_ms: int) -> PeerStatus:
    """The status of a peer whose last heartbeat came at ``last_heartbeat_ms`` (UTC ms, None for never)."""
    if last_heartbeat_ms is None or interval_ms <= 0:
        return "offline"
    silence_ms = now_ms - last_heartbeat_ms
    if silence_ms > OFFLINE_AFTER_INTERVALS * interval_ms:
        return "offline"
    return "late" if silence_ms > LATE_AFTER_INTERVALS * interval_ms else "online"


def process_states(processes: Iterable[ProcessSeen], since_ms: int) -> dict[str, str]:
    """For each role what its processes have said since then. Several may run, and one of them does the work."""
    states: dict[str, list[str]] = {"syncer": [], "janitor": []}
    for seen in sorted(processes, key=lambda process: process.seen_ms, reverse=True):
        if seen.role in states and seen.seen_ms >= since_ms:
            states[seen.role].append(seen.detail)
    return {role: min(said, key=_rank, default="missing") for role, said in states.items()}


def _rank(state: str) -> int:
    """The best state first: a standby says nothing of what the elected process does."""
    return {"ok": 0, "standby": 2}.get(state, 1)
