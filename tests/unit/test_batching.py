"""Facts about group commit: how batches form, who is refused, and what an interrupted commit leads to.

The lane's seams are the batch and the line: the batches here are small real ones that commit into a ``Ledger`` in
memory, and the lines answer when the ledger's gate is open. The store itself comes in with
``tests/integration/test_key_store.py``, the real line with ``test_store_line.py``.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest
from pymysql.connections import Connection

from skipbus.services.api.awake import Awake
from skipbus.services.api.batching import Lane
from skipbus.shared.errors import (
    CommitUnknown,
    KeyNotAvailable,
    Overloaded,
    SkipbusError,
    StoreRefused,
    StoreUnavailable,
)
from skipbus.shared.store.line import Told
from skipbus.shared.store.steps import Statement, Steps

# A batch of this alone needs no statement.
FREE = 1_000_000


class FakeConnection:
    """Stands where a connection would; notes that it was closed."""

    def __init__(self) -> None:
        self.closed = False

    def close(self) -> None:
        self.closed = True


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

    def connect(self) -> Connection[Any]:
        if self.connect_failures:
            self.connect_failures -= 1
            raise StoreUnavailable("cannot connect")
        self.connections.append(FakeConnection())
        return cast("Connection[Any]", self.connections[-1])

    def line(self, connection: Connection[Any], loop: asyncio.AbstractEventLoop) -> FakeLine:
        return FakeLine(self, cast("FakeConnection", connection), loop)


class FakeLine:
    """Answers each statement with nothing, once the ledger's gate is open."""

    def __init__(self, ledger: Ledger, connection: FakeConnection, loop: asyncio.AbstractEventLoop) -> None:
        self.open = True
        self._ledger = ledger
        self._connection = connection
        self._loop = loop
        self._waiting: asyncio.Task[None] | None = None

    def send(self, _statement: Statement, told: Told) -> None:
        assert not self._connection.closed
        assert self._waiting is None, "one statement at a time"
        self._ledger.running.set()
        self._waiting = self._loop.create_task(self._answer(told))

    def check(self, now: float) -> None:
        assert now > 0

    def close(self) -> None:
        self.open = False
        self._connection.close()

    async def _answer(self, told: Told) -> None:
        while not self._ledger.gate.is_set():  # noqa: ASYNC110 (the gate is for threads too)
            await asyncio.sleep(0.001)
        self._waiting = None
        told((), None)


class DoublingBatch:
    """Answers each number with its double, once it is committed; refuses negative ones."""

    def __init__(self, ledger: Ledger, requests: Sequence[int]) -> None:
        self._ledger = ledger
        self._requests = list(requests)

    def run(self) -> Steps[Sequence[int | SkipbusError]]:
        self._ledger.threads.add(threading.current_thread().name)
        self._ledger.runs.append(self._requests)
        if self._requests == [FREE]:
            return self._answers()
        yield Statement("COMMIT")
        self._end()
        return self._answers()

    def committed(self) -> Steps[Sequence[int | SkipbusError] | None]:
        yield Statement("SELECT")
        if self._ledger.ends and self._ledger.ends[0] == "cut while asking":
            self._ledger.ends.pop(0)
            raise StoreUnavailable("lost again")
        return self._answers() if set(self._requests) <= set(self._ledger.committed) else None

    def _end(self) -> None:
        end = self._ledger.ends.pop(0) if self._ledger.ends else "committed"
        if end == "deadlock":
            raise StoreUnavailable("deadlock")
        if end == "refused":
            raise StoreRefused("syntax")
        if end == "bug":
            raise ZeroDivisionError
        if end != "cut before":
            self._ledger.committed += self._requests
        if end.startswith("cut"):
            raise CommitUnknown("lost")

    def _answers(self) -> Sequence[int | SkipbusError]:
        refused = KeyNotAvailable("negative", parameter="keyId")
        return [refused if n < 0 else 2 * n for n in self._requests]


@asynccontextmanager
async def running_lane(
    ledger: Ledger,
    *,
    max_batch: int = 4,
    max_queue: int = 100,
    timeout_seconds: float = 5.0,
    observe: Callable[[int, float], None] | None = None,
) -> AsyncIterator[Lane[int, int]]:
    def make_batch(requests: Sequence[int]) -> DoublingBatch:
        return DoublingBatch(ledger, requests)

    lane: Lane[int, int] = Lane(
        "test lane",
        make_batch,
        ledger.connect,
        max_batch=max_batch,
        max_queue=max_queue,
        timeout_seconds=timeout_seconds,
        observe=observe or unobserved,
        make_line=ledger.line,
    )
    try:
        yield lane
    finally:
        ledger.gate.set()
        ledger.connect_failures = 0
        await lane.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 (what is waited for happens in a thread)
            await asyncio.sleep(0.001)


async def gather_errors(tasks: Sequence[asyncio.Task[int]]) -> list[int | BaseException]:
    async with asyncio.timeout(10):
        return await asyncio.gather(*tasks, return_exceptions=True)


def unobserved(_size: int, _seconds: float) -> None:
    """For the lanes whose measures no test looks at."""


def submit(lane: Lane[int, int], *numbers: int) -> list[asyncio.Task[int]]:
    return [asyncio.create_task(lane.submit(number)) for number in numbers]


# --- how batches form


async def test_a_single_request_is_a_batch_of_its_own_at_once() -> None:
    ledger = Ledger()
    async with running_lane(ledger) as lane:
        assert await lane.submit(21) == 42
    assert ledger.runs == [[21]]


async def test_requests_gather_while_a_batch_runs_and_go_together_next() -> None:
    ledger = Ledger()
    async with running_lane(ledger) as lane:
        ledger.gate.clear()
        tasks = submit(lane, 1)
        await until(ledger.running.is_set)
        tasks += submit(lane, 2, 3, 4)
        await until(lambda: len(lane) == 4)
        ledger.gate.set()
        assert await gather_errors(tasks) == [2, 4, 6, 8]
    assert ledger.runs == [[1], [2, 3, 4]]


async def test_the_process_stays_awake_while_one_caller_alone_waits_and_for_no_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[str] = []
    monkeypatch.setattr(Awake, "begin", lambda _self: told.append("begin"))
    monkeypatch.setattr(Awake, "end", lambda _self: told.append("end"))
    ledger = Ledger()
    async with running_lane(ledger) as lane:
        lane.stay_awake()
        assert await lane.submit(1) == 2
        assert told[-2:] == ["begin", "end"]
        ledger.gate.clear()
        tasks = submit(lane, 2)
        await until(ledger.running.is_set)
        tasks += submit(lane, 3, 4)
        await until(lambda: len(lane) == 3)
        ledger.gate.set()
        assert await gather_errors(tasks) == [4, 6, 8]
    assert ledger.runs == [[1], [2], [3, 4]]
    assert told.count("begin") == 2
    assert told[-1] == "end"


async def test_no_batch_is_greater_than_allowed_and_the_order_is_kept() -> None:
    ledger = Ledger()
    async with running_lane(ledger, max_batch=4) as lane:
        assert await gather_errors(submit(lane, *range(11))) == [2 * n for n in range(11)]
    assert [n for run in ledger.runs for n in run] == list(range(11))
    assert max(len(run) for run in ledger.runs) == 4


async def test_all_batches_run_on_the_event_loop_one_at_a_time_on_one_connection() -> None:
    ledger = Ledger()
    async with running_lane(ledger) as lane:
        await gather_errors(submit(lane, *range(50)))
    assert ledger.threads == {threading.current_thread().name}
    assert len(ledger.connections) == 1


async def test_a_caller_who_has_gone_takes_no_room_in_a_batch() -> None:
    ledger = Ledger()
    async with running_lane(ledger) as lane:
        ledger.gate.clear()
        first = submit(lane, 1)
        await until(ledger.running.is_set)
        gone, kept = submit(lane, 2, 3)
        await until(lambda: len(lane) == 3)
        gone.cancel()
        await asyncio.sleep(0)
        ledger.gate.set()
        assert await gather_errors([*first, kept]) == [2, 6]
    assert ledger.runs == [[1], [3]]


async def test_a_caller_who_goes_while_its_batch_runs_stops_nobody_else() -> None:
    ledger = Ledger()
    async with running_lane(ledger) as lane:
        ledger.gate.clear()
        ledger.runs.clear()
        (gone,) = submit(lane, 1)
        await until(ledger.running.is_set)
        gone.cancel()
        (kept,) = submit(lane, 2)
        await asyncio.sleep(0)
        ledger.gate.set()
        assert await gather_errors([kept]) == [4]
    assert ledger.committed == [1, 2]


async def test_a_batch_tells_its_size_and_its_duration() -> None:
    ledger = Ledger()
    seen: list[tuple[int, float]] = []
    async with running_lane(ledger, observe=lambda *told: seen.append(told)) as lane:
        await lane.submit(1)
    assert [size for size, _ in seen] == [1]
    assert 0 <= seen[0][1] < 5


# --- who is refused


async def test_a_full_queue_refuses_at_once_and_those_who_wait_still_get_their_answers() -> None:
    ledger = Ledger()
    async with running_lane(ledger, max_queue=3) as lane:
        ledger.gate.clear()
        tasks = submit(lane, 0)
        await until(ledger.running.is_set)
        tasks += submit(lane, 1, 2, 3)
        await until(lambda: len(lane) == 4)
        started = time.monotonic()
        with pytest.raises(Overloaded):
            await lane.submit(4)
        assert time.monotonic() - started < 0.5
        ledger.gate.set()
        assert await gather_errors(tasks) == [0, 2, 4, 6]
        assert await lane.submit(5) == 10


async def test_nobody_waits_longer_than_the_timeout_though_the_batch_hangs() -> None:
    ledger = Ledger()
    async with running_lane(ledger, timeout_seconds=0.3) as lane:
        ledger.gate.clear()
        started = time.monotonic()
        tasks = submit(lane, 1)
        await until(ledger.running.is_set)
        tasks += submit(lane, 2, 3)  # one batch hangs, these wait behind it
        answers = await gather_errors(tasks)
        assert [type(answer) for answer in answers] == [StoreUnavailable] * 3
        assert 0.2 < time.monotonic() - started < 2
        ledger.gate.set()
        # What was sent cannot be taken back; those who gave up before their turn are not worked for.
        assert await lane.submit(4) == 8
    assert ledger.runs == [[1], [4]]


async def test_one_refused_request_of_a_batch_leaves_the_others_theirs() -> None:
    ledger = Ledger()
    async with running_lane(ledger) as lane:
        ledger.gate.clear()
        tasks = submit(lane, 0)
        await until(ledger.running.is_set)
        tasks += submit(lane, 1, -1, 2)
        await until(lambda: len(lane) == 4)
        ledger.gate.set()
        answers = await gather_errors(tasks)
    assert answers[:2] == [0, 2]
    assert isinstance(answers[2], KeyNotAvailable)
    assert answers[3] == 4


@pytest.mark.parametrize(("end", "kind"), [("refused", StoreRefused), ("bug", ZeroDivisionError)])
async def test_a_batch_that_fails_for_good_tells_its_callers_once_and_the_next_one_runs(
    end: str, kind: type[Exception]
) -> None:
    ledger = Ledger(end)
    async with running_lane(ledger) as lane:
        with pytest.raises(kind):
            await lane.submit(1)
        assert await lane.submit(2) == 4
    assert ledger.runs == [[1], [2]]
    assert [connection.closed for connection in ledger.connections] == [True, True]


# --- a connection that breaks


async def test_a_commit_that_was_cut_before_it_happened_is_run_again_on_a_new_connection() -> None:
    ledger = Ledger("cut before")
    async with running_lane(ledger) as lane:
        assert await lane.submit(1) == 2
    assert ledger.runs == [[1], [1]]
    assert ledger.committed == [1]
    assert len(ledger.connections) == 2
    assert ledger.connections[0].closed


async def test_a_commit_that_was_cut_after_it_happened_is_answered_and_not_run_again() -> None:
    ledger = Ledger("cut after")
    async with running_lane(ledger) as lane:
        assert await lane.submit(1) == 2
    assert ledger.runs == [[1]]
    assert ledger.committed == [1]


async def test_a_commit_is_asked_after_until_the_store_can_say() -> None:
    ledger = Ledger("cut after", "cut while asking", "cut while asking")
    async with running_lane(ledger) as lane:
        assert await lane.submit(1) == 2
    assert ledger.runs == [[1]]
    assert len(ledger.connections) == 4


async def test_a_second_interrupted_commit_is_asked_after_too() -> None:
    ledger = Ledger("cut before", "cut after")
    async with running_lane(ledger) as lane:
        assert await lane.submit(1) == 2
    assert ledger.runs == [[1], [1]]
    assert ledger.committed == [1]


async def test_a_deadlock_is_tried_again() -> None:
    ledger = Ledger("deadlock", "deadlock")
    async with running_lane(ledger) as lane:
        assert await lane.submit(1) == 2
    assert ledger.runs == [[1]] * 3


async def test_a_store_that_is_away_for_a_moment_costs_a_wait_and_no_answer() -> None:
    ledger = Ledger()
    ledger.connect_failures = 3
    async with running_lane(ledger) as lane:
        assert await gather_errors(submit(lane, 1, 2, 3)) == [2, 4, 6]


async def test_a_store_that_stays_away_is_told_in_time_and_found_again_later() -> None:
    ledger = Ledger()
    ledger.connect_failures = 10**6
    async with running_lane(ledger, timeout_seconds=0.5) as lane:
        started = time.monotonic()
        with pytest.raises(StoreUnavailable):
            await lane.submit(1)
        assert time.monotonic() - started < 2
        # Nobody waits any more, so nothing may be committed in anybody's name later.
        await until(lambda: len(lane) == 0)
        ledger.connect_failures = 0
        assert await lane.submit(2) == 4
    assert ledger.runs == [[2]]


async def test_a_connection_that_ended_while_nothing_was_asked_is_replaced_and_costs_no_try() -> None:
    ledger = Ledger()
    async with running_lane(ledger) as lane:
        assert await lane.submit(1) == 2
        assert lane._line is not None
        lane._line.close()
        assert await lane.submit(2) == 4
    assert ledger.runs == [[1], [2]]
    assert len(ledger.connections) == 2


async def test_a_long_row_of_batches_that_need_no_statement_does_not_pile_up_calls() -> None:
    ledger = Ledger()
    async with running_lane(ledger, max_batch=1, max_queue=5000) as lane:
        ledger.gate.clear()
        tasks = submit(lane, 1)
        await until(ledger.running.is_set)
        tasks += submit(lane, *[FREE] * 3000)
        await until(lambda: len(lane) == 3001)
        ledger.gate.set()
        assert await gather_errors(tasks) == [2] + [2 * FREE] * 3000


async def test_a_line_that_breaks_its_word_fails_its_batch_and_not_the_lane(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_line: FakeLine, _statement: Statement, _told: Told) -> None:
        raise ZeroDivisionError

    ledger = Ledger()
    async with running_lane(ledger) as lane:
        with monkeypatch.context() as patched:
            patched.setattr(FakeLine, "send", broken)
            with pytest.raises(ZeroDivisionError):
                await lane.submit(1)
        assert await lane.submit(2) == 4
    assert [connection.closed for connection in ledger.connections] == [True, True]


# --- the end


async def test_closing_finishes_the_batch_that_runs_and_tells_those_who_wait() -> None:
    ledger = Ledger()
    async with running_lane(ledger) as lane:
        ledger.gate.clear()
        tasks = submit(lane, 1)
        await until(ledger.running.is_set)
        tasks += submit(lane, 2)
        await until(lambda: len(lane) == 2)
        closing = asyncio.create_task(lane.close())
        await asyncio.sleep(0.02)
        ledger.gate.set()
        await closing
        answers = await gather_errors(tasks)
    assert answers[0] == 2
    assert isinstance(answers[1], StoreUnavailable)
    assert ledger.connections[0].closed
