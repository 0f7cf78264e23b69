"""Facts about sealing: what a record and a wrapping key are bound to, and the pinned vectors of their bytes.

A vector is one case in one file of ``tests/vectors/sealing``: everything needed to open a record, the secrets
included, and what is expected of it. The secrets in them have never closed a real key.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given
from hypothesis import strategies as st

from skipbus.shared.crypto.epochs import EpochSpan, PublicEpoch
from skipbus.shared.crypto.hpke import PUBLIC_KEY_BYTES, HybridPrivateKey, seal
from skipbus.shared.crypto.identity import Identity
from skipbus.shared.crypto.sealing import (
    KeyRecord,
    SealedWrappingKey,
    WrappingKey,
    make_wrapping_key,
    open_wrapping_key,
)
from skipbus.shared.errors import SealBroken

T = TypeVar("T", KeyRecord, SealedWrappingKey)
VECTORS = sorted((Path(__file__).parents[1] / "vectors" / "sealing").glob("*.json"))
EXPIRES_MS = 1_800_003_600_000
KEY = bytes(range(32))
KEY_ID = bytes(range(100, 116))

SOURCE = Identity.generate()
EPOCH_KEY = HybridPrivateKey.generate()
EPOCH = PublicEpoch(b"e" * 16, EpochSpan(1, 2, EXPIRES_MS + 30_000), EPOCH_KEY.public_bytes())
WRAPPING_KEY, SEALED = make_wrapping_key(SOURCE, "KP_Alice", "KP_Bob", EPOCH)
RECORD = WRAPPING_KEY.seal(KEY_ID, KEY, EXPIRES_MS, "c-1")


def tampered_with(original: T, field: str) -> T:
    """The same with another value in one field: a bit of bytes turned, a number one greater, another text."""
    value = getattr(original, field)
    changes: dict[str, Any] = {field: f"{value}x"}
    if isinstance(value, bytes):
        changes = {field: bytes([value[0] ^ 1]) + value[1:]}
    elif isinstance(value, int):
        changes = {field: value + 1}
    either: Any = original
    changed: T = either._replace(**changes) if hasattr(either, "_replace") else replace(either, **changes)
    return changed


def opened_by_the_target() -> WrappingKey:
    return open_wrapping_key(SEALED, SOURCE.public_key, EPOCH_KEY)


# --- records


def test_a_record_opens_at_the_target_with_the_key_that_was_sealed() -> None:
    assert opened_by_the_target().open(RECORD) == KEY


@pytest.mark.parametrize("size_bits", range(128, 513, 8))
def test_a_record_holds_nothing_of_its_key_in_clear(size_bits: int) -> None:
    key = hashlib.shake_256(b"key").digest(size_bits // 8)
    record = WRAPPING_KEY.seal(KEY_ID, key, EXPIRES_MS, "c-1")
    assert record.size_bits == size_bits
    assert key[:8] not in record.sealed
    assert len(record.sealed) == len(key) + 16 <= 80


def test_the_same_key_sealed_twice_gives_different_bytes() -> None:
    nonces = {WRAPPING_KEY.seal(KEY_ID, KEY, EXPIRES_MS, "").nonce for _ in range(500)}
    assert len(nonces) == 500
    assert {len(nonce) for nonce in nonces} == {12}


def test_seals_are_counted_so_that_nonces_never_run_short() -> None:
    key, _ = make_wrapping_key(SOURCE, "KP_Alice", "KP_Bob", EPOCH)
    for _ in range(3):
        key.seal(KEY_ID, KEY, EXPIRES_MS, "")
    assert key.seals == 3


# The wrapping key is chosen by the record's wrapping_key_id, so that one is tried with the key that it then names;
# the correlation id is for the logs only and protects nothing.
@pytest.mark.parametrize(
    "field",
    [name for name in KeyRecord._fields if name not in ("wrapping_key_id", "correlation_id")],
)
def test_a_record_that_was_changed_in_the_store_does_not_open(field: str) -> None:
    tampered = tampered_with(RECORD, field)
    with pytest.raises(SealBroken):
        WRAPPING_KEY.open(tampered)


def test_a_record_that_names_another_wrapping_key_of_the_same_pair_does_not_open() -> None:
    other, _ = make_wrapping_key(SOURCE, "KP_Alice", "KP_Bob", EPOCH)
    with pytest.raises(SealBroken):
        other.open(RECORD._replace(wrapping_key_id=other.wrapping_key_id))


def test_a_record_that_names_the_pair_of_another_wrapping_key_does_not_open() -> None:
    other, _ = make_wrapping_key(SOURCE, "KP_Mallory", "KP_Bob", EPOCH)
    moved = RECORD._replace(source_id="KP_Mallory", wrapping_key_id=other.wrapping_key_id)
    with pytest.raises(SealBroken):
        other.open(moved)


def test_the_ciphertext_of_one_record_does_not_open_in_another() -> None:
    second = WRAPPING_KEY.seal(b"k" * 16, bytes(32), EXPIRES_MS, "c-2")
    with pytest.raises(SealBroken):
        WRAPPING_KEY.open(second._replace(sealed=RECORD.sealed, nonce=RECORD.nonce))


@pytest.mark.parametrize(
    "sealed",
    [b"", b"x", RECORD.sealed[:-1], RECORD.sealed + b"\0", RECORD.sealed[:16]],
    ids=["empty", "one byte", "one byte less", "one byte more", "only a tag's length"],
)
def test_a_ciphertext_that_was_cut_or_prolonged_does_not_open(sealed: bytes) -> None:
    with pytest.raises(SealBroken):
        WRAPPING_KEY.open(RECORD._replace(sealed=sealed))


@pytest.mark.parametrize("nonce", [b"", b"x" * 7, b"x" * 11, b"x" * 13, b"x" * 129])
def test_a_nonce_of_another_length_does_not_open(nonce: bytes) -> None:
    with pytest.raises(SealBroken):
        WRAPPING_KEY.open(RECORD._replace(nonce=nonce))


@given(st.binary(max_size=96), st.binary(min_size=12, max_size=12))
def test_no_made_up_ciphertext_opens(sealed: bytes, nonce: bytes) -> None:
    with pytest.raises(SealBroken):
        WRAPPING_KEY.open(RECORD._replace(sealed=sealed, nonce=nonce))


@pytest.mark.parametrize("context", [b"", b"KP_Carol", b"KP_Bo", b"KP_Bob\0"])
def test_a_record_opens_only_with_the_context_that_it_was_sealed_with(context: bytes) -> None:
    copy = WRAPPING_KEY.seal(KEY_ID, KEY, EXPIRES_MS, "", b"KP_Bob")
    assert WRAPPING_KEY.open(copy, b"KP_Bob") == KEY
    with pytest.raises(SealBroken):
        WRAPPING_KEY.open(copy, context)


def test_a_record_without_a_context_does_not_open_with_one() -> None:
    with pytest.raises(SealBroken):
        WRAPPING_KEY.open(RECORD, b"KP_Bob")


# --- wrapping keys


def test_a_wrapping_key_expires_with_the_private_half_of_its_epoch() -> None:
    assert SEALED.expires_ms == WRAPPING_KEY.expires_ms == EPOCH.span.destroy_ms


def test_no_two_wrapping_keys_share_their_secret_or_their_id() -> None:
    other, other_sealed = make_wrapping_key(SOURCE, "KP_Alice", "KP_Bob", EPOCH)
    assert other.wrapping_key_id != WRAPPING_KEY.wrapping_key_id
    assert other_sealed.sealed != SEALED.sealed
    with pytest.raises(SealBroken):
        other.open(RECORD)


@pytest.mark.parametrize("field", [f.name for f in fields(SealedWrappingKey)])
def test_a_wrapping_key_that_was_changed_in_the_store_does_not_open(field: str) -> None:
    with pytest.raises(SealBroken):
        open_wrapping_key(tampered_with(SEALED, field), SOURCE.public_key, EPOCH_KEY)


@pytest.mark.parametrize("field", [f.name for f in fields(SealedWrappingKey) if f.name not in ("sealed", "signature")])
def test_a_wrapping_key_is_bound_to_its_description_by_the_seal_as_well(field: str) -> None:
    # A source that signs another description over an old seal gets nothing opened by it either.
    tampered = tampered_with(SEALED, field)
    tampered = replace(tampered, signature=SOURCE.sign(tampered.signed_bytes(), b"skipbus wrapping key 1"))
    with pytest.raises(SealBroken, match="private key"):
        open_wrapping_key(tampered, SOURCE.public_key, EPOCH_KEY)


def test_a_wrapping_key_of_an_impostor_is_refused() -> None:
    _, forged = make_wrapping_key(Identity.generate(), "KP_Alice", "KP_Bob", EPOCH)
    with pytest.raises(SealBroken, match="signature"):
        open_wrapping_key(forged, SOURCE.public_key, EPOCH_KEY)


def test_a_wrapping_key_does_not_open_with_the_private_half_of_another_epoch() -> None:
    with pytest.raises(SealBroken, match="private key"):
        open_wrapping_key(SEALED, SOURCE.public_key, HybridPrivateKey.generate())


@pytest.mark.parametrize("half", ["ml-kem-1024", "p-384"])
def test_one_half_of_the_hybrid_private_key_is_not_enough(half: str) -> None:
    mine, foreign = EPOCH_KEY.to_bytes(), HybridPrivateKey.generate().to_bytes()
    mixed = mine[:64] + foreign[64:] if half == "ml-kem-1024" else foreign[:64] + mine[64:]
    with pytest.raises(SealBroken):
        open_wrapping_key(SEALED, SOURCE.public_key, HybridPrivateKey.from_bytes(mixed))


@pytest.mark.parametrize("length", [0, 1, PUBLIC_KEY_BYTES - 1, PUBLIC_KEY_BYTES, PUBLIC_KEY_BYTES + 1])
def test_nothing_is_sealed_to_a_malformed_public_key(length: int) -> None:
    with pytest.raises(SealBroken, match="public epoch key"):
        seal(b"secret", b"\xff" * length, b"info")


@pytest.mark.parametrize("data", [b"", bytes(111), bytes(113), bytes(112), b"\xff" * 112])
def test_malformed_private_bytes_make_no_epoch_key(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        HybridPrivateKey.from_bytes(data)


def test_no_secret_shows_in_a_repr() -> None:
    private = EPOCH_KEY.to_bytes()
    shown = f"{WRAPPING_KEY!r} {opened_by_the_target()!r} {EPOCH_KEY!r} {SEALED!r} {RECORD!r}"
    assert KEY.hex() not in shown
    assert repr(KEY)[2:-1] not in shown
    assert private.hex() not in shown
    assert "***" in repr(WRAPPING_KEY)


# --- vectors


def from_json(kind: type[T], described: dict[str, Any]) -> T:
    """The record with these fields; texts of byte fields are hex."""
    values: dict[str, Any] = {}
    for name, hint in get_type_hints(kind).items():
        value = described[name]
        values[name] = bytes.fromhex(value) if hint is bytes else value
    return kind(**values)


def read_vector(path: Path) -> dict[str, Any]:
    vector: dict[str, Any] = json.loads(path.read_text())
    return vector


def open_vector(vector: dict[str, Any]) -> bytes:
    sealed = from_json(SealedWrappingKey, vector["wrapping_key"])
    epoch_key = HybridPrivateKey.from_bytes(bytes.fromhex(vector["epoch"]["private_key"]))
    wrapping_key = open_wrapping_key(sealed, bytes.fromhex(vector["source_public_key"]), epoch_key)
    return wrapping_key.open(from_json(KeyRecord, vector["record"]), bytes.fromhex(vector.get("context", "")))


def test_the_vectors_are_there() -> None:
    expectations = [read_vector(path)["expect"] for path in VECTORS]
    assert expectations.count("opens") == 6
    assert expectations.count("broken") == 7


@pytest.mark.parametrize("path", VECTORS, ids=lambda path: path.stem)
def test_a_record_of_an_earlier_release_opens_as_its_vector_says(path: Path) -> None:
    vector = read_vector(path)
    if vector["expect"] == "broken":
        with pytest.raises(SealBroken):
            open_vector(vector)
    else:
        assert open_vector(vector).hex() == vector["key"]


@pytest.mark.parametrize(
    "path", [p for p in VECTORS if read_vector(p)["expect"] == "opens"], ids=lambda path: path.stem
)
def test_the_bytes_of_a_vector_are_what_the_format_says(path: Path) -> None:
    vector = read_vector(path)
    record, wrapping_key = vector["record"], vector["wrapping_key"]
    bound = bytes.fromhex(record["associated_data"])
    aead = AESGCM(bytes.fromhex(wrapping_key["secret"]))
    # With the library alone, so that a change of what is bound shows here and not only as "does not open".
    key = aead.decrypt(bytes.fromhex(record["nonce"]), bytes.fromhex(record["sealed"]), bound)
    assert key.hex() == vector["key"]
    assert from_json(SealedWrappingKey, wrapping_key).binding().hex() == wrapping_key["binding"]
    epoch_key = HybridPrivateKey.from_bytes(bytes.fromhex(vector["epoch"]["private_key"]))
    digest = hashlib.sha384(epoch_key.public_bytes()).hexdigest()
    assert digest == vector["epoch"]["public_key_sha384"]
