"""One handshake of the server: Python's ssl objects, with the state that the callbacks need.

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
from skipbus.services.api.tls.reading import Reader
from skipbus.shared.protocol.psk_file import PskKeys


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
