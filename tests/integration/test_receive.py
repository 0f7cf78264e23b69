"""Heartbeats wait for each other and for nothing else; no other envelope waits for one, or fails with another."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import cast

from sandbox.mariadb import Database
from sandbox.rabbitmq import RabbitMqServer
from skipbus.services.syncer.apply import Applied, Applier, Result
from skipbus.services.syncer.consume import MAX_GATHER_SECONDS, MAX_GATHERED, Consumer, Delivery, Incoming
from skipbus.services.syncer.receive import FollowUp, Receiver
from skipbus.services.syncer.reject import Rejecter
from skipbus.services.syncer.verify import Verified, Verifier
from skipbus.shared.broker.connection import BrokerConnection
from skipbus.shared.broker.publishing import Publisher
from skipbus.shared.clock import now_ms
from skipbus.shared.crypto.identity import Identity
from skipbus.shared.crypto.pins import PinBook
from skipbus.shared.peer_directory import PeerDirectory
from skipbus.shared.protocol import encoding
from skipbus.shared.protocol.announcements import Announcement, sign_announcement
from skipbus.shared.protocol.envelopes import EnvelopeType, Header, sign_envelope
from skipbus.shared.protocol.payloads import Heartbeat, pack_acknowledgement, pack_heartbeat
from skipbus.shared.protocol.system_ids import RemoteSystemIds
from skipbus.shared.settings import Secret
from skipbus.shared.store.announcements import upsert_announcement
from skipbus.shared.store.peers import fetch_peer_rows
from tests.integration.key_providers import Store

ALICE, BOB = "KP_Alice", "KP_Bob"
# A twentieth of this is longer than what is gathered for at most.
INTERVAL_SECONDS = 60.0
IDENTITY = Identity.generate()


def heartbeat(number: int) -> bytes:
    header = Header(EnvelopeType.HEARTBEAT, BOB, ALICE, number, now_ms())
    return sign_envelope(header, pack_heartbeat(5000, None, "test"), IDENTITY)


def acknowledgement(number: int) -> bytes:
    header = Header(EnvelopeType.KEY_STORED, BOB, ALICE, number, now_ms())
    return sign_envelope(header, pack_acknowledgement([number]), IDENTITY)


def events(number: int) -> bytes:
    header = Header(EnvelopeType.KEY_RETRIEVED, BOB, ALICE, number, now_ms())
    return sign_envelope(header, encoding.pack([[secrets.token_bytes(16), now_ms(), "c"]]), IDENTITY)


@asynccontextmanager
async def intake(rabbitmq: RabbitMqServer, interval_seconds: float = INTERVAL_SECONDS) -> AsyncIterator[Handed]:
    # A queue of each test's own: nothing of an earlier one is ever in it.
    url, local_id = Secret(rabbitmq.url), f"{ALICE}.{secrets.token_hex(3)}"
    consumer, publisher = Consumer(local_id), Publisher()
    broker = BrokerConnection(url, "test", [consumer, publisher])
    async with broker.connected():
        await broker.up.wait()
        yield Handed(Incoming(consumer, interval_seconds), publisher, local_id)


class Handed:
    """What an inbox would be handed, and when."""

    def __init__(self, made: Incoming, publisher: Publisher, local_id: str) -> None:
        self.intake = made
        self._publisher = publisher
        self._local_id = local_id

    async def come(self, *bodies: bytes) -> None:
        for body in bodies:
            assert await self._publisher.publish(self._local_id, body, lifetime_ms=None)

    async def next(self) -> list[Delivery]:
        """The next deliveries that are not none, answered."""
        while True:
            found = await self.intake.next_deliveries(64, 1.0)
            for one in found:
                await one.ack()
            if found:
                return found


async def test_heartbeats_are_handed_out_together_and_in_their_order(rabbitmq: RabbitMqServer) -> None:
    bodies = [heartbeat(number) for number in range(1, 6)]
    async with intake(rabbitmq) as handed:
        await handed.come(*bodies)
        found = await handed.next()
        assert [one.body for one in found] == bodies
        assert found[0].waited_ms >= 100


async def test_another_envelope_does_not_wait_for_heartbeats(rabbitmq: RabbitMqServer) -> None:
    first, urgent = heartbeat(1), acknowledgement(2)
    async with intake(rabbitmq) as handed:
        await handed.come(first, urgent)
        assert [one.body for one in await handed.next()] == [urgent]
        assert [one.body for one in await handed.next()] == [first]


async def test_heartbeats_do_not_wait_for_a_pause_in_what_is_urgent(rabbitmq: RabbitMqServer) -> None:
    first = heartbeat(1)
    async with intake(rabbitmq) as handed:
        await handed.come(first)
        until, seen = time.monotonic() + 10, list[bytes]()
        while first not in seen:
            assert time.monotonic() < until
            await handed.come(acknowledgement(2))
            seen += [one.body for one in await handed.next()]
        assert len(seen) > 1


async def test_heartbeats_beyond_the_limit_are_not_kept_waiting(rabbitmq: RabbitMqServer) -> None:
    async with intake(rabbitmq) as handed:
        # So many that the gathering ends by their number: the broker hands out no more unacknowledged.
        await handed.come(*(heartbeat(number) for number in range(1, 3 * MAX_GATHERED)))
        assert len(await handed.next()) >= MAX_GATHERED


async def test_what_is_no_envelope_is_handed_out_at_once_to_be_refused(rabbitmq: RabbitMqServer) -> None:
    first, bad = heartbeat(1), [b"", b"\xc1", bytes(100_000)]
    async with intake(rabbitmq) as handed:
        await handed.come(first, *bad)
        found = [one.body for one in await handed.next()]
        assert found
        assert set(found) <= set(bad)


async def test_heartbeats_that_wait_are_handed_out_at_the_end(rabbitmq: RabbitMqServer) -> None:
    first = heartbeat(1)
    async with intake(rabbitmq) as handed:
        await handed.come(first)
        assert await handed.intake.next_deliveries(64, 0.1) == []
        await handed.intake.stop()
        assert [one.body for one in await handed.intake.next_deliveries(64, 0.1)] == [first]


async def test_how_long_heartbeats_wait_is_small_next_to_a_short_interval(rabbitmq: RabbitMqServer) -> None:
    async with intake(rabbitmq, interval_seconds=0.1) as handed:
        await handed.come(heartbeat(1))
        (found,) = await handed.next()
        assert found.waited_ms < MAX_GATHER_SECONDS * 1000


def test_heartbeats_of_one_batch_are_each_written_under_their_own_peer(database: Database, tmp_path: Path) -> None:
    store = Store(database, tmp_path)
    at_ms = now_ms()
    batch = [
        Verified(
            Header(EnvelopeType.HEARTBEAT, f"KP_{n}", ALICE, 100 + n, at_ms), Heartbeat(1000 * n, None), False, None, n
        )
        for n in (3, 1, 2)
    ]
    applier = Applier(store.engine, ALICE, ())
    assert applier.apply(batch, at_ms, again=False).results == [Result.HANDLED] * 3
    assert applier.apply(batch, at_ms, again=False).results == [Result.REPLAYED] * 3
    with store.engine.connect() as connection:
        rows = fetch_peer_rows(connection, ALICE)
    store.close()
    assert {(r.peer_id, r.heartbeat_interval_ms, r.clock_skew_ms, r.last_heartbeat_ms) for r in rows} == {
        (f"KP_{n}", 1000 * n, n, at_ms) for n in (1, 2, 3)
    }


# --- one envelope never fails its neighbours


@dataclass
class FakeDelivery:
    """A delivery in the test's hands, and how it was answered."""

    body: bytes
    redelivered: bool = False
    waited_ms: int = 0
    lost: bool = False
    answer: str = ""

    async def ack(self) -> None:
        self.answer = "ack"

    async def reject(self) -> None:
        self.answer = "reject"

    async def requeue(self) -> None:
        self.answer = "requeue"


class Deliveries:
    """One batch; then the process is stopped."""

    def __init__(self, batch: list[FakeDelivery], stop: asyncio.Event) -> None:
        self._batches = [batch]
        self._stop = stop

    async def next_deliveries(self, _limit: int, _wait_seconds: float) -> list[FakeDelivery]:
        self._stop.set()
        return self._batches.pop() if self._batches else []

    async def stop(self) -> None:
        pass


class Faulty(Applier):
    """It has a fault that only the envelope with this number meets."""

    faulty_number = 13

    def apply(self, batch: Sequence[Verified], now_ms: int, *, again: bool) -> Applied:
        if any(one.header.number == self.faulty_number for one in batch):
            raise RuntimeError("a fault that nobody foresaw")
        return super().apply(batch, now_ms, again=again)


def receiver_of(
    store: Store, applier: Applier, batch: list[FakeDelivery], stop: asyncio.Event, followed: list[int]
) -> Receiver:
    """It is handed one batch of the peer's, and then stopped."""
    with store.engine.begin() as connection:
        said = Announcement(BOB, IDENTITY.public_key, now_ms(), "test", ())
        upsert_announcement(connection, said, sign_announcement(said, IDENTITY))
    directory = PeerDirectory(store.engine, ALICE, RemoteSystemIds([BOB], ALICE), PinBook(store.folder / "pins"), {})
    directory.refresh(now_ms())

    def follow(verified: Sequence[Verified], _applied: Applied) -> None:
        followed.extend(one.header.number for one in verified)

    follow_up = cast("FollowUp", SimpleNamespace(follow_up=follow, finish=lambda: None))
    rejecter = cast("Rejecter", SimpleNamespace(log_left_out=lambda: None))
    deliveries = cast("Incoming", Deliveries(batch, stop))
    return Receiver(deliveries, Verifier(ALICE, directory, frozenset), applier, rejecter, follow_up, stop)


async def test_an_envelope_that_meets_a_fault_does_not_fail_its_neighbours(database: Database, tmp_path: Path) -> None:
    store = Store(database, tmp_path)
    followed = list[int]()
    batch = [FakeDelivery(events(number)) for number in (12, 13, 14)]
    await receiver_of(store, Faulty(store.engine, ALICE, ()), batch, asyncio.Event(), followed).run()
    store_rows = store.rows("SELECT envelope_no FROM inbox ORDER BY envelope_no")
    store.close()
    assert [one.answer for one in batch] == ["ack", "requeue", "ack"]
    assert store_rows == [(12,), (14,)]
    assert followed == [12, 14]


async def test_deliveries_are_held_while_the_store_refuses_whatever_it_is_sent(
    database: Database, tmp_path: Path
) -> None:
    store = Store(database, tmp_path)
    stop = asyncio.Event()
    batch = [FakeDelivery(events(number)) for number in (12, 13)]
    receiver = receiver_of(store, Applier(store.engine, ALICE, ()), batch, stop, [])
    with store.without_table("inbox"):
        await receiver.run()
    store.close()
    # Neither dead-lettered nor given back: the broker counts what is given back.
    assert [one.answer for one in batch] == ["", ""]
