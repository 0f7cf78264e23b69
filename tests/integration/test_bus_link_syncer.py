"""Keys over a bus link, as the syncers handle them: two stores, one broker, the test in the place of the apis.

The rules in one sentence each: a row that is gone is placed, what is placed can be served, what is taken back is never
served, nothing is overwritten, and a refusal reaches the operator of the sender.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest

from sandbox.client import metric
from sandbox.mariadb import MariaDbServer
from sandbox.ports import free_port
from sandbox.rabbitmq import RabbitMqServer
from sandbox.simulated_peer import fresh_number, wrapping_key_fields
from skipbus.shared.broker.notifications import NotificationKind
from skipbus.shared.clock import now_ms
from skipbus.shared.crypto.identity import CONTEXT_ENVELOPE, CONTEXT_WRAPPING_KEY, Identity
from skipbus.shared.protocol import encoding
from skipbus.shared.protocol.envelopes import VERSION, EnvelopeType, check_envelope, read_envelope
from skipbus.shared.protocol.payloads import (
    Rejection,
    pack_acknowledgement,
    pack_capabilities,
    pack_rejection,
    read_payload,
)
from skipbus.shared.store.outbox import KEY_PLACED, KEY_STOCKED
from tests.integration.broker_process import BrokerProcess
from tests.integration.bus_rig import KEY_TTL_MS, Placed, Site, Sites, seal
from tests.integration.syncer_rig import TIMEOUT_SECONDS, signed
from tests.system.broker_admin import BrokerAdmin
from tests.waiting import wait_for

ISSUED, WITHDRAWN, REFUSED = EnvelopeType.KEY_ISSUED, EnvelopeType.KEY_WITHDRAWN, EnvelopeType.ENVELOPE_REFUSED


class Scene:
    """KP_Alice and KP_Bob with a syncer each, and KP_Carol, a bus peer of both, in the test's hands."""

    def __init__(self, alice: Site, bob: Site, carol: Site, bus: BrokerAdmin) -> None:
        self.alice, self.bob, self.carol, self.bus = alice, bob, carol, bus

    def refused(self, site: Site, reason: str) -> float:
        """How many envelopes the site's syncer counts as refused for this reason."""
        return sum(site_metric(site, "skipbus_envelopes_refused_total", reason=reason))

    def assert_refused(self, envelope: bytes, reason: str) -> None:
        """Bob refuses what Carol sent: counted, dead-lettered, without effect, and Carol is notified."""
        before, records = self.refused(self.bob, reason), self.bob.records().keys()
        self.bus.send(self.bob.kp.id, envelope)
        assert self.bus.next_dead(self.bob.kp.id) == envelope
        assert self.refused(self.bob, reason) == before + 1
        assert self.bob.records().keys() == records

    def next_refusal(self, teller: Site) -> Rejection:
        """The next rejection that Carol receives."""
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while time.monotonic() < deadline:
            if (body := self.bus.heard(self.carol.kp.id)) is None:
                time.sleep(0.02)
                continue
            envelope = read_envelope(body)
            if envelope.header.sender != teller.kp.id:
                continue
            check_envelope(envelope, self.carol.kp.id, teller.kp.identity.public_key, now_ms())
            payload = read_payload(envelope.header.type, envelope.payload)
            if isinstance(payload, Rejection):
                return payload
        raise AssertionError("no rejection came")

    def from_carol(self, placed: Placed, number: int | None = None, *, stock: bool = False) -> bytes:
        return signed(self.carol.kp, self.bob.kp, ISSUED, placed.payload(stock=stock), number=number)


def site_metric(site: Site, name: str, **labels: str) -> list[float]:
    return metric(site.kp.process.environ["SKIP_METRICS_PORT"], name, **labels)


@pytest.fixture(scope="module")
def scene(
    mariadb: MariaDbServer, rabbitmq: RabbitMqServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Scene]:
    root = tmp_path_factory.mktemp("bus_link")
    with mariadb.databases("link_a", "link_b", "link_c") as databases, Sites(root, rabbitmq.url) as sites:
        ports = {"SKIP_METRICS_PORT": str(free_port())}, {"SKIP_METRICS_PORT": str(free_port())}
        alice = sites.add("KP_Alice", databases[0], "KP_Store", **ports[0])
        bob = sites.add("KP_Bob", databases[1], **ports[1])
        carol = sites.add_simulated_peer("KP_Carol", databases[2])
        sites.link()
        sites.start(alice, bob)
        with BrokerAdmin(rabbitmq.url) as bus:
            bus.receive_live_for(carol.kp.id)
            yield Scene(alice, bob, carol, bus)


@pytest.fixture(autouse=True)
def _quiet(scene: Scene) -> Iterator[None]:
    yield
    for site in (scene.alice, scene.bob):
        while scene.bus.dead_letter(site.kp.id) is not None:
            pass
    while scene.bus.heard(scene.carol.kp.id) is not None:
        pass


class Ears:
    """An api process's ear at a site."""

    def __init__(self, site: Site, url: str) -> None:
        self.heard: list[tuple[NotificationKind, bytes]] = []
        self.process = BrokerProcess(url, site.kp.id, self._hear)
        self.notify = self.process.notifier.notify
        self._more = asyncio.Event()

    def _hear(self, kind: NotificationKind, items: Sequence[bytes]) -> None:
        self.heard += [(kind, item) for item in items or [b""]]
        self._more.set()

    async def wait(self, kind: NotificationKind, item: bytes, seconds: float = 10.0) -> None:
        async with asyncio.timeout(seconds):
            while (kind, item) not in self.heard:
                self._more.clear()
                await self._more.wait()


# --- on demand


def test_keys_on_demand_are_stored_sealed_and_open_only_for_their_target(scene: Scene) -> None:
    alice, bob = scene.alice, scene.bob
    issued, inbound = alice.rig.count(alice.kp, bob.kp, "issued"), bob.rig.count(bob.kp, alice.kp, "inbound_issued")
    placed = alice.place(bob, 3)
    alice.wait_placed(placed)
    assert placed.ids <= bob.records().keys()
    assert [bob.open(alice, record.key_id) for record in placed.records] == placed.keys
    assert bob.held() == set()
    alice.rig.wait_count(alice.kp, bob.kp, "issued", issued + 3)
    bob.rig.wait_count(bob.kp, alice.kp, "inbound_issued", inbound + 3)


async def test_a_notification_sends_keys_at_once_and_tells_both_apis(scene: Scene, rabbitmq: RabbitMqServer) -> None:
    here, there = Ears(scene.alice, rabbitmq.url), Ears(scene.bob, rabbitmq.url)
    async with here.process.connected(), there.process.connected():
        times = []
        for _ in range(20):
            placed = await asyncio.to_thread(scene.alice.place, scene.bob)
            started = time.perf_counter()
            here.notify(NotificationKind.OUTBOX)
            await here.wait(NotificationKind.STORED, placed.token)
            times.append(time.perf_counter() - started)
            assert not scene.alice.waits(placed)
            await there.wait(NotificationKind.ARRIVED, placed.records[0].key_id)
        # Far below the second that passes without notifications.
        assert sorted(times)[10] < 0.3, times


def test_rows_that_wait_at_the_same_time_share_an_envelope(scene: Scene) -> None:
    alice, bob = scene.alice, scene.bob
    bob.kp.process.stop("syncer")
    try:
        placed = [alice.place(bob) for _ in range(10)]
        wait_for(lambda: all(row.envelope_no for row in alice.rig.outbox(alice.kp)), timeout_seconds=TIMEOUT_SECONDS)
        numbers = {row.envelope_no for row in alice.rig.outbox(alice.kp) if row.type == KEY_PLACED}
        assert len(numbers) <= 2
    finally:
        bob.kp.process.start("syncer")
    for one in placed:
        alice.wait_placed(one)


def test_keys_that_nobody_settles_are_withdrawn_and_deleted_at_the_target(scene: Scene) -> None:
    alice, bob = scene.alice, scene.bob
    inbox = bob.rig.inbox_size(bob.kp)
    bob.kp.process.stop("syncer")
    try:
        placed = alice.place(bob, 2)
        # Its api is dead: nobody takes the row away but the syncer.
        alice.wait_placed(placed)
        wait_for(lambda: "keys withdrawn" in alice.kp.log, timeout_seconds=TIMEOUT_SECONDS)
    finally:
        bob.kp.process.start("syncer")
    alice.wait_told(bob)
    assert bob.rig.inbox_size(bob.kp) >= inbox + 2
    assert not placed.ids & bob.records().keys()
    assert placed.ids <= bob.withdrawn()


# --- withdrawals


def test_withdrawn_keys_are_deleted_and_counted(scene: Scene) -> None:
    alice, bob = scene.alice, scene.bob
    placed = alice.place(bob, 2)
    alice.wait_placed(placed)
    issued = bob.rig.count(bob.kp, alice.kp, "inbound_issued")
    before = bob.rig.count(bob.kp, alice.kp, "inbound_withdrawn")
    alice.withdraw(bob, placed)
    alice.wait_told(bob)
    assert not placed.ids & bob.records().keys()
    assert bob.rig.count(bob.kp, alice.kp, "inbound_withdrawn") == before + 2
    assert bob.rig.count(bob.kp, alice.kp, "inbound_issued") == issued


def test_a_key_that_arrives_after_its_withdrawal_is_never_stored(scene: Scene) -> None:
    carol, bob, bus = scene.carol, scene.bob, scene.bus
    placed, kept = seal(carol.kp, bob, 2), seal(carol.kp, bob, 1)
    events = [[r.key_id, r.expires_ms, ""] for r in placed.records]
    bus.send(bob.kp.id, signed(carol.kp, bob.kp, WITHDRAWN, encoding.pack(events)))
    together = Placed(bob.kp.id, placed.records + kept.records, [], kept.wrapping_key)
    payload = encoding.pack(
        {
            "records": together.rows,
            "wrapping_keys": [wrapping_key_fields(key) for key in (placed.wrapping_key, kept.wrapping_key)],
            "stock": False,
        }
    )
    bus.send(bob.kp.id, signed(carol.kp, bob.kp, ISSUED, payload))
    wait_for(lambda: kept.ids <= bob.records().keys(), timeout_seconds=TIMEOUT_SECONDS)
    assert not placed.ids & bob.records().keys()


def test_nobody_can_take_back_another_key_providers_keys(scene: Scene) -> None:
    alice, bob, carol = scene.alice, scene.bob, scene.carol
    placed = alice.place(bob, 1)
    alice.wait_placed(placed)
    handled = bob.rig.inbox_size(bob.kp)
    events = [[r.key_id, r.expires_ms, ""] for r in placed.records]
    scene.bus.send(bob.kp.id, signed(carol.kp, bob.kp, WITHDRAWN, encoding.pack(events)))
    wait_for(lambda: bob.rig.inbox_size(bob.kp) == handled + 1, timeout_seconds=TIMEOUT_SECONDS)
    assert placed.ids <= bob.records().keys()


# --- stock


def test_stock_is_placed_held_and_counted_only_when_it_is_given_out(scene: Scene) -> None:
    alice, bob = scene.alice, scene.bob
    issued, inbound = alice.rig.count(alice.kp, bob.kp, "issued"), bob.rig.count(bob.kp, alice.kp, "inbound_issued")
    placed = alice.place(bob, 4, KEY_STOCKED)
    alice.wait_placed(placed)
    mine = [row for row in alice.stock(bob) if row.token == placed.token]
    assert [row.placed_ms is not None for row in mine] == [True] * 4
    assert placed.ids <= bob.held()
    assert placed.ids <= bob.records().keys()
    assert alice.rig.count(alice.kp, bob.kp, "issued") == issued
    assert bob.rig.count(bob.kp, alice.kp, "inbound_issued") == inbound

    given = placed.records[0]
    alice.tell(bob, ISSUED.value, [[given.key_id, 256, given.expires_ms, "c-given"]])
    alice.wait_told(bob)
    assert given.key_id not in bob.held()
    assert given.key_id in bob.records()
    alice.rig.wait_count(alice.kp, bob.kp, "issued", issued + 1)
    bob.rig.wait_count(bob.kp, alice.kp, "inbound_issued", inbound + 1)


def test_stock_that_is_too_old_to_be_useful_is_dropped_at_both_ends(scene: Scene) -> None:
    alice, bob = scene.alice, scene.bob
    withdrawn = alice.rig.count(alice.kp, bob.kp, "withdrawn"), bob.rig.count(bob.kp, alice.kp, "inbound_withdrawn")
    useful = alice.place(bob, 1, KEY_STOCKED)
    # Useful for three seconds more: placed while it waits.
    old = alice.place(bob, 3, KEY_STOCKED, ttl_ms=KEY_TTL_MS // 2 + 3_000)
    alice.wait_placed(old)
    wait_for(lambda: not any(row.token == old.token for row in alice.stock(bob)), timeout_seconds=TIMEOUT_SECONDS)
    alice.wait_told(bob)
    assert not old.ids & (bob.held() | bob.records().keys())
    assert useful.ids <= bob.held()
    assert {row.key_id for row in alice.stock(bob)} >= useful.ids
    # It was never issued to anybody, so it is not a withdrawal either.
    after = alice.rig.count(alice.kp, bob.kp, "withdrawn"), bob.rig.count(bob.kp, alice.kp, "inbound_withdrawn")
    assert after == withdrawn


def test_stock_that_a_cut_line_kept_back_until_it_was_useless_is_dropped_with_its_row(scene: Scene) -> None:
    alice, bob = scene.alice, scene.bob
    bob.kp.process.stop("syncer")
    try:
        old = alice.place(bob, 2, KEY_STOCKED, ttl_ms=KEY_TTL_MS // 2 + 1_500)
        wait_for(lambda: not any(row.token == old.token for row in alice.stock(bob)), timeout_seconds=TIMEOUT_SECONDS)
        assert not alice.waits(old)
    finally:
        bob.kp.process.start("syncer")
    alice.wait_told(bob)
    assert not old.ids & (bob.held() | bob.records().keys())


# --- what is refused


def test_a_key_id_that_exists_is_never_overwritten_and_refuses_the_whole_envelope(scene: Scene) -> None:
    alice, bob, carol = scene.alice, scene.bob, scene.carol
    victim = alice.place(bob, 1)
    alice.wait_placed(victim)
    theft = seal(carol.kp, bob, 3)
    theft.records[1] = theft.records[1]._replace(key_id=victim.records[0].key_id)
    number = fresh_number()
    scene.assert_refused(scene.from_carol(theft, number), "key_exists")
    assert bob.open(alice, victim.records[0].key_id) == victim.keys[0]
    rejection = scene.next_refusal(bob)
    assert (rejection.number, rejection.reason, rejection.versions) == (number, "key_exists", (VERSION,))
    # The number of a refused envelope stays free: the envelope may come again and be accepted.
    good = seal(carol.kp, bob, 1)
    scene.bus.send(bob.kp.id, scene.from_carol(good, number))
    wait_for(lambda: good.ids <= bob.records().keys(), timeout_seconds=TIMEOUT_SECONDS)


def test_a_wrapping_key_id_that_exists_is_never_overwritten(scene: Scene) -> None:
    alice, bob, carol = scene.alice, scene.bob, scene.carol
    victim = alice.place(bob, 1)
    alice.wait_placed(victim)
    theft = seal(carol.kp, bob, 1)
    stolen_id = victim.wrapping_key.wrapping_key_id
    sealed = replace(theft.wrapping_key, wrapping_key_id=stolen_id)
    signature = carol.kp.identity.sign(sealed.signed_bytes(), CONTEXT_WRAPPING_KEY)
    theft.wrapping_key = replace(sealed, signature=signature)
    theft.records[0] = theft.records[0]._replace(wrapping_key_id=stolen_id)
    scene.assert_refused(scene.from_carol(theft), "key_exists")
    assert bob.open(alice, victim.records[0].key_id) == victim.keys[0]


def test_keys_under_a_wrapping_key_that_another_signed_are_refused(scene: Scene) -> None:
    forged = seal(scene.carol.kp, scene.bob, 1, signer=Identity.generate())
    scene.assert_refused(scene.from_carol(forged), "bad_seal")


def test_keys_for_an_epoch_that_the_target_does_not_have_are_refused(scene: Scene) -> None:
    stranger = Site(scene.carol.rig, scene.bob.kp)
    scene.carol.announce()
    scene.assert_refused(scene.from_carol(seal(scene.carol.kp, stranger, 1)), "unknown_epoch")


@pytest.mark.parametrize("ttl_ms", [-1_000, 8 * 86_400_000], ids=["expired", "for eight days"])
def test_keys_of_an_impossible_lifetime_are_refused(scene: Scene, ttl_ms: int) -> None:
    scene.assert_refused(scene.from_carol(seal(scene.carol.kp, scene.bob, 1, ttl_ms)), "bad_lifetime")


def test_more_records_than_an_envelope_may_hold_are_refused(scene: Scene) -> None:
    many = seal(scene.carol.kp, scene.bob, 2_001)
    scene.assert_refused(scene.from_carol(many), "malformed_payload")


def test_sealed_keys_from_a_peer_of_the_same_store_are_refused(scene: Scene) -> None:
    alice, bus = scene.alice, scene.bus
    store = Site(alice.rig, type(alice.kp)(alice.rig.name("KP_Store"), Identity.generate()))
    wait_for(lambda: store.kp.id in alice.kp.log and "identity pinned" in alice.kp.log, timeout_seconds=TIMEOUT_SECONDS)
    envelope = signed(store.kp, alice.kp, ISSUED, seal(store.kp, alice, 1).payload())
    bus.send(alice.kp.id, envelope)
    assert bus.next_dead(alice.kp.id) == envelope
    assert scene.refused(alice, "not_a_bus_peer") == 1


def test_a_sender_of_an_unknown_version_is_told_once_a_second_which_versions_are_read(scene: Scene) -> None:
    bob, carol = scene.bob, scene.carol
    protected = encoding.pack([3, "key.blessed", carol.kp.id, bob.kp.id, 7, now_ms(), "new"])
    later = encoding.pack([protected, b"", carol.kp.identity.sign(protected, CONTEXT_ENVELOPE)])
    time.sleep(1.1)
    scene.bus.send(bob.kp.id, *[later] * 20)
    rejection = scene.next_refusal(bob)
    assert (rejection.number, rejection.reason, rejection.versions) == (7, "unknown_version", (VERSION,))
    assert "version 3" in rejection.explanation
    wait_for(lambda: scene.refused(bob, "unknown_version") >= 20, timeout_seconds=TIMEOUT_SECONDS)
    heard = [read_envelope(body) for body in iter(lambda: scene.bus.heard(carol.kp.id), None)]
    assert len([envelope for envelope in heard if envelope.header.type is REFUSED]) <= 1


async def test_a_refusal_is_told_to_the_operator_and_to_whoever_waits(scene: Scene, rabbitmq: RabbitMqServer) -> None:
    """Carol refuses what Alice placed at her."""
    alice, carol, bus = scene.alice, scene.carol, scene.bus
    body = carol.announce()
    announcement = signed(carol.kp, alice.kp, EnvelopeType.CAPABILITIES, pack_capabilities(body, request=False))
    await asyncio.to_thread(bus.send, alice.kp.id, announcement)
    ears = Ears(alice, rabbitmq.url)
    async with ears.process.connected():
        placed = await asyncio.to_thread(alice.place, carol)
        ears.notify(NotificationKind.OUTBOX)
        number = None
        async with asyncio.timeout(10):
            while number is None:
                rows = await asyncio.to_thread(alice.rig.outbox, alice.kp)
                number = next((row.envelope_no for row in rows if row.token == placed.token), None)
        refusal = pack_rejection(number, "unknown_version", "this release\nreads \x1b[31mversion 1")
        await asyncio.to_thread(bus.send, alice.kp.id, signed(carol.kp, alice.kp, REFUSED, refusal))
        await ears.wait(NotificationKind.REJECTED, placed.token)
    row = alice.rig.peer(alice.kp, carol.kp)
    assert row is not None
    assert row.last_refusal == "unknown_version: this release?reads ?[31mversion 1"
    assert row.last_refusal_ms is not None
    assert '"event":"envelope refused by peer"' in alice.kp.log
    reason = {"peer": carol.kp.id, "reason": "unknown_version"}
    assert site_metric(alice, "skipbus_envelopes_refused_by_peer_total", **reason) == [1]


def test_stock_that_a_peer_has_under_the_same_ids_is_dropped_and_not_sent_for_ever(scene: Scene) -> None:
    alice, bob = scene.alice, scene.bob
    first = alice.place(bob, 1)
    alice.wait_placed(first)
    clash = seal(alice.kp, bob, 2)
    clash.records[0] = clash.records[0]._replace(key_id=first.records[0].key_id)
    alice.commit(clash, KEY_STOCKED)
    wait_for(lambda: not any(row.token == clash.token for row in alice.stock(bob)), timeout_seconds=TIMEOUT_SECONDS)
    alice.wait_told(bob)


def test_a_refusal_cannot_be_told_of_what_was_sent_to_another(scene: Scene) -> None:
    """Carol says that she refuses an envelope that Bob was sent."""
    alice, bob, carol = scene.alice, scene.bob, scene.carol
    bob.kp.process.stop("syncer")
    try:
        stocked = alice.place(bob, 1, KEY_STOCKED)
        wait_for(lambda: all(row.envelope_no for row in alice.rig.outbox(alice.kp)), timeout_seconds=TIMEOUT_SECONDS)
        (number,) = (row.envelope_no for row in alice.rig.outbox(alice.kp) if row.token == stocked.token)
        refusals = scene.alice.kp.log.count("envelope refused by peer")
        refusal = signed(carol.kp, alice.kp, REFUSED, pack_rejection(number, "key_exists", "no"))
        stored = signed(carol.kp, alice.kp, EnvelopeType.KEY_STORED, pack_acknowledgement([number]))
        scene.bus.send(alice.kp.id, refusal, stored)
        wait_for(lambda: alice.kp.log.count("envelope refused by peer") > refusals, timeout_seconds=TIMEOUT_SECONDS)
        assert alice.waits(stocked)
        assert len([row for row in alice.stock(bob) if row.token == stocked.token]) == 1
    finally:
        bob.kp.process.start("syncer")
    alice.wait_placed(stocked)


# --- faults


def test_keys_placed_while_either_syncer_is_killed_again_and_again_are_stored_exactly_once(scene: Scene) -> None:
    alice, bob = scene.alice, scene.bob
    inbound = bob.rig.count(bob.kp, alice.kp, "inbound_issued")
    stocked: list[Placed] = []
    for turn in range(6):
        victim = (alice, bob)[turn % 2].kp.process
        stocked += [alice.place(bob, 5, KEY_STOCKED) for _ in range(4)]
        time.sleep(0.05 * turn)
        victim.kill("syncer")
        stocked += [alice.place(bob, 5, KEY_STOCKED) for _ in range(2)]
        victim.start("syncer")
    for placed in stocked:
        alice.wait_placed(placed)
    ids = set().union(*(placed.ids for placed in stocked))
    assert len(ids) == 6 * 6 * 5
    assert ids <= bob.records().keys()
    assert ids <= bob.held()
    assert all(row.placed_ms is not None for row in alice.stock(bob) if row.key_id in ids)
    assert bob.rig.count(bob.kp, alice.kp, "inbound_issued") == inbound
    assert "Traceback" not in alice.kp.log + bob.kp.log


def test_no_key_stands_in_clear_anywhere_on_its_way(scene: Scene) -> None:
    alice, bob = scene.alice, scene.bob
    placed = alice.place(bob, 5)
    alice.wait_placed(placed)
    for key in placed.keys:
        assert key.hex() not in alice.kp.log + bob.kp.log
        assert not any(
            key in bytes(value) for row in bob.records().values() for value in row if isinstance(value, bytes)
        )
    assert secrets.token_bytes(32) not in placed.keys
