"""A syncer's door to the broker: its KP's queues, what arrives in them, and publishing to others.

Everything that this KP needs (exchanges, its queues, its dead-letter queue) is declared on every new connection
(``skipbus.shared.broker``). Deliveries of a lost connection are worthless: the broker hands them out again.

A quorum queue that was made just before its broker was killed can come back without a leader, and then answers
nobody, ever. This KP's own one is then deleted and made anew; what was in it comes again from the peers' outboxes.

Publishing is confirmed by the broker (``shared/bus_sending.py``). Leaves to others: what envelopes say and which are
sent again.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import aio_pika
from aio_pika.abc import AbstractChannel, AbstractExchange, AbstractIncomingMessage, AbstractQueue
from pamqp.common import FieldTable

from skipbus.shared.broker import (
    CONFIRM_SECONDS,
    CONNECT_SECONDS,
    FAILURES,
    SET_UP_SECONDS,
    Broker,
    Session,
    cancelled_from_outside,
    confirmation,
)
from skipbus.shared.bus_names import (
    DEAD_LETTERS,
    ENVELOPES,
    dead_queue_name,
    live_queue_name,
    live_routing_key,
    queue_name,
    routing_key,
)
from skipbus.shared.bus_sending import Channels, Sender
from skipbus.shared.errors import BusUnavailable
from skipbus.shared.logs import get_logger
from skipbus.shared.nudges import FOR_SYNCER, NudgeKind, Nudges, OnNudge, pumping
from skipbus.shared.secret import Secret

# Of each queue. Of a message that is larger than any envelope only its length is in memory (``shared/bus_bodies.py``).
PREFETCH = 32
DELIVERY_LIMIT = 5
DEAD_LETTERS_KEPT = 10_000
DEAD_LETTERS_KEPT_MS = 7 * 86_400_000
DEAD_LETTERS_KEPT_BYTES = 256 * 1024 * 1024
LIVE_KEPT = 1_000
LIVE_KEPT_BYTES = 32 * 1024 * 1024
# A quorum queue has a leader again half a second after its broker is back; this is ample for a loaded one.
CONSUME_SECONDS = 5.0
REMAKE_AFTER_TRIES = 2
REMAKE_SECONDS = 15.0

_log = get_logger("bus")


class QueueWithoutLeader(ConnectionError):
    """The KP's queue is there by its name, and the broker does not let anybody consume from it."""


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
        """Whether the broker will deliver it anew, because its connection is gone."""
        return self._session.lost.is_set()

    async def ack(self) -> None:
        """It is handled."""
        await _answered(self._message.ack())

    async def reject(self) -> None:
        """It is refused for good: the broker dead-letters it."""
        await _answered(self._message.reject(requeue=False))

    async def requeue(self) -> None:
        """It could not be handled now. The broker counts these and dead-letters it after DELIVERY_LIMIT."""
        await _answered(self._message.reject(requeue=True))


async def _answered(answering: Awaitable[None]) -> None:
    """Waits until the answer is on its way; one that cannot be given is no matter, the broker delivers anew."""
    try:
        async with asyncio.timeout(CONFIRM_SECONDS):
            await answering
    except FAILURES:
        pass
    except asyncio.CancelledError:
        # The library ends whoever waits on a stuck connection by cancelling; that is no order to this task.
        if cancelled_from_outside():
            raise


def _ignore(_kind: NudgeKind, _items: Sequence[bytes]) -> None:
    pass


class Bus:
    """Connects on entering ``connected``; ``publish`` and ``next_deliveries`` work whenever ``up`` is set."""

    def __init__(self, url: Secret, local_id: str, name: str, on_nudge: OnNudge = _ignore) -> None:
        """``on_nudge`` is called on the event loop, when the api has written to the outbox."""
        self._local_id = local_id
        self._broker = Broker(
            url, name, self._set_up, self._forget, set_up_seconds=SET_UP_SECONDS + REMAKE_SECONDS + CONNECT_SECONDS
        )
        self._nudges = Nudges(local_id, on_nudge, FOR_SYNCER)
        self._sender: Sender | None = None
        self._consumers: list[tuple[AbstractQueue, str]] = []
        self._deliveries: asyncio.Queue[Delivery] = asyncio.Queue()
        self._consuming = True
        self._leaderless_tries = 0
        self.up = self._broker.up

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[None]:
        """Keeps a connection for as long as the block runs; returns at once, whether or not the broker is there."""
        async with self._broker.connected(), pumping(self._nudges):
            yield

    def nudge(self, kind: NudgeKind, items: Sequence[bytes] = ()) -> None:
        """Tells this KP's other processes, while the broker is there. Never blocks, never raises."""
        self._nudges.nudge(kind, items)

    async def publish(self, target_id: str, body: bytes, *, lifetime_ms: int | None) -> bool:
        """Sends to a KP's queue and waits until the broker has it; False where the KP has no such queue.

        With ``lifetime_ms`` it is kept on the broker's disk for so long, for a KP that is down; with None it
        reaches the KP only if that listens now. Raises BusUnavailable, or of that kind Unconfirmed where the broker
        is silent about this KP alone: it may or may not have been sent.
        """
        sender = self._sender
        if sender is None:
            raise BusUnavailable("the broker is away")
        return await confirmation(sender.publish(target_id, body, lifetime_ms=lifetime_ms))

    @property
    def answers(self) -> bool:
        """Whether the broker is connected and confirms what it is given."""
        return self._sender is not None and not self._sender.silent

    def is_left_out(self, target_id: str) -> bool:
        """Whether what is kept for this KP is not taken for the time being, because its queue confirms nothing."""
        return self._sender is not None and self._sender.is_left_out(target_id)

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

    async def stop_consuming(self) -> None:
        """Takes in no more; what was delivered already can still be handled and answered."""
        self._consuming = False
        consumers, self._consumers = self._consumers, []
        for queue, tag in consumers:
            with contextlib.suppress(*FAILURES):
                await queue.cancel(tag, timeout=CONNECT_SECONDS)

    def _forget(self) -> None:
        self._sender = None
        self._consumers = []
        self._nudges.forget()

    async def _set_up(self, session: Session) -> None:
        try:
            async with asyncio.timeout(SET_UP_SECONDS):
                await self._declare(session)
        except QueueWithoutLeader:
            await self._repair(session)
            raise
        self._leaderless_tries = 0

    async def _declare(self, session: Session) -> None:
        receiving = await session.channel()
        exchange = await _declare_exchanges(receiving)
        main, live = await _declare_queues(receiving, exchange, self._local_id)
        if self._consuming:
            # Per consumer: a backlog in one queue must not keep heartbeats waiting in the other.
            await receiving.set_qos(PREFETCH)
            try:
                await self._consume(session, main)
            except TimeoutError as error:
                raise QueueWithoutLeader(f"{main.name} has no leader (rabbitmq-queues quorum_status)") from error
            await self._consume(session, live)
        await self._nudges.set_up(session)
        self._sender = await Sender.open(Channels(session.channel, session.abandon))

    async def _consume(self, session: Session, queue: AbstractQueue) -> None:
        async with asyncio.timeout(CONSUME_SECONDS):
            tag = await queue.consume(functools.partial(self._take_in, session))
        self._consumers.append((queue, tag))

    async def _repair(self, session: Session) -> None:
        self._leaderless_tries += 1
        if self._leaderless_tries < REMAKE_AFTER_TRIES:
            return
        if self._broker.settled:
            if self._leaderless_tries == REMAKE_AFTER_TRIES:
                _log.error(
                    "queue without a leader: has its cluster lost the majority?", queue=queue_name(self._local_id)
                )
            return
        async with asyncio.timeout(REMAKE_SECONDS):
            await self._delete_queues(session)

    async def _delete_queues(self, session: Session) -> None:
        """Deletes the queue that answers nobody, and the one for dead letters unless there is evidence in it."""
        channel = await session.channel()
        dead = await channel.declare_queue(dead_queue_name(self._local_id), passive=True)
        if not dead.declaration_result.message_count:
            await channel.queue_delete(dead.name)
        await channel.queue_delete(queue_name(self._local_id))
        self._leaderless_tries = 0
        _log.warning(
            "queue without a leader: made anew, peers send again what was in it", queue=queue_name(self._local_id)
        )

    async def _take_in(self, session: Session, message: AbstractIncomingMessage) -> None:
        self._deliveries.put_nowait(Delivery(message.body, bool(message.redelivered), message, session))


async def _declare_exchanges(channel: AbstractChannel) -> AbstractExchange:
    await channel.declare_exchange(DEAD_LETTERS, aio_pika.ExchangeType.TOPIC, durable=True)
    return await channel.declare_exchange(ENVELOPES, aio_pika.ExchangeType.TOPIC, durable=True)


async def _declare_queues(
    channel: AbstractChannel, exchange: AbstractExchange, local_id: str
) -> tuple[AbstractQueue, AbstractQueue]:
    """The KP's two queues, bound; what is refused in either goes to the same dead-letter queue."""
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
    dead_lettering: FieldTable = {
        "x-dead-letter-exchange": DEAD_LETTERS,
        "x-dead-letter-routing-key": routing_key(local_id),
        # Of several syncers one consumes, so that envelopes are handled in their order.
        "x-single-active-consumer": True,
    }
    main = await channel.declare_queue(
        queue_name(local_id),
        durable=True,
        arguments={"x-queue-type": "quorum", "x-delivery-limit": DELIVERY_LIMIT, **dead_lettering},
    )
    await main.bind(exchange, routing_key(local_id))
    live = await channel.declare_queue(
        live_queue_name(local_id),
        durable=True,
        auto_delete=True,
        # When it is full, new messages are turned away at their sender: dropping the oldest ones would
        # dead-letter them, though nobody refused them.
        arguments={
            "x-queue-type": "classic",
            "x-max-length": LIVE_KEPT,
            "x-max-length-bytes": LIVE_KEPT_BYTES,
            "x-overflow": "reject-publish",
            **dead_lettering,
        },
    )
    await live.bind(exchange, live_routing_key(local_id))
    return main, live
