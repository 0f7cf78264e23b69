"""A process's connection to the broker: made again whenever it is lost, with everything that is declared on it.

What a process needs on the broker is declared anew on every new connection, by a function that its owner hands in,
so a broker that comes back empty is put in order too. A lost broker is logged once when it goes and once when it is
back. Leaves to others: what is declared, published and consumed (``skipbus.shared.bus``, ``skipbus.shared.nudges``).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import aio_pika
from aio_pika.abc import AbstractChannel, AbstractConnection, AbstractExchange
from aio_pika.connection import make_url
from aio_pika.exceptions import CONNECTION_EXCEPTIONS, PublishError

from skipbus.shared.bus_bodies import bound_bodies
from skipbus.shared.errors import BusUnavailable
from skipbus.shared.logs import get_logger
from skipbus.shared.secret import Secret

CONNECT_SECONDS = 5.0
CONFIRM_SECONDS = 10.0
SET_UP_SECONDS = 10.0
# Many times what RabbitMQ takes to write down that a queue exists.
SETTLED_SECONDS = 5.0
RETRY_FIRST_SECONDS = 0.2
RETRY_LAST_SECONDS = 5.0
# How often the two ends of a connection tell each other that they are there (AMQP heartbeat).
_AMQP_HEARTBEAT_SECONDS = 10
FAILURES = (*CONNECTION_EXCEPTIONS, TimeoutError)

_log = get_logger("bus")


class Session:
    """One connection, from its making to its loss."""

    def __init__(self, connection: AbstractConnection) -> None:
        self.connection = connection
        self.lost = asyncio.Event()
        self._closing: set[asyncio.Task[None]] = set()
        connection.close_callbacks.add(self._on_loss)

    async def channel(self, *, confirmed: bool = True) -> AbstractChannel:
        """A channel whose end is the session's end: nothing is repaired piecemeal."""
        channel = await self.connection.channel(publisher_confirms=confirmed, on_return_raises=confirmed)
        channel.close_callbacks.add(self._on_loss)
        underlay = await channel.get_underlay_channel()
        bound_bodies(underlay)
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
        """Gives the connection up, whatever state it is in."""
        self.lost.set()
        for task in self._closing:
            task.cancel()
        with contextlib.suppress(*FAILURES):
            async with asyncio.timeout(CONNECT_SECONDS):
                await self.connection.close()

    async def _on_loss(self, *_: object) -> None:
        self.lost.set()


class Broker:
    """Connects on entering ``connected`` and stays so; ``up`` is set while everything is declared."""

    def __init__(
        self,
        url: Secret,
        name: str,
        set_up: Callable[[Session], Awaitable[None]],
        forget: Callable[[], None],
        *,
        set_up_seconds: float = SET_UP_SECONDS,
    ) -> None:
        """``set_up`` declares on a new connection, within ``set_up_seconds``; ``forget`` drops what belonged to a
        lost one. ``settled`` says that a connection has lasted long enough for the broker to know its queues for good.
        """
        self._url = url
        self._name = name
        self._set_up = set_up
        self._forget = forget
        self._set_up_seconds = set_up_seconds
        self._lost_reason: str | None = None
        self.settled = False
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

    async def _keep(self) -> None:
        delay_seconds = RETRY_FIRST_SECONDS
        while True:
            try:
                await self._one_session()
                delay_seconds = RETRY_FIRST_SECONDS
                self._tell_lost("the connection was lost")
            except FAILURES as error:
                self._tell_lost(f"{type(error).__name__}: {error}")
            except asyncio.CancelledError:
                if cancelled_from_outside():
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
            self.settled = self.settled or time.monotonic() - up_since >= SETTLED_SECONDS
        finally:
            self.up.clear()
            self._forget()
            await session.close()

    async def _set_up_in_time(self, session: Session) -> None:
        try:
            async with asyncio.timeout(self._set_up_seconds):
                await self._set_up(session)
        except TimeoutError as error:
            raise ConnectionError("the broker did not set up this key provider's queues in time") from error
        if session.lost.is_set():
            raise ConnectionError("the connection was lost while it was set up")

    async def _connect(self) -> Session:
        url = make_url(self._url.reveal(), heartbeat=_AMQP_HEARTBEAT_SECONDS, name=self._name)
        connection = aio_pika.Connection(url)
        try:
            await connection.connect(timeout=CONNECT_SECONDS)
        except BaseException:
            # One that never came about must be closed too, or its destructor complains.
            await connection.close()
            raise
        return Session(connection)

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


async def publish_confirmed(exchange: AbstractExchange | None, message: aio_pika.Message, key: str) -> bool:
    """Publishes and waits until the broker has the message; False where no queue takes it.

    Raises BusUnavailable: it may or may not have been sent.
    """
    if exchange is None:
        raise BusUnavailable("the broker is away")

    async def publish() -> None:
        async with asyncio.timeout(CONFIRM_SECONDS):
            await exchange.publish(message, key, mandatory=True)

    return await confirmation(publish())


async def confirmation(publishing: Awaitable[None]) -> bool:
    """True once the broker has confirmed, False where no queue takes the message. Raises BusUnavailable otherwise."""
    try:
        await publishing
    except PublishError:
        return False
    except FAILURES as error:
        raise BusUnavailable(f"the broker did not confirm a message: {type(error).__name__}") from error
    except asyncio.CancelledError as error:
        # The library ends whoever waits on a lost connection by cancelling; that is no order to this task.
        if cancelled_from_outside():
            raise
        raise BusUnavailable("the connection to the broker was lost") from error
    return True


def message_of(body: bytes, lifetime_ms: int | None) -> aio_pika.Message:
    """A message that the broker keeps on its disk for ``lifetime_ms``, or, with None, only in memory."""
    if lifetime_ms is None:
        return aio_pika.Message(body, delivery_mode=aio_pika.DeliveryMode.NOT_PERSISTENT)
    return aio_pika.Message(body, delivery_mode=aio_pika.DeliveryMode.PERSISTENT, expiration=lifetime_ms / 1000)


def cancelled_from_outside() -> bool:
    """Whether somebody asked this task to end, rather than the library the wait on a lost connection."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _hush_libraries() -> None:
    """The loss of a broker is told here in one line; the libraries tell it in dozens, with stack traces."""
    for name in ("aiormq", "aio_pika"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


async def _close_quietly(channel: AbstractChannel) -> None:
    with contextlib.suppress(*FAILURES):
        await channel.close()
