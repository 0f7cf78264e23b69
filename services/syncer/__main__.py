"""The syncer process: configuration → logging → resources → tasks → run until signalled.

Several may run for one KP: one of them consumes, and one that a MySQL lock elects relays and sends heartbeats.
"""

from __future__ import annotations

import asyncio
import functools
import os
import socket
import sys
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from sqlalchemy import Engine

from skipbus.services.syncer import metrics
from skipbus.services.syncer.complaints import Complaints
from skipbus.services.syncer.effects import Effects
from skipbus.services.syncer.examination import Examiner
from skipbus.services.syncer.heartbeat import Heartbeats
from skipbus.services.syncer.inbox import Inbox
from skipbus.services.syncer.intake import Intake
from skipbus.services.syncer.key_effects import Aftermath
from skipbus.services.syncer.leader import Leader
from skipbus.services.syncer.numbers import Numbers, Reservation
from skipbus.services.syncer.outbox import Relay
from skipbus.services.syncer.outgoing import Outgoing
from skipbus.services.syncer.refusals import Refusals
from skipbus.services.syncer.refuser import Refuser
from skipbus.services.syncer.replies import Replies
from skipbus.services.syncer.stock import StockWatch
from skipbus.services.syncer.watch import PeerWatch
from skipbus.shared.broker.connection import BrokerConnection, NeedsOperator
from skipbus.shared.broker.consuming import Consumer, QueueWithoutLeader
from skipbus.shared.broker.notifications import FOR_SYNCER, Notifier
from skipbus.shared.broker.publishing import Publisher
from skipbus.shared.clock import now_ms
from skipbus.shared.crypto.keyring import Keyring
from skipbus.shared.errors import StoreUnavailable
from skipbus.shared.hop import Hop
from skipbus.shared.lifecycle import every, run_service
from skipbus.shared.logs import configure_logging, get_logger
from skipbus.shared.metrics import serve_metrics
from skipbus.shared.peer_directory import PeerDirectory
from skipbus.shared.protocol.system_ids import RemoteSystemIds
from skipbus.shared.settings import Settings, config_from_argv
from skipbus.shared.store.announcements import fetch_announcement
from skipbus.shared.store.engine import driver_errors, make_engine
from skipbus.shared.store.processes import upsert_process

if TYPE_CHECKING:
    from skipbus.services.syncer.https_link import HttpsLink

_TICK_SECONDS = 1.0
# One each for watch, relay, inbox, stock, replies and signs of life, so that none waits for another's statement, and
# two for what the relay sends again.
_CONNECTIONS = 8

_log = get_logger("syncer")


def main() -> int:
    """Console script ``skip-syncer``. Exit code 0 after a signal, 1 after a failure, 2 for a bad configuration."""
    settings = config_from_argv("skip-syncer", sys.argv[1:], os.environ)
    configure_logging(settings, "syncer")
    return run_service(functools.partial(serve, settings))


async def serve(settings: Settings, stop: asyncio.Event) -> None:
    """Keeps this KP in step with its peers until ``stop``."""
    local_id = settings.local_system_id
    keyring = Keyring.open(settings.keyring_dir, local_id)
    engine = make_engine(settings.mysql, pool_size=_CONNECTIONS, lean=True)
    remote_ids = RemoteSystemIds(settings.remote_system_ids, local_id)
    directory = PeerDirectory(engine, local_id, remote_ids, keyring.pins, settings.peers)
    wake_up = asyncio.Event()
    consumer, publisher = Consumer(local_id), Publisher()
    notifier = Notifier(local_id, lambda _kind, _items: wake_up.set(), FOR_SYNCER)
    broker = BrokerConnection(settings.rabbitmq_url, f"skip-syncer {local_id}", [consumer, notifier, publisher])
    numbers = Numbers()
    links = _https_links(settings, stop.is_set)
    outgoing = Outgoing(publisher, keyring.identity, local_id, numbers, links)
    hop = Hop()
    watch = PeerWatch(settings, engine, keyring, directory, hop)
    leader = Leader(settings.mysql, local_id, Reservation(engine, local_id, numbers), hop)
    relay = Relay(settings, engine, leader, watch, outgoing, stop.is_set, wake_up)
    replies = Replies(outgoing, functools.partial(_fetch_announcement, engine, local_id))
    heartbeats = Heartbeats(settings, directory, leader, outgoing, replies)
    effects = Effects(engine, local_id, {p.system_id for p in settings.bus_peers})
    refusals = Refusals(directory)
    complaints = Complaints(notifier, effects, relay, refusals)
    outgoing.on_refusal = complaints.hear_answer
    examiner = Examiner(local_id, directory, keyring.epoch_ids)
    refuser = Refuser(local_id, directory, refusals, replies, watch.clocks)
    inbox = Inbox(
        Intake(consumer, settings.heartbeat_seconds), directory, examiner, effects, relay, replies, complaints, refuser
    )
    stock = StockWatch(settings, engine, leader, hop, lambda: complaints.tell(Aftermath(stock_changed=True)))
    signs = SignsOfLife(engine, local_id, broker, publisher)
    serve_metrics(settings.metrics_port, metrics.REGISTRY)

    try:
        async with broker.connected(), asyncio.TaskGroup() as tasks:
            tasks.create_task(every(stop, _TICK_SECONDS, "store", watch.tick), name="watch")
            # The watch's first reading brings the schema up to date, so everything else waits for it.
            if await _either(watch.ready, stop):
                tasks.create_task(_quietly(stop, _TICK_SECONDS, "election", leader.tick), name="election")
                tasks.create_task(relay.run(stop), name="outbox")
                if settings.bus_peers:
                    # Where there are none the account has no right to the table of stock either.
                    tasks.create_task(_quietly(stop, _TICK_SECONDS, "stock", stock.tick), name="stock")
                tasks.create_task(heartbeats.run(stop), name="heartbeats")
                tasks.create_task(inbox.run(stop), name="inbox")
                tasks.create_task(replies.run(), name="replies")
                tasks.create_task(complaints.run(), name="complaints")
                tasks.create_task(
                    _quietly(stop, settings.heartbeat_seconds, "signs of life", signs.give), name="signs of life"
                )
    finally:
        for link in links.values():
            await link.close()
        await asyncio.to_thread(leader.close)
        watch.close()
        stock.close()
        engine.dispose()


class SignsOfLife:
    """Tells the store, and so /health, that this process works and whether it has the broker."""

    def __init__(self, engine: Engine, local_id: str, broker: BrokerConnection, publisher: Publisher) -> None:
        self._engine = engine
        self._local_id = local_id
        self._broker = broker
        self._publisher = publisher
        self._instance = f"{socket.gethostname()}:{os.getpid()}"

    async def give(self) -> None:
        """One sign. Raises StoreUnavailable, StoreRefused."""
        up = self._broker.up.is_set() and not self._publisher.silent
        fault = self._broker.fault
        metrics.BUS_UP.set(up)
        metrics.QUEUE_WITHOUT_LEADER.set(isinstance(fault, QueueWithoutLeader))
        detail = "ok" if up else str(fault) if isinstance(fault, NeedsOperator) else "broker away"
        await asyncio.to_thread(self._write, detail)

    def _write(self, detail: str) -> None:
        with driver_errors(), self._engine.begin() as connection:
            upsert_process(connection, self._local_id, "syncer", self._instance, now_ms(), detail)


def _https_links(settings: Settings, stopping: Callable[[], bool]) -> dict[str, HttpsLink]:
    """The ways to the peers that have an endpoint."""
    peers = [peer for peer in settings.peers.values() if peer.endpoint]
    if not peers:
        return {}
    # With the HTTP client that comes along, this is an eighth of a syncer's start.
    from skipbus.services.syncer.https_link import HttpsLink  # noqa: PLC0415

    return {peer.system_id: HttpsLink(peer, stopping) for peer in peers}


def _fetch_announcement(engine: Engine, local_id: str) -> bytes | None:
    with driver_errors(), engine.connect() as connection:
        return fetch_announcement(connection, local_id)


async def _either(ready: asyncio.Event, stop: asyncio.Event) -> bool:
    """Waits for one of the two; whether it was ``ready``."""
    waiting = [asyncio.create_task(ready.wait()), asyncio.create_task(stop.wait())]
    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    for task in waiting:
        task.cancel()
    return not stop.is_set()


async def _quietly(stop: asyncio.Event, seconds: float, what: str, action: Callable[[], Awaitable[None]]) -> None:
    """``every``, but without a word on a store that is away: the watch tells of that, once for all."""

    async def attempt() -> None:
        try:
            await action()
        except StoreUnavailable as error:
            _log.debug("store away", what=what, reason=str(error))

    await every(stop, seconds, what, attempt)


if __name__ == "__main__":
    sys.exit(main())
