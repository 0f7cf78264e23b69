"""Facts about what is put off: it is done in order, at the first good moment or by the clock, whatever fails."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest

from skipbus.services.api.afterwards import LATEST_SECONDS, Afterwards


def run(use: Callable[[Afterwards], object], wait_seconds: float = 0.0) -> None:
    async def running() -> None:
        use(Afterwards(asyncio.get_running_loop()))
        if wait_seconds:
            await asyncio.sleep(wait_seconds)

    asyncio.run(running())


def fail() -> None:
    raise ValueError("of this job alone")


def test_nothing_is_done_at_once() -> None:
    done: list[int] = []
    run(lambda afterwards: afterwards.put(lambda: done.append(1)))
    assert done == []


def test_at_a_good_moment_all_is_done_in_order_and_once() -> None:
    done: list[int] = []

    def use(afterwards: Afterwards) -> None:
        for number in range(5):
            afterwards.put(lambda number=number: done.append(number))  # type: ignore[misc]
        afterwards.do()
        assert done == list(range(5))

    run(use, wait_seconds=20 * LATEST_SECONDS)
    assert done == list(range(5))


def test_without_a_good_moment_it_is_done_by_the_clock_and_again_later() -> None:
    done: list[float] = []

    async def running() -> None:
        afterwards = Afterwards(asyncio.get_running_loop())
        for count in (1, 2):
            afterwards.put(lambda: done.append(time.monotonic()))
            deadline = time.monotonic() + 5
            while len(done) < count:
                assert time.monotonic() < deadline
                await asyncio.sleep(LATEST_SECONDS)

    asyncio.run(running())


def test_what_is_put_off_while_others_are_done_is_done_as_well() -> None:
    done: list[str] = []

    def use(afterwards: Afterwards) -> None:
        afterwards.put(lambda: afterwards.put(lambda: done.append("second")))
        afterwards.do()

    run(use)
    assert done == ["second"]


def test_a_job_that_fails_is_told_of_and_keeps_none_from_being_done(capsys: pytest.CaptureFixture[str]) -> None:
    done: list[int] = []

    def use(afterwards: Afterwards) -> None:
        afterwards.put(fail)
        afterwards.put(lambda: done.append(1))
        afterwards.do()

    run(use)
    assert done == [1]
    assert "not done afterwards" in capsys.readouterr().out
