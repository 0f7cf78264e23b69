"""Facts about a hop: what is asked for in one turn shares a thread, and nobody waits long for anybody."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from skipbus.shared.hop import PATIENCE_SECONDS, Hop


async def test_what_is_asked_for_in_one_turn_is_done_in_one_thread_in_its_order() -> None:
    hop, order = Hop(), list[int]()

    def note(number: int) -> int:
        order.append(number)
        time.sleep(0.01)
        return threading.get_ident()

    threads = await asyncio.gather(*(hop.run(lambda n=n: note(n)) for n in range(5)))  # type: ignore[misc]
    assert len(set(threads)) == 1
    assert threads[0] != threading.get_ident()
    assert order == [0, 1, 2, 3, 4]


async def test_what_is_asked_for_later_does_not_wait_for_what_is_under_way() -> None:
    hop, go_on = Hop(), threading.Event()
    first = asyncio.create_task(hop.run(go_on.wait))
    await asyncio.sleep(0.02)
    started = time.monotonic()
    assert await hop.run(lambda: 7) == 7
    assert time.monotonic() - started < PATIENCE_SECONDS / 2
    go_on.set()
    assert await first


async def test_who_hangs_keeps_nobody_waiting_for_long() -> None:
    hop, go_on = Hop(), threading.Event()
    before = asyncio.create_task(hop.run(lambda: 1))
    hanging = [asyncio.create_task(hop.run(go_on.wait)) for _ in range(2)]
    after = asyncio.create_task(hop.run(lambda: 2))
    try:
        async with asyncio.timeout(2 * PATIENCE_SECONDS):
            assert await before == 1
        async with asyncio.timeout(2 * PATIENCE_SECONDS):
            assert await after == 2
        assert not any(task.done() for task in hanging)
    finally:
        go_on.set()
    assert await asyncio.gather(*hanging) == [True, True]


async def test_an_error_is_told_to_who_asked_and_to_nobody_else() -> None:
    def fail() -> None:
        raise ValueError("mine")

    hop = Hop()
    results = await asyncio.gather(hop.run(fail), hop.run(lambda: 3), return_exceptions=True)
    assert isinstance(results[0], ValueError)
    assert results[1] == 3


async def test_who_goes_away_meanwhile_is_no_matter_to_the_others() -> None:
    hop, go_on = Hop(), threading.Event()
    gone, other = asyncio.create_task(hop.run(go_on.wait)), asyncio.create_task(hop.run(lambda: 4))
    await asyncio.sleep(0.02)
    gone.cancel()
    go_on.set()
    assert await other == 4
    with pytest.raises(asyncio.CancelledError):
        await gone
