"""Work on the store as a sequence of steps, written once and driven by whoever has a connection.

A step is a statement, whose rows come back to where it was yielded, or a function that takes long enough to be
called in a thread. Steps do no I/O themselves: the api's lanes drive them without ever blocking the event loop
(``services/api/batching.py``), tools and tests with a blocking connection (``run_steps``). Either way an error of the
store is raised where the statement was yielded, as StoreUnavailable or StoreRefused.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple, TypeVar

import pymysql.err
from pymysql.connections import Connection
from pymysql.constants import COMMAND, CR

from skipbus.shared.errors import StoreRefused
from skipbus.shared.settings import MySqlSettings
from skipbus.shared.store import literals
from skipbus.shared.store.engine import OwnConnection, driver_errors
from skipbus.shared.store.results import LONGEST_PACKET_BYTES, Answer, Reader, Rows

Value = int | str | bytes
_CHUNK_BYTES = 2**16
Outcome = TypeVar("Outcome")


class Bound(NamedTuple):
    """One statement with a ``?`` for each of its values, for a connection that may have it prepared."""

    sql: str
    values: tuple[Value, ...]

    def text(self) -> str:
        """The same for a connection that has not: the values are literals in it."""
        first, *rest = self.sql.split("?")
        return first + "".join(f"{_literal(value)}{part}" for value, part in zip(self.values, rest, strict=True))


def _literal(value: Value) -> str:
    if isinstance(value, int):
        return str(value)
    return literals.text(value) if isinstance(value, str) else literals.octets(value)


# SQL for one packet, several statements with ";" between them; or one with values.
Command = str | Bound
Meanwhile = Callable[[], Sequence[Command] | None]


class Statement:
    """A command of whose statements at most one gives rows, and none where it is bound.

    ``columns`` reads each column of a row from the text that the server sends; none of them may be NULL.
    ``meanwhile`` is done while a server works on the statements; what it raises ends the steps, and the
    connection with them. It may return more commands. They may leave before what went before them is answered, and the
    server then works on each even where one before it has failed: their statements must see to that.
    """

    __slots__ = ("columns", "meanwhile", "sql")

    def __init__(self, sql: Command, columns: tuple[Reader, ...] = (), meanwhile: Meanwhile | None = None) -> None:
        self.sql = sql
        self.columns = columns
        self.meanwhile = meanwhile


Step = Statement | Callable[[], None]
Steps = Generator[Step, Rows, Outcome]


def octets(value: bytes) -> bytes:
    """Reads a column of bytes."""
    return value


def text(value: bytes) -> str:
    """Reads a column of text."""
    return value.decode()


def run_steps(connection: Connection, steps: Steps[Outcome]) -> Outcome:
    """Drives steps with a blocking connection; their outcome, or their error."""
    try:
        step = next(steps)
        while True:
            try:
                rows = _do(connection, step)
            except Exception as error:  # noqa: BLE001 -- whatever it is, the steps decide
                step = steps.throw(error)
            else:
                step = steps.send(rows)
    except StopIteration as end:
        outcome: Outcome = end.value
        return outcome


class StepsRunner:
    """Drives steps with a blocking connection of its own, which takes several statements in a packet.

    It is made when it is first needed, and anew after an error: what was half done ends with it. Where the server has
    only refused a statement, a rollback does that. For one thread at a time.
    """

    def __init__(self, mysql: MySqlSettings) -> None:
        self._own = OwnConnection(mysql)

    def run(self, steps: Steps[Outcome]) -> Outcome:
        """The outcome of the steps. Raises StoreUnavailable, StoreRefused, and what they raise themselves."""
        connection = self._own.opened()
        try:
            return run_steps(connection, steps)
        except StoreRefused:
            self._roll_back(connection)
            raise
        except BaseException:
            self.close()
            raise

    def _roll_back(self, connection: Connection) -> None:
        try:
            connection.rollback()
        except Exception:  # noqa: BLE001 -- whatever is wrong with it, another one is made
            self.close()

    def close(self) -> None:
        """Gives its connection back."""
        self._own.close()


def _do(connection: Connection, step: Step) -> Rows:
    if not isinstance(step, Statement):
        step()
        return ()
    with driver_errors():
        rows, more = _execute(connection, step)
        for command in more or ():
            _execute(connection, Statement(command))
        return rows


def _execute(connection: Connection, statement: Statement) -> tuple[Rows, Sequence[Command] | None]:
    """What PyMySQL's cursor does, without its reader. PyMySQL's names are held by every test on a real server."""
    driver: Any = connection
    driver._execute_command(COMMAND.COM_QUERY, text_of(statement.sql).encode())  # noqa: SLF001 -- see above
    more = statement.meanwhile() if statement.meanwhile is not None else None
    answer = Answer(statement.columns, LONGEST_PACKET_BYTES)
    while not answer.feed(_receive(connection)):
        pass
    return answer.rows, more


def _receive(connection: Connection) -> bytes:
    driver: Any = connection
    # PyMySQL's buffered reader is empty: nothing has come that was not asked for.
    try:
        driver._sock.settimeout(driver._read_timeout)  # noqa: SLF001 -- see above
        data: bytes = driver._sock.recv(_CHUNK_BYTES)  # noqa: SLF001
    except OSError as error:
        raise pymysql.err.OperationalError(CR.CR_SERVER_LOST, f"the server does not answer ({error})") from error
    if not data:
        raise pymysql.err.OperationalError(CR.CR_SERVER_LOST, "the server has ended the connection")
    return data


def text_of(command: Command) -> str:
    """The command as text, with its values in it."""
    return command if isinstance(command, str) else command.text()
