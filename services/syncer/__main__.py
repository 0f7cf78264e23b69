"""The syncer process: configuration → logging → resources → tasks → run until signalled.

Several may run for one KP: one of them consumes, and an elected one sends the outbox and heartbeats, and keeps stock.
"""

from __future__ import annotations

import asyncio
import functools
import os
import sys
from typing import TYPE_CHECKING

from sqlalchemy import Engine

from skipbus.services.syncer import metrics
from skipbus.services.syncer.apply import Applier
from skipbus.services.syncer.consume import Consumer, Incoming
from skipbus.services.syncer.heartbeat import Heartbeats
from skipbus.services.syncer.leader import Leader, Reservation, SequenceNumbers
from skipbus.services.syncer.outbox import Outbox
from skipbus.services.syncer.peers import PeerWatch
from skipbus.services.syncer.process_report import ProcessReport
from skipbus.services.syncer.receive import FollowUp, Receiver
from skipbus.services.syncer.reject import PeerRejections, Rejecter, RejectionLog
from skipbus.services.syncer.replies import Replies
from skipbus.services.syncer.send import Sender
from skipbus.services.syncer.stock_expiry import StockExpiry
from skipbus.services.syncer.transport import Transport
from skipbus.services.syncer.verify import Verifier
from skipbus.shared.broker.connection import BrokerConnection
from skipbus.shared.broker.notifications import FOR_SYNCER, NotificationKind, Notifier
from skipbus.shared.broker.publishing import Publisher
from skipbus.shared.crypto.keyring import Keyring
from skipbus.shared.lifecycle import every, run_service
from skipbus.shared.logging import configure_logging
from skipbus.shared.metrics import serve_metrics
from skipbus.shared.peer_directory import PeerDirectory
from skipbus.shared.protocol.system_ids import RemoteSystemIds
from skipbus.shared.settings import Settings, config_from_argv
from skipbus.shared.store.announcements import fetch_announcement
from skipbus.shared.store.engine import driver_errors, make_engine

if TYPE_CHECKING:
    from skipbus.services.syncer.https_peer import HttpsPeer

_TICK_SECONDS = 1.0
# One each for peers, outbox, inbox, stock, replies and process reports, so that none waits for another's statement, and
# two for envelopes that are read to be sent again.
_CONNECTIONS = 8


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
    peers = PeerWatch(settings, keyring, directory)

    wake_up = asyncio.Event()
    consumer, publisher = Consumer(local_id), Publisher()
    notifier = Notifier(local_id, lambda _kind, _items: wake_up.set(), FOR_SYNCER)
    broker = BrokerConnection(settings.rabbitmq_url, f"skip-syncer {local_id}", [consumer, notifier, publisher])

    applier, log = Applier(engine, local_id, {p.system_id for p in settings.bus_peers}), RejectionLog()
    peer_rejections = PeerRejections(applier, notifier, log)
    numbers, https_peers = SequenceNumbers(), _https_peers(settings, stop)
    leader = Leader(engine, local_id, Reservation(engine, local_id, numbers))
    transport = Transport(publisher, keyring.identity, local_id, numbers, https_peers, peer_rejections.record)
    sender = Sender(Outbox(settings, engine, numbers), leader, peers, transport, wake_up, stop)
    replies = Replies(transport, functools.partial(_fetch_announcement, engine, local_id))
    heartbeats = Heartbeats(settings, directory, leader, transport, replies)
    receiver = Receiver(
        Incoming(consumer, settings.heartbeat_seconds),
        Verifier(local_id, directory, keyring.epoch_ids),
        applier,
        Rejecter(local_id, directory, log, replies, peers.clocks),
        FollowUp(directory, replies, sender, peer_rejections, notifier),
        stop,
    )

    def on_stock_change() -> None:
        notifier.notify(NotificationKind.STOCK)
        wake_up.set()

    async def elect() -> None:
        await leader.tick()
        # In this order: /health must not call a process a standby that has just been elected.
        await report.tick()

    stock = StockExpiry(settings, engine, leader, on_stock_change)
    report = ProcessReport(settings, engine, broker, publisher, leader)
    serve_metrics(settings.metrics_port, metrics.REGISTRY)

    try:
        async with broker.connected(), asyncio.TaskGroup() as tasks:
            tasks.create_task(every(stop, _TICK_SECONDS, "store", peers.tick), name="peers")
            # The first reading of the peers brings the schema up to date, so everything else waits for it.
            if await _either(peers.ready, stop):
                tasks.create_task(every(stop, _TICK_SECONDS, "election", elect, quiet=True), name="election")
                tasks.create_task(sender.run(), name="outbox")
                if settings.bus_peers:
                    # Where there are none the account has no right to the table of stock either.
                    tasks.create_task(every(stop, _TICK_SECONDS, "stock", stock.tick, quiet=True), name="stock")
                tasks.create_task(heartbeats.run(stop), name="heartbeats")
                tasks.create_task(receiver.run(), name="receive")
                tasks.create_task(replies.run(), name="replies")
    finally:
        for https_peer in https_peers.values():
            await https_peer.close()
        await asyncio.to_thread(leader.close)
        engine.dispose()


def _https_peers(settings: Settings, stop: asyncio.Event) -> dict[str, HttpsPeer]:
    """The peers that have an endpoint."""
    peers = [peer for peer in settings.peers.values() if peer.endpoint]
    if not peers:
        return {}
    # Loading the HTTP client takes an eighth of a syncer's start.
    from skipbus.services.syncer.https_peer import HttpsPeer  # noqa: PLC0415

    return {peer.system_id: HttpsPeer(peer, stop) for peer in peers}


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


if __name__ == "__main__":
    sys.exit(main())
