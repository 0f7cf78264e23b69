"""Python's ssl objects for one connection: the state that OpenSSL's callbacks need, and bounded reading.

The event loop makes one ``TlsObject`` for each connection. OpenSSL calls back inside its ``do_handshake``, in the
same thread. The callbacks get no object from C, so they find the connection with ``current()``. What they store (the
identity, the offered suites, the reason of a refusal) is read once, when the handshake has ended.
"""

from __future__ import annotations

import contextlib
import ssl
import threading
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from socket import MSG_DONTWAIT, MSG_NOSIGNAL, socket
from typing import Any

from skipbus.services.api.tls.callers import Caller, CallerBook
from skipbus.shared.protocol.psk_file import PskKeys

# The most data that a TLS record holds (RFC 8446, 5.1).
RECORD_BYTES = 16_384
# So few bytes delay no other client, and a request has fewer.
_LITTLE_BYTES = 1_024
_SLICE_BYTES = 4_096
# Beside the data of each read: header, padding and tag of a record, and a few key updates.
_ALLOWED_BYTES = 512
# For the whole connection. One incomplete record must fit.
_MOST_BYTES = 32_768


class _Running(threading.local):
    """The handshake that this thread is in."""

    handshake: TlsObject | None = None


_RUNNING = _Running()


def current() -> TlsObject | None:
    """The connection whose handshake this thread is in."""
    return _RUNNING.handshake


@dataclass
class Accepted:
    """An accepted connection: its client's address, and the callback for a failed handshake."""

    address: str
    socket: socket
    on_failure: Callable[[TlsObject, ssl.SSLError], None] = field(repr=False)
    # The answer to a client that uses HTTP without TLS.
    plain_answer: bytes = b""


# Set while the event loop makes a connection's ssl object: there is no other way to pass it anything.
ACCEPTED: ContextVar[Accepted | None] = ContextVar("accepted", default=None)


class TlsObject(ssl.SSLObject):
    """One connection."""

    psk_identity: bytes | None = None
    refusal: str | None = None
    offered: bytes = b""
    binder_bytes: int = 0
    pointer: int = 0
    accepted: Accepted | None = None
    outgoing: ssl.MemoryBIO | None = None
    keys: PskKeys
    callers: CallerBook

    def do_handshake(self) -> None:
        """Continues the handshake. A refusal is reported, and its alert sent, before the error is raised."""
        _RUNNING.handshake = self
        try:
            super().do_handshake()
            self._check_identity()
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise
        except ssl.SSLError as error:
            self._failed(error)
            raise
        finally:
            _RUNNING.handshake = None
            # OpenSSL frees this memory with the connection.
            self.pointer = 0

    def _check_identity(self) -> None:
        """Keeps the identity only if its key was used. A session without an identity is refused."""
        cipher = self.cipher()
        on_psk = self.session_reused if self.version() == "TLSv1.3" else cipher is not None and "PSK" in cipher[0]
        if not on_psk:
            self.psk_identity = None
        elif self.psk_identity is None:
            self.refusal = "a resumed session, which shows no identity"
            raise ssl.SSLError(self.refusal)

    def _failed(self, error: ssl.SSLError) -> None:
        if self.accepted is None:
            return
        self.accepted.on_failure(self, error)
        # The event loop drops what OpenSSL still wants to send, but the client's operator needs the alert.
        alert = self.outgoing.read() if self.outgoing is not None else b""
        if error.reason == "HTTP_REQUEST":
            alert = self.accepted.plain_answer
        with contextlib.suppress(OSError):
            self.accepted.socket.send(alert, MSG_DONTWAIT | MSG_NOSIGNAL)

    @cached_property
    def caller(self) -> Caller:
        """The client; determined once."""
        return self.callers.identify(self.psk_identity, self.getpeercert(binary_form=True))


class TlsContext(ssl.SSLContext):
    """A server's context, with the pre-shared keys and the table of identities."""

    keys: PskKeys
    callers: CallerBook
    sslobject_class = TlsObject

    def wrap_bio(self, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO, *args: Any, **options: Any) -> TlsObject:  # noqa: ANN401 -- handed through
        """Called by the event loop for a new connection."""
        made = super().wrap_bio(incoming, outgoing, *args, **options)
        assert isinstance(made, TlsObject)  # noqa: S101 -- for the type checker
        made.accepted, made.outgoing = ACCEPTED.get(), outgoing
        made.keys, made.callers = self.keys, self.callers
        _shorten(made, incoming)
        return made


def _shorten(made: TlsObject, incoming: ssl.MemoryBIO) -> None:
    """Lets the event loop call the C methods directly, without Python's methods that only pass on the call.

    uvloop reads 256 KiB at a time, but OpenSSL returns at most one record. Allocating and shrinking such a block took
    ten times as long as reading: 11 instead of 0.7 microseconds.
    """
    inner = vars(made)["_sslobj"]
    vars(made).update(read=Reader(inner.read, incoming).read, write=inner.write, pending=inner.pending)


class TooMuchBesideData(ssl.SSLError):
    """The client sends too many bytes that are no data."""


class Reader:
    """Replaces ``read`` of the ssl object: one record at a time, with a bound on bytes that are no data.

    A client may send key updates at any time (RFC 8446, 4.6.3), and OpenSSL does not bound them: it processes all
    received bytes, 256 KiB at a time with uvloop, before it returns to the event loop. That is ten thousand key
    updates, and some tenths of a second in which no other client is served. So received bytes are passed to OpenSSL in
    slices, and a connection that sends more bytes beside its data than any client needs is ended. Fragmented or padded
    records are within the bound. uvloop calls ``read`` while ``incoming`` is not empty.
    """

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
