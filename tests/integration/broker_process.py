"""A process of a key provider as the broker sees it: it sends and receives notifications, and publishes envelopes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from typing import Self

from skipbus.shared.broker.connection import BrokerConnection
from skipbus.shared.broker.notifications import FOR_API, NotificationKind, Notifier, OnNotification
from skipbus.shared.broker.publishing import Publisher
from skipbus.shared.settings import Secret


class BrokerProcess:
    """Connected inside ``connected``."""

    def __init__(
        self,
        url: str,
        local_id: str,
        on_notification: OnNotification = lambda _kind, _items: None,
        kinds: Collection[NotificationKind] = FOR_API,
    ) -> None:
        self.notifier = Notifier(local_id, on_notification, kinds)
        self.publisher = Publisher()
        self.broker = BrokerConnection(Secret(url), "test", [self.publisher, self.notifier])

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[Self]:
        """Returns once the broker is there."""
        async with self.broker.connected():
            await self.broker.up.wait()
            yield self
