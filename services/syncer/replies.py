"""Replies to peers that need not wait in the store: acknowledgements, rejections, and what concerns announcements.

All of them may be lost: an envelope that is not acknowledged comes again, and a heartbeat shows again which
announcement its receiver lacks. They are gathered for a moment, because one signature can acknowledge a thousand
envelopes; an acknowledgement that an encryptor waits for is sent immediately. Each peer has its own task, so one that
does not take its replies delays no other.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from skipbus.services.syncer.transport import OutgoingEnvelope, Transport
from skipbus.shared.errors import BackendError
from skipbus.shared.logging import get_logger
from skipbus.shared.protocol.envelopes import EnvelopeType
from skipbus.shared.protocol.payloads import (
    MAX_ACKNOWLEDGED,
    pack_acknowledgement,
    pack_capabilities,
    pack_rejection,
)

GATHER_SECONDS = 0.05
# An announcement is large, and a replayed envelope must not cause one each time.
REQUEST_EVERY_SECONDS = 3.0
ANSWER_EVERY_SECONDS = 1.0
KEEP_ANNOUNCEMENT_SECONDS = 0.5
# Rejections that a peer is sent in a second. Only its own envelopes cause them, but anybody may play those back.
REJECTIONS_PER_SECOND = 20
# Numbers that wait for a peer which does not take its replies; a dropped one is acknowledged when it comes again.
MAX_WAITING = 20 * MAX_ACKNOWLEDGED

_log = get_logger("replies")


@dataclass(slots=True)
class _Pending:
    """What one peer is to be sent."""

    acknowledged: set[int] = field(default_factory=set)
    rejections: list[bytes] = field(default_factory=list)
    request_announcement: bool = False
    send_announcement: bool = False
    second: int = 0
    rejected: int = 0
    hurry: asyncio.Event = field(default_factory=asyncio.Event)
    busy: bool = False

    def __bool__(self) -> bool:
        return bool(self.acknowledged or self.rejections or self.request_announcement or self.send_announcement)


class Replies:
    """``fetch_announcement`` blocks and returns the local KP's announcement in the store. Of one event loop."""

    def __init__(self, transport: Transport, fetch_announcement: Callable[[], bytes | None]) -> None:
        self._transport = transport
        self._fetch_announcement = fetch_announcement
        self._peers: dict[str, _Pending] = {}
        self._limits: dict[tuple[str, str], float] = {}
        self._finished = asyncio.Event()
        self._tasks: asyncio.TaskGroup | None = None
        self._announcement_lock = asyncio.Lock()
        self._announcement: tuple[float, bytes | None] = (-KEEP_ANNOUNCEMENT_SECONDS, None)

    def acknowledge(self, peer_id: str, number: int, *, urgent: bool = False) -> None:
        """The effect of the peer's envelope is committed; ``urgent`` where an encryptor waits for that."""
        peer = self._peer(peer_id)
        if len(peer.acknowledged) < MAX_WAITING:
            peer.acknowledged.add(number)
        self._start(peer_id, peer, urgent=urgent)

    def reject(self, peer_id: str, number: int, reason: str, explanation: str) -> None:
        """The peer's envelope is rejected."""
        peer = self._peer(peer_id)
        second = int(time.monotonic())
        if second != peer.second:
            peer.second, peer.rejected = second, 0
        if peer.rejected < REJECTIONS_PER_SECOND and len(peer.rejections) < REJECTIONS_PER_SECOND:
            peer.rejected += 1
            peer.rejections.append(pack_rejection(number, reason, explanation))
            self._start(peer_id, peer, urgent=True)

    def reject_unproven(self, peer_id: str, number: int, reason: str, explanation: str) -> None:
        """An envelope that claims to be the peer's is rejected."""
        if self._may("unproven", peer_id, ANSWER_EVERY_SECONDS):
            self.reject(peer_id, number, reason, explanation)

    def request_announcement(self, peer_id: str) -> None:
        """The peer has an announcement that this KP does not have."""
        if self._may("request", peer_id, REQUEST_EVERY_SECONDS):
            peer = self._peer(peer_id)
            peer.request_announcement = True
            self._start(peer_id, peer)

    def send_announcement(self, peer_id: str) -> None:
        """The peer shall have this KP's announcement."""
        if self._may("send", peer_id, ANSWER_EVERY_SECONDS):
            peer = self._peer(peer_id)
            peer.send_announcement = True
            self._start(peer_id, peer)

    def finish(self) -> None:
        """No more will come: ``run`` sends what there is and returns."""
        self._finished.set()

    async def run(self) -> None:
        """Until ``finish``; then what is pending is still sent."""
        async with asyncio.TaskGroup() as self._tasks:
            for peer_id, peer in list(self._peers.items()):
                self._start(peer_id, peer)
            await self._finished.wait()
            for peer in self._peers.values():
                peer.hurry.set()

    def _peer(self, peer_id: str) -> _Pending:
        return self._peers.setdefault(peer_id, _Pending())

    def _may(self, what: str, peer_id: str, every_seconds: float) -> bool:
        now = time.monotonic()
        if now - self._limits.get((what, peer_id), -every_seconds) < every_seconds:
            return False
        self._limits[what, peer_id] = now
        return True

    def _start(self, peer_id: str, peer: _Pending, *, urgent: bool = False) -> None:
        if urgent or self._finished.is_set():
            peer.hurry.set()
        if peer and not peer.busy and self._tasks is not None:
            peer.busy = True
            self._tasks.create_task(self._send(peer_id, peer), name=f"replies {peer_id}")

    async def _send(self, peer_id: str, peer: _Pending) -> None:
        """Sends until nothing is pending; the next reply starts it again."""
        try:
            while peer:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(GATHER_SECONDS):
                        await peer.hurry.wait()
                peer.hurry.clear()
                await self._transport.send(await self._take(peer_id, peer))
        finally:
            peer.busy = False

    async def _take(self, peer_id: str, peer: _Pending) -> list[OutgoingEnvelope]:
        numbers, peer.acknowledged = sorted(peer.acknowledged), set()
        rejections, peer.rejections = peer.rejections, []
        request, peer.request_announcement = peer.request_announcement, False
        send, peer.send_announcement = peer.send_announcement, False
        payloads = [
            (EnvelopeType.KEY_STORED, pack_acknowledgement(numbers[start : start + MAX_ACKNOWLEDGED]))
            for start in range(0, len(numbers), MAX_ACKNOWLEDGED)
        ]
        payloads += [(EnvelopeType.ENVELOPE_REFUSED, rejection) for rejection in rejections]
        if request:
            payloads.append((EnvelopeType.CAPABILITIES, pack_capabilities(None, request=True)))
        announcement = await self._read_announcement() if send else None
        if announcement is not None:
            payloads.append((EnvelopeType.CAPABILITIES, pack_capabilities(announcement, request=False)))
        return [OutgoingEnvelope(kind, peer_id, payload) for kind, payload in payloads]

    async def _read_announcement(self) -> bytes | None:
        """Once for all peers that are to have it now."""
        async with self._announcement_lock:
            read_at, body = self._announcement
            if time.monotonic() - read_at >= KEEP_ANNOUNCEMENT_SECONDS:
                try:
                    body = await asyncio.to_thread(self._fetch_announcement)
                except BackendError as error:
                    _log.debug("announcement not sent", reason=str(error))
                    return None
                self._announcement = time.monotonic(), body
            return body
