"""The bus links of an api process: keys for peers that have a store of their own.

Puts together what a bus link takes (placing on demand, stock, settling, arrivals, notifications) behind two methods,
``issue`` and ``claim``. A process whose peers are all in its own store makes none of this.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from sqlalchemy import Engine

from skipbus.services.api import metrics
from skipbus.services.api.batching import Lane
from skipbus.services.api.issuing import Sealer
from skipbus.services.api.lanes import make_lane
from skipbus.services.api.links import ClaimedKey, IssuedKey, IssueRequest, Link
from skipbus.services.api.links.arrivals import Arrivals
from skipbus.services.api.links.confirmation import Settler
from skipbus.services.api.links.placing import MAX_BATCH, Outcome, PlaceBatch, PlacedKey, SettleBatch, Settlement
from skipbus.services.api.links.refill import StockKeeper, StockMaker, low_mark
from skipbus.services.api.links.stock import StockClaimBatch, StockOpener, StockRequest
from skipbus.shared.broker.connection import BrokerConnection
from skipbus.shared.broker.notifications import FOR_API, NotificationKind, Notifier
from skipbus.shared.broker.publishing import Publisher
from skipbus.shared.config import Settings
from skipbus.shared.crypto.keyring import Keyring
from skipbus.shared.errors import Overloaded, PeerNotReady
from skipbus.shared.lifecycle import every
from skipbus.shared.peer_directory import PeerDirectory
from skipbus.shared.protocol.keys import DEFAULT_KEY_BITS

_TIDY_SECONDS = 1.0


@dataclass(frozen=True)
class _Lanes:
    """Each has a connection of its own."""

    place: Lane[IssueRequest, PlacedKey]
    stock: Lane[StockRequest, IssuedKey | None]
    settle: Lane[Settlement, Outcome]

    async def close(self) -> None:
        for lane in (self.place, self.stock, self.settle):
            await lane.close()


class BusLinks:
    """Of one event loop. Works only inside ``running``."""

    def __init__(
        self, settings: Settings, keyring: Keyring, directory: PeerDirectory, engine: Engine, store: Link
    ) -> None:
        """``store`` claims what has arrived."""
        local_id = settings.local_system_id
        self._settings = settings
        self._peers = {peer.system_id: peer for peer in settings.bus_peers}
        self._directory = directory
        self._store = store
        # One for the lane, on the event loop, and one for the thread that makes stock: neither may meet the other.
        self._sealers = [Sealer(local_id, keyring.identity, directory) for _ in range(2)]
        # Of the stock lane alone.
        self._opener = StockOpener(keyring, directory)
        self._lanes = _make_lanes(settings, self._sealers[0], self._opener)
        self._settler = Settler(self._lanes.settle, settings.sync_timeout_seconds, settings.max_queue)
        self._arrivals = Arrivals(settings.retrieve_wait_seconds)
        maker = StockMaker(settings.mysql, local_id, settings.key_ttl_seconds, self._sealers[1])
        self._keeper = StockKeeper(settings, engine, maker, self._tell_outbox)
        self._notifier = Notifier(local_id, self._on_notification, FOR_API)
        self.publisher = Publisher()
        self._broker = BrokerConnection(settings.rabbitmq_url, f"skip-api {local_id}", [self.publisher, self._notifier])

    def covers(self, system_id: str) -> bool:
        """Whether keys travel to and from this KP over a bus."""
        return system_id in self._peers

    async def issue(self, target_id: str, size_bits: int, correlation_id: str) -> IssuedKey:
        """A fresh key that the target can serve: out of stock, or placed there now.

        Raises PeerNotReady, NotPlaced, Overloaded, StoreUnavailable, NoEntropy.
        """
        if self._directory.get(target_id) is None:
            # Not even out of stock: whoever could open it there may be gone.
            raise not_usable_over_bus(target_id, identity_changed=target_id in self._directory.conflicts())
        if size_bits == DEFAULT_KEY_BITS and self._keeper.has(target_id):
            from_stock = await self._take_from_stock(target_id, correlation_id)
            if from_stock is not None:
                return from_stock
        return await self._place(target_id, size_bits, correlation_id)

    async def claim(self, source_id: str, key_id: bytes, correlation_id: str) -> ClaimedKey:
        """The key, waited for where the request is ahead of its arrival. Raises what a store link raises."""
        attempt = functools.partial(self._store.claim, source_id, key_id, correlation_id)
        claimed = await self._arrivals.claim(key_id, attempt)
        self._settler.release(source_id, key_id)
        return claimed

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Keeps a connection to the broker for as long as the block runs; gives everything back at its end."""
        try:
            async with self._broker.connected():
                yield
        finally:
            await self._close()

    async def keep_stock(self, stop: asyncio.Event) -> None:
        """Counts and makes stock until ``stop``."""
        await self._keeper.run(stop)

    async def tidy(self, stop: asyncio.Event) -> None:
        """Settles what is owed, until ``stop``."""
        await every(stop, _TIDY_SECONDS, "settling", self._tidy)

    def forget_ended(self, at_ms: int) -> None:
        """Drops wrapping keys whose epoch's private half is destroyed by now."""
        for sealer in self._sealers:
            sealer.forget_ended(at_ms)
        self._opener.forget_ended(at_ms)

    def shown(self, peer_id: str) -> dict[str, object]:
        """What ``/status/sync`` says of a bus peer's stock."""
        peer, reading = self._peers[peer_id], self._keeper.reading
        level = reading.levels.get(peer_id)
        return {
            "configured": peer.stock,
            "low": low_mark(peer),
            "placed": level.placed if level else 0,
            "in_flight": level.in_flight if level else 0,
            "held": reading.held.get(peer_id, 0),
        }

    def warnings(self) -> list[str]:
        """What works still and should be looked at."""
        if self._broker.up.is_set():
            return []
        return ["the broker is away: keys for peers over a bus come from stock only, while that lasts"]

    async def _take_from_stock(self, target_id: str, correlation_id: str) -> IssuedKey | None:
        key = await self._lanes.stock.submit(StockRequest(target_id, correlation_id))
        if key is None:
            self._keeper.note_empty(target_id)
            return None
        metrics.count_issued(target_id, "stock")
        if self._keeper.note_taken(target_id):
            # Whichever api process is the elected one makes more; it may be this one.
            self._keeper.wake()
            self._notifier.notify(NotificationKind.STOCK)
        return key

    async def _place(self, target_id: str, size_bits: int, correlation_id: str) -> IssuedKey:
        self._settler.check_room()
        placed = await self._lanes.place.submit(IssueRequest(target_id, size_bits, correlation_id))
        self._tell_outbox()
        await self._settler.settle(placed.placement)
        metrics.count_issued(target_id, "on_demand")
        return placed.issued

    def _tell_outbox(self) -> None:
        self._notifier.notify(NotificationKind.OUTBOX)

    def _on_notification(self, kind: NotificationKind, items: Sequence[bytes]) -> None:
        match kind:
            case NotificationKind.STORED:
                self._settler.stored(items)
            case NotificationKind.REJECTED:
                self._settler.refused(items)
            case NotificationKind.ARRIVED:
                self._arrivals.arrived(items)
            case NotificationKind.STOCK:
                self._keeper.wake()
            case _:
                pass

    async def _tidy(self) -> None:
        with contextlib.suppress(Overloaded):  # there is another time
            await self._settler.tidy()

    async def _close(self) -> None:
        self._settler.close()
        await self._lanes.close()
        await asyncio.to_thread(self._keeper.close)


def not_usable_over_bus(target_id: str, *, identity_changed: bool) -> PeerNotReady:
    """The refusal for a bus peer whose announcement is not here, or is another identity's than the configured one."""
    if identity_changed:
        return PeerNotReady(
            f"key provider {target_id} presents another identity than the one that is configured for it: no key is "
            "sealed to it until its entry in [[peers]] is corrected"
        )
    return PeerNotReady(
        f"no announcement of key provider {target_id} has come over the bus yet: no key can be sealed to it "
        f"(skipctl peer check {target_id})"
    )


def _make_lanes(settings: Settings, sealer: Sealer, opener: StockOpener) -> _Lanes:
    local_id, ttl_seconds = settings.local_system_id, settings.key_ttl_seconds
    max_batch = min(settings.max_batch, MAX_BATCH)
    return _Lanes(
        place=make_lane(settings, "place", functools.partial(PlaceBatch, sealer, ttl_seconds), max_batch=max_batch),
        stock=make_lane(
            settings, "stock", functools.partial(StockClaimBatch, opener, ttl_seconds), max_batch=max_batch
        ),
        settle=make_lane(
            settings,
            "settle",
            functools.partial(SettleBatch, local_id, settings.sync_timeout_seconds),
            max_batch=max_batch,
            # Every caller of the other lanes may end up here, and those that are owed.
            max_queue=4 * settings.max_queue,
        ),
    )
