"""The proxy between an encryptor and the api in a testkit container: it records requests, slows and fails them.

TLS is served by the api's own code, with the same suites, pre-shared keys and certificates; requests go on to the api's
plain port as they came. Nothing of it runs in a key provider that is not a testkit's.

Rules: a record has no body, neither way, so it holds no key. The control port takes orders with the token of
``SKIPBUS_TESTKIT_TOKEN`` only.
"""

from __future__ import annotations

import asyncio
import functools
import hmac
import os
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass, field
from typing import Any

import aiohttp
from aiohttp import web
from yarl import URL

from skipbus.services.api.server import BoundedServer
from skipbus.services.api.tls.serving import Tls
from skipbus.shared.config import Settings, load_settings_or_exit
from skipbus.shared.lifecycle import run_service
from skipbus.shared.logs import configure_logging
from skipbus_testkit.proxy_control import CONTROL_PORT, TOKEN_VARIABLE

_KEPT_REQUESTS = 10_000
_PASSED_ON = ("Content-Type", "Cache-Control", "Allow", "Retry-After", "X-Request-ID")


@dataclass
class Orders:
    """What the tester wants to happen to requests."""

    slow_ms: int = 0
    failures: list[tuple[str, int]] = field(default_factory=list)

    def take_failure(self, path: str) -> int | None:
        """The status that a request for ``path`` is to fail with, once."""
        for number, (wanted, status) in enumerate(self.failures):
            if path == wanted or (wanted.endswith("/") and path.startswith(wanted)):
                del self.failures[number]
                return status
        return None


@dataclass(frozen=True)
class Record:
    """One request as it was seen."""

    at_seconds: float
    method: str
    path: str
    query: str
    status: int
    duration_ms: float
    caller: str
    proof: str


class Proxy:
    """Handles encryptors' requests."""

    def __init__(self, settings: Settings, session: aiohttp.ClientSession) -> None:
        self._base = f"http://127.0.0.1:{settings.port}"
        self._session = session
        self.orders = Orders()
        self.records: deque[Record] = deque(maxlen=_KEPT_REQUESTS)

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Passes a request on, or does with it what was ordered."""
        begun = time.monotonic()
        caller = getattr(request.protocol, "caller", None)
        response = await self._answer(request)
        path, _, query = request.raw_path.partition("?")
        self.records.append(
            Record(
                time.time(),
                request.method,
                path,
                query,
                response.status,
                round((time.monotonic() - begun) * 1000, 3),
                caller.shown if caller else "-",
                caller.proof if caller else "none",
            )
        )
        return response

    async def _answer(self, request: web.BaseRequest) -> web.Response:
        if self.orders.slow_ms:
            await asyncio.sleep(self.orders.slow_ms / 1000)
        failure = self.orders.take_failure(request.raw_path.partition("?")[0])
        if failure is not None:
            return web.json_response({"error": "the testkit was told to fail this request"}, status=failure)
        try:
            return await self._pass_on(request)
        except aiohttp.ClientError:
            return web.json_response({"error": "the api of this testkit does not answer"}, status=500)

    async def _pass_on(self, request: web.BaseRequest) -> web.Response:
        url = URL(self._base + request.raw_path, encoded=True)
        async with self._session.request(request.method, url, allow_redirects=False) as answer:
            headers = {name: answer.headers[name] for name in _PASSED_ON if name in answer.headers}
            return web.Response(status=answer.status, body=await answer.read(), headers=headers)


class Control:
    """The tester's orders and questions, over a port of their own."""

    def __init__(self, proxy: Proxy, token: str) -> None:
        self._proxy = proxy
        self._token = token

    def application(self) -> web.Application:
        """The routes."""
        application = web.Application(middlewares=[self._check])
        application.add_routes(
            [
                web.post("/slow", self._slow),
                web.post("/fail", self._fail),
                web.post("/reset", self._reset),
                web.get("/requests", self._requests),
            ]
        )
        return application

    @web.middleware
    async def _check(self, request: web.Request, handler: Any) -> web.StreamResponse:  # noqa: ANN401 -- aiohttp's own
        if not hmac.compare_digest(request.headers.get("Authorization", ""), f"Bearer {self._token}"):
            raise web.HTTPForbidden
        response: web.StreamResponse = await handler(request)
        return response

    async def _slow(self, request: web.Request) -> web.Response:
        self._proxy.orders.slow_ms = int((await request.json())["ms"])
        return web.json_response({})

    async def _fail(self, request: web.Request) -> web.Response:
        order = await request.json()
        self._proxy.orders.failures.append((str(order["path"]), int(order["status"])))
        return web.json_response({})

    async def _reset(self, _request: web.Request) -> web.Response:
        self._proxy.orders.slow_ms = 0
        self._proxy.orders.failures.clear()
        self._proxy.records.clear()
        return web.json_response({})

    async def _requests(self, _request: web.Request) -> web.Response:
        return web.json_response([asdict(record) for record in self._proxy.records])


async def serve(settings: Settings, token: str, stop: asyncio.Event) -> None:
    """Serves encryptors and the tester until ``stop``."""
    tls = Tls(settings)
    # A request for each of them: a connection kept to an api that starts anew would fail one.
    connector = aiohttp.TCPConnector(force_close=True, limit=0)
    async with aiohttp.ClientSession(connector=connector, auto_decompress=False) as session:
        proxy = Proxy(settings, session)
        server = BoundedServer(
            proxy.handle,
            keepalive_timeout=settings.keepalive_seconds,
            max_connections=settings.max_connections,
            header_timeout_seconds=settings.header_timeout_seconds,
        )
        control = web.AppRunner(Control(proxy, token).application(), handle_signals=False)
        await control.setup()
        try:
            await web.TCPSite(control, "0.0.0.0", CONTROL_PORT).start()  # noqa: S104 -- the engine publishes it
            await tls.listen(server)
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(server.sweep(stop), name="connection sweep")
        finally:
            tls.close()
            await server.shutdown(1.0)
            await control.cleanup()


def main() -> int:
    """``python -m skipbus_testkit.proxy``, in the container."""
    settings = load_settings_or_exit(os.environ, "skipbus-testkit-proxy")
    configure_logging(settings, "testkit")
    return run_service(functools.partial(serve, settings, os.environ[TOKEN_VARIABLE]))


if __name__ == "__main__":
    sys.exit(main())
