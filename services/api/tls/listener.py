"""The TLS port: accepts, bounds what one address may have, and shakes hands, one task a connection.

The event loop's own servers take a context once and say nothing about a handshake that failed. Here every connection
gets the context of its moment, and every refused one its line in the log. When the handshake is done the connection
is aiohttp's, like one of the plain port.

A file descriptor that is not a connection's must be free for the store: handshakes count as connections, and beyond
the limit the oldest handshake makes room. So whoever begins many and ends none drives out himself, and nobody who has
shown who he is. When there are no files all the same, accepting pauses.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
import ssl
from collections import Counter
from typing import Any

from skipbus.services.api.server import BoundedServer, Connection
from skipbus.services.api.tls import port_taken, refusals
from skipbus.services.api.tls.handshakes import ACCEPTED, Accepted
from skipbus.services.api.tls.material import Material
from skipbus.shared.errors import OperatorError
from skipbus.shared.logs import get_logger

_BACKLOG = 4096
_ACCEPTS_AT_A_TIME = 64
_PAUSE_SECONDS = 0.2
_SHUTDOWN_SECONDS = 2.0
_log = get_logger("tls")


class TlsListener:
    """Hands connections to ``server`` once their handshake is done."""

    def __init__(
        self,
        server: BoundedServer,
        material: Material,
        *,
        handshake_timeout_seconds: float,
        max_connections_per_address: int,
        system_id: str,
    ) -> None:
        self._server = server
        self._material = material
        self._timeout_seconds = handshake_timeout_seconds
        self._max_per_address = max_connections_per_address
        self._plain_answer = port_taken.plain_answer(system_id)
        self._system_id = system_id
        self._sockets: list[socket.socket] = []
        # In the order in which they began, with their clients' addresses.
        self._handshakes: dict[asyncio.Task[None], str] = {}
        self._of_address: Counter[str] = Counter()
        self._crowded: set[str] = set()

    async def listen(self, host: str, port: int) -> None:
        """Binds and accepts from now on. Raises OperatorError, also where the port is another key provider's."""
        await asyncio.to_thread(port_taken.refuse_foreign, host, port, self._system_id)
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
        _log.info("listening", host=host, port=port, tls=True, psk_identities=self._material.psk_count)

    @property
    def handshaking(self) -> bool:
        """Whether a connection has yet to end its handshake."""
        return bool(self._handshakes)

    def stop_accepting(self) -> None:
        """No new connections; those that the kernel took already are served, and handshakes go on."""
        for bound in self._sockets:
            self._accept(bound)
            with contextlib.suppress(RuntimeError):
                asyncio.get_running_loop().remove_reader(bound)
            bound.close()
        self._sockets.clear()

    def close(self) -> None:
        """No new connections, and none that are still shaking hands; the others are the server's."""
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
                # Out of files or memory: whoever waits in the backlog is served when others have gone.
                _log.error("cannot accept", reason=error.strerror or str(error))
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
        # One that is cancelled before its first step never sees it: what it holds is given back here.
        if handshake.cancelled():
            accepted.close()
            self._release(address)

    def _make_room(self) -> None:
        while self._handshakes and self._is_full():
            oldest = next(iter(self._handshakes))
            refusals.log_refusal(self._handshakes.pop(oldest), refusals.CROWDED_OUT)
            oldest.cancel()

    def _is_full(self) -> bool:
        return len(self._handshakes) + self._server.connection_count >= self._server.max_connections

    def _has_room(self, address: str) -> bool:
        if self._of_address[address] < self._max_per_address:
            return True
        # One line when it begins, not one for every connection of whoever does this.
        if address not in self._crowded:
            self._crowded.add(address)
            refusals.log_refusal(address, refusals.TOO_MANY, limit=self._max_per_address)
        return False

    async def _shake_hands(self, accepted: socket.socket, address: str) -> None:
        ACCEPTED.set(Accepted(address, accepted, refusals.log_failure, self._plain_answer))
        release = functools.partial(self._release, address)
        made = self._server()
        if not isinstance(made, Connection):
            raise TypeError("the server makes connections of its own kind")
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: made,
                accepted,
                ssl=self._material.context,
                ssl_handshake_timeout=self._timeout_seconds,
                ssl_shutdown_timeout=_SHUTDOWN_SECONDS,
            )
        except Exception as error:  # noqa: BLE001 -- whatever it was, the address gets its place back
            release()
            self._tell(address, error)
        else:
            made.when_lost(release)
            _acknowledge(accepted)

    def _tell(self, address: str, error: Exception) -> None:
        if isinstance(error, ssl.SSLError):
            return  # the handshake itself has told why
        if isinstance(error, ConnectionAbortedError | TimeoutError):
            refusals.log_refusal(address, refusals.TIMEOUT.format(seconds=self._timeout_seconds))
        elif isinstance(error, OSError):
            refusals.log_refusal(address, refusals.GONE)
        else:
            _log.error("handshake failed", client=address, exc_info=error)

    def _release(self, address: str) -> None:
        self._of_address[address] -= 1
        if self._of_address[address] <= 0:
            del self._of_address[address]
            self._crowded.discard(address)


def _acknowledge(accepted: socket.socket) -> None:
    """Lets a client go on at once that waits, by Nagle's rule, for its last message to be acknowledged.

    In TLS 1.3 the server has nothing to say after the handshake, and the kernel would wait 40 ms to say only that.
    """
    with contextlib.suppress(OSError):
        accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)


def _bound(family: socket.AddressFamily, address: tuple[Any, ...]) -> socket.socket:
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Every api process of a KP binds the same port; the kernel spreads connections over them.
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
