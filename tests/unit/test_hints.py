"""Hints of rows that are about to be committed: read strictly, believed once, and not for a while after a false one."""

from __future__ import annotations

import pytest

from skipbus.services.syncer import new_rows
from skipbus.services.syncer.new_rows import MAX_CREDIT, MISS_COSTS, NewRows, News
from skipbus.shared.hints import MAX_HINT_BYTES, Hint, pack_hint, read_hint
from skipbus.shared.protocol import encoding

HINT = Hint("KP_Bob", b"t" * 16, b"payload")
OTHER = Hint("KP_Bob", b"u" * 16, b"payload")


def item(hint: Hint = HINT) -> bytes:
    packed = pack_hint(hint)
    assert packed is not None
    return packed


def test_a_hint_comes_out_as_it_went_in() -> None:
    assert read_hint(item()) == HINT


def test_a_row_that_is_too_long_for_a_nudge_is_not_told_of() -> None:
    assert pack_hint(Hint("KP_Bob", b"t" * 16, bytes(MAX_HINT_BYTES))) is None


@pytest.mark.parametrize(
    "junk",
    [
        b"",
        b"\0",
        b"t" * 16,
        encoding.pack(["KP_Bob", b"t" * 16]),
        encoding.pack([1, b"t" * 16, b"payload"]),
        encoding.pack(["KP_Bob", "t" * 16, b"payload"]),
        encoding.pack(["KP_Bob", b"t" * 15, b"payload"]),
        encoding.pack(["KP_Bob", b"t" * 16, b""]),
        encoding.pack({"a": 1, "b": 2, "c": 3}),
    ],
)
def test_what_is_no_hint_says_nothing(junk: bytes) -> None:
    assert read_hint(junk) is None


def test_a_hint_alone_is_taken_once() -> None:
    rows = NewRows()
    rows.hear([item()])
    assert rows.event.is_set()
    assert [rows.take(), rows.take()] == [News(HINT, early=True), News()]


def test_a_nudge_without_a_hint_says_that_there_may_be_any_rows() -> None:
    rows = NewRows()
    rows.hear([])
    assert rows.take() == News(others=True)


def test_of_what_cannot_be_read_only_that_it_may_be_early_is_known() -> None:
    rows = NewRows()
    rows.hear([b"junk"])
    assert rows.take() == News(early=True, others=True)


def test_of_hints_in_one_nudge_the_last_counts_and_the_others_are_looked_for() -> None:
    rows = NewRows()
    rows.hear([item(), item(OTHER)])
    assert rows.take() == News(OTHER, early=True, others=True)


@pytest.mark.parametrize("other", [[], [item(OTHER)], [b"junk"]])
def test_what_is_told_beside_a_hint_is_not_lost(other: list[bytes]) -> None:
    for first, second in (([item()], other), (other, [item()])):
        rows = NewRows()
        rows.hear(first)
        rows.hear(second)
        news = rows.take()
        assert news.hint in {HINT, OTHER}
        assert (news.early, news.others) == (True, True)


def believes(rows: NewRows) -> bool:
    rows.hear([item()])
    news = rows.take()
    assert news in (News(HINT, early=True), News(early=True, others=True))
    return news.hint is not None


def test_hints_that_lead_to_nothing_are_not_believed_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = NewRows()
    for _ in range(MAX_CREDIT // MISS_COSTS):
        rows.note_missed()
        assert believes(rows)
    rows.note_missed()
    assert not believes(rows)
    # After that while one more is enough.
    monkeypatch.setattr(rows, "_trust_from", 0.0)
    assert believes(rows)
    rows.note_missed()
    assert not believes(rows)
    # Unless others have led to something since.
    monkeypatch.setattr(rows, "_trust_from", 0.0)
    for number in range(MISS_COSTS):
        rows.note_found(bytes([number]) * 16)
    rows.note_missed()
    assert believes(rows)


def test_a_hint_in_five_may_lead_to_nothing() -> None:
    rows = NewRows()
    for number in range(200):
        rows.note_missed()
        for other in range(MISS_COSTS):
            rows.note_found(bytes([number, other]) * 8)
    assert believes(rows)


def test_credit_is_not_saved_up() -> None:
    rows = NewRows()
    for number in range(200):
        rows.note_found(bytes([number]) * 16)
    for _ in range(MAX_CREDIT // MISS_COSTS + 1):
        rows.note_missed()
    assert not believes(rows)


def test_a_hint_of_a_row_that_is_in_an_envelope_already_is_no_news(monkeypatch: pytest.MonkeyPatch) -> None:
    """A round that was under way has found it: that is nobody's fault, and nothing is to be looked for."""
    rows = NewRows()
    rows.hear([item()])
    rows.note_numbered([None, HINT.token])
    assert rows.take() == News()
    rows.hear([item()])
    rows.hear([])
    assert rows.take() == News(early=True, others=True)
    rows.hear([item(OTHER)])
    assert rows.take() == News(OTHER, early=True)
    monkeypatch.setattr(new_rows, "_MAX_NUMBERED", 3)
    rows.note_numbered([bytes([n]) * 16 for n in range(5)])
    rows.hear([item()])
    assert rows.take() == News(HINT, early=True)
