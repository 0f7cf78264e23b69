"""What peers say of envelopes that they refuse: told, counted, kept for the operator, and passed on to who waits.

It comes as an ``envelope.refused``, or as the answer to a request by HTTPS. Either is a peer's word about what the
local KP sent to that very peer, and can harm nobody else.
"""

from __future__ import annotations

import asyncio

from skipbus.services.syncer import metrics
from skipbus.services.syncer.answers import Answer
from skipbus.services.syncer.effects import Effects
from skipbus.services.syncer.key_effects import Aftermath
from skipbus.services.syncer.outbox import Relay
from skipbus.services.syncer.outgoing import Letter
from skipbus.services.syncer.payloads import Complaint
from skipbus.services.syncer.refusals import Refusals
from skipbus.shared.broker.notifications import NotificationKind, Notifier
from skipbus.shared.clock import now_ms
from skipbus.shared.errors import BackendError
from skipbus.shared.logs import get_logger

# The same envelope may be accepted when it is sent again with a new date.
_PASSING = frozenset({"too_old", "from_future"})
MAX_WAITING = 1_000

_log = get_logger("complaints")


class Complaints:
    """Hears complaints on the event loop; ``run`` writes down those that came by HTTPS."""

    def __init__(self, notifier: Notifier, effects: Effects, relay: Relay, refusals: Refusals) -> None:
        self._notifier = notifier
        self._effects = effects
        self._relay = relay
        self._refusals = refusals
        self._answers: asyncio.Queue[tuple[str, Complaint] | None] = asyncio.Queue(MAX_WAITING)

    def hear(self, peer_id: str, complaint: Complaint) -> None:
        """One that is written down already."""
        metrics.REFUSED_BY_PEER.labels(metrics.bounded_reason(complaint.reason), peer_id).inc()
        self._refusals.note_complaint(peer_id, complaint)
        if complaint.reason not in _PASSING:
            self._relay.note_refused(peer_id, complaint.number)

    def hear_answer(self, letter: Letter, answer: Answer) -> None:
        """One that came as the answer to a request; ``run`` writes it down."""
        complaint = Complaint(letter.number or 0, answer.reason, answer.explanation, ())
        self.hear(letter.target, complaint)
        if not self._answers.full():
            self._answers.put_nowait((letter.target, complaint))

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
            self._relay.wake()

    def finish(self) -> None:
        """``run`` ends."""
        if self._answers.full():
            self._answers.get_nowait()
        self._answers.put_nowait(None)

    async def run(self) -> None:
        """Until ``finish``."""
        while (one := await self._answers.get()) is not None:
            try:
                self.tell(await asyncio.to_thread(self._effects.hear_refusal, *one, now_ms()))
            except BackendError as error:
                _log.debug("refusal not written down", peer=one[0], reason=str(error))
