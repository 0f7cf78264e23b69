"""KP_Alice and KP_Bob at two sites, with servers of their own that a test may kill."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from sandbox.cable import Cable
from sandbox.key_provider import KeyProvider
from sandbox.mariadb import MariaDbServer
from sandbox.rabbitmq import RabbitMqServer
from sandbox.two_sites import TwoSites
from tests.system.bus_links import introduce_all, start_all, wait_linked
from tests.system.harness import ALICE, BOB, Lab, Place, rows
from tests.waiting import wait_for

_BUFFER_POOL_MIB = 64


@dataclass
class Site:
    """A store, a broker and a key provider of their own."""

    mariadb: MariaDbServer
    rabbitmq: RabbitMqServer
    kp: KeyProvider

    def placed(self) -> int:
        """Keys of stock at the other site. `/status/sync` shows a count that is up to a second old."""
        return int(rows(self.mariadb.dsn, "SELECT COUNT(*) FROM stock WHERE placed_ms IS NOT NULL")[0][0])

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
        """Until that many keys of stock are placed on both sides, by what the stores hold now."""
        for site in self.sites:
            wait_for(lambda at=site: at.placed() >= placed, timeout_seconds=timeout_seconds)  # type: ignore[misc]


@contextmanager
def two_sites(root: Path, *, stock: int, **env: str) -> Iterator[SitesLab]:
    """Small servers, that a test may kill and start again."""
    with ExitStack() as at_end:
        servers = TwoSites(root, buffer_pool_mib=_BUFFER_POOL_MIB)
        at_end.callback(servers.stop)
        servers.start_servers()
        places = [Place(site.mysql.dsn, site.rabbitmq.url) for site in servers.sites]
        lab = at_end.enter_context(Lab(root, *places))
        # Each key that was given out is asked for again in the end: the wait for one that is on its way is short.
        env = {"SKIP_HEARTBEAT_SECONDS": "1", "SKIP_RETRIEVE_WAIT": "0.2"} | env
        alice = lab.add(ALICE, BOB, at=places[0], env=env)
        bob = lab.add(BOB, ALICE, at=places[1], env=env)
        introduce_all(alice, bob, stock=stock)
        start_all(alice, bob)
        wait_linked(lab, alice, bob)
        near, far = servers.sites
        yield SitesLab(lab, servers.cable, (Site(near.mysql, near.rabbitmq, alice), Site(far.mysql, far.rabbitmq, bob)))
