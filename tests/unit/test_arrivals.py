"""Facts about waiting for keys that have not come yet."""

from __future__ import annotations

import asyncio
import secrets
import time

import pytest

from skipbus.services.api.links.arrivals import Arrivals
from skipbus.shared.errors import KeyNotAvailable, StoreUnavailable

KEY_ID = b"k" * 16


class Claims:
    """A store in which a key appears at some time."""

    def __init__(self) -> None:
        self.there = False
        self.count = 0

    async def __call__(self) -> str:
        self.count += 1
        await asyncio.sleep(0)
        if not self.there:
            raise KeyNotAvailable("not here", parameter="keyId")
        return "key"


async def test_a_key_that_is_there_is_claimed_once_and_nobody_waits() -> None:
    arrivals, claims = Arrivals(5), Claims()
    claims.there = True
    assert await arrivals.claim(KEY_ID, claims) == "key"
    assert (claims.count, arrivals.waiting) == (1, 0)


async def test_a_notification_brings_the_answer_long_before_the_deadline() -> None:
    arrivals, claims = Arrivals(20), Claims()
    asking = asyncio.create_task(arrivals.claim(KEY_ID, claims))
    await asyncio.sleep(0.05)
    claims.there = True
    arrivals.arrived([secrets.token_bytes(16), KEY_ID])
    async with asyncio.timeout(2):
        assert await asking == "key"
    assert arrivals.waiting == 0


async def test_a_notification_between_the_first_attempt_and_the_wait_is_not_lost() -> None:
    arrivals, claims = Arrivals(20), Claims()

    async def attempt() -> str:
        if not claims.there:
            claims.count += 1
            claims.there = True
            arrivals.arrived([KEY_ID])
            raise KeyNotAvailable("not here", parameter="keyId")
        return await claims()

    async with asyncio.timeout(2):
        assert await arrivals.claim(KEY_ID, attempt) == "key"


async def test_without_a_notification_there_is_one_more_attempt_at_the_deadline() -> None:
    arrivals, claims = Arrivals(0.3), Claims()
    asking = asyncio.create_task(arrivals.claim(KEY_ID, claims))
    await asyncio.sleep(0.1)
    claims.there = True
    started = time.monotonic()
    assert await asking == "key"
    assert 0.1 < time.monotonic() - started < 1
    assert claims.count == 2


async def test_forged_notifications_cost_a_few_attempts_and_change_nothing() -> None:
    arrivals, claims = Arrivals(0.5), Claims()
    asking = asyncio.create_task(arrivals.claim(KEY_ID, claims))
    for _ in range(100):
        await asyncio.sleep(0.002)
        arrivals.arrived([KEY_ID])
    with pytest.raises(KeyNotAvailable):
        await asking
    assert claims.count <= 6


async def test_of_more_callers_than_may_wait_the_others_are_refused_at_once() -> None:
    arrivals, claims = Arrivals(30, max_waiting=10), Claims()
    waiting = [asyncio.create_task(arrivals.claim(KEY_ID, claims)) for _ in range(10)]
    await asyncio.sleep(0.05)
    async with asyncio.timeout(1):
        with pytest.raises(KeyNotAvailable):
            await arrivals.claim(secrets.token_bytes(16), claims)
    claims.there = True
    arrivals.arrived([KEY_ID])
    assert set(await asyncio.gather(*waiting)) == {"key"}
    assert arrivals.waiting == 0


async def test_with_no_wait_configured_nobody_waits() -> None:
    arrivals, claims = Arrivals(0), Claims()
    with pytest.raises(KeyNotAvailable):
        await arrivals.claim(KEY_ID, claims)
    assert claims.count == 1


async def test_another_error_than_a_key_that_is_not_there_is_raised_at_once() -> None:
    arrivals = Arrivals(30)

    async def attempt() -> str:
        raise StoreUnavailable("away")

    with pytest.raises(StoreUnavailable):
        await arrivals.claim(KEY_ID, attempt)


async def test_a_caller_who_goes_away_leaves_nothing_behind() -> None:
    arrivals, claims = Arrivals(30), Claims()
    asking = asyncio.create_task(arrivals.claim(KEY_ID, claims))
    await asyncio.sleep(0.05)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    assert arrivals.waiting == 0
    assert arrivals._expected == {}
