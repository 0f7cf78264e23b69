"""compose/shared-store.yaml: keys go both ways, each account has its rights and no others, and faults heal."""

from __future__ import annotations

import json
import secrets

import pytest

from tests.containers.attempts import FORBIDDEN_TO_ALL, allowed_statements, try_at_broker
from tests.containers.engine import crash, docker, inspect, logs
from tests.containers.stack import Stack
from tests.waiting import wait_for

SERVICES = ("alice-api", "alice-syncer", "alice-janitor", "bob-api", "bob-syncer", "bob-janitor")

FORBIDDEN = {
    "alice-api": [
        "DELETE FROM announcements",
        "INSERT INTO announcements VALUES ('x', '', '', 1)",
        "SELECT * FROM inbox",
        "DELETE FROM outbox",
        "UPDATE key_records SET target_id = 'x'",
        "DELETE FROM pinned_identities",
    ],
    "alice-syncer": [
        "SELECT * FROM key_records",
        "SELECT * FROM wrapping_keys",
        "DELETE FROM key_records",
        "INSERT INTO key_records SELECT * FROM key_records",
        "DELETE FROM pinned_identities",
    ],
    "alice-janitor": [
        "INSERT INTO key_records SELECT * FROM key_records",
        "UPDATE key_records SET expires_ms = 0",
        "INSERT INTO wrapping_keys SELECT * FROM wrapping_keys",
        "UPDATE wrapping_keys SET expires_ms = 0",
        "INSERT INTO inbox VALUES ('x', 'y', 1, 1)",
    ],
}


def test_keys_are_exchanged_both_ways_and_a_second_retrieval_is_refused(shared_store: Stack) -> None:
    output = shared_store.smoke()
    assert "KP_Alice -> KP_Bob: the same key at both ends" in output
    assert "KP_Bob -> KP_Alice: the same key at both ends" in output


@pytest.mark.parametrize("service", sorted(FORBIDDEN))
def test_a_service_can_do_at_the_store_only_what_it_must(shared_store: Stack, service: str) -> None:
    assert allowed_statements(shared_store, service, FORBIDDEN[service] + FORBIDDEN_TO_ALL) == []


@pytest.mark.parametrize(
    "attempt",
    [
        "channel.declare_queue('own')",
        "channel.declare_queue('skipbus.kp.KP_Bob', passive=False, durable=True)",
        "channel.queue_delete('skipbus.kp.KP_Bob')",
        "(await channel.get_queue('skipbus.kp.KP_Bob', ensure=False)).get()",
        "(await channel.get_queue('skipbus.dead.KP_Bob', ensure=False)).purge()",
        "channel.declare_exchange('own', 'topic')",
    ],
)
def test_a_syncer_cannot_touch_what_is_anothers_at_the_broker(shared_store: Stack, attempt: str) -> None:
    assert "ACCESS_REFUSED" in try_at_broker(shared_store, "alice-syncer", attempt)


def test_an_account_of_one_key_provider_has_no_default_account_beside_it(shared_store: Stack) -> None:
    users = json.loads(
        shared_store.compose("exec", "-T", "rabbitmq", "rabbitmqctl", "-q", "--formatter=json", "list_users")
    )
    assert {user["user"] for user in users} == {"alice_syncer", "bob_syncer"}


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_mounts_its_own_keyring_and_secrets_only(shared_store: Stack, service: str) -> None:
    found = inspect(shared_store.container(service))
    owner, _, role = service.partition("-")
    mounts = {mount["Destination"]: mount.get("Name") or mount["Source"] for mount in found["Mounts"]}
    assert mounts["/var/lib/skipbus/keyring"] == f"{shared_store.project}_{owner}-keyring"
    names = {path.rsplit("/", 1)[-1] for path in mounts if path.startswith("/run/secrets/")}
    broker = {f"{owner}_syncer_rabbitmq_url"} if role == "syncer" else set()
    assert names == {f"{owner}_{role}_mysql_password"} | broker
    assert found["HostConfig"]["ReadonlyRootfs"]
    assert found["HostConfig"]["CapDrop"] == ["ALL"]
    assert found["HostConfig"]["Memory"] > 0
    assert found["HostConfig"]["NanoCpus"] > 0


def test_no_secret_stands_in_what_the_engine_shows(shared_store: Stack) -> None:
    texts = [path.read_text().strip() for path in (shared_store.folder / "secrets").iterdir()]
    texts += [line.rpartition(":")[2] for line in (shared_store.folder / "alice/tls/psk.txt").read_text().split()]
    shown = "".join(docker("inspect", shared_store.container(service)) for service in (*SERVICES, "mysql", "rabbitmq"))
    shown += shared_store.compose("logs")
    assert [text[:4] for text in texts if text in shown] == []


@pytest.mark.parametrize("service", [*SERVICES[:3], "rabbitmq", "mysql"])
def test_a_container_that_crashes_comes_back_and_keys_go_on(shared_store: Stack, service: str) -> None:
    before = inspect(shared_store.container(service))["RestartCount"]
    crash(shared_store.container(service), shared_store.image)
    wait_for(lambda: inspect(shared_store.container(service))["RestartCount"] > before, timeout_seconds=30)
    shared_store.smoke()
    shared_store.wait_healthy(service, *SERVICES)


def test_keys_wait_in_the_store_while_mysql_restarts(shared_store: Stack) -> None:
    issued = json.loads(shared_store.python("alice-api", _GET.format(path="/key?remoteSystemID=KP_Bob")))
    shared_store.compose("restart", "mysql")
    shared_store.wait_healthy("mysql", "bob-api")
    path = f"/key/{issued['keyId']}?remoteSystemID=KP_Alice"
    assert json.loads(shared_store.python("bob-api", _GET.format(path=path))) == issued
    shared_store.smoke()


_GET = """
import urllib.request
print(urllib.request.urlopen("http://127.0.0.1:8080{path}", timeout=20).read().decode())
"""


def test_keys_go_on_while_the_broker_is_cut_off(shared_store: Stack) -> None:
    network = f"{shared_store.project}_bus"
    docker("network", "disconnect", network, shared_store.container("rabbitmq"))
    try:
        wait_for(lambda: "broker" in _probe(shared_store, "alice-syncer", "ready"), timeout_seconds=60)
        assert _probe(shared_store, "alice-syncer", "alive") == "alive"
        shared_store.smoke()
    finally:
        docker("network", "connect", "--alias=rabbitmq", network, shared_store.container("rabbitmq"))
    wait_for(lambda: _probe(shared_store, "alice-syncer", "ready") == "ready", timeout_seconds=60)
    shared_store.wait_healthy(*SERVICES)


def test_services_whose_store_hangs_are_alive_and_not_ready_and_heal(shared_store: Stack) -> None:
    docker("pause", shared_store.container("mysql"))
    try:
        for service in SERVICES[:3]:
            wait_for(lambda: "not ready" in _probe(shared_store, service, "ready"), timeout_seconds=60)  # noqa: B023 -- called at once
            assert _probe(shared_store, service, "alive") == "alive"
    finally:
        docker("unpause", shared_store.container("mysql"))
    shared_store.wait_healthy("mysql", *SERVICES)
    shared_store.smoke()


def test_up_a_second_time_changes_neither_identity_nor_containers(shared_store: Stack) -> None:
    before = [inspect(shared_store.container(service))["Id"] for service in SERVICES]
    shown = shared_store.compose("exec", "-T", "alice-janitor", "skipctl", "keyring", "show").splitlines()[:3]
    shared_store.up()
    assert [inspect(shared_store.container(service))["Id"] for service in SERVICES] == before
    assert shared_store.compose("exec", "-T", "alice-janitor", "skipctl", "keyring", "show").splitlines()[:3] == shown


def test_a_changed_password_is_taken_up_by_the_next_up(shared_store: Stack) -> None:
    file = shared_store.folder / "secrets" / "alice_api_mysql_password"
    file.write_text(secrets.token_hex(24))
    shared_store.up("--force-recreate", "alice-api", "provision")
    shared_store.smoke()


def test_services_refuse_a_keyring_that_was_lost_and_made_anew_until_it_is_restored(shared_store: Stack) -> None:
    keyring, saved = f"{shared_store.project}_alice-keyring", f"{shared_store.project}_saved"
    command = (
        "run",
        "--rm",
        "--user=0",
        f"--volume={keyring}:/keyring",
        f"--volume={saved}:/saved",
        shared_store.image,
    )
    try:
        docker(*command, "cp", "-a", "/keyring/.", "/saved/")
        docker(*command, "find", "/keyring", "-mindepth", "1", "-delete")
        shared_store.compose("run", "--rm", "alice-keyring")
        shared_store.compose("restart", "alice-api")
        wait_for(lambda: "the store knows KP_Alice by" in logs(shared_store.container("alice-api")), timeout_seconds=30)
        docker(*command, "sh", "-c", "find /keyring -mindepth 1 -delete && cp -a /saved/. /keyring/")
    finally:
        docker("volume", "rm", "--force", saved)
    shared_store.wait_healthy(*SERVICES)
    shared_store.smoke()


def _probe(stack: Stack, service: str, word: str) -> str:
    """What `skipbus ready` or `alive` says; it exits with 1 where it says no."""
    return stack.compose("exec", "-T", service, "sh", "-c", f"skipbus {word} || true").strip()
