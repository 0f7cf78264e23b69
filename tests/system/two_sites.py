"""KP_Alice and KP_Bob at two sites, with servers of their own that a test may kill."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from sandbox.cable import Cable
from sandbox.key_provider import KeyProvider
from sandbox.servers import MariaDbServer, RabbitMqServer
from sandbox.two_sites import TwoSites
from tests.system.bus_links import COUNTED_SECONDS, introduce_all, start_all, wait_linked, wait_stock
from tests.system.harness import ALICE, BOB, Lab, Place

_BUFFER_POOL_MIB = 64


@dataclass
class Site:
    """A store, a broker and a key provider of their own."""

    mariadb: MariaDbServer
    rabbitmq: RabbitMqServer
    kp: KeyProvider

    def server(self, name: str) -> MariaDbServer | RabbitMqServer:
        return self.mariadb if name == "database" else self.rabbitmq


@dataclass
class SitesLab:
    """KP_Alice and KP_Bob at two sites whose brokers are federated over a cable."""

    lab: Lab
    cable: Cable
    sites: tuple[Site, Site]

    @property
    def alice(self) -> KeyProvider:
        return self.sites[0].kp

    @property
    def bob(self) -> KeyProvider:
        return self.sites[1].kp

    @property
    def both_ways(self) -> tuple[tuple[KeyProvider, KeyProvider], tuple[KeyProvider, KeyProvider]]:
        return (self.alice, self.bob), (self.bob, self.alice)

    def wait_full(self, placed: int, timeout_seconds: float = 60) -> None:
        """Until that many keys of stock are placed on both sides, by a count that is not older than this call."""
        time.sleep(COUNTED_SECONDS)
        for source, target in self.both_ways:
            wait_stock(source, target.system_id, placed, timeout_seconds)


@contextmanager
def two_sites(root: Path, *, stock: int, **env: str) -> Iterator[SitesLab]:
    """Small servers, that a test may kill and start again."""
    with ExitStack() as at_end:
        servers = TwoSites(root, buffer_pool_mib=_BUFFER_POOL_MIB)
        at_end.callback(servers.stop)
        servers.start_servers()
        places = [Place(half.mysql.dsn, half.rabbitmq.url) for half in servers.halves]
        lab = Lab(root, places[0].database, places[0].rabbitmq_url)
        at_end.callback(lab.close)
        env = {"SKIP_HEARTBEAT_SECONDS": "1"} | env
        alice = lab.add(ALICE, BOB, at=places[0], env=env)
        bob = lab.add(BOB, ALICE, at=places[1], env=env)
        introduce_all(alice, bob, stock=stock)
        start_all(alice, bob)
        wait_linked(lab, alice, bob)
        near, far = servers.halves
        yield SitesLab(lab, servers.cable, (Site(near.mysql, near.rabbitmq, alice), Site(far.mysql, far.rabbitmq, bob)))
