"""A KP's identity: an ML-DSA-87 key pair (CNSA 2.0) that signs announcements, envelopes and wrapping keys.

Every signature has a context string, so that a signature for one purpose is not valid for another.
"""

from __future__ import annotations

import hashlib

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA87PrivateKey, MLDSA87PublicKey

from skipbus.shared.errors import SealBroken

PUBLIC_KEY_BYTES = 2592
CONTEXT_ANNOUNCEMENT = b"skipbus announcement 1"
CONTEXT_WRAPPING_KEY = b"skipbus wrapping key 1"
CONTEXT_ENVELOPE = b"skipbus envelope 1"


class Identity:
    """The private half, held only by the KP's own processes."""

    def __init__(self, private_key: MLDSA87PrivateKey) -> None:
        self._private_key = private_key
        self.public_key: bytes = private_key.public_key().public_bytes_raw()

    def __repr__(self) -> str:
        return f"<Identity {fingerprint(self.public_key)}>"

    @classmethod
    def generate(cls) -> Identity:
        """A new identity from the operating system's random number generator."""
        return cls(MLDSA87PrivateKey.generate())

    @classmethod
    def from_pem(cls, pem: bytes) -> Identity:
        """The identity in a PKCS#8 PEM file. Raises ValueError if it is not an ML-DSA-87 private key."""
        try:
            private_key = serialization.load_pem_private_key(pem, password=None)
        except Exception as error:  # the library raises several unrelated classes for a damaged file
            raise ValueError("not a readable private key") from error
        if not isinstance(private_key, MLDSA87PrivateKey):
            raise ValueError("not an ML-DSA-87 private key")  # noqa: TRY004 -- the file's fault
        return cls(private_key)

    def to_pem(self) -> bytes:
        """PKCS#8 PEM, unencrypted: the file's mode protects it."""
        return self._private_key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )

    def sign(self, data: bytes, context: bytes) -> bytes:
        """An ML-DSA-87 signature (4,627 bytes) over ``data`` under ``context``."""
        return self._private_key.sign(data, context)


def verify(public_key: bytes, signature: bytes, data: bytes, context: bytes) -> None:
    """Returns if the signature over ``data`` is by ``public_key``. Raises SealBroken."""
    try:
        MLDSA87PublicKey.from_public_bytes(public_key).verify(signature, data, context)
    except (InvalidSignature, ValueError, TypeError) as error:
        raise SealBroken("the signature does not verify") from error


def fingerprint(public_key: bytes) -> str:
    """The text that operators compare: the first 128 bits of SHA-384, in groups of four hex digits."""
    digest = hashlib.sha384(public_key).hexdigest()[:32]
    return ":".join(digest[i : i + 4] for i in range(0, 32, 4))
