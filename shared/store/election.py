"""One of several: a named MySQL lock, held by a connection of its own for as long as that lives.

The lock goes with its connection, so a process that dies or is cut off gives it up without anybody's help.
The holder must ask ``held`` before each piece of work that two must not do at once. What is done
under it is safe to do twice all the same: the lock saves work, it does not carry a guarantee.
"""

from __future__ import annotations

import contextlib
import hashlib

from pymysql.connections import Connection

from skipbus.shared.errors import BackendError
from skipbus.shared.settings import MySqlSettings
from skipbus.shared.store.engine import connect, driver_errors


class Election:
    """Blocking; meant for one thread. ``name`` may have any length, the server's limit is 64."""

    def __init__(self, mysql: MySqlSettings, name: str) -> None:
        self._mysql = mysql
        # Lock names are the whole server's: the database's name keeps two stores on one server apart.
        digest = hashlib.sha384(f"{mysql.database}\0{name}".encode()).hexdigest()
        self._lock = f"skipbus:{digest[:48]}"
        self._connection: Connection | None = None

    def acquire(self) -> bool:
        """Tries once, without waiting. Raises StoreUnavailable or StoreRefused."""
        if self._connection is None:
            self._connection = connect(self._mysql)
        try:
            return self._ask("SELECT GET_LOCK(%s, 0)") == 1
        except BackendError:
            self._drop()
            raise

    def held(self) -> bool:
        """Whether the lock is still ours; False too when the store cannot be asked."""
        if self._connection is None:
            return False
        try:
            return self._ask("SELECT IS_USED_LOCK(%s) = CONNECTION_ID()") == 1
        except BackendError:
            self._drop()
            return False

    def release(self) -> None:
        """Gives the lock up, by closing its connection."""
        self._drop()

    def _ask(self, question: str) -> object:
        if self._connection is None:
            return None
        with driver_errors(), self._connection.cursor() as cursor:
            cursor.execute(question, (self._lock,))
            row = cursor.fetchone()
            return row[0] if row else None

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(Exception):  # the server frees the lock when the socket closes
                connection.close()
