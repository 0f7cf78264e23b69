"""Facts about group commit: how batches form, who is refused, and what an interrupted commit leads to.

The queue's seams are the batch and the connection: the batches here commit into a ``Ledger`` in memory, and its
connections wait until the ledger's gate is open. The store itself comes in with
``tests/integration/test_key_store.py``.
"""

from __future__ import annotations

import asyncio
import functools
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, cast

import pymysql.err
import pytest
from sqlalchemy import Connection, Engine

from skipbus.services.api.group_commit import GroupCommit, Limits
from skipbus.services.api.metrics import REGISTRY
from skipbus.shared.errors import (
    CommitUnknown,
    KeyNotAvailable,
    Overloaded,
    SkipbusError,
    StoreRefused,
    StoreUnavailable,
)

POISON = 666
NOTHING_TO_DO = 1_000_000
LOST = pymysql.err.OperationalError(2013, "Lost connection to MySQL server during query")
DEADLOCK = pymysql.err.OperationalError(1213, "Deadlock found when trying to get lock; try restarting transaction")
SYNTAX = pymysql.err.ProgrammingError(1064, "You have an error in your SQL syntax")


class Ledger:
    """Where batches commit, and how their commits end: one entry of ``ends`` for each try, then all is well."""

    def __init__(self, *ends: str) -> None:
        self.ends = list(ends)
        self.runs: list[list[int]] = []
        self.committed: list[int] = []
        self.connections: list[FakeConnection] = []
        self.threads: set[str] = set()
        self.gate = threading.Event()
        self.gate.set()
        self.running = threading.Event()
        self.connect_failures = 0
        self.connect_seconds = 0.0

    def connect(self) -> FakeConnection:
        """What an engine does."""
        time.sleep(self.connect_seconds)
        if self.connect_failures:
            self.connect_failures -= 1
            raise LOST
        self.connections.append(FakeConnection(self))
        return self.connections[-1]


class FakeConnection:
    """A connection whose transaction is a list of numbers."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self.pending: list[int] = []
        self.rolled_back = 0
        self.closed = False

    def execute(self, numbers: Sequence[int]) -> None:
        assert not self.closed
        self._ledger.threads.add(threading.current_thread().name)
        self._ledger.running.set()
        assert self._ledger.gate.wait(10)
        self.pending += numbers

    def commit(self) -> None:
        assert not self.closed
        end = self._ledger.ends.pop(0) if self.pending and self._ledger.ends else "committed"
        if end == "deadlock":
            raise DEADLOCK
        if end == "cut before":
            raise LOST
        self._ledger.committed += self.pending
        self.pending = []
        if end == "cut after":
            raise LOST

    def rollback(self) -> None:
        assert not self.closed
        self.rolled_back += 1
        self.pending = []

    def invalidate(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True


class DoublingBatch:
    """Answers each number with its double, once it is committed; refuses negative ones and chokes on POISON."""

    def __init__(self, ledger: Ledger, requests: Sequence[int]) -> None:
        self._ledger = ledger
        self._requests = list(requests)

    def run(self, connection: Connection) -> Sequence[int | SkipbusError]:
        self._ledger.runs.append(self._requests)
        if self._requests == [NOTHING_TO_DO]:
            return self._answers()
        cast("FakeConnection", connection).execute(self._requests)
        if POISON in self._requests:
            raise SYNTAX
        if self._ledger.ends and self._ledger.ends[0] == "bug":
            self._ledger.ends.pop(0)
            raise ZeroDivisionError
        return self._answers()

    def committed(self, _connection: Connection) -> Sequence[int | SkipbusError] | None:
        if self._ledger.ends and self._ledger.ends[0] == "cut while asking":
            self._ledger.ends.pop(0)
            raise LOST
        return self._answers() if set(self._requests) <= set(self._ledger.committed) else None

    def _answers(self) -> Sequence[int | SkipbusError]:
        refused = KeyNotAvailable("negative", parameter="keyId")
        return [refused if n < 0 else 2 * n for n in self._requests]


def make_queue(
    ledger: Ledger,
    *,
    max_batch: int = 4,
    max_queue: int = 100,
    timeout_seconds: float = 5.0,
) -> GroupCommit[int, int]:
    limits = Limits(max_batch, max_queue, timeout_seconds)
    make_batch = functools.partial(DoublingBatch, ledger)
    return GroupCommit("test", make_batch, cast("Engine", ledger), limits)


@asynccontextmanager
async def running_queue(ledger: Ledger, **options: Any) -> AsyncIterator[GroupCommit[int, int]]:  # noqa: ANN401
    queue = make_queue(ledger, **options)
    try:
        yield queue
    finally:
        ledger.gate.set()
        ledger.connect_failures = 0
        await queue.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 (what is waited for happens in a thread)
            await asyncio.sleep(0.001)


async def gather_errors(tasks: Sequence[asyncio.Task[int]]) -> list[int | BaseException]:
    async with asyncio.timeout(10):
        return await asyncio.gather(*tasks, return_exceptions=True)


def submit(queue: GroupCommit[int, int], *numbers: int) -> list[asyncio.Task[int]]:
    return [asyncio.create_task(queue.submit(number)) for number in numbers]


async def submit_behind_a_batch(
    ledger: Ledger, queue: GroupCommit[int, int], first: int, *rest: int
) -> list[asyncio.Task[int]]:
    """``first`` is being committed, and waits at the gate; the others go together next."""
    ledger.gate.clear()
    tasks = submit(queue, first)
    await until(ledger.running.is_set)
    tasks += submit(queue, *rest)
    await until(lambda: len(queue) == 1 + len(rest))
    return tasks


# --- how batches form


async def test_a_single_request_is_a_batch_of_its_own_at_once() -> None:
    ledger = Ledger()
    async with running_queue(ledger) as queue:
        assert await queue.submit(21) == 42
    assert ledger.runs == [[21]]


async def test_requests_gather_while_a_batch_commits_and_go_together_next() -> None:
    ledger = Ledger()
    async with running_queue(ledger) as queue:
        tasks = await submit_behind_a_batch(ledger, queue, 1, 2, 3, 4)
        ledger.gate.set()
        assert await gather_errors(tasks) == [2, 4, 6, 8]
    assert ledger.runs == [[1], [2, 3, 4]]


async def test_no_batch_is_greater_than_allowed_and_the_order_is_kept() -> None:
    ledger = Ledger()
    async with running_queue(ledger, max_batch=4) as queue:
        assert await gather_errors(submit(queue, *range(11))) == [2 * n for n in range(11)]
    assert [n for run in ledger.runs for n in run] == list(range(11))
    assert max(len(run) for run in ledger.runs) == 4


async def test_all_batches_run_in_one_thread_on_one_connection_and_not_on_the_event_loop() -> None:
    ledger = Ledger()
    async with running_queue(ledger) as queue:
        await gather_errors(submit(queue, *range(50)))
    assert len(ledger.threads) == 1
    assert ledger.threads != {threading.current_thread().name}
    assert len(ledger.connections) == 1


async def test_the_event_loop_goes_on_while_the_store_hangs() -> None:
    ledger = Ledger()
    async with running_queue(ledger) as queue:
        tasks = await submit_behind_a_batch(ledger, queue, 1)
        started = time.monotonic()
        await asyncio.sleep(0.01)
        assert time.monotonic() - started < 1
        ledger.gate.set()
        assert await gather_errors(tasks) == [2]


async def test_a_caller_who_has_left_takes_no_room_in_a_batch() -> None:
    ledger = Ledger()
    async with running_queue(ledger) as queue:
        first, left, kept = await submit_behind_a_batch(ledger, queue, 1, 2, 3)
        left.cancel()
        await asyncio.sleep(0)
        ledger.gate.set()
        assert await gather_errors([first, kept]) == [2, 6]
    assert ledger.runs == [[1], [3]]


async def test_a_caller_who_leaves_while_its_batch_runs_stops_nobody_else() -> None:
    ledger = Ledger()
    async with running_queue(ledger) as queue:
        (left,) = await submit_behind_a_batch(ledger, queue, 1)
        left.cancel()
        (kept,) = submit(queue, 2)
        await asyncio.sleep(0)
        ledger.gate.set()
        assert await gather_errors([kept]) == [4]
    assert ledger.committed == [1, 2]


async def test_a_batch_reports_its_size_and_its_duration() -> None:
    def seen() -> list[float]:
        names = [f"skipbus_batch_{name}" for name in ("size_count", "size_sum", "seconds_count", "seconds_sum")]
        return [REGISTRY.get_sample_value(name, {"queue": "test"}) or 0.0 for name in names]

    async with running_queue(Ledger()) as queue:
        before = seen()
        await gather_errors(submit(queue, 1, 2, 3))
    batches, requests, timed, seconds = [after - earlier for after, earlier in zip(seen(), before, strict=True)]
    assert (batches, requests, timed) == (1, 3, 1)
    assert 0 < seconds < 5


# --- who is refused


async def test_a_full_queue_refuses_at_once_and_those_who_wait_still_get_their_answers() -> None:
    ledger = Ledger()
    async with running_queue(ledger, max_queue=3) as queue:
        tasks = await submit_behind_a_batch(ledger, queue, 0, 1, 2, 3)
        started = time.monotonic()
        with pytest.raises(Overloaded):
            await queue.submit(4)
        assert time.monotonic() - started < 0.5
        ledger.gate.set()
        assert await gather_errors(tasks) == [0, 2, 4, 6]
        assert await queue.submit(5) == 10


async def test_nobody_waits_longer_than_the_timeout_though_the_batch_hangs() -> None:
    ledger = Ledger()
    async with running_queue(ledger, timeout_seconds=0.3) as queue:
        started = time.monotonic()
        tasks = await submit_behind_a_batch(ledger, queue, 1, 2, 3)
        answers = await gather_errors(tasks)
        assert [type(answer) for answer in answers] == [StoreUnavailable] * 3
        assert 0.2 < time.monotonic() - started < 2
        ledger.gate.set()
        assert await queue.submit(4) == 8
    # Who gave up before its turn is not worked for, and what was not committed in time never is.
    assert ledger.runs == [[1], [4]]
    assert ledger.committed == [4]


async def test_a_process_that_was_stopped_takes_the_answer_that_is_there_before_it_refuses_callers() -> None:
    ledger = Ledger()
    async with running_queue(ledger, timeout_seconds=1.0) as queue:
        (task,) = await submit_behind_a_batch(ledger, queue, 1)
        ledger.gate.set()
        # The batch is committed in its thread while the event loop stands still, for longer than a caller may wait.
        time.sleep(2.5)  # noqa: ASYNC251 -- that is what is tested
        assert ledger.committed == [1]
        assert await task == 2


async def test_what_is_answered_500_is_not_committed_with_the_rest_of_its_batch() -> None:
    ledger = Ledger()
    ledger.gate.clear()
    async with running_queue(ledger, timeout_seconds=1.0) as queue:
        first = asyncio.create_task(queue.submit(1))
        # The event loop stands still, so that both are in one batch and the second has more time.
        asyncio.get_running_loop().call_soon(time.sleep, 0.8)
        second = asyncio.create_task(queue.submit(2))
        with pytest.raises(StoreUnavailable):
            await first
        assert ledger.runs == [[1, 2]]
        ledger.gate.set()
        assert await second == 4
    assert ledger.runs == [[1, 2], [2]]
    assert ledger.committed == [2]


async def test_callers_who_have_time_left_are_answered_when_the_store_is_back() -> None:
    ledger = Ledger()
    ledger.connect_failures = 10**6
    async with running_queue(ledger, timeout_seconds=1.0) as queue:
        first = asyncio.create_task(queue.submit(1))
        asyncio.get_running_loop().call_soon(time.sleep, 0.8)
        second = asyncio.create_task(queue.submit(2))
        with pytest.raises(StoreUnavailable):
            await first
        ledger.connect_failures = 0
        assert await second == 4
    assert ledger.committed == [2]


async def test_one_refused_request_of_a_batch_leaves_the_others_theirs() -> None:
    ledger = Ledger()
    async with running_queue(ledger) as queue:
        tasks = await submit_behind_a_batch(ledger, queue, 0, 1, -1, 2)
        ledger.gate.set()
        answers = await gather_errors(tasks)
    assert answers[:2] == [0, 2]
    assert isinstance(answers[2], KeyNotAvailable)
    assert answers[3] == 4


# --- what fails, fails alone


async def test_a_poisoned_request_in_a_batch_fails_alone() -> None:
    ledger = Ledger()
    async with running_queue(ledger) as queue:
        tasks = await submit_behind_a_batch(ledger, queue, 0, 1, POISON, 2)
        ledger.gate.set()
        answers = await gather_errors(tasks)
    assert [answers[0], answers[1], answers[3]] == [0, 2, 4]
    assert isinstance(answers[2], StoreRefused)
    assert ledger.runs == [[0], [1, POISON, 2], [1], [POISON], [2]]
    assert ledger.committed == [0, 1, 2]


async def test_a_fault_of_ours_in_a_batch_is_not_its_callers_where_each_alone_works() -> None:
    ledger = Ledger("committed", "bug")
    async with running_queue(ledger) as queue:
        tasks = await submit_behind_a_batch(ledger, queue, 0, 1, 2)
        ledger.gate.set()
        assert await gather_errors(tasks) == [0, 2, 4]
    assert ledger.runs == [[0], [1, 2], [1], [2]]


@pytest.mark.parametrize("numbers", [[1], [1, 2]])
async def test_a_batch_that_fails_after_an_unknown_commit_is_in_doubt_for_all_and_not_run_again(
    numbers: list[int],
) -> None:
    # Only that batch knows what the unknown commit may have given out: a new one would refuse it as unknown.
    ledger = Ledger("committed", "cut before", "bug")
    async with running_queue(ledger) as queue:
        tasks = await submit_behind_a_batch(ledger, queue, 0, *numbers)
        ledger.gate.set()
        answers = await gather_errors(tasks)
        assert await queue.submit(3) == 6
    assert answers[0] == 0
    assert [type(answer) for answer in answers[1:]] == [CommitUnknown] * len(numbers)
    assert ledger.runs == [[0], numbers, numbers, [3]]


@pytest.mark.parametrize(("number", "end", "kind"), [(POISON, "", StoreRefused), (1, "bug", ZeroDivisionError)])
async def test_a_request_that_fails_for_good_is_answered_once_and_the_next_one_runs(
    number: int, end: str, kind: type[Exception]
) -> None:
    ledger = Ledger(*[end] if end else [])
    async with running_queue(ledger) as queue:
        with pytest.raises(kind):
            await queue.submit(number)
        assert await queue.submit(2) == 4
    assert ledger.runs == [[number], [2]]
    assert ledger.committed == [2]
    assert [connection.closed for connection in ledger.connections] == [True, True]


async def test_a_failed_batch_ends_in_time_though_each_connection_to_the_store_takes_long() -> None:
    ledger = Ledger("committed", "bug")
    async with running_queue(ledger, max_batch=100, timeout_seconds=0.5) as queue:
        tasks = await submit_behind_a_batch(ledger, queue, 0, *range(1, 51))
        ledger.connect_seconds, ledger.connect_failures = 0.2, 10**6
        ledger.gate.set()
        answers = await gather_errors(tasks)
        assert [type(answer) for answer in answers[1:]] == [StoreUnavailable] * 50
        async with asyncio.timeout(2):
            await until(lambda: len(queue) == 0)
        ledger.connect_seconds = 0.0


def frames_of(error: BaseException) -> set[str]:
    """The functions that the tracebacks of an error and of its causes lead to."""
    tracebacks = [each for each in (error, error.__cause__, error.__context__) if each is not None]
    found = {frame.f_code.co_name for each in tracebacks for frame, _ in traceback.walk_tb(each.__traceback__)}
    return found | (frames_of(error.__cause__) if error.__cause__ is not None else set())


@pytest.mark.parametrize(("number", "ends"), [(POISON, []), (1, ["cut before"] * 10_000)])
async def test_an_error_of_the_store_does_not_lead_to_the_variables_of_the_batch(number: int, ends: list[str]) -> None:
    # They hold the keys of the batch in clear.
    ledger = Ledger(*ends)
    async with running_queue(ledger, timeout_seconds=0.3) as queue:
        with pytest.raises((StoreRefused, StoreUnavailable)) as caught:
            await queue.submit(number)
    assert isinstance(caught.value.__cause__, Exception)
    assert frames_of(caught.value).isdisjoint({"run", "_transaction", "commit"})


async def test_each_caller_of_a_failed_batch_gets_an_error_of_its_own() -> None:
    ledger = Ledger()
    ledger.connect_failures = 10**6
    async with running_queue(ledger, timeout_seconds=0.3) as queue:
        errors = await gather_errors(submit(queue, 1, 2, 3))
    assert [str(error) for error in errors] == [str(errors[0])] * 3
    assert len({id(error) for error in errors}) == 3


# --- a connection that breaks


async def test_a_commit_that_was_cut_before_it_happened_is_run_again_on_a_new_connection() -> None:
    ledger = Ledger("cut before")
    async with running_queue(ledger) as queue:
        assert await queue.submit(1) == 2
    assert ledger.runs == [[1], [1]]
    assert ledger.committed == [1]
    assert len(ledger.connections) == 2
    assert ledger.connections[0].closed


async def test_a_commit_that_was_cut_after_it_happened_is_answered_and_not_run_again() -> None:
    ledger = Ledger("cut after")
    async with running_queue(ledger) as queue:
        assert await queue.submit(1) == 2
    assert ledger.runs == [[1]]
    assert ledger.committed == [1]


async def test_a_commit_is_looked_up_until_the_store_can_say() -> None:
    ledger = Ledger("cut after", "cut while asking", "cut while asking")
    async with running_queue(ledger) as queue:
        assert await queue.submit(1) == 2
    assert ledger.runs == [[1]]
    assert len(ledger.connections) == 4


async def test_a_second_interrupted_commit_is_looked_up_too() -> None:
    ledger = Ledger("cut before", "cut after")
    async with running_queue(ledger) as queue:
        assert await queue.submit(1) == 2
    assert ledger.runs == [[1], [1]]
    assert ledger.committed == [1]


async def test_a_deadlock_is_rolled_back_and_tried_again_on_the_same_connection() -> None:
    ledger = Ledger("deadlock", "deadlock")
    async with running_queue(ledger) as queue:
        assert await queue.submit(1) == 2
    assert ledger.runs == [[1]] * 3
    assert ledger.committed == [1]
    assert [connection.rolled_back for connection in ledger.connections] == [2]


async def test_deadlocks_without_end_are_given_up_in_time() -> None:
    ledger = Ledger(*["deadlock"] * 10_000)
    async with running_queue(ledger, timeout_seconds=0.3) as queue:
        started = time.monotonic()
        with pytest.raises(StoreUnavailable):
            await queue.submit(1)
        assert time.monotonic() - started < 2
        ledger.ends.clear()
        assert await queue.submit(2) == 4
    assert ledger.committed == [2]


async def test_a_store_that_is_away_for_a_moment_costs_a_wait_and_no_answer() -> None:
    ledger = Ledger()
    ledger.connect_failures = 3
    async with running_queue(ledger) as queue:
        assert await gather_errors(submit(queue, 1, 2, 3)) == [2, 4, 6]


async def test_a_store_that_stays_away_is_reported_in_time_and_found_again_later() -> None:
    ledger = Ledger()
    ledger.connect_failures = 10**6
    async with running_queue(ledger, timeout_seconds=0.5) as queue:
        started = time.monotonic()
        with pytest.raises(StoreUnavailable):
            await queue.submit(1)
        assert time.monotonic() - started < 2
        # Nobody waits any more, so nothing may be committed in anybody's name later.
        await until(lambda: len(queue) == 0)
        ledger.connect_failures = 0
        assert await queue.submit(2) == 4
    assert ledger.runs == [[2]]


async def test_a_long_row_of_batches_that_need_no_statement_is_answered() -> None:
    ledger = Ledger()
    async with running_queue(ledger, max_batch=1, max_queue=5000) as queue:
        tasks = await submit_behind_a_batch(ledger, queue, 1, *[NOTHING_TO_DO] * 1000)
        ledger.gate.set()
        assert await gather_errors(tasks) == [2] + [2 * NOTHING_TO_DO] * 1000


# --- the end


async def test_closing_finishes_the_batch_that_commits_and_refuses_those_who_wait() -> None:
    ledger = Ledger()
    queue = make_queue(ledger)
    tasks = await submit_behind_a_batch(ledger, queue, 1, 2)
    closing = asyncio.create_task(queue.close())
    await asyncio.sleep(0.02)
    with pytest.raises(StoreUnavailable):
        await queue.submit(3)
    ledger.gate.set()
    answers = await gather_errors(tasks)
    await closing
    assert answers[0] == 2
    assert isinstance(answers[1], StoreUnavailable)
    assert ledger.connections[0].closed
