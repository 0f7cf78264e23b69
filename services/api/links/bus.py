"""The link to key providers with a store of their own, over a bus.

A key is issued out of stock if there is some, else it is placed at the peer and answered when the peer has it. A key
that the bus has not brought yet is waited for. Placing, confirming and giving out of stock have a queue each, with a
bound of its own, so that a peer that is away does not gather all callers.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from sqlalchemy import Engine

from skipbus.services.api import metrics
from skipbus.services.api.group_commit import GroupCommit, Limits
from skipbus.services.api.links import ClaimedKey, IssuedKey, IssueRequest, Link
from skipbus.services.api.links.arrivals import Arrivals
from skipbus.services.api.links.confirmation import ConfirmationWaiter, ConfirmBatch
from skipbus.services.api.links.placing import MAX_BATCH, PlaceBatch
from skipbus.services.api.links.refill import StockKeeper, StockMaker
from skipbus.services.api.links.sealing import Opener, Sealer, not_usable
from skipbus.services.api.links.stock_claim import StockBatch, StockRequest
from skipbus.shared.broker.connection import BrokerConnection
from skipbus.shared.broker.notifications import FOR_API, NotificationKind, Notifier
from skipbus.shared.broker.publishing import Publisher
from skipbus.shared.crypto.keyring import Keyring
from skipbus.shared.errors import Overloaded
from skipbus.shared.lifecycle import every
from skipbus.shared.peer_directory import PeerDirectory
from skipbus.shared.protocol.keys import DEFAULT_KEY_BITS
from skipbus.shared.settings import Settings
from skipbus.shared.store.engine import make_queue_engine

_TICK_SECONDS = 1.0


class BusLink:
    """One for all bus peers. Not thread-safe: use it on one event loop, inside ``running``."""

    def __init__(
        self, settings: Settings, keyring: Keyring, directory: PeerDirectory, engine: Engine, store: Link
    ) -> None:
        """``engine`` is for the refill of stock; queues have their own. ``store`` claims keys that have arrived."""
        local_id, ttl_seconds = settings.local_system_id, settings.key_ttl_seconds
        self._peer_ids = frozenset(peer.system_id for peer in settings.bus_peers)
        self._directory = directory
        self._store = store
        # One for the queue and one for the thread that makes stock: neither may be in use in two threads.
        self._sealers = [Sealer(local_id, keyring.identity, directory) for _ in range(2)]
        self._opener = Opener(keyring, directory)
        queues = make_queue_engine(settings.mysql)
        place = functools.partial(PlaceBatch, self._sealers[0], ttl_seconds)
        confirm = functools.partial(ConfirmBatch, local_id, settings.sync_timeout_seconds)
        stock = functools.partial(StockBatch, self._opener, ttl_seconds)
        limits = Limits(min(settings.max_batch, MAX_BATCH), settings.max_queue, settings.request_timeout_seconds)
        # Every caller of the other queues may come here, and withdrawals that waited for the store.
        confirm_limits = limits._replace(max_queue=4 * settings.max_queue)
        self._place = GroupCommit("place", place, queues, limits)
        self._confirm = GroupCommit("confirm", confirm, queues, confirm_limits)
        self._stock = GroupCommit("stock", stock, queues, limits)
        self._confirmations = ConfirmationWaiter(self._confirm, settings.sync_timeout_seconds, settings.max_queue)
        self._arrivals = Arrivals(settings.retrieve_wait_seconds)
        self._keeper = StockKeeper(
            settings, engine, StockMaker(engine, ttl_seconds, self._sealers[1]), self._notify_outbox
        )
        self._notifier = Notifier(local_id, self._on_notification, FOR_API)
        self.publisher = Publisher()
        self._names_broker = settings.names_broker
        self._broker = BrokerConnection(
            settings.rabbitmq_url,
            f"skip-api {local_id}",
            [self.publisher, self._notifier],
            required=self._names_broker,
        )

    async def issue(self, target_id: str, size_bits: int, correlation_id: str) -> IssuedKey:
        """A fresh key that the target can serve: out of stock, or placed there now.

        Raises PeerNotReady, NotPlaced, Overloaded, StoreUnavailable, NoEntropy.
        """
        if self._directory.get(target_id) is None:
            # Not even out of stock: the KP that could open it there may be gone.
            raise not_usable(self._directory, target_id)
        from_stock = await self._take(target_id, correlation_id) if size_bits == DEFAULT_KEY_BITS else None
        return from_stock or await self._issue_on_demand(target_id, size_bits, correlation_id)

    async def claim(self, source_id: str, key_id: bytes, correlation_id: str) -> ClaimedKey:
        """The key, waited for where the request is ahead of its arrival. Raises what a store link raises."""
        attempt = functools.partial(self._store.claim, source_id, key_id, correlation_id)
        claimed = await self._arrivals.claim(key_id, attempt)
        self._keeper.note_retrieved(source_id, key_id)
        return claimed

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Keeps a connection to the broker for as long as the block runs; closes everything at its end."""
        try:
            async with self._broker.connected():
                yield
        finally:
            self._confirmations.close()
            for queue in (self._place, self._confirm, self._stock):
                await queue.close()
            await asyncio.to_thread(self._keeper.close)

    async def keep_stock(self, stop: asyncio.Event) -> None:
        """Counts and makes stock until ``stop``."""
        await self._keeper.run(stop)

    async def keep_withdrawing(self, stop: asyncio.Event) -> None:
        """Withdraws, until ``stop``, what could not be withdrawn while the store was away."""
        await every(stop, _TICK_SECONDS, "withdrawals", self._withdraw_outstanding)

    def forget_ended(self, at_ms: int) -> None:
        """Drops wrapping keys whose epoch's private half is destroyed by now."""
        for sealer in self._sealers:
            sealer.forget_ended(at_ms)
        self._opener.forget_ended(at_ms)

    def covers(self, system_id: str) -> bool:
        """Whether keys travel to and from this KP over a bus."""
        return system_id in self._peer_ids

    def shown(self, peer_id: str) -> dict[str, object]:
        """What ``/status/sync`` says of a bus peer's stock."""
        stock = self._keeper.stock_for(peer_id)
        return {
            "configured": stock.high,
            "low": stock.low,
            "placed": stock.level.placed,
            "in_flight": stock.level.in_flight,
            "held": self._keeper.held_from(peer_id),
        }

    @property
    def broker_server(self) -> str:
        """Host and port of the broker in use."""
        return self._broker.server

    def warnings(self) -> list[str]:
        """Sentences for /health about what does not work in full."""
        if self._broker.up.is_set() or not self._names_broker:
            return []
        return ["this api has no broker connection: keys on demand can take 1 s longer, and POST /sync answers 503"]

    async def _take(self, target_id: str, correlation_id: str) -> IssuedKey | None:
        """A key out of stock, None where there is none."""
        stock = self._keeper.stock_for(target_id)
        if stock.empty:
            return None
        issued = await self._stock.submit(StockRequest(target_id, correlation_id))
        if issued is None:
            stock.empty = True
            return None
        metrics.count_issued(target_id, "stock")
        if stock.take():
            # The elected api process makes more; it may be this one.
            self._keeper.wake()
            self._notifier.notify(NotificationKind.STOCK)
        return issued

    async def _issue_on_demand(self, target_id: str, size_bits: int, correlation_id: str) -> IssuedKey:
        self._confirmations.check_room()
        placed = await self._place.submit(IssueRequest(target_id, size_bits, correlation_id))
        self._notify_outbox()
        await self._confirmations.confirm(placed.placement)
        metrics.count_issued(target_id, "on_demand")
        return placed.issued

    def _notify_outbox(self) -> None:
        self._notifier.notify(NotificationKind.OUTBOX)

    def _on_notification(self, kind: NotificationKind, items: Sequence[bytes]) -> None:
        match kind:
            case NotificationKind.STORED:
                self._confirmations.acknowledged(items)
            case NotificationKind.REJECTED:
                self._confirmations.rejected(items)
            case NotificationKind.ARRIVED:
                self._arrivals.arrived(items)
            case NotificationKind.STOCK:
                self._keeper.wake()
            case _:
                pass

    async def _withdraw_outstanding(self) -> None:
        with contextlib.suppress(Overloaded):  # it is tried again a second later
            await self._confirmations.tick()
