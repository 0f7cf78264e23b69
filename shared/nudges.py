"""Nudges between the processes of one KP: hints that something changed in the store, over a transient exchange.

A nudge carries no truth. Whoever gets one looks into the store before believing it, and whoever waits for one
looks there once a second anyway: nudges may be lost, repeated, or forged by whoever can publish, and everything
works the same, only later. So they are neither persistent nor confirmed nor federated, and what cannot be sent
at once is dropped.

``ProcessBus`` is an api process's whole door to the broker; the syncer uses ``Nudges`` inside ``skipbus.shared.bus``.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from enum import StrEnum

import aio_pika
from aio_pika.abc import AbstractExchange, AbstractIncomingMessage

from skipbus.shared.broker import FAILURES, Broker, Session, cancelled_from_outside, message_of, publish_confirmed
from skipbus.shared.bus_names import (
    ENVELOPES,
    NUDGES,
    encode_id,
    live_routing_key,
    nudge_queue_name,
    nudge_routing_key,
    routing_key,
)
from skipbus.shared.errors import BusUnavailable
from skipbus.shared.logs import get_logger
from skipbus.shared.protocol import encoding
from skipbus.shared.protocol.envelopes import MAX_AGE_MS
from skipbus.shared.secret import Secret

MAX_ITEMS = 1_000
MAX_ITEM_BYTES = 64
# What is waiting to be sent at most; a hint that comes later than this would be no hint any more.
MAX_PENDING = 20_000
MAX_NUDGE_BYTES = 128 * 1024
# What stands before each item, five bytes at most, comes on top.
_MAX_CHUNK_BYTES = MAX_NUDGE_BYTES // 2
QUEUE_KEPT = 1_000
QUEUE_KEPT_MS = 10_000

_log = get_logger("nudges")


class NudgeKind(StrEnum):
    """What changed, and what the items of such a nudge are."""

    OUTBOX = "outbox"
    """There are new outbox rows. No items."""
    STORED = "stored"
    """Tokens of outbox rows that the peer has acknowledged."""
    REFUSED = "refused"
    """Tokens of outbox rows whose envelope the peer has refused."""
    ARRIVED = "arrived"
    """keyIds of records that a peer has placed here."""
    STOCK = "stock"
    """Stock was used, placed or dropped. No items."""


OnNudge = Callable[[NudgeKind, Sequence[bytes]], None]
FOR_SYNCER = frozenset({NudgeKind.OUTBOX})
FOR_API = frozenset(NudgeKind) - FOR_SYNCER


class Nudges:
    """Sends and receives nudges over whatever connection there is; of one event loop."""

    def __init__(self, local_id: str, on_nudge: OnNudge, kinds: Collection[NudgeKind]) -> None:
        self._local_id = local_id
        self._on_nudge = on_nudge
        self._kinds = frozenset(kinds)
        self._exchange: AbstractExchange | None = None
        # An ordered set: a token that is told twice is sent once.
        self._pending: dict[NudgeKind, dict[bytes, None]] = {}
        # Of these somebody had no more to say than that: it must not be lost beside what others say.
        self._bare: set[NudgeKind] = set()
        self._wake = asyncio.Event()

    def nudge(self, kind: NudgeKind, items: Sequence[bytes] = ()) -> None:
        """Sends soon, together with others of the kind; lost while the broker is away. Never blocks, never raises."""
        if self._exchange is None:
            return
        waiting = self._pending.setdefault(kind, {})
        if len(waiting) + len(items) <= MAX_PENDING:
            waiting.update(dict.fromkeys(items))
        if not items:
            self._bare.add(kind)
        self._wake.set()

    async def set_up(self, session: Session) -> None:
        """Declares the exchange and this process's own queue, which goes when the connection goes."""
        channel = await session.channel(confirmed=False)
        exchange = await channel.declare_exchange(NUDGES, aio_pika.ExchangeType.TOPIC, durable=False)
        queue = await channel.declare_queue(
            nudge_queue_name(self._local_id, f"{os.getpid()}-{secrets.token_hex(4)}"),
            exclusive=True,
            auto_delete=True,
            arguments={"x-max-length": QUEUE_KEPT, "x-message-ttl": QUEUE_KEPT_MS},
        )
        for kind in sorted(self._kinds):
            await queue.bind(exchange, nudge_routing_key(self._local_id, kind.value))
        await queue.consume(self._take_in, no_ack=True)
        self._exchange = exchange

    def forget(self) -> None:
        """The connection is lost, and with it what was to be sent."""
        self._exchange = None
        self._pending.clear()
        self._bare.clear()

    async def run(self) -> None:
        """Sends what is pending, until it is cancelled."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            pending, self._pending = self._pending, {}
            bare, self._bare = self._bare, set()
            for kind, items in pending.items():
                if items:
                    for chunk in _chunks(items):
                        await self._send(kind, chunk)
                if kind in bare:
                    await self._send(kind, [])

    async def _send(self, kind: NudgeKind, items: list[bytes]) -> None:
        exchange = self._exchange
        if exchange is None:
            return
        try:
            key = nudge_routing_key(self._local_id, kind.value)
            await exchange.publish(message_of(encoding.pack(items), None), key, mandatory=False)
        except FAILURES as error:
            _log.debug("nudge lost", kind=kind.value, reason=type(error).__name__)
        except asyncio.CancelledError:
            if cancelled_from_outside():
                raise

    async def _take_in(self, message: AbstractIncomingMessage) -> None:
        try:
            kind, items = read_nudge(self._local_id, message.routing_key or "", message.body)
        except ValueError:
            _log.debug("malformed nudge")
            return
        self._on_nudge(kind, items)


def read_nudge(local_id: str, key: str, body: bytes) -> tuple[NudgeKind, list[bytes]]:
    """The nudge in a message; ValueError where it is none. Anybody with an account may have sent it."""
    prefix = f"{encode_id(local_id)}."
    if len(body) > MAX_NUDGE_BYTES or not key.startswith(prefix):
        raise ValueError("nudge")
    kind = NudgeKind(key.removeprefix(prefix))
    items = encoding.unpack(body, max_items=MAX_ITEMS)
    if not isinstance(items, list) or not all(isinstance(i, bytes) and 0 < len(i) <= MAX_ITEM_BYTES for i in items):
        raise ValueError("nudge")
    return kind, items


class ProcessBus:
    """An api process's door to the broker: nudges, and envelopes that came by HTTPS for this KP's own queue."""

    def __init__(
        self,
        url: Secret,
        local_id: str,
        name: str,
        on_nudge: OnNudge,
        kinds: Collection[NudgeKind] = FOR_API,
    ) -> None:
        """``on_nudge`` is called on the event loop, for nudges of ``kinds``, and must not block or raise."""
        self._local_id = local_id
        self._nudges = Nudges(local_id, on_nudge, kinds)
        self._exchange: AbstractExchange | None = None
        self._broker = Broker(url, name, self._set_up, self._forget)
        self.up = self._broker.up

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[None]:
        """Keeps a connection for as long as the block runs; returns at once, whether or not the broker is there."""
        async with self._broker.connected(), pumping(self._nudges):
            yield

    def nudge(self, kind: NudgeKind, items: Sequence[bytes] = ()) -> None:
        """Tells the other processes of this KP. On the event loop only. Never blocks, never raises."""
        self._nudges.nudge(kind, items)

    async def publish_envelope(self, body: bytes, *, live: bool = False) -> None:
        """Puts a peer's envelope into this KP's own queue and returns once the broker has it on disk.

        With ``live`` (heartbeats and capabilities) it goes to whichever syncer listens now, and is lost where none
        does. Raises BusUnavailable: it may or may not have been taken.
        """
        key = live_routing_key(self._local_id) if live else routing_key(self._local_id)
        message = message_of(body, None if live else MAX_AGE_MS)
        taken = await publish_confirmed(self._exchange, message, key)
        if not taken and not live:
            raise BusUnavailable("the broker has no queue for this key provider: its syncer has never run")

    async def _set_up(self, session: Session) -> None:
        sending = await session.channel()
        exchange = await sending.declare_exchange(ENVELOPES, aio_pika.ExchangeType.TOPIC, durable=True)
        await self._nudges.set_up(session)
        self._exchange = exchange

    def _forget(self) -> None:
        self._exchange = None
        self._nudges.forget()


@asynccontextmanager
async def pumping(nudges: Nudges) -> AsyncIterator[None]:
    """Sends pending nudges for as long as the block runs."""
    async with asyncio.TaskGroup() as tasks:
        pump = tasks.create_task(nudges.run(), name="nudges")
        try:
            yield
        finally:
            pump.cancel()


def _chunks(items: Iterable[bytes]) -> Iterator[list[bytes]]:
    """As many at a time as one nudge takes."""
    chunk, octets = list[bytes](), 0
    for item in items:
        if chunk and (len(chunk) == MAX_ITEMS or octets + len(item) > _MAX_CHUNK_BYTES):
            yield chunk
            chunk, octets = [], 0
        chunk.append(item)
        octets += len(item)
    yield chunk
