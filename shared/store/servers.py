"""The servers of a store, and connections to them by PyMySQL.

Rules: the servers are tried in their order, beginning with the one that answered last, so a process stays with a server
until that fails. A connection that is idle is kept alive, so that no firewall on its way forgets it, and one that is
broken without a word is found within seconds. On a cluster every statement sees what any node has committed before it.
"""

from __future__ import annotations

import select
import socket
from functools import lru_cache
from typing import Any

import pymysql
from pymysql.connections import Connection
from pymysql.constants import ER
from pymysql.cursors import Cursor

from skipbus.shared.errors import StoreRefused
from skipbus.shared.settings import MySqlSettings
from skipbus.shared.settings.values import address_text

CONNECT_TIMEOUT_SECONDS = 3
STATEMENT_TIMEOUT_SECONDS = 10
LOCK_WAIT_SECONDS = 3
# A server that does not acknowledge what was sent for so long is away, although the connection has not been closed.
SILENCE_SECONDS = 2.5
# Galera's error for statements while a node is not part of its cluster.
NODE_NOT_READY = 1047
_KEEPALIVE = {socket.TCP_KEEPIDLE: 10, socket.TCP_KEEPINTVL: 2, socket.TCP_KEEPCNT: 2}

_SESSION = (
    "SET SESSION time_zone = '+00:00', sql_mode = 'STRICT_ALL_TABLES,NO_ENGINE_SUBSTITUTION', "
    f"innodb_lock_wait_timeout = {LOCK_WAIT_SECONDS}"
)
_ISOLATION = "SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED"
_CLUSTER_VARIABLES = "SHOW VARIABLES WHERE Variable_name IN ('wsrep_on', 'group_replication_consistency')"
# Reads, updates, deletes and inserts wait until the node has applied what the cluster had committed before.
_GALERA_CAUSAL = "SET SESSION wsrep_sync_wait = 7"
_GROUP_CAUSAL = "SET SESSION group_replication_consistency = 'BEFORE'"
_GALERA_READY = "SHOW STATUS LIKE 'wsrep_ready'"


class Servers:
    """One store's servers, for all connections of this process."""

    def __init__(self, settings: MySqlSettings) -> None:
        self._settings = settings
        self._addresses = settings.addresses
        self._current = 0

    @property
    def current(self) -> str:
        """The server that answered last, or is tried first."""
        return address_text(*self._addresses[self._current])

    def connect(self) -> Connection[Any]:
        """A connection to the first server that serves. Raises the last server's pymysql.MySQLError or OSError."""
        first, count = self._current, len(self._addresses)
        failures: list[Exception] = []
        for number in (*range(first, count), *range(first)):
            try:
                connection = self._connect_to(*self._addresses[number])
            except (pymysql.MySQLError, OSError) as error:
                failures.append(error)
                continue
            self._current = number
            return connection
        raise failures[-1]

    def _connect_to(self, host: str, port: int) -> Connection[Any]:
        connection = Connection(
            host=host,
            port=port,
            user=self._settings.user,
            # Its file is read each time, because an operator may change the account's password at any time.
            password=self._settings.password.current().reveal(),
            database=self._settings.database,
            charset="utf8mb4",
            autocommit=False,
            read_timeout=STATEMENT_TIMEOUT_SECONDS,
            write_timeout=STATEMENT_TIMEOUT_SECONDS,
            init_command=_SESSION,
            defer_connect=True,
        )
        try:
            connection.connect(_open_socket(host, port))
            with connection.cursor() as cursor:
                _set_up(cursor)
                if len(self._addresses) > 1:
                    _check_writable(cursor)
        except RuntimeError as error:
            raise StoreRefused(
                f"the store's account {self._settings.user} logs in by a plugin that needs a Python package ({error}): "
                "let it log in by mysql_native_password (MariaDB) or caching_sha2_password (MySQL)"
            ) from error
        except BaseException:
            if connection.open:
                connection.close()
            raise
        return connection


@lru_cache(maxsize=16)
def servers_of(settings: MySqlSettings) -> Servers:
    """The one object for all connections of this process to that store."""
    return Servers(settings)


def _open_socket(host: str, port: int) -> socket.socket:
    """PyMySQL has no parameter for what it needs here, but takes a connected socket."""
    made = socket.create_connection((host, port), timeout=CONNECT_TIMEOUT_SECONDS)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE.items():
        made.setsockopt(socket.IPPROTO_TCP, option, value)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(SILENCE_SECONDS * 1000))
    _wait_greeting(made)
    return made


def _wait_greeting(made: socket.socket) -> None:
    """The server speaks first. One that is frozen has a kernel that accepts connections for it."""
    greeted = select.poll()
    greeted.register(made, select.POLLIN)
    if not greeted.poll(CONNECT_TIMEOUT_SECONDS * 1000):
        made.close()
        raise TimeoutError("the server accepts connections and says nothing")


def _set_up(cursor: Cursor) -> None:
    cursor.execute(_ISOLATION)
    cursor.execute(_CLUSTER_VARIABLES)
    variables = dict(cursor.fetchall())
    if variables.get("wsrep_on") == "ON":
        cursor.execute(_GALERA_READY)
        if cursor.fetchall() != (("wsrep_ready", "ON"),):
            raise pymysql.OperationalError(NODE_NOT_READY, "this node is not part of its cluster now")
        cursor.execute(_GALERA_CAUSAL)
    if "group_replication_consistency" in variables:
        cursor.execute(_GROUP_CAUSAL)


def _check_writable(cursor: Cursor) -> None:
    """Of several servers, one that only reads is a replica or no longer the primary."""
    cursor.execute("SELECT @@GLOBAL.read_only")
    if cursor.fetchone() != (0,):
        raise pymysql.OperationalError(ER.OPTION_PREVENTS_STATEMENT, "this server is read-only")
