"""The yardstick for `/capabilities`: aiohttp with uvloop and one handler that answers the same bytes.

Run as `python -m bench.bare_handler PORT BODY`, in a process of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvloop
from aiohttp import web

from sandbox.client import get
from sandbox.key_provider import KeyProvider
from sandbox.ports import LOOPBACK, answers, free_port
from sandbox.processes import Child, minimal_environ, wait_until

_REPOSITORY = Path(__file__).resolve().parent.parent


@contextmanager
def bare_handler(root: Path, like: KeyProvider) -> Iterator[str]:
    """A process that answers with the bytes of a key provider's own capabilities; its URL."""
    port, body = free_port(), get(like.url, "capabilities").content.decode()
    child = Child(
        [sys.executable, "-m", "bench.bare_handler", str(port), body],
        environ={**minimal_environ(root), "PYTHONPATH": str(_REPOSITORY)},
        log=root / "bare_handler.log",
        cwd=root,
    )
    try:
        wait_until(lambda: answers(port), "the bare handler to listen")
        yield f"http://{LOOPBACK}:{port}/capabilities"
    finally:
        child.kill()


def main(port: int, body: bytes) -> None:
    async def answer(request: web.Request) -> web.Response:  # noqa: ARG001 - aiohttp calls it like this
        return web.Response(body=body, content_type="application/json")

    application = web.Application()
    application.router.add_get("/capabilities", answer)
    web.run_app(application, host=LOOPBACK, port=port, access_log=None, print=None, loop=uvloop.new_event_loop())


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2].encode())
