"""Decides whether an envelope may have an effect: sender, target, signature, date, payload. Blocks; for a thread.

Nothing of an envelope is believed before its signature is verified against the sender's pin, except the names
that are needed to find that pin. Whether its number is new is decided with its effect (``effects``).
"""

from __future__ import annotations

from dataclasses import dataclass

from services.syncer.payloads import Capabilities, Payload, read_payload
from shared.announcements import Announcement, read_announcement
from shared.clock import now_ms
from shared.envelopes import Header, SignedEnvelope, check_envelope, read_envelope
from shared.errors import EnvelopeRefused, SealBroken, StoreRefused
from shared.peer_directory import PeerDirectory

# How often an unknown sender may cause a look into the store.
_LOOK_AGAIN_MS = 1_000


@dataclass(frozen=True, slots=True)
class Accepted:
    """A verified envelope; ``announcement`` is the one in a ``capabilities`` payload, verified as well."""

    header: Header
    payload: Payload
    redelivered: bool
    announcement: Announcement | None = None


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why an envelope is dead-lettered; ``sender`` is what it claims, None where that cannot be read."""

    reason: str
    sender: str | None
    explanation: str


class Examiner:
    """Goes by one KP's directory."""

    def __init__(self, local_id: str, directory: PeerDirectory) -> None:
        self._local_id = local_id
        self._directory = directory
        self._looked_ms = 0

    def examine(self, body: bytes, redelivered: bool) -> Accepted | Refusal:
        """The verdict. Raises StoreUnavailable, only where a sender had to be looked up."""
        sender = None
        try:
            envelope = read_envelope(body)
            sender = envelope.header.sender
            return self._accept(envelope, redelivered)
        except EnvelopeRefused as error:
            return Refusal(error.reason, sender, str(error))

    def _accept(self, envelope: SignedEnvelope, redelivered: bool) -> Accepted:
        header = envelope.header
        pin = self._find_pin(header.sender)
        try:
            check_envelope(envelope, self._local_id, pin, now_ms())
        except EnvelopeRefused as error:
            if error.reason == "bad_signature":
                self._blame_changed_identity(envelope)
            raise
        payload = read_payload(header.type, envelope.payload)
        announcement = None
        if isinstance(payload, Capabilities) and payload.announcement is not None:
            announcement = _read_announcement(payload.announcement, header.sender, pin)
        return Accepted(header, payload, redelivered, announcement)

    def _find_pin(self, sender: str) -> bytes:
        if self._directory.allows(sender):
            pin = self._directory.pin(sender) or self._look_again(sender)
            if pin is not None:
                return pin
        raise EnvelopeRefused("unknown_sender", "an envelope's sender is not a peer of this key provider")

    def _look_again(self, sender: str) -> bytes | None:
        """A KP that announced itself a moment ago is not a stranger."""
        at_ms = now_ms()
        if abs(at_ms - self._looked_ms) < _LOOK_AGAIN_MS:
            return None
        self._looked_ms = at_ms
        try:
            self._directory.refresh(at_ms)
        except StoreRefused:
            return None  # the watch tells of it, once
        return self._directory.pin(sender)

    def _blame_changed_identity(self, envelope: SignedEnvelope) -> None:
        """Raises EnvelopeRefused: identity_changed, where the envelope is signed by what the sender presents now."""
        conflict = self._directory.conflicts().get(envelope.header.sender)
        if conflict is None:
            return
        try:
            check_envelope(envelope, self._local_id, conflict.presented_key, now_ms())
        except EnvelopeRefused:
            return
        raise EnvelopeRefused(
            "identity_changed",
            f"{envelope.header.sender} signs with another identity than the pinned one; an operator must accept it",
        )


def _read_announcement(body: bytes, sender: str, pin: bytes) -> Announcement:
    try:
        announcement = read_announcement(body)
    except SealBroken as error:
        raise EnvelopeRefused("malformed_payload", f"{sender} sent an announcement that does not verify") from error
    if announcement.system_id != sender:
        raise EnvelopeRefused("malformed_payload", f"{sender} sent another key provider's announcement")
    if announcement.public_key != pin:
        raise EnvelopeRefused("identity_changed", f"{sender} announces another identity than the pinned one")
    return announcement
