"""Heartbeats wait for each other and for nothing else; no other envelope ever waits for one."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from sandbox.servers import Database, RabbitMqServer
from skipbus.services.syncer.effects import Effects, Verdict
from skipbus.services.syncer.examination import Accepted
from skipbus.services.syncer.intake import MAX_GATHER_SECONDS, MAX_GATHERED, Intake
from skipbus.services.syncer.payloads import Heartbeat, pack_acknowledgement, pack_heartbeat
from skipbus.shared.broker.connection import BrokerConnection
from skipbus.shared.broker.consuming import Consumer, Delivery
from skipbus.shared.broker.publishing import Publisher
from skipbus.shared.clock import now_ms
from skipbus.shared.crypto.identity import Identity
from skipbus.shared.protocol.envelopes import EnvelopeType, Header, sign_envelope
from skipbus.shared.settings import Secret
from skipbus.shared.store.peers import fetch_peer_rows
from tests.integration.key_providers import Store

ALICE, BOB = "KP_Alice", "KP_Bob"
# A twentieth of this is longer than what is gathered for at most.
INTERVAL_SECONDS = 60.0
IDENTITY = Identity.generate()


def beat(number: int) -> bytes:
    header = Header(EnvelopeType.HEARTBEAT, BOB, ALICE, number, now_ms())
    return sign_envelope(header, pack_heartbeat(5000, None, "test"), IDENTITY)


def acknowledgement(number: int) -> bytes:
    header = Header(EnvelopeType.KEY_STORED, BOB, ALICE, number, now_ms())
    return sign_envelope(header, pack_acknowledgement([number]), IDENTITY)


@asynccontextmanager
async def intake(rabbitmq: RabbitMqServer, interval_seconds: float = INTERVAL_SECONDS) -> AsyncIterator[Handed]:
    # A queue of each test's own: nothing of an earlier one is ever in it.
    url, local_id = Secret(rabbitmq.url), f"{ALICE}.{secrets.token_hex(3)}"
    consumer, publisher = Consumer(local_id), Publisher()
    broker = BrokerConnection(url, "test", [consumer, publisher])
    async with broker.connected():
        await broker.up.wait()
        yield Handed(Intake(consumer, interval_seconds), publisher, local_id)


class Handed:
    """What an inbox would be handed, and when."""

    def __init__(self, made: Intake, publisher: Publisher, local_id: str) -> None:
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
    bodies = [beat(number) for number in range(1, 6)]
    async with intake(rabbitmq) as handed:
        await handed.come(*bodies)
        found = await handed.next()
        assert [one.body for one in found] == bodies
        assert found[0].waited_ms >= 100


async def test_another_envelope_does_not_wait_for_heartbeats(rabbitmq: RabbitMqServer) -> None:
    first, urgent = beat(1), acknowledgement(2)
    async with intake(rabbitmq) as handed:
        await handed.come(first, urgent)
        assert [one.body for one in await handed.next()] == [urgent]
        assert [one.body for one in await handed.next()] == [first]


async def test_heartbeats_do_not_wait_for_a_pause_in_what_is_urgent(rabbitmq: RabbitMqServer) -> None:
    first = beat(1)
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
        await handed.come(*(beat(number) for number in range(1, 3 * MAX_GATHERED)))
        assert len(await handed.next()) >= MAX_GATHERED


async def test_what_is_no_envelope_is_handed_out_at_once_to_be_refused(rabbitmq: RabbitMqServer) -> None:
    first, bad = beat(1), [b"", b"\xc1", bytes(100_000)]
    async with intake(rabbitmq) as handed:
        await handed.come(first, *bad)
        found = [one.body for one in await handed.next()]
        assert found
        assert set(found) <= set(bad)


async def test_heartbeats_that_wait_are_handed_out_at_the_end(rabbitmq: RabbitMqServer) -> None:
    first = beat(1)
    async with intake(rabbitmq) as handed:
        await handed.come(first)
        assert await handed.intake.next_deliveries(64, 0.1) == []
        await handed.intake.stop()
        assert [one.body for one in await handed.intake.next_deliveries(64, 0.1)] == [first]


async def test_how_long_heartbeats_wait_is_small_next_to_a_short_interval(rabbitmq: RabbitMqServer) -> None:
    async with intake(rabbitmq, interval_seconds=0.1) as handed:
        await handed.come(beat(1))
        (found,) = await handed.next()
        assert found.waited_ms < MAX_GATHER_SECONDS * 1000


def test_heartbeats_of_one_batch_are_each_written_under_their_own_peer(database: Database, tmp_path: Path) -> None:
    store = Store(database, tmp_path)
    at_ms = now_ms()
    batch = [
        Accepted(
            Header(EnvelopeType.HEARTBEAT, f"KP_{n}", ALICE, 100 + n, at_ms), Heartbeat(1000 * n, None), False, None, n
        )
        for n in (3, 1, 2)
    ]
    effects = Effects(store.engine, ALICE)
    assert effects.apply(batch, at_ms, again=False).verdicts == [Verdict.HANDLED] * 3
    assert effects.apply(batch, at_ms, again=False).verdicts == [Verdict.REPLAYED] * 3
    with store.engine.connect() as connection:
        rows = fetch_peer_rows(connection, ALICE)
    store.close()
    assert {(r.peer_id, r.heartbeat_interval_ms, r.clock_skew_ms, r.last_heartbeat_ms) for r in rows} == {
        (f"KP_{n}", 1000 * n, n, at_ms) for n in (1, 2, 3)
    }
