"""Facts about envelopes: the pinned vectors of their bytes, and what a stranger's bytes cannot do.

A vector is one case in one file of ``tests/vectors/envelopes``: the bytes, the pin and the clock of the receiver,
and either what they say or the reason why they are refused. Signatures are randomised, so a signature is pinned
by verifying it, not by making it anew.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skipbus.services.syncer.verify import OwnEpochs, verify_keys
from skipbus.shared.crypto.identity import Identity
from skipbus.shared.errors import EnvelopeRefused
from skipbus.shared.protocol import encoding
from skipbus.shared.protocol.envelopes import (
    MAX_ENVELOPE_BYTES,
    Claim,
    EnvelopeType,
    Header,
    SignedEnvelope,
    check_envelope,
    read_claim,
    read_envelope,
    sign_envelope,
)
from skipbus.shared.protocol.payloads import read_payload
from skipbus.shared.protocol.placed_keys import PlacedKeys

VECTORS = sorted((Path(__file__).parents[1] / "vectors" / "envelopes").glob("*.json"))
IDENTITY = Identity.generate()
NOW_MS = 1_800_000_000_000
HEADER = Header(EnvelopeType.KEY_EXPIRED, "KP_Alice", "KP_Bob", 7, NOW_MS)


def load(path: Path) -> dict[str, Any]:
    vector = json.loads(path.read_text())
    assert isinstance(vector, dict)
    return vector


def receive(vector: dict[str, Any]) -> SignedEnvelope:
    """What a receiver does with the bytes, in its order."""
    envelope = read_envelope(bytes.fromhex(vector["envelope"]))
    sender_public_key = bytes.fromhex(vector["sender_public_key"])
    check_envelope(envelope, vector["local_id"], sender_public_key, vector["now_ms"])
    payload = read_payload(envelope.header.type, envelope.payload)
    if isinstance(payload, PlacedKeys):
        epochs = OwnEpochs(frozenset)
        epochs.note(((bytes.fromhex(epoch_id), destroy_ms) for epoch_id, destroy_ms in vector["epochs"]), 0)
        bus_peer = vector["link"] == "bus"
        verify_keys(envelope.header, payload, sender_public_key, epochs, vector["now_ms"], bus_peer=bus_peer)
    return envelope


def in_hex(value: object) -> object:
    """A payload as the vectors write it: byte strings as {"hex": …}."""
    if isinstance(value, bytes):
        return {"hex": value.hex()}
    if isinstance(value, list):
        return [in_hex(entry) for entry in value]
    if isinstance(value, dict):
        return {name: in_hex(entry) for name, entry in value.items()}
    return value


@pytest.mark.parametrize("path", VECTORS, ids=lambda path: path.stem)
def test_a_vector_is_read_as_it_says(path: Path) -> None:
    vector = load(path)
    if vector["expect"] != "accepted":
        with pytest.raises(EnvelopeRefused) as caught:
            receive(vector)
        assert caught.value.reason == vector["expect"]
        return
    envelope = receive(vector)
    assert asdict(envelope.header) == vector["header"]
    assert in_hex(encoding.unpack(envelope.payload)) == vector["payload"]


def test_every_envelope_type_has_a_vector() -> None:
    pinned = {load(path)["header"]["type"] for path in VECTORS if load(path)["expect"] == "accepted"}
    assert pinned == {kind.value for kind in EnvelopeType}


def test_the_signed_part_of_an_envelope_is_made_as_the_vectors_have_it() -> None:
    for path in VECTORS:
        vector = load(path)
        if vector["expect"] == "accepted":
            pinned = read_envelope(bytes.fromhex(vector["envelope"]))
            made = read_envelope(sign_envelope(pinned.header, pinned.payload, IDENTITY))
            assert (made.protected, made.payload) == (pinned.protected, pinned.payload)


def test_an_envelope_of_an_unknown_version_or_type_still_says_whose_it_is() -> None:
    """The first six fields of the protected part keep their places in all versions."""
    protected = [3, "key.blessed", "KP_Alice", "KP_Bob", 7, NOW_MS, "what version 3 adds"]
    later = encoding.pack([encoding.pack(protected), b"payload", b"signature", b"a fourth part"])
    assert read_claim(later) == Claim(3, "KP_Alice", "KP_Bob", 7)
    assert read_claim(sign_envelope(HEADER, b"", IDENTITY)) == Claim(1, "KP_Alice", "KP_Bob", 7)


@given(st.binary(max_size=200))
def test_a_strangers_bytes_claim_nothing_and_raise_nothing(data: bytes) -> None:
    assert read_claim(data) is None


def test_an_envelope_of_more_than_four_mebibytes_is_refused_unread() -> None:
    with pytest.raises(EnvelopeRefused) as caught:
        read_envelope(bytes(MAX_ENVELOPE_BYTES + 1))
    assert caught.value.reason == "too_large"


@given(st.binary(max_size=400))
def test_a_strangers_bytes_are_refused_and_raise_nothing_else(data: bytes) -> None:
    with pytest.raises(EnvelopeRefused):
        check_envelope(read_envelope(data), "KP_Bob", IDENTITY.public_key, NOW_MS)


@settings(max_examples=50)
@given(st.data())
def test_no_bit_of_an_envelope_can_be_turned(data: st.DataObject) -> None:
    envelope = sign_envelope(HEADER, encoding.pack([[b"k" * 16, 1, "c"]]), IDENTITY)
    place = data.draw(st.integers(0, len(envelope) - 1))
    turned = envelope[:place] + bytes([envelope[place] ^ 1 << data.draw(st.integers(0, 7))]) + envelope[place + 1 :]
    with pytest.raises(EnvelopeRefused):
        check_envelope(read_envelope(turned), "KP_Bob", IDENTITY.public_key, NOW_MS)


scalars = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text(max_size=70) | st.binary(max_size=70)
plain_values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)


@given(st.sampled_from(EnvelopeType), plain_values)
def test_a_peers_payload_is_read_or_refused_and_raises_nothing_else(kind: EnvelopeType, value: object) -> None:
    reason = None
    try:
        read_payload(kind, encoding.pack(value))
    except EnvelopeRefused as error:
        reason = error.reason
    assert reason in (None, "malformed_payload")


def nested(depth: int) -> bytes:
    """So many lists within each other, in MessagePack."""
    return b"\x91" * depth + b"\x01"


@pytest.mark.parametrize(
    "version", [nested(n) for n in (1, 980, 1000, 1023)] + [b"\xc6\x00\x10\x00\x00" + b"x" * 2**20]
)
def test_a_version_that_is_no_number_is_malformed_and_is_not_repeated(version: bytes) -> None:
    protected = (
        b"\x96"
        + version
        + encoding.pack("heartbeat")
        + encoding.pack("KP_Bob")
        + encoding.pack("KP_Alice")
        + b"\x01\x01"
    )
    with pytest.raises(EnvelopeRefused) as refused:
        read_envelope(encoding.pack([protected, b"", b""]))
    assert refused.value.reason == "malformed"
    assert len(str(refused.value)) < 200


def test_only_what_helps_nobody_later_is_not_kept_by_a_broker() -> None:
    assert {kind.value for kind in EnvelopeType if kind.is_live} == {"heartbeat", "capabilities", "envelope.refused"}
