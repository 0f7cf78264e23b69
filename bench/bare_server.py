"""The yardstick for `/capabilities`: aiohttp with uvloop and one handler, the same bytes, nothing else.

Run as `python -m bench.bare_server PORT BODY`.
"""

from __future__ import annotations

import sys

import uvloop
from aiohttp import web

from sandbox.ports import LOOPBACK


def main(port: int, body: bytes) -> None:
    async def answer(request: web.Request) -> web.Response:  # noqa: ARG001 - aiohttp calls it like this
        return web.Response(body=body, content_type="application/json")

    application = web.Application()
    application.router.add_get("/capabilities", answer)
    web.run_app(application, host=LOOPBACK, port=port, access_log=None, print=None, loop=uvloop.new_event_loop())


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2].encode())
