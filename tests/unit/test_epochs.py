"""Facts about epochs: no gap, made ahead, kept until the last key has expired. The clock is an argument."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skipbus.shared.crypto.epochs import (
    MAX_CLOCK_SKEW_MS,
    MAX_EPOCHS_AHEAD,
    EpochSpan,
    PublicEpoch,
    current_epoch,
    has_lost_epochs,
    missing_spans,
    new_epoch_id,
    retention_ms,
)

NOW_MS = 1_800_000_123_456
EPOCH_SECONDS = 600
TTL_SECONDS = 3600
SETTINGS = st.tuples(st.integers(2, 86_400), st.integers(1, 604_800))


def spans_at(
    now_ms: int,
    have: list[EpochSpan] | None = None,
    epoch_seconds: int = EPOCH_SECONDS,
    ttl_seconds: int = TTL_SECONDS,
) -> list[EpochSpan]:
    return (have or []) + missing_spans(have or [], now_ms, epoch_seconds, ttl_seconds)


def covering(spans: list[EpochSpan], at_ms: int) -> list[EpochSpan]:
    return [span for span in spans if span.starts_ms <= at_ms < span.ends_ms]


@given(now_ms=st.integers(1, 10**13), settings=SETTINGS)
def test_now_and_every_moment_after_is_covered_once_without_a_gap(now_ms: int, settings: tuple[int, int]) -> None:
    epoch_seconds, ttl_seconds = settings
    spans = spans_at(now_ms, None, epoch_seconds, ttl_seconds)
    assert spans[0].starts_ms <= now_ms < spans[0].ends_ms
    assert all(before.ends_ms == after.starts_ms for before, after in pairwise(spans))
    assert len(spans) <= MAX_EPOCHS_AHEAD + 1


def test_epochs_are_made_one_key_lifetime_ahead() -> None:
    spans = spans_at(NOW_MS)
    assert covering(spans, NOW_MS + TTL_SECONDS * 1000)


def test_epochs_end_on_multiples_of_their_length() -> None:
    assert {span.ends_ms % (EPOCH_SECONDS * 1000) for span in spans_at(NOW_MS)} == {0}


def test_nothing_is_missing_right_after_the_epochs_were_made() -> None:
    assert missing_spans(spans_at(NOW_MS), NOW_MS, EPOCH_SECONDS, TTL_SECONDS) == []


def test_one_epoch_is_missing_each_time_one_has_passed() -> None:
    have = spans_at(NOW_MS)
    for step in range(1, 20):
        made = missing_spans(have, NOW_MS + step * EPOCH_SECONDS * 1000, EPOCH_SECONDS, TTL_SECONDS)
        assert [span.starts_ms for span in made] == [have[-1].ends_ms]
        have += made


def test_a_kp_that_was_down_for_long_gets_an_epoch_for_now_and_none_for_the_past() -> None:
    later_ms = NOW_MS + 30 * 86_400_000
    made = missing_spans(spans_at(NOW_MS), later_ms, EPOCH_SECONDS, TTL_SECONDS)
    assert covering(made, later_ms)
    assert made[0].ends_ms > later_ms


def test_another_epoch_length_goes_on_where_the_old_epochs_end() -> None:
    have = spans_at(NOW_MS, epoch_seconds=600)
    later_ms = NOW_MS + 3000 * 1000
    made = missing_spans(have, later_ms, 420, TTL_SECONDS)
    assert made[0].starts_ms == have[-1].ends_ms
    assert covering(have + made, later_ms + TTL_SECONDS * 1000)


def test_the_clocks_first_moments_are_covered_too() -> None:
    assert spans_at(0)[0].starts_ms == 0
    assert spans_at(1)[0].starts_ms == 0


def test_a_moment_on_the_border_belongs_to_the_later_epoch() -> None:
    border_ms = NOW_MS - NOW_MS % (EPOCH_SECONDS * 1000)
    assert spans_at(border_ms)[0].starts_ms == border_ms
    assert spans_at(border_ms - 1)[0].ends_ms == border_ms


@given(
    made_ahead_ms=st.integers(1, 40 * 86_400_000),
    settings=st.tuples(st.integers(60, 3600), st.integers(60, 7200)),
)
def test_a_clock_that_is_set_back_leaves_no_gap_before_the_epochs_already_made(
    made_ahead_ms: int, settings: tuple[int, int]
) -> None:
    have = spans_at(NOW_MS + made_ahead_ms, None, *settings)
    spans = spans_at(NOW_MS, have, *settings)
    assert covering(spans, NOW_MS)


@pytest.mark.parametrize("lost", [0, 1, 4])
def test_an_epoch_that_was_lost_is_made_anew(lost: int) -> None:
    have = spans_at(NOW_MS)
    gone = have.pop(lost)
    made = missing_spans(have, NOW_MS, EPOCH_SECONDS, TTL_SECONDS)
    assert [(span.starts_ms, span.ends_ms) for span in made] == [(gone.starts_ms, gone.ends_ms)]


@given(now_ms=st.integers(1, 10**13), settings=SETTINGS)
def test_the_private_half_is_kept_until_the_last_key_sealed_to_it_has_expired(
    now_ms: int, settings: tuple[int, int]
) -> None:
    epoch_seconds, ttl_seconds = settings
    for span in spans_at(now_ms, None, epoch_seconds, ttl_seconds):
        last_key_expires_ms = span.ends_ms - 1 + ttl_seconds * 1000
        assert last_key_expires_ms < span.destroy_ms


@pytest.mark.parametrize(("ttl_seconds", "expected_ms"), [(3600, 3_630_000), (30, 60_000), (10, 20_000), (1, 2000)])
def test_retention_leaves_room_for_skewed_clocks_but_never_more_than_a_second_lifetime(
    ttl_seconds: int, expected_ms: int
) -> None:
    assert retention_ms(ttl_seconds) == expected_ms


def public(span: EpochSpan) -> PublicEpoch:
    return PublicEpoch(new_epoch_id(), span, b"")


def test_the_current_epoch_is_the_one_that_has_started_and_not_ended() -> None:
    epochs = [public(span) for span in spans_at(NOW_MS)]
    first, second = epochs[:2]
    assert current_epoch(epochs, first.span.starts_ms) is first
    assert current_epoch(epochs, first.span.ends_ms - 1) is first
    assert current_epoch(epochs, first.span.ends_ms) is second


def test_there_is_no_current_epoch_before_the_first_and_after_the_last() -> None:
    epochs = [public(span) for span in spans_at(NOW_MS)]
    assert current_epoch(epochs, epochs[0].span.starts_ms - 1) is None
    assert current_epoch(epochs, epochs[-1].span.ends_ms) is None
    assert current_epoch([], NOW_MS) is None


# --- lost ones


def epoch_until(ends_ms: int) -> PublicEpoch:
    return PublicEpoch(new_epoch_id(), EpochSpan(NOW_MS - 600_000, ends_ms, ends_ms + 3_600_000), b"public")


def test_epochs_that_end_are_not_lost_and_new_ones_are_no_loss() -> None:
    ended, ending, lasting = (epoch_until(NOW_MS + ms) for ms in (-1, MAX_CLOCK_SKEW_MS, 600_000))
    before = [ended, ending, lasting]
    assert not has_lost_epochs(before, [lasting, epoch_until(NOW_MS + 1_200_000)], NOW_MS)
    assert not has_lost_epochs(before, before, NOW_MS)
    assert not has_lost_epochs([], [lasting], NOW_MS)


def test_an_epoch_that_is_announced_no_more_before_its_end_is_lost() -> None:
    lasting, kept = epoch_until(NOW_MS + MAX_CLOCK_SKEW_MS + 1), epoch_until(NOW_MS + 600_000)
    assert has_lost_epochs([lasting, kept], [kept], NOW_MS)
    assert has_lost_epochs([kept], [], NOW_MS)
