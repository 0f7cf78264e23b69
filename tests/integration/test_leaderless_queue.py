"""Queues and brokers that answer nobody: a KP makes its own queue anew, nothing is lost, nobody else is held up.

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

from sandbox.servers import Database, RabbitMqServer
from skipbus.shared.broker import SETTLED_SECONDS
from skipbus.shared.bus import CONSUME_SECONDS, REMAKE_AFTER_TRIES, _declare_exchanges, _declare_queues
from skipbus.shared.bus_names import queue_name
from skipbus.shared.protocol.envelopes import EnvelopeType
from tests.integration.syncer_rig import TIMEOUT_SECONDS, Kp, Rig, bus_of
from tests.waiting import wait_for

ISSUED = EnvelopeType.KEY_ISSUED
WRITTEN_SECONDS = 3.0


# Each needs a broker of its own, which it looks into and stops.
pytestmark = pytest.mark.stops_servers


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[RabbitMqServer]:
    server = RabbitMqServer(tmp_path / "broker")
    try:
        server.start()
        yield server
    finally:
        server.stop()


@pytest.fixture
def rig(database: Database, broker: RabbitMqServer, tmp_path: Path) -> Iterator[Rig]:
    made = Rig(tmp_path, database, broker.url)
    yield made
    made.close()


def wait_log(kp: Kp, text: str) -> None:
    wait_for(lambda: text in kp.log, timeout_seconds=TIMEOUT_SECONDS)


def break_queue(broker: RabbitMqServer, kp: Kp) -> None:
    """Makes the queues of a KP that never ran, as its syncer would, and kills the broker in the next instant."""
    asyncio.run(_make_queues_and_kill(broker, kp))
    broker.start()


async def _make_queues_and_kill(broker: RabbitMqServer, kp: Kp) -> None:
    connection = await aio_pika.connect(broker.url)
    channel = await connection.channel()
    await _declare_queues(channel, await _declare_exchanges(channel), kp.id)
    broker.kill()


def evaluate(broker: RabbitMqServer, expression: str) -> None:
    """Has the node do something that no client can ask for."""
    environ = {name: value for name, value in broker.environ.items() if name != "detached"}
    command = Path(broker.program).with_name("rabbitmqctl")
    subprocess.run([command, "eval", expression], env=environ, check=True, capture_output=True, timeout=60)


def test_a_queue_that_lost_its_leader_is_made_anew_and_what_was_told_meanwhile_arrives_once(
    rig: Rig, broker: RabbitMqServer
) -> None:
    alice, bob = rig.add("KP_Alice", "KP_Bob"), rig.add("KP_Bob", "KP_Alice")
    alice.process.start("syncer")
    wait_log(alice, "broker connected")
    time.sleep(WRITTEN_SECONDS)
    break_queue(broker, bob)
    rig.tell(alice, bob, ISSUED, 2)
    bob.process.start("syncer")
    wait_log(bob, "queue without a leader: made anew")
    rig.wait_count(bob, alice, "inbound_issued", 2)
    rig.wait_outbox_empty(alice)
    rig.wait_online(alice, bob)
    assert bob.log.count("made anew") == 1
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
    wait_log(alice, "the broker does not confirm what is for this peer")
    for count in (1, 2, 3):
        rig.tell(alice, carol, ISSUED, 1)
        wait_for(lambda wanted=count: rig.count(carol, alice, "inbound_issued") == wanted, timeout_seconds=10)  # type: ignore[misc]
    wait_for(lambda: len(rig.outbox(alice)) == 40, timeout_seconds=10)
    assert carol.log.count('"event":"peer offline"') <= 1, "heartbeats were held up too"

    bob.process.start("syncer")
    rig.wait_count(bob, alice, "inbound_issued", 40)
    rig.wait_outbox_empty(alice)


def test_what_lay_in_a_queue_that_was_made_anew_comes_again_and_counts_once(rig: Rig) -> None:
    alice, bob = rig.add("KP_Alice", "KP_Bob"), rig.add("KP_Bob", "KP_Alice")
    for kp in (alice, bob):
        kp.process.start("syncer")
    rig.wait_online(alice, bob)
    bob.process.stop("syncer")
    rig.tell(alice, bob, ISSUED, 5)
    wait_for(lambda: all(row.sent_ms for row in rig.outbox(alice)), timeout_seconds=TIMEOUT_SECONDS)
    with bus_of(rig.rabbitmq_url) as bus:
        assert bus.depth(bob) == 1
    asyncio.run(delete_queue(rig.rabbitmq_url, bob))
    bob.process.start("syncer")
    rig.wait_count(bob, alice, "inbound_issued", 5)
    rig.wait_outbox_empty(alice)


async def delete_queue(url: str, kp: Kp) -> None:
    async with await aio_pika.connect(url) as connection:
        await (await connection.channel()).queue_delete(queue_name(kp.id))


def test_a_queue_that_loses_its_leader_later_is_left_to_its_cluster(rig: Rig, broker: RabbitMqServer) -> None:
    alice, bob = rig.add("KP_Alice", "KP_Bob"), rig.add("KP_Bob", "KP_Alice")
    for kp in (alice, bob):
        kp.process.start("syncer")
    rig.wait_online(alice, bob)
    time.sleep(SETTLED_SECONDS + 1)
    alice.process.stop("syncer")
    # As a server of a cluster is that waits for the others: there, and without an answer to anybody.
    server = f"'%2F_{queue_name(bob.id)}'"
    evaluate(broker, f"sys:suspend({server}).")
    evaluate(broker, 'rabbit_networking:close_all_connections("test").')
    wait_log(bob, "queue without a leader: has its cluster lost the majority?")
    time.sleep(CONSUME_SECONDS * (REMAKE_AFTER_TRIES + 1))
    assert "made anew" not in bob.log
    evaluate(broker, f"sys:resume({server}).")
    alice.process.start("syncer")
    rig.tell(alice, bob, ISSUED, 1)
    rig.wait_count(bob, alice, "inbound_issued", 1)
    assert "made anew" not in bob.log


def test_a_broker_that_hangs_is_told_in_the_log_and_in_the_sign_of_life(rig: Rig, broker: RabbitMqServer) -> None:
    alice, bob = rig.add("KP_Alice", "KP_Bob"), rig.add("KP_Bob", "KP_Alice")
    for kp in (alice, bob):
        kp.process.start("syncer")
    rig.wait_online(alice, bob)
    os.kill(broker.pid, signal.SIGSTOP)
    try:
        wait_log(alice, "the broker confirms nothing")
        wait_for(lambda: rig.sign_of_life(alice) == "broker away", timeout_seconds=TIMEOUT_SECONDS)
    finally:
        os.kill(broker.pid, signal.SIGCONT)
    rig.wait_online(alice, bob)
    wait_for(lambda: rig.sign_of_life(alice) == "ok", timeout_seconds=TIMEOUT_SECONDS)
