"""Two sites to measure: a database, a federated broker and a whole key provider each, and a cable between them.

They are started when the first item asks for them, beside the stage of one store, so that both kinds of link can take
turns. How much stock is kept is each item's own; everything is configured and emptied anew for it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bench.waiting import key_url, wait_for_keys, wait_until
from sandbox.cut_story import stock_of
from sandbox.key_provider import KeyProvider
from sandbox.sites import Sites, introduce

BUFFER_POOL_MIB = 512
_READY_SECONDS = 60.0
_FILL_SECONDS = 180.0
_COUNTED_SECONDS = 1.2
_EMPTIED = ("key_records", "stock", "stock_held", "withdrawn_keys", "outbox")


@dataclass(frozen=True)
class Stock:
    """What KP_Alice has at KP_Bob, by her own count."""

    placed: int
    in_flight: int


class SitesStage:
    """Two key providers at two sites. KP_Alice is the source of everything that is measured."""

    def __init__(self, root: Path) -> None:
        root.mkdir()
        self.sites = Sites(root, stock=0, tls=False, buffer_pool_mib=BUFFER_POOL_MIB)

    def start(self) -> None:
        self.sites.start_servers()
        self.sites.start_key_providers()

    def stop(self) -> None:
        self.sites.stop()

    @property
    def alice(self) -> KeyProvider:
        return self.sites.key_providers[0]

    @property
    def bob(self) -> KeyProvider:
        return self.sites.key_providers[1]

    def set_up(self, stock: int, environ: Mapping[str, str] | None = None) -> None:
        """Start all processes anew, with no key anywhere, and so much stock, which is there when this returns."""
        for kp in (self.alice, self.bob):
            kp.terminate_all()
        for kp in (self.alice, self.bob):
            kp.stop_all()
        self._empty()
        introduce(self.alice, self.bob, stock=stock)
        for kp in (self.alice, self.bob):
            kp.environ.update(environ or {})
            kp.start_all()
        for kp, remote in ((self.alice, self.bob), (self.bob, self.alice)):
            kp.wait_healthy(_READY_SECONDS)
            wait_for_keys(kp, remote.system_id)
        if stock:
            self.wait_full()

    def on_demand_url(self) -> str:
        """`GET /key` of a size that is never in stock."""
        return f"{key_url(self.alice, self.bob)}&size=512"

    def stock(self) -> Stock:
        shown = stock_of(self.alice, self.bob)
        return Stock(shown["placed"], shown["in_flight"])

    def wait_full(self) -> float:
        """Wait until both stocks are what is configured; how long that took, in seconds. Raises SandboxError."""
        started = time.monotonic()
        # What was counted before the last key was taken says nothing.
        time.sleep(_COUNTED_SECONDS)
        wait_until(self._is_full, "the stock to be full", _FILL_SECONDS)
        return time.monotonic() - started

    def settle(self) -> None:
        """Wait until neither side owes the other any news."""
        wait_until(lambda: self._count("outbox") == 0, "the sites to have told each other everything")

    def processes(self) -> dict[str, int]:
        """Name -> pid of everything but the client."""
        named = {
            f"{role} {kp.system_id}": kp.processes[role].pid
            for kp in (self.alice, self.bob)
            for role in ("api", "syncer")
        }
        for number, half in enumerate(self.sites.halves, 1):
            named |= {f"database {number}": half.mysql.pid, f"broker {number}": half.rabbitmq.pid}
        return named

    def _is_full(self) -> bool:
        for source, target in ((self.alice, self.bob), (self.bob, self.alice)):
            shown = stock_of(source, target)
            if shown["placed"] < shown["configured"]:
                return False
        return True

    def _empty(self) -> None:
        for server in self.sites.mysql_servers:
            with server.admin_connection() as connection, connection.cursor() as cursor:
                for table in _EMPTIED:
                    cursor.execute(f"TRUNCATE TABLE `{server.database}`.{table}")

    def _count(self, table: str) -> int:
        total = 0
        for server in self.sites.mysql_servers:
            with server.admin_connection() as connection, connection.cursor() as cursor:
                cursor.execute(f"SELECT COUNT(*) FROM `{server.database}`.{table}")
                row = cursor.fetchone()
                total += int(row[0]) if row else 0
        return total
