"""Queues and brokers that answer nobody: a KP raises an alarm, deletes nothing, and nobody else is held up.

RabbitMQ writes down half a second late that a quorum queue exists. One that was made just before a SIGKILL comes back
as a name that answers nobody; that is how these tests break a queue, each on a broker of its own.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import aio_pika
import pytest

from sandbox.client import metric
from sandbox.mariadb import Database
from sandbox.ports import free_port
from sandbox.rabbitmq import RabbitMqServer
from skipbus.services.syncer.consume import (
    CONSUME_SECONDS,
    declare_queues,
)
from skipbus.shared.broker.names import queue_name
from skipbus.shared.protocol.envelopes import EnvelopeType
from tests.integration.syncer_rig import TIMEOUT_SECONDS, Kp, Rig
from tests.system.broker_admin import BrokerAdmin
from tests.waiting import wait_for

ISSUED = EnvelopeType.KEY_ISSUED
WRITTEN_SECONDS = 3.0


# Each needs a broker of its own, which it looks into and stops.
pytestmark = pytest.mark.stops_servers


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[RabbitMqServer]:
    with RabbitMqServer(tmp_path / "broker") as server:
        yield server


@pytest.fixture
def rig(database: Database, broker: RabbitMqServer, tmp_path: Path) -> Iterator[Rig]:
    with Rig(tmp_path, database, broker.url) as made:
        yield made


def wait_log(kp: Kp, text: str) -> None:
    wait_for(lambda: text in kp.log, timeout_seconds=TIMEOUT_SECONDS)


def break_queue(broker: RabbitMqServer, kp: Kp) -> None:
    """Makes the queues of a KP that never ran, as its syncer would, and kills the broker in the next instant."""
    asyncio.run(_make_queues_and_kill(broker, kp))
    broker.start()


async def _make_queues_and_kill(broker: RabbitMqServer, kp: Kp) -> None:
    connection = await aio_pika.connect(broker.url)
    channel = await connection.channel()
    await declare_queues(channel, kp.id)
    broker.kill()


def rabbitmqctl(broker: RabbitMqServer, *arguments: str) -> str:
    """What an operator does on the broker's host."""
    environ = {name: value for name, value in broker.environ.items() if name != "detached"}
    command = Path(broker.program).with_name("rabbitmqctl")
    done = subprocess.run([command, *arguments], env=environ, check=True, capture_output=True, text=True, timeout=60)
    return done.stdout


def has_queue(broker: RabbitMqServer, kp: Kp) -> bool:
    return queue_name(kp.id) in rabbitmqctl(broker, "list_queues", "--silent", "name").split("\n")


def alarm(metrics_port: int) -> float:
    """The metric by which an operator is paged."""
    (value,) = metric(metrics_port, "skipbus_queue_without_leader")
    return value


def test_a_queue_without_a_leader_is_an_alarm_until_an_operator_deletes_it_and_nothing_is_lost(
    rig: Rig, broker: RabbitMqServer
) -> None:
    metrics_port = free_port()
    alice = rig.add("KP_Alice", "KP_Bob")
    bob = rig.add("KP_Bob", "KP_Alice", SKIP_METRICS_PORT=str(metrics_port))
    alice.process.start("syncer")
    wait_log(alice, "broker connected")
    time.sleep(WRITTEN_SECONDS)
    break_queue(broker, bob)
    rig.tell(alice, bob, ISSUED, 2)
    bob.process.start("syncer")
    fault = f"queue without a leader: {queue_name(bob.id)}"
    wait_log(bob, fault)
    assert "rabbitmq-queues quorum_status" in bob.log
    wait_for(lambda: rig.sign_of_life(bob) == fault, timeout_seconds=TIMEOUT_SECONDS)
    assert alarm(metrics_port) == 1
    # For as long as nobody acts: one alarm, further attempts, and the queue stays.
    time.sleep(3 * CONSUME_SECONDS)
    assert has_queue(broker, bob)
    assert bob.log.count(fault) == 1
    rabbitmqctl(broker, "delete_queue", queue_name(bob.id))
    rig.wait_count(bob, alice, "inbound_issued", 2)
    rig.wait_outbox_empty(alice)
    rig.wait_online(alice, bob)
    wait_for(lambda: rig.sign_of_life(bob) == "ok", timeout_seconds=TIMEOUT_SECONDS)
    assert alarm(metrics_port) == 0
    assert "Traceback" not in alice.log + bob.log


def test_a_peer_whose_queue_answers_nobody_holds_up_no_other(rig: Rig, broker: RabbitMqServer) -> None:
    alice, bob = rig.add("KP_Alice", "KP_Bob", "KP_Carol"), rig.add("KP_Bob", "KP_Alice")
    carol = rig.add("KP_Carol", "KP_Alice")
    for kp in (alice, carol):
        kp.process.start("syncer")
    rig.wait_online(alice, carol)
    time.sleep(WRITTEN_SECONDS)
    break_queue(broker, bob)
    rig.wait_online(alice, carol)
    for _ in range(40):
        rig.tell(alice, bob, ISSUED, 1)
        time.sleep(0.05)
    wait_log(alice, "the broker does not confirm envelopes for this peer")
    for count in (1, 2, 3):
        rig.tell(alice, carol, ISSUED, 1)
        wait_for(lambda wanted=count: rig.count(carol, alice, "inbound_issued") == wanted, timeout_seconds=10)  # type: ignore[misc]
    wait_for(lambda: len(rig.outbox(alice)) == 40, timeout_seconds=10)
    assert carol.log.count('"event":"peer offline"') <= 1, "heartbeats were held up too"

    rabbitmqctl(broker, "delete_queue", queue_name(bob.id))
    bob.process.start("syncer")
    rig.wait_count(bob, alice, "inbound_issued", 40)
    rig.wait_outbox_empty(alice)


def test_what_lay_in_a_queue_that_was_deleted_comes_again_and_counts_once(rig: Rig) -> None:
    alice, bob = rig.add("KP_Alice", "KP_Bob"), rig.add("KP_Bob", "KP_Alice")
    for kp in (alice, bob):
        kp.process.start("syncer")
    rig.wait_online(alice, bob)
    bob.process.stop("syncer")
    rig.tell(alice, bob, ISSUED, 5)
    wait_for(lambda: all(row.sent_ms for row in rig.outbox(alice)), timeout_seconds=TIMEOUT_SECONDS)
    with BrokerAdmin(rig.rabbitmq_url) as bus:
        assert bus.depth(queue_name(bob.id)) == 1
    asyncio.run(delete_queue(rig.rabbitmq_url, bob))
    bob.process.start("syncer")
    rig.wait_count(bob, alice, "inbound_issued", 5)
    rig.wait_outbox_empty(alice)


async def delete_queue(url: str, kp: Kp) -> None:
    async with await aio_pika.connect(url) as connection:
        await (await connection.channel()).queue_delete(queue_name(kp.id))


def test_a_queue_that_finds_its_leader_again_ends_the_alarm_by_itself(rig: Rig, broker: RabbitMqServer) -> None:
    alice, bob = rig.add("KP_Alice", "KP_Bob"), rig.add("KP_Bob", "KP_Alice")
    for kp in (alice, bob):
        kp.process.start("syncer")
    rig.wait_online(alice, bob)
    time.sleep(WRITTEN_SECONDS)
    alice.process.stop("syncer")
    # As a server of a cluster is that waits for the others: there, and without an answer to anybody.
    server = f"'%2F_{queue_name(bob.id)}'"
    rabbitmqctl(broker, "eval", f"sys:suspend({server}).")
    rabbitmqctl(broker, "eval", 'rabbit_networking:close_all_connections("test").')
    wait_log(bob, "queue without a leader")
    time.sleep(2 * CONSUME_SECONDS)
    rabbitmqctl(broker, "eval", f"sys:resume({server}).")
    alice.process.start("syncer")
    rig.tell(alice, bob, ISSUED, 1)
    rig.wait_count(bob, alice, "inbound_issued", 1)
    wait_for(lambda: rig.sign_of_life(bob) == "ok", timeout_seconds=TIMEOUT_SECONDS)


def test_a_broker_that_hangs_is_told_in_the_log_and_in_the_sign_of_life(rig: Rig, broker: RabbitMqServer) -> None:
    alice, bob = rig.add("KP_Alice", "KP_Bob"), rig.add("KP_Bob", "KP_Alice")
    for kp in (alice, bob):
        kp.process.start("syncer")
    rig.wait_online(alice, bob)
    os.kill(broker.pid, signal.SIGSTOP)
    try:
        wait_log(alice, "the broker does not confirm messages")
        silent = "the broker does not confirm messages: check its disk and memory alarms"
        wait_for(lambda: rig.sign_of_life(alice) == silent, timeout_seconds=TIMEOUT_SECONDS)
    finally:
        os.kill(broker.pid, signal.SIGCONT)
    rig.wait_online(alice, bob)
    wait_for(lambda: rig.sign_of_life(alice) == "ok", timeout_seconds=TIMEOUT_SECONDS)
