"""Looks at the store: several questions in one packet, on a connection that never has a transaction open.

For what a process reads each second though nothing has happened. There is no commit to wait for, no lock and no view of
the past that the server would have to keep, and nothing is written. What comes back may be of different moments, a
millisecond apart. The questions themselves are in ``skipbus.shared.store.glances``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from pymysql.connections import Connection

from skipbus.shared.settings import MySqlSettings
from skipbus.shared.store.engine import OwnConnection, driver_errors

T = TypeVar("T")


class Glance:
    """A connection of its own, made anew after any error. For one thread at a time."""

    def __init__(self, mysql: MySqlSettings) -> None:
        self._own = OwnConnection(mysql, autocommit=True)

    def read(self, look: Callable[[Connection], T]) -> T:
        """What ``look`` reads. Raises StoreUnavailable, StoreRefused."""
        try:
            with driver_errors():
                return look(self._own.opened())
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Gives the connection back."""
        self._own.close()
