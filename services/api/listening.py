"""Binds the plain port, which all api processes of one KP share (SO_REUSEPORT), and refuses another KP's port.

The kernel lets any process of the same user join a shared port and gives it a part of the connections. A second KP
with the same port by mistake would answer some encryptors of the first one, and a wrong localSystemID breaks tunnels.
So an api that finds the port in use asks for its localSystemID.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import socket

from aiohttp import web

from skipbus.shared.errors import OperatorError
from skipbus.shared.logging import get_logger

_BACKLOG = 4096
_ASK_SECONDS = 2.0
_ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 -- compared with, not bound

_log = get_logger("listening")


async def listen(runner: web.BaseRunner, host: str, port: int, system_id: str) -> None:
    """Starts to accept connections. Raises OperatorError if the port is not available or is another KP's."""
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
