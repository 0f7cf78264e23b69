"""Peers that turn against the others: they overwrite keys, speak in another's name, never acknowledge, or acknowledge
what they were not sent. Their identities are known and their signatures are right.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest

from sandbox.client import get
from sandbox.key_provider import stock_of
from sandbox.mariadb import MariaDbServer
from sandbox.rabbitmq import RabbitMqServer
from sandbox.simulated_peer import SealedKeys
from skipbus.shared.broker.names import queue_name
from skipbus.shared.clock import now_ms
from skipbus.shared.protocol import encoding
from skipbus.shared.protocol.envelopes import EnvelopeType, read_envelope
from tests.system.attack_scene import Scene, attack_scene
from tests.system.bus_links import rejected, sealed_keys, wait_logged
from tests.system.harness import rows
from tests.waiting import wait_for

CALLERS = 40
SYNC_TIMEOUT_SECONDS = 2.0


@pytest.fixture(scope="module")
def scene(
    tmp_path_factory: pytest.TempPathFactory, mariadb: MariaDbServer, rabbitmq: RabbitMqServer
) -> Iterator[Scene]:
    with attack_scene(
        tmp_path_factory.mktemp("peers"),
        mariadb,
        rabbitmq,
        carols_stock=16,
        SKIP_SYNC_TIMEOUT=str(SYNC_TIMEOUT_SECONDS),
    ) as made:
        yield made


# --- a record whose keyId exists already


def test_a_record_with_a_keyid_of_another_peers_key_overwrites_nothing(scene: Scene) -> None:
    alices = scene.issue()
    load = scene.carols_keys(3)
    load.records[1][0] = bytes.fromhex(alices.key_id)
    scene.assert_rejected(scene.carol.key_issued(scene.bob_id, load), "key_exists", scene.carol.id)
    wait_logged(scene.bob, f'"reason":"key_exists","sender":"{scene.carol.id}"')
    # All or nothing: the records beside it are not there either.
    assert not scene.records_at_bob() & {key.key_id for key in load.keys}
    scene.lab.assert_retrievable(alices)


def test_a_record_with_a_keyid_of_the_peers_own_key_overwrites_nothing(scene: Scene) -> None:
    first, second = scene.carols_keys(), scene.carols_keys()
    scene.admin.send(scene.bob_id, scene.carol.key_issued(scene.bob_id, first))
    wait_for(lambda: first.keys[0].key_id in scene.records_at_bob(), timeout_seconds=20)
    second.records[0][0] = first.records[0][0]
    scene.assert_rejected(scene.carol.key_issued(scene.bob_id, second), "key_exists", scene.carol.id)
    assert scene.at_bob(first.keys[0]).body["key"] == first.keys[0].key


def test_a_peer_cannot_withdraw_another_peers_keys(scene: Scene) -> None:
    alices = scene.issue()
    event = [bytes.fromhex(alices.key_id), now_ms() + 3_600_000, "c"]
    scene.admin.send(scene.bob_id, scene.carol.sign(scene.bob_id, EnvelopeType.KEY_WITHDRAWN, encoding.pack([event])))
    scene.assert_goes_on()
    scene.lab.assert_retrievable(alices)


# --- in another key provider's name


def test_a_peer_that_issues_under_another_key_providers_name_is_refused(scene: Scene) -> None:
    load = sealed_keys(scene.carol, scene.bob, scene.bobs, source_id=scene.alice_id)
    as_alice = scene.carol.sign(scene.bob_id, EnvelopeType.KEY_ISSUED, load.pack(), sender_id=scene.alice_id)
    scene.assert_rejected(as_alice, "bad_signature", scene.alice_id)
    assert get(scene.bob.url, "key", load.keys[0].key_id, remoteSystemID=scene.alice_id).status == 400


def test_a_peer_that_sends_wrapping_keys_made_for_another_source_is_refused(scene: Scene) -> None:
    load = sealed_keys(scene.carol, scene.bob, scene.bobs, source_id=scene.alice_id)
    scene.assert_rejected(scene.carol.key_issued(scene.bob_id, load), "bad_seal", scene.carol.id)
    for source in (scene.alice_id, scene.carol.id):
        assert get(scene.bob.url, "key", load.keys[0].key_id, remoteSystemID=source).status == 400


def test_a_peer_that_sends_anothers_recorded_keys_as_its_own_is_refused(scene: Scene) -> None:
    counted = rejected(scene.bob, "bad_seal", scene.carol.id)
    with scene.admin.diverting(scene.bob_id) as tap, ThreadPoolExecutor(1) as caller:
        asked = caller.submit(get, scene.alice.url, "key", remoteSystemID=scene.bob_id)
        recorded = tap.wait(EnvelopeType.KEY_ISSUED, scene.alice_id)
        payload = encoding.unpack(recorded)[1]
        scene.admin.put(queue_name(scene.bob_id), scene.carol.sign(scene.bob_id, EnvelopeType.KEY_ISSUED, payload))
        wait_for(lambda: rejected(scene.bob, "bad_seal", scene.carol.id) > counted, timeout_seconds=20)
        tap.deliver(recorded)
        answer = asked.result(10)
    if answer.status == 200:
        retrieved = get(scene.bob.url, "key", answer.body["keyId"], remoteSystemID=scene.alice_id)
        assert retrieved.body == answer.body
    scene.assert_goes_on()


@dataclass(frozen=True)
class Fault:
    """What KP_Carol does wrong in keys that she places, and what it is refused for."""

    name: str
    reason: str
    change: Callable[[SealedKeys], object]


def record(place: int, value: Callable[[], object]) -> Callable[[SealedKeys], object]:
    return lambda load: load.records[0].__setitem__(place, value())


def wrapping(place: int, value: Callable[[], object]) -> Callable[[SealedKeys], object]:
    return lambda load: load.wrapping_keys[0].__setitem__(place, value())


FAULTS = [
    Fault("a size that is none", "malformed_payload", record(1, lambda: 257)),
    Fault("a key that has expired", "bad_lifetime", record(2, lambda: now_ms() - 1)),
    Fault("a key that outlives its wrapping key", "bad_lifetime", record(2, lambda: now_ms() + 10**9)),
    Fault("a keyId that is too long", "malformed_payload", record(0, lambda: secrets.token_bytes(65))),
    Fault("a keyId that is too short", "malformed_payload", record(0, lambda: secrets.token_bytes(15))),
    Fault("a keyId twice", "malformed_payload", lambda load: load.records[0].__setitem__(0, load.records[1][0])),
    Fault("a correlation id that is no text", "malformed_payload", record(3, lambda: "line\nline")),
    Fault("a sealed key of another length", "malformed_payload", record(6, lambda: b"short")),
    Fault("no records", "malformed_payload", lambda load: load.records.clear()),
    Fault("no wrapping key", "malformed_payload", lambda load: load.wrapping_keys.clear()),
    Fault("an epoch that was never announced", "unknown_epoch", wrapping(1, lambda: bytes(16))),
    Fault("a wrapping key that is prolonged", "unknown_epoch", wrapping(2, lambda: now_ms() + 10**10)),
    Fault("a wrapping key signed by nobody", "bad_seal", wrapping(4, lambda: bytes(4627))),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_peer_that_places_what_cannot_be_served_is_refused(scene: Scene, fault: Fault) -> None:
    load = scene.carols_keys(2)
    fault.change(load)
    scene.assert_rejected(scene.carol.key_issued(scene.bob_id, load), fault.reason, scene.carol.id)


def test_a_key_that_was_sealed_wrong_serves_nobody_and_harms_nobody(scene: Scene) -> None:
    load = scene.carols_keys(2)
    load.records[0][6] = secrets.token_bytes(len(load.records[0][6]))
    scene.admin.send(scene.bob_id, scene.carol.key_issued(scene.bob_id, load))
    wait_for(lambda: load.keys[0].key_id in scene.records_at_bob(), timeout_seconds=20)
    broken = scene.at_bob(load.keys[0])
    assert broken.status in (400, 500)
    assert "key" not in broken.body
    assert scene.at_bob(load.keys[1]).body["key"] == load.keys[1].key
    scene.assert_goes_on()


# --- never acknowledges


def test_a_peer_that_never_acknowledges_costs_its_own_callers_only(scene: Scene) -> None:
    """KP_Carol is announced, is sent keys and stock, and says nothing."""
    slowest = 0.0
    with ThreadPoolExecutor(CALLERS) as callers:
        started = time.monotonic()
        silent = [callers.submit(get, scene.alice.url, "key", remoteSystemID=scene.carol.id) for _ in range(CALLERS)]
        while not all(one.done() for one in silent):
            asked = time.monotonic()
            scene.lab.assert_retrievable(scene.issue())
            slowest = max(slowest, time.monotonic() - asked)
        took = time.monotonic() - started
    answers = [one.result() for one in silent]
    assert {answer.status for answer in answers} == {500}
    assert all(scene.carol.id in answer.error for answer in answers)
    assert took < SYNC_TIMEOUT_SECONDS + 3
    assert slowest < 1.0
    assert stock_of(scene.alice, scene.carol.id)["placed"] == 0
    assert get(scene.alice.url, "health").status == 200


def test_what_a_silent_peer_is_owed_does_not_grow_without_bound(scene: Scene) -> None:
    for _ in range(3):
        assert get(scene.alice.url, "key", remoteSystemID=scene.carol.id).status == 500
    waiting = dict(
        rows(
            scene.alices.database,
            "SELECT type, COUNT(*) FROM outbox WHERE local_id = %s AND peer_id = %s GROUP BY type",
            scene.alice_id,
            scene.carol.id,
        )
    )
    assert waiting.get("key.placed", 0) == 0
    # One batch of stock; not one more for each second that it is not acknowledged.
    assert waiting.get("key.stocked", 0) <= 2


def test_keys_that_a_silent_peer_did_not_acknowledge_are_withdrawn(scene: Scene) -> None:
    assert get(scene.alice.url, "key", remoteSystemID=scene.carol.id, size="128").status == 500
    envelope = scene.admin.wait(
        queue_name(scene.carol.id), lambda found: found.header.type is EnvelopeType.KEY_WITHDRAWN, timeout_seconds=20
    )
    assert read_envelope(envelope).header.sender == scene.alice_id


# --- acknowledges what it was not sent


def test_a_peer_that_acknowledges_another_peers_keys_moves_nothing(scene: Scene) -> None:
    with scene.admin.diverting(scene.bob_id) as tap:
        answers = []
        caller = threading.Thread(
            target=lambda: answers.append(get(scene.alice.url, "key", remoteSystemID=scene.bob_id))
        )
        caller.start()
        number = read_envelope(tap.wait(EnvelopeType.KEY_ISSUED, scene.alice_id)).header.number
        issued = scene.issued(scene.alice, scene.bob_id)
        scene.admin.send(scene.alice_id, scene.carol.key_stored(scene.alice_id, number))
        caller.join(20)
        # The envelope was never delivered, so no caller may learn that the key is there.
        assert [answer.status for answer in answers] == [500]
        assert scene.issued(scene.alice, scene.bob_id) == issued
    scene.assert_goes_on()


def test_a_peer_that_acknowledges_numbers_that_nobody_sent_moves_nothing(scene: Scene) -> None:
    before = outbox_numbers(scene)
    issued = scene.issued(scene.alice, scene.carol.id)
    made_up = [now_ms() * 1000 + offset for offset in range(1000)]
    scene.admin.send(scene.alice_id, scene.carol.key_stored(scene.alice_id, *made_up))
    scene.admin.send(scene.alice_id, scene.carol.key_retrieved(scene.alice_id))
    scene.assert_goes_on()
    assert before <= outbox_numbers(scene)
    assert scene.issued(scene.alice, scene.carol.id) == issued


def outbox_numbers(scene: Scene) -> set[int]:
    found = rows(
        scene.alices.database,
        "SELECT envelope_no FROM outbox WHERE peer_id = %s AND type = 'key.stocked' AND envelope_no IS NOT NULL",
        scene.carol.id,
    )
    return {number for (number,) in found}
