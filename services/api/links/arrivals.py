"""Waits for keys that have not arrived: an encryptor may ask for a key before the bus has brought it.

A caller who waits holds neither a thread nor a connection to the store. A notification names the keyIds that have
arrived; it is the reason for another attempt, and the store decides. The number of callers who wait is bounded:
one more is answered immediately that the key is not there.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import TypeVar

from skipbus.shared.errors import KeyNotAvailable

MAX_WAITING = 10_000
# Every account at the local broker can send notifications; each may cost one attempt, up to so many.
_MAX_ATTEMPTS = 4

T = TypeVar("T")


class Arrivals:
    """The callers who wait. Not thread-safe: use it on one event loop."""

    def __init__(self, wait_seconds: float, max_waiting: int = MAX_WAITING) -> None:
        self._wait_seconds = wait_seconds
        self._max_waiting = max_waiting
        self._expected: dict[bytes, set[asyncio.Event]] = {}
        self.waiting = 0

    async def claim(self, key_id: bytes, attempt: Callable[[], Awaitable[T]]) -> T:
        """What ``attempt`` returns, tried until the key has arrived or the time is over. Raises its last error."""
        # Before the first attempt: a notification between the attempt and the wait must not be lost.
        with self._expecting(key_id) as arrived:
            try:
                return await attempt()
            except KeyNotAvailable:
                if self._wait_seconds <= 0 or self.waiting >= self._max_waiting:
                    raise
            self.waiting += 1
            try:
                return await self._wait(arrived, attempt)
            finally:
                self.waiting -= 1

    def arrived(self, key_ids: Sequence[bytes]) -> None:
        """A notification says that these keys have arrived."""
        for key_id in key_ids:
            for arrived in self._expected.get(key_id, ()):
                arrived.set()

    async def _wait(self, arrived: asyncio.Event, attempt: Callable[[], Awaitable[T]]) -> T:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._wait_seconds
        for _ in range(_MAX_ATTEMPTS):
            if not await _is_set(arrived, deadline):
                break
            arrived.clear()
            with contextlib.suppress(KeyNotAvailable):
                return await attempt()
        await asyncio.sleep(deadline - loop.time())
        # While the broker is away this is the only attempt after the first.
        return await attempt()

    @contextlib.contextmanager
    def _expecting(self, key_id: bytes) -> Iterator[asyncio.Event]:
        arrived = asyncio.Event()
        self._expected.setdefault(key_id, set()).add(arrived)
        try:
            yield arrived
        finally:
            others = self._expected[key_id]
            others.remove(arrived)
            if not others:
                del self._expected[key_id]


async def _is_set(event: asyncio.Event, deadline: float) -> bool:
    """Whether the event is set before the deadline. An attempt is never interrupted: it may have deleted the key."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout_at(deadline):
            return await event.wait()
    return False
