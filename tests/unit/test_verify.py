"""Facts about what an envelope must be before it may have an effect, and the reasons for which it is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from skipbus.services.syncer.verify import REASONS, Rejected, Verified, Verifier
from skipbus.shared.clock import now_ms
from skipbus.shared.crypto.epochs import EpochSpan
from skipbus.shared.crypto.hpke import HybridPrivateKey
from skipbus.shared.crypto.identity import Identity
from skipbus.shared.crypto.keyring import Keyring, PrivateEpoch
from skipbus.shared.crypto.sealing import make_wrapping_key
from skipbus.shared.peer_directory import PeerDirectory
from skipbus.shared.protocol import encoding
from skipbus.shared.protocol.envelopes import EnvelopeType, Header, sign_envelope
from skipbus.shared.protocol.payloads import pack_acknowledgement
from skipbus.shared.protocol.placed_keys import pack_placed_keys

ALICE, BOB = "KP_Alice", "KP_Bob"
IDENTITY, OTHER = Identity.generate(), Identity.generate()
PAYLOAD = pack_acknowledgement([7])
EPOCH = PrivateEpoch(
    b"e" * 16, EpochSpan(now_ms() - 60_000, now_ms() + 600_000, now_ms() + 4_000_000), HybridPrivateKey.generate()
)


def header(target: str = BOB, age_ms: int = 0) -> Header:
    return Header(EnvelopeType.KEY_STORED, ALICE, target, 7, now_ms() - age_ms)


def signed(payload: bytes = PAYLOAD, head: Header | None = None, identity: Identity = IDENTITY) -> bytes:
    return sign_envelope(head or header(), payload, identity)


def placed(signer: Identity = IDENTITY, expires_ms: int = 60_000) -> bytes:
    opened, sealed = make_wrapping_key(signer, ALICE, BOB, EPOCH.public())
    r = opened.seal(b"k" * 16, bytes(32), now_ms() + expires_ms, "c")
    record = [r.key_id, r.size_bits, r.expires_ms, r.correlation_id, r.wrapping_key_id, r.nonce, r.sealed]
    return signed(pack_placed_keys([record], [sealed], stock=False), replace(header(), type=EnvelopeType.KEY_ISSUED))


class Directory:
    """It knows KP_Alice's pin and what KP_Bob announces."""

    def __init__(self, pin: bytes | None = IDENTITY.public_key, *, announced: bool = True, bus: bool = True) -> None:
        self.known = {ALICE: pin} if pin else {}
        self.refreshed = 0
        self.announced = announced
        self.bus = bus
        self.presented: list[bytes] = []

    def pin(self, system_id: str) -> bytes | None:
        return self.known.get(system_id)

    def allows(self, system_id: str) -> bool:
        return system_id in (ALICE, BOB)

    def get(self, _: str) -> object:
        return SimpleNamespace(epochs=(EPOCH.public(),) if self.announced else ())

    def is_bus_peer(self, _: str) -> bool:
        return self.bus

    def conflicts(self) -> dict[str, object]:
        return {ALICE: SimpleNamespace(presented_key=OTHER.public_key)}

    def note_presented(self, _system_id: str, public_key: bytes, _now_ms: int) -> None:
        self.presented.append(public_key)

    def refresh(self, _: int) -> None:
        self.refreshed += 1
        self.known[ALICE] = IDENTITY.public_key


def verifier(directory: Directory | None = None, epochs: Callable[[], frozenset[bytes]] = frozenset) -> Verifier:
    return Verifier(BOB, cast("PeerDirectory", cast("Any", directory or Directory())), epochs)


@pytest.mark.parametrize("body", [signed, placed], ids=["acknowledgement", "keys"])
def test_what_is_in_order_is_accepted(body: Callable[[], bytes]) -> None:
    result = verifier().verify(body(), redelivered=True, waited_ms=0)
    assert isinstance(result, Verified)
    assert (result.header.sender, result.header.number, result.redelivered) == (ALICE, 7, True)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (lambda: bytes(5 * 2**20), "too_large"),
        (lambda: signed()[:-1], "malformed"),
        (lambda: b"", "malformed"),
        (lambda: signed(b"\x90"), "malformed_payload"),
        (lambda: signed(head=replace(header(), sender="KP_Carol")), "unknown_sender"),
        (lambda: signed(head=header(target="KP_Carol")), "wrong_target"),
        (lambda: signed(head=header(age_ms=3_700_000)), "too_old"),
        (lambda: signed(head=header(age_ms=-60_000)), "from_future"),
        (lambda: signed(identity=Identity.generate()), "bad_signature"),
        (lambda: signed(identity=OTHER), "identity_changed"),
        (lambda: placed(signer=OTHER), "bad_seal"),
        (lambda: placed(expires_ms=-1), "bad_lifetime"),
    ],
)
def test_whatever_is_wrong_is_refused_with_its_reason(body: Callable[[], bytes], reason: str) -> None:
    refusal = verifier().verify(body(), redelivered=False, waited_ms=0)
    assert isinstance(refusal, Rejected)
    assert refusal.reason == reason
    assert refusal.explanation.isprintable()


def test_a_sender_that_was_not_known_a_moment_ago_is_looked_up_once_a_second() -> None:
    directory = Directory(pin=None)
    made = verifier(directory)
    assert isinstance(made.verify(signed(), redelivered=False, waited_ms=0), Verified)
    directory.known.clear()
    for _ in range(3):
        refusal = made.verify(signed(), redelivered=False, waited_ms=0)
        assert isinstance(refusal, Rejected)
        assert refusal.reason == "unknown_sender"
    assert directory.refreshed == 1


def test_keys_from_a_peer_of_the_same_store_are_refused() -> None:
    refusal = verifier(Directory(bus=False)).verify(placed(), redelivered=False, waited_ms=0)
    assert isinstance(refusal, Rejected)
    assert refusal.reason == "not_a_bus_peer"


def test_keys_for_an_epoch_that_is_announced_no_more_are_accepted_while_the_keyring_has_it(tmp_path: Path) -> None:
    keyring = Keyring.create(tmp_path / "keyring", BOB)
    made = verifier(Directory(announced=False), lambda: frozenset(keyring.epoch_ids()))
    refusal = made.verify(placed(), redelivered=False, waited_ms=0)
    assert isinstance(refusal, Rejected)
    assert refusal.reason == "unknown_epoch"
    keyring.write_epoch(EPOCH)
    assert isinstance(made.verify(placed(), redelivered=False, waited_ms=0), Verified)


def test_an_error_that_nobody_foresaw_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError

    monkeypatch.setattr("skipbus.services.syncer.verify.check_envelope", fail)
    refusal = verifier().verify(signed(), redelivered=False, waited_ms=0)
    assert isinstance(refusal, Rejected)
    assert refusal.reason == "malformed"


def test_a_signed_envelope_keeps_its_bytes() -> None:
    """A receiver verifies what it was sent, and packs nothing anew."""
    protected, payload, proof = encoding.unpack(signed())
    repacked = encoding.pack([protected, payload, proof])
    assert isinstance(verifier().verify(repacked, redelivered=False, waited_ms=0), Verified)


def test_every_reason_that_stands_in_the_protocol_has_a_label_of_its_own() -> None:
    wire_format = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text()
    table = wire_format[wire_format.index("| check | reason") : wire_format.index("A rejected envelope goes")]
    reasons = {word for row in table.splitlines() for word in re.findall(r"`([a-z_]+)`", row.rpartition(" | ")[2])}
    assert reasons >= {"bad_signature", "replayed", "key_exists"}
    assert reasons == REASONS
