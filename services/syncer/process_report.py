"""Reports to the store, for /health, what this process does; and shows the same in its metrics."""

from __future__ import annotations

import asyncio
import time

from sqlalchemy import Engine

from skipbus.services.syncer import metrics
from skipbus.services.syncer.consume import QueueWithoutLeader
from skipbus.services.syncer.leader import Leader
from skipbus.shared.broker.connection import BrokerConnection, NeedsOperator
from skipbus.shared.broker.publishing import Publisher
from skipbus.shared.settings import Settings
from skipbus.shared.store.processes import report_process


class ProcessReport:
    """``ok`` for the elected syncer, if it has the broker; ``standby`` for another one; else what is wrong."""

    def __init__(
        self, settings: Settings, engine: Engine, broker: BrokerConnection, publisher: Publisher, leader: Leader
    ) -> None:
        self._local_id = settings.local_system_id
        self._seconds = settings.heartbeat_seconds
        self._engine = engine
        self._broker = broker
        self._publisher = publisher
        self._leader = leader
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
            await asyncio.to_thread(report_process, self._engine, self._local_id, "syncer", state)
            self._written, self._due_at = state, now + self._seconds

    def _broker_fault(self) -> str | None:
        """What /health says of this process while the broker cannot be used."""
        if not self._broker.up.is_set():
            fault = self._broker.fault
            return str(fault) if isinstance(fault, NeedsOperator) else "no connection to the broker"
        if self._publisher.silent:
            return "the broker does not confirm messages: check its disk and memory alarms"
        return None
