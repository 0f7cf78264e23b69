"""Answers to peers that need not wait in the store: acknowledgements, and asking for or sending announcements.

All of them may be lost: an envelope that is not acknowledged comes again, and a heartbeat shows again which
announcement its receiver lacks. They are gathered for a moment, because one signature can acknowledge a thousand
envelopes.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable

from services.syncer.outgoing import Letter, Outgoing
from services.syncer.payloads import MAX_ACKNOWLEDGED, pack_acknowledgement, pack_capabilities
from shared.envelopes import EnvelopeType
from shared.errors import BackendError
from shared.logs import get_logger

GATHER_SECONDS = 0.05
# An announcement is large, and whoever replays an envelope must not get one for each.
ASK_EVERY_SECONDS = 3.0
ANSWER_EVERY_SECONDS = 1.0

_log = get_logger("replies")


class Replies:
    """``fetch_announcement`` blocks and gives the local KP's announcement as it stands in the store."""

    def __init__(self, outgoing: Outgoing, fetch_announcement: Callable[[], bytes | None]) -> None:
        self._outgoing = outgoing
        self._fetch_announcement = fetch_announcement
        self._stored: dict[str, set[int]] = defaultdict(set)
        self._to_ask: set[str] = set()
        self._to_tell: set[str] = set()
        self._asked: dict[str, float] = {}
        self._told: dict[str, float] = {}
        self._wake = asyncio.Event()
        self._finished = False

    def acknowledge(self, peer_id: str, number: int) -> None:
        """The effect of the peer's envelope is committed."""
        self._stored[peer_id].add(number)
        self._wake.set()

    def ask(self, peer_id: str) -> None:
        """The peer has an announcement that this KP does not have."""
        if _may(self._asked, peer_id, ASK_EVERY_SECONDS):
            self._to_ask.add(peer_id)
            self._wake.set()

    def tell(self, peer_id: str) -> None:
        """The peer shall have this KP's announcement."""
        if _may(self._told, peer_id, ANSWER_EVERY_SECONDS):
            self._to_tell.add(peer_id)
            self._wake.set()

    def finish(self) -> None:
        """No more will come: ``run`` sends what there is and returns."""
        self._finished = True
        self._wake.set()

    async def run(self) -> None:
        """Sends replies until ``finish``."""
        while True:
            await self._wake.wait()
            if not self._finished:
                await asyncio.sleep(GATHER_SECONDS)
            self._wake.clear()
            finished = self._finished
            await self._outgoing.send(self._acknowledgements() + await self._capabilities())
            if finished:
                return

    def _acknowledgements(self) -> list[Letter]:
        stored, self._stored = self._stored, defaultdict(set)
        letters = []
        for peer_id, numbers in stored.items():
            ordered = sorted(numbers)
            for start in range(0, len(ordered), MAX_ACKNOWLEDGED):
                payload = pack_acknowledgement(ordered[start : start + MAX_ACKNOWLEDGED])
                letters.append(Letter(EnvelopeType.KEY_STORED, peer_id, payload))
        return letters

    async def _capabilities(self) -> list[Letter]:
        to_ask, self._to_ask = self._to_ask, set()
        to_tell, self._to_tell = self._to_tell, set()
        request = pack_capabilities(None, request=True)
        letters = [Letter(EnvelopeType.CAPABILITIES, peer_id, request) for peer_id in sorted(to_ask)]
        announcement = await self._announcement() if to_tell else None
        if announcement is not None:
            answer = pack_capabilities(announcement, request=False)
            letters += [Letter(EnvelopeType.CAPABILITIES, peer_id, answer) for peer_id in sorted(to_tell)]
        return letters

    async def _announcement(self) -> bytes | None:
        try:
            return await asyncio.to_thread(self._fetch_announcement)
        except BackendError as error:
            _log.debug("announcement not sent", reason=str(error))
            return None


def _may(last: dict[str, float], peer_id: str, every_seconds: float) -> bool:
    now = time.monotonic()
    if now - last.get(peer_id, -every_seconds) < every_seconds:
        return False
    last[peer_id] = now
    return True
