"""Engines for the store, by PyMySQL and SQLAlchemy: MySQL >= 8.4 or MariaDB >= 10.11. How driver errors become ours.

``servers`` makes the connections: READ COMMITTED, because a claim must not lock gaps: two callers who race for one key
wait for that row and for nothing else. Knows no table.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import pymysql
from pymysql.connections import Connection
from pymysql.constants import CR, ER
from sqlalchemy import URL, ClauseElement, Engine, create_engine
from sqlalchemy.dialects.mysql import pymysql as pymysql_dialect
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.event import listens_for
from sqlalchemy.exc import DBAPIError, DisconnectionError, PendingRollbackError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.pool import NullPool

from skipbus.shared.errors import StoreConflict, StoreMisconfigured, StoreRefused, StoreUnavailable
from skipbus.shared.settings import MySqlSettings
from skipbus.shared.store.servers import NODE_NOT_READY, STATEMENT_TIMEOUT_SECONDS, servers_of

# Two transactions met, on one server or on two nodes of a cluster; the connection goes on.
CONFLICTS = frozenset(
    {
        ER.LOCK_WAIT_TIMEOUT,
        ER.LOCK_DEADLOCK,  # a Galera cluster refuses a commit with it as well
        ER.CHECKREAD,  # a row has changed since it was read
        ER.ERROR_DURING_COMMIT,
        3101,  # MySQL Group Replication: another member changed the same rows
    }
)

# Temporary: restart, too many connections, a full disk, failover.
RETRYABLE = frozenset(
    {
        0,  # PyMySQL's "(0, '')" for a connection that is closed already
        CR.CR_CONN_HOST_ERROR,
        CR.CR_SERVER_GONE_ERROR,
        CR.CR_SERVER_LOST,
        ER.CON_COUNT_ERROR,
        ER.SERVER_SHUTDOWN,
        ER.TOO_MANY_USER_CONNECTIONS,
        ER.DISK_FULL,
        ER.RECORD_FILE_FULL,  # "the table is full"
        ER.OPTION_PREVENTS_STATEMENT,  # read-only while a replica is promoted
        1927,  # MariaDB: connection was killed
        3024,  # MySQL: a statement was interrupted by its time limit
        1969,  # MariaDB: the same
        4031,  # MySQL: the server disconnected an idle client
        1317,  # query execution was interrupted
        NODE_NOT_READY,
        1836,  # MySQL: the server is read-only
        3100,  # MySQL Group Replication: this member cannot commit now
    }
)


# The connection is whole, but the server it leads to is no longer one to write to.
_UNFIT = frozenset({ER.OPTION_PREVENTS_STATEMENT, ER.SERVER_SHUTDOWN, NODE_NOT_READY, 1836})


_UNKNOWN = "a statement: look the code up in the MySQL manual, and check the server's disk and error log"
# What an operator can put right, by the server's error code.
_ADVICE: dict[int | None, str] = {
    ER.ACCESS_DENIED_ERROR: "the account: check MYSQL_USER and MYSQL_PASSWORD",
    ER.DBACCESS_DENIED_ERROR: "the account for this database: check its grants and MYSQL_DATABASE",
    ER.BAD_DB_ERROR: "an unknown database: check MYSQL_DATABASE",
    ER.TABLEACCESS_DENIED_ERROR: "a statement, because the account lacks a grant: run 'skipctl db provision'",
    ER.COLUMNACCESS_DENIED_ERROR: "a statement, because the account lacks a grant: run 'skipctl db provision'",
    ER.DISK_FULL: "a statement, because a disk of the database server is full",
    ER.RECORD_FILE_FULL: "a statement, because a table cannot grow: check the disk of the database server",
    ER.NO_SUCH_TABLE: "a statement on a missing table: run 'skipctl db status'",
}


def connect(settings: MySqlSettings) -> Connection[Any]:
    """A connection of one's own, autocommit off. Raises StoreUnavailable or StoreRefused."""
    with driver_errors():
        return servers_of(settings).connect()


def make_engine(settings: MySqlSettings, pool_size: int = 2, *, lean: bool = False) -> Engine:
    """A SQLAlchemy engine whose connections are set up as ``connect`` does it.

    ``lean`` spares two round trips for each transaction: a connection is not asked whether it still lives, and not
    rolled back once more after a commit. For callers who end every transaction and who try again after
    StoreUnavailable: the first one to meet a server that was away gets that, and all connections are made anew.
    """
    engine = create_engine(
        URL.create("mysql+pymysql", database=settings.database),
        creator=lambda: connect(settings),
        pool_size=pool_size,
        max_overflow=0,
        pool_timeout=STATEMENT_TIMEOUT_SECONDS,
        pool_pre_ping=not lean,
        pool_reset_on_return=None if lean else "rollback",
        hide_parameters=True,
    )
    listens_for(engine, "handle_error")(_leave_unfit_server)
    return engine


def make_queue_engine(settings: MySqlSettings) -> Engine:
    """An engine without a pool, for a user that keeps one connection and replaces it after an error."""
    return create_engine(
        URL.create("mysql+pymysql", database=settings.database),
        creator=lambda: connect(settings),
        poolclass=NullPool,
        hide_parameters=True,
    )


def driver_sql(statement: ClauseElement, columns: Collection[str] | None = None) -> str:
    """A Core statement's text, for ``exec_driver_sql``: compiled once, and its values bound by the driver, by name.

    For the statements of every key: to compile one, or only to look it up, takes as long as to execute it.
    ``columns`` are those that an INSERT has values for.
    """
    return str(statement.compile(dialect=pymysql_dialect.dialect(paramstyle="pyformat"), column_keys=columns))


def _leave_unfit_server(context: ExceptionContext) -> None:
    """Has the pool replace connections to a server that answers but cannot be used now: another one may serve."""
    error = context.original_exception
    if error.args and error.args[0] in _UNFIT:
        context.is_disconnect = True


@contextmanager
def driver_errors() -> Iterator[None]:
    """Turns the driver's errors, and SQLAlchemy's about connections, into ours, cause kept.

    Raises StoreConflict, StoreUnavailable, StoreMisconfigured, StoreRefused. Any other error of SQLAlchemy is a fault
    in a statement of ours, and stays what it is: it must not look like a store that is away.
    """
    try:
        yield
    except DBAPIError as error:
        raise translated(error.orig or error) from error
    except (PoolTimeout, DisconnectionError, PendingRollbackError) as error:
        raise StoreUnavailable(f"the store did not answer: {type(error).__name__}") from error
    except (pymysql.err.Error, OSError) as error:
        raise translated(error) from error


def translated(error: BaseException) -> StoreUnavailable | StoreRefused:
    """Our error for one of PyMySQL's or of the socket's; to be raised from it."""
    code = error.args[0] if error.args and isinstance(error.args[0], int) else None
    # The server's own words may quote values of a statement; the code is enough to look it up.
    description = f"MySQL error {code}" if code is not None else type(error).__name__
    if code in CONFLICTS:
        return StoreConflict(f"another transaction was in the way ({description})")
    if isinstance(error, (OSError, pymysql.err.InterfaceError)) or code in RETRYABLE:
        fault = f"refused {_ADVICE[code]}" if code in _ADVICE else "cannot be used now"
        return StoreUnavailable(f"the store {fault} ({description})")
    kind = StoreMisconfigured if code in _ADVICE else StoreRefused
    return kind(f"the store refused {_ADVICE.get(code, _UNKNOWN)} ({description})")
