"""What the tests of bus links share: key providers with a store each, a peer that only the test speaks for, and
somebody with every right on a broker.

A `Voice` holds an identity and an epoch of its own, so it can say whatever a peer could say, and sign what a thief
could not. A `BrokerAdmin` may do with messages what a broker's administrator may do.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import random
import secrets
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.request import urlopen

import aio_pika
from aio_pika.abc import AbstractChannel, AbstractConnection

from sandbox.cable import Cable
from sandbox.client import Answer, get
from sandbox.key_provider import BusPeer, KeyProvider
from sandbox.ports import LOOPBACK, free_port
from sandbox.servers import MariaDbServer, RabbitMqServer
from skipbus.services.syncer.payloads import pack_acknowledgement, pack_capabilities, pack_heartbeat
from skipbus.shared.broker.names import (
    ENVELOPES,
    dead_queue_name,
    live_routing_key,
    queue_name,
    routing_key,
)
from skipbus.shared.clock import now_ms
from skipbus.shared.crypto.epochs import EpochSpan, PublicEpoch, current_epoch, new_epoch_id
from skipbus.shared.crypto.hpke import HybridPrivateKey
from skipbus.shared.crypto.identity import Identity
from skipbus.shared.crypto.sealing import make_wrapping_key
from skipbus.shared.protocol import encoding
from skipbus.shared.protocol.announcements import Announcement, read_announcement, sign_announcement
from skipbus.shared.protocol.envelopes import EnvelopeType, Header, SignedEnvelope, read_envelope, sign_envelope
from skipbus.shared.settings.peers import identity_line
from tests.system.harness import ALICE, BOB, Key, Lab, Place, rows
from tests.waiting import wait_for

T = TypeVar("T")
KEY_TTL_MS = 3_600_000
HEALED_SECONDS = 30.0
# Stock is counted once a second.
COUNTED_SECONDS = 1.2
_AT_ONCE = 50


# --- a peer in the test's hands


@dataclass(frozen=True)
class Voice:
    """A key provider that only the test speaks for."""

    id: str
    identity: Identity = field(default_factory=Identity.generate)
    epoch_key: HybridPrivateKey = field(default_factory=HybridPrivateKey.generate)
    epoch_id: bytes = field(default_factory=new_epoch_id)

    def peer(self, stock: int = 0, endpoint: str | None = None) -> BusPeer:
        """How it stands in the configuration of a key provider; without stock unless that is said."""
        return BusPeer(self.id, identity_line(self.identity.public_key), stock, endpoint)

    def announcement(self) -> bytes:
        at_ms = now_ms()
        span = EpochSpan(at_ms - 60_000, at_ms + KEY_TTL_MS, at_ms + 2 * KEY_TTL_MS)
        epoch = PublicEpoch(self.epoch_id, span, self.epoch_key.public_bytes())
        return sign_announcement(
            Announcement(self.id, self.identity.public_key, at_ms, "test", (epoch,)), self.identity
        )

    def says(
        self,
        target_id: str,
        kind: EnvelopeType,
        payload: bytes,
        *,
        signer: Identity | None = None,
        sender_id: str | None = None,
        number: int | None = None,
        age_ms: int = 0,
    ) -> bytes:
        """An envelope of its own, or what a thief of its name, or of its signature, would make."""
        fresh = now_ms() * 1000 + secrets.randbelow(1000)
        header = Header(kind, sender_id or self.id, target_id, fresh if number is None else number, now_ms() - age_ms)
        return sign_envelope(header, payload, signer or self.identity)

    def announces(self, target_id: str) -> bytes:
        body = self.announcement()
        return self.says(target_id, EnvelopeType.CAPABILITIES, pack_capabilities(body, request=False))

    def beats(self, target_id: str) -> bytes:
        return self.says(target_id, EnvelopeType.HEARTBEAT, pack_heartbeat(60_000, None, "test"))

    def retrieved(self, target_id: str, count: int = 1) -> bytes:
        """News that move a counter and nothing else: the way to see that a later envelope is handled."""
        events = [[secrets.token_bytes(16), now_ms(), "c"] for _ in range(count)]
        return self.says(target_id, EnvelopeType.KEY_RETRIEVED, encoding.pack(events))

    def places(self, target_id: str, load: Load) -> bytes:
        """An envelope that places keys at a target."""
        return self.says(target_id, EnvelopeType.KEY_ISSUED, load.pack())

    def withdraws(self, target_id: str, load: Load) -> bytes:
        """An envelope that takes keys back."""
        events = [[record[0], record[2], record[3]] for record in load.records]
        return self.says(target_id, EnvelopeType.KEY_WITHDRAWN, encoding.pack(events))

    def acknowledges(self, target_id: str, *numbers: int) -> bytes:
        return self.says(target_id, EnvelopeType.KEY_STORED, pack_acknowledgement(list(numbers)))


@dataclass
class Load:
    """Keys as an envelope of `key.issued` carries them, to be changed before it is packed."""

    keys: list[Key]
    records: list[list[Any]]
    wrapping_keys: list[list[Any]]
    stock: bool = False

    def pack(self) -> bytes:
        return encoding.pack({"records": self.records, "wrapping_keys": self.wrapping_keys, "stock": self.stock})


def sealed_keys(
    source: Voice, target: KeyProvider, place: Place, count: int = 1, *, source_id: str | None = None
) -> Load:
    """Fresh keys of `source`, sealed to the epoch that `target` has announced in its own store."""
    epoch = epoch_of(target, place)
    source_id = source_id or source.id
    opened, wrapping = make_wrapping_key(source.identity, source_id, target.system_id, epoch)
    load = Load(
        [],
        [],
        [[wrapping.wrapping_key_id, wrapping.epoch_id, wrapping.expires_ms, wrapping.sealed, wrapping.signature]],
    )
    for _ in range(count):
        key_id, key = secrets.token_bytes(16), secrets.token_bytes(32)
        expires_ms = min(now_ms() + KEY_TTL_MS, wrapping.expires_ms)
        record = opened.seal(key_id, key, expires_ms, "c-test")
        load.keys.append(Key(source_id, target.system_id, key_id.hex(), key.hex()))
        load.records.append([key_id, 256, expires_ms, "c-test", record.wrapping_key_id, record.nonce, record.sealed])
    return load


def epoch_of(kp: KeyProvider, place: Place) -> PublicEpoch:
    """The one to seal to now."""
    epoch = current_epoch(epochs_of(kp, place), now_ms())
    assert epoch is not None, f"{kp.system_id} has announced no epoch"
    return epoch


def epochs_of(kp: KeyProvider, place: Place) -> Sequence[PublicEpoch]:
    found = rows(place.database, "SELECT body FROM announcements WHERE system_id = %s", kp.system_id)
    return read_announcement(found[0][0]).epochs if found else ()


# --- the broker in the test's hands


class BrokerAdmin:
    """Somebody with every right on a broker. Blocking calls; its connection lives in a thread of its own."""

    def __init__(self, url: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._connection: AbstractConnection = self._do(aio_pika.connect(url))
        self._channel: AbstractChannel = self._do(self._open_channel())

    def close(self) -> None:
        self._do(self._connection.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def send(self, target_id: str, *bodies: bytes, live: bool = False) -> None:
        """Puts messages on the way to a key provider, in this order."""
        key = live_routing_key(target_id) if live else routing_key(target_id)
        for body in bodies:
            self._do(self._publish(ENVELOPES, key, body))

    def publish_alone(self, exchange: str, key: str, body: bytes) -> None:
        """Publishes over a channel of its own, which the broker closes where it refuses the message."""

        async def publish() -> None:
            async with self._connection.channel() as channel:
                to = await channel.get_exchange(exchange, ensure=False)
                await to.publish(aio_pika.Message(body), key)

        self._do(publish())

    def put(self, queue: str, *bodies: bytes) -> None:
        """Puts messages straight into a queue."""
        for body in bodies:
            self._do(self._publish("", queue, body))

    def send_many(self, target_id: str, bodies: Sequence[bytes]) -> None:
        """The same for many, without waiting for each."""

        async def send() -> None:
            await asyncio.gather(*(self._publish(ENVELOPES, routing_key(target_id), body) for body in bodies))

        self._do(send())

    def notify(self, exchange: str, key: str, body: bytes) -> None:
        """Publishes to the key providers' transient exchange, which is there already where one of them runs."""

        async def publish() -> None:
            to = await self._channel.declare_exchange(exchange, aio_pika.ExchangeType.TOPIC, durable=False)
            await to.publish(aio_pika.Message(body), key)

        self._do(publish())

    def purge(self, queue: str) -> None:
        async def purge() -> None:
            found = await self._channel.get_queue(queue, ensure=False)
            await found.purge()

        self._do(purge())

    def make_queue(self, name: str, *routing_keys: str) -> None:
        """A queue that gets what is sent to these keys."""

        async def make() -> None:
            queue = await self._channel.declare_queue(name, durable=True)
            for key in routing_keys:
                await queue.bind(ENVELOPES, key)

        self._do(make())

    def delete_queue(self, name: str) -> None:
        self._do(self._channel.queue_delete(name))

    def hear_for(self, voice: Voice) -> None:
        """Makes the queue in which a voice finds what it is sent."""
        self.make_queue(queue_name(voice.id), routing_key(voice.id), live_routing_key(voice.id))

    def take(self, queue: str) -> bytes | None:
        """Takes one message out of a queue."""

        async def take() -> bytes | None:
            found = await self._channel.get_queue(queue, ensure=False)
            message = await found.get(no_ack=True, fail=False)
            return message.body if message else None

        return self._do(take())

    def wait(self, queue: str, wanted: Callable[[SignedEnvelope], bool], timeout_seconds: float = 15) -> bytes:
        """The first envelope in a queue that is wanted; what came before it is thrown away."""
        deadline = time.monotonic() + timeout_seconds
        while True:
            body = self.take(queue)
            if body is not None and wanted(read_envelope(body)):
                return body
            assert time.monotonic() < deadline, f"no such envelope came into {queue}"
            if body is None:
                time.sleep(0.02)

    def dead_letters(self, target_id: str) -> list[bytes]:
        """Takes all that a key provider has refused."""
        found = []
        while (body := self.take(dead_queue_name(target_id))) is not None:
            found.append(body)
        return found

    def wait_dead(self, target_id: str, wanted: bytes, timeout_seconds: float = 15) -> None:
        """Until that very message lies in the key provider's dead-letter queue."""
        deadline = time.monotonic() + timeout_seconds
        while wanted not in self.dead_letters(target_id):
            assert time.monotonic() < deadline, "the message was not dead-lettered"
            time.sleep(0.05)

    def depth(self, queue: str) -> int:
        async def look() -> int:
            found = await self._channel.declare_queue(queue, passive=True)
            return found.declaration_result.message_count or 0

        return self._do(look())

    @contextmanager
    def diverting(self, target_id: str) -> Iterator[Tap]:
        """Meanwhile what is sent to a key provider comes into the administrator's hands instead."""
        tap = Tap(self, target_id)
        self.make_queue(tap.queue, routing_key(target_id))
        self._do(self._unbind(queue_name(target_id), routing_key(target_id)))
        try:
            yield tap
        finally:
            self._do(self._bind(queue_name(target_id), routing_key(target_id)))
            tap.let_all_through()
            self.delete_queue(tap.queue)

    async def _open_channel(self) -> AbstractChannel:
        return await self._connection.channel()

    async def _publish(self, exchange: str, key: str, body: bytes) -> None:
        to = (
            self._channel.default_exchange if not exchange else await self._channel.get_exchange(exchange, ensure=False)
        )
        await to.publish(aio_pika.Message(body, delivery_mode=aio_pika.DeliveryMode.PERSISTENT), key)

    async def _unbind(self, queue: str, key: str) -> None:
        found = await self._channel.get_queue(queue, ensure=False)
        await found.unbind(ENVELOPES, key)

    async def _bind(self, queue: str, key: str) -> None:
        found = await self._channel.get_queue(queue, ensure=False)
        await found.bind(ENVELOPES, key)

    def _do(self, work: Awaitable[T]) -> T:
        async def run() -> T:
            return await work

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(30)


class Tap:
    """What is sent to one key provider, message by message."""

    def __init__(self, admin: BrokerAdmin, target_id: str) -> None:
        self._admin = admin
        self._target_id = target_id
        self.queue = f"tap-{secrets.token_hex(4)}"

    def wait(self, kind: EnvelopeType, sender_id: str, timeout_seconds: float = 15) -> bytes:
        """The next envelope of a kind and sender; all others go where they belong."""
        deadline = time.monotonic() + timeout_seconds
        while True:
            body = self._admin.take(self.queue)
            if body is not None:
                header = read_envelope(body).header
                if (header.type, header.sender) == (kind, sender_id):
                    return body
                self.deliver(body)
            assert time.monotonic() < deadline, f"no {kind} from {sender_id} came by"
            if body is None:
                time.sleep(0.005)

    def deliver(self, *bodies: bytes) -> None:
        """Puts messages where they would have gone."""
        self._admin.put(queue_name(self._target_id), *bodies)

    def let_all_through(self) -> None:
        while (body := self._admin.take(self.queue)) is not None:
            self.deliver(body)


# --- looks at key providers


def introduce_all(
    *kps: KeyProvider, voices: Sequence[Voice] = (), stock: int = 0, voices_stock: int = 0, by_https: bool = False
) -> None:
    """Write every one of them, and the voices, into the configuration of all others; keyrings are made."""
    for kp in kps:
        if by_https:
            kp.serve_tls(free_port())
            # Key providers show each other no certificates of clients: it is the envelopes that are signed.
            del kp.environ["SKIP_TLS_CLIENT_CA_FILE"]
        kp.make_files()
    for kp in kps:
        others = [
            BusPeer(
                other.system_id,
                other.identity,
                stock,
                other.tls.url if by_https and other.tls else None,
                other.tls.ca_file if by_https and other.tls else None,
            )
            for other in kps
            if other is not kp
        ]
        kp.link_by_bus(*others, *(voice.peer(voices_stock) for voice in voices))


def start_all(*kps: KeyProvider) -> None:
    """Started at the same time, healthy, their syncers' metrics within reach."""
    for kp in kps:
        kp.environ_of["syncer"] = {"SKIP_METRICS_PORT": str(free_port())}
        kp.start_all()
    for kp in kps:
        kp.wait_healthy(60)


def wait_linked(lab: Lab, *kps: KeyProvider) -> None:
    """Until each can have a key placed at every other."""
    for source in kps:
        for target in kps:
            if source is not target:
                lab.wait_announced(source, target.system_id)


def metric(kp: KeyProvider, name: str, **labels: str) -> float:
    """The sum of a counter of the syncer over all series that have these labels."""
    with urlopen(f"http://127.0.0.1:{kp.environ_of['syncer']['SKIP_METRICS_PORT']}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    wanted = [f'{label}="{value}"' for label, value in labels.items()]
    found = [line for line in lines if line.startswith(name + "{") and all(part in line for part in wanted)]
    return sum(float(line.rsplit(" ", 1)[1]) for line in found)


def refused(kp: KeyProvider, reason: str, sender: str | None = None) -> float:
    """How many envelopes a key provider's syncer has refused for a reason, of that sender if one is named."""
    labels = {"reason": reason} | ({"sender": sender} if sender is not None else {})
    return metric(kp, "skipbus_envelopes_refused_total", **labels)


def peer_status(kp: KeyProvider, peer_id: str) -> dict[str, Any]:
    """A peer as `/status/sync` shows it."""
    return dict(get(kp.url, "status", "sync").body["peers"][peer_id])


def stock_of(kp: KeyProvider, peer_id: str) -> dict[str, Any]:
    return dict(peer_status(kp, peer_id)["stock"])


def wait_stock(kp: KeyProvider, peer_id: str, placed: int, timeout_seconds: float = HEALED_SECONDS) -> None:
    """Until that many keys of stock are placed at the peer."""
    wait_for(lambda: stock_of(kp, peer_id)["placed"] >= placed, timeout_seconds=timeout_seconds)


def wait_told(kp: KeyProvider, text: str, role: str = "syncer", timeout_seconds: float = 15) -> None:
    """Until a process's log holds a text."""
    wait_for(lambda: text in kp.log_of(role).read_text(), timeout_seconds=timeout_seconds)


# --- one scene for the attacks


@dataclass
class Scene:
    """KP_Alice and KP_Bob, each with a store of its own, on one broker; KP_Carol, a peer of both, is the test."""

    lab: Lab
    admin: BrokerAdmin
    alice: KeyProvider
    bob: KeyProvider
    carol: Voice
    alices: Place
    bobs: Place

    @property
    def alice_id(self) -> str:
        return self.alice.system_id

    @property
    def bob_id(self) -> str:
        return self.bob.system_id

    def carols_keys(self, count: int = 1) -> Load:
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
        self.admin.send(self.bob_id, self.carol.retrieved(self.bob_id))
        wait_for(lambda: peer_status(self.bob, self.carol.id)["retrieved"] == before + 1, timeout_seconds=20)
        self.lab.assert_retrievable(self.issue())

    def assert_refused(self, body: bytes, reason: str, sender: str | None = None) -> None:
        """It is dead-lettered, counted under its reason and sender, and leaves no key; the next one is handled."""
        counted, records = refused(self.bob, reason, sender), self.records_at_bob()
        self.admin.send(self.bob_id, body)
        self.admin.wait_dead(self.bob_id, body)
        wait_for(lambda: refused(self.bob, reason, sender) == counted + 1, timeout_seconds=10)
        assert self.records_at_bob() == records
        self.assert_goes_on()


def arrived(scene: Scene, load: Load) -> bool:
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
    """KP_Alice takes no acknowledgement that was forged for an envelope of hers, whose number ``forge`` is told."""
    with scene.admin.diverting(scene.bob_id) as tap, asking(scene) as (asked, _):
        forged = forge(read_envelope(placed_by(scene, tap)).header.number)
        before = refused(scene.alice, "bad_signature", scene.bob_id)
        scene.admin.send(scene.alice_id, forged)
        assert asked.result(20).status == 500
        assert refused(scene.alice, "bad_signature", scene.bob_id) == before + 1
    scene.assert_goes_on()


def flipped_bits(whole: bytes) -> list[bytes]:
    """The envelope with one bit turned: at 150 places, and among the names and numbers, few bytes in thousands."""
    positions = [*random.sample(range(8 * len(whole)), 150), *range(0, 8 * 60, 7)]
    return [_flip(whole, position) for position in positions]


def _flip(body: bytes, position: int) -> bytes:
    changed = bytearray(body)
    changed[position // 8] ^= 1 << position % 8
    return bytes(changed)


def refused_in_all(scene: Scene) -> float:
    """By KP_Bob, for whatever reason."""
    return metric(scene.bob, "skipbus_envelopes_refused_total")


def assert_all_refused(scene: Scene, bodies: Sequence[bytes]) -> None:
    """KP_Bob refuses each of them, and stores nothing."""
    before, records = refused_in_all(scene), scene.records_at_bob()
    scene.admin.send(scene.bob_id, *bodies)
    wait_for(lambda: refused_in_all(scene) == before + len(bodies), timeout_seconds=30)
    assert scene.records_at_bob() == records


@contextmanager
def attack_scene(
    root: Path, mariadb: MariaDbServer, rabbitmq: RabbitMqServer, *, stock: int = 0, carols_stock: int = 0, **env: str
) -> Iterator[Scene]:
    """Names are the scene's own, so that tests can share the broker."""
    suffix = secrets.token_hex(3)
    with ExitStack() as at_end:
        places = []
        for site in ("alice", "bob"):
            database = mariadb.create_database(f"{site}_{suffix}", user=f"{site}_{suffix}")
            at_end.callback(mariadb.drop_database, database)
            places.append(Place(database, rabbitmq.url))
        lab = Lab(root, places[0].database, rabbitmq.url)
        at_end.callback(lab.close)
        names = [f"KP_{name}-{suffix}" for name in ("Alice", "Bob", "Carol")]
        env = {"SKIP_HEARTBEAT_SECONDS": "1"} | env
        alice = lab.add(names[0], names[1], names[2], at=places[0], env=env)
        bob = lab.add(names[1], names[0], names[2], at=places[1], env=env)
        carol = Voice(names[2])
        introduce_all(alice, bob, voices=[carol], stock=stock, voices_stock=carols_stock)
        start_all(alice, bob)
        admin = BrokerAdmin(rabbitmq.url)
        at_end.callback(admin.close)
        admin.hear_for(carol)
        at_end.callback(admin.delete_queue, queue_name(carol.id))
        wait_linked(lab, alice, bob)
        for kp in (alice, bob):
            admin.send(kp.system_id, carol.announces(kp.system_id))
            wait_for(lambda at=kp: peer_status(at, carol.id)["announced"], timeout_seconds=20)  # type: ignore[misc]
        yield Scene(lab, admin, alice, bob, carol, *places)


def post_sync(kp: KeyProvider, body: bytes, timeout_seconds: float = 30) -> Answer:
    """`POST /sync`."""
    connection = http.client.HTTPConnection(LOOPBACK, kp.port, timeout=timeout_seconds)
    try:
        connection.request("POST", "/sync", body, {"Content-Type": "application/octet-stream"})
        response = connection.getresponse()
        return Answer(response.status, json.loads(response.read()))
    finally:
        connection.close()


# --- encryptors


class Encryptors:
    """Pairs of encryptors who go on exchanging keys whatever happens. Every second key is fetched only in the end."""

    def __init__(self, lab: Lab, *ways: tuple[KeyProvider, KeyProvider], pause_seconds: float = 0.05) -> None:
        self._lab = lab
        self._ways = ways
        self._pause_seconds = pause_seconds
        self.outcomes: Counter[tuple[str, int]] = Counter()
        self.errors: list[str] = []
        self.waiting: list[Key] = []
        self.given_out: list[Key] = []
        # Their answers were lost with a process, so they may or may not have been given out.
        self.cut_off: list[Key] = []

    def run(self, stop: threading.Event) -> None:
        """To be run in the background."""
        while not stop.wait(self._pause_seconds):
            for source, target in self._ways:
                self._exchange(source, target)

    def wait_for_more(self, count: int = 10, timeout_seconds: float = HEALED_SECONDS) -> None:
        """Keys are being handed out on all ways."""
        wanted = {source.system_id: self.outcomes[source.system_id, 200] + count for source, _ in self._ways}
        wait_for(
            lambda: all(self.outcomes[name, 200] >= more for name, more in wanted.items()),
            timeout_seconds=timeout_seconds,
        )

    @property
    def failed(self) -> int:
        """Requests for keys that were not answered with one."""
        return sum(count for (_, status), count in self.outcomes.items() if status != 200)

    def assert_nothing_lost_and_nothing_twice(self) -> None:
        for key in self.waiting:
            self._lab.assert_retrievable(key)
        # Each is waited for, as a key that may yet arrive, so all are asked for at once.
        keys = [*self.waiting, *(key for key in self.given_out if key not in self.cut_off)]
        with ThreadPoolExecutor(min(_AT_ONCE, max(1, len(keys)))) as pool:
            statuses = list(pool.map(lambda key: self._lab.retrieve(self._lab.kps[key.target], key).status, keys))
        assert set(statuses) <= {400}, "a key was given out twice"

    def _exchange(self, source: KeyProvider, target: KeyProvider) -> None:
        answer = self._ask(source, target.system_id)
        self.outcomes[source.system_id, answer.status] += 1
        if answer.status != 200:
            self.errors.append(f"{source.system_id}: {answer.status} {answer.error}")
            return
        key = Key(source.system_id, target.system_id, answer.body["keyId"], answer.body["key"])
        self._lab.handed_out.append(key)
        (self.given_out if len(self._lab.handed_out) % 2 and self._fetch(target, key) else self.waiting).append(key)

    def _ask(self, source: KeyProvider, target_id: str) -> Answer:
        try:
            return get(source.url, "key", timeout_seconds=20, remoteSystemID=target_id)
        except (OSError, ValueError):
            return Answer(0, {})

    def _fetch(self, target: KeyProvider, key: Key) -> bool:
        """Whether the target gave it out. One that could not is asked again in the end."""
        try:
            answer = self._lab.retrieve(target, key)
        except (OSError, ValueError):
            self.cut_off.append(key)
            return True
        if answer.status == 500:
            # A claim that was under way when the store went: the key is given out at most once.
            self.cut_off.append(key)
            return True
        if answer.status != 200:
            return False
        assert answer.body["key"] == key.key
        return True


# --- two sites


@dataclass
class Site:
    """A store, a broker and a key provider of their own."""

    mariadb: MariaDbServer
    rabbitmq: RabbitMqServer
    kp: KeyProvider

    def server(self, name: str) -> MariaDbServer | RabbitMqServer:
        return self.mariadb if name == "database" else self.rabbitmq


@dataclass
class SitesLab:
    """KP_Alice and KP_Bob at two sites whose brokers are federated over a cable."""

    lab: Lab
    cable: Cable
    sites: tuple[Site, Site]

    @property
    def alice(self) -> KeyProvider:
        return self.sites[0].kp

    @property
    def bob(self) -> KeyProvider:
        return self.sites[1].kp

    @property
    def both_ways(self) -> tuple[tuple[KeyProvider, KeyProvider], tuple[KeyProvider, KeyProvider]]:
        return (self.alice, self.bob), (self.bob, self.alice)

    def wait_full(self, placed: int, timeout_seconds: float = 60) -> None:
        """Until that many keys of stock are placed on both sides, by a count that is not older than this call."""
        time.sleep(COUNTED_SECONDS)
        for source, target in self.both_ways:
            wait_stock(source, target.system_id, placed, timeout_seconds)


@contextmanager
def two_sites(root: Path, *, stock: int, **env: str) -> Iterator[SitesLab]:
    """Two MariaDB and two RabbitMQ, small ones, that a test may kill and start again."""
    with ExitStack() as at_end:
        cable = Cable()
        at_end.callback(cable.close)
        servers = []
        for name in ("site-1", "site-2"):
            mariadb = MariaDbServer(root / name / "mysql", buffer_pool_mib=64, log_file_mib=64)
            rabbitmq = RabbitMqServer(root / name / "rabbitmq")
            servers.append((mariadb, rabbitmq))
        for (_, here), (_, there) in (servers, servers[::-1]):
            here.federate({"/": [there.upstream("other", cable.line(there.port))]})
        for server in (one for pair in servers for one in pair):
            at_end.callback(server.stop)
            server.launch()
        for server in (one for pair in servers for one in pair):
            server.wait_ready()
        places = [Place(mariadb.dsn, rabbitmq.url) for mariadb, rabbitmq in servers]
        lab = Lab(root, places[0].database, places[0].rabbitmq_url)
        at_end.callback(lab.close)
        env = {"SKIP_HEARTBEAT_SECONDS": "1"} | env
        alice = lab.add(ALICE, BOB, at=places[0], env=env)
        bob = lab.add(BOB, ALICE, at=places[1], env=env)
        introduce_all(alice, bob, stock=stock)
        start_all(alice, bob)
        wait_linked(lab, alice, bob)
        sites = Site(*servers[0], alice), Site(*servers[1], bob)
        yield SitesLab(lab, cable, sites)
