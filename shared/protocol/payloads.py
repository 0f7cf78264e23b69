"""The payloads of envelopes, type by type. Pure; docs/protocol.md describes the same in prose.

A receiver reads a payload only after it has verified the signature. It reads strictly all the same: a peer with a
fault must not get anything into the store that another process cannot handle.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from skipbus.shared.errors import EnvelopeRefused
from skipbus.shared.protocol import encoding
from skipbus.shared.protocol.announcements import MAX_ANNOUNCEMENT_BYTES
from skipbus.shared.protocol.envelopes import VERSION, EnvelopeType
from skipbus.shared.protocol.placed_keys import (
    MAX_CORRELATION_ID,
    MAX_KEY_ID_BYTES,
    MAX_KEYS,
    MAX_NUMBER,
    PlacedKeys,
    first_requests,
    is_natural,
    read_placed_keys,
    require,
)

# Events that are only counted.
MAX_EVENTS = 50_000
MAX_ACKNOWLEDGED = 1_000
MAX_INTERVAL_MS = 86_400_000
MAX_EXPLANATION = 500
MAX_VERSIONS = 16
_DIGEST_BYTES = 48
_REASON = re.compile(r"[a-z_]{1,64}")
_MOST_EVENTS = {
    EnvelopeType.KEY_ISSUED: MAX_KEYS,
    EnvelopeType.KEY_WITHDRAWN: MAX_KEYS,
    EnvelopeType.KEY_RETRIEVED: MAX_EVENTS,
    EnvelopeType.KEY_EXPIRED: MAX_EVENTS,
}


@dataclass(frozen=True, slots=True)
class Events:
    """``key.issued``, ``key.retrieved``, ``key.expired``, ``key.withdrawn``: one entry for each key.

    An entry begins with the keyId; in ``key.withdrawn`` the expiry (UTC ms) of the key is next.
    """

    entries: Sequence[list[Any]] = field(repr=False)

    @property
    def count(self) -> int:
        """How many keys."""
        return len(self.entries)

    @property
    def correlation_ids(self) -> tuple[str, ...]:
        """The first requests that the keys came from, for the log."""
        return first_requests(self.entries, -1)


@dataclass(frozen=True, slots=True)
class Acknowledgement:
    """``key.stored``: the numbers of envelopes whose effect is committed."""

    numbers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """``heartbeat``: when to expect the next one, and the SHA-384 of the sender's announcement if it has one."""

    interval_ms: int
    announcement_digest: bytes | None


@dataclass(frozen=True, slots=True)
class Capabilities:
    """``capabilities``: the sender's announcement, or a request for the receiver's."""

    announcement: bytes | None
    request: bool


@dataclass(frozen=True, slots=True)
class Rejection:
    """``envelope.refused``: the sender has rejected this envelope, and which versions it reads."""

    number: int
    reason: str
    explanation: str
    versions: tuple[int, ...]


Payload = Events | PlacedKeys | Acknowledgement | Heartbeat | Capabilities | Rejection


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
        entries = encoding.unpack(payload, max_items=MAX_EVENTS)
        if not isinstance(entries, list):
            raise encoding.MalformedError("the payload of an outbox row is not a list of events")
        events += entries
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
        value = encoding.unpack(payload, max_items=MAX_EVENTS)
        if kind is EnvelopeType.KEY_ISSUED and isinstance(value, dict):
            return read_placed_keys(value)
        if kind in _MOST_EVENTS:
            return _read_events(kind, value)
        return _READERS[kind](value)
    except (ValueError, TypeError, KeyError) as error:
        raise EnvelopeRefused("malformed_payload", f"the payload of a {kind} envelope is malformed") from error


def _read_events(kind: EnvelopeType, value: Any) -> Events:  # noqa: ANN401 -- anything may come from a peer
    require(isinstance(value, list) and 0 < len(value) <= _MOST_EVENTS[kind])
    # Column by column, because that is faster: both ends read thousands of events at a time.
    require(set(map(type, value)) == {list})
    require(set(map(len, value)) == {4 if kind is EnvelopeType.KEY_ISSUED else 3})
    key_ids, *times_and_sizes, correlation_ids = zip(*value, strict=True)
    require(set(map(type, key_ids)) == {bytes} and all(key_ids) and max(map(len, key_ids)) <= MAX_KEY_ID_BYTES)
    for numbers in times_and_sizes:
        require(set(map(type, numbers)) == {int} and min(numbers) >= 0 and max(numbers) < MAX_NUMBER)
    require(set(map(type, correlation_ids)) == {str} and max(map(len, correlation_ids)) <= MAX_CORRELATION_ID)
    return Events(value)


def _read_acknowledgement(value: Any) -> Acknowledgement:  # noqa: ANN401
    numbers = value["numbers"]
    require(isinstance(numbers, list) and 0 < len(numbers) <= MAX_ACKNOWLEDGED)
    require(all(is_natural(number) for number in numbers))
    return Acknowledgement(tuple(numbers))


def _read_heartbeat(value: Any) -> Heartbeat:  # noqa: ANN401
    interval_ms, digest = value["interval_ms"], value["announcement"]
    require(is_natural(interval_ms) and 0 < interval_ms <= MAX_INTERVAL_MS)
    require(digest is None or (isinstance(digest, bytes) and len(digest) == _DIGEST_BYTES))
    return Heartbeat(interval_ms, digest)


def _read_capabilities(value: Any) -> Capabilities:  # noqa: ANN401
    announcement, request = value["announcement"], value["request"]
    require(announcement is None or isinstance(announcement, bytes))
    require(announcement is None or len(announcement) <= MAX_ANNOUNCEMENT_BYTES)
    require(isinstance(request, bool))
    return Capabilities(announcement, request)


def _read_rejection(value: Any) -> Rejection:  # noqa: ANN401
    number, reason, explanation = value["number"], value["reason"], value["explanation"]
    versions = value["versions"]
    require(is_natural(number) and isinstance(reason, str) and _REASON.fullmatch(reason) is not None)
    require(isinstance(explanation, str) and len(explanation) <= MAX_EXPLANATION)
    require(isinstance(versions, list) and len(versions) <= MAX_VERSIONS and all(is_natural(v) for v in versions))
    return Rejection(number, reason, printable(explanation), tuple(versions))


_READERS: dict[EnvelopeType, Callable[[Any], Payload]] = {
    EnvelopeType.KEY_STORED: _read_acknowledgement,
    EnvelopeType.HEARTBEAT: _read_heartbeat,
    EnvelopeType.CAPABILITIES: _read_capabilities,
    EnvelopeType.ENVELOPE_REFUSED: _read_rejection,
}
