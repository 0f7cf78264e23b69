"""What an administrator of a broker can do to keys that travel over it: delay and lose them, and nothing else.

He reads, drops, duplicates, delays and injects messages between two whole key providers. No key is learned or given out
twice, no caller gets a key that is not there, and what he stops is made good when he stops.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from sandbox.client import Key, get
from sandbox.key_provider import stock_of
from sandbox.mariadb import MariaDbServer
from sandbox.rabbitmq import RabbitMqServer
from skipbus.shared.broker.names import NOTIFICATIONS, notification_routing_key
from skipbus.shared.clock import now_ms
from skipbus.shared.crypto.identity import Identity
from skipbus.shared.protocol import encoding
from skipbus.shared.protocol.envelopes import EnvelopeType, read_envelope
from tests.system.attack_scene import Scene, asking, assert_no_answer, attack_scene, placed_by
from tests.system.bus_links import wait_stock
from tests.system.harness import rows
from tests.waiting import wait_for

SYNC_TIMEOUT_SECONDS = 2.0
STOCK = 8


@pytest.fixture(scope="module")
def scene(
    tmp_path_factory: pytest.TempPathFactory, mariadb: MariaDbServer, rabbitmq: RabbitMqServer
) -> Iterator[Scene]:
    """Without stock, so that every key is placed while its caller waits."""
    with attack_scene(
        tmp_path_factory.mktemp("broker"), mariadb, rabbitmq, SKIP_SYNC_TIMEOUT=str(SYNC_TIMEOUT_SECONDS)
    ) as made:
        yield made


def key_ids_in(envelope: bytes) -> list[str]:
    """The keyIds of records that an envelope places."""
    return [record[0].hex() for record in encoding.unpack(encoding.unpack(envelope)[1])["records"]]


def assert_never_served(scene: Scene, key_ids: list[str]) -> None:
    for key_id in key_ids:
        answer = get(scene.bob.url, "key", key_id, remoteSystemID=scene.alice_id)
        assert (answer.status, "key" in answer.body) == (400, False)


def wait_delivered(scene: Scene) -> None:
    """Until KP_Alice owes KP_Bob nothing."""
    wait_for(
        lambda: not rows(scene.alices.database, "SELECT 1 FROM outbox WHERE peer_id = %s LIMIT 1", scene.bob_id),
        timeout_seconds=40,
    )


# --- reads


def test_a_broker_administrator_who_reads_every_message_learns_no_key(scene: Scene) -> None:
    seen: list[bytes] = []
    with scene.admin.diverting(scene.bob_id) as tap:
        for size in ("128", "256", "512"):
            with ThreadPoolExecutor(1) as pool:
                asked = pool.submit(scene.issue, size)
                seen.append(placed_by(scene, tap))
                tap.deliver(seen[-1])
                key = asked.result(10)
            assert key.key_id in key_ids_in(seen[-1])
            scene.lab.assert_retrievable(key)
    assert len(seen) == 3
    # The needles hold every key that was handed out, in every spelling.
    assert scene.lab.needles().found_in(b"\n".join(seen)) == []


# --- drops


def test_a_dropped_key_is_an_error_that_names_the_peer_and_is_never_served(scene: Scene) -> None:
    with scene.admin.diverting(scene.bob_id) as tap, asking(scene) as (asked, since):
        dropped = placed_by(scene, tap)
        answer = asked.result(20)
        took = time.monotonic() - since
        assert answer.status == 500
        assert scene.bob_id in answer.error
        assert took < SYNC_TIMEOUT_SECONDS + 1
    wait_delivered(scene)
    assert_never_served(scene, key_ids_in(dropped))
    scene.assert_goes_on()


def test_a_dropped_acknowledgement_is_an_error_and_the_key_is_withdrawn(scene: Scene) -> None:
    before = scene.records_at_bob()
    with scene.admin.diverting(scene.alice_id) as tap, asking(scene) as (asked, _):
        dropped = tap.wait(EnvelopeType.KEY_STORED, scene.bob_id)
        stored = scene.records_at_bob() - before
        assert len(stored) == 1
        assert asked.result(20).status == 500
        assert read_envelope(dropped).header.target == scene.alice_id
    wait_delivered(scene)
    wait_for(lambda: scene.records_at_bob() <= before, timeout_seconds=30)
    assert_never_served(scene, list(stored))
    scene.assert_goes_on()


# --- duplicates


def test_a_duplicated_envelope_counts_once_and_its_key_is_given_out_once(scene: Scene) -> None:
    before = scene.issued(scene.bob, scene.alice_id, inbound=True)
    with scene.admin.diverting(scene.bob_id) as tap, asking(scene) as (asked, _):
        envelope = placed_by(scene, tap)
        tap.deliver(*[envelope] * 10)
        answer = asked.result(20)
        assert answer.status == 200
    key = scene.remember(answer)
    scene.lab.assert_retrievable(key)
    scene.admin.send(scene.bob_id, envelope)
    scene.assert_goes_on()
    assert scene.at_bob(key).status == 400
    # The one that was duplicated, and the one by which the test saw that it goes on.
    assert scene.issued(scene.bob, scene.alice_id, inbound=True) == before + 2


def test_a_duplicated_acknowledgement_moves_nothing_twice(scene: Scene) -> None:
    before = scene.issued(scene.alice, scene.bob_id)
    with scene.admin.diverting(scene.alice_id) as tap, asking(scene) as (asked, _):
        acknowledgement = tap.wait(EnvelopeType.KEY_STORED, scene.bob_id)
        tap.deliver(*[acknowledgement] * 10)
        assert asked.result(20).status == 200
    assert scene.issued(scene.alice, scene.bob_id) == before + 1
    scene.assert_goes_on()
    assert scene.issued(scene.alice, scene.bob_id) == before + 2


# --- delays


def test_a_key_delayed_for_less_than_the_timeout_arrives(scene: Scene) -> None:
    with scene.admin.diverting(scene.bob_id) as tap, asking(scene) as (asked, _):
        envelope = placed_by(scene, tap)
        time.sleep(SYNC_TIMEOUT_SECONDS / 2)
        tap.deliver(envelope)
        answer = asked.result(20)
    assert answer.status == 200
    scene.lab.assert_retrievable(scene.remember(answer))


@pytest.mark.parametrize("order", ["before-its-withdrawal", "after-its-withdrawal"])
def test_a_key_delayed_beyond_the_timeout_is_never_served(scene: Scene, order: str) -> None:
    with scene.admin.diverting(scene.bob_id) as tap, asking(scene) as (asked, _):
        envelope = placed_by(scene, tap)
        assert asked.result(20).status == 500
        withdrawal = tap.wait(EnvelopeType.KEY_WITHDRAWN, scene.alice_id)
        tap.deliver(*([envelope, withdrawal] if order.startswith("before") else [withdrawal, envelope]))
    wait_delivered(scene)
    assert_never_served(scene, key_ids_in(envelope))
    scene.assert_goes_on()


# --- injects


def test_an_injected_acknowledgement_produces_no_answer(scene: Scene) -> None:
    assert_no_answer(
        scene,
        lambda number: scene.carol.sign(
            scene.alice_id,
            EnvelopeType.KEY_STORED,
            encoding.pack({"numbers": [number]}),
            sender_id=scene.bob_id,
            signer=Identity.generate(),
        ),
    )


def test_a_recorded_acknowledgement_with_another_number_produces_no_answer(scene: Scene) -> None:
    with scene.admin.diverting(scene.alice_id) as tap, asking(scene) as (asked, _):
        recorded = tap.wait(EnvelopeType.KEY_STORED, scene.bob_id)
        tap.deliver(recorded)
        assert asked.result(20).status == 200
    scene.remember(asked.result())
    protected, _, signature = encoding.unpack(recorded)
    assert_no_answer(scene, lambda number: encoding.pack([protected, encoding.pack({"numbers": [number]}), signature]))


def test_an_injected_notification_produces_no_answer(scene: Scene) -> None:
    """He knows every token, and tells KP_Alice's api over the notifications' exchange that they were stored."""
    with scene.admin.diverting(scene.bob_id) as tap, asking(scene) as (asked, _):
        placed_by(scene, tap)
        tokens = [
            token for (token,) in rows(scene.alices.database, "SELECT token FROM outbox WHERE type = 'key.placed'")
        ]
        assert tokens
        for _ in range(20):
            scene.admin.notify(NOTIFICATIONS, notification_routing_key(scene.alice_id, "stored"), encoding.pack(tokens))
            time.sleep(0.05)
        assert asked.result(20).status == 500
    wait_delivered(scene)
    scene.assert_goes_on()


@pytest.mark.parametrize("kind", ["outbox", "stored", "rejected", "arrived", "stock", "none such"])
@pytest.mark.parametrize(
    "body", [b"", b"\xc1", bytes(200_000), encoding.pack([b"x" * 65]), encoding.pack([bytes(16)] * 1000)], ids=len
)
def test_injected_garbage_among_the_notifications_harms_nothing(scene: Scene, kind: str, body: bytes) -> None:
    for kp in (scene.alice, scene.bob):
        for _ in range(20):
            scene.admin.notify(NOTIFICATIONS, notification_routing_key(kp.system_id, kind), body)
    scene.lab.assert_retrievable(scene.issue())


def test_an_injected_refusal_takes_no_key_back_that_was_answered(scene: Scene) -> None:
    key = scene.issue()
    tokens = [secrets.token_bytes(16) for _ in range(10)]
    scene.admin.notify(NOTIFICATIONS, notification_routing_key(scene.alice_id, "refused"), encoding.pack(tokens))
    scene.assert_goes_on()
    scene.lab.assert_retrievable(key)


def test_injected_keys_are_refused(scene: Scene) -> None:
    load = scene.carols_keys()
    forged = scene.carol.sign(
        scene.bob_id, EnvelopeType.KEY_ISSUED, load.pack(), sender_id=scene.alice_id, signer=Identity.generate()
    )
    scene.assert_rejected(forged, "bad_signature", scene.alice_id)


# --- and with stock


def test_stock_whose_envelope_is_dropped_is_not_given_out_before_it_is_there(
    tmp_path_factory: pytest.TempPathFactory, mariadb: MariaDbServer, rabbitmq: RabbitMqServer
) -> None:
    with attack_scene(tmp_path_factory.mktemp("stock"), mariadb, rabbitmq, stock=STOCK) as scene:
        wait_stock(scene.alice, scene.bob_id, STOCK)
        with scene.admin.diverting(scene.bob_id) as tap:
            keys: list[Key] = []
            # As long as there is stock, the answer waits for nobody.
            while stock_of(scene.alice, scene.bob_id)["placed"] and len(keys) < STOCK:
                keys.append(scene.issue())
                time.sleep(0.05)
            assert keys
            dropped = [placed_by(scene, tap)]
            started = now_ms()
            with asking(scene) as (asked, _):
                answer = asked.result(20)
            assert answer.status in (200, 500)
            assert now_ms() - started < 5000
            if answer.status == 200:
                keys.append(scene.remember(answer))
        for key in keys:
            scene.lab.assert_retrievable(key)
        assert dropped
        wait_stock(scene.alice, scene.bob_id, STOCK, timeout_seconds=60)
        for _ in range(STOCK):
            scene.lab.assert_retrievable(scene.issue())
