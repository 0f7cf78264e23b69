"""Simulated peers: identities that send signed heartbeats to one key provider, evenly over the interval, and listen.

They run in a thread of the bench. Nothing of the key provider's own code runs for them but the signing of envelopes.
"""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import dataclass
from typing import Self

import aio_pika

from sandbox.key_provider import BusPeer
from sandbox.processes import SandboxError
from services.syncer.payloads import pack_heartbeat
from shared.bus_names import ENVELOPES, live_routing_key, routing_key
from shared.clock import now_ms
from shared.envelopes import EnvelopeType, Header, sign_envelope
from shared.identity import Identity
from shared.peers_config import identity_line

_QUEUE = "bench.voices"
_START_SECONDS = 30.0


@dataclass(frozen=True)
class Voice:
    """One simulated peer."""

    id: str
    identity: Identity

    def peer(self) -> BusPeer:
        """How it stands in a configuration."""
        return BusPeer(self.id, identity_line(self.identity.public_key), stock=0)

    def heartbeat(self, target_id: str, interval_seconds: float) -> bytes:
        at_ms = now_ms()
        header = Header(EnvelopeType.HEARTBEAT, self.id, target_id, at_ms * 1000, at_ms)
        return sign_envelope(header, pack_heartbeat(int(interval_seconds * 1000), None, "bench"), self.identity)


class Voices:
    """Heartbeats of many, for as long as the block runs."""

    def __init__(self, rabbitmq_url: str, target_id: str, count: int, interval_seconds: float) -> None:
        self.all = [Voice(f"KP_V{number}", Identity.generate()) for number in range(count)]
        self.sent = 0
        self.heard = 0
        self._url = rabbitmq_url
        self._target_id = target_id
        self._interval_seconds = interval_seconds
        self._ready = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)

    def __enter__(self) -> Self:
        """Returns when they are listening. Raises SandboxError."""
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
            for voice in self.all:
                for key in (live_routing_key(voice.id), routing_key(voice.id)):
                    await queue.bind(ENVELOPES, key)
            await queue.consume(self._hear, no_ack=True)
            exchange = await channel.get_exchange(ENVELOPES, ensure=False)
            self._ready.set()
            await self._beat(exchange)

    async def _beat(self, exchange: aio_pika.abc.AbstractExchange) -> None:
        pause_seconds = self._interval_seconds / len(self.all)
        due = time.monotonic()
        while not self._stop.is_set():
            for voice in self.all:
                body = voice.heartbeat(self._target_id, self._interval_seconds)
                message = aio_pika.Message(body, delivery_mode=aio_pika.DeliveryMode.NOT_PERSISTENT)
                await exchange.publish(message, live_routing_key(self._target_id), mandatory=False)
                self.sent += 1
                due += pause_seconds
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                if self._stop.is_set():
                    return

    async def _hear(self, _message: aio_pika.abc.AbstractIncomingMessage) -> None:
        self.heard += 1
