"""A bus link whose peer and whose own syncer are simulated by the test: only KP_Alice's api and janitor run.

So a test decides when a row of the outbox is acknowledged, and whether a notification is sent. KP_Carol is the peer:
the test holds her identity and her epoch, and opens what was sealed to her.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from sandbox.client import get
from sandbox.key_provider import KeyProvider
from sandbox.processes import write_private
from sandbox.simulated_peer import SealedKeys, SimulatedPeer
from skipbus.shared.broker.names import NOTIFICATIONS, notification_routing_key
from skipbus.shared.broker.notifications import NotificationKind
from skipbus.shared.clock import now_ms
from skipbus.shared.crypto.sealing import KeyRecord, SealedWrappingKey, open_wrapping_key
from skipbus.shared.protocol import encoding
from skipbus.shared.protocol.announcements import read_announcement
from skipbus.shared.store.announcements import upsert_bus_announcement
from skipbus.shared.store.engine import make_engine
from skipbus_testkit.client import Answer
from tests.system.broker_admin import BrokerAdmin
from tests.system.harness import ALICE, Lab, query
from tests.waiting import wait_for

CAROL = "KP_Carol"


class StubLink:
    """KP_Alice's side of a link to KP_Carol."""

    def __init__(
        self, lab: Lab, *, stock: int = 0, allow: Sequence[str] | None = None, broker: bool = True, **env: str
    ) -> None:
        """Without ``broker`` Alice's processes find none: there are no notifications."""
        self.lab = lab
        self._broker = broker
        self.carol = SimulatedPeer(CAROL)
        self.alice: KeyProvider = lab.add(ALICE, CAROL, env={"SKIP_HEARTBEAT_SECONDS": "1"} | env)
        self.alice.make_files()
        self.alice.link_by_bus(replace(self.carol.peer(stock), allow=allow))
        if not broker:
            write_private(self.alice.root / "secrets" / "rabbitmq_url", "amqp://nobody:nothing@127.0.0.1:1/")
        self.admin = BrokerAdmin(lab.rabbitmq_url)
        self._store = lab.database.connect()
        self._lock = threading.Lock()
        self._callers = ThreadPoolExecutor(64)

    def start(self) -> None:
        """Both processes; returns when Alice can seal to Carol and hears notifications."""
        for role in ("janitor", "api"):
            self.alice.start(role)
        self.alice.wait_healthy(60)
        self.announce()
        wait_for(lambda: self.status()["announced"], timeout_seconds=15)
        if self._broker:
            wait_for(lambda: "broker connected" in self.alice.log_of("api").read_text(), timeout_seconds=15)

    def announce(self) -> None:
        """Carol's announcement has come."""
        database, body = self.lab.database, self.carol.announcement()
        engine = make_engine(database.settings)
        with engine.begin() as connection:
            upsert_bus_announcement(connection, ALICE, read_announcement(body), body)
        engine.dispose()

    def close(self) -> None:
        self._callers.shutdown()
        self.admin.close()
        self._store.close()

    # --- what an encryptor does

    def ask(self, size: str = "256") -> Answer:
        return get(self.alice.url, "key", remoteSystemID=CAROL, size=size)

    def asking(self, size: str = "256") -> Future[Answer]:
        """The same, in a thread."""
        return self._callers.submit(self.ask, size)

    def retrieving(self, key_id: bytes) -> Future[Answer]:
        return self._callers.submit(get, self.alice.url, "key", key_id.hex(), remoteSystemID=CAROL)

    def status(self) -> dict[str, Any]:
        return dict(get(self.alice.url, "status", "sync").body["peers"][CAROL])

    # --- what the store holds

    def rows(self, statement: str, *values: object) -> tuple[tuple[Any, ...], ...]:
        with self._lock:
            return query(self._store, statement, *values)

    def outbox(self, kind: str) -> list[tuple[bytes, list[Any]]]:
        """Rows of one type, oldest first: token and entries."""
        found = self.rows("SELECT token, payload FROM outbox WHERE type = %s ORDER BY id", kind)
        return [(token, encoding.unpack(payload)) for token, payload in found]

    def wait_outbox(self, kind: str, count: int = 1, timeout_seconds: float = 30) -> list[tuple[bytes, list[Any]]]:
        wait_for(lambda: len(self.outbox(kind)) >= count, timeout_seconds=timeout_seconds, poll_seconds=0.01)
        return self.outbox(kind)

    def key_ids(self, kind: str) -> list[bytes]:
        """The keyIds in all rows of a type."""
        return [bytes(entry[0]) for _, entries in self.outbox(kind) for entry in entries]

    def opened(self, entry: list[Any]) -> bytes:
        """The key in one entry of a ``key.placed`` or ``key.stocked`` row, as Carol reads it."""
        key_id, size_bits, expires_ms, correlation_id, wrapping_key_id, nonce, sealed = entry
        (found,) = self.rows(
            "SELECT wrapping_key_id, source_id, target_id, epoch_id, expires_ms, sealed, signature FROM wrapping_keys "
            "WHERE wrapping_key_id = %s",
            wrapping_key_id,
        )
        alice_key = read_announcement(self.rows("SELECT body FROM announcements")[0][0]).public_key
        wrapping_key = open_wrapping_key(SealedWrappingKey(*found), alice_key, self.carol.epoch_key)
        return wrapping_key.open(
            KeyRecord(key_id, ALICE, CAROL, size_bits, expires_ms, wrapping_key_id, nonce, sealed, correlation_id)
        )

    # --- what Alice's syncer does

    def acknowledge(self, *tokens: bytes) -> None:
        """Carol has stored these rows: they go, and stock in them counts as placed."""
        for token in tokens:
            self.rows("UPDATE stock SET placed_ms = %s WHERE token = %s", now_ms(), token)
            self.rows("DELETE FROM outbox WHERE token = %s", token)

    def notify(self, kind: NotificationKind, *items: bytes) -> None:
        self.admin.notify(NOTIFICATIONS, notification_routing_key(ALICE, kind.value), encoding.pack(list(items)))

    def store_all(self, kind: str, count: int = 1) -> list[tuple[bytes, list[Any]]]:
        """Waits for rows of a type and acknowledges them, notification and all."""
        rows = self.wait_outbox(kind, count)
        tokens = [token for token, _ in rows]
        self.acknowledge(*tokens)
        self.notify(NotificationKind.STORED if kind == "key.placed" else NotificationKind.STOCK, *tokens)
        return rows

    @contextmanager
    def storing(self, *kinds: str) -> Iterator[list[list[Any]]]:
        """Acknowledges all rows of these types as they come, until the end of the block; gives the entries seen."""
        stop, seen = threading.Event(), list[list[Any]]()

        def run() -> None:
            while not stop.is_set():
                for kind in kinds:
                    rows = self.outbox(kind)
                    for _, entries in rows:
                        seen.extend(entries)
                    self.acknowledge(*(token for token, _ in rows))
                    if rows:
                        notification = NotificationKind.STORED if kind == "key.placed" else NotificationKind.STOCK
                        self.notify(notification, *(token for token, _ in rows if kind == "key.placed"))
                time.sleep(0.005)

        peer = threading.Thread(target=run)
        peer.start()
        try:
            yield seen
        finally:
            stop.set()
            peer.join(10)

    def bring(self, load: SealedKeys) -> None:
        """Carol's keys have come: what Alice's syncer writes of such an envelope."""
        for wrapping_key_id, epoch_id, expires_ms, sealed, signature in load.wrapping_keys:
            self.rows(
                "INSERT INTO wrapping_keys (wrapping_key_id, source_id, target_id, epoch_id, sealed, signature, "
                "expires_ms) VALUES (%s, %s, %s, %s, %s, %s, %s)",
                *(wrapping_key_id, CAROL, ALICE, epoch_id, sealed, signature, expires_ms),
            )
        for key_id, size_bits, expires_ms, correlation_id, wrapping_key_id, nonce, sealed in load.records:
            self.rows(
                "INSERT INTO key_records (target_id, expires_ms, key_id, source_id, size_bits, wrapping_key_id, nonce, "
                "sealed, correlation_id) VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s)",
                *(ALICE, expires_ms, key_id, CAROL, size_bits, wrapping_key_id, nonce, sealed, correlation_id),
            )
            if load.stock:
                self.rows(
                    "INSERT INTO stock_held (local_id, source_id, key_id, expires_ms) VALUES (%s, %s, %s, %s)",
                    *(ALICE, CAROL, key_id, expires_ms),
                )


def stopwatch() -> Callable[[], float]:
    """Seconds since it was made."""
    started = time.monotonic()
    return lambda: time.monotonic() - started
