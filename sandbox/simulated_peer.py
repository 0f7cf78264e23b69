"""A key provider that exists only as an identity and epochs: it signs what a peer, or a thief of its name, would send.

No process runs for it. Its methods return envelopes, named after their types; the caller puts them on a bus.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import Any

from sandbox.client import Key
from sandbox.key_provider import BusPeer
from skipbus.shared.clock import now_ms
from skipbus.shared.crypto.epochs import EpochSpan, PublicEpoch, new_epoch_id
from skipbus.shared.crypto.hpke import HybridPrivateKey
from skipbus.shared.crypto.identity import Identity
from skipbus.shared.crypto.sealing import KeyRecord, SealedWrappingKey, make_wrapping_key
from skipbus.shared.protocol import encoding
from skipbus.shared.protocol.announcements import Announcement, digest, sign_announcement
from skipbus.shared.protocol.envelopes import EnvelopeType, Header, sign_envelope
from skipbus.shared.protocol.payloads import pack_acknowledgement, pack_capabilities, pack_heartbeat
from skipbus.shared.settings.peers import identity_line

KEY_TTL_MS = 3_600_000


@dataclass
class SealedKeys:
    """Keys as an envelope of type ``key.issued`` carries them. A test may change them before they are packed."""

    keys: list[Key]
    records: list[list[Any]]
    wrapping_keys: list[list[Any]]
    stock: bool = False

    def pack(self) -> bytes:
        return encoding.pack({"records": self.records, "wrapping_keys": self.wrapping_keys, "stock": self.stock})


def record_fields(record: KeyRecord) -> list[Any]:
    """A sealed key as an envelope carries it."""
    about = [record.key_id, record.size_bits, record.expires_ms, record.correlation_id]
    return [*about, record.wrapping_key_id, record.nonce, record.sealed]


def wrapping_key_fields(key: SealedWrappingKey) -> list[Any]:
    """A wrapping key as an envelope carries it."""
    return [key.wrapping_key_id, key.epoch_id, key.expires_ms, key.sealed, key.signature]


def seal_keys(identity: Identity, source_id: str, target_id: str, epoch: PublicEpoch, count: int) -> SealedKeys:
    """Fresh keys of a source, sealed to an epoch of the target."""
    opened, wrapping = make_wrapping_key(identity, source_id, target_id, epoch)
    made = SealedKeys([], [], [wrapping_key_fields(wrapping)])
    expires_ms = min(now_ms() + KEY_TTL_MS, wrapping.expires_ms)
    for _ in range(count):
        key_id, key = secrets.token_bytes(16), secrets.token_bytes(32)
        made.keys.append(Key(source_id, target_id, key_id.hex(), key.hex()))
        made.records.append(record_fields(opened.seal(key_id, key, expires_ms, "c-test")))
    return made


def fresh_number() -> int:
    """A sequence number that was not used before."""
    return now_ms() * 1000 + secrets.randbelow(1000)


@dataclass(frozen=True)
class SimulatedPeer:
    """One peer. ``epoch_count`` is how many epochs its announcement has; all of them have one key pair."""

    id: str
    identity: Identity = field(default_factory=Identity.generate)
    epoch_key: HybridPrivateKey = field(default_factory=HybridPrivateKey.generate)
    epoch_id: bytes = field(default_factory=new_epoch_id)
    epoch_count: int = 1

    def peer(self, stock: int = 0, endpoint: str | None = None) -> BusPeer:
        """How it stands in the configuration of a key provider; without stock unless that is said."""
        return BusPeer(self.id, identity_line(self.identity.public_key), stock, endpoint)

    def announcement(self) -> bytes:
        """A new announcement. Its first epoch is the current one, ``epoch_id``."""
        at_ms, public_key = now_ms(), self.epoch_key.public_bytes()
        epochs = []
        for number in range(self.epoch_count):
            starts_ms = at_ms - 60_000 + number * KEY_TTL_MS
            span = EpochSpan(starts_ms, starts_ms + KEY_TTL_MS + 60_000, starts_ms + 2 * KEY_TTL_MS + 60_000)
            epochs.append(PublicEpoch(new_epoch_id() if number else self.epoch_id, span, public_key))
        announced = Announcement(self.id, self.identity.public_key, at_ms, "test", tuple(epochs))
        return sign_announcement(announced, self.identity)

    def sign(
        self,
        target_id: str,
        kind: EnvelopeType,
        payload: bytes,
        *,
        signer: Identity | None = None,
        sender_id: str | None = None,
        number: int | None = None,
        age_ms: int = 0,
    ) -> bytes:
        """An envelope of its own, or what a thief of its name, or of its signature, would make."""
        sequence_number = fresh_number() if number is None else number
        header = Header(kind, sender_id or self.id, target_id, sequence_number, now_ms() - age_ms)
        return sign_envelope(header, payload, signer or self.identity)

    def capabilities(self, target_id: str, announcement: bytes | None = None) -> bytes:
        body = announcement or self.announcement()
        return self.sign(target_id, EnvelopeType.CAPABILITIES, pack_capabilities(body, request=False))

    def heartbeat(self, target_id: str, interval_ms: int = 60_000, announcement: bytes | None = None) -> bytes:
        digested = digest(announcement) if announcement is not None else None
        return self.sign(target_id, EnvelopeType.HEARTBEAT, pack_heartbeat(interval_ms, digested, "test"))

    def key_retrieved(self, target_id: str, count: int = 1) -> bytes:
        """Moves a counter and nothing else: the way to see that a later envelope is handled."""
        events = [[secrets.token_bytes(16), now_ms(), "c"] for _ in range(count)]
        return self.sign(target_id, EnvelopeType.KEY_RETRIEVED, encoding.pack(events))

    def key_issued(self, target_id: str, keys: SealedKeys) -> bytes:
        """Places keys at a target."""
        return self.sign(target_id, EnvelopeType.KEY_ISSUED, keys.pack())

    def key_withdrawn(self, target_id: str, keys: SealedKeys) -> bytes:
        """Takes keys back."""
        events = [[record[0], record[2], record[3]] for record in keys.records]
        return self.sign(target_id, EnvelopeType.KEY_WITHDRAWN, encoding.pack(events))

    def key_stored(self, target_id: str, *numbers: int) -> bytes:
        """Acknowledges envelopes by their sequence numbers."""
        return self.sign(target_id, EnvelopeType.KEY_STORED, pack_acknowledgement(list(numbers)))
