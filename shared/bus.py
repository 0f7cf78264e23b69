"""One KP's door to the broker: a connection that is made again whenever it is lost, and what is declared on it.

Everything that this KP needs (exchanges, its queues, its dead-letter queue) is declared on every new connection,
so a broker that comes back empty is put in order too. Deliveries of a lost connection are worthless: the broker
hands them out again. A lost broker is logged once when it goes and once when it is back.

A quorum queue can lose its leader for good: RabbitMQ writes down half a second late that a queue exists, and one
that was made just before a crash comes back as a name that answers nobody. The KP's own queue is then deleted and made
anew. Nothing is lost by that: senders keep their envelopes until they are acknowledged. It is done only where this
process has not yet had the queue for SETTLED_SECONDS. One that has lost its leader later belongs to a cluster without
its majority; it comes back with that, and made anew it would have fewer replicas.

Leaves to others: how messages go out (``shared.bus_sending``), what envelopes say and which are sent again.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import aio_pika
from aio_pika.abc import (
    AbstractChannel,
    AbstractConnection,
    AbstractExchange,
    AbstractIncomingMessage,
    AbstractQueue,
)
from aio_pika.connection import make_url
from aio_pika.exceptions import CONNECTION_EXCEPTIONS, PublishError
from pamqp.common import FieldTable

from shared.bus_names import (
    DEAD_LETTERS,
    ENVELOPES,
    dead_queue_name,
    live_queue_name,
    live_routing_key,
    queue_name,
    routing_key,
)
from shared.bus_sending import Channels, Sender, Unconfirmed
from shared.errors import BusUnavailable
from shared.logs import get_logger
from shared.secret import Secret

PREFETCH = 32
DELIVERY_LIMIT = 5
DEAD_LETTERS_KEPT = 10_000
DEAD_LETTERS_KEPT_MS = 7 * 86_400_000
LIVE_KEPT = 1_000
LIVE_KEPT_BYTES = 32 * 1024 * 1024
CONNECT_SECONDS = 5.0
SET_UP_SECONDS = 10.0
# A quorum queue has a leader again half a second after its broker is back; this is ample for a loaded one.
CONSUME_SECONDS = 5.0
REMAKE_AFTER_TRIES = 2
REMAKE_SECONDS = 15.0
# Many times what RabbitMQ takes to write down that a queue exists.
SETTLED_SECONDS = 5.0
RETRY_FIRST_SECONDS = 0.2
RETRY_LAST_SECONDS = 5.0
# How often the two ends of a connection tell each other that they are there (AMQP heartbeat).
_AMQP_HEARTBEAT_SECONDS = 10
_FAILURES = (*CONNECTION_EXCEPTIONS, TimeoutError)

_log = get_logger("bus")


class QueueWithoutLeader(ConnectionError):
    """The KP's queue is there by its name, and the broker does not let anybody consume from it."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """A message that waits for an answer: ``ack`` or ``reject``. Both do nothing once the connection is lost."""

    body: bytes
    redelivered: bool
    _message: AbstractIncomingMessage
    _session: _Session

    @property
    def lost(self) -> bool:
        """Whether the broker will deliver it anew, because its connection is gone."""
        return self._session.lost.is_set()

    async def ack(self) -> None:
        """It is handled."""
        with contextlib.suppress(*_FAILURES):
            await self._message.ack()

    async def reject(self) -> None:
        """It is refused for good: the broker dead-letters it."""
        with contextlib.suppress(*_FAILURES):
            await self._message.reject(requeue=False)

    async def requeue(self) -> None:
        """It could not be handled now. The broker counts these and dead-letters it after DELIVERY_LIMIT."""
        with contextlib.suppress(*_FAILURES):
            await self._message.reject(requeue=True)


class _Session:
    """One connection, from its making to its loss."""

    def __init__(self, connection: AbstractConnection) -> None:
        self.connection = connection
        self.lost = asyncio.Event()
        self._closing: set[asyncio.Task[None]] = set()
        connection.close_callbacks.add(self._on_loss)

    async def channel(self) -> AbstractChannel:
        """A channel whose end is the session's end: nothing is repaired piecemeal."""
        channel = await self.connection.channel(publisher_confirms=True, on_return_raises=True)
        channel.close_callbacks.add(self._on_loss)
        underlay = await channel.get_underlay_channel()
        # The broker takes a consumer away when its queue is deleted or moves.
        underlay.on_consumer_cancel_callbacks.add(self._on_loss)
        return channel

    def abandon(self, channel: AbstractChannel) -> None:
        """Closes a channel whenever the broker answers on it again; the session goes on."""
        channel.close_callbacks.discard(self._on_loss)
        task = asyncio.create_task(_close_quietly(channel), name="abandoned channel")
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        self.lost.set()
        for task in self._closing:
            task.cancel()
        with contextlib.suppress(*_FAILURES):
            async with asyncio.timeout(CONNECT_SECONDS):
                await self.connection.close()

    async def _on_loss(self, *_: object) -> None:
        self.lost.set()


class Bus:
    """Connects on entering ``connected``; ``publish`` and ``next_deliveries`` work whenever ``up`` is set."""

    def __init__(self, url: Secret, local_id: str, name: str) -> None:
        self._url = url
        self._local_id = local_id
        self._name = name
        self._sender: Sender | None = None
        self._consumers: list[tuple[AbstractQueue, str]] = []
        self._deliveries: asyncio.Queue[Delivery] = asyncio.Queue()
        self._lost_reason: str | None = None
        self._consuming = True
        self._settled = False
        self._leaderless_tries = 0
        self.up = asyncio.Event()

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[None]:
        """Keeps a connection for as long as the block runs; returns at once, whether or not the broker is there."""
        _hush_libraries()
        async with asyncio.TaskGroup() as tasks:
            # A fault in the keeper itself must end the block, not leave it without a broker for ever.
            keeper = tasks.create_task(self._keep(), name="bus")
            try:
                yield
            finally:
                keeper.cancel()

    async def publish(self, target_id: str, body: bytes, *, lifetime_ms: int | None) -> bool:
        """Sends to a KP's queue and waits until the broker has it; False where the KP has no such queue.

        With ``lifetime_ms`` it is kept on the broker's disk for so long, for a KP that is down; with None it
        reaches the KP only if that listens now. Raises BusUnavailable, or of that kind Unconfirmed where the broker
        is silent about this KP alone: it may or may not have been sent.
        """
        sender = self._sender
        if sender is None:
            raise BusUnavailable("the broker is away")
        try:
            await sender.publish(target_id, body, lifetime_ms=lifetime_ms)
        except Unconfirmed:
            raise
        except PublishError:
            return False
        except _FAILURES as error:
            raise BusUnavailable(f"the broker did not confirm a message: {type(error).__name__}") from error
        except asyncio.CancelledError as error:
            # The library ends whoever waits on a lost connection by cancelling; that is no order to this task.
            if _cancelled_from_outside():
                raise
            raise BusUnavailable("the connection to the broker was lost") from error
        return True

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
            found = [await asyncio.wait_for(self._deliveries.get(), wait_seconds)]
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
            with contextlib.suppress(*_FAILURES):
                await queue.cancel(tag, timeout=CONNECT_SECONDS)

    async def _keep(self) -> None:
        delay_seconds = RETRY_FIRST_SECONDS
        while True:
            try:
                await self._one_session()
                delay_seconds = RETRY_FIRST_SECONDS
                self._tell_lost("the connection was lost")
            except _FAILURES as error:
                self._tell_lost(f"{type(error).__name__}: {error}")
            except asyncio.CancelledError:
                if _cancelled_from_outside():
                    raise
                self._tell_lost("the connection was lost while it was made")
            await asyncio.sleep(delay_seconds * random.uniform(0.8, 1.2))  # noqa: S311 -- spreads load, no secret
            delay_seconds = min(delay_seconds * 2, RETRY_LAST_SECONDS)

    async def _one_session(self) -> None:
        session = await self._connect()
        try:
            await self._set_up_in_time(session)
            self._tell_up()
            up_since = time.monotonic()
            await session.lost.wait()
            self._settled = self._settled or time.monotonic() - up_since >= SETTLED_SECONDS
        finally:
            self.up.clear()
            self._sender = None
            self._consumers = []
            await session.close()

    async def _set_up_in_time(self, session: _Session) -> None:
        try:
            async with asyncio.timeout(SET_UP_SECONDS):
                await self._set_up(session)
        except QueueWithoutLeader:
            await self._repair(session)
            raise
        except TimeoutError as error:
            raise ConnectionError("the broker did not set up this key provider's queues in time") from error
        self._leaderless_tries = 0

    async def _repair(self, session: _Session) -> None:
        self._leaderless_tries += 1
        if self._leaderless_tries < REMAKE_AFTER_TRIES:
            return
        if self._settled:
            if self._leaderless_tries == REMAKE_AFTER_TRIES:
                _log.error(
                    "queue without a leader: has its cluster lost the majority?", queue=queue_name(self._local_id)
                )
            return
        async with asyncio.timeout(REMAKE_SECONDS):
            await self._delete_queues(session)

    async def _delete_queues(self, session: _Session) -> None:
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

    async def _connect(self) -> _Session:
        url = make_url(self._url.reveal(), heartbeat=_AMQP_HEARTBEAT_SECONDS, name=self._name)
        connection = aio_pika.Connection(url)
        try:
            await connection.connect(timeout=CONNECT_SECONDS)
        except BaseException:
            # One that never came about must be closed too, or its destructor complains.
            await connection.close()
            raise
        return _Session(connection)

    async def _set_up(self, session: _Session) -> None:
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
        sender = await Sender.open(Channels(session.channel, session.abandon))
        if session.lost.is_set():
            raise ConnectionError("the connection was lost while it was set up")
        self._sender = sender

    async def _consume(self, session: _Session, queue: AbstractQueue) -> None:
        async with asyncio.timeout(CONSUME_SECONDS):
            tag = await queue.consume(functools.partial(self._take_in, session))
        self._consumers.append((queue, tag))

    async def _take_in(self, session: _Session, message: AbstractIncomingMessage) -> None:
        self._deliveries.put_nowait(Delivery(message.body, bool(message.redelivered), message, session))

    def _tell_up(self) -> None:
        _log.info("broker back" if self._lost_reason else "broker connected")
        self._lost_reason = None
        self.up.set()

    def _tell_lost(self, reason: str) -> None:
        if self._lost_reason is None:
            _log.warning("broker away", reason=reason)
        elif reason != self._lost_reason:
            _log.debug("broker still away", reason=reason)
        self._lost_reason = reason


def _hush_libraries() -> None:
    """The loss of a broker is told here in one line; the libraries tell it in dozens, with stack traces."""
    for name in ("aiormq", "aio_pika"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


async def _close_quietly(channel: AbstractChannel) -> None:
    with contextlib.suppress(*_FAILURES):
        await channel.close()


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


def _cancelled_from_outside() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
