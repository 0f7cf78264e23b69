"""Tells every peer that this KP lives and which announcement is its current one; a new one is sent to all at once.

A KP that has not announced itself is a stranger to everybody, so it says nothing until its janitor has.
"""

from __future__ import annotations

import asyncio
import random

from skipbus.services.syncer.leader import Leader
from skipbus.services.syncer.outgoing import Letter, Outgoing
from skipbus.services.syncer.payloads import pack_heartbeat
from skipbus.services.syncer.replies import Replies
from skipbus.shared.lifecycle import pause
from skipbus.shared.peer_directory import PeerDirectory
from skipbus.shared.protocol.envelopes import EnvelopeType
from skipbus.shared.settings import Settings, project_version

JITTER = 0.1
CHUNK = 64
_CHECK_SECONDS = 0.5


class Heartbeats:
    """Works only while this syncer is the elected one."""

    def __init__(
        self,
        settings: Settings,
        directory: PeerDirectory,
        leader: Leader,
        outgoing: Outgoing,
        replies: Replies,
    ) -> None:
        self._settings = settings
        self._directory = directory
        self._leader = leader
        self._outgoing = outgoing
        self._replies = replies
        self._software = f"skipbus/{project_version()}"
        self._digest: bytes | None = None

    async def run(self, stop: asyncio.Event) -> None:
        """Every ``heartbeat_seconds``, give or take a tenth so that many KPs do not beat as one."""
        while not stop.is_set():
            beaten = await self._beat()
            spread = random.uniform(1 - JITTER, 1 + JITTER)  # noqa: S311 -- spreads load, no secret
            seconds = self._settings.heartbeat_seconds * spread
            await pause(stop, seconds if beaten else min(seconds, _CHECK_SECONDS))

    async def _beat(self) -> bool:
        """One heartbeat to every peer; False where none could be sent."""
        digest = self._directory.digest(self._settings.local_system_id)
        peers = self._directory.peers()
        if not self._leader.elected or digest is None or not any(map(self._outgoing.is_reachable, peers)):
            return False
        if self._digest not in (None, digest):
            for peer_id in peers:
                self._replies.tell(peer_id)
        self._digest = digest
        payload = pack_heartbeat(round(self._settings.heartbeat_seconds * 1000), digest, self._software)
        for start in range(0, len(peers), CHUNK):
            chunk = peers[start : start + CHUNK]
            await self._outgoing.send([Letter(EnvelopeType.HEARTBEAT, peer, payload) for peer in chunk])
        return True
