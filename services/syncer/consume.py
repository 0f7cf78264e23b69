"""A key provider's queues: declared on every new connection, and consumed by one syncer at a time.

Deliveries of a lost connection are worthless: the broker delivers them again. Memory is bounded by the prefetch count
and the broker's ``max_message_size``. A quorum queue without a leader is an alarm for the operator; the consumer tries
again and never deletes it, because only the operator knows whether other servers of a cluster still hold its messages.
Heartbeats are gathered for a moment, because with hundreds of peers one arrives every few milliseconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import Awaitable
from dataclasses import dataclass, field

import aio_pika
from aio_pika.abc import AbstractChannel, AbstractExchange, AbstractIncomingMessage, AbstractQueue
from pamqp.common import FieldTable

from skipbus.shared.broker.connection import (
    CONNECT_SECONDS,
    FAILURES,
    NeedsOperator,
    Session,
    lost_if_cancelled,
)
from skipbus.shared.broker.names import (
    DEAD_LETTERS,
    dead_queue_name,
    live_queue_name,
    live_routing_key,
    queue_name,
    routing_key,
)
from skipbus.shared.broker.publishing import declare_envelopes
from skipbus.shared.errors import EnvelopeRefused
from skipbus.shared.protocol.envelopes import EnvelopeType, read_envelope

# Of each of the two queues. With the shipped max_message_size that is 65 MiB at most for each.
PREFETCH = 16
DELIVERY_LIMIT = 5
DEAD_LETTERS_KEPT = 10_000
DEAD_LETTERS_KEPT_MS = 7 * 86_400_000
DEAD_LETTERS_KEPT_BYTES = 256 * 1024 * 1024
LIVE_KEPT = 1_000
LIVE_KEPT_BYTES = 32 * 1024 * 1024
# Half of what the broker delivers unacknowledged, so that other live envelopes are still delivered.
MAX_GATHERED = PREFETCH // 2
# Of the local heartbeat interval: small next to the time after which a peer counts as late.
GATHER_SHARE = 0.05
MAX_GATHER_SECONDS = 0.25
# A heartbeat has 5 kB. What is longer is not read on the event loop.
_MAX_HEARTBEAT_BYTES = 16 * 1024
# A quorum queue has a leader again half a second after its broker is back; this is ample for a loaded one.
CONSUME_SECONDS = 5.0
_ANSWER_SECONDS = 10.0


class QueueWithoutLeader(NeedsOperator):
    """The KP's queue exists, and the broker does not let anybody consume from it."""

    def __init__(self, queue: str) -> None:
        super().__init__(
            f"queue without a leader: {queue}",
            "start the servers of the RabbitMQ cluster that are down; if all run and `rabbitmq-queues quorum_status "
            f"{queue}` shows no leader, delete the queue: peers send again what was in it",
        )


@dataclass(frozen=True, slots=True)
class Delivery:
    """A message that waits for an answer: ``ack`` or ``reject``. Both do nothing once the connection is lost."""

    body: bytes
    redelivered: bool
    _message: AbstractIncomingMessage
    _session: Session
    _arrived: float = field(default_factory=time.monotonic)

    @property
    def waited_ms(self) -> int:
        """How long ago it arrived."""
        return round((time.monotonic() - self._arrived) * 1000)

    @property
    def lost(self) -> bool:
        """Whether the broker will deliver it again, because its connection is gone."""
        return self._session.lost.is_set()

    async def ack(self) -> None:
        """It is handled."""
        await _answer(self._message.ack())

    async def reject(self) -> None:
        """It is rejected for good: the broker dead-letters it."""
        await _answer(self._message.reject(requeue=False))

    async def requeue(self) -> None:
        """It could not be handled now. The broker counts these and dead-letters it after DELIVERY_LIMIT."""
        await _answer(self._message.reject(requeue=True))


async def _answer(answering: Awaitable[None]) -> None:
    """Waits until the answer is sent. One that cannot be sent changes nothing: the broker delivers again."""
    with contextlib.suppress(*FAILURES), lost_if_cancelled():
        async with asyncio.timeout(_ANSWER_SECONDS):
            await answering


class Consumer:
    """A part of a syncer's connection. Of one event loop."""

    def __init__(self, local_id: str) -> None:
        self._local_id = local_id
        self._consumed: list[tuple[AbstractQueue, str]] = []
        self._deliveries: asyncio.Queue[Delivery] = asyncio.Queue()
        self._stopped = False

    async def set_up(self, session: Session) -> None:
        """Declares the queues and consumes from them. Raises QueueWithoutLeader."""
        channel = await session.channel()
        main, live = await declare_queues(channel, self._local_id)
        if self._stopped:
            return
        # The limit is per consumer: a backlog in one queue must not delay heartbeats in the other.
        await channel.set_qos(PREFETCH)
        try:
            async with asyncio.timeout(CONSUME_SECONDS):
                await self._consume(session, main)
        except TimeoutError as error:
            raise QueueWithoutLeader(main.name) from error
        await self._consume(session, live)

    def forget(self) -> None:
        """The connection is lost, and its deliveries are too."""
        self._consumed = []

    async def next_deliveries(self, limit: int, wait_seconds: float) -> list[Delivery]:
        """What has arrived, at most ``limit``; an empty list where nothing came within ``wait_seconds``."""
        try:
            async with asyncio.timeout(wait_seconds):
                found = [await self._deliveries.get()]
        except TimeoutError:
            return []
        while len(found) < limit and not self._deliveries.empty():
            found.append(self._deliveries.get_nowait())
        return [delivery for delivery in found if not delivery.lost]

    async def stop(self) -> None:
        """Takes in no more; what was delivered already can still be handled and answered."""
        self._stopped = True
        consumed, self._consumed = self._consumed, []
        for queue, tag in consumed:
            with contextlib.suppress(*FAILURES), lost_if_cancelled():
                await queue.cancel(tag, timeout=CONNECT_SECONDS)

    async def _consume(self, session: Session, queue: AbstractQueue) -> None:
        tag = await queue.consume(functools.partial(self._take_in, session))
        self._consumed.append((queue, tag))

    async def _take_in(self, session: Session, message: AbstractIncomingMessage) -> None:
        self._deliveries.put_nowait(Delivery(message.body, bool(message.redelivered), message, session))


class Incoming:
    """What the consumer delivers; heartbeats come together and later than the rest.

    The type that an envelope claims is not verified here: a false one changes only when the envelope is handled.
    """

    def __init__(self, consumer: Consumer, heartbeat_seconds: float) -> None:
        self._consumer = consumer
        self._gather_seconds = min(MAX_GATHER_SECONDS, GATHER_SHARE * heartbeat_seconds)
        self._gathered: list[Delivery] = []
        self._due_at = 0.0

    async def next_deliveries(self, limit: int, wait_seconds: float) -> list[Delivery]:
        """As ``Consumer.next_deliveries``; an empty list also where only heartbeats came, for a later call."""
        if self._gathered:
            wait_seconds = min(wait_seconds, max(0.0, self._due_at - time.monotonic()))
        urgent = [one for one in await self._consumer.next_deliveries(limit, wait_seconds) if not self._gather(one)]
        # Checked at each call: heartbeats must not wait for a pause in what is urgent.
        if len(self._gathered) < MAX_GATHERED and time.monotonic() < self._due_at:
            return urgent
        gathered, self._gathered = self._gathered, []
        return urgent + [one for one in gathered if not one.lost]

    async def stop(self) -> None:
        """Takes in no more; what was delivered already is still returned, immediately."""
        self._gather_seconds = self._due_at = 0.0
        await self._consumer.stop()

    def _gather(self, delivery: Delivery) -> bool:
        """Whether it is kept for a later call."""
        if self._gather_seconds <= 0 or not _is_heartbeat(delivery.body):
            return False
        if not self._gathered:
            self._due_at = time.monotonic() + self._gather_seconds
        self._gathered.append(delivery)
        return True


def _is_heartbeat(body: bytes) -> bool:
    if len(body) > _MAX_HEARTBEAT_BYTES:
        return False
    try:
        return read_envelope(body).header.type is EnvelopeType.HEARTBEAT
    except EnvelopeRefused:
        return False


async def declare_queues(channel: AbstractChannel, local_id: str) -> tuple[AbstractQueue, AbstractQueue]:
    """The KP's two queues, bound, for what is kept and what is not; what is rejected in either is dead-lettered."""
    envelopes = await declare_envelopes(channel)
    await _declare_dead_letters(channel, local_id)
    dead_lettering: FieldTable = {
        "x-dead-letter-exchange": DEAD_LETTERS,
        "x-dead-letter-routing-key": routing_key(local_id),
        # Of several syncers one consumes, so that envelopes are handled in their order.
        "x-single-active-consumer": True,
    }
    main = await _declare_main(channel, envelopes, local_id, dead_lettering)
    live = await _declare_live(channel, envelopes, local_id, dead_lettering)
    return main, live


async def _declare_dead_letters(channel: AbstractChannel, local_id: str) -> None:
    await channel.declare_exchange(DEAD_LETTERS, aio_pika.ExchangeType.TOPIC, durable=True)
    dead = await channel.declare_queue(
        dead_queue_name(local_id),
        durable=True,
        arguments={
            "x-queue-type": "quorum",
            "x-max-length": DEAD_LETTERS_KEPT,
            "x-max-length-bytes": DEAD_LETTERS_KEPT_BYTES,
            "x-message-ttl": DEAD_LETTERS_KEPT_MS,
        },
    )
    await dead.bind(DEAD_LETTERS, routing_key(local_id))


async def _declare_main(
    channel: AbstractChannel, envelopes: AbstractExchange, local_id: str, dead_lettering: FieldTable
) -> AbstractQueue:
    main = await channel.declare_queue(
        queue_name(local_id),
        durable=True,
        arguments={"x-queue-type": "quorum", "x-delivery-limit": DELIVERY_LIMIT, **dead_lettering},
    )
    await main.bind(envelopes, routing_key(local_id))
    return main


async def _declare_live(
    channel: AbstractChannel, envelopes: AbstractExchange, local_id: str, dead_lettering: FieldTable
) -> AbstractQueue:
    live = await channel.declare_queue(
        live_queue_name(local_id),
        durable=True,
        auto_delete=True,
        # When it is full, new messages are turned away at their sender: dropping the oldest ones would
        # dead-letter them, though nobody rejected them.
        arguments={
            "x-queue-type": "classic",
            "x-max-length": LIVE_KEPT,
            "x-max-length-bytes": LIVE_KEPT_BYTES,
            "x-overflow": "reject-publish",
            **dead_lettering,
        },
    )
    await live.bind(envelopes, live_routing_key(local_id))
    return live
