"""Facts about the tick that the regular tasks of a process keep together."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable

import pytest
import structlog.testing
import uvloop
from prometheus_client import CollectorRegistry

from skipbus.shared.errors import BackendError, StoreRefused, StoreUnavailable
from skipbus.shared.lifecycle import TICK_SECONDS, every, next_tick, pause_to_tick
from skipbus.shared.metrics import _TASKS


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


async def run_some(action: Callable[[], Awaitable[None]], *, what: str, rounds: int, quiet: bool) -> None:
    """Runs a regular task so many times."""
    stop, left = asyncio.Event(), rounds

    async def attempt() -> None:
        nonlocal left
        left -= 1
        if not left:
            stop.set()
        await action()

    async with asyncio.timeout(10):
        await every(stop, 0.001, what, attempt, quiet=quiet)


def done_age(what: str) -> float:
    """Time since a regular task has succeeded, as a probe reads it."""
    registry = CollectorRegistry()
    registry.register(_TASKS)
    age = registry.get_sample_value("skipbus_task_done_age_seconds", {"task": what})
    assert age is not None
    return age


@pytest.mark.parametrize("quiet", [False, True])
@pytest.mark.parametrize("error", [StoreUnavailable("away"), StoreRefused("no grant")])
async def test_a_task_that_fails_each_time_has_not_succeeded_for_the_probes(error: BackendError, quiet: bool) -> None:
    async def fail() -> None:
        raise error

    what = f"test of ages {error} {quiet}"
    with structlog.testing.capture_logs() as lines:
        await run_some(fail, what=what, rounds=3, quiet=quiet)
    assert done_age(what) == math.inf
    # ``quiet`` leaves the absence of the store, and nothing else, to the task that logs it for all.
    warnings = [line for line in lines if line["log_level"] == "warning"]
    assert len(warnings) == (0 if quiet and isinstance(error, StoreUnavailable) else 1)


async def test_a_task_that_succeeds_is_young() -> None:
    async def succeed() -> None:
        pass

    await run_some(succeed, what="test of ages", rounds=2, quiet=True)
    assert done_age("test of ages") < 10


async def test_a_task_that_is_woken_runs_before_its_tick_and_ends_at_stop() -> None:
    stop, wake, runs = asyncio.Event(), asyncio.Event(), asyncio.Queue[None]()

    async def note() -> None:
        runs.put_nowait(None)

    async with asyncio.timeout(10), asyncio.TaskGroup() as tasks:
        tasks.create_task(every(stop, 60.0, "test of waking", note, wake=wake))
        for _ in range(3):
            await runs.get()
            wake.set()
        stop.set()
