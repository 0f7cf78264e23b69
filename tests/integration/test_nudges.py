"""Nudges between the processes of one KP: they arrive at once, they are hints, and nobody else's reach anybody."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import aio_pika
import pytest

from sandbox.servers import RabbitMqServer
from skipbus.shared.bus import Bus, Delivery
from skipbus.shared.bus_names import NUDGES, nudge_routing_key
from skipbus.shared.errors import BusUnavailable
from skipbus.shared.nudges import FOR_SYNCER, MAX_ITEM_BYTES, MAX_NUDGE_BYTES, NudgeKind, ProcessBus
from skipbus.shared.protocol import encoding
from skipbus.shared.secret import Secret


class Ear:
    """What one process heard."""

    def __init__(self) -> None:
        self.heard: list[tuple[NudgeKind, list[bytes]]] = []
        self._more = asyncio.Event()

    def __call__(self, kind: NudgeKind, items: Sequence[bytes]) -> None:
        self.heard.append((kind, list(items)))
        self._more.set()

    async def wait(self, count: int) -> list[tuple[NudgeKind, list[bytes]]]:
        async with asyncio.timeout(10):
            while len(self.heard) < count:
                self._more.clear()
                await self._more.wait()
        return self.heard


def process(rabbitmq: RabbitMqServer, local_id: str, ear: Ear, **options: frozenset[NudgeKind]) -> ProcessBus:
    return ProcessBus(Secret(rabbitmq.url), local_id, "test", ear, **options)


@asynccontextmanager
async def api_and_syncer(rabbitmq: RabbitMqServer, local_id: str) -> AsyncIterator[tuple[ProcessBus, Ear]]:
    """An api, and what the syncer of the same KP hears."""
    ear = Ear()
    api, syncer = process(rabbitmq, local_id, Ear()), process(rabbitmq, local_id, ear, kinds=FOR_SYNCER)
    async with api.connected(), syncer.connected():
        for bus in (api, syncer):
            await bus.up.wait()
        yield api, ear


async def test_processes_of_one_kp_hear_each_other_and_no_other_kp(rabbitmq: RabbitMqServer) -> None:
    api, syncer, stranger = Ear(), Ear(), Ear()
    here = process(rabbitmq, "KP Nudge.1", api)
    there = process(rabbitmq, "KP Nudge.1", syncer, kinds=FOR_SYNCER)
    other = process(rabbitmq, "KP Nudge.2", stranger)
    async with here.connected(), there.connected(), other.connected():
        for bus in (here, there, other):
            await bus.up.wait()
        here.nudge(NudgeKind.OUTBOX)
        assert await syncer.wait(1) == [(NudgeKind.OUTBOX, [])]
        there.nudge(NudgeKind.STORED, [b"t" * 16, b"u" * 16])
        there.nudge(NudgeKind.STORED, [b"t" * 16])
        assert await api.wait(1) == [(NudgeKind.STORED, [b"t" * 16, b"u" * 16])]
        there.nudge(NudgeKind.ARRIVED, [bytes([i // 256, i % 256]) for i in range(2_500)])
        await api.wait(4)
        assert [len(items) for _, items in api.heard[1:]] == [1_000, 1_000, 500]
        assert not stranger.heard
        assert len(syncer.heard) == 1


async def test_what_is_told_without_a_word_more_is_not_lost_beside_what_others_say(rabbitmq: RabbitMqServer) -> None:
    async with api_and_syncer(rabbitmq, "KP Nudge.3") as (here, ear):
        for _ in range(2):
            here.nudge(NudgeKind.OUTBOX)
            here.nudge(NudgeKind.OUTBOX, [b"first"])
            await ear.wait(2)
            assert ear.heard == [(NudgeKind.OUTBOX, [b"first"]), (NudgeKind.OUTBOX, [])]
            ear.heard.clear()
        here.nudge(NudgeKind.OUTBOX, [b"first"])
        here.nudge(NudgeKind.OUTBOX, [b"last"])
        assert await ear.wait(1) == [(NudgeKind.OUTBOX, [b"first", b"last"])]


async def test_long_items_are_told_in_as_many_nudges_as_they_take(rabbitmq: RabbitMqServer) -> None:
    async with api_and_syncer(rabbitmq, "KP Nudge.4") as (here, ear):
        items = [n.to_bytes(MAX_ITEM_BYTES) for n in range(1, 601)]
        here.nudge(NudgeKind.OUTBOX, items)
        while sum(len(heard) for _, heard in ear.heard) < len(items):
            await ear.wait(len(ear.heard) + 1)
        assert [one for _, heard in ear.heard for one in heard] == items
        assert len(ear.heard) > MAX_ITEM_BYTES * len(items) / MAX_NUDGE_BYTES


async def test_a_nudge_takes_milliseconds(rabbitmq: RabbitMqServer) -> None:
    ear = Ear()
    bus = process(rabbitmq, "KP_Nudge", ear)
    async with bus.connected():
        await bus.up.wait()
        times = []
        for number in range(1, 51):
            started = time.perf_counter()
            bus.nudge(NudgeKind.STORED, [bytes([number])])
            await ear.wait(number)
            times.append(time.perf_counter() - started)
        assert sorted(times)[25] < 0.05


async def test_malformed_and_foreign_nudges_harm_nobody(rabbitmq: RabbitMqServer) -> None:
    ear = Ear()
    bus = process(rabbitmq, "KP_Nudge", ear)
    connection = await aio_pika.connect(rabbitmq.url)
    async with bus.connected(), connection:
        await bus.up.wait()
        channel = await connection.channel()
        exchange = await channel.get_exchange(NUDGES, ensure=False)
        bad = [
            b"",
            b"\xc1",
            encoding.pack("text"),
            encoding.pack([1]),
            encoding.pack([b""]),
            encoding.pack([b"x" * 65]),
            bytes(300_000),
        ]
        for body in [*bad, bytes(300_000), encoding.pack([b"good"])]:
            await exchange.publish(aio_pika.Message(body), nudge_routing_key("KP_Nudge", "stored"))
        assert await ear.wait(1) == [(NudgeKind.STORED, [b"good"])]


@pytest.mark.stops_servers
async def test_nudges_go_on_after_the_broker_was_away_and_raise_nothing_meanwhile(rabbitmq: RabbitMqServer) -> None:
    ear = Ear()
    bus = process(rabbitmq, "KP_Nudge", ear)
    async with bus.connected():
        await bus.up.wait()
        # In this thread: a server ends with the thread that started it.
        rabbitmq.restart()
        bus.nudge(NudgeKind.STOCK)
        async with asyncio.timeout(20):
            await bus.up.wait()
            while not ear.heard:
                bus.nudge(NudgeKind.STOCK)
                await asyncio.sleep(0.05)


async def test_an_envelope_is_confirmed_into_the_kps_own_queue_or_the_broker_is_away(rabbitmq: RabbitMqServer) -> None:
    bus = process(rabbitmq, "KP_Door", Ear())
    with pytest.raises(BusUnavailable):
        await bus.publish_envelope(b"too early")
    syncer = Bus(Secret(rabbitmq.url), "KP_Door", "test")
    async with bus.connected():
        await bus.up.wait()
        with pytest.raises(BusUnavailable, match="never run"):
            await bus.publish_envelope(b"no queue")
        await bus.publish_envelope(b"nobody listens", live=True)
        async with syncer.connected():
            await syncer.up.wait()
            await bus.publish_envelope(b"kept")
            await bus.publish_envelope(b"live", live=True)
            found: list[Delivery] = []
            while len(found) < 2:
                found += await syncer.next_deliveries(10, 1.0)
            for delivery in found:
                await delivery.ack()
            assert {delivery.body for delivery in found} == {b"kept", b"live"}
