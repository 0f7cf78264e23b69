"""The floor of item 3: a bare handler on aiohttp and uvloop that commits what a key is made of, and makes no key.

For each request it sends two INSERTs (the shape of a key record, and of an event for a peer) and a COMMIT in one
packet, through the api's own connection, and answers when they are committed. Nothing is sealed, checked, counted or
logged.

Run as `python -m bench.bare_key_server PORT`; `MYSQL_HOST`, `_PORT`, `_USER`, `_PASSWORD` and `_DATABASE` say where.
Makes two tables of its own there.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time

import pymysql
import uvloop
from aiohttp import web
from pymysql.constants import CLIENT

from sandbox.ports import LOOPBACK
from skipbus.shared.store.line import StoreLine
from skipbus.shared.store.results import Rows
from skipbus.shared.store.steps import Statement

PATH = "/key"
_RECORDS, _EVENTS = "bench_bare_records", "bench_bare_events"
_KEY_TTL_MS = 3_600_000
_BODY = b'{"keyId":"%b","key":"%b"}'


def main(port: int) -> None:
    application = web.Application()
    application.on_startup.append(_connect)
    application.router.add_get(PATH, _answer)
    web.run_app(application, host=LOOPBACK, port=port, access_log=None, print=None, loop=uvloop.new_event_loop())


_LINE = web.AppKey("line", StoreLine)


async def _connect(application: web.Application) -> None:
    connection = pymysql.connect(
        host=os.environ["MYSQL_HOST"],
        port=int(os.environ["MYSQL_PORT"]),
        user=os.environ["MYSQL_USER"],
        password=os.environ["MYSQL_PASSWORD"],
        database=os.environ["MYSQL_DATABASE"],
        client_flag=CLIENT.MULTI_STATEMENTS,
    )
    with connection.cursor() as cursor:
        for table, like in ((_RECORDS, "key_records"), (_EVENTS, "outbox")):
            cursor.execute(f"DROP TABLE IF EXISTS {table}")
            cursor.execute(f"CREATE TABLE {table} LIKE {like}")
    connection.commit()
    application[_LINE] = StoreLine(connection, asyncio.get_running_loop())


async def _answer(request: web.Request) -> web.Response:
    committed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def told(_rows: Rows, error: BaseException | None) -> None:
        if error is None:
            committed.set_result(None)
        else:
            committed.set_exception(error)

    random = os.urandom(172).hex()
    request.app[_LINE].send(Statement(_statements(random)), told)
    await committed
    body = _BODY % (random[:32].encode(), random[-64:].encode())
    return web.Response(body=body, content_type="application/json")


def _statements(random: str) -> str:
    now_ms = time.time_ns() // 1_000_000
    return (
        f"INSERT INTO {_RECORDS} (target_id, expires_ms, key_id, source_id, size_bits, wrapping_key_id, nonce, sealed, "
        f"correlation_id) VALUES ('KP_Bob',{now_ms + _KEY_TTL_MS},0x{random[:32]},'KP_Alice',256,0x{random[32:64]},"
        f"0x{random[64:88]},0x{random[88:184]},'{random[:12]}');"
        f"INSERT INTO {_EVENTS} (local_id, peer_id, type, payload, items, token, created_ms) VALUES "
        f"('KP_Alice','KP_Bob','key.issued',0x{random[184:280]},1,0x{random[40:72]},{now_ms});COMMIT"
    )


if __name__ == "__main__":
    main(int(sys.argv[1]))
