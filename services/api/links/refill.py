"""Makes stock: one elected api process fills every bus peer's stock up when it is at or below its low mark.

The api does it and not the syncer, because it is the one process that may see a key in clear (decision 16). A refill
is made in batches: one transaction with this KP's own copies, sealed to itself, and one outbox row with the same keys
sealed to the peer. What is on its way counts as there, so a peer that is away, or never acknowledges, gets no more than
the high mark. What is about to become too old to be given out no longer counts, so that its successor is there in time.

Every api process counts, to know what is worth claiming; in between it subtracts what it took itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from sqlalchemy import Engine

from skipbus.services.api import metrics
from skipbus.services.api.issuing import Sealer, no_entropy
from skipbus.services.api.links.placing import pack_records
from skipbus.services.api.links.stock import usable_until_ms
from skipbus.shared.clock import now_ms
from skipbus.shared.config import MySqlSettings, PeerSettings, Settings
from skipbus.shared.crypto.sealing import KeyRecord
from skipbus.shared.errors import BackendError, PeerNotReady, SkipbusError
from skipbus.shared.lifecycle import next_beat
from skipbus.shared.logs import get_logger
from skipbus.shared.protocol.keys import DEFAULT_KEY_BITS, counted_before_ms, new_key_id
from skipbus.shared.store.election import Election
from skipbus.shared.store.engine import driver_errors
from skipbus.shared.store.packets import OutboxRow
from skipbus.shared.store.placing import KEY_STOCKED
from skipbus.shared.store.steps import StepsRunner
from skipbus.shared.store.stock import StockLevel, fetch_held_counts, fetch_stock_level
from skipbus.shared.store.stock_steps import commit_stocked

BATCH = 500
ROUND_SECONDS = 1.0
# A stock that was left alone for so long is filled up, though it is above its low mark: the next cut may be long.
QUIET_SECONDS = 3.0
# Counting a large stock takes time; it may have this share of it.
_COUNTING_SHARE = 0.05
_SHORTEST_PAUSE_SECONDS = 0.05

_log = get_logger("stock")


def counted_until_ms(at_ms: int, key_ttl_seconds: int) -> int:
    """How long (UTC ms) a key must live to count as stock: a little longer than to be given out."""
    return usable_until_ms(at_ms, key_ttl_seconds) + counted_before_ms(key_ttl_seconds)


def low_mark(peer: PeerSettings) -> int:
    """At so many keys, or fewer, the stock is filled up."""
    return peer.stock // 2


@dataclass(frozen=True)
class StockReading:
    """What was counted, and how long that took: usable stock by peer, and others' stock that waits here, by source."""

    levels: Mapping[str, StockLevel]
    held: Mapping[str, int]
    seconds: float = 0.0


class StockMaker:
    """Makes keys for stock, on a connection of its own. Blocking; of one thread at a time."""

    def __init__(self, mysql: MySqlSettings, local_id: str, key_ttl_seconds: int, sealer: Sealer) -> None:
        self._runner = StepsRunner(mysql)
        self._local_id = local_id
        self._ttl_ms = key_ttl_seconds * 1000
        self._sealer = sealer

    def make(self, peer_id: str, count: int) -> None:
        """Commits ``count`` new keys. Raises PeerNotReady where either side has no epoch, BackendError."""
        at_ms = now_ms()
        theirs = self._sealer.wrapping_key_for(peer_id, at_ms)
        ours = self._sealer.wrapping_key_for(self._local_id, at_ms)
        # Neither record must outlive the private half that opens it.
        expires_ms = min(at_ms + self._ttl_ms, theirs.key.expires_ms, ours.key.expires_ms)
        if expires_ms < counted_until_ms(at_ms, self._ttl_ms // 1000):
            # It would be dropped as too old at once, and made again, for ever.
            raise PeerNotReady(
                f"a key for {peer_id} would live for {(expires_ms - at_ms) // 1000} s, and stock must have half of "
                f"{self._ttl_ms // 1000} s left: SKIP_KEY_TTL_SECONDS differs too much between the two, or was changed"
            )
        correlation_id = f"stock-{secrets.token_hex(8)}"
        records: list[KeyRecord] = []
        copies: list[KeyRecord] = []
        for _ in range(count):
            key_id, key = _fresh_key()
            records.append(theirs.key.seal(key_id, key, expires_ms, correlation_id))
            copies.append(ours.key.seal(key_id, key, expires_ms, "", peer_id.encode()))
        row = OutboxRow(
            self._local_id, peer_id, KEY_STOCKED, pack_records(records), count, at_ms, secrets.token_bytes(16)
        )
        unstored = [current.unstored for current in (theirs, ours) if current.unstored]
        self._runner.run(commit_stocked(copies, unstored, row))
        theirs.unstored = ours.unstored = None

    def close(self) -> None:
        """Gives its connection back."""
        self._runner.close()


def _fresh_key() -> tuple[bytes, bytes]:
    try:
        return new_key_id(), os.urandom(DEFAULT_KEY_BITS // 8)
    except OSError as error:
        raise no_entropy() from error


class StockKeeper:
    """Counts stock and has it made. ``on_made`` is called on the event loop when there are new outbox rows."""

    def __init__(self, settings: Settings, engine: Engine, maker: StockMaker, on_made: Callable[[], None]) -> None:
        self._local_id = settings.local_system_id
        self._key_ttl_seconds = settings.key_ttl_seconds
        self._peers = {peer.system_id: peer for peer in settings.bus_peers if peer.stock > 0}
        self._engine = engine
        self._maker = maker
        self._on_made = on_made
        self._election = Election(settings.mysql, f"stock {self._local_id}")
        self._elected = False
        self._wake = asyncio.Event()
        self._taken: dict[str, int] = {}
        self._seen: dict[str, tuple[int, float]] = {}
        self._asked: set[str] = set()
        self._empty: set[str] = set()
        self._filling: set[str] = set()
        self._unready: set[str] = set()
        self.reading = StockReading({}, {})

    def has(self, peer_id: str) -> bool:
        """Whether a claim is worth a try: the last count found some, and no claim has come back empty since.

        What was taken is not subtracted: a count that runs meanwhile may know of it already, and to pass over the
        last keys in stock fails a request when the peer is out of reach. A try in vain costs one look.
        """
        level = self.reading.levels.get(peer_id)
        return level is not None and level.placed > 0 and peer_id not in self._empty

    def note_taken(self, peer_id: str) -> bool:
        """One key was given out; whether the stock has come down to its low mark since it was counted."""
        taken = self._taken[peer_id] = self._taken.get(peer_id, 0) + 1
        level = self.reading.levels.get(peer_id, StockLevel())
        if peer_id in self._asked or level.placed + level.in_flight - taken > low_mark(self._peers[peer_id]):
            return False
        self._asked.add(peer_id)
        return True

    def note_empty(self, peer_id: str) -> None:
        """A claim found nothing: none is worth a try until stock is counted again."""
        self._empty.add(peer_id)

    def wake(self) -> None:
        """Stock was used, or placed: count it now."""
        self._wake.set()

    async def run(self, stop: asyncio.Event) -> None:
        """Counts once a second, or when woken, until ``stop``. A store that is away is told by others."""
        while not stop.is_set():
            try:
                await self._round(stop)
            except BackendError as error:
                _log.debug("stock not kept", reason=str(error))
            await self._rest()

    def close(self) -> None:
        """Gives up the election and the connection."""
        self._election.release()
        self._maker.close()

    async def _round(self, stop: asyncio.Event) -> None:
        """Counts, and makes what is missing for at most a second, so that the count does not grow old meanwhile."""
        self._wake.clear()
        counted_from = dict(self._taken)
        reading, elected = await asyncio.to_thread(self._look)
        self._take_over(reading, counted_from)
        if not elected:
            return
        due = {peer_id: missing for peer_id in self._peers if (missing := self._missing(peer_id))}
        until = time.monotonic() + ROUND_SECONDS
        while due and time.monotonic() < until and not stop.is_set():
            started = time.monotonic()
            # Peers in turn: a large stock for one must not keep the others waiting.
            due = {peer_id: left for peer_id, count in due.items() if (left := await self._make_some(peer_id, count))}
            # Requests get the processor for as long as this had it.
            await asyncio.sleep(time.monotonic() - started)

    async def _make_some(self, peer_id: str, missing: int) -> int:
        """Makes one batch; how many are missing then that can be made now."""
        count = min(missing, BATCH)
        try:
            await asyncio.to_thread(self._maker.make, peer_id, count)
        except BackendError:
            raise
        except SkipbusError as error:
            self._tell_unready(peer_id, str(error))
            return 0
        self._unready.discard(peer_id)
        metrics.count_stocked(peer_id, count)
        self._on_made()
        return missing - count

    def _missing(self, peer_id: str) -> int:
        """How many keys to make for a peer now: none, or, once it is time, all up to the high mark."""
        peer, level = self._peers[peer_id], self.reading.levels[peer_id]
        total, now = level.placed + level.in_flight, time.monotonic()
        seen, since = self._seen.get(peer_id, (-1, now))
        if seen != total:
            self._seen[peer_id] = seen, since = total, now
        if total >= peer.stock:
            self._filling.discard(peer_id)
        elif total <= low_mark(peer) or now - since >= QUIET_SECONDS:
            self._filling.add(peer_id)
        return peer.stock - total if peer_id in self._filling else 0

    def _take_over(self, reading: StockReading, counted_from: Mapping[str, int]) -> None:
        # What was taken while it was counted may be in the count or not. To subtract it is the cautious guess, and
        # the next count puts it right.
        self._taken = {peer_id: n - counted_from.get(peer_id, 0) for peer_id, n in self._taken.items()}
        self._asked.clear()
        self._empty.clear()
        self.reading = reading
        for peer_id, level in reading.levels.items():
            metrics.show_stock(peer_id, level.placed, level.in_flight)

    def _look(self) -> tuple[StockReading, bool]:
        return self._count(), self._is_elected()

    def _count(self) -> StockReading:
        started, until_ms = time.monotonic(), counted_until_ms(now_ms(), self._key_ttl_seconds)
        with driver_errors(), self._engine.begin() as connection:
            levels = {
                peer_id: fetch_stock_level(connection, self._local_id, peer_id, until_ms) for peer_id in self._peers
            }
            held = fetch_held_counts(connection, self._local_id)
        return StockReading(levels, held, time.monotonic() - started)

    def _is_elected(self) -> bool:
        elected = bool(self._peers) and (self._election.held() or self._election.acquire())
        if elected != self._elected:
            _log.info("elected" if elected else "not elected")
        self._elected = elected
        return elected

    def _tell_unready(self, peer_id: str, reason: str) -> None:
        if peer_id not in self._unready:
            _log.warning("no stock can be made", peer=peer_id, reason=reason)
        self._unready.add(peer_id)

    async def _rest(self) -> None:
        """Until the next beat, or until woken; counting again has to wait for a while all the same."""
        loop = asyncio.get_running_loop()
        earliest = loop.time() + max(_SHORTEST_PAUSE_SECONDS, self.reading.seconds / _COUNTING_SHARE)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(next_beat(loop.time(), ROUND_SECONDS)):
                await self._wake.wait()
        await asyncio.sleep(earliest - loop.time())
