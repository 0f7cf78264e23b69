"""One change of thread for everything that blocks and is asked for in one turn of the event loop.

A change of thread costs more than the short question to the store that it is made for. What regular tasks ask at the
same beat (``shared/lifecycle.py``) is therefore done in one thread, one after another, in the order in which it was
asked for. None waits long for another: where one takes its time, the rest goes on in a thread of its own.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

# What a question to a store that is there takes is a hundredth of this.
PATIENCE_SECONDS = 0.25

T = TypeVar("T")


class _Ride:
    """What goes together. ``waiting`` is taken from by its threads, ``done`` by the event loop."""

    def __init__(self) -> None:
        self.waiting: deque[tuple[Callable[[], Any], asyncio.Future[Any]]] = deque()
        self.done: deque[tuple[asyncio.Future[Any], Any, BaseException | None]] = deque()

    def work(self) -> None:
        """In a thread, until nothing waits."""
        while True:
            try:
                action, future = self.waiting.popleft()
            except IndexError:
                return
            try:
                result = action()
            except BaseException as error:  # noqa: BLE001 -- whatever it is, it is for who asked
                self.done.append((future, None, error))
            else:
                self.done.append((future, result, None))

    def tell(self) -> None:
        """Answers who asked; they may have gone away meanwhile."""
        while self.done:
            future, result, error = self.done.popleft()
            if future.done():
                continue
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)


class Hop:
    """Of one event loop."""

    def __init__(self) -> None:
        self._boarding: _Ride | None = None

    async def run(self, action: Callable[[], T]) -> T:
        """As ``asyncio.to_thread``, together with what others ask for in this turn."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        if self._boarding is None:
            self._boarding = _Ride()
            loop.call_soon(self._depart, loop)
        self._boarding.waiting.append((action, future))
        return await future

    def _depart(self, loop: asyncio.AbstractEventLoop) -> None:
        ride, self._boarding = self._boarding, None
        if ride is not None:
            self._drive(loop, ride)

    def _drive(self, loop: asyncio.AbstractEventLoop, ride: _Ride) -> None:
        relief = loop.call_later(PATIENCE_SECONDS, self._relieve, loop, ride)

        def arrived(_: asyncio.Future[None]) -> None:
            relief.cancel()
            ride.tell()

        loop.run_in_executor(None, ride.work).add_done_callback(arrived)

    def _relieve(self, loop: asyncio.AbstractEventLoop, ride: _Ride) -> None:
        ride.tell()
        if ride.waiting:
            self._drive(loop, ride)
