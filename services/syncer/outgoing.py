"""Signs envelopes and hands them to the broker. Signing (0.9 ms each) is done in a thread, many at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from services.syncer import metrics
from services.syncer.numbers import Numbers
from shared.bus import Bus
from shared.bus_sending import Unconfirmed
from shared.clock import now_ms
from shared.envelopes import MAX_AGE_MS, EnvelopeType, Header, sign_envelope
from shared.errors import BusUnavailable
from shared.identity import Identity
from shared.logs import get_logger

# What means something only to a KP that listens now is not kept for one that does not.
_LIVE = frozenset({EnvelopeType.HEARTBEAT, EnvelopeType.CAPABILITIES})

_log = get_logger("outgoing")


class Outcome(Enum):
    """What became of an envelope; ``HELD_UP`` and ``LOST`` may have arrived all the same."""

    TAKEN = "taken"
    NO_QUEUE = "no_queue"
    HELD_UP = "held_up"
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class Letter:
    """An envelope to be; ``number`` is None where a new one will do."""

    type: EnvelopeType
    target: str
    payload: bytes
    number: int | None = None


class Outgoing:
    """The one place where this KP's envelopes are signed."""

    def __init__(self, bus: Bus, identity: Identity, local_id: str, numbers: Numbers) -> None:
        self._bus = bus
        self._identity = identity
        self._local_id = local_id
        self._numbers = numbers

    def is_held_up(self, peer_id: str) -> bool:
        """Whether signing what is kept for this peer would be in vain for the time being."""
        return self._bus.is_left_out(peer_id)

    async def send(self, letters: Sequence[Letter]) -> list[Outcome]:
        """Dates, signs and publishes; what became of each. Raises nothing for a broker that is away."""
        if not self._bus.up.is_set():
            return [Outcome.LOST] * len(letters)
        envelopes = await asyncio.to_thread(self._sign_all, letters)
        outcomes = await asyncio.gather(*map(self._publish, letters, envelopes))
        for letter, outcome in zip(letters, outcomes, strict=True):
            metrics.SENT.labels(letter.type.value, outcome.value).inc()
        return outcomes

    def _sign_all(self, letters: Sequence[Letter]) -> list[bytes]:
        return [self._sign(letter) for letter in letters]

    def _sign(self, letter: Letter) -> bytes:
        number = self._numbers.next() if letter.number is None else letter.number
        header = Header(letter.type, self._local_id, letter.target, number, now_ms())
        return sign_envelope(header, letter.payload, self._identity)

    async def _publish(self, letter: Letter, envelope: bytes) -> Outcome:
        lifetime_ms = None if letter.type in _LIVE else MAX_AGE_MS
        try:
            taken = await self._bus.publish(letter.target, envelope, lifetime_ms=lifetime_ms)
        except BusUnavailable as error:
            _log.debug("envelope not confirmed", type=letter.type, peer=letter.target, reason=str(error))
            return Outcome.HELD_UP if isinstance(error, Unconfirmed) else Outcome.LOST
        outcome = Outcome.TAKEN if taken else Outcome.NO_QUEUE
        _log.debug("envelope sent", type=letter.type, peer=letter.target, octets=len(envelope), outcome=outcome.value)
        return outcome
