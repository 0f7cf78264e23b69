"""Reads what the server sends for a packet of statements, as far as it has come. Pure: no I/O.

Only what the store's own statements can be answered with is understood: OK, an error, rows as text. PyMySQL makes
the error out of an error packet. Anything else means that the two sides have lost each other, and ends the
connection: InterfaceError. Nothing that a server sends makes this grow without bound.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any

import pymysql.err
from pymysql.constants import SERVER_STATUS

Row = tuple[Any, ...]
Rows = Sequence[Row]
Reader = Callable[[bytes], object]
MAX_PACKET_BYTES = 2**20
# What the protocol has for one packet. For whoever reads what others have written, in a thread.
LONGEST_PACKET_BYTES = 2**24 - 2
MAX_ANSWER_BYTES = 2**26
_HEADER_BYTES = 4
_OK, _NULL, _EOF, _ERROR = 0x00, 0xFB, 0xFE, 0xFF
_LONG_NUMBERS = {0xFC: 3, 0xFD: 4, 0xFE: 9}
_MORE: int = SERVER_STATUS.SERVER_MORE_RESULTS_EXISTS


class Answer:
    """The results of one command or several; ``rows`` is complete when ``feed`` says so."""

    __slots__ = ("_columns", "_commands", "_left", "_longest", "_rest", "_rows", "_seen_bytes", "_sequence", "_take")

    def __init__(self, columns: tuple[Reader, ...], max_packet_bytes: int = MAX_PACKET_BYTES) -> None:
        self._columns = columns
        self._longest = max_packet_bytes
        self._commands = 1
        self._rest = b""
        self._rows: list[Row] = []
        self._seen_bytes = 0
        self._sequence = 1
        self._left = 0
        # Functions, not bound methods: those would be circles that only the collector can clear away.
        self._take: Callable[[Answer, bytes], bool] = Answer._take_result

    @property
    def rows(self) -> Rows:
        """The rows of the statement that gave some."""
        return self._rows

    @property
    def is_last(self) -> bool:
        """Whether only one command is still to be answered."""
        return self._commands == 1

    def expect(self, commands: int) -> None:
        """So many more commands were sent before this was answered."""
        self._commands += commands

    def feed(self, data: bytes) -> bool:
        """Takes octets as they come; whether the answer is complete. Raises PyMySQL's errors."""
        self._seen_bytes += len(data)
        if self._seen_bytes > MAX_ANSWER_BYTES:
            raise pymysql.err.InterfaceError("the answer has no end")
        try:
            return self._feed(self._rest + data)
        except (struct.error, IndexError, ValueError) as error:
            raise pymysql.err.InterfaceError("a packet is damaged") from error

    def _feed(self, data: bytes) -> bool:
        start, end = 0, len(data)
        while end - start >= _HEADER_BYTES:
            size = data[start] | data[start + 1] << 8 | data[start + 2] << 16
            if size > self._longest or data[start + 3] != self._sequence:
                raise pymysql.err.InterfaceError("a packet is too long or out of sequence")
            body = start + _HEADER_BYTES
            if end - body < size:
                break
            self._sequence = (self._sequence + 1) & 0xFF
            start = body + size
            if self._take(self, data[body:start]):
                self._commands -= 1
                if self._commands:
                    self._sequence = 1
                    continue
                if start != end:
                    raise pymysql.err.InterfaceError("there is more than was asked for")
                return True
        self._rest = data[start:]
        return False

    def _take_result(self, packet: bytes) -> bool:
        """The first packet of a result: OK, an error, or the number of columns."""
        kind = packet[0]
        if kind == _OK:
            # Two numbers of any length stand before the status: rows changed, and the last id given.
            place = _after_number(packet, _after_number(packet, 1))
            return not _status(packet, place) & _MORE
        if kind == _ERROR:
            pymysql.err.raise_mysql_exception(packet)
        if kind != len(self._columns) or len(packet) != 1:
            raise pymysql.err.InterfaceError("a result is not what was asked for")
        # What the columns are is known: their descriptions are passed over, and the packet that ends them.
        self._left = kind + 1
        self._take = Answer._pass_over
        return False

    def _pass_over(self, packet: bytes) -> bool:
        if packet[0] == _ERROR:
            pymysql.err.raise_mysql_exception(packet)
        self._left -= 1
        if not self._left:
            if not _is_end(packet):
                raise pymysql.err.InterfaceError("a result has more columns than were asked for")
            self._take = Answer._take_row
        return False

    def _take_row(self, packet: bytes) -> bool:
        if packet[0] == _ERROR:
            pymysql.err.raise_mysql_exception(packet)
        if _is_end(packet):
            self._take = Answer._take_result
            return not _status(packet, 3) & _MORE
        values = []
        place = 0
        for read in self._columns:
            start = _after_number(packet, place)
            place = start + _number(packet, place)
            if place > len(packet):
                raise pymysql.err.InterfaceError("a row is cut short")
            values.append(read(packet[start:place]))
        self._rows.append(tuple(values))
        return False


def _is_end(packet: bytes) -> bool:
    return packet[0] == _EOF and len(packet) < 9


def _status(packet: bytes, place: int) -> int:
    return packet[place] | packet[place + 1] << 8


def _after_number(packet: bytes, place: int) -> int:
    first = packet[place]
    if first < _NULL:
        return place + 1
    if first not in _LONG_NUMBERS:
        raise pymysql.err.InterfaceError("a column is NULL")
    return place + _LONG_NUMBERS[first]


def _number(packet: bytes, place: int) -> int:
    first = packet[place]
    if first < _NULL:
        return first
    return int.from_bytes(packet[place + 1 : _after_number(packet, place)], "little")
