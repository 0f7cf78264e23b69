"""Hostile and broken envelopes: each is counted, logged and dead-lettered, and the next one is handled.

KP_Bob's syncer is a real process; KP_Carol, its peer, and everybody who pretends to be her, are the test.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from sandbox.client import metric
from sandbox.mariadb import MariaDbServer
from sandbox.ports import free_port
from sandbox.rabbitmq import RabbitMqServer
from sandbox.simulated_peer import fresh_number
from skipbus.shared.broker.names import queue_name
from skipbus.shared.clock import now_ms
from skipbus.shared.crypto.epochs import MAX_CLOCK_SKEW_MS
from skipbus.shared.crypto.identity import CONTEXT_ENVELOPE, Identity, fingerprint
from skipbus.shared.protocol import encoding
from skipbus.shared.protocol.envelopes import MAX_AGE_MS, MAX_ENVELOPE_BYTES, EnvelopeType
from skipbus.shared.protocol.payloads import pack_capabilities, pack_heartbeat
from tests.integration.syncer_rig import (
    TIMEOUT_SECONDS,
    Kp,
    Rig,
    events,
    signed,
)
from tests.system.broker_admin import BrokerAdmin
from tests.waiting import wait_for

RETRIEVED = EnvelopeType.KEY_RETRIEVED


class Scene:
    """KP_Bob listening, and KP_Carol in the test's hands."""

    def __init__(self, rig: Rig, bus: BrokerAdmin, bob: Kp, carol: Kp) -> None:
        self.rig, self.bus, self.bob, self.carol = rig, bus, bob, carol

    def refused(self, reason: str) -> float:
        """How many envelopes Bob's syncer counts as refused for this reason. Its log leaves some out in a flood."""
        port = self.bob.process.environ["SKIP_METRICS_PORT"]
        return sum(metric(port, "skipbus_envelopes_refused_total", reason=reason))

    def assert_refused(self, envelope: bytes, reason: str, *, live: bool = False) -> None:
        """It is counted, has no effect and lies in the dead-letter queue, and Carol's next envelope is handled."""
        before, refused_before = self.rig.count(self.bob, self.carol, "retrieved"), self.refused(reason)
        self.bus.send(self.bob.id, envelope, live=live)
        self.bus.send(self.bob.id, signed(self.carol, self.bob, RETRIEVED, events(RETRIEVED, 1)))
        self.rig.wait_count(self.bob, self.carol, "retrieved", before + 1)
        assert self.bus.next_dead(self.bob.id) == envelope
        assert self.bus.dead_letter(self.bob.id) is None
        assert self.refused(reason) == refused_before + 1


@pytest.fixture(scope="module")
def scene(
    mariadb: MariaDbServer, rabbitmq: RabbitMqServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Scene]:
    root = tmp_path_factory.mktemp("refusals")
    with mariadb.databases("syncer_refusals") as (database,), Rig(root, database, rabbitmq.url) as rig:
        bob = rig.add("KP_Bob", "KP_Carol", "KP_Dave*", SKIP_METRICS_PORT=str(free_port()))
        carol = rig.add_simulated_peer("KP_Carol")
        bob.process.start("syncer")
        wait_for(lambda: "broker connected" in bob.log and "elected" in bob.log, timeout_seconds=TIMEOUT_SECONDS)
        with BrokerAdmin(rabbitmq.url) as bus:
            yield Scene(rig, bus, bob, carol)


@pytest.fixture(autouse=True)
def _no_dead_letters_of_other_tests(scene: Scene) -> Iterator[None]:
    yield
    while scene.bus.dead_letter(scene.bob.id) is not None:
        pass


@pytest.mark.parametrize("garbage", [b"", b"{}", b"\x91" * 5000, b"\xc1", b"\x00" * 100_000], ids=len)
def test_garbage_is_dead_lettered(scene: Scene, garbage: bytes) -> None:
    scene.assert_refused(garbage, "malformed")


def test_an_envelope_that_is_too_large_is_dead_lettered(scene: Scene) -> None:
    scene.assert_refused(bytes(MAX_ENVELOPE_BYTES + 1), "too_large")


def test_an_envelope_signed_by_another_identity_is_dead_lettered(scene: Scene) -> None:
    forged = signed(scene.carol, scene.bob, RETRIEVED, events(RETRIEVED, 1), identity=Identity.generate())
    scene.assert_refused(forged, "bad_signature")


def test_a_payload_changed_on_its_way_is_dead_lettered(scene: Scene) -> None:
    protected, _, signature = encoding.unpack(signed(scene.carol, scene.bob, RETRIEVED, events(RETRIEVED, 1)))
    scene.assert_refused(encoding.pack([protected, events(RETRIEVED, 9), signature]), "bad_signature")


def test_an_envelope_for_another_target_is_dead_lettered(scene: Scene) -> None:
    for_dave = signed(scene.carol, Kp(scene.rig.name("KP_Dave"), Identity.generate()), RETRIEVED, events(RETRIEVED, 1))
    scene.assert_refused(for_dave, "wrong_target")


def test_an_envelope_that_is_too_old_is_dead_lettered(scene: Scene) -> None:
    old = signed(scene.carol, scene.bob, RETRIEVED, events(RETRIEVED, 1), age_ms=MAX_AGE_MS + 1000)
    scene.assert_refused(old, "too_old")


def test_an_envelope_from_the_future_is_dead_lettered(scene: Scene) -> None:
    ahead_ms = MAX_CLOCK_SKEW_MS + 60_000
    future = signed(scene.carol, scene.bob, RETRIEVED, events(RETRIEVED, 1), age_ms=-ahead_ms)
    scene.assert_refused(future, "from_future")


def test_a_stranger_is_dead_lettered(scene: Scene) -> None:
    mallory = Kp(scene.rig.name("KP_Mallory"), Identity.generate())
    scene.rig.announce(mallory.id, mallory.identity)
    scene.assert_refused(signed(mallory, scene.bob, RETRIEVED, events(RETRIEVED, 1)), "unknown_sender")


def test_a_configured_peer_that_never_announced_itself_is_dead_lettered(scene: Scene) -> None:
    dave = Kp(scene.rig.name("KP_Dave"), Identity.generate())
    scene.assert_refused(signed(dave, scene.bob, RETRIEVED, events(RETRIEVED, 1)), "unknown_sender")


def test_a_peer_that_announced_itself_a_moment_ago_is_no_stranger(scene: Scene) -> None:
    time.sleep(1.1)  # strangers may cause a look into the store once a second
    newcomer = scene.rig.add_simulated_peer("KP_Dave-2")
    scene.bus.send(scene.bob.id, signed(newcomer, scene.bob, RETRIEVED, events(RETRIEVED, 3)))
    scene.rig.wait_count(scene.bob, newcomer, "retrieved", 3)


@pytest.mark.parametrize(
    ("version", "kind", "reason"), [(3, "key.retrieved", "unknown_version"), (1, "key.stolen", "unknown_type")]
)
def test_an_unknown_version_or_type_is_dead_lettered(scene: Scene, version: int, kind: str, reason: str) -> None:
    protected = encoding.pack([version, kind, scene.carol.id, scene.bob.id, fresh_number(), now_ms()])
    payload = events(RETRIEVED, 1)
    signature = scene.carol.identity.sign(len(protected).to_bytes(4, "big") + protected + payload, CONTEXT_ENVELOPE)
    scene.assert_refused(encoding.pack([protected, payload, signature]), reason)


@pytest.mark.parametrize(
    "payload", [b"", b"\xc1", encoding.pack([]), encoding.pack({}), encoding.pack([[b"", -1, ""]])]
)
def test_a_malformed_payload_of_a_true_peer_is_dead_lettered(scene: Scene, payload: bytes) -> None:
    scene.assert_refused(signed(scene.carol, scene.bob, RETRIEVED, payload), "malformed_payload")


def test_a_recorded_heartbeat_cannot_make_a_dead_peer_look_alive(scene: Scene) -> None:
    sent = signed(scene.carol, scene.bob, EnvelopeType.HEARTBEAT, pack_heartbeat(60_000, None, "test"))
    scene.bus.send(scene.bob.id, sent, live=True)
    wait_for(lambda: scene.rig.online(scene.bob, scene.carol), timeout_seconds=TIMEOUT_SECONDS)
    heard = scene.rig.peer(scene.bob, scene.carol)
    scene.assert_refused(sent, "replayed", live=True)
    again = scene.rig.peer(scene.bob, scene.carol)
    assert heard is not None
    assert again is not None
    assert again.last_heartbeat_ms == heard.last_heartbeat_ms


def test_a_recorded_envelope_with_events_has_no_second_effect(scene: Scene) -> None:
    before = scene.rig.count(scene.bob, scene.carol, "retrieved")
    recorded = signed(scene.carol, scene.bob, RETRIEVED, events(RETRIEVED, 5))
    scene.bus.send(scene.bob.id, recorded, recorded, recorded)
    scene.bus.send(scene.bob.id, signed(scene.carol, scene.bob, RETRIEVED, events(RETRIEVED, 1)))
    scene.rig.wait_count(scene.bob, scene.carol, "retrieved", before + 6)


def test_another_kps_announcement_is_dead_lettered(scene: Scene) -> None:
    borrowed = scene.rig.announcement(scene.bob.id)
    envelope = signed(scene.carol, scene.bob, EnvelopeType.CAPABILITIES, pack_capabilities(borrowed, request=False))
    scene.assert_refused(envelope, "malformed_payload")


def test_a_refusal_is_told_with_its_reason_and_sender(scene: Scene) -> None:
    time.sleep(1.1)  # a second of its own, in which no line is left out
    mallory = Kp(scene.rig.name("KP_Mallory-logged"), Identity.generate())
    scene.bus.send(scene.bob.id, signed(mallory, scene.bob, RETRIEVED, events(RETRIEVED, 1)))
    logged = f'"reason":"unknown_sender","sender":"{mallory.id}"'
    wait_for(lambda: logged in scene.bob.log, timeout_seconds=TIMEOUT_SECONDS)


def test_refusals_are_told_in_no_more_than_ten_lines_a_second(scene: Scene) -> None:
    time.sleep(1.1)  # a second of its own
    before, started = scene.bob.log.count("envelope refused"), time.monotonic()
    scene.bus.send(scene.bob.id, *[b"flood %d" % i for i in range(300)])
    wait_for(lambda: scene.bus.depth(queue_name(scene.bob.id)) == 0, timeout_seconds=TIMEOUT_SECONDS)
    wait_for(lambda: "more rejected envelopes" in scene.bob.log, timeout_seconds=10)
    # Of the seconds that it took, the first and the last one may have been begun by others' lines.
    seconds = int(time.monotonic() - started) + 2
    assert scene.bob.log.count("envelope refused") - before <= 10 * seconds


def test_a_changed_identity_is_refused_until_an_operator_accepts_it(scene: Scene) -> None:
    eve = scene.rig.add_simulated_peer("KP_Dave-changed")
    scene.bus.send(scene.bob.id, signed(eve, scene.bob, RETRIEVED, events(RETRIEVED, 1)))
    scene.rig.wait_count(scene.bob, eve, "retrieved", 1)
    new = Identity.generate()
    scene.rig.announce(eve.id, new)
    wait_for(lambda: f"skipctl identity accept {eve.id}" in scene.bob.log, timeout_seconds=10)
    line = next(line for line in scene.bob.log.splitlines() if "skipctl identity accept" in line)
    assert fingerprint(eve.identity.public_key) in line
    assert fingerprint(new.public_key) in line
    by_new = signed(eve, scene.bob, RETRIEVED, events(RETRIEVED, 1), identity=new)
    scene.assert_refused(by_new, "identity_changed")
    scene.bob.process.run_skipctl("identity", "accept", eve.id)

    def is_accepted() -> bool:
        scene.bus.send(scene.bob.id, signed(eve, scene.bob, RETRIEVED, events(RETRIEVED, 1), identity=new))
        time.sleep(0.5)
        return scene.rig.count(scene.bob, eve, "retrieved") > 1

    wait_for(is_accepted, timeout_seconds=TIMEOUT_SECONDS)
