"""The api of a testkit container: the image's own ``skip-api`` whose requests are recorded, delayed and failed.

It wraps the request handler that the api gives to aiohttp's server, so TLS, pre-shared keys and certificates stay the
api's. A second port takes the tester's orders.

Rules: a record has no body of a request or an answer, so it holds no key. An order needs the token of
``SKIPBUS_TESTKIT_TOKEN``.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import os
import sys
import time
from collections import deque
from collections.abc import Awaitable, Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import entry_points
from threading import Lock, Thread
from typing import Any

from aiohttp import web

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]
_KEPT_REQUESTS = 10_000


class Faults:
    """The tester's orders, and the recorded requests. Used by two threads: the api's loop and the control server."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._slow_ms = 0
        self._failures: list[tuple[str, int]] = []
        self._records: deque[dict[str, Any]] = deque(maxlen=_KEPT_REQUESTS)

    def slow(self, ms: int) -> None:
        """Every request takes ``ms`` milliseconds longer."""
        self._slow_ms = ms

    def fail(self, path: str, status: int) -> None:
        """The next request for ``path`` is answered ``status``."""
        with self._lock:
            self._failures.append((path, status))

    def reset(self) -> None:
        """No delay, no failures, no records."""
        with self._lock:
            self._slow_ms = 0
            self._failures.clear()
            self._records.clear()

    def requests(self) -> list[dict[str, Any]]:
        """The recorded requests, the oldest first."""
        with self._lock:
            return list(self._records)

    def around(self, handler: Handler) -> Handler:
        """The api's handler with these faults."""

        async def handle(request: web.BaseRequest) -> web.StreamResponse:
            begun = time.monotonic()
            if self._slow_ms:
                await asyncio.sleep(self._slow_ms / 1000)
            response = self._failure(request) or await handler(request)
            self._record(request, response.status, time.monotonic() - begun)
            return response

        return handle

    def _failure(self, request: web.BaseRequest) -> web.Response | None:
        path = request.raw_path.partition("?")[0]
        with self._lock:
            for number, (wanted, status) in enumerate(self._failures):
                if path == wanted or (wanted.endswith("/") and path.startswith(wanted)):
                    del self._failures[number]
                    return web.json_response({"error": "the testkit was told to fail this request"}, status=status)
        return None

    def _record(self, request: web.BaseRequest, status: int, seconds: float) -> None:
        path, _, query = request.raw_path.partition("?")
        # The api notes the caller's TLS identity at its connection.
        caller = getattr(request.protocol, "caller", None)
        who, proof = (caller.shown, caller.proof) if caller else ("-", "none")
        # The fields of `skipbus_testkit.provider.RecordedRequest`.
        record = {
            "at_seconds": time.time(),
            "method": request.method,
            "path": path,
            "query": query,
            "status": status,
            "duration_ms": round(seconds * 1000, 3),
            "caller": who,
            "proof": proof,
        }
        with self._lock:
            self._records.append(record)


class ControlServer(ThreadingHTTPServer):
    """Takes the tester's orders: POST /slow, /fail and /reset with their arguments in JSON, and GET /requests."""

    daemon_threads = True

    def __init__(self, faults: Faults, port: int, token: str) -> None:
        super().__init__(("0.0.0.0", port), _Control)  # noqa: S104 -- the engine publishes it
        self.faults = faults
        self.authorization = f"Bearer {token}"


class _Control(BaseHTTPRequestHandler):
    server: ControlServer

    def do_GET(self) -> None:
        self._answer({"/requests": self.server.faults.requests}, {})

    def do_POST(self) -> None:
        faults = self.server.faults
        order = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self._answer({"/slow": faults.slow, "/fail": faults.fail, "/reset": faults.reset}, order)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 -- the base class's name
        """Orders are not logged."""

    def _answer(self, orders: dict[str, Callable[..., object]], arguments: dict[str, Any]) -> None:
        if not hmac.compare_digest(self.headers.get("Authorization", ""), self.server.authorization):
            self.send_error(403)
        elif self.path not in orders:
            self.send_error(404)
        else:
            body = json.dumps(orders[self.path](**arguments)).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)


def main() -> int:
    """Runs ``skip-api``, whose handler is wrapped when it makes its server."""
    faults = Faults()
    make_server = web.Server.__init__

    def make_faulty_server(server: web.Server, handler: Handler, **options: Any) -> None:  # noqa: ANN401 -- handed on
        make_server(server, faults.around(handler), **options)

    web.Server.__init__ = make_faulty_server  # type: ignore[method-assign, assignment]
    port, token = os.environ["SKIPBUS_TESTKIT_CONTROL_PORT"], os.environ["SKIPBUS_TESTKIT_TOKEN"]
    Thread(target=ControlServer(faults, int(port), token).serve_forever, name="testkit control", daemon=True).start()
    (skip_api,) = entry_points(group="console_scripts", name="skip-api")
    sys.argv = ["skip-api"]
    code: int = skip_api.load()()
    return code


if __name__ == "__main__":
    sys.exit(main())
