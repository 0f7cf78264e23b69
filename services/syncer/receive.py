"""Receives envelopes: batch → verify → apply → acknowledge.

No envelope is answered before its effect is committed. While the store is away, or refuses whatever it is sent, the
deliveries are held and tried again: giving them back would use up their delivery limit, which is there for envelopes
that cannot be handled. A batch in which something unexpected fails is applied again one by one, so that one envelope
never fails its neighbours.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TypeVar

from tenacity import AsyncRetrying, retry_if_exception_type, wait_exponential

from skipbus.services.syncer import metrics
from skipbus.services.syncer.apply import Applied, Applier, Result, keys_changed
from skipbus.services.syncer.apply_keys import portions
from skipbus.services.syncer.consume import DELIVERY_LIMIT, PREFETCH, Delivery, Incoming
from skipbus.services.syncer.reject import PeerRejections, Rejecter
from skipbus.services.syncer.replies import Replies
from skipbus.services.syncer.send import Sender
from skipbus.services.syncer.verify import Rejected, Verified, Verifier
from skipbus.shared.broker.notifications import Notifier
from skipbus.shared.clock import now_ms
from skipbus.shared.errors import StoreMisconfigured, StoreUnavailable
from skipbus.shared.lifecycle import pause
from skipbus.shared.logging import get_logger
from skipbus.shared.peer_directory import PeerDirectory
from skipbus.shared.protocol.payloads import Acknowledgement, Capabilities, Events, Heartbeat, Rejection
from skipbus.shared.protocol.placed_keys import PlacedKeys

BATCH = 2 * PREFETCH
_POLL_SECONDS = 0.5
_DRAIN_SECONDS = 0.1
_FIRST_WAIT_SECONDS = 0.2
_STORE_WAIT = wait_exponential(multiplier=0.4, max=5.0)
# No envelope is the reason of these.
_HELD = (StoreUnavailable, StoreMisconfigured)
# Verified envelopes that are rejected for what is in the store.
_REJECTED = {
    Result.REPLAYED: "a heartbeat with a number that is not new",
    Result.KEY_EXISTS: "a key under an id that exists here already",
}
# The same envelope with a new date may be accepted.
_TRANSIENT_REASONS = frozenset({"too_old", "from_future"})

_log = get_logger("receive")
T = TypeVar("T")


class _RedeliveryExpected(Exception):
    """The broker will deliver the batch again: its connection is lost, or this process ends."""


class Receiver:
    """Handles what the bus delivers, one batch after another."""

    def __init__(
        self,
        incoming: Incoming,
        verifier: Verifier,
        applier: Applier,
        rejecter: Rejecter,
        follow_up: FollowUp,
        stop: asyncio.Event,
    ) -> None:
        self._incoming = incoming
        self._verifier = verifier
        self._applier = applier
        self._rejecter = rejecter
        self._follow_up = follow_up
        self._stop = stop
        self._refused = False

    async def run(self) -> None:
        """Until ``stop``; then what was delivered already is still handled."""
        try:
            while not self._stop.is_set():
                await self._handle(await self._incoming.next_deliveries(BATCH, _POLL_SECONDS))
                self._rejecter.log_left_out()
            await self._incoming.stop()
            while batch := await self._incoming.next_deliveries(BATCH, _DRAIN_SECONDS):
                await self._handle(batch)
        finally:
            self._follow_up.finish()

    async def _handle(self, batch: Sequence[Delivery]) -> None:
        if not batch:
            return
        try:
            verified = await self._verify(batch)
            for portion in portions(verified, lambda pair: keys_changed(pair[1])):
                await self._apply(portion)
        except _RedeliveryExpected:
            _log.debug("deliveries left to the broker", count=len(batch))

    async def _verify(self, batch: Sequence[Delivery]) -> list[tuple[Delivery, Verified]]:
        """Those that are verified; the others are rejected."""

        def verify(_again: bool) -> list[Verified | Rejected]:
            return [self._verifier.verify(one.body, one.redelivered, one.waited_ms) for one in batch]

        results = list(zip(batch, await self._while_store_away(verify, batch), strict=True))
        for delivery, result in results:
            if isinstance(result, Rejected):
                await self._rejecter.reject(delivery, result)
        return [(delivery, result) for delivery, result in results if isinstance(result, Verified)]

    async def _apply(self, batch: Sequence[tuple[Delivery, Verified]], *, again: bool = False) -> None:
        """``again``: an earlier attempt may have been committed in part."""
        deliveries, verified = [delivery for delivery, _ in batch], [one for _, one in batch]
        try:
            applied = await self._while_store_away(
                lambda retried: self._applier.apply(verified, now_ms(), again=again or retried), deliveries
            )
        except _RedeliveryExpected:
            raise
        except Exception as error:  # noqa: BLE001 -- whatever one envelope caused must not fail the others
            await self._apply_one_by_one(batch, error)
            return
        self._follow_up.follow_up(verified, applied)
        # The envelopes that encryptors wait for are on their way before the broker is answered.
        await asyncio.sleep(0)
        for delivery, one, result in zip(deliveries, verified, applied.results, strict=True):
            await self._answer(delivery, one, result)

    async def _apply_one_by_one(self, batch: Sequence[tuple[Delivery, Verified]], error: Exception) -> None:
        if len(batch) > 1:
            for pair in batch:
                await self._apply([pair], again=True)
            return
        delivery, header = batch[0][0], batch[0][1].header
        _log.error(
            "envelope not handled",
            effect=f"it is tried again; the broker dead-letters a kept envelope after {DELIVERY_LIMIT} attempts",
            type=header.type,
            peer=header.sender,
            number=header.number,
            reason=str(error),
            exc_info=error,
        )
        await pause(self._stop, 1.0)
        await delivery.requeue()

    async def _while_store_away(self, action: Callable[[bool], T], batch: Sequence[Delivery]) -> T:
        """Does ``action`` in a thread until the store is there; its argument says whether it was tried before.

        Raises _RedeliveryExpected, and what ``action`` raises but the errors for which deliveries are held.
        """

        async def sleep(seconds: float) -> None:
            _log.debug("store away, deliveries are held", count=len(batch))
            if not await pause(self._stop, seconds) or all(delivery.lost for delivery in batch):
                raise _RedeliveryExpected

        # A retry object keeps what it refers to, here up to 64 MiB of bodies, until a garbage collection.
        with suppress(*_HELD):
            return await asyncio.to_thread(self._attempt, action, False)
        await sleep(_FIRST_WAIT_SECONDS)
        attempts = AsyncRetrying(retry=retry_if_exception_type(_HELD), wait=_STORE_WAIT, sleep=sleep)
        return await attempts(asyncio.to_thread, self._attempt, action, True)

    def _attempt(self, action: Callable[[bool], T], again: bool) -> T:
        """In a thread. A refusal is logged here, because other tasks do not use these tables; absence is not."""
        try:
            done = action(again)
        except StoreMisconfigured as error:
            if not self._refused:
                _log.warning("database unavailable", task="deliveries", reason=str(error))
            self._refused = True
            raise
        if self._refused:
            _log.info("database available again", task="deliveries")
        self._refused = False
        return done

    async def _answer(self, delivery: Delivery, one: Verified, result: Result) -> None:
        header = one.header
        if result in _REJECTED:
            explanation = f"{header.sender} sent {_REJECTED[result]}"
            rejected = Rejected(result.value, header.sender, explanation, header, verified=True)
            await self._rejecter.reject(delivery, rejected)
            return
        await delivery.ack()
        metrics.RECEIVED.labels(header.type.value, result.value).inc()
        _log_received(one, result)


class FollowUp:
    """What is sent, noted and forgotten when the effect of an envelope is committed. Of one event loop."""

    def __init__(
        self,
        directory: PeerDirectory,
        replies: Replies,
        sender: Sender,
        peer_rejections: PeerRejections,
        notifier: Notifier,
    ) -> None:
        self._directory = directory
        self._replies = replies
        self._sender = sender
        self._peer_rejections = peer_rejections
        self._notifier = notifier

    def follow_up(self, batch: Sequence[Verified], applied: Applied) -> None:
        """Acknowledgements first, because encryptors wait for them."""
        for one, result in zip(batch, applied.results, strict=True):
            self._follow_up(one, result)
        applied.after_commit.notify(self._notifier)
        if applied.after_commit.stock_changed:
            self._sender.wake()

    def finish(self) -> None:
        """No more will come."""
        self._replies.finish()

    def _follow_up(self, one: Verified, result: Result) -> None:
        peer_id, number = one.header.sender, one.header.number
        match one.payload:
            case (Events() | PlacedKeys()) as payload if result in (Result.HANDLED, Result.DUPLICATE):
                # A duplicate came again because its acknowledgement did not arrive.
                self._replies.acknowledge(peer_id, number, urgent=isinstance(payload, PlacedKeys))
            case Acknowledgement(numbers):
                self._sender.forget(peer_id, numbers)
            case Rejection(rejected_number, reason) as rejection:
                self._peer_rejections.note(peer_id, rejection)
                if reason not in _TRANSIENT_REASONS:
                    self._sender.note_rejected(peer_id, rejected_number)
            case Heartbeat(_, bytes() as digest) if result is Result.HANDLED:
                if digest != self._directory.digest(peer_id):
                    self._replies.request_announcement(peer_id)
            case Capabilities(_, True):
                self._replies.send_announcement(peer_id)
            case _:
                pass


def _log_received(one: Verified, result: Result) -> None:
    header, payload = one.header, one.payload
    if isinstance(payload, Events | PlacedKeys):
        _log.info(
            "events received",
            type=header.type.value,
            peer=header.sender,
            number=header.number,
            items=payload.count,
            outcome=result.value,
            correlation_ids=payload.correlation_ids,
        )
    else:
        _log.debug("envelope received", type=header.type.value, peer=header.sender, outcome=result.value)
