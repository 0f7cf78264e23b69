"""Drops stock that is too old to be useful, and notifies the peer, which holds the other half of it.

Keys are made and given out by the api, because the syncer never sees one in clear. Here is only what follows from
time and from the peer's word. A key in stock is useful while at least half of its lifetime would be left at the target.
It is not given out after that, dropped or not, and no longer counted for a while before that, so that its successor is
there. Two checks in that time are early enough.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence

from sqlalchemy import Connection, Engine

from skipbus.services.syncer.leader import Leader
from skipbus.services.syncer.outbox import STOCK_DROPPED
from skipbus.shared.clock import now_ms
from skipbus.shared.logging import get_logger
from skipbus.shared.protocol.keys import counted_before_ms
from skipbus.shared.settings import Settings
from skipbus.shared.store import outbox, stock
from skipbus.shared.store.engine import driver_errors
from skipbus.shared.store.outbox import OutboxRow
from skipbus.shared.store.stock import StockRow

BATCH = 1_000

_log = get_logger("stock")


class StockExpiry:
    """Works only while this syncer is the elected one. ``on_change`` is called on the event loop after a change."""

    def __init__(self, settings: Settings, engine: Engine, leader: Leader, on_change: Callable[[], None]) -> None:
        self._local_id = settings.local_system_id
        self._useful_ms = settings.key_ttl_seconds * 1000 // 2
        self._bus_ids = frozenset(peer.system_id for peer in settings.bus_peers)
        self._engine = engine
        self._leader = leader
        self._check_seconds = counted_before_ms(settings.key_ttl_seconds) / 2000
        self._check_at = 0.0
        self._on_change = on_change

    async def tick(self) -> None:
        """Drops what has grown too old, where it is time to check. Raises StoreUnavailable, StoreRefused."""
        now = time.monotonic()
        if not self._leader.elected or now < self._check_at:
            return
        changed = await asyncio.to_thread(self._drop_old)
        self._check_at = now + self._check_seconds
        if changed:
            self._on_change()

    def _drop_old(self) -> bool:
        with driver_errors(), self._engine.connect() as connection:
            oldest_ms = stock.fetch_oldest_stock(connection, self._local_id)
        at_ms = now_ms()
        old = [peer_id for peer_id, expires_ms in oldest_ms.items() if expires_ms < at_ms + self._useful_ms]
        dropped = {peer_id: self._drop_of(peer_id, at_ms) for peer_id in old}
        for peer_id, count in dropped.items():
            if count:
                _log.info("stock too old, dropped", peer=peer_id, count=count)
        return any(dropped.values())

    def _drop_of(self, peer_id: str, at_ms: int) -> int:
        total = 0
        while True:
            with driver_errors(), self._engine.begin() as connection:
                rows = stock.claim_old_stock(connection, self._local_id, peer_id, at_ms + self._useful_ms, BATCH)
                if rows:
                    self._drop(connection, peer_id, rows, at_ms)
            total += len(rows)
            if len(rows) < BATCH:
                return total

    def _drop(self, connection: Connection, peer_id: str, rows: Sequence[StockRow], at_ms: int) -> None:
        tokens = {row.token for row in rows if not row.placed}
        waiting = outbox.fetch_rows_of_tokens(connection, tokens)
        if waiting:
            outbox.delete_rows(connection, [row_id for row_id, _, _ in waiting])
        stock.delete_stock(connection, [row.key_id for row in rows])
        # What was in no envelope cannot be at the peer; everything else may be.
        unsent = {token for _, token, number in waiting if number is None}
        sent = [row for row in rows if row.placed or row.token not in unsent]
        if sent and peer_id in self._bus_ids:
            _insert_dropped(connection, self._local_id, peer_id, sent, at_ms)


def drop_rejected_stock(
    connection: Connection, local_id: str, peer_id: str, tokens: Mapping[int, bytes], now_ms: int
) -> None:
    """Drops stock that the peer will never take; ``tokens`` by the ids of the outbox rows that carry it."""
    rows = stock.claim_stock_of_tokens(connection, local_id, tokens.values())
    outbox.delete_rows(connection, list(tokens))
    if rows:
        stock.delete_stock(connection, [row.key_id for row in rows])
        # The rejection may be an old one, played back: perhaps the peer has them all the same.
        _insert_dropped(connection, local_id, peer_id, rows, now_ms)


def _insert_dropped(connection: Connection, local_id: str, peer_id: str, rows: Sequence[StockRow], at_ms: int) -> None:
    keys = [[row.key_id, row.expires_ms, ""] for row in rows]
    outbox.insert_outbox_rows(connection, [OutboxRow.of(local_id, peer_id, STOCK_DROPPED, keys, at_ms)])
