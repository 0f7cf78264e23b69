"""Retrieval ahead of arrival: encryptors can be faster than the bus, and wait for a keyId that has yet to come."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sandbox.client import get
from sandbox.mariadb import MariaDbServer
from sandbox.rabbitmq import RabbitMqServer
from tests.system.attack_scene import Scene, attack_scene
from tests.system.harness import RawConnection, request_bytes

WAIT_SECONDS = 2.0
WAITERS = 1000


@pytest.fixture(scope="module")
def scene(
    tmp_path_factory: pytest.TempPathFactory, mariadb: MariaDbServer, rabbitmq: RabbitMqServer
) -> Iterator[Scene]:
    with attack_scene(
        tmp_path_factory.mktemp("arrivals"), mariadb, rabbitmq, SKIP_RETRIEVE_WAIT=str(WAIT_SECONDS)
    ) as made:
        yield made


def threads_of(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/task").iterdir()))


def test_a_key_that_arrives_while_it_is_asked_for_is_answered_at_once(scene: Scene) -> None:
    load = scene.carols_keys()
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(scene.at_bob, load.keys[0])
        time.sleep(0.7)
        assert not asked.done()
        sent = time.monotonic()
        scene.admin.send(scene.bob_id, scene.carol.key_issued(scene.bob_id, load))
        answer = asked.result(10)
        assert time.monotonic() - sent < 0.6
    assert answer.body["key"] == load.keys[0].key


def test_a_key_that_never_comes_is_a_400_after_the_wait(scene: Scene) -> None:
    started = time.monotonic()
    answer = get(scene.bob.url, "key", secrets.token_hex(16), remoteSystemID=scene.carol.id)
    assert answer.status == 400
    assert WAIT_SECONDS <= time.monotonic() - started < WAIT_SECONDS + 1


def test_of_many_who_wait_for_one_key_one_gets_it(scene: Scene) -> None:
    load = scene.carols_keys()
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(scene.at_bob, load.keys[0]) for _ in range(8)]
        time.sleep(0.5)
        scene.admin.send(scene.bob_id, scene.carol.key_issued(scene.bob_id, load))
        answers = [one.result(10) for one in asked]
    assert sorted(answer.status for answer in answers) == [200] + [400] * 7


def test_a_thousand_who_wait_hold_no_thread_and_hold_up_nobody(scene: Scene) -> None:
    api = scene.bob.processes["api"].pid
    before = threads_of(api)
    load = scene.carols_keys()
    wanted = [secrets.token_hex(16) for _ in range(WAITERS - 1)] + [load.keys[0].key_id]
    connections = [RawConnection(scene.bob.port) for _ in wanted]
    try:
        for connection, key_id in zip(connections, wanted, strict=True):
            connection.send(request_bytes(f"/key/{key_id}?remoteSystemID={scene.carol.id}"))
        time.sleep(0.3)
        assert threads_of(api) <= before + 1
        started = time.monotonic()
        scene.lab.assert_retrievable(scene.issue())
        assert time.monotonic() - started < 1
        scene.admin.send(scene.bob_id, scene.carol.key_issued(scene.bob_id, load))
        assert connections[-1].read().json["key"] == load.keys[0].key
        assert {connection.read().status for connection in connections[:-1]} == {400}
    finally:
        for connection in connections:
            connection.close()


def test_a_caller_who_goes_away_while_waiting_costs_nothing(scene: Scene) -> None:
    load = scene.carols_keys()
    for _ in range(20):
        with RawConnection(scene.bob.port) as connection:
            connection.send(request_bytes(f"/key/{load.keys[0].key_id}?remoteSystemID={scene.carol.id}"))
            time.sleep(0.01)
    time.sleep(WAIT_SECONDS + 0.5)
    scene.admin.send(scene.bob_id, scene.carol.key_issued(scene.bob_id, load))
    assert scene.at_bob(load.keys[0]).body["key"] == load.keys[0].key
