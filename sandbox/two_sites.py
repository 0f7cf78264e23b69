"""What `make demo TOPOLOGY=sites` runs: two sites, each with a MariaDB, a RabbitMQ and a key provider of its own.

The brokers fetch from each other by federation, over a cable that can be cut. Nothing else joins the sites: keys
cross it sealed, and each key provider answers from its own store. The cable is a thread of this process.
"""

from __future__ import annotations

from pathlib import Path

from sandbox.cable import Cable
from sandbox.key_provider import BusPeer, KeyProvider
from sandbox.topology import ALICE, BOB, BOTH_WAYS, Site, Topology, take_ports

_OF_A_SITE = ("", "'s TLS", "'s MySQL", "'s RabbitMQ", "'s RabbitMQ's distribution", "'s epmd", "'s end of the cable")
# Those of a key provider come first, so that PORT_BASE and the port after it answer encryptors, as in one site.
PORTS = tuple(f"{name}{what}" for what in _OF_A_SITE for name in (ALICE, BOB))
STOCK = 64
_BUFFER_POOL_MIB = 256


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
        self._ports = [ports[0::2], ports[1::2]]
        self.cable = Cable()
        self.sites = [
            Site(
                root / f"site-{number}",
                _made(self.logs / system_id),
                ports[2:6],
                buffer_pool_mib=buffer_pool_mib,
                log_file_mib=buffer_pool_mib // 2,
            )
            for number, (system_id, ports) in enumerate(zip((ALICE, BOB), self._ports, strict=True), 1)
        ]
        self.mysql_servers = [site.mysql for site in self.sites]
        self.rabbitmq_servers = [site.rabbitmq for site in self.sites]

    def start_servers(self) -> None:
        for here, there, name, ports in zip(
            self.rabbitmq_servers, self.rabbitmq_servers[::-1], (BOB, ALICE), self._ports, strict=True
        ):
            here.federate({"/": [there.upstream(name, self.cable.line(there.port, ports[6]))]})
        super().start_servers()

    def make_key_providers(self) -> None:
        self.key_providers = [
            site.key_provider(*names, ports[0], ports[1] if self._tls else None, log_dir=self.logs / names[0])
            for site, names, ports in zip(self.sites, BOTH_WAYS, self._ports, strict=True)
        ]
        introduce(*self.key_providers, stock=self._stock)

    def stop(self) -> None:
        super().stop()
        self.cable.close()


def _made(folder: Path) -> Path:
    folder.mkdir(mode=0o700)
    return folder


def introduce(*key_providers: KeyProvider, stock: int = STOCK) -> None:
    """Make the keyrings where there are none, and write each into the configuration of all others."""
    for key_provider in key_providers:
        key_provider.make_files()
    peers = {kp.system_id: BusPeer(kp.system_id, kp.identity, stock) for kp in key_providers}
    for key_provider in key_providers:
        key_provider.link_by_bus(*(peer for name, peer in peers.items() if name != key_provider.system_id))
