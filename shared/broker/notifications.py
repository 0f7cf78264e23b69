"""Notifications between the processes of one KP: something changed in the store. Over a transient exchange.

A notification proves nothing. A process that gets one reads the store before it acts, and a process that waits for one
reads the store once a second anyway: notifications may be lost, repeated, or forged by anybody who can publish, and
everything works the same, only later. So they are neither persistent nor confirmed nor federated, and what cannot be
sent now is dropped. A process notifies after its commit, never before.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
from collections.abc import Callable, Collection, Iterator, Sequence
from enum import StrEnum
from typing import Annotated

import aio_pika
from aio_pika.abc import AbstractChannel, AbstractExchange, AbstractIncomingMessage
from msgspec import Meta

from skipbus.shared.broker.connection import FAILURES, Session, lost_if_cancelled
from skipbus.shared.broker.names import (
    NOTIFICATIONS,
    encode_id,
    notification_queue_name,
    notification_routing_key,
)
from skipbus.shared.logging import get_logger
from skipbus.shared.protocol import encoding

MAX_ITEMS = 1_000
MAX_ITEM_BYTES = 64
# What waits to be sent, of one kind; later ones are found by polling.
MAX_PENDING = 20_000
MAX_NOTIFICATION_BYTES = 128 * 1024
QUEUE_KEPT = 1_000
_ITEMS = Annotated[list[Annotated[bytes, Meta(min_length=1, max_length=MAX_ITEM_BYTES)]], Meta(max_length=MAX_ITEMS)]
QUEUE_KEPT_MS = 10_000

_log = get_logger("notifications")


class NotificationKind(StrEnum):
    """What changed, and what the items of such a notification are."""

    OUTBOX = "outbox"
    """There are new outbox rows. No items."""
    STORED = "stored"
    """Tokens of outbox rows that the peer has acknowledged."""
    REJECTED = "rejected"
    """Tokens of outbox rows whose envelope the peer has rejected."""
    ARRIVED = "arrived"
    """keyIds of records that a peer has placed here."""
    STOCK = "stock"
    """Stock was used, placed or dropped. No items."""


OnNotification = Callable[[NotificationKind, Sequence[bytes]], None]
FOR_SYNCER = frozenset({NotificationKind.OUTBOX})
FOR_API = frozenset(NotificationKind) - FOR_SYNCER


class Notifier:
    """A part of a connection: sends and receives notifications. Not thread-safe: use it on one event loop."""

    def __init__(self, local_id: str, on_notification: OnNotification, kinds: Collection[NotificationKind]) -> None:
        """``on_notification`` is called on the event loop for each of ``kinds``, and must not block or raise."""
        self._local_id = local_id
        self._on_notification = on_notification
        self._kinds = frozenset(kinds)
        self._connected = False
        # Items by kind, in an ordered set: one that comes twice before it is sent is sent once.
        self._pending: dict[NotificationKind, dict[bytes, None]] = {}
        self._wake = asyncio.Event()

    def notify(self, kind: NotificationKind, items: Sequence[bytes] = ()) -> None:
        """Notifies this KP's other processes soon. Never blocks, never raises; lost while the broker is away."""
        if not self._connected:
            return
        waiting = self._pending.setdefault(kind, {})
        if len(waiting) + len(items) <= MAX_PENDING:
            waiting.update(dict.fromkeys(items))
        self._wake.set()

    async def set_up(self, session: Session) -> None:
        """Declares the exchange and this process's own queue, which goes when the connection goes."""
        channel = await session.channel(confirmed=False)
        exchange = await channel.declare_exchange(NOTIFICATIONS, aio_pika.ExchangeType.TOPIC, durable=False)
        await self._listen(channel, exchange)
        session.start(self._send_pending(exchange), "notifications")
        self._connected = True

    def forget(self) -> None:
        """The connection is lost, and with it what was to be sent."""
        self._connected = False
        self._pending.clear()

    async def _listen(self, channel: AbstractChannel, exchange: AbstractExchange) -> None:
        queue = await channel.declare_queue(
            notification_queue_name(self._local_id, f"{os.getpid()}-{secrets.token_hex(4)}"),
            exclusive=True,
            auto_delete=True,
            arguments={"x-max-length": QUEUE_KEPT, "x-message-ttl": QUEUE_KEPT_MS},
        )
        for kind in sorted(self._kinds):
            await queue.bind(exchange, notification_routing_key(self._local_id, kind.value))
        await queue.consume(self._take_in, no_ack=True)

    async def _send_pending(self, exchange: AbstractExchange) -> None:
        """Sends what is pending, all of one moment together, for as long as the session lasts."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            pending, self._pending = self._pending, {}
            for kind, items in pending.items():
                for chunk in _chunks(list(items)):
                    await self._send(exchange, kind, chunk)

    async def _send(self, exchange: AbstractExchange, kind: NotificationKind, items: Sequence[bytes]) -> None:
        message = aio_pika.Message(encoding.pack(items), delivery_mode=aio_pika.DeliveryMode.NOT_PERSISTENT)
        with contextlib.suppress(*FAILURES), lost_if_cancelled():
            await exchange.publish(message, notification_routing_key(self._local_id, kind.value), mandatory=False)

    async def _take_in(self, message: AbstractIncomingMessage) -> None:
        try:
            kind, items = read_notification(self._local_id, message.routing_key or "", message.body)
        except ValueError:
            _log.debug("malformed notification")
            return
        self._on_notification(kind, items)


def read_notification(local_id: str, key: str, body: bytes) -> tuple[NotificationKind, list[bytes]]:
    """The notification in a message; ValueError where it is none. Anybody with an account may have sent it."""
    prefix = f"{encode_id(local_id)}."
    if len(body) > MAX_NOTIFICATION_BYTES or not key.startswith(prefix):
        raise ValueError("notification")
    kind = NotificationKind(key.removeprefix(prefix))
    items: list[bytes] = encoding.unpack(body, _ITEMS)
    return kind, items


def _chunks(items: Sequence[bytes]) -> Iterator[Sequence[bytes]]:
    """As many at a time as one notification takes; one empty chunk where there are no items."""
    for start in range(0, max(1, len(items)), MAX_ITEMS):
        yield items[start : start + MAX_ITEMS]
