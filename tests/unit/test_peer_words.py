"""Facts about ``skipctl peer``'s words: each fault is one sentence, and a peer that is well has none."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from skipbus.ctl.peer_words import PeerView, ago, problems
from skipbus.shared.crypto.epochs import EpochSpan, PublicEpoch
from skipbus.shared.crypto.identity import fingerprint
from skipbus.shared.protocol.announcements import Announcement
from skipbus.shared.settings.peers import PeerSettings
from skipbus.shared.store.peers import PeerRow

NOW_MS = 1_800_000_000_000
BOB, THIEF = b"bob's public key", b"another public key"
EPOCH = PublicEpoch(b"e" * 16, EpochSpan(NOW_MS - 1, NOW_MS + 1, NOW_MS + 2), b"k")
ROW = PeerRow("KP_Bob", NOW_MS - 1000, 5000, 0, 0, 0, 0, 0, 0, clock_skew_ms=-30_000)
WELL = PeerView(
    peer=PeerSettings("KP_Bob", "bus", BOB, stock=64),
    configured=True,
    identity=BOB,
    announcement=Announcement("KP_Bob", BOB, 1, "a", (EPOCH,)),
    row=ROW,
    stock=64,
)
ENDED = replace(EPOCH, span=EpochSpan(1, NOW_MS - 600_000, NOW_MS))


def row(**fields: Any) -> PeerView:  # noqa: ANN401 -- whatever the row has
    return replace(WELL, row=replace(ROW, **fields))


def announced(*epochs: PublicEpoch, key: bytes = BOB) -> PeerView:
    return replace(WELL, announcement=Announcement("KP_Bob", key, 1, "a", epochs))


def test_a_peer_that_is_well_has_no_complaint() -> None:
    assert problems(WELL, NOW_MS) == []


@pytest.mark.parametrize(
    ("view", "words"),
    [
        (replace(WELL, configured=False, row=None), "not configured"),
        (replace(WELL, announcement=None), "No announcement of it has come over the bus yet"),
        (replace(WELL, announcement=None, peer=PeerSettings("KP_Bob")), "stands in the store yet"),
        (replace(WELL, announcement=None, announcement_fault="it is broken"), "cannot be used: it is broken"),
        (announced(ENDED), "no current epoch (the last one ended 10 min ago)"),
        (announced(), "no current epoch (none has begun)"),
        (announced(EPOCH, key=THIEF), f"another identity ({fingerprint(THIEF)})"),
        (replace(WELL, presented=(THIEF, NOW_MS)), "correct identity in [[peers]]"),
        (replace(WELL, row=None), "never been heard"),
        (row(last_heartbeat_ms=None), "never been heard"),
        (row(last_heartbeat_ms=NOW_MS - 11_000), "It is late: heard last 11 s ago."),
        (row(last_heartbeat_ms=NOW_MS - 600_000), "It is offline: heard last 10 min ago."),
        (row(clock_skew_ms=30_001), "Its clock is 30 s behind this one; 30 s are allowed"),
        (row(clock_skew_ms=-95_000), "Its clock is 95 s ahead of this one"),
        (
            row(last_refusal="key_exists: seen", last_refusal_ms=NOW_MS - 5000),
            "refused an envelope 5 s ago: key_exists",
        ),
        (replace(WELL, waiting=(7, NOW_MS - 90_000)), "7 messages wait for its acknowledgement, the oldest since 90 s"),
        (replace(WELL, stock=0), "no usable stock (target 64)"),
        (replace(WELL, stock=31), "Stock is 31, below its low mark of 32"),
        (replace(WELL, endpoint_fault="TLS fails"), "TLS fails"),
    ],
)
def test_a_fault_is_one_sentence(view: PeerView, words: str) -> None:
    (sentence,) = problems(view, NOW_MS)
    assert words in sentence
    assert sentence.isprintable()


@pytest.mark.parametrize(
    "view",
    [
        replace(WELL, presented=(THIEF, NOW_MS - 1001)),
        row(last_refusal="key_exists", last_refusal_ms=NOW_MS - 3_600_001),
        replace(WELL, waiting=(7, NOW_MS - 1000)),
        replace(WELL, stock=32),
        replace(WELL, stock=None),
    ],
    ids=["presented before it was heard", "old refusal", "young rows", "at the low mark", "no stock wanted"],
)
def test_what_is_over_or_usual_is_no_fault(view: PeerView) -> None:
    assert problems(view, NOW_MS) == []


def test_a_learned_identity_is_accepted_with_skipctl_and_a_configured_one_in_the_file() -> None:
    learned = replace(WELL, peer=PeerSettings("KP_Bob"), stock=None, presented=(THIEF, NOW_MS))
    (sentence,) = problems(learned, NOW_MS)
    assert "skipctl identity accept KP_Bob" in sentence


def test_everything_that_is_wrong_is_told() -> None:
    view = replace(WELL, announcement=None, row=None, stock=0, endpoint_fault="x")
    assert len(problems(view, NOW_MS)) == 4


@pytest.mark.parametrize(
    ("seconds", "words"), [(-5, "0 s"), (0, "0 s"), (119, "119 s"), (120, "2 min"), (7200, "2 h"), (200_000, "2 days")]
)
def test_how_long_ago_is_told_roughly(seconds: int, words: str) -> None:
    assert ago(NOW_MS - seconds * 1000, NOW_MS) == f"{words} ago"
