"""The guarantees of the design, each with a test that can fail: retrievable, once, sealed, forgotten."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from sandbox.client import Key, get
from sandbox.key_provider import KeyProvider
from sandbox.mariadb import MariaDbServer
from sandbox.rabbitmq import RabbitMqServer
from skipbus.shared.crypto.keyring import Keyring
from skipbus.shared.errors import KeyringError
from tests.system.conftest import new_lab
from tests.system.harness import ALICE, BOB, Lab, RawConnection, query, request_bytes, rows
from tests.system.needles import Needles, private_keys, spellings
from tests.waiting import wait_for

KEYS = 300
TRIALS = 1000
CALLERS = 8
TTL_SECONDS = 3
ZEROIZED_WITHIN_SECONDS = 5
BOTH_WORKERS_SECONDS = 20


# --- answered means retrievable


def test_every_key_that_was_answered_is_retrievable(shared_lab: Lab, pair: tuple[KeyProvider, KeyProvider]) -> None:
    alice, bob = pair
    keys = [shared_lab.issue(source, target) for _ in range(KEYS) for source, target in ((alice, BOB), (bob, ALICE))]
    for key in keys:
        shared_lab.assert_retrievable(key)


def test_an_answered_key_is_committed_in_the_store(shared_lab: Lab, alice: KeyProvider) -> None:
    with shared_lab.database.connect() as store:
        for _ in range(50):
            key = shared_lab.issue(alice, BOB)
            found = query(store, "SELECT target_id FROM key_records WHERE key_id = %s", bytes.fromhex(key.key_id))
            assert found == ((BOB,),)


def test_a_record_is_gone_when_its_answer_arrives(shared_lab: Lab, alice: KeyProvider, bob: KeyProvider) -> None:
    with shared_lab.database.connect() as store:
        for _ in range(50):
            key = shared_lab.issue(alice, BOB)
            assert shared_lab.retrieve(bob, key).status == 200
            assert not query(store, "SELECT 1 FROM key_records WHERE key_id = %s", bytes.fromhex(key.key_id))


# --- given out once


def test_of_eight_callers_at_two_api_processes_exactly_one_gets_the_key(lab: Lab) -> None:
    alice, bob = lab.add_pair(SKIP_API_WORKERS="2")
    callers = connections_to_both_workers(bob, CALLERS)
    try:
        for _ in range(TRIALS):
            key = lab.issue(alice, BOB)
            assert_one_winner(key, race(key, callers))
    finally:
        for caller in callers:
            caller.close()


def test_of_callers_at_two_hosts_of_one_key_provider_exactly_one_gets_the_key(
    shared_lab: Lab, alice: KeyProvider, bob: KeyProvider
) -> None:
    other = second_host(shared_lab, bob)
    callers = [RawConnection(kp.port) for kp in (bob, other) * (CALLERS // 2)]
    # The source's own encryptors try as well, and never win.
    intruders = [RawConnection(alice.port) for _ in range(2)]
    for _ in range(200):
        key = shared_lab.issue(alice, BOB)
        answers = race(key, [*callers, *intruders])
        assert_one_winner(key, answers[: len(callers)])
        assert {status for status, _ in answers[len(callers) :]} == {400}
    for caller in (*callers, *intruders):
        caller.close()


def race(key: Key, callers: Sequence[RawConnection]) -> list[tuple[int, str]]:
    """Everybody asks before anybody reads: (status, key) of each."""
    request = request_bytes(f"/key/{key.key_id}?remoteSystemID={key.source}")
    for caller in callers:
        caller.send(request)
    answers = [caller.read() for caller in callers]
    return [(answer.status, answer.json.get("key", "")) for answer in answers]


def assert_one_winner(key: Key, answers: Sequence[tuple[int, str]]) -> None:
    assert sorted(answers) == [(200, key.key)] + [(400, "")] * (len(answers) - 1)


def connections_to_both_workers(kp: KeyProvider, count: int) -> list[RawConnection]:
    """Connections spread evenly over two processes: a refusal's correlation id begins with its process's own."""
    by_process: dict[str, list[RawConnection]] = {}
    # One worker is enough to be healthy: the other one may still be starting.
    deadline = time.monotonic() + BOTH_WORKERS_SECONDS
    while sum(map(len, by_process.values())) < count and time.monotonic() < deadline:
        connection = RawConnection(kp.port)
        found = by_process.setdefault(connection.ask("/nothing").headers["x-request-id"][:8], [])
        if len(found) < count // 2:
            found.append(connection)
        else:
            connection.close()
    connections = [connection for found in by_process.values() for connection in found]
    if len(by_process) != 2:
        for connection in connections:
            connection.close()
    assert len(by_process) == 2, "the connections all went to one worker"
    return connections


def second_host(lab: Lab, kp: KeyProvider) -> KeyProvider:
    """Another api process of the same key provider on a port of its own, with the same keyring."""
    env = {"SKIP_KEYRING_DIR": str(kp.keyring_dir)}
    other = lab.add(kp.system_id, ALICE, folder="second host", env=env)
    other.keyring_dir = kp.keyring_dir
    other.start("api")
    other.wait_healthy()
    return other


# --- bound to a pair


def test_a_peer_that_never_announced_itself_is_a_500_that_says_so(lab: Lab) -> None:
    alice = lab.add(ALICE, BOB, "KP_Silent", "KP_Wild_*")
    alice.start_all()
    alice.wait_healthy(60)
    for silent in ("KP_Silent", "KP_Wild_7", BOB):
        answer = get(alice.url, "key", remoteSystemID=silent)
        assert answer.status == 500
        assert silent in answer.error
        assert "announced" in answer.error
    assert rows(lab.database, "SELECT COUNT(*) FROM key_records") == ((0,),)
    peers = get(alice.url, "status", "sync").body["peers"]
    assert (peers["KP_Silent"]["status"], peers["KP_Silent"]["last_heartbeat"]) == ("offline", None)


def test_ids_that_only_globs_allow_are_served(lab: Lab) -> None:
    site_1 = lab.add("KP_1_LOC", "KP_?_LOC")
    site_2 = lab.add("KP_2_LOC", "KP_[!3-9]_*")
    for kp in (site_1, site_2):
        kp.start_all()
    for kp in (site_1, site_2):
        kp.wait_healthy(60)
    lab.wait_announced(site_1, "KP_2_LOC")
    lab.wait_announced(site_2, "KP_1_LOC")
    lab.assert_retrievable(lab.issue(site_1, "KP_2_LOC"))
    lab.assert_retrievable(lab.issue(site_2, "KP_1_LOC"))
    assert get(site_1.url, "key", remoteSystemID="KP_12_LOC").status == 400
    assert get(site_2.url, "key", remoteSystemID="KP_3_LOC").status == 400


def test_a_third_key_provider_in_the_same_store_cannot_have_the_key(shared_lab: Lab, alice: KeyProvider) -> None:
    eve = shared_lab.add("KP_Eve", ALICE, BOB)
    eve.start_all()
    eve.wait_healthy(60)
    key = shared_lab.issue(alice, BOB)
    for source in (ALICE, BOB):
        assert get(eve.url, "key", key.key_id, remoteSystemID=source).status == 400
    eve.stop_all()
    shared_lab.assert_retrievable(key)


# --- sealed to one key provider


@pytest.fixture
def small_mariadb(tmp_path: Path) -> MariaDbServer:
    return MariaDbServer(tmp_path / "mysql", buffer_pool_mib=32, log_file_mib=16)


@pytest.mark.stops_servers
def test_neither_store_nor_broker_nor_logs_hold_a_key(
    tmp_path: Path, small_mariadb: MariaDbServer, rabbitmq: RabbitMqServer
) -> None:
    with small_mariadb, new_lab(tmp_path, small_mariadb, rabbitmq) as lab:
        # Debug logs say most, and development is another renderer.
        alice, bob = lab.add_pair(SKIP_DEBUG="true")
        sizes = ("128", "256", "512")
        keys = [lab.issue(source, target, size=size) for size in sizes for source, target in both(alice, bob) * 10]
        needles = lab.needles()
        assert needles.found_in(dump(lab)) == []
        for key in keys[::2]:
            lab.assert_retrievable(key)
        assert needles.found_in(dump(lab)) == []
        files = [file for root in (small_mariadb.root, rabbitmq.root) for file in root.rglob("*") if file.is_file()]
        only_keys = Needles()
        for key in lab.handed_out:
            only_keys.add_key(key.key_id, bytes.fromhex(key.key))
        assert only_keys.found_in_files(files) == []
        assert needles.found_in_files([*lab.logs(), small_mariadb.log, rabbitmq.log]) == []


def both(alice: KeyProvider, bob: KeyProvider) -> list[tuple[KeyProvider, str]]:
    return [(alice, BOB), (bob, ALICE)]


def dump(lab: Lab) -> bytes:
    """Every column of every row of every table."""
    with lab.database.connect() as store:
        tables = [name for (name,) in query(store, "SHOW TABLES")]
        assert {"key_records", "wrapping_keys", "outbox", "announcements"} <= set(tables)
        cells = [cell for table in tables for row in query(store, f"SELECT * FROM `{table}`") for cell in row]
    return b"\n".join(cell if isinstance(cell, bytes) else str(cell).encode() for cell in cells)


@pytest.mark.parametrize("size_bytes", [16, 32, 64])
def test_the_search_finds_a_planted_key_in_every_spelling(size_bytes: int) -> None:
    key = os.urandom(size_bytes)
    needles = Needles()
    needles.add_key("planted", key)
    needles.add_key("another", os.urandom(size_bytes))
    for spelling in spellings(key):
        for before in range(9):
            assert needles.found_in(b"x" * before + spelling + b"tail") == ["planted"]
    assert needles.found_in(os.urandom(100_000)) == []


def test_the_search_finds_keys_and_private_keys_planted_in_a_store_and_a_log(
    shared_lab: Lab, alice: KeyProvider, tmp_path: Path
) -> None:
    key = shared_lab.issue(alice, BOB)
    needles = shared_lab.needles()
    rows(
        shared_lab.database,
        "INSERT INTO processes VALUES ('KP_Planted', 'test', 'test', 0, %s)",
        f"so it was {key.key} then",
    )
    assert needles.found_in(dump(shared_lab)) == [f"key {key.key_id}"]
    rows(shared_lab.database, "DELETE FROM processes WHERE local_id = 'KP_Planted'")
    assert needles.found_in(dump(shared_lab)) == []
    log = tmp_path / "planted.log"
    for name, secret in private_keys(alice.keyring_dir).items():
        log.write_text(json.dumps({"event": "oops", "private": secret + "00"}))
        assert needles.found_in_files([log]) == [f"{name} in {log}"]
    log.write_text(f"amqp: {shared_lab.rabbitmq_url} as {shared_lab.database.password}\n")
    assert {found.partition(" in ")[0] for found in needles.found_in_files([log])} == {
        "RabbitMQ URL",
        "RabbitMQ password",
        "MySQL password",
    }


# --- forgotten for good


def test_keys_are_zeroized_within_5_s_and_never_served_expired_even_with_the_janitor_dead(lab: Lab) -> None:
    alice, bob = lab.add_pair(SKIP_KEY_TTL_SECONDS=str(TTL_SECONDS), SKIP_EPOCH_SECONDS="60")
    keys = [lab.issue(alice, BOB) for _ in range(200)]
    expired = time.monotonic() + TTL_SECONDS
    # Some of the first may have expired on a slow machine.
    assert records_of(lab, keys)
    wait_for(lambda: not records_of(lab, keys), timeout_seconds=TTL_SECONDS + ZEROIZED_WITHIN_SECONDS)
    assert time.monotonic() < expired + ZEROIZED_WITHIN_SECONDS

    bob.kill("janitor")
    keys = [lab.issue(alice, BOB) for _ in range(20)]
    expired = time.monotonic() + TTL_SECONDS
    lab.assert_retrievable(keys.pop())
    time.sleep(max(0.0, expired + 0.1 - time.monotonic()))
    for key in keys:
        answer = lab.retrieve(bob, key)
        assert answer.status == 400
        assert "key" not in answer.body
    assert len(records_of(lab, keys)) == len(keys), "somebody else has removed what the janitor should"
    wait_for(lambda: '; expired"' in bob.log_of("api").read_text(), timeout_seconds=5)
    bob.start("janitor")
    wait_for(lambda: not records_of(lab, keys), timeout_seconds=20)


def records_of(lab: Lab, keys: Sequence[Key]) -> set[str]:
    found = rows(lab.database, "SELECT LOWER(HEX(key_id)) FROM key_records")
    return {key.key_id for key in keys} & {key_id for (key_id,) in found}


def test_an_epochs_private_half_is_gone_after_its_destroy_time_and_nothing_opens_what_was_left(lab: Lab) -> None:
    alice, bob = lab.add_pair(SKIP_KEY_TTL_SECONDS="2", SKIP_EPOCH_SECONDS="2")
    key = lab.issue(alice, BOB)
    (record,) = rows(lab.database, "SELECT * FROM key_records WHERE key_id = %s", bytes.fromhex(key.key_id))
    (wrapping,) = rows(
        lab.database,
        "SELECT w.* FROM wrapping_keys w JOIN key_records k USING (wrapping_key_id) WHERE k.key_id = %s",
        bytes.fromhex(key.key_id),
    )
    epoch_id, destroy_ms = wrapping[3], wrapping[6]
    file = bob.keyring_dir / "epochs" / f"{epoch_id.hex()}.json"
    private = json.loads(file.read_text())["private_key"]
    lab.assert_retrievable(key)
    epochs = set()
    while time.time() * 1000 <= destroy_ms:
        # In this time keys are handed out over the borders of epochs.
        lab.assert_retrievable(lab.issue(alice, BOB))
        epochs |= {found for (found,) in rows(lab.database, "SELECT epoch_id FROM wrapping_keys")}
        time.sleep(0.1)
    assert len(epochs) >= 3
    wait_for(lambda: not file.exists(), timeout_seconds=5)
    with pytest.raises(KeyringError, match="not in the keyring"):
        Keyring.open(bob.keyring_dir, BOB).read_epoch(epoch_id)
    assert private not in "".join(entry.read_text() for entry in (bob.keyring_dir / "epochs").iterdir())
    put_back(lab, "wrapping_keys", wrapping)
    put_back(lab, "key_records", (record[0], record[1] + 3_600_000, *record[2:]))
    # An attacker who restores the rows from a backup and prolongs them gets nothing; it is not the caller's fault.
    answer = lab.retrieve(bob, key)
    assert answer.status == 500
    assert "key" not in answer.body


def put_back(lab: Lab, table: str, row: Sequence[object]) -> None:
    places = ",".join(["%s"] * len(row))
    rows(lab.database, f"REPLACE INTO {table} VALUES ({places})", *row)


def test_the_keyring_is_readable_by_its_owner_only(pair: tuple[KeyProvider, KeyProvider]) -> None:
    for kp in pair:
        found = subprocess.run(
            ["find", str(kp.keyring_dir), "-perm", "/077"], capture_output=True, text=True, check=True
        )
        assert found.stdout == ""
