"""Refuses envelopes: counted, told in the log, dead-lettered, and told to the sender where that is safe.

The sender is told of an envelope that it signed. One that this release cannot read proves nothing, so whoever it names
is told only where that is a peer, and once a second at most.
"""

from __future__ import annotations

from skipbus.services.syncer.examination import Refusal
from skipbus.services.syncer.peers import PeerClocks
from skipbus.services.syncer.refusals import Refusals
from skipbus.services.syncer.replies import Replies
from skipbus.shared.broker.consuming import Delivery
from skipbus.shared.peer_directory import PeerDirectory
from skipbus.shared.protocol.envelopes import EnvelopeType


class Refuser:
    """The one place where a peer's error becomes a reject."""

    def __init__(
        self, local_id: str, directory: PeerDirectory, refusals: Refusals, replies: Replies, clocks: PeerClocks
    ) -> None:
        self._local_id = local_id
        self._directory = directory
        self._refusals = refusals
        self._replies = replies
        self._clocks = clocks

    async def refuse(self, delivery: Delivery, refusal: Refusal) -> None:
        """For good: it does not come again."""
        self._refusals.note(refusal)
        self._look_into(refusal)
        self._tell_sender(refusal)
        await delivery.reject()

    def tell_left_out(self) -> None:
        """To be called now and then: what a flood kept out of the log is summed up."""
        self._refusals.tell_left_out()

    def _look_into(self, refusal: Refusal) -> None:
        header = refusal.header
        if header is None:
            return
        if refusal.clock_skew_ms is not None:
            self._clocks.note(header.sender, header.number, refusal.clock_skew_ms)
        if refusal.reason == "bad_signature" and self._directory.is_bus_peer(header.sender):
            # Its announcement, if it answers, shows with which identity it signs: operators must be told both.
            self._replies.ask(header.sender)

    def _tell_sender(self, refusal: Refusal) -> None:
        header, claim = refusal.header, refusal.claim
        if header is not None and header.type is EnvelopeType.ENVELOPE_REFUSED:
            # A refusal of a refusal would go back and forth for ever.
            return
        if header is not None and refusal.verified:
            # A heartbeat that is played back is not its sender's doing.
            if refusal.reason != "replayed":
                self._replies.complain(header.sender, header.number, refusal.reason, refusal.explanation, verified=True)
        elif claim is not None and claim.target == self._local_id and self._directory.pin(claim.sender) is not None:
            self._replies.complain(claim.sender, claim.number, refusal.reason, refusal.explanation, verified=False)
