"""Facts about what a peer's heartbeats say of it: online, late, offline. The clock is an argument."""

from __future__ import annotations

import pytest

from skipbus.shared.liveness import peer_status

NOW_MS = 1_800_000_000_000
INTERVAL_MS = 5000


@pytest.mark.parametrize(
    ("silence_ms", "expected"),
    [
        (-1000, "online"),  # the peer's clock is ahead
        (0, "online"),
        (2 * INTERVAL_MS, "online"),
        (2 * INTERVAL_MS + 1, "late"),
        (5 * INTERVAL_MS, "late"),
        (5 * INTERVAL_MS + 1, "offline"),
        (10**12, "offline"),
    ],
)
def test_a_peer_is_late_after_two_missed_intervals_and_offline_after_five(silence_ms: int, expected: str) -> None:
    assert peer_status(NOW_MS - silence_ms, INTERVAL_MS, NOW_MS) == expected


def test_the_interval_is_the_one_that_the_peer_announced() -> None:
    heard_ms = NOW_MS - 12_000
    assert peer_status(heard_ms, 5000, NOW_MS) == "late"
    assert peer_status(heard_ms, 60_000, NOW_MS) == "online"
    assert peer_status(heard_ms, 1000, NOW_MS) == "offline"


@pytest.mark.parametrize(("heard_ms", "interval_ms"), [(None, INTERVAL_MS), (NOW_MS, 0), (None, 0)])
def test_a_peer_never_heard_of_is_offline(heard_ms: int | None, interval_ms: int) -> None:
    assert peer_status(heard_ms, interval_ms, NOW_MS) == "offline"
