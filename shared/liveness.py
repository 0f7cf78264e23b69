"""The status of a peer, from its heartbeats. Pure.

A peer is online until two of its own intervals have passed without a heartbeat, then late, and offline after five. The
interval is the peer's own, so that KPs with different settings are compared correctly.
"""

from __future__ import annotations

from typing import Literal

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
