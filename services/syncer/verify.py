"""Verifies envelopes: sender, target, signature, date, payload, sealed keys. Blocks, and belongs in a thread.

Nothing in an envelope is believed before its signature is verified against the sender's pin, except the names that are
needed to find that pin. Sealed keys are accepted only if the target can serve them: made for the two KPs of the header,
sealed under a wrapping key that the source signed for an epoch whose private half the target still has, and with a
lifetime that fits. Whether an envelope's number is new is decided by ``apply``, in the transaction of its effect.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import lru_cache

from skipbus.shared.clock import now_ms
from skipbus.shared.crypto.epochs import MAX_CLOCK_SKEW_MS
from skipbus.shared.crypto.identity import CONTEXT_WRAPPING_KEY, fingerprint, verify
from skipbus.shared.crypto.sealing import SealedWrappingKey
from skipbus.shared.errors import EnvelopeRefused, SealBroken, SkipbusError, StoreRefused
from skipbus.shared.logging import get_logger
from skipbus.shared.peer_directory import PeerDirectory
from skipbus.shared.protocol.announcements import Announcement, read_announcement
from skipbus.shared.protocol.envelopes import (
    Claim,
    EnvelopeType,
    Header,
    SignedEnvelope,
    check_envelope,
    read_claim,
    read_envelope,
)
from skipbus.shared.protocol.payloads import Capabilities, Payload, read_payload
from skipbus.shared.protocol.placed_keys import PlacedKeys

# How often an unknown sender may cause a query.
_REFRESH_EVERY_MS = 1_000
# The longest lifetime that can be configured.
MAX_LIFETIME_MS = 7 * 86_400_000
# Reasons that come before the signature is verified: such an envelope proves nothing about its sender.
_BEFORE_SIGNATURE = (
    "too_large malformed unknown_version unknown_type unknown_sender wrong_target bad_signature identity_changed"
)
_AFTER_SIGNATURE = (
    "too_old from_future malformed_payload replayed not_a_bus_peer unknown_epoch bad_seal bad_lifetime key_exists"
)
_UNPROVEN = frozenset(_BEFORE_SIGNATURE.split())
# Everything that an envelope is rejected for.
REASONS = _UNPROVEN.union(_AFTER_SIGNATURE.split())
# The header is readable, though unproven: the sender can be notified, and may do something about it.
_UNREADABLE = frozenset({"unknown_version", "unknown_type"})

_log = get_logger("verify")


@dataclass(frozen=True, slots=True)
class Verified:
    """A verified envelope; ``announcement`` is the one in a ``capabilities`` payload, verified as well.

    ``clock_skew_ms`` is by how much its date is behind the local clock at its receipt: negative where it is ahead.
    """

    header: Header
    payload: Payload
    redelivered: bool
    announcement: Announcement | None = None
    clock_skew_ms: int = 0


@dataclass(frozen=True, slots=True)
class Rejected:
    """Why an envelope is dead-lettered; ``sender`` is the claimed one, None where that cannot be read.

    ``header`` is None where it could not be read, and proven only where ``verified``. ``clock_skew_ms`` is there where
    the envelope was rejected for its date and says something of the sender's clock. ``claim`` is what an envelope that
    this release cannot read says of itself.
    """

    reason: str
    sender: str | None
    explanation: str
    header: Header | None = None
    verified: bool = False
    clock_skew_ms: int | None = None
    claim: Claim | None = None


class Verifier:
    """Of one KP."""

    def __init__(
        self, local_id: str, directory: PeerDirectory, epochs_in_keyring: Callable[[], Collection[bytes]]
    ) -> None:
        self._local_id = local_id
        self._directory = directory
        self._own_epochs = OwnEpochs(epochs_in_keyring)
        self._refreshed_ms = 0

    def verify(self, body: bytes, redelivered: bool, waited_ms: int) -> Verified | Rejected:
        """The result; ``waited_ms`` is how long ago the envelope arrived.

        Raises StoreUnavailable, only where a sender had to be looked up.
        """
        header = None
        try:
            envelope = read_envelope(body)
            header = envelope.header
            return self._verify(envelope, redelivered, waited_ms)
        except EnvelopeRefused as error:
            return _rejected(error, header, body)
        except SkipbusError:
            raise
        except Exception as error:  # noqa: BLE001 -- nothing that a peer sends may end the loop that reads it
            _log.error("envelope not understood", effect="it is rejected as malformed", exc_info=error)
            return Rejected("malformed", header.sender if header else None, "an envelope is malformed")

    def _verify(self, envelope: SignedEnvelope, redelivered: bool, waited_ms: int) -> Verified:
        header = envelope.header
        pin, at_ms = self._find_pin(header.sender), now_ms()
        try:
            check_envelope(envelope, self._local_id, pin, at_ms)
        except EnvelopeRefused as error:
            if error.reason == "bad_signature":
                self._raise_if_identity_changed(envelope)
            raise
        payload = read_payload(header.type, envelope.payload)
        announcement = None
        if isinstance(payload, PlacedKeys):
            self._verify_keys(header, payload, pin, at_ms)
        if isinstance(payload, Capabilities) and payload.announcement is not None:
            announcement = _verify_announcement(payload.announcement, header.sender, pin)
        return Verified(header, payload, redelivered, announcement, at_ms - waited_ms - header.date_ms)

    def _verify_keys(self, header: Header, placed: PlacedKeys, pin: bytes, at_ms: int) -> None:
        own = self._directory.get(self._local_id)
        if own is not None:
            self._own_epochs.note(((epoch.epoch_id, epoch.span.destroy_ms) for epoch in own.epochs), at_ms)
        bus_peer = self._directory.is_bus_peer(header.sender)
        verify_keys(header, placed, pin, self._own_epochs, at_ms, bus_peer=bus_peer)

    def _find_pin(self, sender: str) -> bytes:
        if self._directory.allows(sender):
            pin = self._directory.pin(sender) or self._refresh_for(sender)
            if pin is not None:
                return pin
        raise EnvelopeRefused("unknown_sender", "an envelope's sender is not a peer of this key provider")

    def _refresh_for(self, sender: str) -> bytes | None:
        """A KP may have announced itself a moment ago."""
        at_ms = now_ms()
        if abs(at_ms - self._refreshed_ms) < _REFRESH_EVERY_MS:
            return None
        self._refreshed_ms = at_ms
        try:
            self._directory.refresh(at_ms)
        except StoreRefused:
            return None  # ``peers`` logs it, once
        return self._directory.pin(sender)

    def _raise_if_identity_changed(self, envelope: SignedEnvelope) -> None:
        """Raises EnvelopeRefused: identity_changed, where the envelope is signed by what the sender presents now."""
        sender = envelope.header.sender
        conflict = self._directory.conflicts().get(sender)
        for presented in {conflict.presented_key if conflict else None, self._presented_in(envelope)}:
            if presented is None or not self._is_signed_by(envelope, presented):
                continue
            self._directory.note_presented(sender, presented, now_ms())
            raise EnvelopeRefused(
                "identity_changed",
                f"{sender} signs with another identity ({fingerprint(presented)}) than the pinned one; "
                "an operator must accept it",
            )

    def _is_signed_by(self, envelope: SignedEnvelope, public_key: bytes) -> bool:
        try:
            check_envelope(envelope, self._local_id, public_key, now_ms())
        except EnvelopeRefused:
            return False
        return True

    def _presented_in(self, envelope: SignedEnvelope) -> bytes | None:
        """The identity in an announcement under a bus peer's name. It proves only that it is another one.

        The announcements of other peers are in the store, where the directory finds what they present.
        """
        header = envelope.header
        if header.type is not EnvelopeType.CAPABILITIES or not self._directory.is_bus_peer(header.sender):
            return None
        try:
            payload = read_payload(header.type, envelope.payload)
            if not isinstance(payload, Capabilities) or payload.announcement is None:
                return None
            announcement = read_announcement(payload.announcement)
        except (EnvelopeRefused, SealBroken):
            return None
        return announcement.public_key if announcement.system_id == header.sender else None


def _rejected(error: EnvelopeRefused, header: Header | None, body: bytes) -> Rejected:
    claim = read_claim(body) if error.reason in _UNREADABLE else None
    sender = header.sender if header else claim.sender if claim else None
    verified = error.reason not in _UNPROVEN and header is not None
    # A kept envelope may be old because it waited; a heartbeat is not kept, so its age is the clock's.
    by_clock = error.reason == "from_future" or (
        error.reason == "too_old" and header is not None and header.type is EnvelopeType.HEARTBEAT
    )
    skew_ms = now_ms() - header.date_ms if by_clock and header is not None else None
    return Rejected(error.reason, sender, str(error), header, verified, skew_ms, claim)


def _verify_announcement(body: bytes, sender: str, pin: bytes) -> Announcement:
    try:
        announcement = read_announcement(body)
    except SealBroken as error:
        raise EnvelopeRefused("malformed_payload", f"{sender} sent an announcement that does not verify") from error
    if announcement.system_id != sender:
        raise EnvelopeRefused("malformed_payload", f"{sender} sent another key provider's announcement")
    if announcement.public_key != pin:
        raise EnvelopeRefused("identity_changed", f"{sender} announces another identity than the pinned one")
    return announcement


# --- sealed keys


class OwnEpochs:
    """Which epochs the local KP can open: those that it has announced, as long as their private halves are kept.

    An epoch leaves the announcement when it ends, and keys that were sealed to it a moment before are still in transit.
    So what was announced is remembered here; after a restart the keyring's file names show it, without the time span.
    """

    def __init__(self, in_keyring: Callable[[], Collection[bytes]]) -> None:
        self._in_keyring = in_keyring
        self._destroy_ms: dict[bytes, int] = {}

    def note(self, epochs: Iterable[tuple[bytes, int]], now_ms: int) -> None:
        """These are announced now: epoch id and when the private half is destroyed (UTC ms)."""
        self._destroy_ms.update(epochs)
        self._destroy_ms = {k: destroy_ms for k, destroy_ms in self._destroy_ms.items() if destroy_ms > now_ms}

    def has(self, epoch_id: bytes, until_ms: int) -> bool:
        """Whether what is sealed to it can be opened until then (UTC ms)."""
        destroy_ms = self._destroy_ms.get(epoch_id)
        return epoch_id in self._in_keyring() if destroy_ms is None else until_ms <= destroy_ms


def verify_keys(
    header: Header, placed: PlacedKeys, sender_public_key: bytes, epochs: OwnEpochs, now_ms: int, *, bus_peer: bool
) -> None:
    """Returns where the target can serve these keys; ``bus_peer`` says that the sender is one.

    Raises EnvelopeRefused: not_a_bus_peer, unknown_epoch, bad_seal, bad_lifetime.
    """
    if not bus_peer:
        raise EnvelopeRefused(
            "not_a_bus_peer", f"{header.sender} sent sealed keys and is no peer over a bus in this configuration"
        )
    for wrapping_key in placed.sealed_wrapping_keys(header):
        if not epochs.has(wrapping_key.epoch_id, wrapping_key.expires_ms):
            raise EnvelopeRefused(
                "unknown_epoch",
                f"{header.sender} sealed keys to an epoch that {header.target} does not have, or for longer than it is "
                "kept: they could not be opened",
            )
        _verify_wrapping_key(wrapping_key, sender_public_key)
    _check_lifetimes(header, placed, now_ms)


@lru_cache(maxsize=1024)
def _verify_wrapping_key(wrapping_key: SealedWrappingKey, sender_public_key: bytes) -> None:
    """Errors are not cached."""
    try:
        verify(sender_public_key, wrapping_key.signature, wrapping_key.signed_bytes(), CONTEXT_WRAPPING_KEY)
    except SealBroken as error:
        raise EnvelopeRefused("bad_seal", f"a wrapping key is not signed by {wrapping_key.source_id}") from error


def _check_lifetimes(header: Header, placed: PlacedKeys, now_ms: int) -> None:
    until_ms = {wrapping_key[0]: wrapping_key[2] for wrapping_key in placed.wrapping_keys}
    latest_ms = now_ms + MAX_LIFETIME_MS + MAX_CLOCK_SKEW_MS
    for record in placed.records:
        expires_ms = record[2]
        if expires_ms <= now_ms:
            ago_seconds = (now_ms - expires_ms) // 1000
            raise EnvelopeRefused("bad_lifetime", f"{header.sender} sent a key that expired {ago_seconds} s ago")
        if expires_ms > until_ms[record[4]] or expires_ms > latest_ms:
            raise EnvelopeRefused("bad_lifetime", f"{header.sender} sent a key that would outlive what opens it")
