"""Nothing takes it down: kills, restarts, hanging servers, orderly ends, and starts in any order.

Everywhere the same is asked: it heals without help, and every key that was answered is retrievable afterwards.
A request whose answer was cut off may have come to anything. Processes are started again by the test, as a
supervisor would; the servers are the session's, and serve again when a test is over.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sandbox.client import get
from sandbox.key_provider import ROLES, KeyProvider
from sandbox.mariadb import MariaDbServer
from sandbox.rabbitmq import RabbitMqServer
from skipbus_testkit.client import Answer
from tests.system.encryptors import Encryptors
from tests.system.harness import (
    ALICE,
    BOB,
    Lab,
    Place,
    RawConnection,
    in_background,
    log_lines,
    query,
    request_bytes,
)
from tests.waiting import wait_for

HEALED_SECONDS = 30.0
DRAINED_SECONDS = 10.0


@pytest.fixture(scope="module")
def pair(shared_lab: Lab) -> tuple[KeyProvider, KeyProvider]:
    return shared_lab.add_pair(SKIP_HEARTBEAT_SECONDS="1")


@contextmanager
def load_on(lab: Lab, one: KeyProvider, other: KeyProvider) -> Iterator[Encryptors]:
    """A light load both ways while the block runs; then none of its keys is lost or given out twice."""
    load = Encryptors(lab, (one, other), (other, one), pause_seconds=0.02)
    with in_background(load.run):
        load.wait_for_more()
        yield load
        load.wait_for_more()
    load.assert_nothing_lost_and_nothing_twice()
    assert load.statuses <= {0, 200, 500, 503}


def pids(*kps: KeyProvider) -> dict[tuple[str, str], int]:
    return {(kp.system_id, role): child.pid for kp in kps for role, child in kp.processes.items() if child.running}


def health(kp: KeyProvider) -> Answer:
    return get(kp.url, "health", timeout_seconds=5)


def assert_answers_without_servers(kp: KeyProvider) -> None:
    """What needs neither store nor broker, and what tells that they are away."""
    assert get(kp.url, "capabilities", timeout_seconds=2).status == 200
    assert get(kp.url, "entropy", timeout_seconds=2, minentropy="512").status == 200
    assert get(kp.url, "status", "sync", timeout_seconds=2).status == 200
    assert health(kp).status in (200, 503)


# --- processes


# Keys go both ways, so that each is killed at one of the two key providers.
@pytest.mark.parametrize(("system_id", "role"), [(ALICE, "api"), (BOB, "syncer"), (ALICE, "janitor")])
def test_a_killed_process_heals_and_no_answered_key_is_lost(
    shared_lab: Lab, alice: KeyProvider, bob: KeyProvider, system_id: str, role: str
) -> None:
    kp = shared_lab.kps[system_id]
    with load_on(shared_lab, alice, bob) as load:
        kp.kill(role)
        time.sleep(0.5)
        kp.start(role)
        kp.wait_healthy(HEALED_SECONDS)
    if role == "api":
        other = ({ALICE, BOB} - {system_id}).pop()
        assert {status for name, status in load.outcomes if name == other} == {200}
        # One that starts answers nobody before it knows whom to seal to and whom to believe.
        assert load.statuses <= {0, 200}
    else:
        assert load.statuses == {200}


def test_all_processes_killed_at_once_come_back(shared_lab: Lab, alice: KeyProvider, bob: KeyProvider) -> None:
    with load_on(shared_lab, alice, bob):
        for kp in (alice, bob):
            for role in ROLES:
                kp.kill(role)
        for kp in (alice, bob):
            kp.start_all()
        for kp in (alice, bob):
            kp.wait_healthy(HEALED_SECONDS)


# --- the store


def stop_gracefully(server: MariaDbServer) -> None:
    server.stop()


def kill(server: MariaDbServer) -> None:
    server.kill()


@pytest.mark.stops_servers
@pytest.mark.parametrize("end", [stop_gracefully, kill])
def test_a_restarted_store_heals_and_no_answered_key_is_lost(
    shared_lab: Lab,
    alice: KeyProvider,
    bob: KeyProvider,
    mariadb: MariaDbServer,
    end: Callable[[MariaDbServer], None],
) -> None:
    before = pids(alice, bob)
    with load_on(shared_lab, alice, bob) as load:
        end(mariadb)
        for kp in (alice, bob):
            wait_for(lambda kp=kp: health(kp).status == 503, timeout_seconds=10)  # type: ignore[misc]
            assert health(kp).body["database"] == "error"
            assert_answers_without_servers(kp)
        mariadb.start()
        for kp in (alice, bob):
            kp.wait_healthy(HEALED_SECONDS)
    assert 0 not in load.statuses
    assert pids(alice, bob) == before


@pytest.mark.stops_servers
def test_a_store_that_hangs_is_told_and_heals(
    shared_lab: Lab, alice: KeyProvider, bob: KeyProvider, mariadb: MariaDbServer
) -> None:
    before = pids(alice, bob)
    with load_on(shared_lab, alice, bob):
        with stopped(mariadb.pid):
            wait_for(lambda: health(alice).status == 503, timeout_seconds=15)
            assert_answers_without_servers(alice)
            started = time.monotonic()
            assert get(alice.url, "key", timeout_seconds=15, remoteSystemID=BOB).status in (500, 503)
            assert time.monotonic() - started < 8
        for kp in (alice, bob):
            wait_for(kp.is_healthy, timeout_seconds=HEALED_SECONDS)
    assert pids(alice, bob) == before


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def test_cut_connections_to_the_store_are_made_anew_at_once(
    shared_lab: Lab, alice: KeyProvider, bob: KeyProvider, mariadb: MariaDbServer
) -> None:
    with load_on(shared_lab, alice, bob) as load, mariadb.admin_connection() as admin:
        for _ in range(5):
            for connection_id, user in query(admin, "SELECT id, user FROM information_schema.processlist"):
                if user == shared_lab.database.user:
                    with admin.cursor() as cursor:
                        cursor.execute(f"KILL CONNECTION {connection_id}")
            load.wait_for_more()
    # The batch is tried again: no caller notices.
    assert load.statuses == {200}


# --- the broker


@pytest.mark.stops_servers
def test_keys_go_on_while_the_broker_is_away(
    shared_lab: Lab, alice: KeyProvider, bob: KeyProvider, rabbitmq: RabbitMqServer
) -> None:
    before = pids(alice, bob)
    with load_on(shared_lab, alice, bob) as load:
        rabbitmq.stop()
        until = time.monotonic() + 4
        while time.monotonic() < until:
            for kp in (alice, bob):
                assert health(kp).status == 200
                assert_answers_without_servers(kp)
            time.sleep(0.2)
        rabbitmq.start()
    assert load.statuses == {200}
    assert pids(alice, bob) == before
    assert_peers_hear_each_other_again(alice, bob)


def assert_peers_hear_each_other_again(alice: KeyProvider, bob: KeyProvider) -> None:
    healed = time.time()
    for kp, peer in ((alice, BOB), (bob, ALICE)):
        wait_for(lambda kp=kp, peer=peer: last_heartbeat(kp, peer) > healed, timeout_seconds=HEALED_SECONDS)  # type: ignore[misc]


def last_heartbeat(kp: KeyProvider, peer: str) -> float:
    return float(get(kp.url, "status", "sync").body["peers"][peer]["last_heartbeat"] or 0)


@pytest.mark.stops_servers
def test_both_servers_may_be_down_and_come_back_in_any_order(
    shared_lab: Lab,
    alice: KeyProvider,
    bob: KeyProvider,
    mariadb: MariaDbServer,
    rabbitmq: RabbitMqServer,
) -> None:
    before = pids(alice, bob)
    with load_on(shared_lab, alice, bob):
        mariadb.kill()
        rabbitmq.kill()
        for kp in (alice, bob):
            wait_for(lambda kp=kp: health(kp).status == 503, timeout_seconds=10)  # type: ignore[misc]
            assert_answers_without_servers(kp)
        mariadb.start()
        for kp in (alice, bob):
            kp.wait_healthy(HEALED_SECONDS)
        rabbitmq.start()
    assert pids(alice, bob) == before
    assert_peers_hear_each_other_again(alice, bob)


# --- starts and ends


def test_key_providers_may_start_before_their_servers(tmp_path: Path) -> None:
    mariadb = MariaDbServer(tmp_path / "mysql", buffer_pool_mib=32, log_file_mib=16)
    rabbitmq = RabbitMqServer(tmp_path / "rabbitmq")
    lab = Lab(tmp_path / "lab", Place(mariadb.dsn, rabbitmq.url))
    alice, bob = lab.add(ALICE, BOB), lab.add(BOB, ALICE)
    try:
        for kp in (alice, bob):
            kp.start_all()
        for kp in (alice, bob):
            wait_for(lambda kp=kp: answers_capabilities(kp), timeout_seconds=20)  # type: ignore[misc]
            assert health(kp).status == 503
            assert_answers_without_servers(kp)
            refused = get(kp.url, "key", remoteSystemID=BOB if kp is alice else ALICE)
            assert refused.status in (500, 503)
        before = pids(alice, bob)
        mariadb.start()
        rabbitmq.start()
        for kp in (alice, bob):
            kp.wait_healthy(HEALED_SECONDS)
        lab.wait_announced(alice, BOB)
        lab.assert_retrievable(lab.issue(alice, BOB))
        assert pids(alice, bob) == before
    finally:
        lab.close()
        rabbitmq.terminate()
        mariadb.stop()
        rabbitmq.stop()


def answers_capabilities(kp: KeyProvider) -> bool:
    try:
        return get(kp.url, "capabilities").status == 200
    except OSError:
        return False


def test_sigterm_ends_every_process_with_0_in_time(shared_lab: Lab, alice: KeyProvider, bob: KeyProvider) -> None:
    idle = [RawConnection(alice.port) for _ in range(20)]
    assert idle[0].ask("/capabilities").status == 200
    with half_sent_request(alice):
        assert ended(alice, signal.SIGTERM) == dict.fromkeys(ROLES, 0)
    for connection in idle:
        connection.close()
    alice.start_all()
    alice.wait_healthy(HEALED_SECONDS)
    shared_lab.assert_retrievable(shared_lab.issue(alice, BOB))
    assert bob.is_healthy()


@contextmanager
def half_sent_request(kp: KeyProvider) -> Iterator[None]:
    with RawConnection(kp.port) as connection:
        connection.send(b"GET /capabilities HTTP/1.1\r\nHost:")
        yield


def ended(kp: KeyProvider, signal_number: signal.Signals) -> dict[str, int | None]:
    """Exit codes by role after a signal to all; None for one that did not end in time."""
    started = time.monotonic()
    children = {role: kp.processes[role] for role in ROLES}
    for child in children.values():
        os.kill(child.pid, signal_number)
    while any(child.running for child in children.values()) and time.monotonic() < started + DRAINED_SECONDS:
        time.sleep(0.05)
    return {role: child.returncode if not child.running else None for role, child in children.items()}


def test_ctrl_c_ends_every_process_with_0_while_both_servers_are_down(tmp_path: Path) -> None:
    mariadb, rabbitmq = MariaDbServer(tmp_path / "mysql"), RabbitMqServer(tmp_path / "rabbitmq")
    lab = Lab(tmp_path / "lab", Place(mariadb.dsn, rabbitmq.url))
    kp = lab.add(ALICE, BOB)
    kp.start_all()
    wait_for(lambda: answers_capabilities(kp), timeout_seconds=20)
    wait_for(lambda: all(log_lines(kp, role) for role in ROLES), timeout_seconds=20)
    try:
        assert ended(kp, signal.SIGINT) == dict.fromkeys(ROLES, 0)
    finally:
        lab.close()


def test_requests_in_flight_are_answered_when_the_api_is_told_to_end(
    shared_lab: Lab, alice: KeyProvider, bob: KeyProvider
) -> None:
    key = shared_lab.issue(alice, BOB)
    with RawConnection(bob.port) as waiting, shared_lab.database.connect() as store:
        store.begin()
        query(store, "SELECT 1 FROM key_records WHERE key_id = %s FOR UPDATE", bytes.fromhex(key.key_id))
        waiting.send(request_bytes(f"/key/{key.key_id}?remoteSystemID={ALICE}"))
        time.sleep(0.5)
        bob.processes["api"].terminate()
        time.sleep(1)
        assert bob.processes["api"].running
        store.rollback()
        answer = waiting.read()
    assert (answer.status, answer.json["key"]) == (200, key.key)
    wait_for(lambda: not bob.processes["api"].running, timeout_seconds=DRAINED_SECONDS)
    assert bob.processes["api"].returncode == 0
    bob.start("api")
    bob.wait_healthy(HEALED_SECONDS)


def test_a_stopping_api_takes_no_new_connections_and_loses_no_key(
    shared_lab: Lab, alice: KeyProvider, bob: KeyProvider
) -> None:
    with load_on(shared_lab, alice, bob):
        for _ in range(3):
            assert end_api(alice) == 0
            alice.start("api")
            alice.wait_healthy(HEALED_SECONDS)


def end_api(kp: KeyProvider) -> int | None:
    kp.processes["api"].terminate()
    wait_for(lambda: not kp.processes["api"].running, timeout_seconds=DRAINED_SECONDS)
    return kp.processes["api"].returncode


# --- keyrings and configurations that cannot be used


def refusals(kp: KeyProvider, *roles: str) -> list[tuple[int | None, str]]:
    """Exit codes and logs of processes that must not start. They are started at the same time."""
    children = {role: kp.start(role) for role in roles}
    try:
        wait_for(lambda: not any(child.running for child in children.values()), timeout_seconds=15)
    finally:
        for child in children.values():
            child.kill()
    return [(child.returncode, kp.log_of(role).read_text()) for role, child in children.items()]


def make_keyring(kp: KeyProvider) -> None:
    kp.run_skipctl("keyring", "init")


def loosen(*parts: str) -> Callable[[KeyProvider], None]:
    def change(kp: KeyProvider) -> None:
        make_keyring(kp)
        path = kp.keyring_dir.joinpath(*parts)
        path.chmod(0o755 if path.is_dir() else 0o640)

    change.__name__ = f"loosen_{'_'.join(parts) or 'folder'}"
    return change


def lose_keyring(_kp: KeyProvider) -> None:
    pass


def damage_identity(kp: KeyProvider) -> None:
    make_keyring(kp)
    identity = kp.keyring_dir / "identity.pem"
    identity.write_text(identity.read_text()[:-200])


def take_anothers(kp: KeyProvider) -> None:
    make_keyring(kp)
    kp.environ["SKIP_LOCAL_SYSTEM_ID"] = "KP_Other"


BAD_KEYRINGS = [
    (lose_keyring, "there is no keyring in"),
    (take_anothers, "belongs to 'KP_Unstarted', not to 'KP_Other'"),
    (damage_identity, "identity.pem is damaged"),
    (loosen(), "may be read by others (mode 0755): chmod 700"),
    (loosen("epochs"), "may be read by others (mode 0755): chmod 700"),
    (loosen("identity.pem"), "may be read by others (mode 0640): chmod 600"),
    (loosen("keyring.json"), "may be read by others (mode 0640): chmod 600"),
]


@pytest.mark.parametrize(("spoil", "reason"), BAD_KEYRINGS)
def test_a_keyring_that_cannot_be_used_ends_every_process_with_its_reason(
    tmp_path: Path, mariadb: MariaDbServer, spoil: Callable[[KeyProvider], None], reason: str
) -> None:
    kp = Lab(tmp_path, Place(mariadb.dsn, "amqp://nobody:nothing@127.0.0.1:1/")).add("KP_Unstarted", BOB)
    spoil(kp)
    before = sorted(kp.keyring_dir.rglob("*"))
    for code, log in refusals(kp, *ROLES):
        assert code not in (0, None)
        assert reason in log
        assert "Traceback" not in log
    assert sorted(kp.keyring_dir.rglob("*")) == before, "a keyring was made silently"


def test_a_new_identity_under_a_known_name_is_refused_until_the_keyring_is_back(
    shared_lab: Lab, alice: KeyProvider, bob: KeyProvider
) -> None:
    kept = shared_lab.issue(bob, ALICE)
    alice.stop_all()
    lost = alice.keyring_dir.rename(alice.root / "lost")
    alice.run_skipctl("keyring", "init")
    for code, log in refusals(alice, "api", "janitor"):
        assert code == 1
        assert "the store knows KP_Alice by the identity" in log
    assert bob.is_healthy()
    shutil.rmtree(alice.keyring_dir)
    lost.rename(alice.keyring_dir)
    alice.start_all()
    alice.wait_healthy(HEALED_SECONDS)
    shared_lab.assert_retrievable(kept)


def test_a_bad_configuration_ends_every_process_with_2_and_all_reasons(tmp_path: Path, mariadb: MariaDbServer) -> None:
    bad = {"SKIP_PORT": "high", "SKIP_NONSENSE": "1", "SKIP_KEY_TTL_SECONDS": "0"}
    kp = Lab(tmp_path, Place(mariadb.dsn, "amqp://nobody:nothing@127.0.0.1:1/")).add("KP_Unstarted", BOB, env=bad)
    for code, log in refusals(kp, *ROLES):
        assert code == 2
        for name in ("SKIP_PORT", "SKIP_NONSENSE", "SKIP_KEY_TTL_SECONDS"):
            assert name in log


# --- several api processes


def workers_of(kp: KeyProvider) -> set[int]:
    pid = kp.processes["api"].pid
    return {int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}


def test_a_killed_worker_is_replaced_and_workers_end_with_their_parent(lab: Lab) -> None:
    alice, bob = lab.add_pair(SKIP_API_WORKERS="2")
    with load_on(lab, alice, bob) as load:
        before = workers_of(bob)
        assert len(before) == 2
        victim = min(before)
        os.kill(victim, signal.SIGKILL)
        wait_for(lambda: len(workers_of(bob) - {victim}) == 2, timeout_seconds=10)
        assert victim not in workers_of(bob)
    # Its replacement shares the port: it may not take part before it can do its work.
    assert load.statuses <= {0, 200}
    drained = workers_of(bob)
    assert end_api(bob) == 0
    assert not any(is_alive(pid) for pid in drained)
    orphans = workers_of(alice)
    assert len(orphans) == 2
    os.kill(alice.processes["api"].pid, signal.SIGKILL)
    wait_for(lambda: not any(is_alive(pid) for pid in orphans), timeout_seconds=DRAINED_SECONDS + 2)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
