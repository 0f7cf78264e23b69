"""What the demo runs by itself: a MariaDB, a RabbitMQ, and two key providers over one store, all in one folder.

The logs of everything stand together in `logs`, away from data and secrets, so that they alone can be kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sandbox.key_provider import KeyProvider
from sandbox.ports import free_port, is_free
from sandbox.processes import SandboxError
from sandbox.servers import MariaDbServer, RabbitMqServer

ALICE = "KP_Alice"
BOB = "KP_Bob"

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


class Site:
    """Two key providers and their servers. Nothing runs before `start_servers`."""

    def __init__(self, root: Path, port_base: int | None = None) -> None:
        """Raises SandboxError when a port from `port_base` on is taken."""
        self.logs = root / "logs"
        self.logs.mkdir(mode=0o700)
        self._root = root
        ports = take_ports(port_base, PORTS)
        self._kp_ports = {ALICE: ports[0], BOB: ports[1]}
        self._tls_ports = {ALICE: ports[6], BOB: ports[7]}
        self.mysql = MariaDbServer(root / "mysql", port=ports[2], log=self.logs / "mysql.log")
        self.rabbitmq = RabbitMqServer(
            root / "rabbitmq",
            port=ports[3],
            dist_port=ports[4],
            epmd_port=ports[5],
            log=self.logs / "rabbitmq.log",
        )
        self.key_providers: list[KeyProvider] = []

    @property
    def mysql_servers(self) -> list[MariaDbServer]:
        return [self.mysql]

    @property
    def rabbitmq_servers(self) -> list[RabbitMqServer]:
        return [self.rabbitmq]

    def start_servers(self) -> None:
        """Both at the same time; returns when both serve."""
        self.mysql.launch()
        self.rabbitmq.launch()
        self.mysql.wait_ready()
        self.rabbitmq.wait_ready()

    def make_key_providers(self) -> None:
        """Once the servers run: KP_Alice and KP_Bob, not started."""
        self.key_providers = [self._key_provider(ALICE, BOB), self._key_provider(BOB, ALICE)]

    def start_key_providers(self) -> None:
        """Both at the same time; returns when both are healthy."""
        if not self.key_providers:
            self.make_key_providers()
        for key_provider in self.key_providers:
            key_provider.start_all()
        for key_provider in self.key_providers:
            key_provider.wait_healthy(60)

    def stop(self) -> None:
        """End everything: first what uses the servers, each group at the same time."""
        for key_provider in self.key_providers:
            key_provider.terminate_all()
        for key_provider in self.key_providers:
            key_provider.stop_all()
        self.rabbitmq.terminate()
        self.mysql.stop()
        self.rabbitmq.stop()

    def _key_provider(self, system_id: str, remote_id: str) -> KeyProvider:
        key_provider = KeyProvider(
            system_id,
            [remote_id],
            self.mysql.dsn,
            self.rabbitmq.url,
            self._kp_ports[system_id],
            root=self._root / system_id,
            log_dir=self.logs / system_id,
        )
        key_provider.serve_tls(self._tls_ports[system_id])
        return key_provider


def take_ports(port_base: int | None, names: Sequence[str]) -> list[int]:
    """A port for each name, from `port_base` on if there is one. Raises SandboxError when one is taken."""
    if port_base is None:
        return [free_port() for _ in names]
    ports = [port_base + offset for offset in range(len(names))]
    taken = [f"{port} ({what})" for port, what in zip(ports, names, strict=True) if not is_free(port)]
    if taken:
        raise SandboxError(f"PORT_BASE={port_base}: already in use: {', '.join(taken)}")
    return ports
