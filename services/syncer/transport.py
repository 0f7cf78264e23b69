"""Signs envelopes and hands them to the broker, or by HTTPS to a peer that has an endpoint.

A signature takes one to two milliseconds, so envelopes are signed in a thread, many at a time.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from skipbus.services.syncer import metrics
from skipbus.services.syncer.leader import SequenceNumbers
from skipbus.shared.broker.publishing import Publisher, Unconfirmed
from skipbus.shared.clock import now_ms
from skipbus.shared.crypto.identity import Identity
from skipbus.shared.errors import BusUnavailable
from skipbus.shared.logging import get_logger
from skipbus.shared.protocol.envelopes import MAX_AGE_MS, EnvelopeType, Header, sign_envelope
from skipbus.shared.protocol.payloads import Rejection

if TYPE_CHECKING:
    from skipbus.services.syncer.https_peer import HttpsPeer

_log = get_logger("transport")


@dataclass(frozen=True, slots=True)
class OutgoingEnvelope:
    """An envelope before it is signed; ``number`` is None where a new one will do.

    ``keys_expire_ms`` (UTC) is when the last key expires that it is about, where nobody needs it after that;
    ``items`` and ``correlation_ids`` are for the log.
    """

    type: EnvelopeType
    target: str
    payload: bytes
    number: int | None = None
    keys_expire_ms: int | None = None
    items: int = 0
    correlation_ids: tuple[str, ...] = ()


class Outcome(Enum):
    """What became of an envelope; ``UNCONFIRMED`` and ``LOST`` may have arrived all the same.

    Only HTTPS reports a rejection immediately. ``UNCONFIRMED``: the broker answers, but not for the queue of this peer.
    """

    TAKEN = "taken"
    NO_QUEUE = "no_queue"
    UNCONFIRMED = "unconfirmed"
    REJECTED = "refused"
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class PeerAnswer:
    """What a peer's endpoint answered; ``reason`` and ``explanation`` where it rejects the envelope."""

    outcome: Outcome
    reason: str = ""
    explanation: str = ""


class Transport:
    """The one place where this KP's envelopes are signed. ``https_peers`` are those that are not reached by the bus.

    ``record_rejection`` is given the peer and what it answered by HTTPS instead of taking an envelope.
    """

    def __init__(
        self,
        publisher: Publisher,
        identity: Identity,
        local_id: str,
        numbers: SequenceNumbers,
        https_peers: Mapping[str, HttpsPeer],
        record_rejection: Callable[[str, Rejection], Awaitable[None]],
    ) -> None:
        self._publisher = publisher
        self._identity = identity
        self._local_id = local_id
        self._numbers = numbers
        self._https_peers = https_peers
        self._record_rejection = record_rejection

    def is_https_peer(self, peer_id: str) -> bool:
        """Whether the peer is sent to by HTTPS, one envelope after another."""
        return peer_id in self._https_peers

    def is_open(self, peer_id: str) -> bool:
        """Whether it is worth trying to send to the peer now."""
        https_peer = self._https_peers.get(peer_id)
        if https_peer is not None:
            return not https_peer.suspended
        # Signing what is kept for a suspended peer would be in vain.
        return self._publisher.ready and not self._publisher.is_suspended(peer_id)

    def is_reachable(self, peer_id: str) -> bool:
        """Whether there is a way to the peer at all; one with an endpoint may be tried at any time."""
        return peer_id in self._https_peers or self._publisher.ready

    async def send(self, envelopes: Sequence[OutgoingEnvelope]) -> list[Outcome]:
        """Dates, signs and sends; what became of each. Raises nothing for a broker or a peer that is away."""
        if not any(self.is_reachable(envelope.target) for envelope in envelopes):
            return [Outcome.LOST] * len(envelopes)
        bodies = await asyncio.to_thread(lambda: [self._sign(envelope) for envelope in envelopes])
        outcomes = await asyncio.gather(*map(self._send, envelopes, bodies))
        for envelope, outcome in zip(envelopes, outcomes, strict=True):
            metrics.SENT.labels(envelope.type.value, outcome.value).inc()
        return outcomes

    def _sign(self, envelope: OutgoingEnvelope) -> bytes:
        number = self._numbers.next() if envelope.number is None else envelope.number
        header = Header(envelope.type, self._local_id, envelope.target, number, now_ms())
        return sign_envelope(header, envelope.payload, self._identity)

    async def _send(self, envelope: OutgoingEnvelope, body: bytes) -> Outcome:
        https_peer = self._https_peers.get(envelope.target)
        if https_peer is None:
            outcome = await self._publish(envelope, body)
        else:
            outcome = await self._post(https_peer, envelope, body)
        _log.debug("envelope sent", type=envelope.type, peer=envelope.target, octets=len(body), outcome=outcome.value)
        return outcome

    async def _publish(self, envelope: OutgoingEnvelope, body: bytes) -> Outcome:
        lifetime_ms = None if envelope.type.is_live else MAX_AGE_MS
        try:
            taken = await self._publisher.publish(envelope.target, body, lifetime_ms=lifetime_ms)
        except BusUnavailable as error:
            _log.debug("envelope not confirmed", type=envelope.type, peer=envelope.target, reason=str(error))
            return Outcome.UNCONFIRMED if isinstance(error, Unconfirmed) else Outcome.LOST
        return Outcome.TAKEN if taken else Outcome.NO_QUEUE

    async def _post(self, https_peer: HttpsPeer, envelope: OutgoingEnvelope, body: bytes) -> Outcome:
        note = functools.partial(self._record_answer, envelope)
        if envelope.type.is_live:
            # The answer is not waited for: a peer that does not answer must not delay the heartbeats of others.
            return Outcome.TAKEN if https_peer.post_soon(body, note) else Outcome.LOST
        answer = await https_peer.post(body)
        await note(answer)
        return answer.outcome

    async def _record_answer(self, envelope: OutgoingEnvelope, answer: PeerAnswer) -> None:
        if answer.outcome is Outcome.REJECTED:
            rejection = Rejection(envelope.number or 0, answer.reason, answer.explanation, ())
            await self._record_rejection(envelope.target, rejection)
