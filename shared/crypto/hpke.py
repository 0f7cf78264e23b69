"""Epoch key pairs: HPKE with the hybrid KEM MLKEM1024_P384, which is secure while either half is.

Owns the bytes of the public and private halves, and the one suite in use. All primitives are from ``cryptography``.
"""

from __future__ import annotations

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM1024PrivateKey, MLKEM1024PublicKey
from cryptography.hazmat.primitives.hpke import (
    AEAD,
    KDF,
    KEM,
    MLKEM1024P384PrivateKey,
    MLKEM1024P384PublicKey,
    Suite,
)
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from skipbus.shared.errors import SealBroken

_SUITE = Suite(KEM.MLKEM1024_P384, KDF.HKDF_SHA384, AEAD.AES_256_GCM)
_MLKEM_PUBLIC_BYTES = 1568
_MLKEM_SEED_BYTES = 64
_P384_SCALAR_BYTES = 48
PUBLIC_KEY_BYTES = _MLKEM_PUBLIC_BYTES + 97
PRIVATE_KEY_BYTES = _MLKEM_SEED_BYTES + _P384_SCALAR_BYTES


class HybridPrivateKey:
    """The private half of one epoch; its bytes are the ML-KEM-1024 seed and the P-384 scalar."""

    def __init__(self, mlkem_key: MLKEM1024PrivateKey, p384_key: ec.EllipticCurvePrivateKey) -> None:
        self._mlkem_key = mlkem_key
        self._p384_key = p384_key
        self._key = MLKEM1024P384PrivateKey(mlkem_key, p384_key)

    def __repr__(self) -> str:
        return "<HybridPrivateKey ***>"

    @classmethod
    def generate(cls) -> HybridPrivateKey:
        """A new pair from the operating system's random number generator."""
        return cls(MLKEM1024PrivateKey.generate(), ec.generate_private_key(ec.SECP384R1()))

    @classmethod
    def from_bytes(cls, data: bytes) -> HybridPrivateKey:
        """The pair with these 112 private bytes. Raises ValueError if they are not a private key."""
        if len(data) != PRIVATE_KEY_BYTES:
            raise ValueError(f"a private epoch key has {PRIVATE_KEY_BYTES} bytes, not {len(data)}")
        scalar = int.from_bytes(data[_MLKEM_SEED_BYTES:], "big")
        mlkem_key = MLKEM1024PrivateKey.from_seed_bytes(data[:_MLKEM_SEED_BYTES])
        return cls(mlkem_key, ec.derive_private_key(scalar, ec.SECP384R1()))

    def to_bytes(self) -> bytes:
        """The 112 private bytes, only for the keyring's file."""
        scalar = self._p384_key.private_numbers().private_value
        return self._mlkem_key.private_bytes_raw() + scalar.to_bytes(_P384_SCALAR_BYTES, "big")

    def public_bytes(self) -> bytes:
        """The 1,665 bytes of the public half."""
        point = self._p384_key.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
        return self._mlkem_key.public_key().public_bytes_raw() + point

    def open(self, sealed: bytes, info: bytes) -> bytes:
        """The plaintext that ``seal`` encrypted to this pair with the same ``info``. Raises SealBroken."""
        try:
            return _SUITE.decrypt(sealed, self._key, info)
        except (InvalidTag, ValueError) as error:
            raise SealBroken("a wrapping key does not open with its epoch's private key") from error


def seal(plaintext: bytes, public_key: bytes, info: bytes) -> bytes:
    """Encrypts by HPKE (base mode) to ``public_key`` (1,665 bytes), bound to ``info``. Raises SealBroken."""
    if len(public_key) != PUBLIC_KEY_BYTES:
        raise SealBroken(f"a public epoch key has {PUBLIC_KEY_BYTES} bytes, not {len(public_key)}")
    try:
        mlkem_key = MLKEM1024PublicKey.from_public_bytes(public_key[:_MLKEM_PUBLIC_BYTES])
        p384_key = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP384R1(), public_key[_MLKEM_PUBLIC_BYTES:])
        return _SUITE.encrypt(plaintext, MLKEM1024P384PublicKey(mlkem_key, p384_key), info)
    except ValueError as error:
        raise SealBroken("a public epoch key is not a valid one") from error
