"""More than two key providers: five in one mesh, a hub with both kinds of link, and peers that are reached by HTTPS.

To spare memory the sites of this module have one MariaDB and one RabbitMQ between them: each has a database of its own
with an account of its own, and a virtual host of its own. The virtual hosts are federated with each other by the same
definitions as separate brokers are. `test_sites.py` has servers of their own for each site.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from sandbox.client import get
from sandbox.key_provider import BusPeer, KeyProvider, peer_status
from sandbox.mariadb import MariaDbServer
from sandbox.rabbitmq import RabbitMqServer
from tests.system.bus_links import HEALED_SECONDS, introduce_all, start_all, wait_linked, wait_stock
from tests.system.encryptors import Encryptors
from tests.system.harness import Lab, Place, in_background, rows
from tests.waiting import wait_for

NAMES = ("KP_A", "KP_B", "KP_C", "KP_D", "KP_E")
HUB, BY_HTTPS = ("KP_Hub", "KP_Far"), ("KP_West", "KP_East")
STOCK = 10
# Each key that was given out is asked for again in the end: the wait for one that is on its way is short.
ENV = {"SKIP_HEARTBEAT_SECONDS": "1", "SKIP_RETRIEVE_WAIT": "0.2"}


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitMqServer]:
    """A broker with a virtual host for each key provider, federated with those of its own group."""
    made = RabbitMqServer(tmp_path_factory.mktemp("broker"))
    upstreams = {
        name: [made.upstream(other, vhost=other) for other in group if other != name]
        for group in (NAMES, HUB)
        for name in group
    }
    made.federate(upstreams | {name: [] for name in BY_HTTPS})
    with made:
        yield made


@contextmanager
def new_lab(root: Path, mariadb: MariaDbServer, broker: RabbitMqServer, names: Sequence[str]) -> Iterator[Lab]:
    """A place for each, with a database and a virtual host of its own."""
    with mariadb.databases(*names) as databases:
        places = [Place(database, broker.url_of(name)) for name, database in zip(names, databases, strict=True)]
        with Lab(root, *places) as lab:
            yield lab


@pytest.fixture(scope="class")
def mesh(tmp_path_factory: pytest.TempPathFactory, mariadb: MariaDbServer, broker: RabbitMqServer) -> Iterator[Lab]:
    with new_lab(tmp_path_factory.mktemp("mesh"), mariadb, broker, NAMES) as lab:
        kps = [
            lab.add(name, *(other for other in NAMES if other != name), at=place, env=ENV)
            for name, place in zip(NAMES, lab.places, strict=True)
        ]
        introduce_all(*kps, stock=STOCK)
        start_all(*kps)
        wait_linked(lab, *kps)
        yield lab


class TestFiveKeyProvidersInOneMesh:
    def test_every_pair_exchanges_keys_both_ways(self, mesh: Lab) -> None:
        for source in NAMES:
            for target in NAMES:
                if source != target:
                    for size in ("256", "512"):
                        mesh.assert_retrievable(mesh.issue(mesh.kps[source], target, size))

    def test_a_key_for_one_is_served_by_no_other(self, mesh: Lab) -> None:
        key = mesh.issue(mesh.kps["KP_A"], "KP_B")
        for other in ("KP_C", "KP_D", "KP_E"):
            for source in ("KP_A", "KP_B"):
                assert get(mesh.kps[other].url, "key", key.key_id, remoteSystemID=source).status == 400
        mesh.assert_retrievable(key)

    def test_every_pair_keeps_its_stock(self, mesh: Lab) -> None:
        for source in NAMES:
            for target in NAMES:
                if source != target:
                    wait_stock(mesh.kps[source], target, STOCK, timeout_seconds=90)

    def test_one_that_is_gone_costs_the_others_nothing(self, mesh: Lab) -> None:
        gone = mesh.kps["KP_E"]
        gone.stop_all()
        ways = [(mesh.kps[one], mesh.kps[other]) for one, other in (("KP_A", "KP_B"), ("KP_C", "KP_D"))]
        load = Encryptors(mesh, *ways)
        with in_background(load.run):
            for _ in range(5):
                answer = get(mesh.kps["KP_A"].url, "key", remoteSystemID="KP_E", size="128")
                assert answer.status == 500
                assert "KP_E" in answer.error
            load.wait_for_more(20)
        assert (load.errors, load.cut_off) == ([], [])
        load.assert_nothing_lost_and_nothing_twice()
        for role in ("api", "syncer", "janitor"):
            gone.start(role)
        gone.wait_healthy()
        wait_for(
            lambda: get(mesh.kps["KP_A"].url, "key", remoteSystemID="KP_E", size="128").status == 200,
            timeout_seconds=HEALED_SECONDS,
        )
        mesh.assert_retrievable(mesh.issue(mesh.kps["KP_A"], "KP_E"))


@pytest.fixture(scope="class")
def hub_lab(tmp_path_factory: pytest.TempPathFactory, mariadb: MariaDbServer, broker: RabbitMqServer) -> Iterator[Lab]:
    with new_lab(tmp_path_factory.mktemp("hub"), mariadb, broker, HUB) as lab:
        hub = lab.add("KP_Hub", "KP_Near", "KP_Far", env=ENV)
        near = lab.add("KP_Near", "KP_Hub", env=ENV)
        far = lab.add("KP_Far", "KP_Hub", at=lab.places[1], env=ENV)
        introduce_all(hub, far, stock=STOCK)
        near.make_files()
        start_all(hub, near, far)
        for source, target in ((hub, near), (near, hub), (hub, far), (far, hub)):
            lab.wait_announced(source, target.system_id)
        yield lab


class TestHubWithBothKindsOfLink:
    """KP_Hub and KP_Near share a store; KP_Far has its own and is reached by the bus."""

    def test_keys_go_over_both_links_both_ways(self, hub_lab: Lab) -> None:
        for spoke in ("KP_Near", "KP_Far"):
            for size in ("128", "256"):
                hub_lab.assert_retrievable(hub_lab.issue(hub_lab.kps["KP_Hub"], spoke, size))
                hub_lab.assert_retrievable(hub_lab.issue(hub_lab.kps[spoke], "KP_Hub", size))

    def test_the_status_names_each_link(self, hub_lab: Lab) -> None:
        assert peer_status(hub_lab.kps["KP_Hub"], "KP_Near")["link"] == "store"
        assert peer_status(hub_lab.kps["KP_Hub"], "KP_Far")["link"] == "bus"

    def test_a_key_of_one_link_is_not_served_over_the_other(self, hub_lab: Lab) -> None:
        hub, near, far = (hub_lab.kps[name] for name in ("KP_Hub", "KP_Near", "KP_Far"))
        for_near, for_far = hub_lab.issue(hub, "KP_Near"), hub_lab.issue(hub, "KP_Far")
        assert hub_lab.retrieve(far, for_near).status == 400
        assert hub_lab.retrieve(near, for_far).status == 400
        hub_lab.assert_retrievable(for_near)
        hub_lab.assert_retrievable(for_far)

    def test_what_the_far_one_announces_is_not_seen_by_the_near_one(self, hub_lab: Lab) -> None:
        announced = {name for (name,) in rows(hub_lab.places[0].database, "SELECT system_id FROM announcements")}
        assert announced == {"KP_Hub", "KP_Near"}

    def test_the_far_one_is_gone_and_the_near_one_goes_on(self, hub_lab: Lab) -> None:
        hub_lab.kps["KP_Far"].stop("syncer")
        try:
            for _ in range(20):
                hub_lab.assert_retrievable(hub_lab.issue(hub_lab.kps["KP_Hub"], "KP_Near"))
        finally:
            hub_lab.kps["KP_Far"].start("syncer")
        wait_for(
            lambda: get(hub_lab.kps["KP_Hub"].url, "key", remoteSystemID="KP_Far", size="128").status == 200,
            timeout_seconds=HEALED_SECONDS,
        )


@pytest.fixture(scope="class")
def https_lab(
    tmp_path_factory: pytest.TempPathFactory, mariadb: MariaDbServer, broker: RabbitMqServer
) -> Iterator[Lab]:
    with new_lab(tmp_path_factory.mktemp("https"), mariadb, broker, BY_HTTPS) as lab:
        west = lab.add("KP_West", "KP_East", at=lab.places[0], env=ENV)
        east = lab.add("KP_East", "KP_West", at=lab.places[1], env=ENV)
        introduce_all(west, east, stock=STOCK, by_https=True)
        start_all(west, east)
        wait_linked(lab, west, east)
        yield lab


class TestPeersReachedByHttps:
    """The brokers know nothing of each other: everything goes by `POST /sync`."""

    @pytest.fixture
    def ways(self, https_lab: Lab) -> list[tuple[KeyProvider, KeyProvider]]:
        west, east = https_lab.kps["KP_West"], https_lab.kps["KP_East"]
        return [(west, east), (east, west)]

    def test_keys_go_both_ways(self, https_lab: Lab, ways: list[tuple[KeyProvider, KeyProvider]]) -> None:
        for source, target in ways:
            for size in ("128", "256", "512"):
                https_lab.assert_retrievable(https_lab.issue(source, target.system_id, size))

    def test_they_hear_each_other_and_keep_stock(self, ways: list[tuple[KeyProvider, KeyProvider]]) -> None:
        for source, target in ways:
            wait_stock(source, target.system_id, STOCK)
            wait_for(
                lambda at=source, of=target: peer_status(at, of.system_id)["status"] == "online",  # type: ignore[misc]
                timeout_seconds=20,
            )
            assert target.tls is not None
            assert peer_status(source, target.system_id)["endpoint"] == target.tls.url

    @pytest.mark.parametrize("role", ["api", "syncer"])
    def test_a_killed_process_loses_no_key_and_no_news(
        self, https_lab: Lab, ways: list[tuple[KeyProvider, KeyProvider]], role: str
    ) -> None:
        east = https_lab.kps["KP_East"]
        load = Encryptors(https_lab, *ways)
        with in_background(load.run):
            load.wait_for_more()
            east.kill(role)
            time.sleep(1)
            east.start(role)
            east.wait_healthy(HEALED_SECONDS)
            load.wait_for_more()
        load.assert_nothing_lost_and_nothing_twice()
        for place in https_lab.places:
            wait_for(
                lambda at=place: not rows(at.database, "SELECT 1 FROM outbox LIMIT 1"),  # type: ignore[misc]
                timeout_seconds=60,
            )

    def test_one_that_is_away_for_a_while_is_sent_everything_in_the_end(
        self, https_lab: Lab, ways: list[tuple[KeyProvider, KeyProvider]]
    ) -> None:
        west, east = ways[0]
        wait_stock(west, "KP_East", STOCK)
        east.stop("api")
        keys = [https_lab.issue(west, "KP_East") for _ in range(STOCK // 2)]
        time.sleep(3)
        east.start("api")
        east.wait_healthy()
        for key in keys:
            https_lab.assert_retrievable(key)
        wait_stock(west, "KP_East", STOCK)


@contextmanager
def two_stores(
    root: Path, mariadb: MariaDbServer, rabbitmq: RabbitMqServer, *sides: str
) -> Iterator[tuple[Lab, KeyProvider, KeyProvider]]:
    """Two key providers that are not started, each with its own store. Their names are the test's own."""
    one, other = (f"KP_{side}-{secrets.token_hex(3)}" for side in sides)
    with (
        mariadb.databases(*sides) as (near, far),
        Lab(root, Place(near, rabbitmq.url), Place(far, rabbitmq.url)) as lab,
    ):
        here = lab.add(one, other, at=lab.places[0], env=ENV)
        yield lab, here, lab.add(other, one, at=lab.places[1], env=ENV)


def test_a_block_that_identity_show_prints_is_all_that_the_other_side_needs(
    tmp_path: Path, mariadb: MariaDbServer, rabbitmq: RabbitMqServer
) -> None:
    """Two operators, each with his own store, paste what the other's `skipctl identity show` printed."""
    with two_stores(tmp_path, mariadb, rabbitmq, "Left", "Right") as (lab, *kps):
        for kp in kps:
            kp.make_files()
            kp.run_skipctl("db", "upgrade")
        blocks = [pasted(kp.run_skipctl("identity", "show")) for kp in kps]
        for kp, block in zip(kps, blocks[::-1], strict=True):
            file = kp.root / "pasted.toml"
            file.write_text(block)
            kp.environ["SKIP_CONFIG_FILE"] = str(file)
        start_all(*kps)
        wait_linked(lab, *kps)
        lab.assert_retrievable(lab.issue(kps[0], kps[1].system_id))
        lab.assert_retrievable(lab.issue(kps[1], kps[0].system_id, "512"))


def pasted(shown: str) -> str:
    """The block at the top of what `skipctl identity show` prints."""
    start = shown.index("[[peers]]")
    return shown[start:].partition("\n\n")[0] + "\n"


def test_a_peer_that_presents_another_identity_than_the_configured_one_is_refused_loudly(
    tmp_path: Path, mariadb: MariaDbServer, rabbitmq: RabbitMqServer
) -> None:
    with two_stores(tmp_path, mariadb, rabbitmq, "True", "False") as (_, here, there):
        for kp in (here, there):
            kp.make_files()
        there.link_by_bus(BusPeer(here.system_id, here.identity, 0))
        # What is configured here is its own identity under the other's name: any other one would do.
        here.link_by_bus(BusPeer(there.system_id, here.identity, 0))
        start_all(here, there)
        wait_for(lambda: peer_status(here, there.system_id)["identity_conflict"], timeout_seconds=HEALED_SECONDS)
        answer = get(here.url, "key", remoteSystemID=there.system_id)
        assert answer.status == 500
        assert there.system_id in answer.error
        assert "identity" in here.log_of("syncer").read_text()
