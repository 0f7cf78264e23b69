"""Two sites with a store, a broker and a key provider each, and a line between them that fails.

Everywhere the same is asked: every key that was answered is retrievable at the other site, once, and it heals without
help. Processes and servers are started again by the test, as a supervisor would.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from sandbox.cable import Kind
from sandbox.client import get
from sandbox.key_provider import ROLES, peer_status, stock_of
from tests.system.bus_links import COUNTED_SECONDS, HEALED_SECONDS, wait_stock
from tests.system.encryptors import Encryptors
from tests.system.harness import BOB, in_background, rows
from tests.system.two_sites import SitesLab, two_sites
from tests.waiting import wait_for

STOCK = 120
SYNC_TIMEOUT_SECONDS = 2.0
REFILLED_SECONDS = 10.0


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SitesLab]:
    with two_sites(tmp_path_factory.mktemp("sites"), stock=STOCK, SKIP_SYNC_TIMEOUT=str(SYNC_TIMEOUT_SECONDS)) as made:
        made.wait_full(STOCK)
        yield made


@pytest.fixture(autouse=True)
def _whole_and_full(sites: SitesLab) -> Iterator[None]:
    """Each test begins with a whole line and full stock."""
    yield
    sites.cable.heal()
    sites.cable.latency_seconds = 0.0
    sites.wait_full(STOCK)


def test_the_sites_share_no_store(sites: SitesLab) -> None:
    for site, other in (sites.sites, sites.sites[::-1]):
        announced = {name for (name,) in rows(site.mariadb.dsn, "SELECT system_id FROM announcements")}
        assert announced == {site.kp.system_id}
        assert site.mariadb.dsn.port != other.mariadb.dsn.port


@pytest.mark.parametrize("size", ["128", "192", "256", "512"])
def test_keys_of_every_size_are_exchanged_both_ways(sites: SitesLab, size: str) -> None:
    for source, target in sites.both_ways:
        key = sites.lab.issue(source, target.system_id, size)
        assert len(key.key) == int(size) // 4
        sites.lab.assert_retrievable(key)
        assert sites.lab.retrieve(target, key).status == 400


def test_keys_of_the_default_size_come_from_stock_and_others_on_demand(sites: SitesLab) -> None:
    site, _ = sites.sites
    # A key out of stock counts once its event is in an envelope, and the outbox is empty after that.
    wait_for(lambda: not rows(site.mariadb.dsn, "SELECT 1 FROM outbox LIMIT 1"), timeout_seconds=HEALED_SECONDS)
    ((issued,),) = rows(site.mariadb.dsn, "SELECT issued FROM peers WHERE peer_id = %s", BOB)
    sites.cable.cut()
    for _ in range(5):
        sites.lab.assert_retrievable(sites.lab.issue(sites.alice, BOB))
    answer = get(sites.alice.url, "key", remoteSystemID=BOB, size="128")
    assert answer.status == 500
    assert BOB in answer.error
    sites.cable.heal()
    sites.wait_full(STOCK)
    wait_for(lambda: peer_status(sites.alice, BOB)["issued"] >= issued + 5, timeout_seconds=HEALED_SECONDS)
    assert peer_status(sites.alice, BOB)["issued"] == issued + 5


def test_stock_is_counted_on_both_sides(sites: SitesLab) -> None:
    for source, target in sites.both_ways:
        wait_stock(source, target.system_id, STOCK, COUNTED_SECONDS)
        shown = stock_of(source, target.system_id)
        assert (shown["configured"], shown["placed"]) == (STOCK, STOCK)
        wait_for(lambda at=target, of=source: stock_of(at, of.system_id)["held"] == STOCK, timeout_seconds=10)  # type: ignore[misc]


def test_used_stock_is_filled_up_again(sites: SitesLab) -> None:
    for _ in range(STOCK // 2 + 5):
        sites.lab.assert_retrievable(sites.lab.issue(sites.alice, BOB))
    sites.wait_full(STOCK, timeout_seconds=REFILLED_SECONDS)


def test_a_key_on_demand_that_the_cut_line_held_up_is_never_served(sites: SitesLab) -> None:
    sites.cable.cut("hang")
    started = time.monotonic()
    answer = get(sites.alice.url, "key", remoteSystemID=BOB, size="512")
    assert answer.status == 500
    assert time.monotonic() - started < SYNC_TIMEOUT_SECONDS + 1
    sites.cable.heal()
    withdrawn = "SELECT COUNT(*) FROM key_records WHERE size_bits = 512"
    wait_for(lambda: outbox_is_empty(sites), timeout_seconds=HEALED_SECONDS)
    wait_for(lambda: rows(sites.sites[1].mariadb.dsn, withdrawn) == ((0,),), timeout_seconds=HEALED_SECONDS)


def outbox_is_empty(sites: SitesLab) -> bool:
    return all(not rows(site.mariadb.dsn, "SELECT 1 FROM outbox LIMIT 1") for site in sites.sites)


@pytest.mark.parametrize(("kind", "seconds"), [("die", 10), ("hang", 3), ("hang", 15)])
def test_a_cut_under_load_fails_no_request_loses_no_key_and_gives_none_twice(
    sites: SitesLab, kind: Kind, seconds: float
) -> None:
    # What stock can carry: the pause, and two ways that share it.
    load = Encryptors(sites.lab, *sites.both_ways, pause_seconds=2 * seconds / STOCK)
    with in_background(load.run):
        load.wait_for_more(5)
        sites.wait_full(STOCK * 3 // 4)
        sites.cable.cut(kind)
        time.sleep(seconds)
        sites.cable.heal()
        load.wait_for_more(5)
    assert (load.errors, load.cut_off) == ([], [])
    sites.wait_full(STOCK, timeout_seconds=REFILLED_SECONDS)
    load.assert_nothing_lost_and_nothing_twice()


def test_a_line_that_is_cut_and_healed_again_and_again_heals(sites: SitesLab) -> None:
    load = Encryptors(sites.lab, *sites.both_ways, pause_seconds=0.1)
    kinds: tuple[Kind, ...] = ("die", "hang")
    with in_background(load.run):
        for kind in kinds * 3:
            sites.cable.cut(kind)
            time.sleep(0.7)
            sites.cable.heal()
            time.sleep(0.7)
        load.wait_for_more(5)
    assert (load.errors, load.cut_off) == ([], [])
    load.assert_nothing_lost_and_nothing_twice()


def test_a_long_line_is_waited_for(sites: SitesLab) -> None:
    sites.cable.latency_seconds = 0.25
    for source, target in sites.both_ways:
        started = time.monotonic()
        key = sites.lab.issue(source, target.system_id, "128")
        assert time.monotonic() - started >= 0.5
        sites.lab.assert_retrievable(key)
    # And stock spares its callers the line.
    started = time.monotonic()
    key = sites.lab.issue(sites.alice, BOB)
    assert time.monotonic() - started < 0.25
    sites.lab.assert_retrievable(key)


# Keys go both ways, so that each is killed at one of the two sites.
@pytest.mark.parametrize(("number", "role"), [(0, "api"), (1, "syncer"), (0, "janitor")])
def test_a_killed_process_heals_and_no_answered_key_is_lost(sites: SitesLab, number: int, role: str) -> None:
    kp = sites.sites[number].kp
    load = Encryptors(sites.lab, *sites.both_ways)
    with in_background(load.run):
        load.wait_for_more()
        kp.kill(role)
        time.sleep(0.5)
        kp.start(role)
        kp.wait_healthy(HEALED_SECONDS)
        load.wait_for_more()
    load.assert_nothing_lost_and_nothing_twice()
    if role != "api":
        assert (load.errors, load.cut_off) == ([], [])


@pytest.mark.parametrize(("number", "server"), [(0, "broker"), (1, "database")])
def test_a_killed_server_heals_and_no_answered_key_is_lost(sites: SitesLab, number: int, server: str) -> None:
    killed = sites.sites[number].server(server)
    # A broker takes ten seconds and more to come back on a busy machine: at this pace stock lasts for three times that.
    load = Encryptors(sites.lab, *sites.both_ways, pause_seconds=0.05 if server == "database" else 0.3)
    with in_background(load.run):
        load.wait_for_more()
        sites.wait_full(STOCK * 3 // 4)
        killed.kill()
        time.sleep(1)
        killed.start()
        load.wait_for_more(timeout_seconds=60)
    load.assert_nothing_lost_and_nothing_twice()
    if server == "broker":
        # Stock needs no broker, neither its own nor the other site's.
        assert (load.errors, load.cut_off) == ([], [])


def test_a_killed_syncer_in_the_middle_of_placing_leaves_no_key_half_there(sites: SitesLab) -> None:
    load = Encryptors(sites.lab, *sites.both_ways, pause_seconds=0.01)
    with in_background(load.run):
        for kp in (sites.alice, sites.bob) * 3:
            kp.kill("syncer")
            time.sleep(0.3)
            kp.start("syncer")
            time.sleep(0.7)
        load.wait_for_more()
    load.assert_nothing_lost_and_nothing_twice()
    sites.wait_full(STOCK)
    for source, target in sites.both_ways:
        for _ in range(STOCK // 3):
            sites.lab.assert_retrievable(sites.lab.issue(source, target.system_id))


def test_a_whole_site_that_restarts_finds_its_stock_and_is_found_again(sites: SitesLab) -> None:
    bob = sites.sites[1]
    keys = [sites.lab.issue(source, target.system_id) for source, target in sites.both_ways * 5]
    bob.kp.stop_all()
    bob.mariadb.restart()
    bob.rabbitmq.restart()
    for role in ROLES:
        bob.kp.start(role)
    bob.kp.wait_healthy(HEALED_SECONDS)
    for key in keys:
        sites.lab.assert_retrievable(key)
    for source, target in sites.both_ways:
        wait_for(
            lambda at=source, of=target: get(at.url, "key", remoteSystemID=of.system_id, size="128").status == 200,  # type: ignore[misc]
            timeout_seconds=HEALED_SECONDS,
        )
