"""What a connection reads when its handshake is done: a record at a time, and little that is no data.

A client may ask for new keys whenever it likes (RFC 8446, 4.6.3), and OpenSSL sets no bound: it goes through all that
has come, 256 KiB at a time with uvloop, before it gives the event loop back. That is ten thousand new keys and tenths
of a second in which nobody else is served. So what has come is handed to OpenSSL in slices, and a connection that has
sent more beside its data than any client has reason to is ended. Records that are cut or padded are within the bound.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from typing import Any

# The most data that a TLS record holds (RFC 8446, 5.1).
RECORD_BYTES = 16_384
# With less than this nobody is kept waiting, and a request is less.
_LITTLE_BYTES = 1_024
_SLICE_BYTES = 4_096
# Beside the data of each read: header, padding and code of a record, and a few new keys.
_ALLOWED_BYTES = 512
# In all over a connection's life. A whole record that is still to be completed has to fit.
_MOST_BYTES = 32_768


class TooMuchBesideData(ssl.SSLError):
    """The other side sends what is no data, without end."""


class Reader:
    """Stands for ``read`` of the ssl module's object; uvloop asks it while anything is left in ``incoming``."""

    __slots__ = ("_beside", "_incoming", "_inner_read", "_open", "_withheld")

    def __init__(self, inner_read: Callable[..., Any], incoming: ssl.MemoryBIO) -> None:
        self._inner_read = inner_read
        self._incoming = incoming
        # Came, and is not in ``incoming`` yet. While there is any, ``incoming`` is not left empty.
        self._withheld = memoryview(b"")
        # Read since there was data, and what there was beside the data before that.
        self._open = 0
        self._beside = 0

    def read(self, size: int = RECORD_BYTES, buffer: Any = None) -> Any:  # noqa: ANN401 -- as the ssl module has it
        """Data of one record at most. Raises ssl.SSLWantReadError, and TooMuchBesideData to end the connection."""
        if buffer is not None:
            return self._inner_read(size, buffer)
        if self._incoming.pending <= _LITTLE_BYTES and not self._withheld:
            # This runs for each request, and calling min() took as long as the rest of this function.
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
