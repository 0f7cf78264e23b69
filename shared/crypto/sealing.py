"""Seals a key to the one KP that may serve it, and opens it there. Pure: no I/O, no clock.

A wrapping key (AES-256) belongs to one source, one target and one of the target's epochs. It is sealed to the epoch by
HPKE and signed once by the source; each key then costs one AES-256-GCM. keyId, source, target, size, expiry and
wrapping key are associated data: a record that was moved, renamed or prolonged does not open. A source's own copy of a
key in stock also has the peer's id as context. Nonces are 96 random bits, and a wrapping key seals at most
``MAX_SEALS`` keys, far below the 2**32 that NIST SP 800-38D allows for random nonces.
"""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass
from typing import NamedTuple

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from skipbus.shared.crypto import hpke
from skipbus.shared.crypto.epochs import PublicEpoch
from skipbus.shared.crypto.identity import CONTEXT_WRAPPING_KEY, Identity, verify
from skipbus.shared.errors import SealBroken
from skipbus.shared.protocol import encoding

MAX_SEALS = 2**24
WRAPPING_KEY_ID_BYTES = 16
_KEY_LABEL = b"skipbus key 1"
_WRAP_LABEL = b"skipbus wrapping key 1"


class KeyRecord(NamedTuple):
    """One key in the store: ``sealed`` is ciphertext and tag, times are UTC ms.

    It is a tuple because one is made for each key, and a frozen dataclass takes seven times as long.
    """

    key_id: bytes
    source_id: str
    target_id: str
    size_bits: int
    expires_ms: int
    wrapping_key_id: bytes
    nonce: bytes
    sealed: bytes
    correlation_id: str


@dataclass(frozen=True, slots=True)
class SealedWrappingKey:
    """A wrapping key in the store or in an envelope, signed by its source."""

    wrapping_key_id: bytes
    source_id: str
    target_id: str
    epoch_id: bytes
    expires_ms: int
    sealed: bytes
    signature: bytes

    def binding(self) -> bytes:
        """The ``info`` of the HPKE seal."""
        return _WRAP_LABEL + encoding.pack(
            [self.wrapping_key_id, self.source_id, self.target_id, self.epoch_id, self.expires_ms]
        )

    def signed_bytes(self) -> bytes:
        """The bytes that the source signs."""
        return self.binding() + self.sealed


class WrappingKey:
    """An opened wrapping key. Only the api has one, and only until its epoch is destroyed."""

    __slots__ = ("_aead", "epoch_id", "expires_ms", "seals", "source_id", "target_id", "wrapping_key_id")

    def __init__(self, secret: bytes, described_by: SealedWrappingKey) -> None:
        self._aead = AESGCM(secret)
        self.wrapping_key_id = described_by.wrapping_key_id
        self.source_id = described_by.source_id
        self.target_id = described_by.target_id
        self.epoch_id = described_by.epoch_id
        self.expires_ms = described_by.expires_ms
        self.seals = 0

    def __repr__(self) -> str:
        return f"<WrappingKey {self.wrapping_key_id.hex()} {self.source_id}->{self.target_id} ***>"

    def seal(self, key_id: bytes, key: bytes, expires_ms: int, correlation_id: str, context: bytes = b"") -> KeyRecord:
        """The key, sealed under this wrapping key, as a record that expires at ``expires_ms`` (UTC ms).

        It opens only with the same ``context``, which is not part of the record.
        """
        nonce = os.urandom(12)
        bound = _key_binding(self, key_id, len(key) * 8, expires_ms, context)
        self.seals += 1
        return KeyRecord(
            key_id,
            self.source_id,
            self.target_id,
            len(key) * 8,
            expires_ms,
            self.wrapping_key_id,
            nonce,
            self._aead.encrypt(nonce, key, bound),
            correlation_id,
        )

    def open(self, record: KeyRecord, context: bytes = b"") -> bytes:
        """The key in ``record``. Raises SealBroken if the record is not exactly as its source made it."""
        if (record.source_id, record.target_id) != (self.source_id, self.target_id):
            raise SealBroken("a key record names another pair of KPs than its wrapping key")
        bound = _key_binding(self, record.key_id, record.size_bits, record.expires_ms, context)
        try:
            key = self._aead.decrypt(record.nonce, record.sealed, bound)
        except (InvalidTag, ValueError) as error:
            raise SealBroken("a key record does not open: it was changed after its source sealed it") from error
        if len(key) * 8 != record.size_bits:
            raise SealBroken("a key record holds a key of another size than it says")
        return key


def _key_binding(wrapping_key: WrappingKey, key_id: bytes, size_bits: int, expires_ms: int, context: bytes) -> bytes:
    bound: list[object] = [
        key_id,
        wrapping_key.source_id,
        wrapping_key.target_id,
        size_bits,
        expires_ms,
        wrapping_key.wrapping_key_id,
    ]
    if context:
        bound.append(context)
    return _KEY_LABEL + encoding.pack(bound)


def make_wrapping_key(
    identity: Identity, source_id: str, target_id: str, epoch: PublicEpoch
) -> tuple[WrappingKey, SealedWrappingKey]:
    """A new wrapping key of ``source_id`` for one epoch of ``target_id``: opened, and sealed and signed."""
    secret = secrets.token_bytes(32)
    blank = SealedWrappingKey(
        secrets.token_bytes(WRAPPING_KEY_ID_BYTES),
        source_id,
        target_id,
        epoch.epoch_id,
        epoch.span.destroy_ms,
        b"",
        b"",
    )
    sealed = hpke.seal(secret, epoch.public_key, blank.binding())
    signature = identity.sign(blank.binding() + sealed, CONTEXT_WRAPPING_KEY)
    complete = SealedWrappingKey(
        blank.wrapping_key_id, source_id, target_id, epoch.epoch_id, blank.expires_ms, sealed, signature
    )
    return WrappingKey(secret, complete), complete


def open_wrapping_key(
    sealed: SealedWrappingKey, source_public_key: bytes, epoch_private_key: hpke.HybridPrivateKey
) -> WrappingKey:
    """The wrapping key, if its source's signature verifies and it opens. Raises SealBroken."""
    verify(source_public_key, sealed.signature, sealed.signed_bytes(), CONTEXT_WRAPPING_KEY)
    return WrappingKey(epoch_private_key.open(sealed.sealed, sealed.binding()), sealed)
