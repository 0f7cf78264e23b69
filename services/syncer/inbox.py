"""Takes envelopes in: examine, commit the effect, then answer the broker. The one place where a peer's error
becomes a reject.

Nothing is answered before its effect is committed. While the store is away the deliveries are held and tried
again: giving them back would use up their delivery limit, which is there for envelopes that cannot be handled.
A batch that the store refuses is tried one by one, so that one bad envelope does not take others with it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from skipbus.services.syncer import metrics
from skipbus.services.syncer.complaints import Complaints
from skipbus.services.syncer.effects import Applied, Effects, Verdict, keys_touched, portions
from skipbus.services.syncer.examination import Accepted, Examiner, Refusal
from skipbus.services.syncer.intake import Intake
from skipbus.services.syncer.outgoing import log_summary
from skipbus.services.syncer.payloads import Acknowledgement, Capabilities, Complaint, Events, Heartbeat
from skipbus.services.syncer.placed_keys import PlacedKeys
from skipbus.services.syncer.refuser import Refuser
from skipbus.services.syncer.replies import Replies
from skipbus.services.syncer.send import Sender
from skipbus.shared.broker.consuming import PREFETCH, Delivery
from skipbus.shared.clock import now_ms
from skipbus.shared.errors import StoreRefused, StoreUnavailable
from skipbus.shared.lifecycle import pause
from skipbus.shared.logs import get_logger
from skipbus.shared.peer_directory import PeerDirectory

BATCH = 2 * PREFETCH
_POLL_SECONDS = 0.5
_DRAIN_SECONDS = 0.1
_RETRY_FIRST_SECONDS = 0.2
_RETRY_LAST_SECONDS = 5.0

_REFUSED = frozenset({Verdict.REPLAYED, Verdict.KEY_EXISTS})

_log = get_logger("inbox")
T = TypeVar("T")


class _GivenUp(Exception):
    """The broker will deliver the batch anew: its connection is lost, or this process ends."""


@dataclass(frozen=True, slots=True)
class _Open:
    """A delivery whose envelope was accepted and whose effect is still to be committed."""

    delivery: Delivery
    accepted: Accepted


class Inbox:
    """Handles what the bus delivers, one batch after another."""

    def __init__(
        self,
        intake: Intake,
        directory: PeerDirectory,
        examiner: Examiner,
        effects: Effects,
        sender: Sender,
        replies: Replies,
        complaints: Complaints,
        refuser: Refuser,
    ) -> None:
        self._intake = intake
        self._directory = directory
        self._examiner = examiner
        self._effects = effects
        self._sender = sender
        self._replies = replies
        self._complaints = complaints
        self._refuser = refuser

    async def run(self, stop: asyncio.Event) -> None:
        """Until ``stop``; then what was delivered already is still handled."""
        try:
            while not stop.is_set():
                await self._handle(await self._intake.next_deliveries(BATCH, _POLL_SECONDS), stop)
                self._refuser.tell_left_out()
            await self._intake.stop()
            while batch := await self._intake.next_deliveries(BATCH, _DRAIN_SECONDS):
                await self._handle(batch, stop)
        finally:
            self._replies.finish()
            self._complaints.finish()

    async def _handle(self, batch: list[Delivery], stop: asyncio.Event) -> None:
        if not batch:
            return
        try:
            opened = [one for one in await self._examine(batch, stop) if one is not None]
            for portion in portions(opened, lambda one: keys_touched(one.accepted)):
                await self._commit(portion, stop)
        except _GivenUp:
            _log.debug("deliveries left to the broker", count=len(batch))

    async def _examine(self, batch: list[Delivery], stop: asyncio.Event) -> list[_Open | None]:
        def examine() -> list[Accepted | Refusal]:
            return [self._examiner.examine(one.body, one.redelivered, one.waited_ms) for one in batch]

        results = await self._insist(lambda _: examine(), batch, stop)
        return [await self._sort(*pair) for pair in zip(batch, results, strict=True)]

    async def _sort(self, delivery: Delivery, result: Accepted | Refusal) -> _Open | None:
        if isinstance(result, Accepted):
            return _Open(delivery, result)
        await self._refuser.refuse(delivery, result)
        return None

    async def _commit(self, batch: list[_Open], stop: asyncio.Event) -> None:
        if not batch:
            return
        deliveries = [one.delivery for one in batch]
        accepted = [one.accepted for one in batch]
        try:
            applied = await self._insist(
                lambda again: self._effects.apply(accepted, now_ms(), again=again), deliveries, stop
            )
        except StoreRefused as error:
            await self._commit_one_by_one(batch, error, stop)
            return
        await self._settle_all(batch, applied)

    async def _settle_all(self, batch: Sequence[_Open], applied: Applied) -> None:
        verdicts = applied.verdicts
        # First whoever waits for an answer; that the broker hears of it is nobody's hurry.
        for one, verdict in zip(batch, verdicts, strict=True):
            if verdict not in _REFUSED:
                self._follow_up(one.accepted, verdict)
        # What was just begun gets on its way before the rest is done.
        await asyncio.sleep(0)
        self._complaints.tell(applied.aftermath)
        for one, verdict in zip(batch, verdicts, strict=True):
            await self._settle(one, verdict)

    async def _commit_one_by_one(self, batch: list[_Open], error: StoreRefused, stop: asyncio.Event) -> None:
        if len(batch) > 1:
            for one in batch:
                await self._commit([one], stop)
            return
        header = batch[0].accepted.header
        _log.error(
            "envelope not handled", type=header.type, peer=header.sender, number=header.number, reason=str(error)
        )
        await pause(stop, 1.0)
        await batch[0].delivery.requeue()

    async def _insist(self, action: Callable[[bool], T], batch: list[Delivery], stop: asyncio.Event) -> T:
        """Does ``action`` in a thread until the store is there; its argument says whether it was tried before.

        Raises _GivenUp, StoreRefused.
        """
        delay_seconds, again = _RETRY_FIRST_SECONDS, False
        while True:
            try:
                return await asyncio.to_thread(action, again)
            except StoreUnavailable as error:
                _log.debug("store away, deliveries are held", count=len(batch), reason=str(error))
            again = True
            if not await pause(stop, delay_seconds) or all(delivery.lost for delivery in batch):
                raise _GivenUp
            delay_seconds = min(delay_seconds * 2, _RETRY_LAST_SECONDS)

    async def _settle(self, one: _Open, verdict: Verdict) -> None:
        explanation = _refused_after_all(one.accepted, verdict)
        if explanation is not None:
            header = one.accepted.header
            refusal = Refusal(verdict.value, header.sender, explanation, header, verified=True)
            await self._refuser.refuse(one.delivery, refusal)
            return
        await one.delivery.ack()
        metrics.RECEIVED.labels(one.accepted.header.type.value, verdict.value).inc()
        _tell(one.accepted, verdict)

    def _follow_up(self, accepted: Accepted, verdict: Verdict) -> None:
        sender = accepted.header.sender
        match accepted.payload:
            case Events():
                # A duplicate too: it came again because its acknowledgement did not arrive.
                self._replies.acknowledge(sender, accepted.header.number)
            case PlacedKeys():
                self._replies.acknowledge(sender, accepted.header.number, at_once=True)
            case Acknowledgement(numbers):
                self._sender.forget(sender, numbers)
            case Complaint() as complaint:
                self._complaints.hear(sender, complaint)
            case Heartbeat(_, bytes() as digest) if verdict is Verdict.HANDLED:
                if digest != self._directory.digest(sender):
                    self._replies.ask(sender)
            case Capabilities(_, True):
                self._replies.tell(sender)
            case _:
                pass


def _refused_after_all(accepted: Accepted, verdict: Verdict) -> str | None:
    """Why an envelope that was in order is refused for what the store says; None where it is not."""
    sender = accepted.header.sender
    match verdict:
        case Verdict.REPLAYED:
            return f"a heartbeat from {sender} bears a number that is not new"
        case Verdict.KEY_EXISTS:
            return f"{sender} sent a key under an id that exists here already"
        case _:
            return None


def _tell(accepted: Accepted, verdict: Verdict) -> None:
    header, payload = accepted.header, accepted.payload
    if isinstance(payload, Events | PlacedKeys):
        count, correlation_ids = log_summary(payload)
        _log.info(
            "events received",
            type=header.type.value,
            peer=header.sender,
            number=header.number,
            items=count,
            outcome=verdict.value,
            correlation_ids=correlation_ids,
        )
    else:
        _log.debug("envelope received", type=header.type.value, peer=header.sender, outcome=verdict.value)
