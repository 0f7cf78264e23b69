"""Rejections: envelopes that this KP rejects, and what peers report of envelopes that they reject.

A rejected envelope is counted, logged and dead-lettered, and its sender is notified where that is safe: of an envelope
that it signed; of one that this release cannot read, only where the claimed sender is a peer, and once a second at
most. A peer's rejection comes as an ``envelope.refused`` or as the answer to a request by HTTPS. It is the peer's word
about what the local KP sent to that very peer, and can harm no other. Anybody who can publish can cause rejections, so
the log lines are limited.
"""

from __future__ import annotations

import asyncio
import time

from skipbus.services.syncer import metrics
from skipbus.services.syncer.apply import Applier
from skipbus.services.syncer.consume import Delivery
from skipbus.services.syncer.peers import PeerClocks
from skipbus.services.syncer.replies import Replies
from skipbus.services.syncer.verify import REASONS, Rejected
from skipbus.shared.broker.notifications import Notifier
from skipbus.shared.clock import now_ms
from skipbus.shared.errors import BackendError
from skipbus.shared.logging import get_logger
from skipbus.shared.peer_directory import PeerDirectory
from skipbus.shared.protocol.envelopes import EnvelopeType
from skipbus.shared.protocol.payloads import Rejection

LINES_PER_SECOND = 10

_log = get_logger("reject")


class RejectionLog:
    """At most LINES_PER_SECOND lines a second; the next second's first line counts those that were left out."""

    def __init__(self) -> None:
        self._second = 0
        self._lines = 0
        self._left_out = 0

    def log_rejected(self, rejected: Rejected) -> None:
        """The local KP has rejected an envelope."""
        if self._may_log():
            _log.warning("envelope refused", reason=rejected.reason, sender=rejected.sender, error=rejected.explanation)

    def log_peer_rejection(self, peer_id: str, rejection: Rejection) -> None:
        """A peer has rejected an envelope of this KP's."""
        if self._may_log():
            _log.warning(
                "envelope refused by peer",
                peer=peer_id,
                number=rejection.number,
                reason=rejection.reason,
                error=rejection.explanation,
                versions=list(rejection.versions),
            )

    def log_left_out(self) -> None:
        """To be called now and then: begins a new second where one has begun."""
        second = int(time.monotonic())
        if second == self._second:
            return
        self._second, self._lines = second, 0
        if self._left_out:
            _log.warning("more rejected envelopes, not logged singly", count=self._left_out)
            self._left_out = 0

    def _may_log(self) -> bool:
        self.log_left_out()
        if self._lines >= LINES_PER_SECOND:
            self._left_out += 1
            return False
        self._lines += 1
        return True


class Rejecter:
    """Rejects envelopes of peers and of strangers."""

    def __init__(
        self, local_id: str, directory: PeerDirectory, log: RejectionLog, replies: Replies, clocks: PeerClocks
    ) -> None:
        self._local_id = local_id
        self._directory = directory
        self._log = log
        self._replies = replies
        self._clocks = clocks

    async def reject(self, delivery: Delivery, rejected: Rejected) -> None:
        """For good: it does not come again."""
        metrics.REFUSED.labels(rejected.reason, self._label(rejected.sender)).inc()
        self._log.log_rejected(rejected)
        self._use(rejected)
        self._notify_sender(rejected)
        await delivery.reject()

    def log_left_out(self) -> None:
        """To be called now and then: counts what a flood kept out of the log."""
        self._log.log_left_out()

    def _use(self, rejected: Rejected) -> None:
        """What the rejected envelope says of its sender all the same."""
        header = rejected.header
        if header is None:
            return
        if rejected.clock_skew_ms is not None:
            self._clocks.note(header.sender, header.number, rejected.clock_skew_ms)
        if rejected.reason == "bad_signature" and self._directory.is_bus_peer(header.sender):
            # Its announcement, if it answers, shows with which identity it signs: operators need both.
            self._replies.request_announcement(header.sender)

    def _notify_sender(self, rejected: Rejected) -> None:
        header, claim = rejected.header, rejected.claim
        if header is not None and header.type is EnvelopeType.ENVELOPE_REFUSED:
            # A rejection of a rejection would go back and forth for ever.
            return
        if header is not None and rejected.verified:
            # A heartbeat that is played back is not its sender's doing.
            if rejected.reason != "replayed":
                self._replies.reject(header.sender, header.number, rejected.reason, rejected.explanation)
        elif claim is not None and claim.target == self._local_id and self._directory.pin(claim.sender) is not None:
            self._replies.reject_unproven(claim.sender, claim.number, rejected.reason, rejected.explanation)

    def _label(self, sender: str | None) -> str:
        """A label that strangers cannot multiply."""
        if sender is None or not self._directory.allows(sender) or self._directory.pin(sender) is None:
            return "unknown"
        return sender


class PeerRejections:
    """What peers report, as an envelope or as an answer by HTTPS."""

    def __init__(self, applier: Applier, notifier: Notifier, log: RejectionLog) -> None:
        self._applier = applier
        self._notifier = notifier
        self._log = log

    def note(self, peer_id: str, rejection: Rejection) -> None:
        """Counts and logs one that is recorded in the store already."""
        # A peer may say anything, and must not make labels of it.
        reason = rejection.reason if rejection.reason in REASONS else "other"
        metrics.REFUSED_BY_PEER.labels(reason, peer_id).inc()
        self._log.log_peer_rejection(peer_id, rejection)

    async def record(self, peer_id: str, rejection: Rejection) -> None:
        """Records one that came as an answer by HTTPS. Raises nothing while the store is away."""
        self.note(peer_id, rejection)
        try:
            after_commit = await asyncio.to_thread(self._applier.apply_rejection, peer_id, rejection, now_ms())
        except BackendError as error:
            _log.debug("rejection not recorded", peer=peer_id, reason=str(error))
        else:
            after_commit.notify(self._notifier)
