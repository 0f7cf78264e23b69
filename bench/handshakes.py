"""A client that does nothing but full TLS handshakes, several at a time, and counts them.

Before Python 3.13 the ssl module has no pre-shared keys, so the key is offered through the same door as the api's
callbacks use. Each handshake is a connection of its own; it is ended as soon as the server has agreed.
"""

from __future__ import annotations

import ctypes
import secrets
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from sandbox.ports import LOOPBACK
from skipbus.services.api.tls import openssl

_THREADS = 4
_TIMEOUT_SECONDS = 10.0
_NO_LINGERING = struct.pack("ii", 1, 0)


@dataclass
class Shaker:
    """Shakes hands with one port. A context in C points to ``_kept``, so that it has to live as long."""

    port: int
    context: ssl.SSLContext
    refused_is_fine: bool = False
    _kept: list[object] = field(default_factory=list, repr=False)

    def rate(self, seconds: float) -> float:
        """Full handshakes a second."""
        stop_at = time.monotonic() + seconds
        started = time.perf_counter()
        done = self._in_threads(lambda _count: time.monotonic() < stop_at)
        return done / (time.perf_counter() - started)

    def run(self, count: int) -> float:
        """So many handshakes; how many a second."""
        started = time.perf_counter()
        done = self._in_threads(lambda so_far: so_far < count // _THREADS)
        return done / (time.perf_counter() - started)

    def _in_threads(self, go_on: Callable[[int], bool]) -> int:
        done = [0] * _THREADS
        failures: list[BaseException] = []

        def shake(index: int) -> None:
            try:
                while go_on(done[index]):
                    self._once()
                    done[index] += 1
            except OSError as error:
                failures.append(error)

        threads = [threading.Thread(target=shake, args=(index,)) for index in range(_THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]
        return sum(done)

    def _once(self) -> None:
        raw = socket.create_connection((LOOPBACK, self.port), timeout=_TIMEOUT_SECONDS)
        # Ended by a reset, so that a hundred thousand do not use up the ports.
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGERING)
        try:
            with self.context.wrap_socket(raw) as connection:
                if connection.version() == "TLSv1.3":
                    # The server's side ends with the client's last message: only an answer shows that it has agreed.
                    connection.sendall(b"GET /capabilities HTTP/1.1\r\nHost: kp\r\n\r\n")
                    connection.recv(1)
        except (ssl.SSLError, ConnectionError):
            if not self.refused_is_fine:
                raise


def with_psk(port: int, identity: str, key_hex: str, suite: str) -> Shaker:
    """TLS 1.2 with a pre-shared key."""
    key = bytes.fromhex(key_hex)
    return _psk_shaker(port, suite, identity.encode, key, refused_is_fine=False)


def with_random_identities(port: int) -> Shaker:
    """TLS 1.2 with identities that nobody has: every handshake is refused."""
    return _psk_shaker(
        port,
        "PSK-AES256-GCM-SHA384",
        lambda: secrets.token_hex(30).encode(),
        secrets.token_bytes(32),
        refused_is_fine=True,
    )


def with_certificate(port: int, version: ssl.TLSVersion) -> Shaker:
    """The server's certificate, and none of the client's."""
    context = _client_context(version)
    return Shaker(port, context)


def _psk_shaker(port: int, suite: str, identity: Callable[[], bytes], key: bytes, *, refused_is_fine: bool) -> Shaker:
    context = _client_context(ssl.TLSVersion.TLSv1_2)
    context.set_ciphers(suite)

    def offer(_ssl: int, _hint: bytes | None, identity_room: int, _most: int, key_room: int, _most_key: int) -> int:
        text = identity() + b"\0"
        ctypes.memmove(identity_room, text, len(text))
        ctypes.memmove(key_room, key, len(key))
        return len(key)

    callback = openssl.PskClientCallback(offer)
    openssl.library().SSL_CTX_set_psk_client_callback(openssl.context_pointer(context), callback)
    return Shaker(port, context, refused_is_fine, [callback])


def _client_context(version: ssl.TLSVersion) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.minimum_version = context.maximum_version = version
    return context
