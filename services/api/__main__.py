"""The api process: configuration → logging → resources → tasks → run until signalled."""

from __future__ import annotations

import asyncio
import functools
import os
import sys
from contextlib import nullcontext, suppress

from aiohttp import web

from skipbus.services.api.app import Application
from skipbus.services.api.http import workers
from skipbus.services.api.http.listening import drain, listen
from skipbus.services.api.http.server import BoundedServer
from skipbus.services.api.links.bus import BusLink
from skipbus.services.api.links.store import StoreLink
from skipbus.services.api.metrics import REGISTRY
from skipbus.services.api.skip import SkipMethods
from skipbus.services.api.status import StatusPages, StoreView
from skipbus.services.api.sync import SyncEndpoint
from skipbus.services.api.tls.material import Tls
from skipbus.shared.clock import now_ms
from skipbus.shared.crypto.keyring import Keyring
from skipbus.shared.errors import BackendError
from skipbus.shared.lifecycle import DRAIN_SECONDS, Stopped, every, run_service, stop_group
from skipbus.shared.logging import configure_logging, get_logger
from skipbus.shared.metrics import serve_metrics
from skipbus.shared.peer_directory import PeerDirectory
from skipbus.shared.protocol.system_ids import RemoteSystemIds
from skipbus.shared.settings import Settings, config_from_argv
from skipbus.shared.store.engine import make_engine, make_queue_engine

_REFRESH_SECONDS = 1.0
_FIRST_READING_SECONDS = 3.0

_log = get_logger("api")


def main() -> int:
    """Console script ``skip-api``. Exit code 0 after a signal, 1 after a failure, 2 for a bad configuration."""
    workers.end_with_parent()
    settings = config_from_argv("skip-api", sys.argv[1:], os.environ)
    configure_logging(settings, "api")
    if settings.api_workers > 1:
        return workers.supervise(settings)
    return run_service(functools.partial(serve, settings))


async def serve(settings: Settings, stop: asyncio.Event) -> None:
    """Serves encryptors until ``stop``."""
    keyring = Keyring.open(settings.keyring_dir, settings.local_system_id)
    # Whatever uses it does so again within a second; a server that was away costs one reading.
    engine = make_engine(settings.mysql, lean=True)
    directory = PeerDirectory(
        engine,
        settings.local_system_id,
        RemoteSystemIds(settings.remote_system_ids, settings.local_system_id),
        keyring.pins,
        settings.peers,
    )
    view = StoreView(settings, keyring, directory)
    store = StoreLink(settings, keyring, directory, make_queue_engine(settings.mysql))
    bus = BusLink(settings, keyring, directory, engine, store) if settings.bus_peers else None
    tls = Tls(settings)
    application = Application(
        SkipMethods(settings, store, {peer.system_id: bus for peer in settings.bus_peers} if bus is not None else {}),
        StatusPages(settings, directory, view, tls.warnings, bus),
        SyncEndpoint(settings, directory, bus.publisher if bus is not None else None),
    )
    server = BoundedServer(
        application.handle,
        max_connections=settings.max_connections,
        header_timeout_seconds=settings.header_timeout_seconds,
        keepalive_seconds=settings.keepalive_seconds,
    )
    serve_metrics(settings.metrics_port, REGISTRY)

    runner = web.ServerRunner(server, handle_signals=False, shutdown_timeout=DRAIN_SECONDS / 2)
    await runner.setup()
    # The bus link outlives the server: what drains may wait for a peer's acknowledgement.
    async with bus.running() if bus is not None else nullcontext():
        try:
            await _first_reading(view)
            await listen(runner, settings)
            await tls.listen(server)
            async with asyncio.TaskGroup() as tasks:
                if bus is not None:
                    tasks.create_task(bus.keep_stock(stop), name="stock")
                    tasks.create_task(bus.keep_withdrawing(stop), name="withdrawals")
                tasks.create_task(every(stop, _REFRESH_SECONDS, "store", view.refresh), name="store view")
                tasks.create_task(
                    every(stop, _REFRESH_SECONDS, "epochs", functools.partial(_forget_ended, store, bus)),
                    name="epochs",
                )
                tasks.create_task(server.sweep(stop), name="connection sweep")
                tasks.create_task(tls.watch(stop), name="tls files")
                tasks.create_task(stop_group(stop), name="stop")
        except* Stopped:
            _log.info("draining")
            await drain(application, runner, server, tls)
        finally:
            tls.close()
            await runner.cleanup()
            await store.close()
            engine.dispose()


async def _first_reading(view: StoreView) -> None:
    """Lets the process know its peers before it shares the port; it does not wait long for a store that is away."""
    with suppress(BackendError, TimeoutError):
        async with asyncio.timeout(_FIRST_READING_SECONDS):
            await view.refresh()


async def _forget_ended(store: StoreLink, bus: BusLink | None) -> None:
    """No wrapping key may be held for longer than its epoch's private half exists."""
    store.forget_ended(now_ms())
    if bus is not None:
        bus.forget_ended(now_ms())


if __name__ == "__main__":
    sys.exit(main())
