"""What a caller need not wait for, such as the line about its request: put off until others work, or for 3 ms.

One encryptor alone asks again as soon as it has its answer, and would wait until the line about its last request is
written. While the store commits, or a key is on its way to a peer, there is time for that, and nobody waits.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from skipbus.shared.logs import get_logger

# Longer than it takes to place a key on demand. uvloop's timers count milliseconds: a crash takes along the last four.
LATEST_SECONDS = 0.003

_log = get_logger("afterwards")


class Afterwards:
    """Of one event loop. Jobs are done in the order in which they came; one that fails is told of and ends nothing."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._jobs: deque[Callable[[], None]] = deque()
        self._timer: asyncio.TimerHandle | None = None

    def put(self, job: Callable[[], None]) -> None:
        """Has it done, LATEST_SECONDS from now at the latest."""
        self._jobs.append(job)
        if self._timer is None:
            self._timer = self._loop.call_later(LATEST_SECONDS, self._on_time)

    def do(self) -> None:
        """Now is a good time: what somebody waits for is on its way."""
        while self._jobs:
            job = self._jobs.popleft()
            try:
                job()
            except Exception as error:  # noqa: BLE001 -- whoever happens to be next has nothing to do with it
                _log.error("not done afterwards", exc_info=error)

    def _on_time(self) -> None:
        self._timer = None
        self.do()
