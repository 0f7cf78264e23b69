"""Heartbeats: tell every peer that this KP lives, and which announcement is its current one.

A KP that has not announced itself is unknown to everybody, so it sends nothing until its janitor has. A new
announcement is sent to all peers immediately.
"""

from __future__ import annotations

import asyncio
import random

from skipbus.services.syncer.leader import Leader
from skipbus.services.syncer.replies import Replies
from skipbus.services.syncer.transport import OutgoingEnvelope, Transport
from skipbus.shared.lifecycle import pause
from skipbus.shared.peer_directory import PeerDirectory
from skipbus.shared.protocol.envelopes import EnvelopeType
from skipbus.shared.protocol.payloads import pack_heartbeat
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
        transport: Transport,
        replies: Replies,
    ) -> None:
        self._local_id = settings.local_system_id
        self._seconds = settings.heartbeat_seconds
        self._directory = directory
        self._leader = leader
        self._transport = transport
        self._replies = replies
        self._software = f"skipbus/{project_version()}"
        self._digest: bytes | None = None

    async def run(self, stop: asyncio.Event) -> None:
        """Every ``heartbeat_seconds``, give or take a tenth so that many KPs do not send at the same moment."""
        while not stop.is_set():
            sent = await self._send()
            seconds = self._seconds * random.uniform(1 - JITTER, 1 + JITTER)  # noqa: S311 -- spreads load, no secret
            await pause(stop, seconds if sent else min(seconds, _CHECK_SECONDS))

    async def _send(self) -> bool:
        """One heartbeat to every peer; False where none could be sent."""
        digest = self._directory.digest(self._local_id)
        peers = self._directory.peers()
        if not self._leader.elected or digest is None or not any(map(self._transport.is_reachable, peers)):
            return False
        if self._digest not in (None, digest):
            for peer_id in peers:
                self._replies.send_announcement(peer_id)
        self._digest = digest
        payload = pack_heartbeat(round(self._seconds * 1000), digest, self._software)
        for start in range(0, len(peers), CHUNK):
            chunk = peers[start : start + CHUNK]
            await self._transport.send([OutgoingEnvelope(EnvelopeType.HEARTBEAT, peer, payload) for peer in chunk])
        return True
