"""Looks at the store: several questions in one packet, on a connection that never has a transaction open.

For what a process reads each second though nothing has happened. There is no commit to wait for, no lock and no view of
the past that the server would have to keep, and nothing is written. What comes back may be of different moments, a
millisecond apart. The questions themselves are in ``shared.store.glances``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TypeVar

from pymysql.connections import Connection

from shared.config import MySqlSettings
from shared.database import connect, driver_errors

T = TypeVar("T")


class Glance:
    """A connection of its own, made when it is first needed and anew after any error. For one thread at a time."""

    def __init__(self, mysql: MySqlSettings) -> None:
        self._mysql = mysql
        self._connection: Connection | None = None

    def read(self, look: Callable[[Connection], T]) -> T:
        """What ``look`` reads. Raises StoreUnavailable, StoreRefused."""
        try:
            with driver_errors():
                return look(self._opened())
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Gives the connection back."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(Exception):  # a broken connection may refuse to be closed politely
                connection.close()

    def _opened(self) -> Connection:
        if self._connection is None:
            connection = connect(self._mysql, several_statements=True)
            connection.autocommit(True)
            self._connection = connection
        return self._connection
