"""Facts about a store on a Galera cluster: a KP's apis on different nodes, and nodes that end.

Queues, batches and elections are the processes' own, each on a node of its own. The store is optimistic there: two
nodes lock one row each, and the one that commits later fails with error 1213, at its COMMIT or before.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import Engine

from sandbox.galera import GaleraCluster, GaleraNode
from skipbus.services.api.group_commit import GroupCommit, Limits
from skipbus.services.api.links import ClaimedKey, IssuedKey, IssueRequest
from skipbus.services.api.links.store import ClaimRequest
from skipbus.shared.errors import KeyNotAvailable, SkipbusError, StoreUnavailable
from skipbus.shared.settings import MySqlSettings
from skipbus.shared.store.election import Election
from skipbus.shared.store.engine import driver_errors, make_engine, make_queue_engine
from skipbus.shared.store.migrate import HEAD_REVISION, store_revision
from tests.integration.key_providers import KeyProvider, Store, announced
from tests.integration.test_migrate import start_upgrade
from tests.waiting import wait_for

ISSUES = 300
RACES = 300
CALLERS = 8
LIMITS = Limits(max_batch=16, max_queue=1000, timeout_seconds=20)


@pytest.fixture(scope="module")
def cluster() -> Iterator[GaleraCluster]:
    with GaleraCluster() as made:
        yield made


@pytest.fixture
def store(cluster: GaleraCluster, tmp_path: Path) -> Iterator[Store]:
    made = Store(cluster.nodes[0].dsn, tmp_path)
    yield made
    made.empty()
    made.close()


@pytest.fixture
def kps(store: Store) -> list[KeyProvider]:
    return announced(store, "KP_Alice", "KP_Bob")


def settings_of(*nodes: GaleraNode) -> MySqlSettings:
    """The store by way of these nodes, the first one first."""
    first = nodes[0].dsn
    addresses = ",".join(f"{node.host}:{node.port}" for node in nodes)
    return MySqlSettings(addresses, 3306, first.user, first.settings.password, first.database)


@pytest.fixture
def engines(cluster: GaleraCluster) -> Iterator[list[Engine]]:
    made = [make_queue_engine(settings_of(node)) for node in cluster.nodes]
    yield made
    for engine in made:
        engine.dispose()


async def closed(*queues: GroupCommit[ClaimRequest, ClaimedKey]) -> None:
    for queue in queues:
        await queue.close()


async def answer_of(queue: GroupCommit[ClaimRequest, ClaimedKey], request: ClaimRequest) -> ClaimedKey | SkipbusError:
    try:
        return await queue.submit(request)
    except SkipbusError as error:
        return error


def requests_for(keys: Sequence[IssuedKey]) -> list[ClaimRequest]:
    return [ClaimRequest(bytes.fromhex(key.key_id), "KP_Alice", "race") for key in keys]


async def test_callers_who_race_on_all_nodes_get_each_key_once(kps: list[KeyProvider], engines: list[Engine]) -> None:
    alice, bob = kps
    queues = [GroupCommit(f"claim-{n}", bob.claim_batch, engine, LIMITS) for n, engine in enumerate(engines)]
    keys = alice.issue(bob, RACES)
    for start in range(0, RACES, 50):
        requests = requests_for(keys[start : start + 50])
        races = [(queues[n % len(queues)], request) for request in requests for n in range(CALLERS)]
        random.shuffle(races)
        answers = await asyncio.gather(*(answer_of(queue, request) for queue, request in races))
        refused = [answer for answer in answers if not isinstance(answer, ClaimedKey)]
        assert {type(answer) for answer in refused} == {KeyNotAvailable}, refused[:3]
        given = Counter(answer.key for answer in answers if isinstance(answer, ClaimedKey))
        assert given == Counter(key.key for key in keys[start : start + 50])
    await closed(*queues)


async def test_a_key_is_found_on_another_node_immediately_after_it_was_issued(
    kps: list[KeyProvider], engines: list[Engine]
) -> None:
    alice, bob = kps
    issues = GroupCommit("issue", alice.issue_batch, engines[0], LIMITS)
    claims = [GroupCommit(f"claim-{n}", bob.claim_batch, engine, LIMITS) for n, engine in enumerate(engines)]
    for number in range(ISSUES):
        issued = await issues.submit(IssueRequest("KP_Bob", 256, f"issue-{number}"))
        assert isinstance(issued, IssuedKey)
        (request,) = requests_for([issued])
        claimed = await claims[1 + number % 2].submit(request)
        assert claimed.key == issued.key
    await issues.close()
    await closed(*claims)


def test_of_candidates_on_all_nodes_one_is_elected(cluster: GaleraCluster, store: Store) -> None:
    engines = [make_engine(settings_of(node)) for node in cluster.nodes for _ in range(2)]
    for number in range(30):
        candidates = [Election(engine, f"race {number}") for engine in engines]
        with ThreadPoolExecutor(len(candidates)) as pool:
            assert list(pool.map(Election.tick, candidates)).count(True) <= 1
            # A certification failure leaves the lease free; the next tick is a second later.
            wait_for(lambda them=candidates: any(map(Election.tick, them)), timeout_seconds=5)  # type: ignore[misc]
            assert [candidate.elected for candidate in candidates].count(True) == 1
    for engine in engines:
        engine.dispose()


def test_migrations_that_start_on_all_nodes_together_all_succeed(cluster: GaleraCluster) -> None:
    with cluster.nodes[0].databases("migrated") as (database,):
        mysql = [cluster.database(database, node).settings for node in cluster.nodes for _ in range(2)]
        processes = [start_upgrade(one) for one in mysql]
        ends = [process.communicate(timeout=120) for process in processes]
        assert [process.returncode for process in processes] == [0] * len(processes), ends
        assert [out.strip() for out, _ in ends].count("True") == 1
        assert {store_revision(one) for one in mysql} == {HEAD_REVISION}


def test_a_process_goes_on_with_another_node_when_its_own_has_ended(cluster: GaleraCluster, store: Store) -> None:
    first, second, third = cluster.nodes
    engine = make_engine(settings_of(third, second, first), lean=True)
    assert _port_of(engine) == third.port
    third.kill()
    try:
        wait_for(lambda: _port_of(engine) == second.port, timeout_seconds=10)
    finally:
        third.start()
    # It stays where it is.
    assert _port_of(engine) == second.port
    engine.dispose()


def test_a_node_that_is_not_part_of_its_cluster_is_left_for_another(cluster: GaleraCluster, store: Store) -> None:
    first, second, _ = cluster.nodes
    engine = make_engine(settings_of(second, first), lean=True)
    with engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT @@port").scalar() == second.port
    with second.admin_connection() as admin, admin.cursor() as cursor:
        # Alone and without a majority: each statement fails with error 1047.
        cursor.execute("SET GLOBAL wsrep_provider_options = 'gmcast.isolate=1'")
        wait_for(lambda: second.status("wsrep_ready") == "OFF", timeout_seconds=30)
        try:
            wait_for(lambda: _port_of(engine) == first.port, timeout_seconds=10)
        finally:
            cursor.execute("SET GLOBAL wsrep_provider_options = 'gmcast.isolate=0'")
    second.wait_ready()
    engine.dispose()


def _port_of(engine: Engine) -> int | None:
    try:
        with driver_errors(), engine.connect() as connection:
            connection.exec_driver_sql("SELECT COUNT(*) FROM leases")
            return int(connection.exec_driver_sql("SELECT @@port").scalar_one())
    except StoreUnavailable:
        return None
