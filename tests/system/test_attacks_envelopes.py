"""Envelopes as attackers send them: recorded, moved, cut, changed, unsigned, forged, and far too large.

KP_Alice and KP_Bob are whole key providers; KP_Carol, a peer of both, is the test. Each attack comes by the broker and,
where that is another way in, by `POST /sync`. Each is refused, counted under its reason and sender, dead-lettered,
leaves no key behind, and keeps nobody else from exchanging keys.
"""

from __future__ import annotations

import http.client
import random
import secrets
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from aio_pika.exceptions import ChannelPreconditionFailed

from sandbox.client import get
from sandbox.key_provider import peer_status
from sandbox.mariadb import MariaDbServer
from sandbox.ports import LOOPBACK
from sandbox.rabbitmq import RabbitMqServer
from sandbox.simulated_peer import SealedKeys
from skipbus.services.syncer.consume import PREFETCH
from skipbus.shared.broker.names import (
    ENVELOPES,
    NOTIFICATIONS,
    dead_queue_name,
    notification_routing_key,
    queue_name,
    routing_key,
)
from skipbus.shared.broker.notifications import NotificationKind
from skipbus.shared.clock import now_ms
from skipbus.shared.crypto.identity import CONTEXT_ENVELOPE, Identity
from skipbus.shared.protocol import encoding
from skipbus.shared.protocol.envelopes import MAX_ENVELOPE_BYTES, VERSION, EnvelopeType, SignedEnvelope
from tests.system.attack_scene import Scene, arrived, assert_all_rejected, attack_scene, flipped_bits, rejected_in_all
from tests.system.bus_links import post_sync, rejected, syncer_metric, wait_logged, wait_stock
from tests.waiting import wait_for

HUGE_BYTES = 100 * 1024 * 1024
LARGE_ONES = 64
MILLION = 1_000_000
STOCK = 16


@pytest.fixture(scope="module")
def scene(
    tmp_path_factory: pytest.TempPathFactory, mariadb: MariaDbServer, rabbitmq: RabbitMqServer
) -> Iterator[Scene]:
    with attack_scene(tmp_path_factory.mktemp("envelopes"), mariadb, rabbitmq) as made:
        yield made


def place(scene: Scene, load: SealedKeys) -> bytes:
    """KP_Carol's keys, placed at KP_Bob; the envelope as it was."""
    envelope = scene.carol.key_issued(scene.bob_id, load)
    scene.admin.send(scene.bob_id, envelope)
    wait_for(lambda: arrived(scene, load), timeout_seconds=20)
    return envelope


def resident_mib(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    raise AssertionError("no such process")


# --- replayed, reordered, re-targeted


def test_a_replayed_envelope_brings_no_key_back(scene: Scene) -> None:
    load = scene.carols_keys(3)
    envelope = place(scene, load)
    before = scene.issued(scene.bob, scene.carol.id, inbound=True)
    duplicates = syncer_metric(scene.bob, "skipbus_envelopes_received_total", type="key.issued", outcome="duplicate")
    assert scene.at_bob(load.keys[0]).body["key"] == load.keys[0].key
    scene.admin.send(scene.bob_id, envelope, envelope)
    assert post_sync(scene.bob, envelope).status == 202
    wait_for(
        lambda: (
            syncer_metric(scene.bob, "skipbus_envelopes_received_total", type="key.issued", outcome="duplicate")
            == duplicates + 3
        ),
        timeout_seconds=20,
    )
    scene.assert_goes_on()
    assert scene.at_bob(load.keys[0]).status == 400
    assert [scene.at_bob(key).body.get("key") for key in load.keys[1:]] == [key.key for key in load.keys[1:]]
    assert [scene.at_bob(key).status for key in load.keys] == [400] * 3
    assert scene.issued(scene.bob, scene.carol.id, inbound=True) == before


def test_a_replayed_heartbeat_is_refused(scene: Scene) -> None:
    heartbeat = scene.carol.heartbeat(scene.bob_id)
    scene.admin.send(scene.bob_id, heartbeat)
    wait_for(lambda: peer_status(scene.bob, scene.carol.id)["status"] == "online", timeout_seconds=20)
    scene.assert_rejected(heartbeat, "replayed", scene.carol.id)


def test_reordered_envelopes_never_serve_a_key_that_was_taken_back(scene: Scene) -> None:
    load = scene.carols_keys(2)
    placing, withdrawing = scene.carol.key_issued(scene.bob_id, load), scene.carol.key_withdrawn(scene.bob_id, load)
    scene.admin.send(scene.bob_id, withdrawing, placing)
    scene.assert_goes_on()
    assert [scene.at_bob(key).status for key in load.keys] == [400, 400]
    assert not scene.records_at_bob() & {key.key_id for key in load.keys}


def test_reordered_envelopes_of_keys_all_arrive(scene: Scene) -> None:
    loads = [scene.carols_keys(2) for _ in range(5)]
    envelopes = [scene.carol.key_issued(scene.bob_id, load) for load in loads]
    scene.admin.send(scene.bob_id, *reversed(envelopes))
    keys = [key for load in loads for key in load.keys]
    wait_for(lambda: all(arrived(scene, load) for load in loads), timeout_seconds=20)
    assert [scene.at_bob(key).body.get("key") for key in keys] == [key.key for key in keys]


@pytest.mark.parametrize("door", ["bus", "sync"])
def test_a_retargeted_envelope_is_refused(scene: Scene, door: str) -> None:
    for_alice = scene.carol.key_issued(scene.alice_id, scene.carols_keys())
    if door == "bus":
        scene.assert_rejected(for_alice, "wrong_target", scene.carol.id)
    else:
        answer = post_sync(scene.bob, for_alice)
        assert answer.status == 400
        assert answer.error
        scene.assert_goes_on()


# --- truncated, changed


@pytest.mark.parametrize("left", [0, 1, 10, 0.5, -1])
def test_a_truncated_envelope_is_refused(scene: Scene, left: float) -> None:
    whole = scene.carol.key_issued(scene.bob_id, scene.carols_keys())
    cut = whole[: int(len(whole) * left) if left == 0.5 else int(left)]
    answer = post_sync(scene.bob, cut)
    assert answer.status == 400
    assert answer.error
    scene.assert_rejected(cut, "malformed")


def test_a_bit_flipped_envelope_is_refused_wherever_the_bit_is(scene: Scene) -> None:
    load = scene.carols_keys()
    whole = scene.carol.key_issued(scene.bob_id, load)
    flipped = flipped_bits(whole)
    assert_all_rejected(scene, flipped)
    scene.assert_goes_on()
    for body in flipped[::10]:
        assert post_sync(scene.bob, body).status in (400, 401)
    # Nothing of it stood in the way of the true one.
    scene.admin.send(scene.bob_id, whole)
    wait_for(lambda: arrived(scene, load), timeout_seconds=20)
    assert scene.at_bob(load.keys[0]).body["key"] == load.keys[0].key


# --- unsigned, foreign-signed


@pytest.mark.parametrize("signature", [b"", bytes(4627)], ids=["empty", "zeros"])
def test_an_unsigned_envelope_is_refused(scene: Scene, signature: bytes) -> None:
    protected, payload, _ = encoding.unpack(scene.carol.key_issued(scene.bob_id, scene.carols_keys()))
    unsigned = encoding.pack([protected, payload, signature])
    assert post_sync(scene.bob, unsigned).status == 401
    scene.assert_rejected(unsigned, "bad_signature", scene.carol.id)


def test_an_envelope_without_a_place_for_a_signature_is_refused(scene: Scene) -> None:
    protected, payload, _ = encoding.unpack(scene.carol.key_issued(scene.bob_id, scene.carols_keys()))
    scene.assert_rejected(encoding.pack([protected, payload]), "malformed")


def test_a_foreign_signed_envelope_is_refused(scene: Scene) -> None:
    load = scene.carols_keys()
    forged = scene.carol.sign(scene.bob_id, EnvelopeType.KEY_ISSUED, load.pack(), signer=Identity.generate())
    answer = post_sync(scene.bob, forged)
    assert answer.status == 401
    scene.assert_rejected(forged, "bad_signature", scene.carol.id)
    wait_logged(scene.bob, f'"reason":"bad_signature","sender":"{scene.carol.id}"')


def test_a_foreign_signed_announcement_does_not_change_whom_keys_are_sealed_to(scene: Scene) -> None:
    thief = Identity.generate()
    forged = scene.carol.sign(
        scene.alice_id,
        EnvelopeType.CAPABILITIES,
        encoding.pack({"announcement": stolen(scene, thief), "request": False}),
        signer=thief,
    )
    before = rejected(scene.alice, "identity_changed", scene.carol.id)
    scene.admin.send(scene.alice_id, forged)
    wait_for(lambda: rejected(scene.alice, "identity_changed", scene.carol.id) == before + 1, timeout_seconds=20)
    wait_for(lambda: peer_status(scene.alice, scene.carol.id)["identity_conflict"], timeout_seconds=20)
    scene.assert_goes_on()


def stolen(scene: Scene, thief: Identity) -> bytes:
    """An announcement in KP_Carol's name under another identity."""
    impostor = type(scene.carol)(scene.carol.id, thief)
    return impostor.announcement()


def test_an_envelope_of_a_stranger_is_refused(scene: Scene) -> None:
    stranger = type(scene.carol)("KP_Stranger")
    envelope = stranger.key_issued(scene.bob_id, scene.carols_keys())
    assert post_sync(scene.bob, envelope).status == 401
    scene.assert_rejected(envelope, "unknown_sender", "unknown")


@pytest.mark.parametrize(
    ("version", "kind", "reason"), [(2, "key.issued", "unknown_version"), (1, "key.stolen", "unknown_type")]
)
def test_an_envelope_of_an_unknown_version_or_type_is_refused_and_its_sender_is_told(
    scene: Scene, version: int, kind: str, reason: str
) -> None:
    number = now_ms() * 1000
    protected = encoding.pack([version, kind, scene.carol.id, scene.bob_id, number, now_ms()])
    payload = scene.carols_keys().pack()
    signed = len(protected).to_bytes(4, "big") + protected + payload
    envelope = encoding.pack([protected, payload, scene.carol.identity.sign(signed, CONTEXT_ENVELOPE)])
    assert post_sync(scene.bob, envelope).status == 400
    scene.assert_rejected(envelope, reason)
    if reason == "unknown_version":
        answer = scene.admin.wait(queue_name(scene.carol.id), lambda found: number in numbers_refused(found))
        rejection = encoding.unpack(encoding.unpack(answer)[1])
        assert (rejection["reason"], rejection["versions"]) == (reason, [VERSION])


def numbers_refused(envelope: SignedEnvelope) -> list[int]:
    """The number of the envelope that this one says is refused."""
    if envelope.header.type is not EnvelopeType.ENVELOPE_REFUSED:
        return []
    return [encoding.unpack(envelope.payload)["number"]]


# --- far too large


def peak_mib(pid: int) -> float:
    """The most that the process had in memory since ``forget_peak``."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    raise AssertionError("no such process")


def forget_peak(pid: int) -> None:
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def test_a_message_of_100_mb_is_refused_by_the_broker_and_reaches_nobody(scene: Scene) -> None:
    notified = notification_routing_key(scene.bob_id, NotificationKind.STOCK.value)
    listeners = [scene.bob.processes[role].pid for role in ("api", "syncer")]
    before_mib = [resident_mib(pid) for pid in listeners]
    for pid in listeners:
        forget_peak(pid)
    for exchange, key in ((ENVELOPES, routing_key(scene.bob_id)), (NOTIFICATIONS, notified)):
        with pytest.raises(ChannelPreconditionFailed):
            scene.admin.publish_alone(exchange, key, bytes(HUGE_BYTES))
    scene.assert_goes_on()
    for pid, before in zip(listeners, before_mib, strict=True):
        assert peak_mib(pid) < before + 48


def test_as_many_of_the_largest_messages_as_the_broker_takes_do_not_fill_the_syncers_memory(scene: Scene) -> None:
    syncer = scene.bob.processes["syncer"].pid
    counted, before_mib = rejected(scene.bob, "too_large"), resident_mib(syncer)
    forget_peak(syncer)
    scene.admin.send(scene.bob_id, *[bytes(MAX_ENVELOPE_BYTES + 1)] * LARGE_ONES)
    wait_for(lambda: rejected(scene.bob, "too_large") == counted + LARGE_ONES, timeout_seconds=120)
    # What the broker hands out unanswered, and as much again for copies on the way.
    assert peak_mib(syncer) < before_mib + 2 * PREFETCH * MAX_ENVELOPE_BYTES / 2**20
    assert scene.bob.processes["syncer"].pid == syncer
    scene.assert_goes_on()
    scene.admin.purge(dead_queue_name(scene.bob_id))


@pytest.mark.parametrize("said", [True, False], ids=["with-its-length", "chunked"])
def test_an_envelope_of_100_mb_is_refused_by_sync_before_it_is_in_memory(scene: Scene, said: bool) -> None:
    api = scene.bob.processes["api"].pid
    before_mib = resident_mib(api)
    assert post_in_pieces(scene, HUGE_BYTES, said=said) == 413
    assert resident_mib(api) < before_mib + 32
    scene.assert_goes_on()


def post_in_pieces(scene: Scene, size: int, *, said: bool) -> int:
    """`POST /sync` of that many zeros: the status, which may come before all of them are sent."""
    connection = http.client.HTTPConnection(LOOPBACK, scene.bob.port, timeout=60)
    try:
        connection.putrequest("POST", "/sync")
        connection.putheader("Content-Length" if said else "Transfer-Encoding", str(size) if said else "chunked")
        connection.endheaders()
        piece = bytes(65536)
        with suppress(ConnectionError):
            for _ in range(size // len(piece)):
                connection.send(piece if said else b"%x\r\n%b\r\n" % (len(piece), piece))
        return connection.getresponse().status
    finally:
        connection.close()


def test_an_envelope_with_a_million_records_is_refused(scene: Scene) -> None:
    # The smallest records there are, so that they fit: what they hold is nothing.
    payload = b"".join(
        [b"\x83\xa7records\xdd", MILLION.to_bytes(4, "big"), b"\xc0" * MILLION, b"\xadwrapping_keys\x90\xa5stock\xc2"]
    )
    assert len(payload) < MAX_ENVELOPE_BYTES
    scene.assert_rejected(
        scene.carol.sign(scene.bob_id, EnvelopeType.KEY_ISSUED, payload), "malformed_payload", scene.carol.id
    )


def test_an_envelope_with_a_million_events_is_refused(scene: Scene) -> None:
    payload = b"\xdd" + MILLION.to_bytes(4, "big") + b"\x93\xc0\xc0\xc0" * MILLION
    assert len(payload) < MAX_ENVELOPE_BYTES - 8192
    scene.assert_rejected(
        scene.carol.sign(scene.bob_id, EnvelopeType.KEY_ISSUED, payload), "malformed_payload", scene.carol.id
    )


def test_one_record_too_many_is_refused_and_as_many_as_allowed_are_not(scene: Scene) -> None:
    load = scene.carols_keys(2001)
    scene.assert_rejected(scene.carol.key_issued(scene.bob_id, load), "malformed_payload", scene.carol.id)
    load.records.pop()
    load.keys.pop()
    place(scene, load)
    assert scene.at_bob(load.keys[-1]).body["key"] == load.keys[-1].key


def garbage(count: int) -> list[bytes]:
    return [secrets.token_bytes(random.randint(0, 2000)) for _ in range(count)]


def test_ten_thousand_pieces_of_garbage_keep_nobody_from_exchanging_keys_once_they_are_refused(scene: Scene) -> None:
    """Nothing of what was waited for is lost: a key that lay behind the garbage is withdrawn, and the next one goes."""
    before, records = rejected_in_all(scene), scene.records_at_bob()
    for _ in range(10):
        scene.admin.send_many(scene.bob_id, garbage(1000))
    behind = get(scene.alice.url, "key", remoteSystemID=scene.bob_id)
    if behind.status == 200:
        scene.lab.assert_retrievable(scene.remember(behind))
    else:
        assert behind.status == 500
        assert behind.error.endswith("it is withdrawn")
    wait_for(lambda: rejected_in_all(scene) >= before + 10_000, timeout_seconds=60)
    scene.assert_goes_on()
    wait_for(lambda: scene.records_at_bob() == records, timeout_seconds=20)
    assert rejected_in_all(scene) == before + 10_000
    scene.admin.purge(dead_queue_name(scene.bob_id))


def test_while_garbage_is_refused_keys_are_exchanged_from_stock(
    tmp_path_factory: pytest.TempPathFactory, mariadb: MariaDbServer, rabbitmq: RabbitMqServer
) -> None:
    with attack_scene(tmp_path_factory.mktemp("flood"), mariadb, rabbitmq, stock=STOCK) as stocked:
        wait_stock(stocked.alice, stocked.bob_id, STOCK)
        before = rejected_in_all(stocked)
        with ThreadPoolExecutor(1) as pool:
            flooding = pool.submit(stocked.admin.send_many, stocked.bob_id, garbage(5000))
            wait_for(lambda: rejected_in_all(stocked) > before, timeout_seconds=20)
            for _ in range(STOCK // 2):
                stocked.lab.assert_retrievable(stocked.issue())
            assert rejected_in_all(stocked) < before + 5000, "the flood was over before the keys were asked for"
            flooding.result(60)
        wait_for(lambda: rejected_in_all(stocked) == before + 5000, timeout_seconds=60)
        wait_stock(stocked.alice, stocked.bob_id, STOCK)
