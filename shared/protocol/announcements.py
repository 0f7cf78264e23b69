"""Announcements: a KP's signed statement of its identity, its public epochs and its capabilities. Pure.

An announcement proves only that its identity made it. The pin decides whether this identity may speak for the system
id (trust on first use, or configured).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Annotated

from msgspec import Meta, Struct

from skipbus.shared.crypto.epochs import EPOCH_ID_BYTES, EpochSpan, PublicEpoch
from skipbus.shared.crypto.hpke import PUBLIC_KEY_BYTES
from skipbus.shared.crypto.identity import CONTEXT_ANNOUNCEMENT, Identity, verify
from skipbus.shared.errors import SealBroken
from skipbus.shared.protocol import encoding
from skipbus.shared.protocol.encoding import Natural, Positive
from skipbus.shared.protocol.system_ids import validate_system_id

VERSION = 1
MAX_ANNOUNCEMENT_BYTES = 1024 * 1024


class _AnyVersion(Struct):
    version: int


class _Body(Struct):
    system_id: str
    public_key: bytes
    issued_ms: Natural
    algorithm: Annotated[str, Meta(max_length=4096)]
    epochs: list[
        tuple[
            Annotated[bytes, Meta(min_length=EPOCH_ID_BYTES, max_length=EPOCH_ID_BYTES)],
            Positive,
            Positive,
            Positive,
            Annotated[bytes, Meta(min_length=PUBLIC_KEY_BYTES, max_length=PUBLIC_KEY_BYTES)],
        ]
    ]


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
        body, signature = encoding.unpack(data, tuple[bytes, bytes])
        version = encoding.unpack(body, _AnyVersion).version
        if version != VERSION:
            raise SealBroken(f"an announcement has version {version}; this release reads {VERSION}")
        announcement = _read_body(encoding.unpack(body, _Body))
    except ValueError as error:
        raise SealBroken("an announcement is malformed") from error
    verify(announcement.public_key, signature, body, CONTEXT_ANNOUNCEMENT)
    return announcement


def _read_body(body: _Body) -> Announcement:
    epochs = tuple(PublicEpoch(epoch_id, EpochSpan(*times), key) for epoch_id, *times, key in body.epochs)
    for span in (epoch.span for epoch in epochs):
        if not span.starts_ms < span.ends_ms <= span.destroy_ms:
            raise ValueError("span")
    return Announcement(validate_system_id(body.system_id), body.public_key, body.issued_ms, body.algorithm, epochs)
