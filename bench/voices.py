"""Simulated peers: identities that send signed heartbeats to one key provider, evenly over the interval, and listen.

They run in a thread of the bench. Nothing of the key provider's own code runs for them but the signing of envelopes.
"""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Self

import aio_pika

from sandbox.key_provider import BusPeer
from sandbox.processes import SandboxError
from skipbus.services.syncer.payloads import pack_capabilities, pack_heartbeat
from skipbus.shared.broker.names import ENVELOPES, live_routing_key, routing_key
from skipbus.shared.clock import now_ms
from skipbus.shared.crypto.epochs import EpochSpan, PublicEpoch, new_epoch_id
from skipbus.shared.crypto.hpke import HybridPrivateKey
from skipbus.shared.crypto.identity import Identity
from skipbus.shared.protocol.announcements import Announcement, digest, sign_announcement
from skipbus.shared.protocol.envelopes import EnvelopeType, Header, sign_envelope
from skipbus.shared.settings.peers import identity_line

_QUEUE = "bench.voices"
_START_SECONDS = 30.0
_EPOCHS = 8
_EPOCH_MS = 600_000
_DAY_MS = 86_400_000


class Voice:
    """One simulated peer, with an announcement of the usual size."""

    def __init__(self, system_id: str) -> None:
        self.id = system_id
        self._identity = Identity.generate()
        public_key, at_ms = HybridPrivateKey.generate().public_bytes(), now_ms()
        spans = [EpochSpan(at_ms + n * _EPOCH_MS, at_ms + (n + 1) * _EPOCH_MS, at_ms + _DAY_MS) for n in range(_EPOCHS)]
        epochs = tuple(PublicEpoch(new_epoch_id(), span, public_key) for span in spans)
        announcement = Announcement(system_id, self._identity.public_key, at_ms, "bench", epochs)
        self._announcement = sign_announcement(announcement, self._identity)

    def peer(self) -> BusPeer:
        """How it stands in a configuration."""
        return BusPeer(self.id, identity_line(self._identity.public_key), stock=0)

    def announces(self, target_id: str) -> bytes:
        payload = pack_capabilities(self._announcement, request=False)
        return self._sign(EnvelopeType.CAPABILITIES, target_id, payload)

    def beats(self, target_id: str, interval_seconds: float) -> bytes:
        payload = pack_heartbeat(int(interval_seconds * 1000), digest(self._announcement), "bench")
        return self._sign(EnvelopeType.HEARTBEAT, target_id, payload)

    def _sign(self, kind: EnvelopeType, target_id: str, payload: bytes) -> bytes:
        at_ms = now_ms()
        return sign_envelope(Header(kind, self.id, target_id, at_ms * 1000, at_ms), payload, self._identity)


class Voices:
    """Heartbeats of many, for as long as the block runs."""

    def __init__(self, rabbitmq_url: str, target_id: str, count: int, interval_seconds: float) -> None:
        self.all = [Voice(f"KP_V{number}") for number in range(count)]
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
        for voice in self.all:
            message = aio_pika.Message(voice.announces(self._target_id))
            await exchange.publish(message, routing_key(self._target_id), mandatory=False)
        while not self._stop.is_set():
            for voice in self.all:
                body = voice.beats(self._target_id, self._interval_seconds)
                message = aio_pika.Message(body, delivery_mode=aio_pika.DeliveryMode.NOT_PERSISTENT)
                await exchange.publish(message, live_routing_key(self._target_id), mandatory=False)
                self.sent += 1
                due += pause_seconds
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                if self._stop.is_set():
                    return

    async def _hear(self, _message: aio_pika.abc.AbstractIncomingMessage) -> None:
        self.heard += 1
