"""The TLS port: accepts connections, bounds them for each address, and runs one handshake task for each connection.

The event loop's own servers take a context once and do not report a failed handshake. Here every connection gets the
current context, and every refused handshake a log line. After the handshake aiohttp serves the connection.

File descriptors must stay free for the store, so handshakes count as connections. Beyond the limit the oldest
unfinished handshake is ended: a client that starts many handshakes displaces only unfinished ones. If file descriptors
run out all the same, accepting pauses. All api processes of one KP share the port; another KP's port is refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import http.client
import socket
import ssl
from collections import Counter
from collections.abc import Callable
from typing import Any

from skipbus.services.api.http.server import BoundedServer
from skipbus.services.api.tls import reasons
from skipbus.services.api.tls.handshake import ACCEPTED, Accepted, TlsContext
from skipbus.shared.errors import OperatorError
from skipbus.shared.logging import get_logger

_BACKLOG = 4096
_ACCEPTS_AT_A_TIME = 64
_PAUSE_SECONDS = 0.2
_RAISE_LIMIT = "check the limit of open files (LimitNOFILE, ulimits) and the host's memory"
_SHUTDOWN_SECONDS = 2.0
_ASK_SECONDS = 2.0
_MARK_HEADER = "X-KP"
_ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 -- compared with, not bound
_log = get_logger("tls")


class TlsListener:
    """Passes connections to ``server`` after their handshake."""

    def __init__(
        self,
        server: BoundedServer,
        context: Callable[[], TlsContext],
        *,
        handshake_timeout_seconds: float,
        max_connections_per_address: int,
        system_id: str,
    ) -> None:
        """``context`` gives the one for new connections."""
        self._server = server
        self._context = context
        self._timeout_seconds = handshake_timeout_seconds
        self._max_per_address = max_connections_per_address
        self._plain_answer = _plain_http_answer(system_id)
        self._system_id = system_id
        self._sockets: list[socket.socket] = []
        # In the order of their start, with the clients' addresses.
        self._handshakes: dict[asyncio.Task[None], str] = {}
        self._of_address: Counter[str] = Counter()
        self._crowded: set[str] = set()

    async def listen(self, host: str, port: int) -> None:
        """Binds and starts to accept. Raises OperatorError, also if another key provider uses the port."""
        await asyncio.to_thread(_check_owner, host, port, self._system_id)
        try:
            for family, _, _, _, address in socket.getaddrinfo(
                host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            ):
                self._sockets.append(_bound(family, address))
        except OSError as error:
            self.close()
            raise OperatorError(
                f"cannot listen on {host}:{port}: {error.strerror or error} (SKIP_HOST, SKIP_TLS_PORT)"
            ) from error
        for bound in self._sockets:
            self._accept_from(bound)
        _log.info("listening", host=host, port=port, tls=True, psk_identities=len(self._context().keys))

    @property
    def handshaking(self) -> bool:
        """Whether a handshake is unfinished."""
        return bool(self._handshakes)

    def stop_accepting(self) -> None:
        """No new connections; those that the kernel has accepted are served, and handshakes continue."""
        for bound in self._sockets:
            self._accept(bound)
            with contextlib.suppress(RuntimeError):
                asyncio.get_running_loop().remove_reader(bound)
            bound.close()
        self._sockets.clear()

    def close(self) -> None:
        """No new connections, and unfinished handshakes end; finished connections belong to the server."""
        self.stop_accepting()
        for handshake in list(self._handshakes):
            handshake.cancel()

    def _accept_from(self, bound: socket.socket) -> None:
        if bound.fileno() >= 0:
            asyncio.get_running_loop().add_reader(bound, self._accept, bound)

    def _accept(self, bound: socket.socket) -> None:
        for _ in range(_ACCEPTS_AT_A_TIME):
            try:
                accepted, address = bound.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                # Out of file descriptors or memory: clients in the backlog are served when others have gone.
                _log.error("cannot accept new connections", reason=error.strerror or str(error), advice=_RAISE_LIMIT)
                loop = asyncio.get_running_loop()
                loop.remove_reader(bound)
                loop.call_later(_PAUSE_SECONDS, self._accept_from, bound)
                return
            self._take(accepted, str(address[0]))

    def _take(self, accepted: socket.socket, address: str) -> None:
        if not self._has_room(address):
            accepted.close()
            return
        self._make_room()
        accepted.setblocking(False)
        self._of_address[address] += 1
        handshake = asyncio.create_task(self._shake_hands(accepted, address), name="handshake")
        self._handshakes[handshake] = address
        handshake.add_done_callback(functools.partial(self._ended, accepted=accepted, address=address))

    def _ended(self, handshake: asyncio.Task[None], *, accepted: socket.socket, address: str) -> None:
        self._handshakes.pop(handshake, None)
        # A task that is cancelled before its first step runs no cleanup of its own: it is done here.
        if handshake.cancelled():
            accepted.close()
            self._release(address)

    def _make_room(self) -> None:
        while self._handshakes and self._is_full():
            oldest = next(iter(self._handshakes))
            reasons.log_refusal(self._handshakes.pop(oldest), reasons.CROWDED_OUT)
            oldest.cancel()

    def _is_full(self) -> bool:
        return len(self._handshakes) + self._server.connection_count >= self._server.max_connections

    def _has_room(self, address: str) -> bool:
        if self._of_address[address] < self._max_per_address:
            return True
        # One line when it starts, not one for each connection of this address.
        if address not in self._crowded:
            self._crowded.add(address)
            reasons.log_refusal(address, reasons.TOO_MANY, limit=self._max_per_address)
        return False

    async def _shake_hands(self, accepted: socket.socket, address: str) -> None:
        ACCEPTED.set(Accepted(address, accepted, reasons.log_failure, self._plain_answer))
        release = functools.partial(self._release, address)
        made = self._server()
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: made,
                accepted,
                ssl=self._context(),
                ssl_handshake_timeout=self._timeout_seconds,
                ssl_shutdown_timeout=_SHUTDOWN_SECONDS,
            )
        except Exception as error:  # noqa: BLE001 -- after any error the address must get its place back
            release()
            self._log_failure(address, error)
        else:
            made.when_lost(release)
            _acknowledge(accepted)

    def _log_failure(self, address: str, error: Exception) -> None:
        if isinstance(error, ssl.SSLError):
            return  # the handshake has logged its reason
        if isinstance(error, ConnectionAbortedError | TimeoutError):
            reasons.log_refusal(address, reasons.TIMEOUT.format(seconds=self._timeout_seconds))
        elif isinstance(error, OSError):
            reasons.log_refusal(address, reasons.GONE)
        else:
            _log.error("handshake failed", client=address, exc_info=error)

    def _release(self, address: str) -> None:
        self._of_address[address] -= 1
        if self._of_address[address] <= 0:
            del self._of_address[address]
            self._crowded.discard(address)


def _acknowledge(accepted: socket.socket) -> None:
    """Acknowledges the client's last message immediately, because Nagle's algorithm makes the client wait for it.

    In TLS 1.3 the server sends nothing after the handshake, so the kernel would delay the acknowledgement by 40 ms.
    """
    with contextlib.suppress(OSError):
        accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)


def _bound(family: socket.AddressFamily, address: tuple[Any, ...]) -> socket.socket:
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Every api process of a KP binds the same port; the kernel distributes connections.
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        bound.bind(address)
        bound.listen(_BACKLOG)
        bound.setblocking(False)
    except OSError:
        bound.close()
        raise
    return bound


def _plain_http_answer(system_id: str) -> bytes:
    """The answer to HTTP without TLS, with a hash of the id by which the KP's own processes recognise the port."""
    body = b'{"error":"this port speaks HTTPS only"}'
    return (
        b"HTTP/1.1 400 Bad Request\r\nContent-Type: application/json; charset=utf-8\r\nConnection: close\r\n"
        b"%b: %b\r\nContent-Length: %d\r\n\r\n%b" % (_MARK_HEADER.encode(), _mark(system_id).encode(), len(body), body)
    )


def _check_owner(host: str, port: int, system_id: str) -> None:
    """Raises OperatorError if a program that is not this key provider listens there. Blocks for some seconds at most.

    Without this check the kernel would let another key provider of the same user join the port.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError:
        return  # the bind fails with a better reason
    for family, _, _, _, address in found:
        if not _is_taken(family, address):
            continue
        if _mark_of(_ANY_ADDRESS.get(str(address[0]), str(address[0])), port) != _mark(system_id):
            raise OperatorError(
                f"{host}:{port} is taken by another program or key provider: set SKIP_TLS_PORT to another port"
            )


def _is_taken(family: socket.AddressFamily, address: tuple[object, ...]) -> bool:
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # With SO_REUSEADDR only a listening socket blocks the bind, not closed connections.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError:
            return True
    return False


def _mark_of(host: str, port: int) -> str | None:
    connection = http.client.HTTPConnection(host, port, timeout=_ASK_SECONDS)
    try:
        connection.request("GET", "/capabilities")
        return connection.getresponse().getheader(_MARK_HEADER)
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def _mark(system_id: str) -> str:
    return hashlib.sha384(b"skipbus TLS port\0" + system_id.encode()).hexdigest()[:32]
