"""Announcements: a KP's signed statement of its identity, its public epochs and its capabilities. Pure.

An announcement proves only that its identity made it. The pin decides whether this identity may speak for the system
id (trust on first use, or configured).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TypeVar

from skipbus.shared.crypto.epochs import EPOCH_ID_BYTES, EpochSpan, PublicEpoch
from skipbus.shared.crypto.hpke import PUBLIC_KEY_BYTES
from skipbus.shared.crypto.identity import CONTEXT_ANNOUNCEMENT, Identity, verify
from skipbus.shared.errors import SealBroken
from skipbus.shared.protocol import encoding
from skipbus.shared.protocol.system_ids import validate_system_id

T = TypeVar("T")
VERSION = 1
MAX_ANNOUNCEMENT_BYTES = 1024 * 1024


@dataclass(frozen=True)
class Announcement:
    """A KP's statement; ``issued_ms`` (UTC ms) grows with every new one."""

    system_id: str
    public_key: bytes
    issued_ms: int
    algorithm: str
    epochs: tuple[PublicEpoch, ...]


def sign_announcement(announcement: Announcement, identity: Identity) -> bytes:
    """The bytes of the announcement, signed."""
    body = encoding.pack(
        {
            "version": VERSION,
            "system_id": announcement.system_id,
            "public_key": announcement.public_key,
            "issued_ms": announcement.issued_ms,
            "algorithm": announcement.algorithm,
            "epochs": [
                [e.epoch_id, e.span.starts_ms, e.span.ends_ms, e.span.destroy_ms, e.public_key]
                for e in announcement.epochs
            ],
        }
    )
    return encoding.pack([body, identity.sign(body, CONTEXT_ANNOUNCEMENT)])


def digest(data: bytes) -> bytes:
    """SHA-384 of an announcement's bytes, which a heartbeat carries instead of the announcement."""
    return hashlib.sha384(data).digest()


def read_announcement(data: bytes) -> Announcement:
    """The announcement in ``data``, with its signature verified by the identity in it.

    Raises SealBroken if it is malformed, too large, of an unknown version, or not signed by this identity.
    """
    if len(data) > MAX_ANNOUNCEMENT_BYTES:
        raise SealBroken(f"an announcement has {len(data)} bytes, more than {MAX_ANNOUNCEMENT_BYTES}")
    try:
        body, signature = (_typed(part, bytes) for part in encoding.unpack(data, max_items=2))
        fields = encoding.unpack(body)
        version = _typed(fields["version"], int)
        if version != VERSION:
            raise SealBroken(f"an announcement has version {version:d}; this release reads {VERSION}")
        announcement = _from_fields(fields)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise SealBroken("an announcement is malformed") from error
    verify(announcement.public_key, signature, body, CONTEXT_ANNOUNCEMENT)
    return announcement


def _from_fields(fields: dict[str, object]) -> Announcement:
    epochs = fields["epochs"]
    if not isinstance(epochs, list):
        raise TypeError("epochs")
    return Announcement(
        validate_system_id(_typed(fields["system_id"], str)),
        _typed(fields["public_key"], bytes),
        _time_ms(fields["issued_ms"]),
        _typed(fields["algorithm"], str),
        tuple(_epoch(entry) for entry in epochs),
    )


def _epoch(entry: list[object]) -> PublicEpoch:
    epoch_id, starts_ms, ends_ms, destroy_ms, public_key = entry
    span = EpochSpan(_time_ms(starts_ms), _time_ms(ends_ms), _time_ms(destroy_ms))
    epoch = PublicEpoch(_typed(epoch_id, bytes), span, _typed(public_key, bytes))
    if len(epoch.epoch_id) != EPOCH_ID_BYTES or len(epoch.public_key) != PUBLIC_KEY_BYTES:
        raise ValueError("epoch")
    if not 0 < span.starts_ms < span.ends_ms <= span.destroy_ms:
        raise ValueError("span")
    return epoch


def _time_ms(value: object) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError("time")
    return value


def _typed(value: object, kind: type[T]) -> T:
    if not isinstance(value, kind):
        raise TypeError(kind.__name__)
    return value
