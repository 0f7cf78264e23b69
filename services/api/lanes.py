"""Makes the lanes of an api process: what all of them have from the settings, in one place."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from typing import TypeVar

from pymysql.connections import Connection

from skipbus.services.api.batching import Batch, Lane
from skipbus.services.api.metrics import batch_observer
from skipbus.services.api.workers import together
from skipbus.shared.settings import MySqlSettings, Settings
from skipbus.shared.store.commands import prepare
from skipbus.shared.store.engine import connect
from skipbus.shared.store.line import StoreLine

Request = TypeVar("Request")
Answer = TypeVar("Answer")


class _Connector:
    """Makes the connections of one lane, one after another."""

    def __init__(self, mysql: MySqlSettings, statements: Sequence[str]) -> None:
        self._mysql = mysql
        self._statements = statements
        self._statement_ids: dict[str, int] = {}

    def connect(self) -> Connection:
        """A connection with the statements prepared. Blocks. Raises StoreUnavailable or StoreRefused."""
        connection = connect(self._mysql, several_statements=True)
        self._statement_ids = prepare(connection, self._statements)
        return connection

    def make_line(self, connection: Connection, loop: asyncio.AbstractEventLoop) -> StoreLine:
        """The line over the connection that was made last."""
        return StoreLine(connection, loop, self._statement_ids)


def make_lane(
    settings: Settings,
    name: str,
    make_batch: Callable[[Sequence[Request]], Batch[Answer]],
    *,
    max_batch: int | None = None,
    max_queue: int | None = None,
    prepared: Sequence[str] = (),
) -> Lane[Request, Answer]:
    """A lane with a connection of its own; ``name`` is its metrics' label, None stands for the settings' bound.

    ``prepared`` are statements that its connections prepare.
    """
    connector = _Connector(settings.mysql, prepared)
    lane = Lane(
        name,
        make_batch,
        connector.connect,
        max_batch=settings.max_batch if max_batch is None else max_batch,
        max_queue=settings.max_queue if max_queue is None else max_queue,
        timeout_seconds=settings.request_timeout_seconds,
        observe=batch_observer(name),
        make_line=connector.make_line,
    )
    if spares_a_processor():
        lane.stay_awake()
    return lane


def spares_a_processor() -> bool:
    """Whether the workers of this api leave one for the store. Of other apis on the host nothing is known."""
    return together() < _processors()


def _processors() -> int:
    """How many this process may use; the store needs one of them while it works."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
