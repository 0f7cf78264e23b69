"""Two key providers on a MariaDB Galera cluster and a RabbitMQ cluster of three nodes each.

Each key provider has an api, a syncer and a janitor on two hosts. The hosts name the nodes in another order, so that
they use different ones.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from sandbox.galera import NODES, PREFIX, GaleraCluster
from sandbox.key_provider import KeyProvider
from sandbox.mariadb import Database
from sandbox.processes import Child, Startable
from sandbox.rabbitmq import Cluster, RabbitMqServer, start_epmd
from sandbox.topology import BOTH_WAYS, Topology

HOSTS = 2
ELSEWHERE = "galera"

T = TypeVar("T")


class RabbitMqCluster(Startable):
    """Three nodes and one epmd for them."""

    def __init__(self, root: Path, logs: Path) -> None:
        self._root = root
        self._common = Cluster()
        self._epmd: Child | None = None
        self.nodes = [
            RabbitMqServer(root / f"node-{number}", log=logs / f"rabbitmq-{number}.log", cluster=self._common)
            for number in range(1, NODES + 1)
        ]

    def start(self) -> None:
        self._epmd = start_epmd(self._common.epmd_port, self.nodes[0].environ, self._root)
        for node in self.nodes:
            node.launch()
        for node in self.nodes:
            node.wait_ready()

    def stop(self) -> None:
        for node in self.nodes:
            node.terminate()
        for node in self.nodes:
            node.stop()
        if self._epmd is not None:
            self._epmd.kill()
            self._epmd = None


class ClusterTopology(Topology):
    """KP_Alice and KP_Bob over both clusters. `key_providers` are the two hosts of KP_Alice, then those of KP_Bob."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.galera = GaleraCluster(logs=self.logs)
        # Whoever clears up after a demo that was killed finds the data by it.
        (root / ELSEWHERE).symlink_to(self.galera.folder)
        self.rabbitmq = RabbitMqCluster(root / "rabbitmq", self.logs)
        self.mysql_servers, self.rabbitmq_servers = list(self.galera.nodes), self.rabbitmq.nodes

    def start_servers(self) -> None:
        self.rabbitmq.start()
        self.galera.start()

    def make_key_providers(self) -> None:
        self.key_providers = [kp for local, remote in BOTH_WAYS for kp in self._hosts_of(local, remote)]

    def stop(self) -> None:
        for key_provider in self.key_providers:
            key_provider.terminate_all()
        for key_provider in self.key_providers:
            key_provider.stop_all()
        self.rabbitmq.stop()
        self.galera.stop()

    def _hosts_of(self, local_id: str, remote_id: str) -> list[KeyProvider]:
        hosts = [self._host(local_id, remote_id, number) for number in range(HOSTS)]
        for other in hosts[1:]:
            # A keyring is shared by all hosts of a key provider.
            other.keyring_dir = hosts[0].keyring_dir
            other.environ["SKIP_KEYRING_DIR"] = str(other.keyring_dir)
        return hosts

    def _host(self, local_id: str, remote_id: str, number: int) -> KeyProvider:
        name = f"{local_id}-{number + 1}"
        urls = ",".join(node.url for node in _beginning_with(self.rabbitmq.nodes, number))
        return KeyProvider(
            local_id, [remote_id], self._database(number), urls, root=self.root / name, log_dir=self.logs / name
        )

    def _database(self, number: int) -> Database:
        nodes = _beginning_with(self.galera.nodes, number)
        return replace(nodes[0].dsn, host=",".join(f"{node.host}:{node.port}" for node in nodes))


def remove_folder_of_cluster(root: Path) -> None:
    """Removes the database's data of a topology that was killed, if `root` belonged to one."""
    link = root / ELSEWHERE
    if link.is_symlink() and link.readlink().name.startswith(PREFIX):
        shutil.rmtree(link.readlink(), ignore_errors=True)


def _beginning_with(nodes: Sequence[T], number: int) -> Sequence[T]:
    return [*nodes[number:], *nodes[:number]]
