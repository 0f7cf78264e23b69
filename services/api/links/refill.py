"""Refills stock: one elected api process fills every bus peer's stock up when it is at or below its low mark.

The api does it and not the syncer, because only an api may have a key in clear (decision 16). One transaction stores
this KP's own copies, sealed to itself, and an outbox row with the same keys sealed to the peer. What is on its way
counts as there, so a peer that never acknowledges gets no more than the high mark. A key that will soon be too old to
be given out no longer counts, so that its successor is there in time. Every api process counts, to know what to claim.
"""

from __future__ import annotations

import asyncio
import functools
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from sqlalchemy import Engine

from skipbus.services.api import metrics
from skipbus.services.api.links.placing import sealed_row
from skipbus.services.api.links.sealing import Sealer
from skipbus.services.api.links.stock_claim import usable_until_ms
from skipbus.services.api.links.store import new_key
from skipbus.shared.clock import now_ms
from skipbus.shared.errors import BackendError, PeerNotReady, SkipbusError
from skipbus.shared.lifecycle import every
from skipbus.shared.logging import get_logger
from skipbus.shared.protocol.keys import DEFAULT_KEY_BITS, counted_before_ms
from skipbus.shared.settings import Settings
from skipbus.shared.store.election import Election
from skipbus.shared.store.engine import driver_errors
from skipbus.shared.store.outbox import KEY_STOCKED, TOKEN_BYTES, insert_outbox_rows
from skipbus.shared.store.stock import (
    StockLevel,
    delete_stock_held,
    fetch_held_counts,
    fetch_stock_level,
    insert_stock,
)

BATCH = 500
ROUND_SECONDS = 1.0
# A stock above its low mark is filled up too when no key was taken for so long: the link may fail for long.
QUIET_SECONDS = 3.0
# Counting a large stock takes time; it may have this share of it.
_COUNTING_SHARE = 0.05
_SHORTEST_PAUSE_SECONDS = 0.05
# The probes expect a count more often than every 15 s.
_LONGEST_PAUSE_SECONDS = 5.0
# Retrieved keys that the next count deletes from ``stock_held``.
_MAX_RETRIEVED = 100_000

_log = get_logger("stock")


def counted_until_ms(at_ms: int, key_ttl_seconds: int) -> int:
    """Until when (UTC ms) a key must live to count as stock: a little longer than to be given out."""
    return usable_until_ms(at_ms, key_ttl_seconds) + counted_before_ms(key_ttl_seconds)


@dataclass(slots=True)
class PeerStock:
    """What this process knows of the stock for one peer, between two counts. ``changed_at`` is monotonic time."""

    high: int
    level: StockLevel = field(default_factory=StockLevel)
    changed_at: float = field(default_factory=time.monotonic)
    filling: bool = False
    taken: int = 0
    empty: bool = True
    low_reported: bool = False

    @property
    def low(self) -> int:
        """At so many keys, or fewer, the stock is filled up."""
        return self.high // 2

    @property
    def missing(self) -> int:
        """How many keys to make now: none, or, once it is time, all up to the high mark."""
        return self.high - self.level.total if self.filling else 0

    def take(self) -> bool:
        """One key was given out. Whether the low mark is reached, once for each count.

        The key is not taken off ``level``: a count that is under way may have seen that it is gone.
        """
        self.taken += 1
        if self.low_reported or self.level.total - self.taken > self.low:
            return False
        self.low_reported = True
        return True

    def count(self, level: StockLevel, now: float) -> None:
        """The stock was counted: decides whether it is to be filled up."""
        if level.total != self.level.total:
            self.changed_at = now
        self.level, self.empty, self.low_reported = level, level.placed == 0, False
        if level.total >= self.high:
            self.filling = False
        elif level.total <= self.low or now - self.changed_at >= QUIET_SECONDS:
            self.filling = True


_NO_STOCK = PeerStock(0)


class StockMaker:
    """Makes keys for stock. Blocking. Not thread-safe."""

    def __init__(self, engine: Engine, key_ttl_seconds: int, sealer: Sealer) -> None:
        self._engine = engine
        self._ttl_ms = key_ttl_seconds * 1000
        self._sealer = sealer

    def make(self, peer_id: str, count: int) -> None:
        """Commits ``count`` new keys. Raises PeerNotReady where either side has no epoch, BackendError, NoEntropy."""
        local_id, at_ms, token = self._sealer.local_id, now_ms(), secrets.token_bytes(TOKEN_BYTES)
        with driver_errors(), self._engine.connect() as connection:
            theirs = self._sealer.wrapping_key(connection, peer_id, at_ms)
            ours = self._sealer.wrapping_key(connection, local_id, at_ms)
            # No record must outlive the private half that opens it.
            expires_ms = min(at_ms + self._ttl_ms, theirs.expires_ms, ours.expires_ms)
            self._check_lifetime(peer_id, at_ms, expires_ms)
            correlation_id = f"stock-{secrets.token_hex(8)}"
            keys = [new_key(DEFAULT_KEY_BITS) for _ in range(count)]
            copies = [ours.seal(key_id, key, expires_ms, "", peer_id.encode()) for key_id, key in keys]
            records = [theirs.seal(key_id, key, expires_ms, correlation_id) for key_id, key in keys]
            insert_stock(connection, local_id, peer_id, token, copies)
            insert_outbox_rows(connection, [sealed_row(KEY_STOCKED, peer_id, token, records, at_ms)])
            connection.commit()

    def _check_lifetime(self, peer_id: str, at_ms: int, expires_ms: int) -> None:
        """A key that lives too briefly would be dropped as too old immediately, and made again without end."""
        if expires_ms < counted_until_ms(at_ms, self._ttl_ms // 1000):
            raise PeerNotReady(
                f"a key for {peer_id} would live for {(expires_ms - at_ms) // 1000} s, and stock must have half of "
                f"{self._ttl_ms // 1000} s left: SKIP_KEY_TTL_SECONDS differs too much between the two, or was changed"
            )


class _StockCount(NamedTuple):
    """What was counted, how long that took, and whether this process is the elected one."""

    levels: dict[str, StockLevel]
    held: dict[str, int]
    seconds: float
    elected: bool


class StockKeeper:
    """Counts stock and has it made. Not thread-safe: use it on one event loop.

    ``on_made`` is called when there are new outbox rows.
    """

    def __init__(self, settings: Settings, engine: Engine, maker: StockMaker, on_made: Callable[[], None]) -> None:
        self._local_id = settings.local_system_id
        self._key_ttl_seconds = settings.key_ttl_seconds
        self._engine = engine
        self._maker = maker
        self._on_made = on_made
        self._election = Election(engine, f"stock {self._local_id}")
        self._elected = False
        self._stocks = {peer.system_id: PeerStock(peer.stock) for peer in settings.bus_peers if peer.stock > 0}
        self._held: dict[str, int] = {}
        self._retrieved: list[tuple[str, bytes]] = []
        self._unready: set[str] = set()
        self._count_seconds = 0.0
        self._count_at = 0.0
        self._wake = asyncio.Event()

    def stock_for(self, peer_id: str) -> PeerStock:
        """What is known of the stock for a peer."""
        return self._stocks.get(peer_id, _NO_STOCK)

    def held_from(self, peer_id: str) -> int:
        """How much stock of a peer waits here."""
        return self._held.get(peer_id, 0)

    def note_retrieved(self, source_id: str, key_id: bytes) -> None:
        """A key was handed out here: the next count forgets that it was stock of its source.

        If that fails, the source's own event does it later.
        """
        if len(self._retrieved) < _MAX_RETRIEVED:
            self._retrieved.append((source_id, key_id))

    def wake(self) -> None:
        """Stock was used, or placed: counts it now."""
        self._wake.set()

    async def run(self, stop: asyncio.Event) -> None:
        """Counts once a second, or when woken, until ``stop``."""
        count = functools.partial(self._round, stop)
        # The task "store" logs for all where the store is away.
        await every(stop, ROUND_SECONDS, "stock", count, quiet=True, wake=self._wake)

    def close(self) -> None:
        """Gives up the election. Blocking."""
        self._election.release()

    async def _round(self, stop: asyncio.Event) -> None:
        """Counts, and makes what is missing for at most a second, so that the count stays fresh."""
        await self._pause_before_count()
        for stock in self._stocks.values():
            # What is taken during the count may be in it or not; the next count corrects that.
            stock.taken = 0
        retrieved, self._retrieved = self._retrieved, []
        reading = await asyncio.to_thread(self._read, retrieved)
        self._take_over(reading)
        due = {peer_id: stock.missing for peer_id, stock in self._stocks.items() if reading.elected and stock.missing}
        until = time.monotonic() + ROUND_SECONDS
        while due and time.monotonic() < until and not stop.is_set():
            started = time.monotonic()
            # Peers in turn: a large stock for one must not delay the others.
            due = {
                peer_id: left for peer_id, missing in due.items() if (left := await self._make_some(peer_id, missing))
            }
            # Requests get the processor for as long as this had it.
            await asyncio.sleep(time.monotonic() - started)

    async def _pause_before_count(self) -> None:
        """Keeps the share of counting small, also where somebody wakes this process without end."""
        await asyncio.sleep(self._count_at - time.monotonic())
        pause_seconds = max(_SHORTEST_PAUSE_SECONDS, self._count_seconds / _COUNTING_SHARE)
        self._count_at = time.monotonic() + min(pause_seconds, _LONGEST_PAUSE_SECONDS)

    def _take_over(self, counted: _StockCount) -> None:
        self._held, self._count_seconds = counted.held, counted.seconds
        for peer_id, level in counted.levels.items():
            self._stocks[peer_id].count(level, time.monotonic())
            metrics.show_stock(peer_id, level.placed, level.in_flight)

    async def _make_some(self, peer_id: str, missing: int) -> int:
        """Makes one batch; how many are missing then that can be made now."""
        count = min(missing, BATCH)
        try:
            await asyncio.to_thread(self._maker.make, peer_id, count)
        except BackendError:
            raise
        except SkipbusError as error:
            if peer_id not in self._unready:
                _log.warning("no stock can be made", peer=peer_id, reason=str(error))
            self._unready.add(peer_id)
            return 0
        self._unready.discard(peer_id)
        metrics.count_stocked(peer_id, count)
        self._on_made()
        return missing - count

    def _read(self, retrieved: Sequence[tuple[str, bytes]]) -> _StockCount:
        """Blocking."""
        started, until_ms = time.monotonic(), counted_until_ms(now_ms(), self._key_ttl_seconds)
        with driver_errors(), self._engine.begin() as connection:
            for source_id in {source_id for source_id, _ in retrieved}:
                key_ids = [key_id for its_source, key_id in retrieved if its_source == source_id]
                delete_stock_held(connection, self._local_id, source_id, key_ids)
            levels = {
                peer_id: fetch_stock_level(connection, self._local_id, peer_id, until_ms) for peer_id in self._stocks
            }
            held = fetch_held_counts(connection, self._local_id)
        return _StockCount(levels, held, time.monotonic() - started, self._is_elected())

    def _is_elected(self) -> bool:
        elected = bool(self._stocks) and self._election.tick()
        if elected != self._elected:
            _log.info("elected" if elected else "not elected", task="make stock")
        self._elected = elected
        return elected
