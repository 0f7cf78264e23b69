"""Ends an api process so that every client gets its answer.

Order: accept no new connections; let new clients finish their handshake and send their first request; close each
connection with its next answer. A client cannot distinguish a connection that closes without any request from a broken
key provider. A connection that is idle after an answer may be closed at any time (RFC 9112, 9.5). The server's own
shutdown answers requests in progress.
"""

from __future__ import annotations

import asyncio

from aiohttp import web

from skipbus.services.api.app import Application
from skipbus.services.api.server import BoundedServer
from skipbus.services.api.tls.serving import Tls

# How long a new client may take to its first request. Clients that only hold connections must not delay the end.
GRACE_SECONDS = 2.0
_POLL_SECONDS = 0.01


async def drain(application: Application, runner: web.BaseRunner, server: BoundedServer, tls: Tls) -> None:
    """Returns once nobody new waits to be served, at the latest after GRACE_SECONDS."""
    application.ends_connections = True
    tls.stop_accepting()
    for site in list(runner.sites):
        await site.stop()
    deadline = asyncio.get_running_loop().time() + GRACE_SECONDS
    while tls.handshaking or server.any_expectant(GRACE_SECONDS):
        if asyncio.get_running_loop().time() > deadline:
            return
        await asyncio.sleep(_POLL_SECONDS)
