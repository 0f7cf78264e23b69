"""What the demo, the bench and the tests run by themselves: servers, and key providers over them, in one folder.

The logs of everything stand together in `logs`, away from data and secrets, so that they alone can be kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sandbox.key_provider import KeyProvider
from sandbox.mariadb import MariaDbServer
from sandbox.ports import free_port, is_free
from sandbox.processes import SandboxError
from sandbox.rabbitmq import RabbitMqServer

ALICE = "KP_Alice"
BOB = "KP_Bob"
BOTH_WAYS = ((ALICE, BOB), (BOB, ALICE))
_HEALTHY_SECONDS = 60.0


class Topology:
    """KP_Alice and KP_Bob, and the servers of both. Nothing runs before `start_servers`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.logs = root / "logs"
        self.logs.mkdir(mode=0o700)
        self.mysql_servers: list[MariaDbServer] = []
        self.rabbitmq_servers: list[RabbitMqServer] = []
        self.key_providers: list[KeyProvider] = []

    @property
    def pair(self) -> tuple[KeyProvider, KeyProvider]:
        """KP_Alice and KP_Bob, once they are made; where they have several hosts, on one each."""
        return self.key_providers[0], self.key_providers[-1]

    def start_servers(self) -> None:
        """All at the same time; returns when all serve."""
        servers = [*self.mysql_servers, *self.rabbitmq_servers]
        for server in servers:
            server.launch()
        for server in servers:
            server.wait_ready()

    def make_key_providers(self) -> None:
        """Once the servers run: makes KP_Alice and KP_Bob, which are not started."""
        raise NotImplementedError

    def start_key_providers(self) -> None:
        """Both at the same time; returns when both are healthy."""
        if not self.key_providers:
            self.make_key_providers()
        for key_provider in self.key_providers:
            key_provider.start_all()
        for key_provider in self.key_providers:
            key_provider.wait_healthy(_HEALTHY_SECONDS)

    def stop(self) -> None:
        """End everything: first what uses the servers, each group at the same time."""
        for key_provider in self.key_providers:
            key_provider.terminate_all()
        for key_provider in self.key_providers:
            key_provider.stop_all()
        servers = [*self.rabbitmq_servers, *self.mysql_servers]
        for server in servers:
            server.terminate()
        for server in servers:
            server.stop()


class Site:
    """A MariaDB and a RabbitMQ, and key providers over them."""

    def __init__(
        self, root: Path, logs: Path, ports: Sequence[int], *, buffer_pool_mib: int, log_file_mib: int
    ) -> None:
        """`ports` are those of MySQL, of RabbitMQ, of its distribution and of epmd."""
        self._root = root
        mysql_port, port, dist_port, epmd_port = ports
        self.mysql = MariaDbServer(
            root / "mysql",
            port=mysql_port,
            log=logs / "mysql.log",
            buffer_pool_mib=buffer_pool_mib,
            log_file_mib=log_file_mib,
        )
        self.rabbitmq = RabbitMqServer(
            root / "rabbitmq", port=port, dist_port=dist_port, epmd_port=epmd_port, log=logs / "rabbitmq.log"
        )

    def key_provider(
        self, system_id: str, remote_id: str, port: int, tls_port: int | None, *, log_dir: Path
    ) -> KeyProvider:
        """One that is not started."""
        root = self._root / system_id
        made = KeyProvider(system_id, [remote_id], self.mysql.dsn, self.rabbitmq.url, port, root=root, log_dir=log_dir)
        if tls_port is not None:
            made.serve_tls(tls_port)
        return made


class SharedStore(Topology):
    """Both key providers use one MariaDB and one RabbitMQ."""

    PORTS = (
        "KP_Alice",
        "KP_Bob",
        "MySQL",
        "RabbitMQ",
        "RabbitMQ's distribution",
        "epmd",
        "KP_Alice's TLS",
        "KP_Bob's TLS",
    )

    def __init__(
        self,
        root: Path,
        port_base: int | None = None,
        *,
        tls: bool = True,
        buffer_pool_mib: int = 512,
        log_file_mib: int = 256,
    ) -> None:
        """Raises SandboxError when a port from `port_base` on is taken."""
        super().__init__(root)
        ports = take_ports(port_base, self.PORTS)
        self._kp_ports = ports[:2]
        self._tls_ports = ports[6:] if tls else [None, None]
        self._site = Site(root, self.logs, ports[2:6], buffer_pool_mib=buffer_pool_mib, log_file_mib=log_file_mib)
        self.mysql, self.rabbitmq = self._site.mysql, self._site.rabbitmq
        self.mysql_servers, self.rabbitmq_servers = [self.mysql], [self.rabbitmq]

    def make_key_providers(self) -> None:
        self.key_providers = [
            self._site.key_provider(system_id, remote_id, port, tls_port, log_dir=self.logs / system_id)
            for (system_id, remote_id), port, tls_port in zip(BOTH_WAYS, self._kp_ports, self._tls_ports, strict=True)
        ]


def take_ports(port_base: int | None, names: Sequence[str]) -> list[int]:
    """A port for each name, from `port_base` on if there is one. Raises SandboxError when one is taken."""
    if port_base is None:
        return [free_port() for _ in names]
    ports = [port_base + offset for offset in range(len(names))]
    taken = [f"{port} ({what})" for port, what in zip(ports, names, strict=True) if not is_free(port)]
    if taken:
        raise SandboxError(f"PORT_BASE={port_base}: already in use: {', '.join(taken)}")
    return ports
