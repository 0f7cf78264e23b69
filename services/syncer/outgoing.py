"""Signs envelopes and hands them to the broker, or to the peer itself where that has an endpoint.

Signing takes one to two milliseconds each and is done in a thread, many at a time.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from skipbus.services.syncer import metrics
from skipbus.services.syncer.answers import Answer, Posted
from skipbus.services.syncer.numbers import Numbers
from skipbus.shared.broker.publishing import Publisher, Unconfirmed
from skipbus.shared.clock import now_ms
from skipbus.shared.crypto.identity import Identity
from skipbus.shared.errors import BusUnavailable
from skipbus.shared.logs import get_logger
from skipbus.shared.protocol.envelopes import MAX_AGE_MS, EnvelopeType, Header, sign_envelope

if TYPE_CHECKING:
    from skipbus.services.syncer.https_link import HttpsLink

# What means something only to a KP that listens now is not kept for one that does not.
_LIVE = frozenset({EnvelopeType.HEARTBEAT, EnvelopeType.CAPABILITIES, EnvelopeType.ENVELOPE_REFUSED})

_log = get_logger("outgoing")


class Outcome(Enum):
    """What became of an envelope; ``HELD_UP`` and ``LOST`` may have arrived all the same.

    Only HTTPS can tell of a refusal at once. ``HELD_UP``: the broker is there, but silent about this one peer.
    """

    TAKEN = "taken"
    NO_QUEUE = "no_queue"
    HELD_UP = "held_up"
    REFUSED = "refused"
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class Letter:
    """An envelope to be; ``number`` is None where a new one will do.

    ``keys_expire_ms`` is when the last key expires that it speaks of (UTC ms), where it is pointless after that;
    ``told`` how many keys it is about, and the first requests that they came from.
    """

    type: EnvelopeType
    target: str
    payload: bytes
    number: int | None = None
    keys_expire_ms: int | None = None
    told: tuple[int, tuple[str, ...]] = (0, ())


OnRefusal = Callable[[Letter, Answer], None]


class Outgoing:
    """The one place where this KP's envelopes are signed."""

    def __init__(
        self,
        publisher: Publisher,
        identity: Identity,
        local_id: str,
        numbers: Numbers,
        links: Mapping[str, HttpsLink] | None = None,
    ) -> None:
        """``links`` are the ways to peers not reached by the bus."""
        self._publisher = publisher
        self._identity = identity
        self._local_id = local_id
        self.numbers = numbers
        self._links = links or {}
        self.on_refusal: OnRefusal = lambda _letter, _answer: None

    def has_link(self, peer_id: str) -> bool:
        """Whether the peer is sent to by HTTPS, one envelope after another."""
        return peer_id in self._links

    def is_open(self, peer_id: str) -> bool:
        """Whether it is worth trying to send to the peer now."""
        link = self._links.get(peer_id)
        if link is not None:
            return not link.resting
        # Signing what is kept for a peer that is left out would be in vain.
        return self._publisher.ready and not self._publisher.is_left_out(peer_id)

    def is_reachable(self, peer_id: str) -> bool:
        """Whether there is a way to the peer at all; one with an endpoint may be tried at any time."""
        return peer_id in self._links or self._publisher.ready

    async def send(self, letters: Sequence[Letter]) -> list[Outcome]:
        """Dates, signs and sends; what became of each. Raises nothing for a broker or a peer that is away."""
        if not any(self.is_reachable(letter.target) for letter in letters):
            return [Outcome.LOST] * len(letters)
        envelopes = await asyncio.to_thread(self._sign_all, letters)
        outcomes = await asyncio.gather(*map(self._send, letters, envelopes))
        for letter, outcome in zip(letters, outcomes, strict=True):
            metrics.SENT.labels(letter.type.value, outcome.value).inc()
        return outcomes

    def _sign_all(self, letters: Sequence[Letter]) -> list[bytes]:
        return [self._sign(letter) for letter in letters]

    def _sign(self, letter: Letter) -> bytes:
        number = self.numbers.next() if letter.number is None else letter.number
        header = Header(letter.type, self._local_id, letter.target, number, now_ms())
        return sign_envelope(header, letter.payload, self._identity)

    async def _send(self, letter: Letter, envelope: bytes) -> Outcome:
        link = self._links.get(letter.target)
        outcome = await (self._publish(letter, envelope) if link is None else self._post(link, letter, envelope))
        _log.debug("envelope sent", type=letter.type, peer=letter.target, octets=len(envelope), outcome=outcome.value)
        return outcome

    async def _publish(self, letter: Letter, envelope: bytes) -> Outcome:
        lifetime_ms = None if letter.type in _LIVE else MAX_AGE_MS
        try:
            taken = await self._publisher.publish(letter.target, envelope, lifetime_ms=lifetime_ms)
        except BusUnavailable as error:
            _log.debug("envelope not confirmed", type=letter.type, peer=letter.target, reason=str(error))
            return Outcome.HELD_UP if isinstance(error, Unconfirmed) else Outcome.LOST
        return Outcome.TAKEN if taken else Outcome.NO_QUEUE

    async def _post(self, link: HttpsLink, letter: Letter, envelope: bytes) -> Outcome:
        if letter.type in _LIVE:
            # Not waited for: a peer that does not answer must not hold up the heartbeats of others.
            return Outcome.TAKEN if link.post_soon(envelope, functools.partial(self._look_at, letter)) else Outcome.LOST
        answer = await link.post(envelope)
        self._look_at(letter, answer)
        return {Posted.TAKEN: Outcome.TAKEN, Posted.REFUSED: Outcome.REFUSED, Posted.LOST: Outcome.LOST}[answer.posted]

    def _look_at(self, letter: Letter, answer: Answer) -> None:
        if answer.posted is Posted.REFUSED:
            self.on_refusal(letter, answer)
