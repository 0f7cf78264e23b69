"""Group commit: while one batch commits, the next one fills.

A queue has one thread and one connection, and runs one batch at a time: a batch of one costs no extra wait, a batch of
256 costs one commit. The queue is bounded: a caller is refused immediately when it is full, and never waits longer than
``timeout_seconds``. A batch ends when the time of its first caller is over; the others go into the next one. A commit
whose outcome is unknown is looked up before the batch is run again. If a batch fails for another reason than an
unavailable store, each request is run alone, unless the outcome of a commit is unknown.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, takewhile
from math import inf
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from sqlalchemy import Connection, Engine
from tenacity import Retrying, retry_if_exception_type, stop_before_delay, wait_random_exponential

from skipbus.services.api.metrics import batch_observer
from skipbus.shared.errors import (
    CommitUnknown,
    Overloaded,
    SkipbusError,
    StoreConflict,
    StoreRefused,
    StoreUnavailable,
)
from skipbus.shared.logging import get_logger
from skipbus.shared.store.engine import driver_errors

Request = TypeVar("Request")
Answer = TypeVar("Answer")
Answer_co = TypeVar("Answer_co", covariant=True)
_EXPIRY_SECONDS = 0.25
# A timer that is later than this: the process was stopped, or its host was.
_STOPPED_SECONDS = 1.0
_RETRY_WAIT = wait_random_exponential(multiplier=0.02, max=0.5)

_log = get_logger("group commit")


class Limits(NamedTuple):
    """Bounds of a queue: requests in one commit, callers who wait for the next, and how long one of them waits."""

    max_batch: int
    max_queue: int
    timeout_seconds: float


class Batch(Protocol[Answer_co]):
    """One transaction for several requests. Both methods are called in the queue's thread."""

    def run(self, connection: Connection) -> Sequence[Answer_co | SkipbusError]:
        """Executes the statements; an answer or an error for each request, in order. The queue commits after that.

        A batch that changed nothing calls ``connection.rollback()`` itself.
        """

    def committed(self, connection: Connection) -> Sequence[Answer_co | SkipbusError] | None:
        """After a commit whose outcome is unknown: the answers if it happened, None if ``run`` is to be tried again."""


class _Waiter(NamedTuple, Generic[Request, Answer]):
    """A caller. ``deadline`` is monotonic time: no commit begins for it later."""

    request: Request
    future: asyncio.Future[Answer]
    deadline: float


class _Postponed(Exception):
    """Stands for an answer: the batch has ended without a commit, and this caller goes into the next one."""


class GroupCommit(Generic[Request, Answer]):
    """Gathers requests into batches and commits one batch after another."""

    def __init__(
        self,
        name: str,
        make_batch: Callable[[Sequence[Request]], Batch[Answer]],
        engine: Engine,
        limits: Limits,
    ) -> None:
        self._limits = limits
        self._observe = batch_observer(name)
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[_Waiter[Request, Answer]] = deque()
        self._committing: Sequence[_Waiter[Request, Answer]] = ()
        self._closing = False
        self._worker: asyncio.Task[None] | None = None
        self._expiry: asyncio.TimerHandle | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"store-{name}")
        self._committer = _Committer(name, make_batch, engine)

    def __len__(self) -> int:
        """How many callers wait."""
        return len(self._waiting) + len(self._committing)

    async def submit(self, request: Request) -> Answer:
        """The answer to one request. Raises Overloaded, StoreUnavailable in time, or the error of the batch."""
        if len(self._waiting) >= self._limits.max_queue:
            raise Overloaded("too many requests wait for the key store; try again")
        if self._closing:
            raise _stopping()
        future: asyncio.Future[Answer] = self._loop.create_future()
        self._waiting.append(_Waiter(request, future, time.monotonic() + self._limits.timeout_seconds))
        if self._worker is None:
            self._worker = self._loop.create_task(self._work(), name="group commit")
        if self._expiry is None:
            self._expire_later()
        return await future

    async def close(self) -> None:
        """Finishes the batch that is committing; refuses all other callers."""
        self._closing = True
        while self._waiting:
            _deliver(self._waiting.popleft().future, _stopping())
        if self._worker is not None:
            await self._worker
        if self._expiry is not None:
            self._expiry.cancel()
        await self._loop.run_in_executor(self._thread, self._committer.disconnect)
        self._thread.shutdown(wait=False)

    async def _work(self) -> None:
        try:
            while batch := self._take_batch():
                await self._commit(batch)
        finally:
            self._worker = None

    def _take_batch(self) -> list[_Waiter[Request, Answer]]:
        taken: list[_Waiter[Request, Answer]] = []
        while self._waiting and len(taken) < self._limits.max_batch:
            waiter = self._waiting.popleft()
            if not waiter.future.done():  # its caller has left or its time is up
                taken.append(waiter)
        return taken

    async def _commit(self, batch: Sequence[_Waiter[Request, Answer]]) -> None:
        started, self._committing = time.monotonic(), batch
        answers = await self._loop.run_in_executor(self._thread, self._committer.commit, batch)
        self._committing = ()
        for waiter, answer in zip(batch, answers, strict=True):
            if not isinstance(answer, _Postponed):
                _deliver(waiter.future, answer)
        postponed = [w for w, answer in zip(batch, answers, strict=True) if isinstance(answer, _Postponed)]
        self._waiting.extendleft(reversed(postponed))
        self._observe(len(batch), time.monotonic() - started)

    def _expire(self) -> None:
        """Refuses callers whose time is up, in a batch that hangs as well. They stand in order of their deadlines."""
        now = time.monotonic()
        # This process may have been stopped, and the store's answer to the commit may be here unread: that goes first.
        was_stopped = self._expiry is not None and self._loop.time() - self._expiry.when() > _STOPPED_SECONDS
        if not was_stopped:
            for waiter in takewhile(lambda waiter: waiter.deadline <= now, chain(self._committing, self._waiting)):
                _deliver(waiter.future, StoreUnavailable("the key store did not answer in time"))
        self._expiry = None
        if len(self):
            self._expire_later()

    def _expire_later(self) -> None:
        self._expiry = self._loop.call_later(_EXPIRY_SECONDS, self._expire)


class _Committer(Generic[Request, Answer]):
    """The part of a queue that runs in its thread, with the connection."""

    def __init__(self, name: str, make_batch: Callable[[Sequence[Request]], Batch[Answer]], engine: Engine) -> None:
        self._name = name
        self._make_batch = make_batch
        self._engine = engine
        self._connection: Connection | None = None

    def commit(self, batch: Sequence[_Waiter[Request, Answer]]) -> Sequence[Answer | Exception]:
        """An answer or an error for each caller."""
        deadline = batch[0].deadline
        attempts = _Attempts(self, self._make_batch([waiter.request for waiter in batch]), deadline)
        try:
            return attempts.answers()
        except StoreUnavailable as error:
            # Who has no more time than this is not worth another attempt.
            postponed_after = inf if attempts.outcome_unknown else max(deadline, time.monotonic()) + _EXPIRY_SECONDS
            _forget_frames(error)
            return [_copy(error) if waiter.deadline <= postponed_after else _Postponed() for waiter in batch]
        except Exception as error:  # noqa: BLE001 -- whatever it is, it may be the fault of one request alone
            return self._after(error, batch, outcome_unknown=attempts.outcome_unknown)

    def _after(
        self, error: Exception, batch: Sequence[_Waiter[Request, Answer]], *, outcome_unknown: bool
    ) -> Sequence[Answer | Exception]:
        """The answers where a batch has failed and the store is there."""
        if outcome_unknown:
            _log.error(
                "the database connection broke during a commit",
                queue=self._name,
                requests=len(batch),
                effect="the callers get 500, and their keys may be lost",
                exc_info=error,
            )
            return [CommitUnknown("the connection to the store broke during a commit") for _ in batch]
        if len(batch) == 1:
            if isinstance(error, SkipbusError):  # of any other one the log shows the traceback
                _forget_frames(error)
            return [error]
        _log.warning(
            "a commit failed: each request is tried alone",
            queue=self._name,
            requests=len(batch),
            reason=f"{type(error).__name__}: {error}",
        )
        return [self.commit([waiter])[0] for waiter in batch]

    def connected(self) -> Connection:
        """The connection, opened if there is none. Raises StoreUnavailable or StoreRefused."""
        if self._connection is None:
            with driver_errors():
                self._connection = self._engine.connect()
        return self._connection

    def disconnect(self) -> None:
        """Closes the connection, which ends its transaction."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(Exception):  # a broken connection may refuse to be closed politely
                connection.invalidate()
                connection.close()

    def roll_back(self) -> None:
        """Ends the transaction; the connection goes on if it can."""
        try:
            self.connected().rollback()
        except Exception:  # noqa: BLE001 -- whatever is wrong with the connection, it is replaced
            self.disconnect()


class _Attempts(Generic[Answer]):
    """One batch, tried until it is committed or its first caller's deadline has come."""

    def __init__(self, committer: _Committer[Any, Answer], batch: Batch[Answer], deadline: float) -> None:
        self._committer = committer
        self._batch = batch
        self._deadline = deadline
        self.outcome_unknown = False

    def answers(self) -> Sequence[Answer | SkipbusError]:
        """Raises StoreUnavailable at the deadline, and what the batch raises."""
        attempts = Retrying(
            retry=retry_if_exception_type(StoreUnavailable),
            stop=stop_before_delay(self._deadline - time.monotonic()),
            wait=_RETRY_WAIT,
            reraise=True,
        )
        return attempts(self._attempt)

    def _attempt(self) -> Sequence[Answer | SkipbusError]:
        self._check_deadline()
        connection = self._committer.connected()
        try:
            with driver_errors():
                return self._transaction(connection)
        except StoreConflict:
            self._committer.roll_back()
            raise
        except BaseException:
            self._committer.disconnect()
            raise

    def _transaction(self, connection: Connection) -> Sequence[Answer | SkipbusError]:
        if self.outcome_unknown:
            answers = self._batch.committed(connection)
            connection.rollback()
            if answers is not None:
                return answers
        answers = self._batch.run(connection)
        self._check_deadline()
        self._commit(connection)
        return answers

    def _check_deadline(self) -> None:
        """Raises StoreUnavailable where the first caller is answered 500: its key must not be given out any more."""
        if time.monotonic() >= self._deadline:
            raise StoreUnavailable("the key store did not answer in time")

    def _commit(self, connection: Connection) -> None:
        try:
            with driver_errors():
                connection.commit()
        except StoreConflict:
            raise
        except (StoreUnavailable, StoreRefused) as error:
            self.outcome_unknown = True
            raise CommitUnknown("the connection to the store broke during a commit") from error


def _stopping() -> StoreUnavailable:
    return StoreUnavailable("the key provider is stopping")


def _forget_frames(error: BaseException | None) -> None:
    """Drops the tracebacks of an error and of its causes: the variables of a batch hold keys in clear."""
    while error is not None and error.__traceback__ is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


def _copy(error: StoreUnavailable) -> StoreUnavailable:
    """An error for one caller alone: each caller that raises it adds to its traceback."""
    own = copy.copy(error)
    own.__cause__ = error.__cause__
    return own


def _deliver(future: asyncio.Future[Answer], answer: Answer | Exception) -> None:
    if future.done():
        return
    if isinstance(answer, Exception):
        future.set_exception(answer)
        # The caller may have left; asyncio would warn of an exception that is not retrieved.
        future.exception()
    else:
        future.set_result(answer)
