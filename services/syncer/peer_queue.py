"""What waits for one peer's acknowledgement, and when it is sent again. Pure.

The broker keeps an envelope for a peer that is down, so sending it again helps only against what neither kept: a broker
that lost its disk, a peer that lost its store. While a peer is offline one copy in its queue is enough, renewed when
the last one has expired there; when the peer is back, what it has not acknowledged is sent again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice

from skipbus.services.syncer.transport import Outcome, OutgoingEnvelope
from skipbus.shared.liveness import PeerStatus
from skipbus.shared.protocol.envelopes import MAX_AGE_MS
from skipbus.shared.store.outbox import KEY_PLACED, OutboxEnvelope

FIRST_RESEND_MS = 10_000
LAST_RESEND_MS = 300_000
UNROUTED_RESEND_MS = 1_000
# Envelopes of one peer that are sent again in one round: one that acknowledges nothing must not keep this KP signing.
MAX_DUE = 256
# Envelopes of one peer whose content is kept in memory until it is sent; that of others is read again.
MAX_HELD_CONTENTS = 16
NOT_SENT = frozenset({Outcome.LOST, Outcome.UNCONFIRMED})


def resend_after_ms(attempts: int) -> int:
    """How long to wait for the acknowledgement after that many attempts: 10 s, doubling up to 5 min."""
    doublings = min(max(attempts - 1, 0), 16)
    return min(FIRST_RESEND_MS << doublings, LAST_RESEND_MS)


def is_due(
    attempts: int,
    sent_ms: int | None,
    peer: PeerStatus,
    now_ms: int,
    *,
    unrouted: bool = False,
    rejected: bool = False,
) -> bool:
    """Whether to send an envelope now that was sent last at ``sent_ms`` (UTC ms, None for never).

    ``unrouted``: the broker had no queue for it then; a peer that was heard since has made its queue.
    ``rejected``: the peer did not take it; it may have another release or configuration later.
    """
    if sent_ms is None:
        return True
    # A clock that was set back must not silence an envelope for as long as it was set back.
    waited_ms = abs(now_ms - sent_ms)
    if peer == "offline":
        return waited_ms >= MAX_AGE_MS
    if rejected:
        return waited_ms >= LAST_RESEND_MS
    return waited_ms >= (UNROUTED_RESEND_MS if unrouted else resend_after_ms(attempts))


@dataclass(slots=True, eq=False)
class Unacknowledged:
    """An envelope that is not acknowledged. ``content`` is there while it waits to be sent for the first time.

    ``seen_at`` is monotonic. ``was_read``: its content was read once, and ``keys_expire_ms`` is known since then.
    ``malformed``: its rows stay in the store for an operator, and are not sent.
    """

    envelope: OutboxEnvelope
    content: OutgoingEnvelope | None = None
    seen_at: float = field(default_factory=time.monotonic)
    attempts: int = 0
    sent_ms: int | None = None
    unrouted: bool = False
    rejected: bool = False
    queued: bool = False
    malformed: bool = False
    was_read: bool = False
    keys_expire_ms: int | None = None

    def __post_init__(self) -> None:
        self.attempts, self.sent_ms = self.envelope.attempts, self.envelope.sent_ms

    @property
    def number(self) -> int:
        return self.envelope.number

    @property
    def idle(self) -> bool:
        """Whether it is neither being sent nor malformed."""
        return not self.queued and not self.malformed

    def note_content(self, content: OutgoingEnvelope | None) -> None:
        """Its rows were read; None where they are malformed."""
        self.was_read, self.malformed = True, content is None
        self.keys_expire_ms = content.keys_expire_ms if content is not None else None

    def release(self) -> None:
        """It is not being sent any more."""
        self.queued, self.content = False, None


class PeerQueue:
    """The envelopes of one peer: all that are not acknowledged, and those that are ready to be sent."""

    def __init__(self, peer_id: str) -> None:
        self.peer_id = peer_id
        self.sending = False
        self._waiting: dict[int, Unacknowledged] = {}
        self._ready: list[Unacknowledged] = []
        self._attempts: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def has_ready(self) -> bool:
        """Whether anything is ready to be sent."""
        return bool(self._ready)

    @property
    def in_use(self) -> bool:
        """Whether anything waits, is ready, on its way, or still to be recorded."""
        return bool(self._waiting or self._ready or self.sending or self._attempts)

    def add(self, one: Unacknowledged) -> None:
        """One more; nothing where it is known already."""
        self._waiting.setdefault(one.number, one)

    def forget(self, numbers: Iterable[int]) -> None:
        """These wait no longer."""
        for number in numbers:
            self._waiting.pop(number, None)
            self._attempts.pop(number, None)

    def note_rejected(self, number: int) -> None:
        """The peer does not take it."""
        if number in self._waiting:
            self._waiting[number].rejected = True

    # --- what there is to do

    def due(self, status: PeerStatus, at_ms: int) -> list[Unacknowledged]:
        """What is to be sent, for the first time or again; of much of it the first MAX_DUE."""
        return self._select(
            lambda one: is_due(one.attempts, one.sent_ms, status, at_ms, unrouted=one.unrouted, rejected=one.rejected),
            MAX_DUE,
        )

    def expiry_unknown(self, limit: int) -> list[Unacknowledged]:
        """Of which it is not known when their last key expires: another syncer has numbered them."""
        return self._select(lambda one: not one.was_read, limit)

    def expired(self, before_ms: int) -> list[int]:
        """Numbers of those that are only about keys that had expired at ``before_ms`` (UTC)."""
        expired = self._select(lambda one: one.keys_expire_ms is not None and one.keys_expire_ms < before_ms)
        return [one.number for one in expired]

    def abandoned(self, before: float) -> list[int]:
        """Numbers of keys on demand that nobody has withdrawn or confirmed since ``before`` (monotonic)."""
        return [
            one.number
            for one in self._waiting.values()
            if one.envelope.type == KEY_PLACED and one.seen_at < before and not one.malformed
        ]

    def _select(self, wanted: Callable[[Unacknowledged], bool], limit: int | None = None) -> list[Unacknowledged]:
        found: Iterator[Unacknowledged] = (one for one in self._waiting.values() if one.idle and wanted(one))
        return list(islice(found, limit))

    # --- sending

    def make_ready(self, envelopes: Iterable[Unacknowledged]) -> None:
        """These are to be sent now; keys that an encryptor waits for go first."""
        for one in envelopes:
            one.queued = True
            if len(self._ready) >= MAX_HELD_CONTENTS:
                one.content = None
            self._ready.append(one)
        self._ready.sort(key=lambda one: (one.envelope.type != KEY_PLACED, one.number))

    def take(self, limit: int) -> list[Unacknowledged]:
        """The next ones to send, without those that were acknowledged or withdrawn in the meantime."""
        taken, self._ready = self._ready[:limit], self._ready[limit:]
        return [one for one in taken if one.number in self._waiting]

    def postpone(self) -> None:
        """What is ready is left for the next round."""
        for one in self._ready:
            one.release()
        self._ready = []

    def note_sent(self, one: Unacknowledged, outcome: Outcome, at_ms: int) -> None:
        """What became of one that was sent."""
        if outcome in NOT_SENT:
            return
        one.attempts, one.sent_ms = one.attempts + 1, at_ms
        one.unrouted = outcome is Outcome.NO_QUEUE
        one.rejected = outcome is Outcome.REJECTED
        # Not where the acknowledgement was faster than this.
        if one.number in self._waiting:
            self._attempts[one.number] = at_ms

    def take_attempts(self) -> list[tuple[int, int]]:
        """Number and time (UTC ms) of what was sent since the last call and still waits."""
        attempts, self._attempts = self._attempts, {}
        return list(attempts.items())
