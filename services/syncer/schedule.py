"""When an envelope that was not acknowledged is sent again. Pure.

The broker keeps an envelope for a peer that is down, so sending it again helps only against what neither kept:
a broker that lost its disk, a peer that lost its store. While a peer is offline a copy in its queue is enough,
renewed when the last one has run out; when it is back, what it has not acknowledged is sent anew.
"""

from __future__ import annotations

from skipbus.shared.liveness import PeerStatus
from skipbus.shared.protocol.envelopes import MAX_AGE_MS

FIRST_RETRY_MS = 10_000
LAST_RETRY_MS = 300_000
UNROUTED_RETRY_MS = 1_000


def retry_after_ms(attempts: int) -> int:
    """How long to wait for the acknowledgement after that many sendings: 10 s, doubling up to 5 min."""
    doublings = min(max(attempts - 1, 0), 16)
    return min(FIRST_RETRY_MS << doublings, LAST_RETRY_MS)


def is_due(
    attempts: int,
    sent_ms: int | None,
    peer: PeerStatus,
    now_ms: int,
    *,
    unrouted: bool = False,
    refused: bool = False,
) -> bool:
    """Whether to send an envelope now that was sent last at ``sent_ms`` (UTC ms, None for never).

    ``unrouted`` says that the broker had no queue for it then: a peer that is heard since has made its queue.
    ``refused`` says that the peer would not take it: it may have another release or configuration later.
    """
    if sent_ms is None:
        return True
    # A clock that was set back must not silence an envelope for as long as it was set back.
    waited_ms = abs(now_ms - sent_ms)
    if peer == "offline":
        return waited_ms >= MAX_AGE_MS
    if refused:
        return waited_ms >= LAST_RETRY_MS
    return waited_ms >= (UNROUTED_RETRY_MS if unrouted else retry_after_ms(attempts))
