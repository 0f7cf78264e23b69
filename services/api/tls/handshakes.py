"""One handshake as the server sees it: the ssl objects of Python's module, with a memory.

``TlsObject`` is what the event loop makes for each connection. OpenSSL calls back in the middle of its
``do_handshake``, in the same thread; ``current()`` is how the callbacks find it, since C hands them no object of
ours. What they note (the identity, what was offered, why not) is read when the handshake has ended, once.
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
    """A connection that was accepted: whose it is, and who is told why its handshake failed."""

    address: str
    socket: socket
    on_failure: Callable[[TlsObject, ssl.SSLError], None] = field(repr=False)
    # What a client that speaks HTTP without TLS is told.
    plain_answer: bytes = b""


# Set while the event loop makes a connection's ssl object, which is the only way to hand it something.
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
        """Goes on with the handshake; a refusal is reported and its alert sent before the error goes on."""
        _RUNNING.handshake = self
        try:
            super().do_handshake()
            self._settle()
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise
        except ssl.SSLError as error:
            self._failed(error)
            raise
        finally:
            _RUNNING.handshake = None
            # It points to memory that OpenSSL frees with the connection.
            self.pointer = 0

    def _settle(self) -> None:
        """Keeps the identity only where the key was what the handshake stood on, and lets no one in without one."""
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
        # The event loop drops what OpenSSL has left to say, but the alert is what the client's operator sees.
        last_words = self.outgoing.read() if self.outgoing is not None else b""
        if error.reason == "HTTP_REQUEST":
            last_words = self.accepted.plain_answer
        with contextlib.suppress(OSError):
            self.accepted.socket.send(last_words, MSG_DONTWAIT | MSG_NOSIGNAL)

    @cached_property
    def caller(self) -> Caller:
        """Who has connected; worked out once."""
        return self.callers.identify(self.psk_identity, self.getpeercert(binary_form=True))


class TlsContext(ssl.SSLContext):
    """A server's context, with the keys and the table of identities that its connections are judged by."""

    keys: PskKeys
    callers: CallerBook
    sslobject_class = TlsObject

    def wrap_bio(self, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO, *args: Any, **options: Any) -> TlsObject:  # noqa: ANN401 -- handed through
        """As the event loop calls it for a new connection."""
        made = super().wrap_bio(incoming, outgoing, *args, **options)
        assert isinstance(made, TlsObject)  # noqa: S101 -- for the type checker
        made.accepted, made.outgoing = ACCEPTED.get(), outgoing
        made.keys, made.callers = self.keys, self.callers
        _shorten(made, incoming)
        return made


def _shorten(made: TlsObject, incoming: ssl.MemoryBIO) -> None:
    """Has the event loop call C for each request, without the methods of Python's that only hand on to it.

    uvloop reads 256 KiB at a time. OpenSSL never gives more than a record, and where the heap has no such block free,
    growing and shrinking it took ten times as long as the reading: 11 instead of 0.7 microseconds.
    """
    inner = vars(made)["_sslobj"]
    vars(made).update(read=Reader(inner.read, incoming).read, write=inner.write, pending=inner.pending)
