"""Two tables of key records, one with few and one with many live keys, that take turns before the key providers."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pymysql

from bench.stage import Stage


class Filling:
    """One table. Half of its live keys wait at either KP."""

    def __init__(
        self, stage: Stage, connection: pymysql.connections.Connection[Any], name: str, live_keys: int
    ) -> None:
        self.live_keys = live_keys
        self.table = f"key_records_{name}"
        self._stage = stage
        self._connection = connection
        self._waiting: list[str] = []
        self._execute(f"CREATE TABLE {self.table} LIKE key_records")

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Within the block this is the table that the key providers use. The one that was there is set aside, empty."""
        self._execute(f"RENAME TABLE key_records TO key_records_aside, {self.table} TO key_records")
        try:
            yield
        finally:
            self._execute(f"RENAME TABLE key_records TO {self.table}, key_records_aside TO key_records")

    def refill(self) -> None:
        """As many live keys as it should have, whatever is in it."""
        with self.shown():
            self._execute("TRUNCATE TABLE key_records")
            self._stage.fill(self._stage.alice, self._stage.bob, self.live_keys // 2)
            self._waiting = self._stage.fill(self._stage.bob, self._stage.alice, self.live_keys // 2)

    def draw(self, turns: int, count: int) -> list[list[str]]:
        """For each turn `count` keyIds, at random, of those that wait at KP_Alice; as many more are put in before."""
        with self.shown():
            self._waiting += self._stage.fill(self._stage.bob, self._stage.alice, turns * count)
        random.shuffle(self._waiting)
        drawn = [self._waiting[turn * count :][:count] for turn in range(turns)]
        del self._waiting[: turns * count]
        return drawn

    def drop(self) -> None:
        self._execute(f"DROP TABLE {self.table}")

    def _execute(self, statement: str) -> None:
        with self._connection.cursor() as cursor:
            cursor.execute(statement)
