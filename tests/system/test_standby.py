"""Two processes of a role for one key provider: one works, and the other takes over when that one is silent."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator

import pytest

from sandbox.client import get
from sandbox.key_provider import KeyProvider
from sandbox.mariadb import MariaDbServer
from sandbox.rabbitmq import RabbitMqServer
from tests.system.conftest import new_lab
from tests.system.harness import ALICE, BOB, Lab, rows
from tests.waiting import wait_for

TAKEN_OVER_SECONDS = 10
STATES_SECONDS = 5
STANDING_BY = ("syncer", "janitor")
ENVIRON = {"SKIP_HEARTBEAT_SECONDS": "1"}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, mariadb: MariaDbServer, rabbitmq: RabbitMqServer) -> Iterator[Lab]:
    with new_lab(tmp_path_factory.mktemp("standby"), mariadb, rabbitmq) as made:
        made.add_pair(**ENVIRON)
        yield made


@pytest.fixture(scope="module")
def alice(lab: Lab) -> KeyProvider:
    return lab.kps[ALICE]


@pytest.fixture(scope="module")
def standby(lab: Lab, alice: KeyProvider) -> Iterator[KeyProvider]:
    """A second syncer and a second janitor of KP_Alice, with the same keyring."""
    logs = lab.root / "standby-logs"
    made = KeyProvider(
        ALICE, [BOB], lab.database, lab.rabbitmq_url, root=alice.root, log_dir=logs, env_overrides=ENVIRON
    )
    lab.log_dirs.append(logs)
    for role in STANDING_BY:
        made.start(role)
    yield made
    made.stop_all()


def states(kp: KeyProvider) -> tuple[str, str, str]:
    health = get(kp.url, "health").body
    return health["status"], health["syncer"], health["janitor"]


def holder_pid(lab: Lab, role: str) -> int:
    """Which process has the lease of KP_Alice's role; 0 where it was given back."""
    ((holder,),) = rows(lab.database, "SELECT holder FROM leases WHERE name = %s", f"{role} {ALICE}")
    return int(holder.split()[-2]) if holder else 0


def stand_by(lab: Lab, role: str) -> bool:
    said = "SELECT COUNT(*) FROM processes WHERE local_id = %s AND role = %s AND detail = 'standby'"
    return rows(lab.database, said, ALICE, role) == ((1,),)


def test_a_second_process_of_each_role_does_not_make_the_key_provider_look_degraded(
    lab: Lab, alice: KeyProvider, standby: KeyProvider
) -> None:
    wait_for(lambda: all(stand_by(lab, role) for role in STANDING_BY), timeout_seconds=20)
    seen = set()
    for _ in range(30):
        seen.add(states(alice))
        time.sleep(0.1)
    assert seen == {("ok", "ok", "ok")}


@pytest.mark.parametrize("role", STANDING_BY)
def test_a_frozen_process_is_replaced_within_ten_seconds_and_does_not_work_beside_its_successor(
    lab: Lab, alice: KeyProvider, standby: KeyProvider, role: str
) -> None:
    first, second = alice.processes[role], standby.processes[role]
    assert holder_pid(lab, role) == first.pid
    first.send(signal.SIGSTOP)
    try:
        wait_for(lambda: holder_pid(lab, role) == second.pid, timeout_seconds=TAKEN_OVER_SECONDS)
        wait_for(lambda: states(alice) == ("ok", "ok", "ok"), timeout_seconds=STATES_SECONDS)
    finally:
        first.send(signal.SIGCONT)
    time.sleep(3)
    assert holder_pid(lab, role) == second.pid
    lab.assert_retrievable(lab.issue(alice, BOB))
    standby.stop(role)
    # The lease was given back, so that this takes one tick.
    wait_for(lambda: holder_pid(lab, role) == first.pid, timeout_seconds=3)
    wait_for(lambda: states(alice) == ("ok", "ok", "ok"), timeout_seconds=STATES_SECONDS)
