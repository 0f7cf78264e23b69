"""Retrieval ahead of arrival: an encryptor may ask for a key of a bus peer's before the bus has brought it.

Whoever waits holds neither a thread nor a connection to the store, only an entry here. A notification names the keyIds
that have come; it is the reason for another try, and the store decides. The number of those who wait is bounded: beyond
it a caller is told at once that the key is not there.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from skipbus.shared.errors import KeyNotAvailable

MAX_WAITING = 10_000
# Anybody with an account at the local broker can send notifications; each may cost one query, up to so many.
_MAX_TRIES = 4

T = TypeVar("T")


class _Expected:
    """One caller's interest in one keyId."""

    __slots__ = ("arrived",)

    def __init__(self) -> None:
        self.arrived = asyncio.Event()


class Arrivals:
    """Of one event loop."""

    def __init__(self, wait_seconds: float, max_waiting: int = MAX_WAITING) -> None:
        self._wait_seconds = wait_seconds
        self._max_waiting = max_waiting
        self._expected: dict[bytes, list[_Expected]] = {}
        self._loop = asyncio.get_running_loop()
        self.waiting = 0

    async def claim(self, key_id: bytes, attempt: Callable[[], Awaitable[T]]) -> T:
        """What ``attempt`` gives, tried until the key has come or the time is over. Raises what it raised last."""
        # Before the first try: what comes between the try and the wait must not go by unheard.
        with self._expecting(key_id) as expected:
            try:
                return await attempt()
            except KeyNotAvailable:
                if self._wait_seconds <= 0 or self.waiting >= self._max_waiting:
                    raise
            self.waiting += 1
            try:
                return await self._wait(expected, attempt)
            finally:
                self.waiting -= 1

    def arrived(self, key_ids: Sequence[bytes]) -> None:
        """Somebody says that these keys have come."""
        for key_id in key_ids:
            for expected in self._expected.get(key_id, ()):
                expected.arrived.set()

    async def _wait(self, expected: _Expected, attempt: Callable[[], Awaitable[T]]) -> T:
        deadline = self._loop.time() + self._wait_seconds
        for _ in range(_MAX_TRIES):
            if not await _happens(expected.arrived, deadline):
                break
            expected.arrived.clear()
            with contextlib.suppress(KeyNotAvailable):
                return await attempt()
        await asyncio.sleep(deadline - self._loop.time())
        # Without notifications, while the broker is away, this is the only look after the first.
        return await attempt()

    @contextmanager
    def _expecting(self, key_id: bytes) -> Iterator[_Expected]:
        expected = _Expected()
        self._expected.setdefault(key_id, []).append(expected)
        try:
            yield expected
        finally:
            others = self._expected[key_id]
            others.remove(expected)
            if not others:
                del self._expected[key_id]


async def _happens(event: asyncio.Event, deadline: float) -> bool:
    try:
        async with asyncio.timeout_at(deadline):
            await event.wait()
    except TimeoutError:
        return False
    return True
