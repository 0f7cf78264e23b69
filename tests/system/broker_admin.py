"""A broker in the hands of its administrator: messages are sent, taken, held back and looked at.

Blocking calls. What a broker's administrator may do with messages, a test may do here.
"""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Self, TypeVar

import aio_pika
from aio_pika.abc import AbstractChannel, AbstractConnection

from sandbox.simulated_peer import SimulatedPeer
from skipbus.shared.broker.names import (
    ENVELOPES,
    dead_queue_name,
    live_queue_name,
    live_routing_key,
    queue_name,
    routing_key,
)
from skipbus.shared.protocol.envelopes import EnvelopeType, SignedEnvelope, read_envelope

T = TypeVar("T")


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

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

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

    def receive_for(self, peer: SimulatedPeer) -> None:
        """Makes the queue in which a simulated peer finds what it is sent."""
        self.make_queue(queue_name(peer.id), routing_key(peer.id), live_routing_key(peer.id))

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

    def receive_live_for(self, target_id: str) -> None:
        """Makes the queue in which a key provider without a process finds what is not kept."""
        self.make_queue(live_queue_name(target_id), live_routing_key(target_id))

    def heard(self, target_id: str) -> bytes | None:
        """Takes one message out of that queue."""
        return self.take(live_queue_name(target_id))

    def dead_letter(self, target_id: str) -> bytes | None:
        """Takes one message that a key provider has refused."""
        return self.take(dead_queue_name(target_id))

    def next_dead(self, target_id: str, timeout_seconds: float = 10) -> bytes:
        """The next message that a key provider refuses, waited for."""
        deadline = time.monotonic() + timeout_seconds
        while (body := self.dead_letter(target_id)) is None:
            assert time.monotonic() < deadline, f"nothing was dead-lettered in {timeout_seconds} s"
            time.sleep(0.05)
        return body

    def dead_letters(self, target_id: str) -> list[bytes]:
        """Takes all that a key provider has refused."""
        return list(iter(lambda: self.dead_letter(target_id), None))

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
        """Within the block, what is sent to a key provider comes into the administrator's hands instead."""
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
