"""What stands in an envelope's payload, type by type. Pure; docs/protocol.md is the same in prose.

A payload is looked into only after its signature has been verified. It is read strictly all the same: a peer
with a fault in it must not get anything into the store that somebody else trips over.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from skipbus.services.syncer.placed_keys import PlacedKeys, read_placed_keys
from skipbus.shared.errors import EnvelopeRefused
from skipbus.shared.protocol import encoding
from skipbus.shared.protocol.announcements import MAX_ANNOUNCEMENT_BYTES
from skipbus.shared.protocol.envelopes import VERSION, EnvelopeType

MAX_EVENTS = 50_000
MAX_ACKNOWLEDGED = 1_000
MAX_INTERVAL_MS = 86_400_000
SHOWN_CORRELATION_IDS = 20
_MAX_NUMBER = 2**63
_DIGEST_BYTES = 48
_EVENT_TYPES = frozenset(
    {
        EnvelopeType.KEY_ISSUED,
        EnvelopeType.KEY_RETRIEVED,
        EnvelopeType.KEY_EXPIRED,
        EnvelopeType.KEY_WITHDRAWN,
    }
)
MAX_EXPLANATION = 500
MAX_VERSIONS = 16
_REASON = re.compile(r"[a-z_]{1,64}")


@dataclass(frozen=True, slots=True)
class Events:
    """``key.issued``, ``key.retrieved``, ``key.expired``, ``key.withdrawn``: how many keys, and the first requests
    they came from. An entry has the keyId in front, and of a withdrawn key its expiry (UTC ms) next.
    """

    count: int
    correlation_ids: tuple[str, ...]
    entries: Sequence[list[Any]] = field(default=(), repr=False, compare=False)


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
class Complaint:
    """``envelope.refused``: the target has refused this envelope, and which versions it reads."""

    number: int
    reason: str
    explanation: str
    versions: tuple[int, ...]


Payload = Events | PlacedKeys | Acknowledgement | Heartbeat | Capabilities | Complaint


def read_payload(kind: EnvelopeType, payload: bytes) -> Payload:
    """What the payload says. Raises EnvelopeRefused: malformed_payload."""
    try:
        value = encoding.unpack(payload, max_items=MAX_EVENTS)
        if kind is EnvelopeType.KEY_ISSUED and isinstance(value, dict):
            return read_placed_keys(value)
        if kind in _EVENT_TYPES:
            return _read_events(kind, value)
        return _READERS[kind](value)
    except (ValueError, TypeError, KeyError) as error:
        raise EnvelopeRefused("malformed_payload", f"the payload of a {kind} envelope is malformed") from error


def pack_events(payloads: Iterable[bytes]) -> bytes:
    """One payload of the events of several outbox rows, in their order. Raises encoding.MalformedError.

    That of one row is what it is: nothing is looked at.
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


def pack_acknowledgement(numbers: list[int]) -> bytes:
    """At most MAX_ACKNOWLEDGED numbers."""
    return encoding.pack({"numbers": numbers})


def pack_heartbeat(interval_ms: int, announcement_digest: bytes | None, software: str) -> bytes:
    return encoding.pack({"interval_ms": interval_ms, "announcement": announcement_digest, "software": software})


def pack_capabilities(announcement: bytes | None, *, request: bool) -> bytes:
    return encoding.pack({"announcement": announcement, "request": request})


def pack_complaint(number: int, reason: str, explanation: str) -> bytes:
    """Tells a sender that its envelope is refused."""
    told = printable(explanation)[:MAX_EXPLANATION]
    return encoding.pack({"number": number, "reason": reason, "explanation": told, "versions": [VERSION]})


def printable(text: str) -> str:
    """The text in printable ASCII: it ends in logs and terminals."""
    return "".join(character if " " <= character <= "~" else "?" for character in text)


def _read_events(kind: EnvelopeType, value: Any) -> Events:  # noqa: ANN401 -- anything may come from the wire
    _require(isinstance(value, list) and 0 < len(value) <= MAX_EVENTS)
    # Column by column: thousands of events are looked at at a time, at both ends.
    _require(set(map(type, value)) == {list})
    _require(set(map(len, value)) == {4 if kind is EnvelopeType.KEY_ISSUED else 3})
    key_ids, *times_and_sizes, correlation_ids = zip(*value, strict=True)
    _require(set(map(type, key_ids)) == {bytes} and all(key_ids) and max(map(len, key_ids)) <= 64)
    for numbers in times_and_sizes:
        _require(set(map(type, numbers)) == {int} and min(numbers) >= 0 and max(numbers) < _MAX_NUMBER)
    _require(set(map(type, correlation_ids)) == {str} and max(map(len, correlation_ids)) <= 64)
    return Events(len(value), tuple(dict.fromkeys(e[-1] for e in value[:SHOWN_CORRELATION_IDS])), value)


def _read_acknowledgement(value: Any) -> Acknowledgement:  # noqa: ANN401
    numbers = value["numbers"]
    _require(isinstance(numbers, list) and 0 < len(numbers) <= MAX_ACKNOWLEDGED)
    _require(all(_is_natural(number) for number in numbers))
    return Acknowledgement(tuple(numbers))


def _read_heartbeat(value: Any) -> Heartbeat:  # noqa: ANN401
    interval_ms, digest = value["interval_ms"], value["announcement"]
    _require(_is_natural(interval_ms) and 0 < interval_ms <= MAX_INTERVAL_MS)
    _require(digest is None or (isinstance(digest, bytes) and len(digest) == _DIGEST_BYTES))
    return Heartbeat(interval_ms, digest)


def _read_capabilities(value: Any) -> Capabilities:  # noqa: ANN401
    announcement, request = value["announcement"], value["request"]
    _require(announcement is None or isinstance(announcement, bytes))
    _require(announcement is None or len(announcement) <= MAX_ANNOUNCEMENT_BYTES)
    _require(isinstance(request, bool))
    return Capabilities(announcement, request)


def _read_complaint(value: Any) -> Complaint:  # noqa: ANN401
    number, reason, explanation = value["number"], value["reason"], value["explanation"]
    versions = value["versions"]
    _require(_is_natural(number) and isinstance(reason, str) and _REASON.fullmatch(reason) is not None)
    _require(isinstance(explanation, str) and len(explanation) <= MAX_EXPLANATION)
    _require(isinstance(versions, list) and len(versions) <= MAX_VERSIONS and all(_is_natural(v) for v in versions))
    return Complaint(number, reason, printable(explanation), tuple(versions))


_READERS: dict[EnvelopeType, Callable[[Any], Payload]] = {
    EnvelopeType.KEY_STORED: _read_acknowledgement,
    EnvelopeType.HEARTBEAT: _read_heartbeat,
    EnvelopeType.CAPABILITIES: _read_capabilities,
    EnvelopeType.ENVELOPE_REFUSED: _read_complaint,
}


def _is_natural(value: object) -> bool:
    return type(value) is int and 0 <= value < _MAX_NUMBER


def _require(condition: bool) -> None:
    if not condition:
        raise ValueError("payload")
