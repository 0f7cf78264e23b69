"""Simulated peers that send signed heartbeats to one key provider, evenly over the interval, and receive its own.

They run in a thread of the bench.
"""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Self

import aio_pika

from sandbox.processes import SandboxError
from sandbox.simulated_peer import SimulatedPeer
from skipbus.shared.broker.names import ENVELOPES, live_routing_key, routing_key

_QUEUE = "bench.simulated_peers"
_START_SECONDS = 30.0
# As many as a key provider with the default lifetimes announces.
_EPOCHS = 8


class SimulatedPeers:
    """Heartbeats of many, for as long as the block runs."""

    def __init__(self, rabbitmq_url: str, target_id: str, count: int, interval_seconds: float) -> None:
        self.all = [SimulatedPeer(f"KP_S{number}", epoch_count=_EPOCHS) for number in range(count)]
        self.sent = 0
        self.received = 0
        self._url = rabbitmq_url
        self._target_id = target_id
        self._interval_seconds = interval_seconds
        self._ready = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)

    def __enter__(self) -> Self:
        """Returns when their queue is bound. Raises SandboxError."""
        self._thread.start()
        if not self._ready.wait(_START_SECONDS):
            raise SandboxError("the simulated peers cannot reach the broker")
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(10)

    async def _run(self) -> None:
        connection = await aio_pika.connect(self._url)
        async with connection:
            channel = await connection.channel(publisher_confirms=False)
            queue = await channel.declare_queue(_QUEUE, exclusive=True)
            for peer in self.all:
                for key in (live_routing_key(peer.id), routing_key(peer.id)):
                    await queue.bind(ENVELOPES, key)
            await queue.consume(self._count, no_ack=True)
            exchange = await channel.get_exchange(ENVELOPES, ensure=False)
            self._ready.set()
            await self._send_heartbeats(exchange)

    async def _send_heartbeats(self, exchange: aio_pika.abc.AbstractExchange) -> None:
        pause_seconds = self._interval_seconds / len(self.all)
        interval_ms = int(self._interval_seconds * 1000)
        announcements = {peer.id: peer.announcement() for peer in self.all}
        for peer in self.all:
            message = aio_pika.Message(peer.capabilities(self._target_id, announcements[peer.id]))
            await exchange.publish(message, routing_key(self._target_id), mandatory=False)
        due = time.monotonic()
        while not self._stop.is_set():
            for peer in self.all:
                body = peer.heartbeat(self._target_id, interval_ms, announcements[peer.id])
                message = aio_pika.Message(body, delivery_mode=aio_pika.DeliveryMode.NOT_PERSISTENT)
                await exchange.publish(message, live_routing_key(self._target_id), mandatory=False)
                self.sent += 1
                due += pause_seconds
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                if self._stop.is_set():
                    return

    async def _count(self, _message: aio_pika.abc.AbstractIncomingMessage) -> None:
        self.received += 1
