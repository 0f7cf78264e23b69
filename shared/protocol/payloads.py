"""The payloads of envelopes, type by type. Pure; docs/protocol.md describes the same in prose.

A receiver reads a payload only after it has verified the signature. It reads strictly all the same: a peer with a
fault must not get anything into the store that another process cannot handle.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, cast

import msgspec
from msgspec import Meta, Struct
from msgspec.structs import replace

from skipbus.shared.errors import EnvelopeRefused
from skipbus.shared.protocol import encoding
from skipbus.shared.protocol.announcements import MAX_ANNOUNCEMENT_BYTES
from skipbus.shared.protocol.encoding import Natural
from skipbus.shared.protocol.envelopes import VERSION, EnvelopeType
from skipbus.shared.protocol.placed_keys import MAX_KEYS, PlacedKeys, check_placed_keys, first_requests

# Events that are only counted.
MAX_EVENTS = 50_000
MAX_ACKNOWLEDGED = 1_000
MAX_EXPLANATION = 500

_KeyId = Annotated[bytes, Meta(min_length=1, max_length=64)]
_CorrelationId = Annotated[str, Meta(max_length=64)]
_Digest = Annotated[bytes, Meta(min_length=48, max_length=48)]


@dataclass(frozen=True, slots=True)
class Events:
    """``key.issued``, ``key.retrieved``, ``key.expired``, ``key.withdrawn``: one entry for each key.

    An entry begins with the keyId; in ``key.withdrawn`` the expiry (UTC ms) of the key is next.
    """

    entries: Sequence[Sequence[Any]] = field(repr=False)

    @property
    def count(self) -> int:
        """How many keys."""
        return len(self.entries)

    @property
    def correlation_ids(self) -> tuple[str, ...]:
        """The first requests that the keys came from, for the log."""
        return first_requests(self.entries, -1)


class Acknowledgement(Struct, frozen=True):
    """``key.stored``: the numbers of envelopes whose effect is committed."""

    numbers: Annotated[tuple[Natural, ...], Meta(min_length=1, max_length=MAX_ACKNOWLEDGED)]


class Heartbeat(Struct, frozen=True):
    """``heartbeat``: when to expect the next one, and the SHA-384 of the sender's announcement if it has one."""

    interval_ms: Annotated[int, Meta(ge=1, le=86_400_000)]
    announcement_digest: _Digest | None = msgspec.field(name="announcement")


class Capabilities(Struct, frozen=True):
    """``capabilities``: the sender's announcement, or a request for the receiver's."""

    announcement: Annotated[bytes, Meta(max_length=MAX_ANNOUNCEMENT_BYTES)] | None
    request: bool


class Rejection(Struct, frozen=True):
    """``envelope.refused``: the sender has rejected this envelope, and which versions it reads."""

    number: Natural
    reason: Annotated[str, Meta(pattern=r"\A[a-z_]{1,64}\Z")]
    explanation: Annotated[str, Meta(max_length=MAX_EXPLANATION)]
    versions: Annotated[tuple[Natural, ...], Meta(max_length=16)]


Payload = Events | PlacedKeys | Acknowledgement | Heartbeat | Capabilities | Rejection
_Withdrawn = Annotated[list[tuple[_KeyId, Natural, _CorrelationId]], Meta(min_length=1, max_length=MAX_KEYS)]
_Counted = Annotated[list[tuple[_KeyId, Natural, _CorrelationId]], Meta(min_length=1, max_length=MAX_EVENTS)]
_Issued = Annotated[list[tuple[_KeyId, Natural, Natural, _CorrelationId]], Meta(min_length=1, max_length=MAX_KEYS)]
_FORMS: dict[EnvelopeType, object] = {
    EnvelopeType.KEY_ISSUED: PlacedKeys | _Issued,
    EnvelopeType.KEY_WITHDRAWN: _Withdrawn,
    EnvelopeType.KEY_RETRIEVED: _Counted,
    EnvelopeType.KEY_EXPIRED: _Counted,
    EnvelopeType.KEY_STORED: Acknowledgement,
    EnvelopeType.HEARTBEAT: Heartbeat,
    EnvelopeType.CAPABILITIES: Capabilities,
    EnvelopeType.ENVELOPE_REFUSED: Rejection,
}


# --- packing


def pack_events(payloads: Iterable[bytes]) -> bytes:
    """One payload of the events of several outbox rows, in their order. Raises encoding.MalformedError.

    The payload of a single row stays as it is: nothing is unpacked.
    """
    rows = list(payloads)
    if len(rows) == 1:
        return rows[0]
    events: list[object] = []
    for payload in rows:
        events += encoding.unpack(payload, list[Any])
    return encoding.pack(events)


def pack_acknowledgement(numbers: Sequence[int]) -> bytes:
    """At most MAX_ACKNOWLEDGED numbers."""
    return encoding.pack({"numbers": numbers})


def pack_heartbeat(interval_ms: int, announcement_digest: bytes | None, software: str) -> bytes:
    """``software`` is for people."""
    return encoding.pack({"interval_ms": interval_ms, "announcement": announcement_digest, "software": software})


def pack_capabilities(announcement: bytes | None, *, request: bool) -> bytes:
    """An announcement, or with ``request`` the wish for one."""
    return encoding.pack({"announcement": announcement, "request": request})


def pack_rejection(number: int, reason: str, explanation: str) -> bytes:
    """Notifies a sender that its envelope is rejected."""
    text = printable(explanation)[:MAX_EXPLANATION]
    return encoding.pack({"number": number, "reason": reason, "explanation": text, "versions": [VERSION]})


def printable(text: str) -> str:
    """The text in printable ASCII, for logs and terminals."""
    return "".join(character if " " <= character <= "~" else "?" for character in text)


# --- reading


def read_payload(kind: EnvelopeType, payload: bytes) -> Payload:
    """The payload of an envelope of this type. Raises EnvelopeRefused: malformed_payload."""
    try:
        value = encoding.unpack(payload, _FORMS[kind])
        if isinstance(value, PlacedKeys):
            check_placed_keys(value)
    except ValueError as error:
        raise EnvelopeRefused("malformed_payload", f"the payload of a {kind} envelope is malformed") from error
    if isinstance(value, Rejection):
        return replace(value, explanation=printable(value.explanation))
    return Events(value) if isinstance(value, list) else cast(Payload, value)
