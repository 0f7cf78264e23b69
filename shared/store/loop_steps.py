"""Steps for a caller on the event loop, without a change of thread: ``StepsRunner`` for one that must not block.

Only connecting, and steps that are functions, go to a thread. Whatever goes wrong ends the connection, and the next
steps get a new one; what was half done ends with it. Where the server has only refused a statement, a rollback does
that.
"""

from __future__ import annotations

import asyncio
from typing import TypeVar

from skipbus.shared.errors import BackendError, StoreRefused
from skipbus.shared.settings import MySqlSettings
from skipbus.shared.store.engine import STATEMENT_TIMEOUT_SECONDS, connect
from skipbus.shared.store.line import StoreLine
from skipbus.shared.store.results import Rows
from skipbus.shared.store.steps import Statement, Step, Steps

Outcome = TypeVar("Outcome")
_ROLLBACK = Statement("ROLLBACK")


class LoopSteps:
    """Of one event loop, for one task at a time. Its connection takes several statements in a packet."""

    def __init__(self, mysql: MySqlSettings) -> None:
        self._mysql = mysql
        self._line: StoreLine | None = None

    async def run(self, steps: Steps[Outcome]) -> Outcome:
        """The outcome of the steps. Raises StoreUnavailable, StoreRefused, and what they raise themselves."""
        try:
            line = await self._opened()
            return await _drive(line, steps)
        except StoreRefused:
            await self._roll_back()
            raise
        except BaseException:
            self.close()
            raise

    async def _roll_back(self) -> None:
        try:
            if self._line is not None:
                await _do(self._line, _ROLLBACK)
        except BaseException as error:
            self.close()
            if not isinstance(error, BackendError):
                raise

    async def _opened(self) -> StoreLine:
        if self._line is None or not self._line.open:
            connection = await asyncio.to_thread(connect, self._mysql, several_statements=True)
            self._line = StoreLine(connection, asyncio.get_running_loop(), outlives_refusals=True)
        return self._line

    def close(self) -> None:
        """Gives its connection back."""
        line, self._line = self._line, None
        if line is not None:
            line.close()


async def _drive(line: StoreLine, steps: Steps[Outcome]) -> Outcome:
    try:
        step = next(steps)
        while True:
            try:
                rows = await _do(line, step)
            except Exception as error:  # noqa: BLE001 -- whatever it is, the steps decide
                step = steps.throw(error)
            else:
                step = steps.send(rows)
    except StopIteration as end:
        outcome: Outcome = end.value
        return outcome


async def _do(line: StoreLine, step: Step) -> Rows:
    if not isinstance(step, Statement):
        await asyncio.to_thread(step)
        return ()
    loop = asyncio.get_running_loop()
    answered: asyncio.Future[Rows] = loop.create_future()

    def told(rows: Rows, error: BaseException | None) -> None:
        if answered.done():
            return  # whoever waited has been cancelled
        if error is None:
            answered.set_result(rows)
        else:
            answered.set_exception(error)

    line.send(step, told)
    if answered.done():
        return answered.result()
    late = loop.call_later(STATEMENT_TIMEOUT_SECONDS, lambda: line.check(loop.time() + 1.0))
    try:
        return await answered
    finally:
        late.cancel()
