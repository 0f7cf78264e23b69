"""Facts about a process that does not sleep while the store works: for one caller, for a moment, where it helps."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from skipbus.services.api import awake
from skipbus.services.api.awake import MAX_SECONDS, Awake


class Rounds:
    """An event loop that goes round when it is told to, at a time that is told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        self.due: list[Callable[[], None]] = []
        monkeypatch.setattr(awake, "time", SimpleNamespace(monotonic=lambda: self.now))
        self.awake = Awake(cast("Any", self))

    def call_soon(self, callback: Callable[[], None]) -> object:
        self.due.append(callback)
        return callback

    def go_round(self, seconds: float = 0.0) -> bool:
        """Whether it would go round once more, and not sleep."""
        self.now += seconds
        due, self.due = self.due, []
        for callback in due:
            callback()
        assert len(self.due) <= 1
        return bool(self.due)


@pytest.fixture
def rounds(monkeypatch: pytest.MonkeyPatch) -> Rounds:
    return Rounds(monkeypatch)


def test_it_goes_round_until_the_answer_has_come(rounds: Rounds) -> None:
    rounds.awake.begin()
    assert [rounds.go_round(MAX_SECONDS / 10) for _ in range(5)] == [True] * 5
    rounds.awake.end()
    assert not rounds.go_round()


def test_it_sleeps_when_the_answer_does_not_come_in_time(rounds: Rounds) -> None:
    rounds.awake.begin()
    assert rounds.go_round(MAX_SECONDS * 0.9)
    assert not rounds.go_round(MAX_SECONDS * 0.2)


def test_after_a_slow_answer_it_sleeps_until_there_is_a_quick_one(rounds: Rounds) -> None:
    rounds.awake.begin()
    rounds.go_round(MAX_SECONDS * 2)
    rounds.awake.end()
    rounds.awake.begin()
    assert not rounds.due
    rounds.now += MAX_SECONDS / 2
    rounds.awake.end()
    rounds.awake.begin()
    assert rounds.due


def test_one_caller_right_after_another_costs_no_more_rounds(rounds: Rounds) -> None:
    for _ in range(5):
        rounds.awake.begin()
        assert len(rounds.due) == 1
        rounds.awake.end()
    rounds.awake.begin()
    assert rounds.go_round()
