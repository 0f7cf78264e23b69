"""Notifications between the processes of one KP: they arrive within milliseconds, and only there."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import aio_pika
import pytest

from sandbox.rabbitmq import RabbitMqServer
from skipbus.services.syncer.consume import Consumer, Delivery
from skipbus.shared.broker.connection import BrokerConnection
from skipbus.shared.broker.names import NOTIFICATIONS, notification_routing_key
from skipbus.shared.broker.notifications import FOR_API, FOR_SYNCER, NotificationKind
from skipbus.shared.broker.publishing import Publisher
from skipbus.shared.errors import BusUnavailable
from skipbus.shared.protocol import encoding
from skipbus.shared.settings import Secret
from tests.integration.broker_process import BrokerProcess


class Ear:
    """What one process heard."""

    def __init__(self) -> None:
        self.heard: list[tuple[NotificationKind, list[bytes]]] = []
        self._more = asyncio.Event()

    def __call__(self, kind: NotificationKind, items: Sequence[bytes]) -> None:
        self.heard.append((kind, list(items)))
        self._more.set()

    async def wait(self, count: int) -> list[tuple[NotificationKind, list[bytes]]]:
        async with asyncio.timeout(10):
            while len(self.heard) < count:
                self._more.clear()
                await self._more.wait()
        return self.heard


def process(
    rabbitmq: RabbitMqServer, local_id: str, ear: Ear, kinds: frozenset[NotificationKind] = FOR_API
) -> BrokerProcess:
    return BrokerProcess(rabbitmq.url, local_id, ear, kinds)


async def test_processes_of_one_kp_hear_each_other_and_no_other_kp(rabbitmq: RabbitMqServer) -> None:
    api, syncer, stranger = Ear(), Ear(), Ear()
    here = process(rabbitmq, "KP Notification.1", api)
    there = process(rabbitmq, "KP Notification.1", syncer, kinds=FOR_SYNCER)
    other = process(rabbitmq, "KP Notification.2", stranger)
    async with here.connected(), there.connected(), other.connected():
        here.notifier.notify(NotificationKind.OUTBOX)
        assert await syncer.wait(1) == [(NotificationKind.OUTBOX, [])]
        there.notifier.notify(NotificationKind.STORED, [b"t" * 16, b"u" * 16])
        there.notifier.notify(NotificationKind.STORED, [b"t" * 16])
        assert await api.wait(1) == [(NotificationKind.STORED, [b"t" * 16, b"u" * 16])]
        there.notifier.notify(NotificationKind.ARRIVED, [bytes([i // 256, i % 256]) for i in range(2_500)])
        await api.wait(4)
        assert [len(items) for _, items in api.heard[1:]] == [1_000, 1_000, 500]
        assert not stranger.heard
        assert len(syncer.heard) == 1


async def test_a_notification_takes_milliseconds(rabbitmq: RabbitMqServer) -> None:
    ear = Ear()
    made = process(rabbitmq, "KP_Notified", ear)
    async with made.connected():
        times = []
        for number in range(1, 51):
            started = time.perf_counter()
            made.notifier.notify(NotificationKind.STORED, [bytes([number])])
            await ear.wait(number)
            times.append(time.perf_counter() - started)
        assert sorted(times)[25] < 0.05


async def test_malformed_and_foreign_notifications_harm_nobody(rabbitmq: RabbitMqServer) -> None:
    ear = Ear()
    made = process(rabbitmq, "KP_Notified", ear)
    connection = await aio_pika.connect(rabbitmq.url)
    async with made.connected(), connection:
        channel = await connection.channel()
        exchange = await channel.get_exchange(NOTIFICATIONS, ensure=False)
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
            await exchange.publish(aio_pika.Message(body), notification_routing_key("KP_Notified", "stored"))
        assert await ear.wait(1) == [(NotificationKind.STORED, [b"good"])]


@pytest.mark.stops_servers
async def test_notifications_go_on_after_the_broker_was_away_and_raise_nothing_meanwhile(
    rabbitmq: RabbitMqServer,
) -> None:
    ear = Ear()
    made = process(rabbitmq, "KP_Notified", ear)
    async with made.connected():
        # In this thread: a server ends with the thread that started it.
        rabbitmq.restart()
        made.notifier.notify(NotificationKind.STOCK)
        async with asyncio.timeout(20):
            while not ear.heard:
                made.notifier.notify(NotificationKind.STOCK)
                await asyncio.sleep(0.05)


async def test_an_envelope_is_confirmed_into_a_queue_or_there_is_no_queue_or_the_broker_is_away(
    rabbitmq: RabbitMqServer,
) -> None:
    publisher, consumer = Publisher(), Consumer("KP_Door")
    sending = BrokerConnection(Secret(rabbitmq.url), "test", [publisher])
    receiving = BrokerConnection(Secret(rabbitmq.url), "test", [consumer])
    with pytest.raises(BusUnavailable):
        await publisher.publish("KP_Door", b"too early", lifetime_ms=None)
    async with sending.connected():
        await sending.up.wait()
        assert not await publisher.publish("KP_Door", b"no queue", lifetime_ms=60_000)
        assert not await publisher.publish("KP_Door", b"nobody listens", lifetime_ms=None)
        async with receiving.connected():
            await receiving.up.wait()
            assert await publisher.publish("KP_Door", b"kept", lifetime_ms=60_000)
            assert await publisher.publish("KP_Door", b"live", lifetime_ms=None)
            found: list[Delivery] = []
            while len(found) < 2:
                found += await consumer.next_deliveries(10, 1.0)
            for delivery in found:
                await delivery.ack()
            assert {delivery.body for delivery in found} == {b"kept", b"live"}
