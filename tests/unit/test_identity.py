"""Facts about identities: who signed, for which purpose, and what a damaged or foreign key file gives."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA65PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from skipbus.shared.crypto.identity import (
    CONTEXT_ANNOUNCEMENT,
    CONTEXT_ENVELOPE,
    CONTEXT_WRAPPING_KEY,
    Identity,
    fingerprint,
    verify,
)
from skipbus.shared.errors import SealBroken

IDENTITY = Identity.generate()
CONTEXTS = [CONTEXT_ANNOUNCEMENT, CONTEXT_ENVELOPE, CONTEXT_WRAPPING_KEY]
SIGNATURE = IDENTITY.sign(b"data", CONTEXT_ENVELOPE)


def test_a_signature_verifies_with_the_public_key_over_the_same_data() -> None:
    verify(IDENTITY.public_key, SIGNATURE, b"data", CONTEXT_ENVELOPE)


def test_keys_and_signatures_have_the_lengths_of_ml_dsa_87() -> None:
    assert len(IDENTITY.public_key) == 2592
    assert len(SIGNATURE) == 4627


@pytest.mark.parametrize("data", [b"", b"Data", b"data\0", b"dat"])
def test_a_signature_over_other_data_is_refused(data: bytes) -> None:
    with pytest.raises(SealBroken):
        verify(IDENTITY.public_key, SIGNATURE, data, CONTEXT_ENVELOPE)


@pytest.mark.parametrize("made_for", CONTEXTS)
@pytest.mark.parametrize("used_for", CONTEXTS)
def test_a_signature_made_for_one_purpose_means_nothing_for_another(made_for: bytes, used_for: bytes) -> None:
    signature = IDENTITY.sign(b"data", made_for)
    if made_for == used_for:
        verify(IDENTITY.public_key, signature, b"data", used_for)
    else:
        with pytest.raises(SealBroken):
            verify(IDENTITY.public_key, signature, b"data", used_for)


def test_an_impostors_signature_is_refused() -> None:
    with pytest.raises(SealBroken):
        verify(
            IDENTITY.public_key,
            Identity.generate().sign(b"data", CONTEXT_ENVELOPE),
            b"data",
            CONTEXT_ENVELOPE,
        )


@pytest.mark.parametrize("signature", [b"", b"x", SIGNATURE[:-1], SIGNATURE + b"\0", bytes(4627), b"\xff" * 4627])
def test_a_malformed_signature_is_refused(signature: bytes) -> None:
    with pytest.raises(SealBroken):
        verify(IDENTITY.public_key, signature, b"data", CONTEXT_ENVELOPE)


@pytest.mark.parametrize("signature", [5, "text", None, [1, 2]])
def test_a_signature_that_is_no_byte_string_at_all_is_refused(signature: object) -> None:
    # Whatever a peer or the store puts where a signature belongs comes here.
    with pytest.raises(SealBroken):
        verify(IDENTITY.public_key, signature, b"data", CONTEXT_ENVELOPE)  # type: ignore[arg-type]


@pytest.mark.parametrize("public_key", [b"", b"x", bytes(2591), bytes(2592), bytes(2593)])
def test_a_malformed_public_key_verifies_nothing(public_key: bytes) -> None:
    with pytest.raises(SealBroken):
        verify(public_key, SIGNATURE, b"data", CONTEXT_ENVELOPE)


def test_an_identity_comes_back_from_its_pem() -> None:
    again = Identity.from_pem(IDENTITY.to_pem())
    assert again.public_key == IDENTITY.public_key
    verify(IDENTITY.public_key, again.sign(b"x", CONTEXT_ENVELOPE), b"x", CONTEXT_ENVELOPE)


@pytest.mark.parametrize(
    "pem",
    [b"", b"rubbish", IDENTITY.to_pem()[:-40], IDENTITY.to_pem().replace(b"A", b"B", 3)],
    ids=["empty", "rubbish", "cut", "changed"],
)
def test_a_damaged_pem_is_a_value_error_that_shows_nothing_of_it(pem: bytes) -> None:
    with pytest.raises(ValueError, match=r"^not (a readable private key|an ML-DSA-87 private key)$"):
        Identity.from_pem(pem)


@pytest.mark.parametrize(
    "other",
    [ed25519.Ed25519PrivateKey.generate(), ec.generate_private_key(ec.SECP384R1()), MLDSA65PrivateKey.generate()],
    ids=["ed25519", "p-384", "ml-dsa-65"],
)
def test_a_key_of_another_algorithm_is_no_identity(
    other: ed25519.Ed25519PrivateKey | ec.EllipticCurvePrivateKey | MLDSA65PrivateKey,
) -> None:
    pem = other.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    with pytest.raises(ValueError, match="not an ML-DSA-87 private key"):
        Identity.from_pem(pem)


def test_an_identity_shows_as_its_fingerprint() -> None:
    assert repr(IDENTITY) == f"<Identity {fingerprint(IDENTITY.public_key)}>"


def test_a_fingerprint_is_128_bits_of_sha_384_in_groups_of_four() -> None:
    # SHA-384 of the empty string begins so (FIPS 180-4).
    assert fingerprint(b"") == "38b0:60a7:51ac:9638:4cd9:327e:b1b1:e36a"
