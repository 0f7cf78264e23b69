"""The way out to the broker over one connection; what is in doubt here is forgotten with the connection.

A quorum queue without a leader (its broker was killed as it was made; a cluster has lost its majority) confirms
nothing, and RabbitMQ makes the channel that published to it wait: about a minute for each message, whoever the
messages behind it are for. So what is kept, in quorum queues, and what is live, in classic ones, have a channel each,
and the first one is replaced when it falls silent. Every KP that then waited for a confirmation is in doubt. Its next
message goes alone, over a channel of its own: once that is confirmed all is well, otherwise the KP is left out for a
while, so that waiting for its queue holds up nobody else.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import aio_pika
from aio_pika.abc import AbstractChannel, AbstractExchange

from skipbus.shared.broker import CONFIRM_SECONDS, message_of
from skipbus.shared.bus_names import ENVELOPES, live_routing_key, routing_key
from skipbus.shared.errors import BusUnavailable
from skipbus.shared.logs import get_logger

# One message alone; the relay waits for it meanwhile.
PROBE_SECONDS = 3.0
LEFT_OUT_SECONDS = 30.0

_log = get_logger("bus")


class Unconfirmed(BusUnavailable):
    """The broker is there but silent about what is for one KP. It may have been sent."""


@dataclass(frozen=True)
class Channels:
    """How a session opens channels and lets go of one that hangs without ending with it."""

    open: Callable[[], Awaitable[AbstractChannel]]
    abandon: Callable[[AbstractChannel], None]


@dataclass
class _Kept:
    """A channel for what is kept, and who waits for a confirmation on it."""

    channel: AbstractChannel
    exchange: AbstractExchange
    waiting: Counter[str] = field(default_factory=Counter)


@dataclass
class _Doubt:
    """A KP whose queue may be without a leader; ``until`` is on the monotonic clock."""

    until: float = 0.0
    probing: bool = False


class Sender:
    """Publishes over one connection, mandatory and confirmed."""

    def __init__(self, channels: Channels, live: AbstractExchange, kept: _Kept) -> None:
        self._channels = channels
        self._live = live
        self._kept = kept
        self._doubts: dict[str, _Doubt] = {}
        # Classic queues always answer: a broker that does not confirm what is live hangs, or takes nothing any more.
        self.silent = False

    @classmethod
    async def open(cls, channels: Channels) -> Sender:
        """With both channels open; the exchange is declared already."""
        live = await (await channels.open()).get_exchange(ENVELOPES, ensure=False)
        return cls(channels, live, await _open_kept(channels))

    def is_left_out(self, target_id: str) -> bool:
        """Whether what is kept for this KP is refused for the time being."""
        doubt = self._doubts.get(target_id)
        return doubt is not None and (doubt.probing or time.monotonic() < doubt.until)

    async def publish(self, target_id: str, body: bytes, *, lifetime_ms: int | None) -> None:
        """As ``Bus.publish``. Raises Unconfirmed, and what the library raises for a lost connection."""
        if lifetime_ms is None:
            await self._publish_live(target_id, message_of(body, None))
        elif target_id in self._doubts:
            await self._probe(target_id, message_of(body, lifetime_ms))
        else:
            await self._publish_kept(target_id, message_of(body, lifetime_ms))

    async def _publish_live(self, target_id: str, message: aio_pika.Message) -> None:
        try:
            async with asyncio.timeout(CONFIRM_SECONDS):
                await self._live.publish(message, live_routing_key(target_id), mandatory=True)
        except TimeoutError:
            self._note_silence(True)
            raise
        except aio_pika.exceptions.PublishError:
            # Nobody listens there; the broker has answered.
            self._note_silence(False)
            raise
        self._note_silence(False)

    def _note_silence(self, silent: bool) -> None:
        if silent and not self.silent:
            _log.warning("the broker confirms nothing: does it hang, or has it no room?", seconds=CONFIRM_SECONDS)
        elif self.silent and not silent:
            _log.info("the broker confirms again")
        self.silent = silent

    async def _publish_kept(self, target_id: str, message: aio_pika.Message) -> None:
        kept = self._kept
        kept.waiting[target_id] += 1
        try:
            async with asyncio.timeout(CONFIRM_SECONDS):
                await kept.exchange.publish(message, routing_key(target_id), mandatory=True)
        except TimeoutError as error:
            self._doubt(target_id)
            await self._replace(kept)
            raise Unconfirmed(f"the broker did not confirm a message within {CONFIRM_SECONDS:g} s") from error
        finally:
            kept.waiting[target_id] -= 1

    async def _replace(self, silent: _Kept) -> None:
        """Puts a new channel in the place of this one, unless somebody has done so."""
        if self._kept is not silent:
            return
        for target_id, count in silent.waiting.items():
            if count:
                self._doubt(target_id)
        kept = await _open_kept(self._channels)
        if self._kept is silent:
            self._kept, kept = kept, silent
        self._channels.abandon(kept.channel)

    def _doubt(self, target_id: str) -> None:
        self._doubts.setdefault(target_id, _Doubt())

    async def _probe(self, target_id: str, message: aio_pika.Message) -> None:
        if self.is_left_out(target_id):
            raise Unconfirmed("the broker is silent about this peer; it is tried again later")
        doubt = self._doubts[target_id]
        doubt.probing = True
        try:
            await self._publish_alone(target_id, message)
        except TimeoutError as error:
            doubt.until = time.monotonic() + LEFT_OUT_SECONDS
            _log.warning("the broker does not confirm what is for this peer", peer=target_id)
            raise Unconfirmed(f"the broker did not confirm a message within {PROBE_SECONDS:g} s") from error
        finally:
            doubt.probing = False

    async def _publish_alone(self, target_id: str, message: aio_pika.Message) -> None:
        channel = await self._channels.open()
        try:
            exchange = await channel.get_exchange(ENVELOPES, ensure=False)
            async with asyncio.timeout(PROBE_SECONDS):
                try:
                    await exchange.publish(message, routing_key(target_id), mandatory=True)
                except aio_pika.exceptions.PublishError:
                    # There is no such queue; the broker has answered.
                    self._doubts.pop(target_id, None)
                    raise
            self._doubts.pop(target_id, None)
        finally:
            self._channels.abandon(channel)


async def _open_kept(channels: Channels) -> _Kept:
    channel = await channels.open()
    return _Kept(channel, await channel.get_exchange(ENVELOPES, ensure=False))
