"""Envelopes: signed, dated and numbered messages between two KPs. Pure; docs/protocol.md describes the format.

The bytes are MessagePack ``[protected, payload, signature]``, each a byte string. ``protected`` is
``[version, type, sender, target, number, date_ms]``. The signature covers both byte strings as they are, so nothing is
packed again for verification. A receiver reads the protected part, finds the sender's pinned identity, verifies, and
only then reads the payload.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from msgspec import Raw, Struct

from skipbus.shared.crypto.epochs import MAX_CLOCK_SKEW_MS
from skipbus.shared.crypto.identity import CONTEXT_ENVELOPE, Identity, verify
from skipbus.shared.errors import EnvelopeRefused, SealBroken
from skipbus.shared.protocol import encoding
from skipbus.shared.protocol.encoding import Natural
from skipbus.shared.protocol.system_ids import validate_system_id

VERSION = 1
MAX_ENVELOPE_BYTES = 4 * 1024 * 1024
MAX_AGE_MS = 3_600_000


class EnvelopeType(StrEnum):
    """The types of envelopes; an unknown type is rejected."""

    HEARTBEAT = "heartbeat"
    CAPABILITIES = "capabilities"
    KEY_ISSUED = "key.issued"
    KEY_STORED = "key.stored"
    KEY_RETRIEVED = "key.retrieved"
    KEY_EXPIRED = "key.expired"
    KEY_WITHDRAWN = "key.withdrawn"
    ENVELOPE_REFUSED = "envelope.refused"

    @property
    def is_live(self) -> bool:
        """Whether it matters only to a KP that listens now, so that a broker does not keep it."""
        return self in _LIVE


_LIVE = frozenset({EnvelopeType.HEARTBEAT, EnvelopeType.CAPABILITIES, EnvelopeType.ENVELOPE_REFUSED})


@dataclass(frozen=True, slots=True)
class Header:
    """The protected part: type, sender, target, the sender's sequence number, and the date (UTC ms)."""

    type: EnvelopeType
    sender: str
    target: str
    number: int
    date_ms: int


@dataclass(frozen=True, slots=True)
class SignedEnvelope:
    """A received envelope: the header is parsed, nothing is verified yet."""

    header: Header
    protected: bytes
    payload: bytes
    signature: bytes


# What stands first in the envelopes of any version; decoding ignores what follows.
class _AnyEnvelope(Struct, array_like=True):
    protected: bytes


class _AnyVersion(Struct, array_like=True):
    version: int


class _AnyHeader(_AnyVersion, array_like=True):
    type: Any
    sender: str
    target: str
    number: Natural


def sign_envelope(header: Header, payload: bytes, identity: Identity) -> bytes:
    """The envelope's bytes, ready to be sent."""
    protected = encoding.pack([VERSION, header.type.value, header.sender, header.target, header.number, header.date_ms])
    return encoding.pack([protected, payload, identity.sign(_signed_bytes(protected, payload), CONTEXT_ENVELOPE)])


def read_envelope(data: bytes) -> SignedEnvelope:
    """The envelope in ``data``, unverified.

    Raises EnvelopeRefused: too_large, malformed, unknown_version, unknown_type.
    """
    if len(data) > MAX_ENVELOPE_BYTES:
        raise EnvelopeRefused("too_large", f"an envelope has {len(data)} bytes, more than {MAX_ENVELOPE_BYTES}")
    try:
        protected, *others = encoding.unpack(data, tuple[bytes, Raw, Raw])
        # First the version: other versions may have something else than bytes behind it.
        header = _read_header(protected)
        payload, signature = (encoding.unpack(part, bytes) for part in others)
        return SignedEnvelope(header, protected, payload, signature)
    except ValueError as error:
        raise EnvelopeRefused("malformed", "an envelope is malformed") from error


def _read_header(protected: bytes) -> Header:
    version = encoding.unpack(protected, _AnyVersion).version
    if version != VERSION:
        raise EnvelopeRefused("unknown_version", f"an envelope has version {version}; this release reads {VERSION}")
    _, kind, sender, target, number, date_ms = encoding.unpack(protected, tuple[int, str, str, str, Natural, int])
    try:
        known_type = EnvelopeType(kind)
    except ValueError as error:
        raise EnvelopeRefused("unknown_type", f"an envelope has the unknown type {kind[:32]!r}") from error
    return Header(known_type, validate_system_id(sender), validate_system_id(target), number, date_ms)


@dataclass(frozen=True, slots=True)
class Claim:
    """The unverified header fields of an envelope of an unknown version or type."""

    version: int
    sender: str
    target: str
    number: int


def read_claim(data: bytes) -> Claim | None:
    """The claimed sender of an envelope of a version or type that this release cannot read, or None.

    The first six fields of the protected part keep their places in all versions, so that the sender can be notified.
    """
    try:
        protected = encoding.unpack(data[:MAX_ENVELOPE_BYTES], _AnyEnvelope).protected
        fields = encoding.unpack(protected, _AnyHeader)
        sender, target = validate_system_id(fields.sender), validate_system_id(fields.target)
        return Claim(fields.version, sender, target, fields.number)
    except ValueError:
        return None


def check_envelope(envelope: SignedEnvelope, local_id: str, sender_public_key: bytes, now_ms: int) -> None:
    """Returns when the envelope is for ``local_id``, fresh, and signed by its sender's pinned identity.

    Raises EnvelopeRefused: wrong_target, bad_signature, too_old, from_future. Whether the number is new is checked
    with the inbox, in the transaction that applies the envelope.
    """
    header = envelope.header
    if header.target != local_id:
        raise EnvelopeRefused("wrong_target", f"an envelope from {header.sender} is for {header.target}")
    _check_signature(envelope, sender_public_key)
    if header.date_ms < now_ms - MAX_AGE_MS:
        age_seconds = (now_ms - header.date_ms) // 1000
        raise EnvelopeRefused("too_old", f"an envelope from {header.sender} is {age_seconds} s old")
    if header.date_ms > now_ms + MAX_CLOCK_SKEW_MS:
        ahead_seconds = (header.date_ms - now_ms) // 1000
        raise EnvelopeRefused(
            "from_future",
            f"an envelope from {header.sender} is dated {ahead_seconds} s ahead: compare the clocks of both KPs",
        )


def _check_signature(envelope: SignedEnvelope, public_key: bytes) -> None:
    try:
        signed = _signed_bytes(envelope.protected, envelope.payload)
        verify(public_key, envelope.signature, signed, CONTEXT_ENVELOPE)
    except SealBroken as error:
        raise EnvelopeRefused("bad_signature", f"an envelope is not signed by {envelope.header.sender}") from error


def _signed_bytes(protected: bytes, payload: bytes) -> bytes:
    return len(protected).to_bytes(4, "big") + protected + payload
