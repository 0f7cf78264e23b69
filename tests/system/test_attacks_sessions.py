"""Session keys as attackers would use them: stolen, moved to others, prolonged, forged, replayed, and for lost epochs.

The scene is that of ``test_attacks_envelopes``. What each kind of damage is refused for is pinned by the vectors of
``tests/unit/test_envelopes.py``; here running key providers are attacked.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from sandbox.client import get
from sandbox.servers import MariaDbServer, RabbitMqServer
from skipbus.services.syncer.payloads import pack_acknowledgement, pack_capabilities, pack_complaint, pack_heartbeat
from skipbus.shared.bus_names import queue_name
from skipbus.shared.clock import now_ms
from skipbus.shared.crypto.epochs import PublicEpoch
from skipbus.shared.crypto.hpke import HybridPrivateKey
from skipbus.shared.crypto.identity import Identity
from skipbus.shared.protocol import encoding
from skipbus.shared.protocol.envelopes import (
    SESSION_VERSION,
    VERSION,
    VERSIONS,
    EnvelopeType,
    SignedEnvelope,
    read_envelope,
)
from skipbus.shared.sessions import make_session_key
from tests.system.bus_harness import (
    Load,
    Scene,
    Session,
    arrived,
    asking,
    assert_all_refused,
    assert_no_answer,
    attack_scene,
    epoch_of,
    flipped_bits,
    metric,
    placed_by,
    post_sync,
    wait_told,
)
from tests.waiting import wait_for


@pytest.fixture(scope="module")
def scene(
    tmp_path_factory: pytest.TempPathFactory, mariadb: MariaDbServer, rabbitmq: RabbitMqServer
) -> Iterator[Scene]:
    with attack_scene(tmp_path_factory.mktemp("sessions"), mariadb, rabbitmq) as made:
        made.admin.send(made.alice_id, made.carol.announces(made.alice_id, VERSIONS))
        # Until that is there, keys for her are signed.
        wait_for(lambda: asked_for_carol(made).version == SESSION_VERSION, timeout_seconds=30)
        yield made


def session(scene: Scene, *, signer: Identity | None = None, epoch: PublicEpoch | None = None) -> Session:
    """KP_Carol's session key for KP_Bob, or one that only says so."""
    epoch = epoch or epoch_of(scene.bob, scene.bobs)
    return make_session_key(signer or scene.carol.identity, scene.carol.id, scene.bob_id, epoch)


def placing(scene: Scene, load: Load, made: Session) -> bytes:
    return scene.carol.says_in_session(made, scene.bob_id, EnvelopeType.KEY_ISSUED, load.pack())


def assert_arrives(scene: Scene, load: Load, envelope: bytes) -> None:
    scene.admin.send(scene.bob_id, envelope)
    wait_for(lambda: arrived(scene, load), timeout_seconds=20)
    assert scene.at_bob(load.keys[0]).body["key"] == load.keys[0].key


def test_a_key_on_demand_and_its_acknowledgement_go_under_session_keys(scene: Scene) -> None:
    diverting = scene.admin.diverting
    with diverting(scene.bob_id) as to_bob, diverting(scene.alice_id) as to_alice, asking(scene) as (asked, _):
        placed = placed_by(scene, to_bob)
        to_bob.deliver(placed)
        stored = to_alice.wait(EnvelopeType.KEY_STORED, scene.bob_id)
        to_alice.deliver(stored)
        answer = asked.result(20)
    assert [read_envelope(body).version for body in (placed, stored)] == [SESSION_VERSION] * 2
    assert answer.status == 200
    scene.lab.assert_retrievable(scene.remember(answer))


def test_an_envelope_under_a_session_key_of_its_sender_is_taken_from_the_bus_and_not_by_https(scene: Scene) -> None:
    load = scene.carols_keys()
    envelope = placing(scene, load, session(scene))
    answer = post_sync(scene.bob, envelope)
    assert answer.status == 400
    assert "version 1" in answer.error
    assert_arrives(scene, load, envelope)


@pytest.mark.parametrize(
    ("kind", "payload"),
    [
        (EnvelopeType.HEARTBEAT, pack_heartbeat(60_000, None, "test")),
        (EnvelopeType.CAPABILITIES, pack_capabilities(None, request=True)),
        (EnvelopeType.ENVELOPE_REFUSED, pack_complaint(7, "malformed", "test")),
        (EnvelopeType.KEY_WITHDRAWN, encoding.pack([[b"k" * 16, 1, "c"]])),
        (EnvelopeType.KEY_RETRIEVED, encoding.pack([[b"k" * 16, 1, "c"]])),
        (EnvelopeType.KEY_EXPIRED, encoding.pack([[b"k" * 16, 1, "c"]])),
        (EnvelopeType.KEY_ISSUED, encoding.pack([[b"k" * 16, 256, 1, "c"]])),
    ],
)
def test_a_session_key_speaks_for_nothing_but_what_an_encryptor_waits_for(
    scene: Scene, kind: EnvelopeType, payload: bytes
) -> None:
    """Who has stolen an epoch of KP_Bob's may know session keys for him. He shall not take back keys with them."""
    forged = scene.carol.says_in_session(session(scene), scene.bob_id, kind, payload)
    scene.assert_refused(forged, "bad_signature", scene.carol.id)


def test_a_session_key_does_not_speak_for_stock(scene: Scene) -> None:
    load = scene.carols_keys()
    load.stock = True
    scene.assert_refused(placing(scene, load, session(scene)), "bad_signature", scene.carol.id)


def test_a_session_key_that_another_identity_has_signed_is_refused(scene: Scene) -> None:
    forged = placing(scene, scene.carols_keys(), session(scene, signer=Identity.generate()))
    scene.assert_refused(forged, "bad_signature", scene.carol.id)


def test_a_peer_that_speaks_in_anothers_name_with_a_session_key_of_its_own_is_refused(scene: Scene) -> None:
    """KP_Carol has made one for KP_Bob, rightly, and puts KP_Alice's name above what she sends under it."""
    made = session(scene)
    forged = scene.carol.says_in_session(
        made, scene.bob_id, EnvelopeType.KEY_ISSUED, scene.carols_keys().pack(), sender_id=scene.alice_id
    )
    scene.assert_refused(forged, "bad_signature", scene.alice_id)
    # KP_Bob has the pin of either; what is remembered of the one must not count for the other.
    load = scene.carols_keys()
    assert_arrives(scene, load, placing(scene, load, made))
    scene.assert_refused(
        scene.carol.says_in_session(
            made, scene.bob_id, EnvelopeType.KEY_ISSUED, scene.carols_keys().pack(), sender_id=scene.alice_id
        ),
        "bad_signature",
        scene.alice_id,
    )


def test_a_target_that_uses_its_peers_session_key_towards_a_third_is_refused(scene: Scene) -> None:
    """KP_Alice has made one for KP_Carol, who knows it then, and turns to KP_Bob in KP_Alice's name."""
    opened = read_session(scene, asked_for_carol(scene))
    forged = scene.carol.says_in_session(
        opened, scene.bob_id, EnvelopeType.KEY_ISSUED, scene.carols_keys().pack(), sender_id=scene.alice_id
    )
    scene.assert_refused(forged, "bad_signature", scene.alice_id)


def read_session(scene: Scene, envelope: SignedEnvelope) -> Session:
    """The session key of an envelope for KP_Carol, opened with her epoch."""
    _, sealed = encoding.unpack(envelope.proof)
    epoch_id, expires_ms, closed, _ = encoding.unpack(sealed)
    binding = b"skipbus session key 1" + encoding.pack([scene.alice_id, scene.carol.id, epoch_id, expires_ms])
    key, _ = session(scene)
    secret = scene.carol.epoch_key.open(closed, binding)
    return type(key)(secret, expires_ms), sealed


def test_a_session_key_for_a_lost_epoch_is_refused_and_its_sender_is_told(scene: Scene) -> None:
    known, unknown = epoch_of(scene.bob, scene.bobs), HybridPrivateKey.generate().public_bytes()
    lost = replace(known, epoch_id=bytes(16), public_key=unknown)
    envelope = placing(scene, scene.carols_keys(), session(scene, epoch=lost))
    number = read_envelope(envelope).header.number
    scene.assert_refused(envelope, "unknown_session", scene.carol.id)

    def tells(found: SignedEnvelope) -> bool:
        return found.header.type is EnvelopeType.ENVELOPE_REFUSED and encoding.unpack(found.payload)["number"] == number

    told = read_envelope(scene.admin.wait(queue_name(scene.carol.id), tells))
    assert encoding.unpack(told.payload)["reason"] == "unknown_session"
    wait_told(scene.bob, f'"reason":"unknown_session","sender":"{scene.carol.id}"')


def test_a_replayed_envelope_under_a_session_key_brings_no_key_back(scene: Scene) -> None:
    load = scene.carols_keys()
    envelope = placing(scene, load, session(scene))
    assert_arrives(scene, load, envelope)
    duplicates = metric(scene.bob, "skipbus_envelopes_received_total", type="key.issued", outcome="duplicate")
    scene.admin.send(scene.bob_id, envelope, envelope)
    wait_for(
        lambda: (
            metric(scene.bob, "skipbus_envelopes_received_total", type="key.issued", outcome="duplicate")
            == duplicates + 2
        ),
        timeout_seconds=20,
    )
    assert scene.at_bob(load.keys[0]).status == 400


def test_a_bit_flipped_envelope_under_a_session_key_is_refused_wherever_the_bit_is(scene: Scene) -> None:
    load = scene.carols_keys()
    whole = placing(scene, load, session(scene))
    flipped = flipped_bits(whole)
    assert_all_refused(scene, flipped)
    # Nor where the true session key was seen before.
    assert_arrives(scene, load, whole)
    assert_all_refused(scene, flipped)
    scene.assert_goes_on()


def test_an_acknowledgement_that_a_broker_administrator_makes_of_a_recorded_one_produces_no_answer(
    scene: Scene,
) -> None:
    """He has KP_Bob's last acknowledgement, with its sealed session key, and puts another number into it."""
    with scene.admin.diverting(scene.alice_id) as to_alice, asking(scene) as (asked, _):
        recorded = to_alice.wait(EnvelopeType.KEY_STORED, scene.bob_id)
        to_alice.deliver(recorded)
        assert asked.result(20).status == 200
    scene.remember(asked.result())
    protected, _, proof = encoding.unpack(recorded)
    assert_no_answer(scene, lambda number: encoding.pack([protected, pack_acknowledgement([number]), proof]))


def test_a_peer_that_cannot_read_a_session_key_is_sent_a_signature(scene: Scene) -> None:
    """KP_Carol refuses what KP_Alice placed there; she takes the key back, and signs the next."""
    placed = asked_for_carol(scene)
    assert placed.version == SESSION_VERSION
    complaint = pack_complaint(placed.header.number, "unknown_session", "a session key cannot be used")
    scene.admin.send(scene.alice_id, scene.carol.says(scene.alice_id, EnvelopeType.ENVELOPE_REFUSED, complaint))
    wait_told(scene.alice, "session keys not read")
    assert asked_for_carol(scene).version == VERSION
    # Until there is another announcement.
    scene.admin.send(scene.alice_id, scene.carol.announces(scene.alice_id, VERSIONS))
    wait_for(lambda: asked_for_carol(scene).version == SESSION_VERSION, timeout_seconds=30)


def test_whoever_says_that_an_envelope_was_not_read_which_was_not_sent_slows_nothing_down(scene: Scene) -> None:
    complaint = pack_complaint(7, "unknown_session", "a session key cannot be used")
    scene.admin.send(scene.alice_id, scene.carol.says(scene.alice_id, EnvelopeType.ENVELOPE_REFUSED, complaint))
    wait_told(scene.alice, '"number":7,"reason":"unknown_session"')
    assert asked_for_carol(scene).version == SESSION_VERSION


def asked_for_carol(scene: Scene) -> SignedEnvelope:
    """The envelope of the next key that is placed at KP_Carol, who answers nothing."""
    begun_ms = now_ms()
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(get, scene.alice.url, "key", timeout_seconds=20, remoteSystemID=scene.carol.id)
        body = scene.admin.wait(
            queue_name(scene.carol.id),
            lambda found: found.header.type is EnvelopeType.KEY_ISSUED and found.header.date_ms >= begun_ms,
        )
        asked.result(20)
    return read_envelope(body)
