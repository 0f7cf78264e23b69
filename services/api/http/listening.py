"""Opens the plain port, and closes all ports so that every client gets its answer.

Keys are not encrypted on the plain port: it is on loopback unless the operator allows another address. All api
processes of one KP share it (SO_REUSEPORT). The kernel would let a second KP with the same port by mistake answer some
of the encryptors, and a wrong localSystemID breaks tunnels: an api that finds the port in use asks for its
localSystemID.
"""

from __future__ import annotations

import asyncio
import http.client
import ipaddress
import json
import socket

from aiohttp import web

from skipbus.services.api.app import Application
from skipbus.services.api.http.server import BoundedServer
from skipbus.services.api.tls.material import Tls
from skipbus.shared.errors import OperatorError
from skipbus.shared.logging import get_logger
from skipbus.shared.settings import Settings

_BACKLOG = 4096
_ASK_SECONDS = 2.0
_ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 -- compared with, not bound
# How long a client may take to its next request. Clients that only hold connections must not delay the end.
_GRACE_SECONDS = 2.0
_POLL_SECONDS = 0.01

_log = get_logger("listening")


async def listen(runner: web.BaseRunner, settings: Settings) -> None:
    """Starts to accept connections. Raises OperatorError if the port is not available or is another KP's."""
    host, port, system_id = _plain_host(settings), settings.port, settings.local_system_id
    if await asyncio.to_thread(_is_taken, host, port):
        other = await asyncio.to_thread(_who_listens, _ANY_ADDRESS.get(host, host), port)
        if other != system_id:
            raise OperatorError(f"{host}:{port} is taken by {other}: give this key provider another SKIP_PORT")
    site = web.TCPSite(runner, host, port, backlog=_BACKLOG, reuse_port=True)
    try:
        await site.start()
    except OSError as error:
        raise OperatorError(
            f"cannot listen on {host}:{port}: {error.strerror or error} (SKIP_HOST, SKIP_PORT)"
        ) from error
    _log.info("listening", host=host, port=port)


async def drain(application: Application, runner: web.BaseRunner, server: BoundedServer, tls: Tls) -> None:
    """Accepts no new connections, and returns once no client is likely to send a request, at the latest after 2 s.

    A client cannot tell a connection that closes without any answer from a broken key provider: new clients finish
    their handshake and send their first request, and clients that use a connection again and again send one more. Each
    answer closes its connection. One that has been idle for 2 s may be closed at any time (RFC 9112, 9.5). The server's
    own shutdown answers requests in progress.
    """
    application.ends_connections = True
    tls.stop_accepting()
    for site in list(runner.sites):
        await site.stop()
    deadline = asyncio.get_running_loop().time() + _GRACE_SECONDS
    while tls.handshaking or server.expects_requests(_GRACE_SECONDS):
        if asyncio.get_running_loop().time() > deadline:
            return
        await asyncio.sleep(_POLL_SECONDS)


def _plain_host(settings: Settings) -> str:
    """The host to bind to. Logs a warning if it is not the configured one, or not loopback."""
    if _is_loopback(settings.host):
        return settings.host
    if settings.allow_plaintext:
        _log.warning("keys are served without TLS", host=settings.host, port=settings.port, why="SKIP_ALLOW_PLAINTEXT")
        return settings.host
    loopback = "::1" if ":" in settings.host else "127.0.0.1"
    _log.warning(
        "plain port on loopback only",
        host=loopback,
        port=settings.port,
        reason=f"SKIP_HOST is {settings.host}, and keys would leave this host in the clear",
        fix="use SKIP_TLS_PORT, or set SKIP_ALLOW_PLAINTEXT=1",
    )
    return loopback


def _is_loopback(host: str) -> bool:
    """Whether only this host can reach it. A name other than localhost may be any address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() in ("localhost", "localhost.localdomain", "ip6-localhost")


def _is_taken(host: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # With SO_REUSEADDR only a listening socket blocks the bind, not closed connections.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return True
    return False


def _who_listens(host: str, port: int) -> str:
    """The localSystemID of the program that listens, or words about it."""
    connection = http.client.HTTPConnection(host, port, timeout=_ASK_SECONDS)
    try:
        connection.request("GET", "/capabilities")
        return f"{json.loads(connection.getresponse().read(65536))['localSystemID']}"
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError):
        return "a program that is no key provider, or does not answer"
    finally:
        connection.close()
