"""Facts about announcements: what is read back is what was signed, and nothing hostile is read at all."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from skipbus.shared.crypto.epochs import EpochSpan, PublicEpoch
from skipbus.shared.crypto.hpke import PUBLIC_KEY_BYTES
from skipbus.shared.crypto.identity import CONTEXT_ANNOUNCEMENT, CONTEXT_ENVELOPE, Identity
from skipbus.shared.errors import SealBroken
from skipbus.shared.protocol import encoding
from skipbus.shared.protocol.announcements import (
    MAX_ANNOUNCEMENT_BYTES,
    Announcement,
    digest,
    read_announcement,
    sign_announcement,
)

IDENTITY = Identity.generate()
EPOCHS = tuple(
    PublicEpoch(bytes([n]) * 16, EpochSpan(n * 1000, n * 1000 + 1000, n * 1000 + 5000), b"p" * PUBLIC_KEY_BYTES)
    for n in range(1, 4)
)
ANNOUNCEMENT = Announcement("KP_Alice", IDENTITY.public_key, 1_800_000_000_000, "MLKEM1024-P384", EPOCHS)
SIGNED = sign_announcement(ANNOUNCEMENT, IDENTITY)
BODY, SIGNATURE = encoding.unpack(SIGNED)
FIELDS: dict[str, Any] = encoding.unpack(BODY)


def signed(body: bytes, context: bytes = CONTEXT_ANNOUNCEMENT) -> bytes:
    return encoding.pack([body, IDENTITY.sign(body, context)])


def signed_with(**changes: object) -> bytes:
    """A rightly signed announcement with other fields."""
    return signed(encoding.pack(FIELDS | changes))


def epoch_entry(**changes: object) -> list[object]:
    entry = {"id": b"i" * 16, "starts": 1, "ends": 2, "destroy": 3, "key": b"p" * PUBLIC_KEY_BYTES} | changes
    return list(entry.values())


def test_what_was_signed_is_what_is_read() -> None:
    assert read_announcement(SIGNED) == ANNOUNCEMENT


def test_an_announcement_without_epochs_is_read() -> None:
    bare = replace(ANNOUNCEMENT, epochs=())
    assert read_announcement(sign_announcement(bare, IDENTITY)) == bare


def test_the_digest_is_sha_384_of_the_bytes() -> None:
    assert digest(SIGNED) == hashlib.sha384(SIGNED).digest()


def test_one_turned_bit_anywhere_breaks_it() -> None:
    for place in range(0, len(SIGNED), 97):
        turned = SIGNED[:place] + bytes([SIGNED[place] ^ 4]) + SIGNED[place + 1 :]
        with pytest.raises(SealBroken):
            read_announcement(turned)


@pytest.mark.parametrize("field", ["system_id", "issued_ms", "algorithm", "epochs", "public_key"])
def test_a_field_changed_after_signing_breaks_it(field: str) -> None:
    others = {
        "system_id": "KP_Mallory",
        "issued_ms": 1_900_000_000_000,
        "algorithm": "none",
        "epochs": [],
        "public_key": Identity.generate().public_key,
    }
    body = encoding.pack(FIELDS | {field: others[field]})
    with pytest.raises(SealBroken, match="does not verify"):
        read_announcement(encoding.pack([body, SIGNATURE]))


def test_a_signature_made_for_an_envelope_signs_no_announcement() -> None:
    with pytest.raises(SealBroken, match="does not verify"):
        read_announcement(signed(BODY, CONTEXT_ENVELOPE))


@pytest.mark.parametrize("signature", [5, "text", None, [1], {}, b"", b"x" * 4627])
def test_whatever_stands_in_the_signatures_place_is_refused(signature: object) -> None:
    with pytest.raises(SealBroken):
        read_announcement(encoding.pack([BODY, signature]))


@pytest.mark.parametrize("version", [0, 2, 2**40])
def test_an_unknown_version_is_refused_by_its_number(version: object) -> None:
    with pytest.raises(SealBroken, match="version"):
        read_announcement(signed_with(version=version))


@pytest.mark.parametrize(
    "changes",
    [
        {"system_id": ""},
        {"system_id": "KP_*"},
        {"system_id": "x" * 65},
        {"system_id": "KP\n"},
        {"system_id": b"KP_Alice"},
        {"public_key": "text"},
        {"issued_ms": "1800000000000"},
        {"issued_ms": None},
        {"issued_ms": -1},
        {"issued_ms": True},
        {"algorithm": 5},
        {"epochs": None},
        {"epochs": {}},
        {"epochs": "epochs"},
        {"epochs": [5]},
        {"epochs": [[]]},
        {"epochs": [epoch_entry()[:4]]},
        {"epochs": [[*epoch_entry(), 1]]},
        {"epochs": [epoch_entry(id=b"short")]},
        {"epochs": [epoch_entry(id="i" * 16)]},
        {"epochs": [epoch_entry(key=b"p")]},
        {"epochs": [epoch_entry(starts=0)]},
        {"epochs": [epoch_entry(starts=-5)]},
        {"epochs": [epoch_entry(starts=2)]},
        {"epochs": [epoch_entry(destroy=1)]},
        {"epochs": [epoch_entry(ends="2")]},
    ],
    ids=lambda changes: str(changes)[:40],
)
def test_a_malformed_field_is_refused_even_when_it_is_signed(changes: dict[str, object]) -> None:
    with pytest.raises(SealBroken, match="malformed"):
        read_announcement(signed_with(**changes))


def test_a_missing_field_is_refused() -> None:
    for name in FIELDS:
        body = encoding.pack({key: value for key, value in FIELDS.items() if key != name})
        with pytest.raises(SealBroken, match="malformed"):
            read_announcement(signed(body))


def test_an_announcement_without_end_is_refused_before_it_is_read() -> None:
    with pytest.raises(SealBroken, match="more than"):
        read_announcement(b"\xc4" * (MAX_ANNOUNCEMENT_BYTES + 1))


HOSTILE = [
    b"",
    b"\xc1",
    b"\x91" * 100_000,  # lists in lists
    b"\xdd\xff\xff\xff\xff",  # a list of four thousand million
    b"\xdf\xff\xff\xff\xff",
    b"\xc6\xff\xff\xff\xff",
    encoding.pack([]),
    encoding.pack([BODY]),
    encoding.pack([BODY, SIGNATURE, b""]),
    encoding.pack({"body": BODY}),
    encoding.pack([5, SIGNATURE]),
    encoding.pack([encoding.pack("version"), SIGNATURE]),
    encoding.pack([encoding.pack([1]), SIGNATURE]),
    encoding.pack([b"\xd4\x01x", SIGNATURE]),  # an extension type
    SIGNED + b"\0",
    SIGNED[:-1],
]


@pytest.mark.parametrize("data", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(SealBroken):
        read_announcement(data)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text(max_size=8) | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(name=st.sampled_from(sorted(FIELDS)), value=PLAIN, signature=PLAIN)
def test_no_plain_value_in_any_place_raises_anything_but_seal_broken(
    name: str, value: object, signature: object
) -> None:
    with pytest.raises(SealBroken):
        read_announcement(encoding.pack([encoding.pack(FIELDS | {name: value}), signature]))


@given(st.binary(max_size=200))
def test_no_bytes_raise_anything_but_seal_broken(data: bytes) -> None:
    with pytest.raises(SealBroken):
        read_announcement(data)
