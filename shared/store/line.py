"""A connection to the store that never blocks the event loop.

PyMySQL makes the connection, in a thread: handshake, authentication, TLS, session settings. From then on its socket
does not block, and the loop writes the statements and is told when the socket can be read. One step's packets
are under way at a time. Whatever goes wrong ends the line; nothing of that is ever raised here: who sent
the statement is told.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Callable, Mapping, Sequence

import pymysql.err
from pymysql.connections import Connection
from pymysql.constants import COMMAND, CR

from skipbus.shared.errors import StoreRefused
from skipbus.shared.store.commands import packets
from skipbus.shared.store.engine import STATEMENT_TIMEOUT_SECONDS, translated
from skipbus.shared.store.results import Answer, Rows
from skipbus.shared.store.steps import Command, Statement

# What came of a step: its rows, or the error.
Told = Callable[[Rows, BaseException | None], None]
_CHUNK_BYTES = 2**16
_NOT_NOW = (BlockingIOError, InterruptedError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
_QUIT = b"\x01\x00\x00\x00" + bytes([COMMAND.COM_QUIT])


class StoreLine:
    """One open connection. ``open`` is false once it has ended, from either side."""

    def __init__(
        self,
        connection: Connection,
        loop: asyncio.AbstractEventLoop,
        statement_ids: Mapping[str, int] | None = None,
        *,
        outlives_refusals: bool = False,
    ) -> None:
        """Takes over a connection with no statement under way; ``statement_ids`` are of those it has prepared.

        With ``outlives_refusals`` it stays open where the server has only refused a statement of the last command under
        way. What was half done is then the caller's to roll back.
        """
        self._outlives_refusals = outlives_refusals
        self._loop = loop
        self._statement_ids = statement_ids or {}
        # PyMySQL's object is kept for its buffered reader, which is empty now, and would close the socket with it.
        self._connection = connection
        self._socket: socket.socket = connection._sock  # type: ignore[attr-defined]  # noqa: SLF001 -- see above
        self._answer: Answer | None = None
        self._told: Told | None = None
        self._unsent = memoryview(b"")
        self._late_at = 0.0
        self.open = True
        self._socket.setblocking(False)
        loop.add_reader(self._socket, self._readable)

    def send(self, statement: Statement, told: Told) -> None:
        """Sends the statements; ``told`` gets the rows or the error, perhaps before this returns.

        What ``statement.meanwhile`` raises is raised here: then nobody is told, and the line must be closed.
        """
        self._answer = Answer(statement.columns)
        self._told = told
        self._late_at = self._loop.time() + STATEMENT_TIMEOUT_SECONDS
        if not self.open:
            self._fail(_lost())
            return
        self._write((statement.sql,))
        if statement.meanwhile is not None and self.open:
            more = statement.meanwhile()
            if more:
                self._answer.expect(self._write(more))

    def check(self, now: float) -> None:
        """Ends the line where the server has taken too long over a statement; ``now`` is the loop's time."""
        if self._told is not None and now >= self._late_at:
            self._fail(TimeoutError())

    def close(self) -> None:
        """Ends the line; the server undoes a transaction that is under way."""
        if not self.open:
            return
        self.open = False
        self._loop.remove_reader(self._socket)
        self._loop.remove_writer(self._socket)
        with contextlib.suppress(OSError):
            if self._told is None:
                self._socket.send(_QUIT)
        with contextlib.suppress(OSError):
            self._connection._force_close()  # type: ignore[attr-defined]  # noqa: SLF001 -- close() would wait

    def _write(self, commands: Sequence[Command]) -> int:
        """How many answers there will be."""
        data, count = packets(commands, self._statement_ids)
        self._unsent = memoryview(b"".join((self._unsent, data)) if self._unsent else data)
        self._write_on()
        return count

    def _write_on(self) -> None:
        try:
            while self._unsent:
                self._unsent = self._unsent[self._socket.send(self._unsent) :]
        except _NOT_NOW:
            self._loop.add_writer(self._socket, self._writable)
        except OSError as error:
            self._fail(error)

    def _writable(self) -> None:
        self._loop.remove_writer(self._socket)
        self._write_on()

    def _readable(self) -> None:
        try:
            # A record of TLS holds 16 KiB at most: nothing that was deciphered, and wakes nobody, stays behind.
            data = self._socket.recv(_CHUNK_BYTES)
        except _NOT_NOW:
            return
        except OSError as error:
            self._fail(error)
            return
        answer = self._answer
        if not data or answer is None:
            # Nobody asked: it says why it ends the connection, or just does.
            self._fail(_lost())
            return
        try:
            complete = answer.feed(data)
        except pymysql.err.Error as error:
            self._fail(error, may_stay=self._outlives_refusals and answer.is_last)
            return
        if complete:
            self._tell(answer.rows, None)

    def _fail(self, error: BaseException, *, may_stay: bool = False) -> None:
        ours = translated(error)
        ours.__cause__ = error
        if not (may_stay and isinstance(ours, StoreRefused)):
            self.close()
        self._tell((), ours)

    def _tell(self, rows: Rows, error: BaseException | None) -> None:
        told, self._told, self._answer = self._told, None, None
        if told is not None:
            told(rows, error)


def _lost() -> pymysql.err.OperationalError:
    return pymysql.err.OperationalError(CR.CR_SERVER_LOST, "the server has ended the connection")
