"""What `make demo TOPOLOGY=sites` runs: two sites, each with a MariaDB, a RabbitMQ and a key provider of its own.

The brokers fetch from each other by federation, over a cable that can be cut. Nothing else joins the sites: keys
cross it sealed, and each key provider answers from its own store. The cable is a thread of this process.
"""

from __future__ import annotations

from pathlib import Path

from sandbox.cable import Cable
from sandbox.key_provider import BusPeer, KeyProvider
from sandbox.servers import MariaDbServer, RabbitMqServer
from sandbox.topology import ALICE, BOB, Topology, take_ports

_OF_A_SITE = ("", "'s TLS", "'s MySQL", "'s RabbitMQ", "'s RabbitMQ's distribution", "'s epmd", "'s end of the cable")
# Those of a key provider come first, so that PORT_BASE and the port after it answer encryptors, as in one site.
PORTS = tuple(f"{name}{what}" for what in _OF_A_SITE for name in (ALICE, BOB))
STOCK = 64
_BUFFER_POOL_MIB = 256


class _Half:
    """One site. `ports` are in the order of `_OF_A_SITE`."""

    def __init__(
        self, system_id: str, remote_id: str, root: Path, logs: Path, ports: list[int], buffer_pool_mib: int
    ) -> None:
        logs.mkdir(mode=0o700)
        self.system_id = system_id
        self._remote_id = remote_id
        self._root = root
        self._logs = logs
        self._ports = ports
        self.cable_port = ports[6]
        self.mysql = MariaDbServer(
            root / "mysql",
            port=ports[2],
            log=logs / "mysql.log",
            buffer_pool_mib=buffer_pool_mib,
            log_file_mib=buffer_pool_mib // 2,
        )
        self.rabbitmq = RabbitMqServer(
            root / "rabbitmq", port=ports[3], dist_port=ports[4], epmd_port=ports[5], log=logs / "rabbitmq.log"
        )

    def key_provider(self, *, tls: bool) -> KeyProvider:
        key_provider = KeyProvider(
            self.system_id,
            [self._remote_id],
            self.mysql.dsn,
            self.rabbitmq.url,
            self._ports[0],
            root=self._root / "key provider",
            log_dir=self._logs,
        )
        if tls:
            key_provider.serve_tls(self._ports[1])
        return key_provider


class TwoSites(Topology):
    """Two sites and the line between them."""

    PORTS = PORTS

    def __init__(
        self,
        root: Path,
        port_base: int | None = None,
        *,
        stock: int = STOCK,
        tls: bool = True,
        buffer_pool_mib: int = _BUFFER_POOL_MIB,
    ) -> None:
        """Raises SandboxError when a port from `port_base` on is taken."""
        super().__init__(root)
        self._stock = stock
        self._tls = tls
        ports = take_ports(port_base, PORTS)
        self.cable = Cable()
        self.halves = [
            _Half(ALICE, BOB, root / "site-1", self.logs / ALICE, ports[0::2], buffer_pool_mib),
            _Half(BOB, ALICE, root / "site-2", self.logs / BOB, ports[1::2], buffer_pool_mib),
        ]
        self.mysql_servers = [half.mysql for half in self.halves]
        self.rabbitmq_servers = [half.rabbitmq for half in self.halves]

    def start_servers(self) -> None:
        first, second = self.halves
        for here, there in ((first, second), (second, first)):
            port = self.cable.line(there.rabbitmq.port, here.cable_port)
            here.rabbitmq.federate({"/": [there.rabbitmq.upstream(there.system_id, port)]})
        super().start_servers()

    def make_key_providers(self) -> None:
        self.key_providers = [half.key_provider(tls=self._tls) for half in self.halves]
        introduce(*self.key_providers, stock=self._stock)

    def stop(self) -> None:
        super().stop()
        self.cable.close()


def introduce(*key_providers: KeyProvider, stock: int = STOCK) -> None:
    """Make the keyrings where there are none, and write each into the configuration of all others."""
    for key_provider in key_providers:
        key_provider.make_files()
    peers = {kp.system_id: BusPeer(kp.system_id, kp.identity, stock) for kp in key_providers}
    for key_provider in key_providers:
        key_provider.link_by_bus(*(peer for name, peer in peers.items() if name != key_provider.system_id))
