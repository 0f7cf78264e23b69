"""What the bus delivers, in the order in which it is worth handling: heartbeats are gathered, all else goes at once.

Nobody waits for a heartbeat, and with hundreds of peers one arrives every few milliseconds. To handle each by itself
costs a transaction each; gathered for a moment they share one. How long that is goes by the local heartbeat interval,
so that it is small next to the time after which a peer counts as late.

What an envelope says of its type is not verified here. A false one changes nothing but the moment at which it is
looked at, and no more than ``MAX_GATHERED`` are ever kept.
"""

from __future__ import annotations

import time

from skipbus.shared.broker.consuming import PREFETCH, Consumer, Delivery
from skipbus.shared.protocol.envelopes import EnvelopeType, read_envelope

# Half of what the broker hands out unacknowledged, so that other live envelopes still get through.
MAX_GATHERED = PREFETCH // 2
GATHER_SHARE = 0.05
MAX_GATHER_SECONDS = 0.25
# A heartbeat has 5 kB. What is longer is not read on the event loop to find out.
_MAX_HEARTBEAT_BYTES = 16 * 1024


class Intake:
    """Of one inbox."""

    def __init__(self, consumer: Consumer, heartbeat_seconds: float) -> None:
        self._consumer = consumer
        self._gather_seconds = min(MAX_GATHER_SECONDS, GATHER_SHARE * heartbeat_seconds)
        self._gathered: list[Delivery] = []
        self._due_at = 0.0

    async def next_deliveries(self, limit: int, wait_seconds: float) -> list[Delivery]:
        """As ``Consumer.next_deliveries``; an empty list also where only heartbeats came: they are for a later call."""
        if self._gathered:
            wait_seconds = min(wait_seconds, max(0.0, self._due_at - time.monotonic()))
        urgent = [one for one in await self._consumer.next_deliveries(limit, wait_seconds) if not self._gather(one)]
        # Judged at each call: heartbeats must not wait for a pause in what is urgent.
        if len(self._gathered) < MAX_GATHERED and time.monotonic() < self._due_at:
            return urgent
        gathered, self._gathered = self._gathered, []
        return urgent + [one for one in gathered if not one.lost]

    async def stop(self) -> None:
        """Takes in no more; what was delivered already is still given out, at once."""
        self._gather_seconds = self._due_at = 0.0
        await self._consumer.stop()

    def _gather(self, delivery: Delivery) -> bool:
        """Whether it is kept for a later call."""
        if self._gather_seconds <= 0 or not _is_heartbeat(delivery.body):
            return False
        if not self._gathered:
            self._due_at = time.monotonic() + self._gather_seconds
        self._gathered.append(delivery)
        return True


def _is_heartbeat(body: bytes) -> bool:
    if len(body) > _MAX_HEARTBEAT_BYTES:
        return False
    try:
        return read_envelope(body).header.type is EnvelopeType.HEARTBEAT
    except Exception:  # noqa: BLE001 -- what is wrong with it is for the examination to say, and must end nothing here
        return False
