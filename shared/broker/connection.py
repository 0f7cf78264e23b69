"""A process's connection to its broker: made again whenever it is lost, with everything that is declared on it.

Each part of a connection (consumer, publisher, notifier) declares what it needs on every new connection, so a broker
that comes back empty is put in order too. A lost broker is logged once when it goes and once when it is back. AMQP
heartbeats find a connection that breaks without a FIN or RST: after 18 s of silence it counts as lost, also while the
process only waits. Leaves to the parts: what is declared, published and consumed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Protocol

import aio_pika
from aio_pika.abc import AbstractChannel, AbstractConnection
from aio_pika.connection import make_url
from aio_pika.exceptions import CONNECTION_EXCEPTIONS, AMQPError
from pamqp.exceptions import PAMQPException
from tenacity import retry, retry_if_exception_type, wait_exponential_jitter

from skipbus.shared.logging import get_logger
from skipbus.shared.settings import Secret
from skipbus.shared.settings.values import address_text, split_urls

CONNECT_SECONDS = 5.0
SET_UP_SECONDS = 10.0
# The library counts three intervals and three seconds without any frame as the end of a connection.
HEARTBEAT_SECONDS = 5
# What a call of the library may raise when the connection is lost. RuntimeError is one of them, so this says nothing
# of a failure in code of our own.
FAILURES = (*CONNECTION_EXCEPTIONS, TimeoutError)
_LOST = (AMQPError, PAMQPException, OSError)
# For ever: a client of the broker has nothing better to do than to come back. The jitter spreads the load.
# At most a second between two attempts: keys on demand wait for the broker.
_RECONNECT_WAIT = wait_exponential_jitter(multiplier=0.2, max=1.0, jitter=0.2)
_PAUSE_AFTER_LOSS_SECONDS = 0.2
# A lost connection is known as such by then.
_LOSS_NOTED_SECONDS = 1.0

_log = get_logger("bus")


class NeedsOperator(ConnectionError):
    """The broker answers, but something on it may not work before an operator acts; ``advice`` says what to do."""

    def __init__(self, message: str, advice: str) -> None:
        super().__init__(message)
        self.advice = advice


class Session:
    """One connection, from its making to its loss."""

    def __init__(self, connection: AbstractConnection) -> None:
        self.lost = asyncio.Event()
        self._connection = connection
        self._tasks: set[asyncio.Task[None]] = set()
        connection.close_callbacks.add(self._on_loss)

    async def channel(self, *, confirmed: bool = True) -> AbstractChannel:
        """A channel whose end is the session's end: nothing is repaired piecemeal."""
        channel = await self._connection.channel(publisher_confirms=confirmed, on_return_raises=confirmed)
        channel.close_callbacks.add(self._on_loss)
        underlay = await channel.get_underlay_channel()
        # The broker takes a consumer away when its queue is deleted or moves.
        underlay.on_consumer_cancel_callbacks.add(self._on_loss)
        return channel

    def abandon(self, channel: AbstractChannel) -> None:
        """Closes a channel whenever the broker answers on it again; the session goes on."""
        channel.close_callbacks.discard(self._on_loss)
        self.start(_close_quietly(channel), "abandoned channel")

    def start(self, work: Coroutine[None, None, None], name: str) -> None:
        """Runs a task until it ends, or until the session does. One that fails ends the session."""
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._note_done)

    async def wait_lost(self, seconds: float) -> bool:
        """Whether it is lost, or is found to be within ``seconds``."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.lost.wait()
        return self.lost.is_set()

    async def close(self) -> None:
        """Gives the connection up, whatever state it is in."""
        self.lost.set()
        for task in tuple(self._tasks):
            task.cancel()
        with contextlib.suppress(*FAILURES):
            async with asyncio.timeout(CONNECT_SECONDS):
                await self._connection.close()

    def _note_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("broker task failed", task=task.get_name(), exc_info=error)
            self.lost.set()

    async def _on_loss(self, *_: object) -> None:
        self.lost.set()


class Part(Protocol):
    """What uses a connection."""

    async def set_up(self, session: Session) -> None:
        """Declares what it needs on a new connection. May raise NeedsOperator, or any of FAILURES.

        A RuntimeError while the connection lives is a fault, and ends the process.
        """

    def forget(self) -> None:
        """The connection is lost, and everything that belonged to it."""


class BrokerConnection:
    """Connects on entering ``connected`` and stays so; ``up`` is set while every part is set up."""

    def __init__(self, url: Secret, name: str, parts: Sequence[Part], *, required: bool = True) -> None:
        """``url`` may be several with commas, the nodes of a cluster: each failure leads to the next one.

        ``name`` is what the broker's operator sees; ``parts`` are set up in this order.

        Without ``required`` a broker that is away is no warning: nobody has configured one.
        """
        self._url = url
        self._name = name
        self._parts = tuple(parts)
        self._required = required
        self._fault: BaseException | None = None
        self._failures = 0
        self.up = asyncio.Event()

    @property
    def fault(self) -> BaseException | None:
        """Why the last attempt to connect failed; None while the connection is up, and before the first attempt."""
        return self._fault

    @property
    def server(self) -> str:
        """Host and port of the broker in use, or of the one that is tried next."""
        url = make_url(self._next_url())
        return address_text(url.host or "", url.port or 0)

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[None]:
        """Keeps a connection for as long as the block runs. Does not wait for the broker."""
        _silence_libraries()
        async with asyncio.TaskGroup() as tasks:
            # A fault of this task must end the block, not leave it without a broker for ever.
            keeper = tasks.create_task(self._keep(), name="bus")
            try:
                yield
            finally:
                keeper.cancel()

    async def _keep(self) -> None:
        while True:
            session = await self._open()
            try:
                await session.lost.wait()
            finally:
                await self._end(session)
            self._note_lost(ConnectionError("the connection was lost"))
            await asyncio.sleep(_PAUSE_AFTER_LOSS_SECONDS)

    @retry(retry=retry_if_exception_type(_LOST), wait=_RECONNECT_WAIT)
    async def _open(self) -> Session:
        try:
            with lost_if_cancelled():
                session = await self._connect()
                try:
                    await self._set_up(session)
                except BaseException:
                    await self._end(session)
                    raise
        except _LOST as error:
            self._failures += 1
            self._note_lost(error)
            raise
        self._note_up()
        return session

    def _next_url(self) -> str:
        # The file of the URL is read each time, because an operator may change the account's password at any time.
        urls = split_urls(self._url.current().reveal())
        return urls[self._failures % len(urls)]

    async def _connect(self) -> Session:
        url = make_url(self._next_url(), heartbeat=HEARTBEAT_SECONDS, name=self._name)
        connection = aio_pika.Connection(url)
        try:
            await connection.connect(timeout=CONNECT_SECONDS)
        except (RuntimeError, StopAsyncIteration) as error:
            await connection.close()
            raise ConnectionError(f"the broker ended the connection ({type(error).__name__})") from error
        except BaseException:
            # A failed connection must be closed too, or its destructor logs an error.
            await connection.close()
            raise
        return Session(connection)

    async def _set_up(self, session: Session) -> None:
        try:
            async with asyncio.timeout(SET_UP_SECONDS):
                for part in self._parts:
                    await part.set_up(session)
        except RuntimeError as error:
            # The library raises it on a connection that is closed; on any other it is a fault of ours.
            if not await session.wait_lost(_LOSS_NOTED_SECONDS):
                raise
            raise ConnectionError("the connection was lost while it was set up") from error
        if session.lost.is_set():
            raise ConnectionError("the connection was lost while it was set up")

    async def _end(self, session: Session) -> None:
        self.up.clear()
        for part in self._parts:
            part.forget()
        await session.close()

    def _note_up(self) -> None:
        _log.info("broker back" if self._fault else "broker connected")
        self._fault = None
        self.up.set()

    def _note_lost(self, fault: BaseException) -> None:
        known, self._fault = self._fault, fault
        if isinstance(fault, NeedsOperator) and not isinstance(known, NeedsOperator):
            _log.error(str(fault), advice=fault.advice)
        elif known is None:
            log = _log.warning if self._required else _log.info
            log("broker away", reason=_described(fault))
        elif _described(known) != _described(fault):
            _log.debug("broker still away", reason=_described(fault))


@contextmanager
def lost_if_cancelled() -> Iterator[None]:
    """The library ends a wait on a lost connection by cancelling the task that waits: here that is a ConnectionError.

    The cancellation that an owner of the task asked for stays what it is.
    """
    try:
        yield
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise ConnectionError("the connection to the broker was lost") from error


def _described(fault: BaseException) -> str:
    return f"{type(fault).__name__}: {fault}"


def _silence_libraries() -> None:
    """The loss of a broker is logged here in one line; the libraries log dozens, with stack traces."""
    for name in ("aiormq", "aio_pika"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


async def _close_quietly(channel: AbstractChannel) -> None:
    with contextlib.suppress(*FAILURES):
        await channel.close()
