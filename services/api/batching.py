"""Group commit: while one batch commits in a worker thread, the next one fills.

A lane owns one thread and one connection. A batch of one costs no extra wait, and a batch of 256 costs one
commit. The queue in front is bounded: when it is full, callers are refused at once. No caller waits longer than
``timeout_seconds``, whatever the store does; a batch that outlives its callers still runs to its end, since a
statement that was sent cannot be taken back.

A batch must be able to say whether it was committed when its connection broke during the commit. It is then run
again only if it was not.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Generic, Protocol, TypeVar

from pymysql.connections import Connection

from shared.errors import CommitUnknown, Overloaded, SkipbusError, StoreUnavailable

Request = TypeVar("Request")
Answer = TypeVar("Answer")
Answer_co = TypeVar("Answer_co", covariant=True)
_RETRY_SECONDS = (0.0, 0.02, 0.1, 0.25, 0.5)
_SWEEP_SECONDS = 0.25


class Batch(Protocol[Answer_co]):
    """One transaction for several requests."""

    def run(self, connection: Connection) -> Sequence[Answer_co | SkipbusError]:
        """Does the work and commits; an answer or an error for each request, in order."""

    def committed(self, connection: Connection) -> Sequence[Answer_co | SkipbusError] | None:
        """The answers, if the interrupted commit of ``run`` happened after all."""


class _Waiter(Generic[Request, Answer]):
    __slots__ = ("deadline", "future", "request")

    def __init__(self, request: Request, future: asyncio.Future[Answer], deadline: float) -> None:
        self.request = request
        self.future = future
        self.deadline = deadline


class _Work(Generic[Request, Answer]):
    """One batch on its way to the thread; ``deadline`` is on the monotonic clock, in seconds."""

    __slots__ = ("deadline", "waiters")

    def __init__(self, waiters: list[_Waiter[Request, Answer]], deadline: float) -> None:
        self.waiters = waiters
        self.deadline = deadline


class Lane(Generic[Request, Answer]):
    """Gathers requests into batches and runs them one after another on its own connection."""

    def __init__(
        self,
        name: str,
        make_batch: Callable[[Sequence[Request]], Batch[Answer]],
        connect: Callable[[], Connection],
        *,
        max_batch: int,
        max_queue: int,
        timeout_seconds: float,
        observe: Callable[[int, float], None],
    ) -> None:
        self._make_batch = make_batch
        self._connect = connect
        self._max_batch = max_batch
        self._max_queue = max_queue
        self._timeout_seconds = timeout_seconds
        self._observe = observe
        self._loop = asyncio.get_running_loop()
        self._queue: deque[_Waiter[Request, Answer]] = deque()
        self._in_flight: list[_Waiter[Request, Answer]] = []
        self._connection: Connection | None = None
        # A bare thread and queue: handing a batch over costs 8 us, an executor's bookkeeping as much again.
        self._work: SimpleQueue[_Work[Request, Answer] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()
        self._sweeper = self._loop.call_later(_SWEEP_SECONDS, self._sweep)

    def __len__(self) -> int:
        """How many callers wait."""
        return len(self._queue) + len(self._in_flight)

    async def submit(self, request: Request) -> Answer:
        """The answer to one request. Raises Overloaded at once, StoreUnavailable in time, or the batch's own error."""
        if len(self._queue) >= self._max_queue:
            raise Overloaded("too many requests wait for the key store; try again")
        future: asyncio.Future[Answer] = self._loop.create_future()
        self._queue.append(_Waiter(request, future, self._loop.time() + self._timeout_seconds))
        if not self._in_flight:
            self._start_batch()
        return await future

    async def close(self) -> None:
        """Ends the thread after the batch that runs; whoever still waits is told."""
        self._sweeper.cancel()
        while self._queue:
            _fail(self._queue.popleft().future, StoreUnavailable("the key provider is stopping"))
        self._work.put(None)
        await asyncio.to_thread(self._thread.join)
        # What the thread reported last is still to be handed to its waiters.
        await asyncio.sleep(0)

    def _start_batch(self) -> None:
        taken: list[_Waiter[Request, Answer]] = []
        while self._queue and len(taken) < self._max_batch:
            waiter = self._queue.popleft()
            if not waiter.future.done():
                taken.append(waiter)
        if not taken:
            return
        self._in_flight = taken
        deadline = max(waiter.deadline for waiter in taken) - self._loop.time() + time.monotonic()
        self._work.put(_Work(taken, deadline))

    def _finish(
        self,
        waiters: list[_Waiter[Request, Answer]],
        answers: Sequence[Answer | SkipbusError],
        error: BaseException | None,
    ) -> None:
        self._in_flight = []
        self._start_batch()
        if error is not None:
            for waiter in waiters:
                _fail(waiter.future, error)
            return
        for waiter, answer in zip(waiters, answers, strict=True):
            if isinstance(answer, SkipbusError):
                _fail(waiter.future, answer)
            elif not waiter.future.done():
                waiter.future.set_result(answer)

    def _sweep(self) -> None:
        # Waiters stand in order of their deadlines. One of a batch that hangs is let go as well.
        now = self._loop.time()
        late = StoreUnavailable("the key store did not answer in time")
        while self._queue and self._queue[0].deadline <= now:
            _fail(self._queue.popleft().future, late)
        for waiter in self._in_flight:
            if waiter.deadline <= now:
                _fail(waiter.future, late)
        self._sweeper = self._loop.call_later(_SWEEP_SECONDS, self._sweep)

    def _serve(self) -> None:
        """The lane's thread: one batch after another until it is told to end."""
        while (work := self._work.get()) is not None:
            answers: Sequence[Answer | SkipbusError] = ()
            failure: BaseException | None = None
            try:
                answers = self._run([waiter.request for waiter in work.waiters], work.deadline)
            except BaseException as error:  # noqa: BLE001 -- whatever it is, the callers must be told
                failure = error
            with contextlib.suppress(RuntimeError):  # the loop was closed without waiting for this lane
                self._loop.call_soon_threadsafe(self._finish, work.waiters, answers, failure)
        self._drop_connection()

    def _run(self, requests: Sequence[Request], deadline: float) -> Sequence[Answer | SkipbusError]:
        """Tries until the batch is committed or nobody waits for it any more."""
        started = time.monotonic()
        batch = self._make_batch(requests)
        unknown = False
        attempt = 0
        while True:
            try:
                answers = self._try(batch, unknown)
            except StoreUnavailable as error:
                self._drop_connection()
                unknown = unknown or isinstance(error, CommitUnknown)
                pause_seconds = _RETRY_SECONDS[min(attempt, len(_RETRY_SECONDS) - 1)]
                attempt += 1
                if time.monotonic() + pause_seconds >= deadline:
                    raise
                time.sleep(pause_seconds)
            except BaseException:
                # The transaction may be half done; the connection's end undoes it.
                self._drop_connection()
                raise
            else:
                self._observe(len(requests), time.monotonic() - started)
                return answers

    def _try(self, batch: Batch[Answer], unknown: bool) -> Sequence[Answer | SkipbusError]:
        if self._connection is None:
            self._connection = self._connect()
        if unknown:
            answers = batch.committed(self._connection)
            if answers is not None:
                return answers
        return batch.run(self._connection)

    def _drop_connection(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(Exception):  # a broken connection may refuse to be closed politely
                connection.close()


def _fail(future: asyncio.Future[Answer], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)
        # The caller may have gone; nobody else would look at the exception then.
        future.exception()
