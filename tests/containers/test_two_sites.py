"""compose/site.yaml twice, joined by compose/two-sites.yaml: keys go both ways, only the link joins, faults heal."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.containers.attempts import FORBIDDEN_TO_ALL, allowed_statements, try_at_broker
from tests.containers.engine import crash, docker, inspect
from tests.containers.two_sites import Site, TwoSites
from tests.waiting import wait_for

SERVICES = ("api", "api-b", "syncer", "janitor", "front", "mysql", "rabbitmq")
ONCE = ("provision", "keyring")

FORBIDDEN = {
    "api": [
        "SELECT * FROM inbox",
        "UPDATE key_records SET target_id = 'x'",
        "UPDATE stock SET key_id = 'x'",
        "INSERT INTO stock_held SELECT * FROM stock_held",
        "SELECT * FROM withdrawn_keys",
        "DELETE FROM bus_announcements",
        "INSERT INTO bus_announcements SELECT * FROM bus_announcements",
        "DELETE FROM pinned_identities",
    ],
    "syncer": [
        "UPDATE key_records SET expires_ms = 0",
        "DELETE FROM wrapping_keys",
        "INSERT INTO stock SELECT * FROM stock",
        "UPDATE stock_held SET key_id = 'x'",
        "DELETE FROM withdrawn_keys",
        "DELETE FROM pinned_identities",
    ],
    "janitor": [
        "INSERT INTO key_records SELECT * FROM key_records",
        "SELECT * FROM stock",
        "INSERT INTO stock_held SELECT * FROM stock_held",
        "INSERT INTO withdrawn_keys SELECT * FROM withdrawn_keys",
        "SELECT * FROM bus_announcements",
    ],
}

# Whether a broker talks to any client: with the own certificate of a broker, with none, and with one that nobody
# knows. In TLS 1.3 the client learns only from the first answer that its certificate was refused.
_CALL_BROKER = """
import socket, ssl, sys
host = sys.argv[1]
context = ssl.create_default_context(cafile=sys.argv[2])
if len(sys.argv) > 3:
    context.load_cert_chain(sys.argv[3], sys.argv[4])
try:
    with socket.create_connection((host, 5671), timeout=10) as plain:
        with context.wrap_socket(plain, server_hostname=host) as connection:
            connection.sendall(b"AMQP\\0\\0\\x09\\1")
            print("greeted" if connection.recv(3) == b"\\1\\0\\0" else "closed")
except ssl.SSLError as error:
    print(error.reason)
except ConnectionError as error:
    print(type(error).__name__)
"""


@pytest.fixture(scope="module")
def sites(image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoSites]:
    """Both running and joined; each test leaves them so. At the end nothing of them is left."""
    made = TwoSites(tmp_path_factory.mktemp("two_sites"), image)
    made.init()
    try:
        made.up()
        yield made
    finally:
        made.down()


def test_keys_are_exchanged_both_ways_between_two_sites(sites: TwoSites) -> None:
    output = sites.smoke()
    assert "KP_Paris -> KP_Oslo: the same key at both ends" in output
    assert "KP_Oslo -> KP_Paris: the same key at both ends" in output
    for site in sites.both:
        assert {service: site.state(service) for service in SERVICES} == dict.fromkeys(SERVICES, "healthy")


def test_stock_fills_at_both_sites(sites: TwoSites) -> None:
    sites.wait_stock_full()


def test_nothing_but_the_network_between_the_brokers_joins_two_sites(sites: TwoSites) -> None:
    networks = [_networks(site) for site in sites.both]
    assert {name for found in networks[0].values() for name in found} & {
        name for found in networks[1].values() for name in found
    } == {sites.link}
    for site, found in zip(sites.both, networks, strict=True):
        assert [service for service, names in found.items() if sites.link in names] == ["rabbitmq"]
        published = [service for service in SERVICES if inspect(site.container(service))["HostConfig"]["PortBindings"]]
        assert published == ["front"]
    first, second = (_sources(site) for site in sites.both)
    assert first & second == set()


def test_the_keyring_is_on_the_volume_alone_and_only_the_key_provider_mounts_it(sites: TwoSites) -> None:
    for site in sites.both:
        volume = f"{site.project}_keyring"
        mounting = [service for service in (*SERVICES, *ONCE) if volume in _volumes(site, service)]
        assert sorted(mounting) == ["api", "api-b", "janitor", "keyring", "syncer"]
        assert [path.name for path in (site.folder / "keyring").rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("service", sorted(FORBIDDEN))
def test_a_service_of_a_site_can_do_at_the_store_only_what_it_must(sites: TwoSites, service: str) -> None:
    assert allowed_statements(sites.paris, service, FORBIDDEN[service] + FORBIDDEN_TO_ALL) == []


@pytest.mark.parametrize(
    "attempt",
    [
        "channel.declare_queue('own')",
        "channel.queue_delete('skipbus.kp.KP_Oslo')",
        "(await channel.get_queue('federation: skipbus.envelopes -> KP_Oslo', ensure=False)).get()",
        "channel.declare_exchange('own', 'topic')",
    ],
)
def test_the_syncer_of_a_site_cannot_touch_what_is_not_its_own_at_the_broker(sites: TwoSites, attempt: str) -> None:
    assert "ACCESS_REFUSED" in try_at_broker(sites.paris, "syncer", attempt)


@pytest.mark.parametrize(
    "attempt",
    [
        "(await channel.get_queue('skipbus.kp.KP_Paris', ensure=False)).get()",
        "(await channel.get_queue('skipbus.dead.KP_Paris', ensure=False)).get()",
        "(await channel.get_queue('federation: skipbus.envelopes -> KP_Rome', ensure=False)).get()",
        "channel.default_exchange.publish(aio_pika.Message(b'x'), 'skipbus.kp.KP_Paris')",
        "(await channel.get_exchange('skipbus.envelopes', ensure=False)).publish(aio_pika.Message(b'x'), 'kp.KP_Oslo')",
        "channel.queue_delete('skipbus.kp.KP_Paris')",
        "channel.declare_queue('own')",
    ],
)
def test_the_account_of_another_sites_broker_reaches_its_own_federation_alone(sites: TwoSites, attempt: str) -> None:
    assert "ACCESS_REFUSED" in try_at_broker(sites.paris, "syncer", attempt, _as_the_broker_of_oslo(sites))


def test_the_account_of_another_sites_broker_may_read_its_own_federation_queue(sites: TwoSites) -> None:
    """So that what is refused above is refused for the queue's sake."""
    attempt = "(await channel.get_queue('federation: skipbus.envelopes -> KP_Oslo', ensure=False)).get(fail=False)"
    assert try_at_broker(sites.paris, "syncer", attempt, _as_the_broker_of_oslo(sites)).strip() == "allowed"


def test_a_broker_has_an_account_for_its_syncer_and_one_for_the_other_site_and_no_others(sites: TwoSites) -> None:
    assert {user["name"] for user in _definitions(sites.paris)["users"]} == {"site_syncer", "federation.KP_Oslo"}
    users = json.loads(_rabbitmqctl(sites.paris, "list_users"))
    assert {user["user"] for user in users} == {"site_syncer", "federation.KP_Oslo"}


def test_brokers_fetch_from_each_other_by_tls_with_certificates_at_both_ends(sites: TwoSites) -> None:
    for site in sites.both:
        found = json.loads(_rabbitmqctl(site, "list_connections", "user", "ssl", "ssl_protocol", "peer_cert_subject"))
        by_user = {connection["user"]: connection for connection in found}
        fetching = by_user[f"federation.{site.peer_id}"]
        assert fetching["ssl"] is True
        assert fetching["ssl_protocol"] == "tlsv1.3"
        assert fetching["peer_cert_subject"] == "CN=skipbus broker"


def test_a_broker_greets_nobody_whom_no_joined_site_vouches_for(sites: TwoSites) -> None:
    own = ("/run/skipbus/broker.pem", "/run/skipbus/broker.key")
    stranger = ("/clients/client.pem", "/clients/client.key")
    oslo = "/run/skipbus/authorities/KP_Oslo.pem"
    assert _call_broker(sites, oslo, *own) == "greeted"
    assert _call_broker(sites, oslo) != "greeted"
    assert _call_broker(sites, oslo, *stranger) != "greeted"
    # And the other way round: a broker that only the own authority could vouch for is not believed to be Oslo's.
    assert _call_broker(sites, "/clients/ca.pem", *own) == "CERTIFICATE_VERIFY_FAILED"


@pytest.mark.parametrize("service", SERVICES)
def test_a_container_that_crashes_at_both_sites_comes_back_and_keys_go_on(sites: TwoSites, service: str) -> None:
    before = [inspect(site.container(service))["RestartCount"] for site in sites.both]
    for site in sites.both:
        crash(site.container(service), site.image)
    for site, count in zip(sites.both, before, strict=True):
        wait_for(lambda: inspect(site.container(service))["RestartCount"] > count, timeout_seconds=30)  # noqa: B023 -- called at once
    for site in sites.both:
        site.wait_healthy(service)
    sites.smoke()


def test_a_key_waits_in_the_store_while_mysql_restarts(sites: TwoSites) -> None:
    issued = sites.paris.issue().body
    sites.oslo.compose("restart", "mysql")
    sites.oslo.wait_healthy("mysql", "api", "api-b")
    assert sites.oslo.client().get("key", issued["keyId"], remoteSystemID="KP_Paris").body == issued
    sites.smoke()


def test_a_broker_that_restarts_takes_up_the_link_again(sites: TwoSites) -> None:
    sites.paris.compose("restart", "rabbitmq")
    sites.paris.wait_healthy("rabbitmq", "syncer")
    _await_on_demand(sites)
    sites.smoke()


def test_stock_serves_while_the_link_is_cut_and_fills_again_when_it_is_healed(sites: TwoSites) -> None:
    sites.wait_stock_full()
    sites.cut()
    try:
        for source, target in (sites.both, sites.both[::-1]):
            for _ in range(10):
                issued = source.issue()
                assert issued.status == 200, issued.error
                retrieved = target.client().get("key", issued.body["keyId"], remoteSystemID=source.system_id)
                assert retrieved.body == issued.body
            # Stock has keys of 256 bits. Another one would have to cross the link, and nothing else joins the sites.
            assert source.issue(size="512").status == 500
    finally:
        sites.heal()
    _await_on_demand(sites)
    sites.wait_stock_full()
    sites.smoke()


def _as_the_broker_of_oslo(sites: TwoSites) -> str:
    """How Oslo's broker would come to the one of Paris, but for the certificate."""
    (upstream,) = _definitions(sites.oslo)["parameters"]
    credentials = upstream["value"]["uri"].removeprefix("amqps://").partition("@")[0]
    return f"amqp://{credentials}@rabbitmq:5672/"


def _await_on_demand(sites: TwoSites) -> None:
    for site in sites.both:
        wait_for(lambda: site.issue(size="512").status == 200, timeout_seconds=60, poll_seconds=0.5)  # noqa: B023 -- called at once


def _networks(site: Site) -> dict[str, set[str]]:
    containers = (*SERVICES, *ONCE)
    return {name: set(inspect(site.container(name))["NetworkSettings"]["Networks"]) - {"none"} for name in containers}


def _sources(site: Site) -> set[str]:
    """What a site's containers mount from the host or from volumes."""
    mounts = [mount for service in (*SERVICES, *ONCE) for mount in inspect(site.container(service))["Mounts"]]
    return {str(mount.get("Name") or mount["Source"]) for mount in mounts}


def _volumes(site: Site, service: str) -> set[str]:
    return {str(mount.get("Name")) for mount in inspect(site.container(service))["Mounts"]}


def _definitions(site: Site) -> Any:  # noqa: ANN401 -- JSON
    return json.loads((site.folder / "rabbitmq" / "broker" / "definitions.json").read_text())


def _rabbitmqctl(site: Site, *command: str) -> str:
    return site.compose("exec", "-T", "rabbitmq", "rabbitmqctl", "--quiet", "--formatter=json", *command)


def _call_broker(sites: TwoSites, authority: str, *certificate: str) -> str:
    """What comes of calling Oslo's broker from the network between the sites, with files of Paris."""
    paris = sites.paris.folder
    mounts = (f"--volume={paris}/rabbitmq/broker:/run/skipbus:ro", f"--volume={paris}/clients/site:/clients:ro")
    command = ("python", "-c", _CALL_BROKER, "skipbus-oslo", authority, *certificate)
    return docker("run", "--rm", "--user=0", f"--network={sites.link}", *mounts, sites.paris.image, *command).strip()
