"""Answers to peers that need not wait in the store: acknowledgements, refusals, and what concerns announcements.

All of them may be lost: an envelope that is not acknowledged comes again, and a heartbeat shows again which
announcement its receiver lacks. They are gathered for a moment, because one signature can acknowledge a thousand
envelopes; but where an encryptor waits for an acknowledgement it goes at once, and only what comes while one is being
signed is gathered. Each peer is answered by itself: one that does not take its answers keeps no other waiting.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from skipbus.services.syncer.outgoing import OutgoingEnvelope
from skipbus.services.syncer.payloads import MAX_ACKNOWLEDGED, pack_acknowledgement, pack_capabilities, pack_complaint
from skipbus.services.syncer.transport import Transport
from skipbus.shared.errors import BackendError
from skipbus.shared.logs import get_logger
from skipbus.shared.protocol.envelopes import EnvelopeType

GATHER_SECONDS = 0.05
# An announcement is large, and whoever replays an envelope must not get one for each.
ASK_EVERY_SECONDS = 3.0
ANSWER_EVERY_SECONDS = 1.0
KEEP_ANNOUNCEMENT_SECONDS = 0.5
# Refusals that a peer is told of in a second. Only its own envelopes cause them, but somebody may play those back.
COMPLAINTS_PER_SECOND = 20
# Numbers that wait for a peer which does not take its answers; what is dropped is acknowledged when it comes again.
MAX_WAITING = 20 * MAX_ACKNOWLEDGED

_log = get_logger("replies")


@dataclass(slots=True)
class _Peer:
    """What one peer is to be told."""

    stored: set[int] = field(default_factory=set)
    complaints: list[bytes] = field(default_factory=list)
    ask: bool = False
    tell: bool = False
    second: int = 0
    complained: int = 0
    hurry: asyncio.Event = field(default_factory=asyncio.Event)
    busy: bool = False

    @property
    def waiting(self) -> bool:
        """Whether there is anything to tell."""
        return bool(self.stored or self.complaints or self.ask or self.tell)


class Replies:
    """``fetch_announcement`` blocks and gives the local KP's announcement as it stands in the store."""

    def __init__(self, transport: Transport, fetch_announcement: Callable[[], bytes | None]) -> None:
        self._transport = transport
        self._fetch_announcement = fetch_announcement
        self._peers: dict[str, _Peer] = {}
        self._asked: dict[str, float] = {}
        self._told: dict[str, float] = {}
        self._claimed: dict[str, float] = {}
        self._finished = asyncio.Event()
        self._tasks: asyncio.TaskGroup | None = None
        self._announcement_lock = asyncio.Lock()
        self._announcement: tuple[float, bytes | None] = (-KEEP_ANNOUNCEMENT_SECONDS, None)

    def acknowledge(self, peer_id: str, number: int, *, at_once: bool = False) -> None:
        """The effect of the peer's envelope is committed; ``at_once`` where somebody waits to hear that."""
        peer = self._peer(peer_id)
        if len(peer.stored) < MAX_WAITING:
            peer.stored.add(number)
        self._start(peer_id, peer, at_once=at_once)

    def complain(self, peer_id: str, number: int, reason: str, explanation: str, *, verified: bool) -> None:
        """The peer's envelope is refused; not ``verified`` where it is only said to be the peer's."""
        if not verified and not _may(self._claimed, peer_id, ANSWER_EVERY_SECONDS):
            return
        peer = self._peer(peer_id)
        second = int(time.monotonic())
        if second != peer.second:
            peer.second, peer.complained = second, 0
        if peer.complained < COMPLAINTS_PER_SECOND and len(peer.complaints) < COMPLAINTS_PER_SECOND:
            peer.complained += 1
            peer.complaints.append(pack_complaint(number, reason, explanation))
            self._start(peer_id, peer, at_once=True)

    def ask(self, peer_id: str) -> None:
        """The peer has an announcement that this KP does not have."""
        if _may(self._asked, peer_id, ASK_EVERY_SECONDS):
            peer = self._peer(peer_id)
            peer.ask = True
            self._start(peer_id, peer)

    def tell(self, peer_id: str) -> None:
        """The peer shall have this KP's announcement."""
        if _may(self._told, peer_id, ANSWER_EVERY_SECONDS):
            peer = self._peer(peer_id)
            peer.tell = True
            self._start(peer_id, peer)

    def finish(self) -> None:
        """No more will come: ``run`` sends what there is and returns."""
        self._finished.set()

    async def run(self) -> None:
        """Until ``finish``; then what is to be told is still sent."""
        async with asyncio.TaskGroup() as self._tasks:
            for peer_id, peer in list(self._peers.items()):
                self._start(peer_id, peer)
            await self._finished.wait()
            for peer in self._peers.values():
                peer.hurry.set()

    def _peer(self, peer_id: str) -> _Peer:
        return self._peers.setdefault(peer_id, _Peer())

    def _start(self, peer_id: str, peer: _Peer, *, at_once: bool = False) -> None:
        if at_once or self._finished.is_set():
            peer.hurry.set()
        if peer.waiting and not peer.busy and self._tasks is not None:
            peer.busy = True
            self._tasks.create_task(self._answer(peer_id, peer), name=f"replies {peer_id}")

    async def _answer(self, peer_id: str, peer: _Peer) -> None:
        """Sends until there is nothing more; the next reply starts it anew."""
        try:
            while peer.waiting:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(GATHER_SECONDS):
                        await peer.hurry.wait()
                peer.hurry.clear()
                await self._transport.send(await self._take(peer_id, peer))
        finally:
            peer.busy = False

    async def _take(self, peer_id: str, peer: _Peer) -> list[OutgoingEnvelope]:
        stored, peer.stored = sorted(peer.stored), set()
        complaints, peer.complaints = peer.complaints, []
        ask, tell, peer.ask, peer.tell = peer.ask, peer.tell, False, False
        said = [
            (EnvelopeType.KEY_STORED, pack_acknowledgement(stored[start : start + MAX_ACKNOWLEDGED]))
            for start in range(0, len(stored), MAX_ACKNOWLEDGED)
        ]
        said += [(EnvelopeType.ENVELOPE_REFUSED, complaint) for complaint in complaints]
        if ask:
            said.append((EnvelopeType.CAPABILITIES, pack_capabilities(None, request=True)))
        announcement = await self._read_announcement() if tell else None
        if announcement is not None:
            said.append((EnvelopeType.CAPABILITIES, pack_capabilities(announcement, request=False)))
        return [OutgoingEnvelope(kind, peer_id, payload) for kind, payload in said]

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


def _may(last: dict[str, float], peer_id: str, every_seconds: float) -> bool:
    now = time.monotonic()
    if now - last.get(peer_id, -every_seconds) < every_seconds:
        return False
    last[peer_id] = now
    return True
