"""Counts and tells refused envelopes. Whoever can publish can cause refusals, so the lines are limited."""

from __future__ import annotations

import time

from skipbus.services.syncer import metrics
from skipbus.services.syncer.examination import Refusal
from skipbus.services.syncer.payloads import Complaint
from skipbus.shared.logs import get_logger
from skipbus.shared.peer_directory import PeerDirectory

LINES_PER_SECOND = 10

_log = get_logger("refusals")


class Refusals:
    """At most LINES_PER_SECOND lines a second; what was left out is summed up in the next second's first line."""

    def __init__(self, directory: PeerDirectory) -> None:
        self._directory = directory
        self._second = 0
        self._lines = 0
        self._left_out = 0

    def note(self, refusal: Refusal) -> None:
        """One refused envelope."""
        metrics.REFUSED.labels(refusal.reason, self._label(refusal.sender)).inc()
        if self._may_tell():
            _log.warning("envelope refused", reason=refusal.reason, sender=refusal.sender, error=refusal.explanation)

    def note_complaint(self, peer_id: str, complaint: Complaint) -> None:
        """A peer has refused an envelope of this KP's."""
        if self._may_tell():
            _log.warning(
                "envelope refused by peer",
                peer=peer_id,
                number=complaint.number,
                reason=complaint.reason,
                error=complaint.explanation,
                versions=list(complaint.versions),
            )

    def _may_tell(self) -> bool:
        self.tell_left_out()
        if self._lines >= LINES_PER_SECOND:
            self._left_out += 1
            return False
        self._lines += 1
        return True

    def tell_left_out(self) -> None:
        """Begins a new second where one has begun, and tells how many lines the last one left out."""
        second = int(time.monotonic())
        if second == self._second:
            return
        self._second, self._lines = second, 0
        if self._left_out:
            _log.warning("envelopes refused, not told one by one", count=self._left_out)
            self._left_out = 0

    def _label(self, sender: str | None) -> str:
        """A label that strangers cannot multiply."""
        known = sender is not None and self._directory.allows(sender) and self._directory.pin(sender) is not None
        return sender if known and sender is not None else "unknown"
