"""Heartbeats: to every peer, that this KP lives and which announcement is its current one; and the sign of life of this
process in the store, for /health.

A KP that has not announced itself is unknown to everybody, so it sends nothing until its janitor has. A new
announcement is sent to all peers immediately.
"""

from __future__ import annotations

import asyncio
import os
import random
import socket
import time

from sqlalchemy import Engine

from skipbus.services.syncer import metrics
from skipbus.services.syncer.consume import QueueWithoutLeader
from skipbus.services.syncer.leader import Leader
from skipbus.services.syncer.replies import Replies
from skipbus.services.syncer.transport import OutgoingEnvelope, Transport
from skipbus.shared.broker.connection import BrokerConnection, NeedsOperator
from skipbus.shared.broker.publishing import Publisher
from skipbus.shared.clock import now_ms
from skipbus.shared.lifecycle import pause
from skipbus.shared.peer_directory import PeerDirectory
from skipbus.shared.protocol.envelopes import EnvelopeType
from skipbus.shared.protocol.payloads import pack_heartbeat
from skipbus.shared.settings import Settings, project_version
from skipbus.shared.store.engine import driver_errors
from skipbus.shared.store.processes import upsert_process

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


class SignsOfLife:
    """Writes to the store, for /health, what this process does: ``ok`` for the elected syncer, if it has the broker."""

    def __init__(
        self, settings: Settings, engine: Engine, broker: BrokerConnection, publisher: Publisher, leader: Leader
    ) -> None:
        self._local_id = settings.local_system_id
        self._seconds = settings.heartbeat_seconds
        self._engine = engine
        self._broker = broker
        self._publisher = publisher
        self._leader = leader
        self._instance = f"{socket.gethostname()}:{os.getpid()}"
        self._written, self._due_at = "", 0.0

    async def tick(self) -> None:
        """To be called every second: writes every ``heartbeat_seconds``, and immediately after a change.

        Raises StoreUnavailable, StoreRefused.
        """
        fault = self._broker_fault()
        metrics.BUS_UP.set(fault is None)
        metrics.QUEUE_WITHOUT_LEADER.set(isinstance(self._broker.fault, QueueWithoutLeader))
        state, now = fault or ("ok" if self._leader.elected else "standby"), time.monotonic()
        if state != self._written or now >= self._due_at:
            await asyncio.to_thread(self._write, state)
            self._written, self._due_at = state, now + self._seconds

    def _broker_fault(self) -> str | None:
        """What /health says of this process while the broker cannot be used."""
        if not self._broker.up.is_set():
            fault = self._broker.fault
            return str(fault) if isinstance(fault, NeedsOperator) else "no connection to the broker"
        if self._publisher.silent:
            return "the broker does not confirm messages: check its disk and memory alarms"
        return None

    def _write(self, state: str) -> None:
        with driver_errors(), self._engine.begin() as connection:
            upsert_process(connection, self._local_id, "syncer", self._instance, now_ms(), state)
