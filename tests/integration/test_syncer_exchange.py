"""Two syncers over one store and one broker: what they tell each other arrives once, whatever is lost on the way."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandbox.mariadb import Database, MariaDbServer
from sandbox.rabbitmq import RabbitMqServer
from sandbox.simulated_peer import fresh_number
from skipbus.services.syncer.replies import ANSWER_EVERY_SECONDS
from skipbus.shared.broker.names import queue_name
from skipbus.shared.clock import now_ms
from skipbus.shared.protocol.announcements import Announcement, digest, sign_announcement
from skipbus.shared.protocol.envelopes import EnvelopeType, check_envelope, read_envelope
from skipbus.shared.protocol.payloads import (
    Capabilities,
    pack_acknowledgement,
    pack_capabilities,
    pack_heartbeat,
    read_payload,
)
from skipbus.shared.store.engine import driver_errors
from skipbus.shared.store.outbox import OutboxRow, insert_outbox_rows
from tests.integration.syncer_rig import (
    HEARTBEAT_SECONDS,
    TIMEOUT_SECONDS,
    Kp,
    Rig,
    events,
    signed,
)
from tests.system.broker_admin import BrokerAdmin
from tests.waiting import wait_for

ISSUED, RETRIEVED, EXPIRED = EnvelopeType.KEY_ISSUED, EnvelopeType.KEY_RETRIEVED, EnvelopeType.KEY_EXPIRED


@pytest.fixture
def rig(database: Database, rabbitmq: RabbitMqServer, tmp_path: Path) -> Iterator[Rig]:
    with Rig(tmp_path, database, rabbitmq.url) as made:
        yield made


@pytest.fixture
def pair(rig: Rig) -> tuple[Kp, Kp]:
    """KP_Alice and KP_Bob, each of whom has heard the other."""
    alice, bob = rig.add("KP_Alice", "KP_Bob"), rig.add("KP_Bob", "KP_Alice")
    for kp in (alice, bob):
        kp.process.start("syncer")
    rig.wait_online(alice, bob)
    return alice, bob


def wait_log(kp: Kp, text: str) -> None:
    wait_for(lambda: text in kp.log, timeout_seconds=TIMEOUT_SECONDS)


# --- heartbeats


def test_a_peer_whose_syncer_dies_is_late_then_offline_then_online_again(rig: Rig, pair: tuple[Kp, Kp]) -> None:
    alice, bob = pair
    bob.process.kill("syncer")
    wait_log(alice, '"event":"peer late"')
    wait_log(alice, '"event":"peer offline"')
    bob.process.start("syncer")
    wait_for(lambda: rig.online(alice, bob), timeout_seconds=TIMEOUT_SECONDS)
    wait_for(lambda: '"peer online"' in alice.log.split("peer offline")[-1], timeout_seconds=TIMEOUT_SECONDS)


def test_heartbeats_do_not_pile_up_for_a_peer_that_is_down(rig: Rig, pair: tuple[Kp, Kp]) -> None:
    _, bob = pair
    bob.process.stop("syncer")
    time.sleep(6 * HEARTBEAT_SECONDS)
    with BrokerAdmin(rig.rabbitmq_url) as bus:
        assert bus.depth(queue_name(bob.id)) == 0
        assert bus.dead_letter(bob.id) is None


def test_a_kp_tells_of_its_new_announcement_and_asks_for_one_that_it_lacks(rig: Rig) -> None:
    alice, carol = rig.add("KP_Alice", "KP_Carol"), rig.add_simulated_peer("KP_Carol")
    alice.process.start("syncer")
    wait_log(alice, "broker connected")
    # A heartbeat of one whom it does not know yet would be refused, and this peer sends only one.
    wait_log(alice, carol.id)
    newer = Announcement(carol.id, carol.identity.public_key, now_ms() + 1, "newer", ())
    body = sign_announcement(newer, carol.identity)
    with BrokerAdmin(rig.rabbitmq_url) as bus:
        bus.receive_live_for(carol.id)

        def next_capabilities() -> Capabilities:
            deadline = time.monotonic() + TIMEOUT_SECONDS
            while time.monotonic() < deadline:
                if (data := bus.heard(carol.id)) is None:
                    time.sleep(0.05)
                    continue
                envelope = read_envelope(data)
                check_envelope(envelope, carol.id, alice.identity.public_key, now_ms())
                payload = read_payload(envelope.header.type, envelope.payload)
                if isinstance(payload, Capabilities):
                    return payload
            raise AssertionError("no capabilities were heard")

        sent = signed(carol, alice, EnvelopeType.HEARTBEAT, pack_heartbeat(500, digest(body), "test"))
        bus.send(alice.id, sent, live=True)
        assert next_capabilities() == Capabilities(None, True)

        bus.send(alice.id, signed(carol, alice, EnvelopeType.CAPABILITIES, pack_capabilities(body, request=False)))
        wait_for(lambda: rig.announcement(carol.id) == body, timeout_seconds=TIMEOUT_SECONDS)

        bus.send(alice.id, signed(carol, alice, EnvelopeType.CAPABILITIES, pack_capabilities(None, request=True)))
        assert next_capabilities() == Capabilities(rig.announcement(alice.id), False)

        # Within a second of the last one it would not be sent: a real peer would see it in the next heartbeat.
        time.sleep(ANSWER_EVERY_SECONDS)
        renewed = rig.announce(alice.id, alice.identity)
        assert next_capabilities() == Capabilities(renewed, False)


# --- events


def test_events_are_counted_at_both_ends_and_their_rows_go(rig: Rig, pair: tuple[Kp, Kp]) -> None:
    alice, bob = pair
    rig.tell(alice, bob, ISSUED, 5)
    rig.tell(alice, bob, ISSUED, 2)
    rig.tell(bob, alice, RETRIEVED, 3)
    rig.tell(bob, alice, EXPIRED, 1)
    rig.wait_outbox_empty(alice)
    rig.wait_outbox_empty(bob)
    mine, theirs = rig.peer(alice, bob), rig.peer(bob, alice)
    assert mine is not None
    assert theirs is not None
    assert (mine.issued, mine.retrieved, mine.expired) == (7, 3, 1)
    assert (theirs.inbound_issued, theirs.inbound_retrieved, theirs.inbound_expired) == (7, 3, 1)
    assert '"correlation_ids":["c-0","c-1","c-2"]' in alice.log


def test_an_outbox_row_goes_only_when_the_peer_has_acknowledged_it(rig: Rig, pair: tuple[Kp, Kp]) -> None:
    alice, bob = pair
    bob.process.stop("syncer")
    rig.tell(alice, bob, ISSUED, 4)
    wait_for(lambda: all(row.sent_ms for row in rig.outbox(alice)), timeout_seconds=TIMEOUT_SECONDS)
    time.sleep(1.5)
    assert len(rig.outbox(alice)) == 1
    assert rig.count(bob, alice, "inbound_issued") == 0
    bob.process.start("syncer")
    rig.wait_outbox_empty(alice)
    assert rig.count(bob, alice, "inbound_issued") == 4


def test_events_for_a_peer_that_never_ran_wait_until_it_does(rig: Rig) -> None:
    alice, bob = rig.add("KP_Alice", "KP_Bob"), rig.add("KP_Bob", "KP_Alice")
    alice.process.start("syncer")
    rig.tell(alice, bob, ISSUED, 2)
    wait_log(alice, '"outcome":"no_queue"')
    bob.process.start("syncer")
    rig.wait_count(bob, alice, "inbound_issued", 2)
    rig.wait_outbox_empty(alice)


def test_an_envelope_delivered_twice_has_its_effect_once_and_is_acknowledged_twice(rig: Rig) -> None:
    bob, carol = rig.add("KP_Bob", "KP_Carol"), rig.add_simulated_peer("KP_Carol")
    bob.process.start("syncer")
    wait_log(bob, "broker connected")
    number, payload = fresh_number(), events(RETRIEVED, 3)
    with BrokerAdmin(rig.rabbitmq_url) as bus:
        bus.send(bob.id, *[signed(carol, bob, RETRIEVED, payload, number=number) for _ in range(2)])
        wait_for(lambda: bob.log.count('"event":"events received"') == 2, timeout_seconds=TIMEOUT_SECONDS)
        assert bus.dead_letter(bob.id) is None
    assert rig.count(bob, carol, "retrieved") == 3
    assert rig.inbox_size(bob) == 1
    assert '"outcome":"duplicate"' in bob.log


def test_a_peer_cannot_acknowledge_what_was_sent_to_another(rig: Rig) -> None:
    alice, bob = rig.add("KP_Alice", "KP_Bob", "KP_Carol"), rig.add("KP_Bob", "KP_Alice")
    carol = rig.add_simulated_peer("KP_Carol")
    alice.process.start("syncer")
    rig.tell(alice, bob, ISSUED, 1)
    wait_for(lambda: all(row.sent_ms for row in rig.outbox(alice)), timeout_seconds=TIMEOUT_SECONDS)
    numbers = [row.envelope_no for row in rig.outbox(alice)]
    with BrokerAdmin(rig.rabbitmq_url) as bus:
        bus.send(alice.id, signed(carol, alice, EnvelopeType.KEY_STORED, pack_acknowledgement(numbers)))
        bus.send(alice.id, signed(carol, alice, RETRIEVED, events(RETRIEVED, 1)))
        rig.wait_count(alice, carol, "retrieved", 1)
    assert len(rig.outbox(alice)) == 1


def test_a_kp_may_be_its_own_peer(rig: Rig) -> None:
    solo = rig.add("KP_Solo", "KP_Solo")
    solo.process.start("syncer")
    rig.tell(solo, solo, ISSUED, 2)
    rig.tell(solo, solo, RETRIEVED, 1)
    rig.wait_outbox_empty(solo)
    wait_for(lambda: rig.online(solo, solo), timeout_seconds=TIMEOUT_SECONDS)
    row = rig.peer(solo, solo)
    assert row is not None
    assert (row.issued, row.retrieved, row.inbound_issued, row.inbound_retrieved) == (2, 1, 2, 1)


# --- faults


def let_queues_be_written() -> None:
    """So that a killed broker knows its queues when it is back, and no test here waits until they are made anew."""
    time.sleep(3)


@pytest.mark.stops_servers
def test_events_wait_for_a_killed_broker_and_peers_are_online_again(
    rig: Rig, pair: tuple[Kp, Kp], rabbitmq: RabbitMqServer
) -> None:
    alice, bob = pair
    let_queues_be_written()
    rabbitmq.kill()
    try:
        wait_log(alice, '"event":"broker away"')
        wait_for(lambda: rig.sign_of_life(alice) == "no connection to the broker", timeout_seconds=TIMEOUT_SECONDS)
        rig.tell(alice, bob, ISSUED, 6)
        wait_for(lambda: all(row.envelope_no for row in rig.outbox(alice)), timeout_seconds=TIMEOUT_SECONDS)
    finally:
        rabbitmq.start()
    rig.wait_count(bob, alice, "inbound_issued", 6)
    rig.wait_outbox_empty(alice)
    rig.wait_online(alice, bob)
    wait_for(lambda: rig.sign_of_life(alice) == "ok", timeout_seconds=TIMEOUT_SECONDS)
    assert alice.log.count('"event":"broker away"') == 1
    assert alice.log.count('"event":"broker back"') == 1
    assert rig.rabbitmq_url.split(":")[2].split("@")[0] not in alice.log
    assert "Traceback" not in alice.log


@pytest.mark.stops_servers
def test_a_broker_that_comes_back_empty_is_put_in_order(rig: Rig, tmp_path: Path) -> None:
    """Its own broker: emptying the shared one would harm other tests."""
    broker = RabbitMqServer(tmp_path / "broker")
    try:
        broker.start()
        rig.rabbitmq_url = broker.url
        alice, bob = rig.add("KP_Alice", "KP_Bob"), rig.add("KP_Bob", "KP_Alice")
        for kp in (alice, bob):
            kp.process.start("syncer")
        rig.wait_online(alice, bob)
        broker.stop()
        empty = RabbitMqServer(tmp_path / "empty", port=broker.port)
        empty.password = broker.password
        broker = empty
        rig.tell(alice, bob, ISSUED, 2)
        broker.start()
        rig.wait_count(bob, alice, "inbound_issued", 2)
        rig.wait_outbox_empty(alice)
        rig.wait_online(alice, bob)
    finally:
        broker.stop()


@pytest.mark.stops_servers
def test_a_syncer_killed_between_commit_and_sending_sends_later_with_effect_once(
    rig: Rig, pair: tuple[Kp, Kp], rabbitmq: RabbitMqServer
) -> None:
    alice, bob = pair
    let_queues_be_written()
    rabbitmq.kill()
    try:
        wait_log(alice, '"event":"broker away"')
        rig.tell(alice, bob, ISSUED, 3)
        wait_for(lambda: all(row.envelope_no for row in rig.outbox(alice)), timeout_seconds=TIMEOUT_SECONDS)
        alice.process.kill("syncer")
        assert [row.sent_ms for row in rig.outbox(alice)] == [None]
    finally:
        rabbitmq.start()
    alice.process.start("syncer")
    rig.wait_count(bob, alice, "inbound_issued", 3)
    rig.wait_outbox_empty(alice)
    assert rig.count(alice, bob, "issued") == 3


def test_an_acknowledgement_that_was_lost_is_given_again_without_a_second_effect(rig: Rig, pair: tuple[Kp, Kp]) -> None:
    alice, bob = pair
    rig.tell(alice, bob, ISSUED, 2)
    rig.wait_outbox_empty(alice)
    # As if the acknowledgement had never come: the same envelope once more, sent by a syncer that starts anew.
    alice.process.stop("syncer")
    number = int(bob.log.split('"event":"events received"')[1].split('"number":')[1].split(",")[0])
    rig.tell(alice, bob, ISSUED, 2)
    with driver_errors(), rig.engine.begin() as connection:
        for row in rig.outbox(alice):
            connection.exec_driver_sql("UPDATE outbox SET envelope_no = %s WHERE id = %s", (number, row.id))
    alice.process.start("syncer")
    rig.wait_outbox_empty(alice)
    assert rig.count(bob, alice, "inbound_issued") == 2


def test_a_malformed_row_does_not_keep_other_rows_from_being_sent(rig: Rig, pair: tuple[Kp, Kp]) -> None:
    alice, bob = pair
    with rig.engine.begin() as connection:
        insert_outbox_rows(connection, [OutboxRow(alice.id, bob.id, RETRIEVED.value, b"\xc1", 1, now_ms())])
    wait_log(alice, "outbox rows are malformed")
    rig.tell(alice, bob, ISSUED, 1)
    rig.wait_count(bob, alice, "inbound_issued", 1)


@pytest.mark.stops_servers
def test_deliveries_are_held_while_the_store_is_away(rig: Rig, pair: tuple[Kp, Kp], mariadb: MariaDbServer) -> None:
    alice, bob = pair
    alice.process.stop("syncer")
    envelope = signed(alice, bob, ISSUED, events(ISSUED, 3))
    mariadb.kill()
    try:
        wait_log(bob, '"event":"database unavailable"')
        with BrokerAdmin(rig.rabbitmq_url) as bus:
            bus.send(bob.id, envelope)
        time.sleep(3)
    finally:
        mariadb.start()
    rig.wait_count(bob, alice, "inbound_issued", 3)
    with BrokerAdmin(rig.rabbitmq_url) as bus:
        assert bus.dead_letter(bob.id) is None
    assert bob.log.count('"event":"database unavailable"') == 1
    assert "Traceback" not in bob.log


@pytest.mark.stops_servers
def test_a_syncer_waits_for_servers_that_start_after_it(tmp_path: Path, rig: Rig) -> None:
    late = RabbitMqServer(tmp_path / "late")
    rig.rabbitmq_url = late.url
    alice = rig.add("KP_Alice", "KP_Alice")
    alice.process.start("syncer")
    wait_log(alice, '"event":"broker away"')
    rig.tell(alice, alice, ISSUED, 1)
    with late:
        rig.wait_outbox_empty(alice)


def test_a_second_syncer_of_a_kp_takes_over_when_the_first_is_killed(rig: Rig, pair: tuple[Kp, Kp]) -> None:
    alice, bob = pair
    twin = rig.add_twin(bob)
    twin.start("syncer")
    wait_for(lambda: "broker connected" in twin.log_of("syncer").read_text(), timeout_seconds=TIMEOUT_SECONDS)
    assert '"event":"elected"' not in twin.log_of("syncer").read_text()
    bob.process.kill("syncer")
    rig.tell(alice, bob, ISSUED, 2)
    rig.tell(bob, alice, RETRIEVED, 2)
    rig.wait_count(bob, alice, "inbound_issued", 2)
    rig.wait_count(alice, bob, "retrieved", 2)
    rig.wait_outbox_empty(alice)
    rig.wait_outbox_empty(bob)


def test_a_stopped_syncer_ends_by_itself_within_its_drain_time(rig: Rig, pair: tuple[Kp, Kp]) -> None:
    alice, bob = pair
    rig.tell(alice, bob, ISSUED, 1)
    started = time.monotonic()
    alice.process.stop("syncer")
    assert time.monotonic() - started < 5
    assert "not drained" not in alice.log
    assert '"level":"critical"' not in alice.log
