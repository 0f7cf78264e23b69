"""Reads a connection after its handshake: one record at a time, with a bound on bytes that are no data.

A client may send key updates at any time (RFC 8446, 4.6.3), and OpenSSL does not bound them: it processes all received
bytes, 256 KiB at a time with uvloop, before it returns to the event loop. That is ten thousand key updates, and some
tenths of a second in which no other client is served. So received bytes are passed to OpenSSL in slices, and a
connection that sends more bytes beside its data than any client needs is ended. Fragmented or padded records are
within the bound.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from typing import Any

# The most data that a TLS record holds (RFC 8446, 5.1).
RECORD_BYTES = 16_384
# So few bytes delay nobody, and a request has fewer.
_LITTLE_BYTES = 1_024
_SLICE_BYTES = 4_096
# Beside the data of each read: header, padding and tag of a record, and a few key updates.
_ALLOWED_BYTES = 512
# For the whole connection. One incomplete record must fit.
_MOST_BYTES = 32_768


class TooMuchBesideData(ssl.SSLError):
    """The client sends too many bytes that are no data."""


class Reader:
    """Replaces ``read`` of the ssl object; uvloop calls it while ``incoming`` is not empty."""

    __slots__ = ("_beside", "_incoming", "_inner_read", "_open", "_withheld")

    def __init__(self, inner_read: Callable[..., Any], incoming: ssl.MemoryBIO) -> None:
        self._inner_read = inner_read
        self._incoming = incoming
        # Received, and not yet in ``incoming``. While there is any, ``incoming`` is not left empty.
        self._withheld = memoryview(b"")
        # Bytes read since the last data, and bytes beside the data before that.
        self._open = 0
        self._beside = 0

    def read(self, size: int = RECORD_BYTES, buffer: Any = None) -> Any:  # noqa: ANN401 -- as the ssl module has it
        """Data of at most one record. Raises ssl.SSLWantReadError, and TooMuchBesideData to end the connection."""
        if buffer is not None:
            return self._inner_read(size, buffer)
        if self._incoming.pending <= _LITTLE_BYTES and not self._withheld:
            # This runs for each request, and min() took as long as the rest of this function.
            return self._inner_read(size if size < RECORD_BYTES else RECORD_BYTES)  # noqa: FURB136 -- see above
        return self._read_in_slices()

    def _read_in_slices(self) -> Any:  # noqa: ANN401 -- as the ssl module has it
        if not self._withheld:
            self._withheld = memoryview(self._incoming.read())
            self._hand_on()
        while True:
            before = self._incoming.pending
            try:
                data = self._inner_read(RECORD_BYTES)
            except ssl.SSLWantReadError:
                self._count(read=before, data=0)
                if not self._withheld:
                    raise
                self._hand_on()
                continue
            self._count(read=before - self._incoming.pending, data=len(data))
            if self._withheld and not self._incoming.pending:
                self._hand_on()
            return data

    def _hand_on(self) -> None:
        self._incoming.write(self._withheld[:_SLICE_BYTES])
        self._withheld = self._withheld[_SLICE_BYTES:]

    def _count(self, *, read: int, data: int) -> None:
        self._open += read
        if data:
            self._beside += max(0, self._open - data - _ALLOWED_BYTES)
            self._open = 0
        if self._beside + self._open > _MOST_BYTES:
            raise TooMuchBesideData("new keys, or other things that are no data, without end")
