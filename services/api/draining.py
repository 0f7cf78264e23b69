"""The end of an api process that costs no client its answer.

Order: take no more connections; let those that came in the last moment shake hands and send their first request; tell
every client with its answer that the connection ends. Closing a connection that has had no request is what a client
cannot tell from a key provider that is broken. One that has been idle since its last answer may be closed at any
time: HTTP clients know that (RFC 9112, 9.5). Leaves to others: requests in hand (the server's own shutdown).
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
