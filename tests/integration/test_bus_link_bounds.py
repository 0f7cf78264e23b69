"""Bounds of a bus link: what waits for a silent peer, what one transaction holds, and numbers that never go back.

KP_Alice and KP_Bob have a syncer each; KP_Carol, a peer of both, is the test and acknowledges nothing by itself.
"""

from __future__ import annotations

import contextlib
import re
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from sqlalchemy import Engine, bindparam, event, func, select, update

from sandbox.mariadb import MariaDbServer
from sandbox.rabbitmq import RabbitMqServer
from skipbus.services.syncer.apply import Applier
from skipbus.services.syncer.leader import RESERVED_US, Reservation, SequenceNumbers
from skipbus.services.syncer.verify import Verified
from skipbus.shared.clock import now_ms
from skipbus.shared.crypto.epochs import new_epoch_id
from skipbus.shared.crypto.hpke import HybridPrivateKey
from skipbus.shared.protocol import encoding
from skipbus.shared.protocol.envelopes import EnvelopeType, Header
from skipbus.shared.protocol.payloads import Acknowledgement, Events, Payload
from skipbus.shared.protocol.placed_keys import MAX_KEYS
from skipbus.shared.store.announcements import fetch_bus_announcement
from skipbus.shared.store.outbox import KEY_STOCKED, OutboxRow, insert_outbox_rows
from skipbus.shared.store.peers import fetch_last_number, fetch_peer_rows, upsert_last_number
from skipbus.shared.store.schema import INBOX, OUTBOX, PEERS
from tests.integration.bus_rig import Placed, Site, Sites, seal
from tests.integration.key_providers import Store
from tests.integration.syncer_rig import TIMEOUT_SECONDS, signed
from tests.system.broker_admin import BrokerAdmin
from tests.waiting import wait_for

ISSUED, WITHDRAWN = EnvelopeType.KEY_ISSUED, EnvelopeType.KEY_WITHDRAWN
KP, PEER = "KP_Bob", "KP_Carol"
HOUR_US = 3_600_000_000
# Long enough ago for news of such a key to be given up, and not long enough.
LONG_EXPIRED_MS, LIVE_MS = -61_000, 3_600_000


@dataclass
class Scene:
    alice: Site
    bob: Site
    carol: Site
    bus: BrokerAdmin

    def owed_to_carol(self) -> list[str]:
        """Types of the rows that wait for her at KP_Alice."""
        return sorted(row.type for row in self.alice.rig.outbox(self.alice.kp) if row.peer_id == self.carol.kp.id)


@pytest.fixture
def scene(mariadb: MariaDbServer, rabbitmq: RabbitMqServer, tmp_path: Path) -> Iterator[Scene]:
    with mariadb.databases("bounds_a", "bounds_b", "bounds_c") as databases, Sites(tmp_path, rabbitmq.url) as sites:
        alice, bob = sites.add("KP_Alice", databases[0]), sites.add("KP_Bob", databases[1])
        carol = sites.add_simulated_peer("KP_Carol", databases[2])
        sites.link()
        sites.start(alice, bob)
        with BrokerAdmin(rabbitmq.url) as bus:
            yield Scene(alice, bob, carol, bus)


# --- what waits for a peer that never acknowledges


def tell_all(scene: Scene, expires_in_ms: int) -> None:
    """One row of every type that is no key on demand."""
    expires_ms = now_ms() + expires_in_ms
    for kind in ("key.withdrawn", "stock.dropped", "key.expired", "key.retrieved"):
        scene.alice.tell(scene.carol, kind, [[secrets.token_bytes(16), expires_ms, ""]])
    scene.alice.tell(scene.carol, "key.issued", [[secrets.token_bytes(16), 256, expires_ms, ""]])


def test_news_of_expired_keys_is_given_up_although_the_peer_never_acknowledges(scene: Scene) -> None:
    alice = scene.alice
    tell_all(scene, LIVE_MS)
    # Rows that wait at the same time share an envelope, which is news for as long as one of its keys lives.
    wait_for(lambda: all(row.envelope_no for row in alice.rig.outbox(alice.kp)), timeout_seconds=TIMEOUT_SECONDS)
    tell_all(scene, LONG_EXPIRED_MS)
    still_news = ["key.expired", "key.retrieved"]
    live = ["key.expired", "key.issued", "key.retrieved", "key.withdrawn", "stock.dropped"]
    wait_for(lambda: scene.owed_to_carol() == sorted(live + still_news), timeout_seconds=TIMEOUT_SECONDS)
    time.sleep(3)
    assert scene.owed_to_carol() == sorted(live + still_news)
    assert "envelopes given up: their keys expired before the peer acknowledged them" in scene.alice.kp.log
    # What this key provider did is counted all the same.
    assert scene.alice.rig.count(scene.alice.kp, scene.carol.kp, "withdrawn") == 2
    assert scene.alice.rig.count(scene.alice.kp, scene.carol.kp, "issued") == 2


def test_a_syncer_that_takes_over_gives_up_what_the_one_before_it_numbered(scene: Scene) -> None:
    alice = scene.alice
    scene.alice.tell(scene.carol, "key.withdrawn", [[secrets.token_bytes(16), now_ms() + LIVE_MS, ""]])
    wait_for(lambda: all(row.attempts for row in alice.rig.outbox(alice.kp)), timeout_seconds=TIMEOUT_SECONDS)
    alice.kp.process.kill("syncer")
    with alice.rig.engine.begin() as connection:
        expired = encoding.pack([[secrets.token_bytes(16), now_ms() + LONG_EXPIRED_MS, ""]])
        insert_outbox_rows(
            connection, [OutboxRow(alice.kp.id, scene.carol.kp.id, "key.withdrawn", expired, 1, now_ms())]
        )
        row = update(OUTBOX).where(OUTBOX.c.envelope_no.is_(None))
        # Sent a moment ago, so that it is not due again.
        connection.execute(row.values(envelope_no=now_ms() * 1000, attempts=9, sent_ms=now_ms()))
    assert len(scene.owed_to_carol()) == 2
    alice.kp.process.start("syncer")
    wait_for(lambda: len(scene.owed_to_carol()) == 1, timeout_seconds=TIMEOUT_SECONDS)


# --- what one transaction holds


@dataclass
class Transactions:
    """How many of some keys each committed transaction of an engine named."""

    engine: Engine
    key_ids: set[bytes]
    sizes: list[int] = field(default_factory=list)
    _named: set[bytes] = field(default_factory=set)

    @contextlib.contextmanager
    def watched(self) -> Iterator[Transactions]:
        event.listen(self.engine, "before_cursor_execute", self._on_statement)
        event.listen(self.engine, "commit", self._on_commit)
        try:
            yield self
        finally:
            event.remove(self.engine, "before_cursor_execute", self._on_statement)
            event.remove(self.engine, "commit", self._on_commit)

    def _on_statement(self, _c: object, _cursor: object, statement: str, parameters: object, *_: object) -> None:
        written = {bytes.fromhex(found) for found in re.findall(r"0x([0-9a-f]{32})\b", statement)}
        self._named |= (written | set(_bound_octets(parameters))) & self.key_ids

    def _on_commit(self, _connection: object) -> None:
        self.sizes.append(len(self._named))
        self._named = set()


def _bound_octets(parameters: object) -> Iterator[bytes]:
    """The octets among a statement's bound values, of one row or of many."""
    if isinstance(parameters, bytes):
        yield parameters
    elif isinstance(parameters, dict | list | tuple):
        for value in parameters.values() if isinstance(parameters, dict) else parameters:
            yield from _bound_octets(value)


def accepted(payload: Payload, kind: EnvelopeType, number: int = 1) -> Verified:
    return Verified(Header(kind, PEER, KP, number, now_ms()), payload, redelivered=False)


def test_an_envelope_of_many_withdrawals_is_one_effect(store: Store) -> None:
    ids = [secrets.token_bytes(16) for _ in range(MAX_KEYS)]
    expires_ms = now_ms() + 60_000
    values = ",".join(f"('{KP}',{expires_ms},0x{i.hex()},'{PEER}',256,'w','n','s','')" for i in ids[:1_000] + ids[-10:])
    store.rows(f"INSERT INTO key_records VALUES {values}")
    envelope = accepted(Events([[i, expires_ms, ""] for i in ids]), WITHDRAWN)
    applier = Applier(store.engine, KP, {PEER})
    applier.apply([envelope], now_ms(), again=False)
    assert (store.count("key_records"), store.count("withdrawn_keys")) == (0, len(ids))
    # A second time it is known, and neither changes nor counts anything.
    with Transactions(store.engine, set(ids)).watched() as again:
        applier.apply([envelope], now_ms(), again=False)
    assert sum(again.sizes) == 0
    assert store.rows("SELECT inbound_withdrawn FROM peers WHERE peer_id = %s", PEER) == [(1_010,)]


def test_an_envelope_of_much_released_stock_counts_once(store: Store) -> None:
    ids = [secrets.token_bytes(16) for _ in range(MAX_KEYS)]
    expires_ms = now_ms() + 60_000
    values = ",".join(f"('{KP}','{PEER}',0x{i.hex()},{expires_ms})" for i in ids)
    store.rows(f"INSERT INTO stock_held VALUES {values}")
    envelope = accepted(Events([[i, 256, expires_ms, ""] for i in ids]), ISSUED)
    applier = Applier(store.engine, KP, {PEER})
    applier.apply([envelope], now_ms(), again=False)
    applier.apply([envelope], now_ms(), again=False)
    assert store.count("stock_held") == 0
    assert store.rows("SELECT inbound_issued FROM peers WHERE peer_id = %s", PEER) == [(len(ids),)]


def placed_rows(store: Store, count: int, items: int) -> list[bytes]:
    """Rows of keys on demand for KP_Carol, an envelope each, numbered from 1; their tokens."""
    tokens = [secrets.token_bytes(16) for _ in range(count)]
    rows = [OutboxRow(KP, PEER, "key.placed", b"\x90", items, now_ms(), token) for token in tokens]
    with store.engine.begin() as connection:
        insert_outbox_rows(connection, rows)
        numbered = update(OUTBOX).where(OUTBOX.c.token == bindparam("its")).values(envelope_no=bindparam("number"))
        connection.execute(numbered, [{"its": token, "number": number} for number, token in enumerate(tokens, 1)])
    return tokens


@pytest.mark.parametrize(("count", "items"), [(5, MAX_KEYS - 500), (300, 1)], ids=["many-keys", "many-envelopes"])
def test_an_acknowledgement_of_much_is_several_bounded_transactions(store: Store, count: int, items: int) -> None:
    tokens = placed_rows(store, count, items)
    with Transactions(store.engine, set(tokens)).watched() as seen:
        payload = Acknowledgement(tuple(range(1, count + 1)))
        done = Applier(store.engine, KP, {PEER}).apply(
            [accepted(payload, EnvelopeType.KEY_STORED)], now_ms(), again=False
        )
    assert len(seen.sizes) >= min(count, 300 // 32)
    assert store.count("outbox") == 0
    assert sorted(done.after_commit.stored) == sorted(tokens)
    assert store.rows("SELECT issued FROM peers WHERE peer_id = %s", PEER) == [(count * items,)]


def test_an_acknowledgement_of_much_from_a_peer_of_the_same_store_is_done_in_parts_too(store: Store) -> None:
    placed_rows(store, 100, 1)
    with Transactions(store.engine, set()).watched() as seen:
        payload = Acknowledgement(tuple(range(1, 101)))
        Applier(store.engine, KP, ()).apply([accepted(payload, EnvelopeType.KEY_STORED)], now_ms(), again=False)
    assert len(seen.sizes) == 4
    assert store.count("outbox") == 0


def test_a_peer_that_sends_many_full_envelopes_at_once_makes_no_large_transaction(scene: Scene) -> None:
    bob, carol = scene.bob, scene.carol
    loads = [seal(carol.kp, bob, MAX_KEYS) for _ in range(3)]
    envelopes = [signed(carol.kp, bob.kp, ISSUED, load.payload(stock=True)) for load in loads]
    bob.kp.process.stop("syncer")
    scene.bus.send(bob.kp.id, *envelopes)
    bob.kp.process.start("syncer")
    all_of_it = 3 * MAX_KEYS
    wait_for(lambda: len(bob.held()) == all_of_it, timeout_seconds=3 * TIMEOUT_SECONDS, poll_seconds=0.5)
    assert all(load.ids <= bob.held() for load in loads)
    # What one transaction takes in is noted with one time.
    with bob.rig.engine.connect() as connection:
        together = select(func.count()).where(INBOX.c.sender_id == carol.kp.id).group_by(INBOX.c.received_ms)
        assert connection.execute(together).scalars().all() == [1, 1, 1]


# --- stock that the peer cannot open any more


def test_stock_is_dropped_when_the_peer_has_lost_its_epochs_and_not_when_it_has_new_ones(scene: Scene) -> None:
    alice, bob = scene.alice, scene.bob
    placed = alice.place(bob, 3, KEY_STOCKED)
    alice.wait_placed(placed)
    known = announced_to(alice, bob)
    bob.announce()
    wait_for(lambda: announced_to(alice, bob) != known, timeout_seconds=TIMEOUT_SECONDS)
    assert len(alice.stock(bob)) == 3
    # As if its host had died, and its keyring had come back from the backup, which has no epochs.
    bob.epoch_id, bob.epoch_key = new_epoch_id(), HybridPrivateKey.generate()
    bob.announce()
    wait_for(lambda: not alice.stock(bob), timeout_seconds=TIMEOUT_SECONDS)
    assert "stock dropped, the peer cannot open it" in alice.kp.log
    again = alice.place(bob, 2, KEY_STOCKED)
    alice.wait_placed(again)
    assert [row.placed_ms is not None for row in alice.stock(bob)] == [True] * 2


def announced_to(here: Site, there: Site) -> bytes | None:
    with here.rig.engine.connect() as connection:
        return fetch_bus_announcement(connection, here.kp.id, there.kp.id)


# --- numbers


def test_a_successor_whose_clock_is_behind_goes_on_after_the_numbers_of_the_one_before(store: Store) -> None:
    clock_us = time.time_ns() // 1000
    before, after = SequenceNumbers(lambda: clock_us + HOUR_US), SequenceNumbers(lambda: clock_us)
    Reservation(store.engine, KP, before).take_over()
    used = [before.next() for _ in range(10)]
    Reservation(store.engine, KP, after).take_over()
    assert after.next() > max(used)


def test_numbers_are_noted_before_they_are_used_and_not_more_often_than_needed(store: Store) -> None:
    clock_us = [time.time_ns() // 1000]
    numbers = SequenceNumbers(lambda: clock_us[0])
    reservation = Reservation(store.engine, KP, numbers)
    reservation.take_over()
    noted = set()
    for _ in range(120):
        clock_us[0] += 1_000_000
        reservation.renew()
        with store.engine.begin() as connection:
            noted.add(fetch_last_number(connection, KP))
        assert numbers.next() <= max(noted)
    assert len(noted) <= 120 * 1_000_000 // (RESERVED_US // 2) + 1


def test_an_orderly_end_gives_back_what_was_not_used_unless_another_has_taken_over(store: Store) -> None:
    first, second = SequenceNumbers(), SequenceNumbers()
    reservation = Reservation(store.engine, KP, first)
    reservation.take_over()
    used = first.next()
    reservation.give_back()
    with store.engine.begin() as connection:
        assert fetch_last_number(connection, KP) == used
    Reservation(store.engine, KP, second).take_over()
    with store.engine.begin() as connection:
        noted = fetch_last_number(connection, KP)
    reservation.give_back()
    with store.engine.begin() as connection:
        assert fetch_last_number(connection, KP) == noted


def test_what_is_noted_of_ones_own_numbers_is_no_peer(store: Store) -> None:
    with store.engine.begin() as connection:
        upsert_last_number(connection, KP, 7)
        assert fetch_peer_rows(connection, KP) == []


def test_a_takeover_by_a_clock_that_is_behind_does_not_make_a_key_provider_look_dead(scene: Scene) -> None:
    alice, bob = scene.alice, scene.bob
    alice.kp.process.kill("syncer")
    # As if the one that was killed had had a clock an hour ahead: KP_Bob has heard its numbers.
    ahead = time.time_ns() // 1000 + HOUR_US
    with alice.rig.engine.begin() as connection:
        upsert_last_number(connection, alice.kp.id, ahead + RESERVED_US)
    with bob.rig.engine.begin() as connection:
        heard = update(PEERS).where(PEERS.c.local_id == bob.kp.id, PEERS.c.peer_id == alice.kp.id)
        connection.execute(heard.values(last_heartbeat_no=ahead, last_heartbeat_ms=1))
    assert not bob.rig.online(bob.kp, alice.kp)
    alice.kp.process.start("syncer")
    wait_for(lambda: bob.rig.online(bob.kp, alice.kp), timeout_seconds=TIMEOUT_SECONDS)
    assert "replayed" not in bob.kp.log
    placed: Placed = alice.place(bob)
    alice.wait_placed(placed)
    assert placed.ids <= bob.records().keys()
