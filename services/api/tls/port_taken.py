"""Whose a TLS port is that is taken already: all api processes of one key provider share it, and nobody else may.

The kernel would let a second key provider of the same user join the port and answer some of the first one's
encryptors (``services/api/listening.py`` says the same of the plain port). Whoever speaks HTTP without TLS to a TLS
port is told so in HTTP, and that answer carries a mark of the key provider, by which its own processes know each other.
The mark is a hash: a stranger learns nothing by it that he did not know.
"""

from __future__ import annotations

import hashlib
import http.client
import socket

from skipbus.shared.errors import OperatorError

_ASK_SECONDS = 2.0
_MARK_HEADER = "X-KP"
_ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 -- compared with, not bound


def plain_answer(system_id: str) -> bytes:
    """What is said to HTTP without TLS."""
    body = b'{"error":"this port speaks HTTPS only"}'
    return (
        b"HTTP/1.1 400 Bad Request\r\nContent-Type: application/json; charset=utf-8\r\nConnection: close\r\n"
        b"%b: %b\r\nContent-Length: %d\r\n\r\n%b" % (_MARK_HEADER.encode(), _mark(system_id).encode(), len(body), body)
    )


def refuse_foreign(host: str, port: int, system_id: str) -> None:
    """Raises OperatorError where somebody listens who is not this key provider. Blocks for seconds at most."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError:
        return  # binding tells it better
    for family, _, _, _, address in found:
        if not _is_taken(family, address):
            continue
        if _mark_of(_ANY_ADDRESS.get(str(address[0]), str(address[0])), port) != _mark(system_id):
            raise OperatorError(
                f"{host}:{port} is taken by another program or key provider: set SKIP_TLS_PORT to another port"
            )


def _is_taken(family: socket.AddressFamily, address: tuple[object, ...]) -> bool:
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # With SO_REUSEADDR only a listening socket is in the way, not what is left of closed connections.
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
