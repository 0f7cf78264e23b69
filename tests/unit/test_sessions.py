"""Facts about session keys: when an envelope is under one, what it costs, and who cannot make one.

What a receiver refuses is pinned by the vectors of ``test_envelopes``; here are the keys that are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pytest

from skipbus.services.api.links.placing import pack_records
from skipbus.services.syncer.letters import LetterMaker
from skipbus.services.syncer.numbers import Numbers
from skipbus.services.syncer.outgoing import Letter, Outgoing
from skipbus.shared import sessions
from skipbus.shared.bus import Bus
from skipbus.shared.bus_names import nudge_routing_key
from skipbus.shared.clock import now_ms
from skipbus.shared.crypto.epochs import EpochSpan
from skipbus.shared.crypto.hpke import HybridPrivateKey
from skipbus.shared.crypto.identity import Identity
from skipbus.shared.crypto.keyring import Keyring, PrivateEpoch
from skipbus.shared.crypto.sealing import make_wrapping_key
from skipbus.shared.errors import EnvelopeRefused, TakesLong
from skipbus.shared.nudges import NudgeKind, pack_unread, read_nudge, read_unread
from skipbus.shared.protocol import encoding
from skipbus.shared.protocol.announcements import Announcement
from skipbus.shared.protocol.envelopes import (
    SESSION_VERSION,
    VERSION,
    VERSIONS,
    EnvelopeType,
    Header,
    SignedEnvelope,
    check_envelope,
    read_envelope,
)
from skipbus.shared.secret import Secret
from skipbus.shared.sessions import SessionBook, SessionMaker
from skipbus.shared.store.messages import OutboxEnvelope
from skipbus.shared.store.placing import KEY_PLACED, KEY_STOCKED

if TYPE_CHECKING:
    from skipbus.services.syncer.https_link import HttpsLink

ALICE, BOB = "KP_Alice", "KP_Bob"
IDENTITY, BOBS = Identity.generate(), Identity.generate()
NOW_MS = now_ms()


def epoch_from(starts_ms: int) -> PrivateEpoch:
    span = EpochSpan(starts_ms, starts_ms + 600_000, starts_ms + 4_230_000)
    return PrivateEpoch(starts_ms.to_bytes(16, "big"), span, HybridPrivateKey.generate())


NOW, NEXT = epoch_from(NOW_MS - 300_000), epoch_from(NOW_MS + 300_000)


def announced(
    epochs: Sequence[PrivateEpoch] = (NOW, NEXT), versions: tuple[int, ...] = VERSIONS, identity: Identity = BOBS
) -> Announcement:
    public = tuple(epoch.public() for epoch in epochs)
    return Announcement(BOB, identity.public_key, NOW_MS, "test", public, versions)


def header(at_ms: int = NOW_MS, number: int = 7, target: str = BOB) -> Header:
    return Header(EnvelopeType.KEY_ISSUED, ALICE, target, number, at_ms)


class Pair:
    """KP_Alice, who makes session keys, and KP_Bob, who opens them."""

    def __init__(self, folder: Path) -> None:
        self.announcement: Announcement | None = announced()
        self.maker = SessionMaker(ALICE, IDENTITY, lambda _: self.announcement)
        self.keyring = Keyring.create(folder / "keyring", BOB)
        for epoch in (NOW, NEXT):
            self.keyring.write_epoch(epoch)
        self.book = SessionBook(self.keyring)

    def made(self, at_ms: int = NOW_MS) -> SignedEnvelope:
        envelope = self.maker.envelope(header(at_ms), b"\x90")
        assert envelope is not None
        return read_envelope(envelope)

    def check(self, envelope: SignedEnvelope, at_ms: int = NOW_MS) -> None:
        check_envelope(envelope, BOB, IDENTITY.public_key, at_ms, self.book)


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return Pair(tmp_path)


def reason_of(pair: Pair, envelope: SignedEnvelope, at_ms: int = NOW_MS) -> str:
    with pytest.raises(EnvelopeRefused) as caught:
        pair.check(envelope, at_ms)
    return caught.value.reason


def is_open(pair: Pair, envelope: SignedEnvelope) -> bool:
    """Whether the envelope's session key is remembered."""
    try:
        pair.book.check(envelope, IDENTITY.public_key, NOW_MS, quickly=True)
    except TakesLong:
        return False
    return True


def session_of(envelope: SignedEnvelope) -> bytes:
    return sessions._read_proof(envelope)[1]


def test_an_envelope_under_a_session_key_is_read_by_who_can_open_it(pair: Pair) -> None:
    envelope = pair.made()
    assert envelope.version == SESSION_VERSION
    assert (envelope.header, envelope.payload) == (header(), b"\x90")
    pair.check(envelope)


def test_a_session_key_is_signed_and_opened_once_in_an_epoch(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    first = pair.made()
    pair.check(first)
    # From here on neither side signs, verifies or opens anything anew.
    monkeypatch.setattr(sessions, "make_session_key", None)
    monkeypatch.setattr(sessions, "verify", None)
    pair.keyring.destroy_epoch(NOW.epoch_id)
    second = pair.made()
    assert session_of(second) == session_of(first)
    pair.check(second)


def test_the_next_epoch_gets_a_session_key_of_its_own(pair: Pair) -> None:
    later_ms = NOW_MS + 300_000
    envelope = pair.made(later_ms)
    assert session_of(envelope) != session_of(pair.made())
    pair.check(envelope, later_ms)


def test_a_peer_with_another_identity_gets_a_session_key_of_its_own(pair: Pair) -> None:
    first = session_of(pair.made())
    pair.announcement = announced(identity=Identity.generate())
    assert session_of(pair.made()) != first


@pytest.mark.parametrize(
    "announcement",
    [None, announced(versions=(VERSION,)), announced(epochs=()), announced(epochs=(NEXT,))],
    ids=["unknown", "of an earlier release", "without epochs", "without an epoch for now"],
)
def test_what_the_target_could_not_read_is_to_be_signed(pair: Pair, announcement: Announcement | None) -> None:
    pair.announcement = announcement
    assert pair.maker.envelope(header(), b"\x90") is None


def test_a_peer_whose_epoch_key_is_no_key_is_sent_signatures(pair: Pair) -> None:
    broken = replace(NOW.public(), public_key=bytes(len(NOW.public().public_key)))
    pair.announcement = replace(announced(), epochs=(broken,))
    assert pair.maker.envelope(header(), b"\x90") is None


def test_a_peer_that_could_not_read_one_is_sent_signatures_until_it_announces_itself_anew(pair: Pair) -> None:
    first = pair.made()
    pair.maker.note_unread(BOB, first.header.number)
    assert pair.maker.envelope(header(), b"\x90") is None
    pair.announcement = replace(announced(), issued_ms=NOW_MS + 1)
    assert session_of(pair.made()) != session_of(first)


@pytest.mark.parametrize(("peer_id", "number"), [(BOB, 8), ("KP_Carol", 7)])
def test_whoever_says_that_an_envelope_was_not_read_which_never_was_changes_nothing(
    pair: Pair, peer_id: str, number: int
) -> None:
    first = pair.made()
    pair.maker.note_unread(peer_id, number)
    assert session_of(pair.made()) == session_of(first)


def test_on_the_event_loop_no_session_key_is_made(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    assert pair.maker.envelope(header(), b"\x90", make=False) is None
    made = pair.made()
    monkeypatch.setattr(sessions, "make_session_key", None)
    envelope = pair.maker.envelope(header(), b"\x90", make=False)
    assert envelope is not None
    assert session_of(read_envelope(envelope)) == session_of(made)
    assert pair.maker.envelope(header(NOW_MS + 300_000), b"\x90", make=False) is None


def test_a_session_key_that_was_opened_is_refused_after_its_end(pair: Pair) -> None:
    envelope = pair.made()
    pair.check(envelope)
    late_ms = NOW.span.destroy_ms
    later = replace(envelope, header=header(late_ms))
    assert reason_of(pair, later, late_ms) == "unknown_session"


def test_a_session_key_that_was_opened_is_refused_under_another_pin(pair: Pair) -> None:
    envelope = pair.made()
    pair.check(envelope)
    with pytest.raises(EnvelopeRefused) as caught:
        check_envelope(envelope, BOB, BOBS.public_key, NOW_MS, pair.book)
    assert caught.value.reason == "bad_signature"


def test_a_session_key_that_was_opened_is_refused_from_another_sender(pair: Pair) -> None:
    envelope = pair.made()
    pair.check(envelope)
    other = replace(envelope, header=replace(envelope.header, sender="KP_Carol"))
    assert reason_of(pair, other) == "bad_signature"


def test_the_epoch_that_was_destroyed_opens_no_session_key(pair: Pair) -> None:
    envelope = pair.made()
    pair.keyring.destroy_epoch(NOW.epoch_id)
    assert reason_of(pair, envelope) == "unknown_session"


def test_a_few_session_keys_are_remembered_of_each_peer(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "_KEPT_OF_PEER", 2)
    opened = []
    for issued_ms in range(4):
        pair.announcement = replace(announced(), issued_ms=issued_ms)
        opened.append(pair.made())
        pair.check(opened[-1])
        pair.maker.note_unread(BOB, 7)
    assert [is_open(pair, one) for one in opened] == [False, False, True, True]


def test_session_keys_that_have_ended_are_forgotten(pair: Pair) -> None:
    envelope = pair.made()
    pair.check(envelope)
    late_ms = NOW.span.destroy_ms
    assert reason_of(pair, replace(envelope, header=header(late_ms)), late_ms) == "unknown_session"
    assert not is_open(pair, envelope)


def test_without_sessions_only_a_signature_counts(pair: Pair) -> None:
    with pytest.raises(EnvelopeRefused) as caught:
        check_envelope(pair.made(), BOB, IDENTITY.public_key, NOW_MS)
    assert caught.value.reason == "bad_signature"


@pytest.mark.parametrize(("row_type", "waited_for"), [(KEY_PLACED, True), (KEY_STOCKED, False), ("key.expired", False)])
def test_of_what_is_in_the_outbox_only_keys_on_demand_are_waited_for(row_type: str, waited_for: bool) -> None:
    opened, sealed = make_wrapping_key(IDENTITY, ALICE, BOB, NOW.public())
    record = opened.seal(b"k" * 16, bytes(32), NOW_MS + 60_000, "c")
    payload = (
        pack_records([record]) if row_type in (KEY_PLACED, KEY_STOCKED) else encoding.pack([[b"k" * 16, NOW_MS, "c"]])
    )
    letter = LetterMaker().make(lambda _: [sealed], OutboxEnvelope(BOB, 7, row_type, 1, 0, None), [payload])
    assert letter is not None
    assert letter.waited_for is waited_for


def outgoing(pair: Pair) -> Outgoing:
    bus = Bus(Secret("amqp://127.0.0.1:1/"), ALICE, "test")
    return Outgoing(bus, IDENTITY, ALICE, Numbers(), sessions=pair.maker)


def version_of(letter: Letter) -> int:
    assert letter.signed is not None
    return read_envelope(letter.signed).version


def test_what_an_encryptor_waits_for_goes_under_a_session_key_and_all_else_is_signed(pair: Pair) -> None:
    made = outgoing(pair)
    waited_for = Letter(EnvelopeType.KEY_ISSUED, BOB, b"\x90", 7, waited_for=True)
    assert version_of(made.signed(waited_for)) == SESSION_VERSION
    assert version_of(made.signed(replace(waited_for, waited_for=False))) == VERSION


def test_what_an_encryptor_waits_for_is_signed_where_the_peer_could_not_read_it(pair: Pair) -> None:
    made = outgoing(pair)
    pair.announcement = announced(versions=(VERSION,))
    assert version_of(made.signed(Letter(EnvelopeType.KEY_ISSUED, BOB, b"\x90", 7, waited_for=True))) == VERSION


def test_what_goes_by_https_is_signed(pair: Pair) -> None:
    made = outgoing(pair)
    made._links = {BOB: cast("HttpsLink", None)}
    assert version_of(made.signed(Letter(EnvelopeType.KEY_ISSUED, BOB, b"\x90", 7, waited_for=True))) == VERSION


def test_what_would_need_a_signature_comes_back_as_it_was_from_the_event_loop(pair: Pair) -> None:
    made = outgoing(pair)
    letter = Letter(EnvelopeType.KEY_ISSUED, BOB, b"\x90", 7, waited_for=True)
    assert made.quickly_signed(letter).signed is None
    made.signed(letter)
    assert version_of(made.quickly_signed(letter)) == SESSION_VERSION


@pytest.mark.parametrize(
    "item", [b"", b"\xc1", encoding.pack([BOB]), encoding.pack([7, BOB]), encoding.pack([BOB, True])]
)
def test_what_tells_of_no_envelope_says_nothing(item: bytes) -> None:
    assert read_unread(item) is None


def test_a_nudge_tells_of_an_envelope_that_was_not_read() -> None:
    longest = "K" * 64
    key = nudge_routing_key(ALICE, NudgeKind.UNREAD.value)
    _, items = read_nudge(ALICE, key, encoding.pack([pack_unread(longest, 2**63 - 1)]))
    assert [read_unread(item) for item in items] == [(longest, 2**63 - 1)]
