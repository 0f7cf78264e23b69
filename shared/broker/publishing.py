"""Publishes envelopes to key providers' queues, each one mandatory and confirmed by the broker within a deadline.

A quorum queue without a leader confirms nothing, and RabbitMQ then makes the whole channel wait, about a minute for
each message. So every key provider that is sent kept messages has a channel of its own. One whose queue does not
confirm is suspended for a while and then tried again over a new channel; the others notice nothing. What is not kept
goes to classic queues, which always answer, over one channel for all.
"""

from __future__ import annotations

import asyncio
import time

import aio_pika
from aio_pika.abc import AbstractChannel, AbstractExchange
from aio_pika.exceptions import PublishError

from skipbus.shared.broker.connection import FAILURES, Session, lost_if_cancelled
from skipbus.shared.broker.names import ENVELOPES, live_routing_key, queue_name, routing_key
from skipbus.shared.errors import BusUnavailable
from skipbus.shared.logging import get_logger

CONFIRM_SECONDS = 10.0
SUSPENDED_SECONDS = 30.0
_CHECK_ALARMS = "run 'rabbitmq-diagnostics alarms' at the broker: its disk or memory may be short"

_log = get_logger("bus")


class Unconfirmed(BusUnavailable):
    """The broker answers, but not for the queue of this one key provider. The message may have been taken."""


class Publisher:
    """A part of a connection. Not thread-safe: use it on one event loop."""

    def __init__(self) -> None:
        self._routes: _Routes | None = None
        self.silent = False
        """Whether the broker leaves messages to classic queues unconfirmed: it hangs, or has no room."""

    async def set_up(self, session: Session) -> None:
        """Declares the exchange and opens the channel for what is not kept."""
        channel = await session.channel()
        exchange = await declare_envelopes(channel)
        self._routes = _Routes(session, exchange)
        self.silent = False

    def forget(self) -> None:
        """The connection is lost; so is what was known of single queues."""
        self._routes = None

    @property
    def ready(self) -> bool:
        """Whether the broker is connected."""
        return self._routes is not None

    def is_suspended(self, target_id: str) -> bool:
        """Whether kept messages to this key provider are refused for now, because its queue confirms nothing."""
        return self._routes is not None and self._routes.is_suspended(target_id)

    async def publish(self, target_id: str, body: bytes, *, lifetime_ms: int | None) -> bool:
        """Sends to a key provider's queue and waits until the broker has it; False where there is no such queue.

        With ``lifetime_ms`` the broker keeps it on disk for so long, for a key provider that is down; with None it
        arrives only where a syncer listens now. Raises BusUnavailable, or of that kind Unconfirmed where the broker is
        silent about this key provider alone: then, as after any BusUnavailable, it may or may not have been sent.
        """
        routes = self._routes
        if routes is None:
            raise BusUnavailable("the broker is away")
        try:
            with lost_if_cancelled():
                if lifetime_ms is None:
                    await self._publish_live(routes, target_id, body)
                else:
                    await routes.publish_kept(target_id, body, lifetime_ms)
        except PublishError:
            return False
        except FAILURES as error:
            raise BusUnavailable(f"the broker did not confirm a message: {type(error).__name__}") from error
        return True

    async def _publish_live(self, routes: _Routes, target_id: str, body: bytes) -> None:
        try:
            await routes.publish_live(target_id, body)
        except TimeoutError:
            self._note_silent(True)
            raise
        except PublishError:
            # Nobody listens there; the broker has answered.
            self._note_silent(False)
            raise
        self._note_silent(False)

    def _note_silent(self, silent: bool) -> None:
        if silent and not self.silent:
            _log.warning("the broker does not confirm messages", seconds=CONFIRM_SECONDS, advice=_CHECK_ALARMS)
        elif self.silent and not silent:
            _log.info("the broker confirms messages again")
        self.silent = silent


class _Routes:
    """The channels of one connection: one for what is not kept, and one for each key provider."""

    def __init__(self, session: Session, live: AbstractExchange) -> None:
        self._session = session
        self._live = live
        self._kept: dict[str, tuple[AbstractChannel, AbstractExchange]] = {}
        self._suspended_until: dict[str, float] = {}
        self._opening = asyncio.Lock()

    def is_suspended(self, target_id: str) -> bool:
        return time.monotonic() < self._suspended_until.get(target_id, 0.0)

    async def publish_live(self, target_id: str, body: bytes) -> None:
        message = aio_pika.Message(body, delivery_mode=aio_pika.DeliveryMode.NOT_PERSISTENT)
        async with asyncio.timeout(CONFIRM_SECONDS):
            await self._live.publish(message, live_routing_key(target_id), mandatory=True)

    async def publish_kept(self, target_id: str, body: bytes, lifetime_ms: int) -> None:
        if self.is_suspended(target_id):
            raise Unconfirmed("the broker is silent about this peer; it is tried again later")
        message = aio_pika.Message(body, delivery_mode=aio_pika.DeliveryMode.PERSISTENT, expiration=lifetime_ms / 1000)
        try:
            async with asyncio.timeout(CONFIRM_SECONDS):
                exchange = await self._exchange_for(target_id)
                await exchange.publish(message, routing_key(target_id), mandatory=True)
        except TimeoutError as error:
            self._suspend(target_id)
            raise Unconfirmed(f"the broker did not confirm a message within {CONFIRM_SECONDS:g} s") from error

    async def _exchange_for(self, target_id: str) -> AbstractExchange:
        async with self._opening:
            if target_id not in self._kept:
                channel = await self._session.channel()
                self._kept[target_id] = (channel, await channel.get_exchange(ENVELOPES, ensure=False))
            return self._kept[target_id][1]

    def _suspend(self, target_id: str) -> None:
        if self.is_suspended(target_id):
            return  # another message of the same moment
        self._suspended_until[target_id] = time.monotonic() + SUSPENDED_SECONDS
        _log.warning(
            "the broker does not confirm envelopes for this peer",
            peer=target_id,
            next_attempt_seconds=SUSPENDED_SECONDS,
            advice=f"check the leader of the queue {queue_name(target_id)}",
        )
        if target_id in self._kept:
            channel, _ = self._kept.pop(target_id)
            self._session.abandon(channel)


async def declare_envelopes(channel: AbstractChannel) -> AbstractExchange:
    """The exchange that carries all envelopes."""
    return await channel.declare_exchange(ENVELOPES, aio_pika.ExchangeType.TOPIC, durable=True)
