"""Sentences about what is wrong with a peer. Pure.

One sentence for each problem, with what to do if that is known; none if nothing is wrong. The text of a peer's
rejection is shown and never interpreted.
"""

from __future__ import annotations

from dataclasses import dataclass

from skipbus.shared.crypto.epochs import MAX_CLOCK_SKEW_MS, current_epoch
from skipbus.shared.crypto.identity import fingerprint
from skipbus.shared.liveness import peer_status
from skipbus.shared.protocol.announcements import Announcement
from skipbus.shared.settings.peers import PeerSettings
from skipbus.shared.store.peers import PeerRow

# How long a rejection is reported, and how long an event may wait before it counts as stuck.
REFUSAL_NEWS_MS = 3_600_000
WAITING_MS = 30_000


@dataclass(frozen=True)
class PeerView:
    """The state of one peer. ``identity`` is the pinned or configured one; ``stock`` is None without a bus link."""

    peer: PeerSettings
    configured: bool
    identity: bytes | None
    announcement: Announcement | None
    announcement_fault: str | None = None
    presented: tuple[bytes, int] | None = None
    row: PeerRow | None = None
    waiting: tuple[int, int | None] = (0, None)
    stock: int | None = None
    endpoint_fault: str | None = None


def problems(view: PeerView, now_ms: int) -> list[str]:
    """All problems, the most severe first."""
    if not view.configured:
        return ["It is not configured: neither SKIP_REMOTE_SYSTEM_ID_n nor [[peers]] names it."]
    found = _of_identity(view) + _of_announcement(view, now_ms) + _of_heartbeats(view, now_ms)
    found += _of_clock(view) + _of_events(view, now_ms) + _of_stock(view)
    return found + ([f"{view.peer.endpoint}: {view.endpoint_fault}."] if view.endpoint_fault else [])


def _of_identity(view: PeerView) -> list[str]:
    if view.identity is None:
        return []
    presented = view.presented[0] if view.presented else None
    if view.announcement is not None and view.announcement.public_key != view.identity:
        presented = view.announcement.public_key
    heard_ms = (view.row.last_heartbeat_ms if view.row else None) or 0
    # Everybody who can publish can present an identity; a later heartbeat of the peer shows that nothing is wrong.
    if presented in (None, view.identity) or (view.presented and view.presented[1] < heard_ms):
        return []
    how = (
        "Compare both with its operator, then correct identity in [[peers]]"
        if view.peer.identity
        else f"Compare both with its operator, then run skipctl identity accept {view.peer.system_id}"
    )
    believed, other = fingerprint(view.identity), fingerprint(presented or b"")
    return [f"It presents another identity ({other}) than the pinned or configured one ({believed}). {how}."]


def _of_announcement(view: PeerView, now_ms: int) -> list[str]:
    if view.announcement_fault:
        return [f"Its announcement cannot be used: {view.announcement_fault}."]
    if view.announcement is None:
        where = "has come over the bus" if view.peer.link == "bus" else "stands in the store"
        return [f"No announcement of it {where} yet, so no key can be sealed to it. Is its janitor running?"]
    if current_epoch(view.announcement.epochs, now_ms) is not None:
        return []
    ends_ms = max((epoch.span.ends_ms for epoch in view.announcement.epochs), default=0)
    since = f"the last one ended {ago(ends_ms, now_ms)}" if 0 < ends_ms <= now_ms else "none has begun"
    return [f"It has no current epoch ({since}), so no key can be sealed to it. Is its janitor running?"]


def _of_heartbeats(view: PeerView, now_ms: int) -> list[str]:
    heard_ms = view.row.last_heartbeat_ms if view.row else None
    if heard_ms is None:
        return ["It has never been heard. Are its syncer, the broker (skipbus_bus_up) and the federation link up?"]
    status = peer_status(heard_ms, view.row.heartbeat_interval_ms if view.row else 0, now_ms)
    return [] if status == "online" else [f"It is {status}: heard last {ago(heard_ms, now_ms)}."]


def _of_clock(view: PeerView) -> list[str]:
    skew_ms = (view.row.clock_skew_ms if view.row else None) or 0
    if abs(skew_ms) <= MAX_CLOCK_SKEW_MS:
        return []
    side = "behind" if skew_ms > 0 else "ahead of"
    limit = MAX_CLOCK_SKEW_MS // 1000
    return [f"Its clock is {abs(skew_ms) / 1000:.0f} s {side} this one; {limit} s are allowed. Set both by NTP."]


def _of_events(view: PeerView, now_ms: int) -> list[str]:
    found = []
    row, (count, oldest_ms) = view.row, view.waiting
    if row is not None and row.last_refusal and now_ms - (row.last_refusal_ms or 0) < REFUSAL_NEWS_MS:
        found.append(f"It refused an envelope {ago(row.last_refusal_ms or 0, now_ms)}: {row.last_refusal}")
    if oldest_ms is not None and now_ms - oldest_ms > WAITING_MS:
        found.append(f"{count} messages wait for its acknowledgement, the oldest since {ago(oldest_ms, now_ms)}.")
    return found


def _of_stock(view: PeerView) -> list[str]:
    if view.stock is None or view.peer.stock == 0:
        return []
    if view.stock == 0:
        return [f"There is no usable stock (target {view.peer.stock}): every GET /key waits for this peer."]
    low = view.peer.stock // 2
    return [f"Stock is {view.stock}, below its low mark of {low}."] if view.stock < low else []


def ago(at_ms: int, now_ms: int) -> str:
    """How long ago, in words."""
    seconds = max(0, now_ms - at_ms) // 1000
    for size, unit in ((86_400, "days"), (3_600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds // size} {unit} ago"
    return f"{seconds} s ago"
