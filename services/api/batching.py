"""Group commit: while one batch commits, the next one fills.

A lane owns one connection and runs one batch at a time. A batch of one costs no extra wait, and a batch of 256
costs one commit. The queue in front is bounded: when it is full, callers are refused at once. No caller waits longer
than ``timeout_seconds``, whatever the store does; a batch that outlives its callers still runs to its end, since a
statement that was sent cannot be taken back.

Everything happens on the event loop, and nothing blocks it: a batch's steps are driven from the moments at which the
store has answered. So a caller's statement leaves in the very call that asks for it, and no other thread has to
wake. Only connecting, and steps that take long, go to a thread.

A batch must be able to say whether it was committed when its connection broke during the commit. It is then run
again only if it was not.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar

from pymysql.connections import Connection

from skipbus.services.api.awake import Awake
from skipbus.shared.errors import CommitUnknown, Overloaded, SkipbusError, StoreUnavailable
from skipbus.shared.store.line import StoreLine, Told
from skipbus.shared.store.results import Rows
from skipbus.shared.store.steps import Statement, Step, Steps

Request = TypeVar("Request")
Answer = TypeVar("Answer")
Answer_co = TypeVar("Answer_co", covariant=True)
_RETRY_SECONDS = (0.0, 0.02, 0.1, 0.25, 0.5)
_SWEEP_SECONDS = 0.25


class Batch(Protocol[Answer_co]):
    """One transaction for several requests, as steps."""

    def run(self) -> Steps[Sequence[Answer_co | SkipbusError]]:
        """Does the work and commits; an answer or an error for each request, in order."""

    def committed(self) -> Steps[Sequence[Answer_co | SkipbusError] | None]:
        """The answers, if the interrupted commit of ``run`` happened after all."""


class Line(Protocol):
    """What a lane needs of a connection; ``StoreLine`` is one."""

    open: bool

    def send(self, statement: Statement, told: Told) -> None:
        """Sends statements and has ``told`` called once, with the rows or the error."""

    def check(self, now: float) -> None:
        """Gives up a statement that takes too long."""

    def close(self) -> None:
        """Ends the connection."""


class _Waiter(Generic[Request, Answer]):
    __slots__ = ("deadline", "future", "request")

    def __init__(self, request: Request, future: asyncio.Future[Answer], deadline: float) -> None:
        self.request = request
        self.future = future
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
        make_line: Callable[[Connection, asyncio.AbstractEventLoop], Line] = StoreLine,
    ) -> None:
        self.name = name
        self._make_batch = make_batch
        self._connect = connect
        self._make_line = make_line
        self._max_batch = max_batch
        self._max_queue = max_queue
        self._timeout_seconds = timeout_seconds
        self._observe = observe
        self._loop = asyncio.get_running_loop()
        self._queue: deque[_Waiter[Request, Answer]] = deque()
        self._running: _Run[Request, Answer] | None = None
        self._starting = False
        self._unobserved: list[tuple[int, float]] = []
        self._awake: Awake | None = None
        self._line: Line | None = None
        self._closing: asyncio.Future[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        # Armed only while there is something to sweep: an idle api has several lanes in each process.
        self._sweeper: asyncio.TimerHandle | None = None

    def stay_awake(self) -> None:
        """From now on the process does not sleep while the store works for one caller alone (``Awake``)."""
        self._awake = Awake(self._loop)

    def __len__(self) -> int:
        """How many callers wait."""
        return len(self._queue) + (len(self._running.waiters) if self._running else 0)

    async def submit(self, request: Request) -> Answer:
        """The answer to one request. Raises Overloaded at once, StoreUnavailable in time, or the batch's own error."""
        return await self.begin(request)

    def begin(self, request: Request) -> asyncio.Future[Answer]:
        """``submit`` for one who has something else to do while the request is on its way."""
        if len(self._queue) >= self._max_queue:
            raise Overloaded("too many requests wait for the key store; try again")
        if self._closing is not None:
            raise _stopping()
        future: asyncio.Future[Answer] = self._loop.create_future()
        self._queue.append(_Waiter(request, future, self._loop.time() + self._timeout_seconds))
        if self._running is None:
            self._start_next()
        if self._sweeper is None:
            self._sweeper = self._loop.call_later(_SWEEP_SECONDS, self._sweep)
        return future

    async def close(self) -> None:
        """Lets the batch that runs come to its end; whoever still waits is told."""
        self._closing = self._loop.create_future()
        while self._queue:
            _fail(self._queue.popleft().future, _stopping())
        if self._running is not None:
            await self._closing
        if self._sweeper is not None:
            self._sweeper.cancel()
        self._tell_observed()
        self.drop_line()
        # What was reported last is still to be handed to its waiters.
        await asyncio.sleep(0)

    def drop_line(self) -> None:
        """Ends the connection; the next statement gets a new one."""
        line, self._line = self._line, None
        if line is not None:
            line.close()

    def take(self, step: Step, told: Told) -> None:
        """Has one step done; ``told`` is called once."""
        if not isinstance(step, Statement):
            self._in_thread(step, told)
        elif self._line is not None:
            self._line.send(step, told)
        else:
            told((), StoreUnavailable("there is no connection to the store"))

    def has_line(self) -> bool:
        """Whether there is a connection, as far as is known."""
        return self._line is not None and self._line.open

    def connect(self, told: Told) -> None:
        """Makes a connection; ``told`` is called once."""
        self.drop_line()
        self._in_thread(self._connect, told)

    def end(self, run: _Run[Request, Answer], answers: Sequence[Answer | SkipbusError]) -> None:
        """Starts the next batch and hands out the answers of the one that has been run."""
        self._start_next()
        for waiter, answer in zip(run.waiters, answers, strict=True):
            if isinstance(answer, SkipbusError):
                _fail(waiter.future, answer)
            elif not waiter.future.done():
                waiter.future.set_result(answer)
        # Told of later: those who wait for their answers should not wait for this as well.
        self._unobserved.append((len(answers), self._loop.time() - run.started))

    def fail(self, run: _Run[Request, Answer], error: BaseException) -> None:
        """Starts the next batch and tells the callers of one that has failed for good."""
        if self._running is not run:
            return
        self.drop_line()
        self._start_next()
        for waiter in run.waiters:
            _fail(waiter.future, error)

    def _start_next(self) -> None:
        # A batch that needs no statement ends at once, within its own start. Then this loop goes on, not a deeper call.
        self._running = None
        if self._awake is not None:
            self._awake.end()
        if self._starting:
            return
        self._starting = True
        try:
            while self._queue and not self._busy():
                self._start_batch()
        finally:
            self._starting = False
        if self._closing is not None and not self._busy() and not self._closing.done():
            self._closing.set_result(None)

    def _busy(self) -> bool:
        return self._running is not None

    def _start_batch(self) -> None:
        taken: list[_Waiter[Request, Answer]] = []
        while self._queue and len(taken) < self._max_batch:
            waiter = self._queue.popleft()
            if not waiter.future.done():
                taken.append(waiter)
        if taken:
            if self._awake is not None and len(taken) == 1 and not self._queue:
                self._awake.begin()
            self._running = _Run(self, taken, self._loop)
            self._running.start(self._make_batch)

    def _in_thread(self, work: Callable[[], Connection | None], told: Told) -> None:
        task = self._loop.create_task(self._done_in_thread(work, told))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _done_in_thread(self, work: Callable[[], Connection | None], told: Told) -> None:
        try:
            connection = await asyncio.to_thread(work)
            if connection is not None:
                self._line = self._make_line(connection, self._loop)
        except Exception as error:  # noqa: BLE001 -- whatever it is, the batch must be told
            told((), error)
        else:
            told((), None)

    def _sweep(self) -> None:
        # Waiters stand in order of their deadlines. One of a batch that hangs is let go as well.
        now = self._loop.time()
        late = StoreUnavailable("the key store did not answer in time")
        while self._queue and self._queue[0].deadline <= now:
            _fail(self._queue.popleft().future, late)
        if self._running is not None:
            for waiter in self._running.waiters:
                if waiter.deadline <= now:
                    _fail(waiter.future, late)
        if self._line is not None:
            self._line.check(now)
        self._tell_observed()
        busy = self._queue or self._running is not None
        self._sweeper = self._loop.call_later(_SWEEP_SECONDS, self._sweep) if busy else None

    def _tell_observed(self) -> None:
        ended, self._unobserved = self._unobserved, []
        for size, seconds in ended:
            self._observe(size, seconds)


class _Run(Generic[Request, Answer]):
    """One batch on its way: tried until it is committed or nobody waits for it any more."""

    __slots__ = ("_attempt", "_batch", "_deadline", "_lane", "_loop", "_steps", "_unknown", "started", "waiters")

    def __init__(
        self, lane: Lane[Request, Answer], waiters: list[_Waiter[Request, Answer]], loop: asyncio.AbstractEventLoop
    ) -> None:
        self.waiters = waiters
        self.started = loop.time()
        self._lane = lane
        self._loop = loop
        self._deadline = max(waiter.deadline for waiter in waiters)
        self._unknown = False
        self._attempt = 0
        self._batch: Batch[Answer]
        self._steps: Steps[Sequence[Answer | SkipbusError]]

    def start(self, make_batch: Callable[[Sequence[Request]], Batch[Answer]]) -> None:
        """Makes the batch and tries it for the first time."""
        try:
            self._batch = make_batch([waiter.request for waiter in self.waiters])
        except Exception as error:  # noqa: BLE001 -- whatever it is, the callers must be told
            self._lane.fail(self, error)
        else:
            self._try()

    def _try(self) -> None:
        self._steps = self._tried_again() if self._unknown else self._batch.run()
        if self._lane.has_line():
            self._go_on(None, None)
        else:
            self._lane.connect(self._connected)

    def _tried_again(self) -> Steps[Sequence[Answer | SkipbusError]]:
        answers = yield from self._batch.committed()
        return (yield from self._batch.run()) if answers is None else answers

    def _connected(self, _rows: Rows, error: BaseException | None) -> None:
        if error is None and self._loop.time() >= self._deadline:
            # To connect took too long: nothing may be done in the name of callers who have gone.
            error = StoreUnavailable("the key store did not answer in time")
        self._go_on(None, error)

    def _go_on(self, rows: Rows | None, failure: BaseException | None) -> None:
        """Goes on from the beginning (no rows), or from where a step has been done or has failed, to the next step."""
        try:
            step = self._steps.send(rows) if failure is None else self._steps.throw(failure)  # type: ignore[arg-type]
        except StopIteration as end:
            self._lane.end(self, end.value)
        except StoreUnavailable as error:
            self._retry(error)
        except Exception as error:  # noqa: BLE001 -- whatever it is, the callers must be told
            # The transaction may be half done; the connection's end undoes it.
            self._lane.fail(self, error)
        else:
            try:
                self._lane.take(step, self._go_on)
            except Exception as error:  # noqa: BLE001 -- a lane that forgot its batch would never start another one
                self._lane.fail(self, error)

    def _retry(self, error: StoreUnavailable) -> None:
        self._lane.drop_line()
        self._unknown = self._unknown or isinstance(error, CommitUnknown)
        pause_seconds = _RETRY_SECONDS[min(self._attempt, len(_RETRY_SECONDS) - 1)]
        self._attempt += 1
        if self._loop.time() + pause_seconds >= self._deadline:
            self._lane.fail(self, error)
        else:
            self._loop.call_later(pause_seconds, self._try)


def _stopping() -> StoreUnavailable:
    return StoreUnavailable("the key provider is stopping")


def _fail(future: asyncio.Future[Answer], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)
        # The caller may have gone; nobody else would look at the exception then.
        future.exception()
