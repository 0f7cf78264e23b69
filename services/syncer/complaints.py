"""What peers say of envelopes that they refuse: told, counted, kept for the operator, and passed on to who waits.

It comes as an ``envelope.refused``, or as the answer to a request by HTTPS. Either is a peer's word about what the
local KP sent to that very peer, and can harm nobody else.
"""

from __future__ import annotations

import asyncio

from skipbus.services.syncer import metrics
from skipbus.services.syncer.effects import Effects
from skipbus.services.syncer.key_effects import Aftermath
from skipbus.services.syncer.payloads import Complaint
from skipbus.services.syncer.refusals import Refusals
from skipbus.services.syncer.send import Sender
from skipbus.services.syncer.transport import RejectionQueue
from skipbus.shared.broker.notifications import NotificationKind, Notifier
from skipbus.shared.clock import now_ms
from skipbus.shared.errors import BackendError
from skipbus.shared.logs import get_logger

# The same envelope may be accepted when it is sent again with a new date.
_PASSING = frozenset({"too_old", "from_future"})

_log = get_logger("complaints")


class Complaints:
    """Hears complaints on the event loop; ``run`` takes those that came by HTTPS from ``by_https``."""

    def __init__(
        self,
        notifier: Notifier,
        effects: Effects,
        sender: Sender,
        refusals: Refusals,
        by_https: RejectionQueue,
    ) -> None:
        self._notifier = notifier
        self._effects = effects
        self._sender = sender
        self._refusals = refusals
        self._by_https = by_https

    def hear(self, peer_id: str, complaint: Complaint) -> None:
        """One that is written down already."""
        metrics.REFUSED_BY_PEER.labels(metrics.bounded_reason(complaint.reason), peer_id).inc()
        self._refusals.note_complaint(peer_id, complaint)
        if complaint.reason not in _PASSING:
            self._sender.note_rejected(peer_id, complaint.number)

    def tell(self, aftermath: Aftermath) -> None:
        """Notifies the other processes of this KP after a commit."""
        for kind, items in (
            (NotificationKind.STORED, aftermath.stored),
            (NotificationKind.REJECTED, aftermath.refused),
            (NotificationKind.ARRIVED, aftermath.arrived),
        ):
            if items:
                self._notifier.notify(kind, items)
        if aftermath.stock_changed:
            self._notifier.notify(NotificationKind.STOCK)
            self._sender.wake()

    def finish(self) -> None:
        """``run`` ends."""
        self._by_https.offer(None)

    async def run(self) -> None:
        """Until ``finish``."""
        while (one := await self._by_https.get()) is not None:
            self.hear(one.peer_id, one.complaint)
            try:
                self.tell(await asyncio.to_thread(self._effects.hear_refusal, one.peer_id, one.complaint, now_ms()))
            except BackendError as error:
                _log.debug("refusal not written down", peer=one.peer_id, reason=str(error))
