"""The scene of the attacks: KP_Alice and KP_Bob with a store each, and KP_Carol, a simulated peer of both."""

from __future__ import annotations

import random
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from sandbox.client import Key, get
from sandbox.key_provider import KeyProvider, peer_status
from sandbox.mariadb import MariaDbServer
from sandbox.rabbitmq import RabbitMqServer
from sandbox.simulated_peer import SealedKeys, SimulatedPeer
from skipbus.shared.broker.names import (
    queue_name,
)
from skipbus.shared.protocol.envelopes import EnvelopeType, read_envelope
from skipbus_testkit.client import Answer
from tests.system.broker_admin import BrokerAdmin, Tap
from tests.system.bus_links import introduce_all, rejected, sealed_keys, start_all, syncer_metric, wait_linked
from tests.system.harness import Lab, Place, rows
from tests.waiting import wait_for


@dataclass
class Scene:
    """KP_Alice and KP_Bob, each with a store of its own, on one broker; KP_Carol, a peer of both, is the test."""

    lab: Lab
    admin: BrokerAdmin
    alice: KeyProvider
    bob: KeyProvider
    carol: SimulatedPeer
    alices: Place
    bobs: Place

    @property
    def alice_id(self) -> str:
        return self.alice.system_id

    @property
    def bob_id(self) -> str:
        return self.bob.system_id

    def carols_keys(self, count: int = 1) -> SealedKeys:
        """Keys of KP_Carol for KP_Bob, as she may send them."""
        return sealed_keys(self.carol, self.bob, self.bobs, count)

    def at_bob(self, key: Key) -> Answer:
        """`GET /key/{keyId}` at KP_Bob, for the source that the key names."""
        return get(self.bob.url, "key", key.key_id, remoteSystemID=key.source)

    def issue(self, size: str = "256") -> Key:
        """A key of KP_Alice for KP_Bob."""
        return self.lab.issue(self.alice, self.bob_id, size)

    def remember(self, answer: Answer) -> Key:
        """The key that KP_Alice answered with, one for KP_Bob."""
        return self.lab.remember(self.alice, self.bob_id, answer)

    def records_at_bob(self) -> set[str]:
        found = rows(self.bobs.database, "SELECT LOWER(HEX(key_id)) FROM key_records WHERE target_id = %s", self.bob_id)
        return {key_id for (key_id,) in found}

    def issued(self, kp: KeyProvider, peer_id: str, *, inbound: bool = False) -> int:
        """A counter as it is committed: `/status/sync` shows what was read up to a second ago."""
        place = self.alices if kp is self.alice else self.bobs
        column = "inbound_issued" if inbound else "issued"
        statement = f"SELECT {column} FROM peers WHERE local_id = %s AND peer_id = %s"
        found = rows(place.database, statement, kp.system_id, peer_id)
        return int(found[0][0]) if found else 0

    def assert_goes_on(self) -> None:
        """The next envelope of KP_Carol is handled, and a key goes from KP_Alice to KP_Bob."""
        before = peer_status(self.bob, self.carol.id)["retrieved"]
        self.admin.send(self.bob_id, self.carol.key_retrieved(self.bob_id))
        wait_for(lambda: peer_status(self.bob, self.carol.id)["retrieved"] == before + 1, timeout_seconds=20)
        self.lab.assert_retrievable(self.issue())

    def assert_rejected(self, body: bytes, reason: str, sender: str | None = None) -> None:
        """It is dead-lettered, counted under its reason and sender, and leaves no key; the next one is handled."""
        counted, records = rejected(self.bob, reason, sender), self.records_at_bob()
        self.admin.send(self.bob_id, body)
        self.admin.wait_dead(self.bob_id, body)
        wait_for(lambda: rejected(self.bob, reason, sender) == counted + 1, timeout_seconds=10)
        assert self.records_at_bob() == records
        self.assert_goes_on()


def arrived(scene: Scene, load: SealedKeys) -> bool:
    """Whether KP_Bob has these keys."""
    return {key.key_id for key in load.keys} <= scene.records_at_bob()


@contextmanager
def asking(scene: Scene) -> Iterator[tuple[Future[Answer], float]]:
    """A caller who waits for a key of KP_Alice for KP_Bob, and since when."""
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(get, scene.alice.url, "key", remoteSystemID=scene.bob_id), time.monotonic()


def placed_by(scene: Scene, tap: Tap) -> bytes:
    """The next envelope in which KP_Alice places keys."""
    return tap.wait(EnvelopeType.KEY_ISSUED, scene.alice_id)


def assert_no_answer(scene: Scene, forge: Callable[[int], bytes]) -> None:
    """KP_Alice takes no acknowledgement that was forged for an envelope of hers, whose number ``forge`` is given."""
    with scene.admin.diverting(scene.bob_id) as tap, asking(scene) as (asked, _):
        forged = forge(read_envelope(placed_by(scene, tap)).header.number)
        before = rejected(scene.alice, "bad_signature", scene.bob_id)
        scene.admin.send(scene.alice_id, forged)
        assert asked.result(20).status == 500
        assert rejected(scene.alice, "bad_signature", scene.bob_id) == before + 1
    scene.assert_goes_on()


def flipped_bits(whole: bytes) -> list[bytes]:
    """The envelope with one bit turned: at 150 places, and among the names and numbers, few bytes in thousands."""
    positions = [*random.sample(range(8 * len(whole)), 150), *range(0, 8 * 60, 7)]
    return [_flip(whole, position) for position in positions]


def _flip(body: bytes, position: int) -> bytes:
    changed = bytearray(body)
    changed[position // 8] ^= 1 << position % 8
    return bytes(changed)


def rejected_in_all(scene: Scene) -> float:
    """By KP_Bob, for whatever reason."""
    return syncer_metric(scene.bob, "skipbus_envelopes_refused_total")


def assert_all_rejected(scene: Scene, bodies: Sequence[bytes]) -> None:
    """KP_Bob refuses each of them, and stores nothing."""
    before, records = rejected_in_all(scene), scene.records_at_bob()
    scene.admin.send(scene.bob_id, *bodies)
    wait_for(lambda: rejected_in_all(scene) == before + len(bodies), timeout_seconds=30)
    assert scene.records_at_bob() == records


@contextmanager
def attack_scene(
    root: Path, mariadb: MariaDbServer, rabbitmq: RabbitMqServer, *, stock: int = 0, carols_stock: int = 0, **env: str
) -> Iterator[Scene]:
    """Names are the scene's own, so that tests can share the broker."""
    suffix = secrets.token_hex(3)
    names = [f"KP_{name}-{suffix}" for name in ("Alice", "Bob", "Carol")]
    env = {"SKIP_HEARTBEAT_SECONDS": "1"} | env
    with ExitStack() as at_end:
        databases = at_end.enter_context(mariadb.databases("alice", "bob"))
        places = [Place(database, rabbitmq.url) for database in databases]
        lab = at_end.enter_context(Lab(root, *places))
        alice = lab.add(names[0], names[1], names[2], at=places[0], env=env)
        bob = lab.add(names[1], names[0], names[2], at=places[1], env=env)
        carol = SimulatedPeer(names[2])
        introduce_all(alice, bob, peers=[carol], stock=stock, peers_stock=carols_stock)
        start_all(alice, bob)
        admin = at_end.enter_context(BrokerAdmin(rabbitmq.url))
        admin.receive_for(carol)
        at_end.callback(admin.delete_queue, queue_name(carol.id))
        wait_linked(lab, alice, bob)
        for kp in (alice, bob):
            admin.send(kp.system_id, carol.capabilities(kp.system_id))
            wait_for(lambda at=kp: peer_status(at, carol.id)["announced"], timeout_seconds=20)  # type: ignore[misc]
        yield Scene(lab, admin, alice, bob, carol, *places)
