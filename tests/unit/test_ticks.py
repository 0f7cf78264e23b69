"""Facts about the tick that the regular tasks of a process keep together."""

from __future__ import annotations

import asyncio
import time

import pytest
import uvloop

from skipbus.shared.lifecycle import TICK_SECONDS, every, next_tick, pause_to_tick


@pytest.mark.parametrize("seconds", [1.0, 2.5, 5.0, 15.0])
def test_a_tick_is_never_much_later_than_asked_for(seconds: float) -> None:
    for thousandth in range(3000):
        now = 17_000 + thousandth / 1000
        assert seconds - 0.75 <= next_tick(now, seconds) - now <= seconds + 0.2501


def test_tasks_that_ask_at_different_times_meet_at_one_tick() -> None:
    tick = next_tick(17_000.0, TICK_SECONDS)
    assert {next_tick(tick + late, TICK_SECONDS) for late in (0.0, 0.001, 0.2, 0.5, 0.7)} == {tick + TICK_SECONDS}


def test_what_is_done_every_second_is_due_at_the_next_tick_also_where_a_timer_was_early() -> None:
    tick = next_tick(17_000.0, TICK_SECONDS)
    assert next_tick(tick - 0.001, TICK_SECONDS) == tick + TICK_SECONDS


def test_what_is_done_more_often_than_there_are_ticks_goes_by_its_own_time() -> None:
    assert next_tick(17_000.0, 0.25) == 17_000.25


def test_tasks_of_one_process_wake_together() -> None:
    async def wake() -> list[float]:
        stop, woken = asyncio.Event(), list[list[float]]()

        async def note(times: list[float]) -> None:
            times.append(time.monotonic())
            if len(times) == 3:
                stop.set()

        async def begin(delay: float) -> None:
            times: list[float] = []
            woken.append(times)
            await asyncio.sleep(delay)
            await every(stop, TICK_SECONDS, f"test of ticks {delay}", lambda: note(times))

        await asyncio.gather(*(begin(delay) for delay in (0.0, 0.05, 0.12)))
        return [times[1] for times in woken]

    # At its start one of them may be on the other side of a tick: the last two wakings are compared modulo the tick.
    phases = sorted(at % TICK_SECONDS for at in uvloop.run(wake()))
    assert phases[-1] - phases[0] < 0.02 or phases[0] + TICK_SECONDS - phases[-1] < 0.02


async def test_a_stop_does_not_wait_for_the_beat() -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().call_later(0.05, stop.set)
    started = time.monotonic()
    assert not await pause_to_tick(stop, 5.0)
    assert time.monotonic() - started < 1.0
