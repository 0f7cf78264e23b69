"""The janitor process: settings → logging → resources → tasks → run until signalled.

Several may run for one KP: one of them is elected, and the others stand by.
"""

from __future__ import annotations

import asyncio
import functools
import os
import sys
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge
from sqlalchemy import Engine

from skipbus.services.janitor.epochs import EpochKeeper
from skipbus.services.janitor.expiry import Zeroizer
from skipbus.services.janitor.pruning import prune
from skipbus.shared.clock import now_ms
from skipbus.shared.crypto.keyring import Keyring
from skipbus.shared.lifecycle import Stopped, every, run_service, stop_group
from skipbus.shared.logging import configure_logging, get_logger
from skipbus.shared.metrics import serve_metrics
from skipbus.shared.settings import Settings, config_from_argv
from skipbus.shared.store.announcements import fetch_announcement_digest
from skipbus.shared.store.election import Election
from skipbus.shared.store.engine import driver_errors, make_engine
from skipbus.shared.store.key_records import fetch_expired_exists
from skipbus.shared.store.migrate import bring_up_to_date
from skipbus.shared.store.processes import report_process, this_instance

_TICK_SECONDS = 1.0
_SWEEP_EVERY_TICKS = 15
_LIST_EPOCHS_EVERY_TICKS = 5

_log = get_logger("janitor")


def main() -> int:
    """Console script ``skip-janitor``. Exit code 0 after a signal, 1 after a failure, 2 for a bad configuration."""
    settings = config_from_argv("skip-janitor", sys.argv[1:], os.environ)
    configure_logging(settings, "janitor")
    return run_service(functools.partial(serve, settings))


async def serve(settings: Settings, stop: asyncio.Event) -> None:
    """Zeroizes expired keys and keeps epochs until ``stop``."""
    keyring = Keyring.open(settings.keyring_dir, settings.local_system_id)
    # A tick is repeated a second later, so it may fail on a connection that the server has closed.
    engine = make_engine(settings.mysql, lean=True)
    janitor = Janitor(settings, engine, keyring, stop.is_set)
    serve_metrics(settings.metrics_port, janitor.registry)
    try:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(every(stop, _TICK_SECONDS, "store", janitor.tick), name="janitor")
            tasks.create_task(
                every(stop, settings.heartbeat_seconds, "signs of life", janitor.report), name="signs of life"
            )
            tasks.create_task(stop_group(stop), name="stop")
    except* Stopped:
        _log.info("draining")
    finally:
        janitor.close()
        engine.dispose()


class Janitor:
    """One tick in each second: be elected, zeroize, keep epochs; every 15 seconds also sweep and prune."""

    def __init__(self, settings: Settings, engine: Engine, keyring: Keyring, stopping: Callable[[], bool]) -> None:
        self._settings = settings
        self._engine = engine
        self._stopping = stopping
        self._election = Election(engine, f"janitor {settings.local_system_id}")
        self._epochs = EpochKeeper(settings, engine, keyring)
        self._zeroizer = Zeroizer(engine, settings.local_system_id, self._go_on)
        self._elected = self._listed = False
        self._schema_checked = False
        self._ticks = 0
        self.registry = CollectorRegistry()
        self._zeroized = Counter("skipbus_keys_zeroized", "Expired keys deleted.", registry=self.registry)
        self._elected_gauge = Gauge("skipbus_janitor_elected", "1 where this janitor works.", registry=self.registry)

    async def tick(self) -> None:
        """One round of work, if this janitor is elected. Raises BackendError while the store is unavailable."""
        await asyncio.to_thread(self._tick)

    async def report(self) -> None:
        """Writes a sign of life for /health."""
        await asyncio.to_thread(self._report)

    def close(self) -> None:
        """Gives up the election."""
        self._election.release()

    def _tick(self) -> None:
        if not self._schema_checked:
            bring_up_to_date(self._settings.mysql)
            self._schema_checked = True
            self._report()
        if not self._is_elected():
            return
        # Counted first: a sweep that fails is not due again at the next tick.
        ticks, self._ticks = self._ticks, self._ticks + 1
        local_id = self._settings.local_system_id
        with driver_errors(), self._engine.connect() as connection:
            expired = fetch_expired_exists(connection, local_id, now_ms())
            digest = fetch_announcement_digest(connection, local_id)
        # Before the epochs: a keyring that cannot be written must not keep expired keys in the store.
        if expired:
            self._zeroized.inc(self._zeroizer.zeroize_own(now_ms()))
        self._epochs.tend(now_ms(), list_files=ticks % _LIST_EPOCHS_EVERY_TICKS == 0 or not self._listed)
        self._listed = True
        self._epochs.announce(now_ms(), digest)
        if ticks % _SWEEP_EVERY_TICKS == 0:
            self._zeroized.inc(self._zeroizer.zeroize_abandoned(now_ms()))
            prune(self._engine, local_id, now_ms(), self._go_on)

    def _is_elected(self) -> bool:
        held = self._election.elected
        elected = self._election.tick()
        if not held:
            # Another janitor may have been elected in between, and have made epochs.
            self._listed = False
        if elected != self._elected:
            name = this_instance()
            _log.info("elected" if elected else "not elected", task="delete keys, make epochs", instance=name)
            self._elected = elected
            # Immediately, or /health would show the KP as degraded until the next sign of life.
            self._report()
        self._elected_gauge.set(elected)
        return elected

    def _go_on(self) -> bool:
        return not self._stopping()

    def _report(self) -> None:
        if not self._schema_checked:
            return
        state = "ok" if self._elected else "standby"
        report_process(self._engine, self._settings.local_system_id, "janitor", state)


if __name__ == "__main__":
    sys.exit(main())
