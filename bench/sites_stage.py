"""Two sites to measure: a database, a federated broker and a whole key provider each, and a cable between them.

They are started when the first item asks for them, beside the stage of one store, so that both kinds of link can take
turns. How much stock is kept is each item's own; everything is configured and emptied anew for it.
"""

from __future__ import annotations

import time
from pathlib import Path

from sandbox.client import metric
from sandbox.key_provider import BusPeer, KeyProvider
from sandbox.ports import free_port
from sandbox.processes import wait_until
from sandbox.story import wait_full
from sandbox.two_sites import TwoSites, introduce

BUFFER_POOL_MIB = 512
_READY_SECONDS = 60.0
_FILL_SECONDS = 180.0
_COUNTED_SECONDS = 1.2
_STOCK_OF_BOB = 64
_EMPTIED = ("key_records", "stock", "stock_held", "withdrawn_keys", "outbox")


class SitesStage:
    """Two key providers at two sites. KP_Alice is the source of everything that is measured."""

    def __init__(self, root: Path) -> None:
        root.mkdir()
        self.sites = TwoSites(root, stock=0, tls=False, buffer_pool_mib=BUFFER_POOL_MIB)

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

    def set_up(self, stock: int, *, fill: bool = True) -> None:
        """Start all processes anew, with no key anywhere, and so much stock; with `fill` it is there at the return."""
        for kp in (self.alice, self.bob):
            kp.terminate_all()
        for kp in (self.alice, self.bob):
            kp.stop_all()
        self._empty()
        introduce(self.alice, self.bob, stock=stock)
        # Only one way is measured, so the other one must not take half of the machine.
        self.bob.link_by_bus(BusPeer(self.alice.system_id, self.alice.identity, min(stock, _STOCK_OF_BOB)))
        for kp in (self.alice, self.bob):
            kp.environ_of["api"] = {"SKIP_METRICS_PORT": str(free_port())}
            kp.start_all()
        for kp, remote in ((self.alice, self.bob), (self.bob, self.alice)):
            kp.wait_healthy(_READY_SECONDS)
            if fill:
                kp.wait_key(remote.system_id)
        if stock and fill:
            self.wait_full()

    def on_demand_url(self) -> str:
        """`GET /key` of a size that is never in stock."""
        return f"{self.alice.key_url(self.bob)}&size=512"

    def count_stock(self) -> int:
        """Keys that KP_Alice has made for stock, placed or not, counted in her store."""
        return self._ask(0, "SELECT COUNT(*) FROM stock WHERE local_id = %s", self.alice)

    def count_placed(self) -> int:
        """Keys in stock at KP_Bob that he has acknowledged, counted in KP_Alice's store."""
        return self._ask(0, "SELECT COUNT(*) FROM stock WHERE placed_ms IS NOT NULL AND local_id = %s", self.alice)

    def count_at_bob(self) -> int:
        """Keys of KP_Alice that KP_Bob could serve, counted in his store."""
        return self._ask(1, "SELECT COUNT(*) FROM key_records WHERE source_id = %s", self.alice)

    def issued(self, way: str) -> float:
        """Keys that KP_Alice has answered since she was set up, out of `stock` or `on_demand`, by her own metrics."""
        port = self.alice.environ_of["api"]["SKIP_METRICS_PORT"]
        return sum(metric(port, "skipbus_bus_keys_issued_total", way=way))

    def wait_full(self) -> float:
        """Wait until both stocks are what is configured; how long that took, in seconds. Raises SandboxError."""
        started = time.monotonic()
        # What was counted before the last key was taken says nothing.
        time.sleep(_COUNTED_SECONDS)
        for source, target in ((self.alice, self.bob), (self.bob, self.alice)):
            wait_full(source, target, _FILL_SECONDS)
        return time.monotonic() - started

    def settle(self) -> None:
        """Wait until neither side owes the other any news."""
        wait_until(lambda: self._owed() == 0, "the sites to have sent each other everything")

    def processes(self) -> dict[str, int]:
        """Name -> pid of everything but the client."""
        named = {
            f"{role} {kp.system_id}": kp.processes[role].pid
            for kp in (self.alice, self.bob)
            for role in ("api", "syncer")
        }
        for number, site in enumerate(self.sites.sites, 1):
            named |= {f"database {number}": site.mysql.pid, f"broker {number}": site.rabbitmq.pid}
        return named

    def _empty(self) -> None:
        for server in self.sites.mysql_servers:
            with server.admin_connection() as connection, connection.cursor() as cursor:
                for table in _EMPTIED:
                    cursor.execute(f"TRUNCATE TABLE `{server.database}`.{table}")

    def _ask(self, site: int, statement: str, kp: KeyProvider) -> int:
        """A number from one site's store, about a key provider."""
        server = self.sites.mysql_servers[site]
        with server.admin_connection() as connection, connection.cursor() as cursor:
            connection.select_db(server.database)
            cursor.execute(statement, (kp.system_id,))
            row = cursor.fetchone()
        return int(row[0]) if row else 0

    def _owed(self) -> int:
        """Events that the two have not been sent yet."""
        statement = "SELECT COUNT(*) FROM outbox WHERE local_id = %s"
        return self._ask(0, statement, self.alice) + self._ask(1, statement, self.bob)
