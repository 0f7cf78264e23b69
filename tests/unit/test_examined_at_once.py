"""What of an examination is done on the event loop: only what takes no time, and nothing else than a thread finds."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from skipbus.services.syncer import examination
from skipbus.services.syncer.examination import MAX_AT_ONCE_BYTES, Accepted, Examiner, Refusal
from skipbus.services.syncer.metrics import REASONS
from skipbus.services.syncer.payloads import pack_acknowledgement
from skipbus.services.syncer.placed_keys import pack_placed_keys
from skipbus.shared import sessions
from skipbus.shared.bus_bodies import LeftOut
from skipbus.shared.clock import now_ms
from skipbus.shared.crypto.epochs import EpochSpan
from skipbus.shared.crypto.hpke import HybridPrivateKey
from skipbus.shared.crypto.identity import Identity
from skipbus.shared.crypto.keyring import Keyring, PrivateEpoch
from skipbus.shared.crypto.sealing import make_wrapping_key
from skipbus.shared.peer_directory import PeerDirectory
from skipbus.shared.protocol import encoding, envelopes
from skipbus.shared.protocol.envelopes import EnvelopeType, Header, session_envelope, sign_envelope
from skipbus.shared.sessions import SessionBook, make_session_key

ALICE, BOB = "KP_Alice", "KP_Bob"
IDENTITY = Identity.generate()
PAYLOAD = pack_acknowledgement([7])
EPOCH = PrivateEpoch(
    b"e" * 16, EpochSpan(now_ms() - 60_000, now_ms() + 600_000, now_ms() + 4_000_000), HybridPrivateKey.generate()
)
KEY, SESSION = make_session_key(IDENTITY, ALICE, BOB, EPOCH.public())


def header(target: str = BOB, age_ms: int = 0) -> Header:
    return Header(EnvelopeType.KEY_STORED, ALICE, target, 7, now_ms() - age_ms)


def in_session(payload: bytes = PAYLOAD, head: Header | None = None) -> bytes:
    return session_envelope(head or header(), payload, KEY.mac, SESSION)


def placed(*, stock: bool = False) -> bytes:
    opened, sealed = make_wrapping_key(IDENTITY, ALICE, BOB, EPOCH.public())
    r = opened.seal(b"k" * 16, bytes(32), now_ms() + 60_000, "c")
    record = [r.key_id, r.size_bits, r.expires_ms, r.correlation_id, r.wrapping_key_id, r.nonce, r.sealed]
    return pack_placed_keys([record], [sealed], stock=stock)


def directory(
    pin: bytes | None = IDENTITY.public_key, *, announced: bool = True, conflicts: dict[str, Any] | None = None
) -> PeerDirectory:
    """It knows KP_Alice's pin and what KP_Bob announces. It cannot be refreshed: nothing may ask the store."""
    own = SimpleNamespace(epochs=(EPOCH.public(),) if announced else ())
    known = SimpleNamespace(
        pin=lambda system_id: pin if system_id == ALICE else None,
        allows=lambda system_id: system_id in (ALICE, BOB),
        get=lambda _: own,
        is_bus_peer=lambda _: True,
        conflicts=lambda: conflicts or {},
        note_presented=lambda *_: None,
        refresh=lambda _: pytest.fail("the store is asked"),
    )
    return cast("PeerDirectory", cast("Any", known))


@pytest.fixture
def keyring(tmp_path: Path) -> Keyring:
    made = Keyring.create(tmp_path / "keyring", BOB)
    made.write_epoch(EPOCH)
    return made


@pytest.fixture
def examiner(keyring: Keyring) -> Examiner:
    """It has seen the session key before."""
    made = Examiner(BOB, directory(), keyring.epoch_ids, SessionBook(keyring))
    assert isinstance(made.examine(in_session(), redelivered=False), Accepted)
    return made


def test_an_envelope_under_a_known_session_key_is_examined_as_in_a_thread(examiner: Examiner) -> None:
    body = in_session()
    at_once, in_thread = examiner.examine_at_once(body, False), examiner.examine(body, redelivered=False)
    assert isinstance(at_once, Accepted)
    assert isinstance(in_thread, Accepted)
    assert replace(at_once, clock_skew_ms=0) == replace(in_thread, clock_skew_ms=0)


def test_a_session_key_that_is_not_open_is_left_to_a_thread(keyring: Keyring) -> None:
    fresh = Examiner(BOB, directory(), keyring.epoch_ids, SessionBook(keyring))
    assert fresh.examine_at_once(in_session(), False) is None
    assert isinstance(fresh.examine(in_session(), redelivered=False), Accepted)
    assert fresh.examine_at_once(in_session(), False) is not None


@pytest.mark.parametrize(
    "body",
    [
        lambda: sign_envelope(header(), PAYLOAD, IDENTITY),
        # It says that it is signed, and has the session key that is known where the signature should be.
        lambda: encoding.pack(
            [encoding.unpack(sign_envelope(header(), PAYLOAD, IDENTITY))[0], *encoding.unpack(in_session())[1:]]
        ),
    ],
    ids=["signed", "signed in session"],
)
def test_what_takes_long_is_left_to_a_thread(
    examiner: Examiner, body: Callable[[], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (envelopes, sessions):
        monkeypatch.setattr(module, "verify", lambda *_: pytest.fail("it is verified here"))
    assert examiner.examine_at_once(body(), False) is None


@pytest.mark.parametrize(
    "body",
    [lambda: in_session(encoding.pack(bytes(MAX_AT_ONCE_BYTES))), lambda: LeftOut.of(5 * 2**20)],
    ids=["long", "left out"],
)
def test_what_is_long_is_not_even_read(
    examiner: Examiner, body: Callable[[], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    long = body()
    monkeypatch.setattr(examination, "read_envelope", lambda _: pytest.fail("it is read here"))
    assert examiner.examine_at_once(long, False) is None


def test_a_sender_whose_pin_is_not_known_is_left_to_a_thread(keyring: Keyring) -> None:
    strange = Examiner(BOB, directory(pin=None), keyring.epoch_ids, SessionBook(keyring))
    assert strange.examine_at_once(in_session(), False) is None


def test_keys_under_a_wrapping_key_that_was_not_verified_before_are_left_to_a_thread(examiner: Examiner) -> None:
    body = in_session(placed(), replace(header(), type=EnvelopeType.KEY_ISSUED))
    assert examiner.examine_at_once(body, False) is None
    assert isinstance(examiner.examine(body, redelivered=False), Accepted)
    assert isinstance(examiner.examine_at_once(body, False), Accepted)


def test_keys_for_an_epoch_that_only_the_keyring_knows_are_left_to_a_thread(keyring: Keyring) -> None:
    """To look into its folder takes as long as that has files."""
    forgetful = Examiner(BOB, directory(announced=False), keyring.epoch_ids, SessionBook(keyring))
    body = in_session(placed(), replace(header(), type=EnvelopeType.KEY_ISSUED))
    for _ in range(2):
        assert isinstance(forgetful.examine(body, redelivered=False), Accepted)
        assert forgetful.examine_at_once(body, False) is None


@pytest.mark.parametrize("payload", [b"\x91\x94\xc4\x01k\xcd\x01\x00\x01\xa1c", None], ids=["news", "stock"])
def test_what_nobody_waits_for_needs_a_signature_of_its_own(examiner: Examiner, payload: bytes | None) -> None:
    body = in_session(payload or placed(stock=True), replace(header(), type=EnvelopeType.KEY_ISSUED))
    assert examiner.examine_at_once(body, False) is None
    refusal = examiner.examine(body, redelivered=False)
    assert isinstance(refusal, Refusal)
    assert refusal.reason == "bad_signature"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (lambda: in_session()[:-1], "malformed"),
        (lambda: in_session(b"\x90"), "malformed_payload"),
        (lambda: in_session(head=header(target="KP_Carol")), "wrong_target"),
        (lambda: in_session(head=header(age_ms=3_700_000)), "too_old"),
        (lambda: session_envelope(header(), PAYLOAD, lambda _: bytes(48), SESSION), "bad_signature"),
        (lambda: session_envelope(header(), PAYLOAD, lambda _: b"", SESSION), "malformed"),
        (lambda: b"", "malformed"),
    ],
)
def test_whatever_is_wrong_is_left_to_a_thread_that_says_what(
    examiner: Examiner, body: Callable[[], bytes], reason: str
) -> None:
    made = body()
    assert examiner.examine_at_once(made, False) is None
    refusal = examiner.examine(made, redelivered=False)
    assert isinstance(refusal, Refusal)
    assert refusal.reason == reason


def test_who_else_may_have_signed_it_is_left_to_a_thread(keyring: Keyring, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another identity is presented under the name; whether it stands for a bad envelope takes a verification."""
    presented = {ALICE: SimpleNamespace(presented_key=Identity.generate().public_key)}
    made = Examiner(BOB, directory(conflicts=presented), keyring.epoch_ids, SessionBook(keyring))
    assert isinstance(made.examine(in_session(), redelivered=False), Accepted)
    monkeypatch.setattr(sessions, "verify", lambda *_: pytest.fail("it is verified here"))
    assert made.examine_at_once(session_envelope(header(), PAYLOAD, lambda _: bytes(48), SESSION), False) is None


def test_without_sessions_nothing_is_examined_at_once() -> None:
    assert Examiner(BOB, directory()).examine_at_once(in_session(), False) is None


def test_every_reason_that_stands_in_the_wire_format_has_a_label_of_its_own() -> None:
    wire_format = (Path(__file__).parents[2] / "docs" / "wire.md").read_text()
    table = wire_format[wire_format.index("| step | reason") : wire_format.index("A refused envelope is rejected")]
    reasons = {word for row in table.splitlines() for word in re.findall(r"`([a-z_]+)`", row.rpartition(" | ")[2])}
    assert reasons >= {"bad_signature", "unknown_session", "replayed"}
    assert reasons == REASONS
