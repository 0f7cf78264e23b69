"""Facts about what each process asks the store once a second: it is what the tables say, and it delays nobody."""

from __future__ import annotations

import pytest
from sqlalchemy import text

from sandbox.mariadb import MariaDbServer
from skipbus.shared.errors import StoreUnavailable
from skipbus.shared.store.announcements import (
    fetch_announcement_digest,
    fetch_announcement_digests,
    fetch_bus_announcement_digests,
)
from skipbus.shared.store.engine import driver_errors, make_engine
from skipbus.shared.store.key_records import fetch_expired_exists
from skipbus.shared.store.peers import OWN_ROW, PeerLiveness, fetch_liveness, fetch_peer_rows
from tests.integration.key_providers import Store

KP, OTHER = "KP_Alice", "KP_Bob"
PEER, SECOND = "KP_Carol", "KP_Dora"
NOW_MS = 1_800_000_000_000
DIGEST, SENT = b"d" * 48, b"s" * 48
# What escaping by hand would trip over.
ODD = "O'Neil\\;--"


def heard(store: Store, local_id: str, peer_id: str) -> None:
    store.rows(
        "INSERT INTO peers (local_id, peer_id, last_heartbeat_ms, heartbeat_interval_ms, clock_skew_ms, issued) "
        "VALUES (%s, %s, %s, 5000, -3, 7)",
        *(local_id, peer_id, NOW_MS),
    )


def announced(store: Store, system_id: str, digest: bytes) -> None:
    store.rows("INSERT INTO announcements VALUES (%s, %s, 'b', 1)", system_id, digest)


def sent(store: Store, local_id: str, system_id: str) -> None:
    store.rows("INSERT INTO bus_announcements VALUES (%s, %s, %s, 'b', 1)", local_id, system_id, SENT)


def recorded(store: Store, target_id: str, expires_ms: int) -> None:
    number = store.count("key_records") + 1
    store.rows(
        "INSERT INTO key_records VALUES (%s, %s, %s, %s, 256, 'w', 'n', 's', '')",
        *(target_id, expires_ms, bytes([number]) * 16, PEER),
    )


@pytest.mark.parametrize("kp", [KP, ODD])
def test_a_kp_sees_its_own_peers_and_what_was_announced_to_it(store: Store, kp: str) -> None:
    heard(store, kp, PEER)
    heard(store, kp, OWN_ROW)
    heard(store, OTHER, SECOND)
    announced(store, OTHER, DIGEST)
    sent(store, kp, PEER)
    sent(store, OTHER, SECOND)
    with store.engine.connect() as connection:
        assert fetch_liveness(connection, kp) == [PeerLiveness(PEER, NOW_MS, 5000, -3)]
        assert [(row.peer_id, row.issued) for row in fetch_peer_rows(connection, kp)] == [(PEER, 7)]
        assert fetch_announcement_digests(connection) == {OTHER: DIGEST}
        assert fetch_bus_announcement_digests(connection, kp) == {PEER: SENT}


def test_a_janitor_sees_that_a_record_of_its_own_has_expired(store: Store) -> None:
    recorded(store, OTHER, NOW_MS - 1)
    recorded(store, KP, NOW_MS + 1)
    announced(store, OTHER, DIGEST)
    with store.engine.connect() as connection:
        assert not fetch_expired_exists(connection, KP, NOW_MS)
        assert fetch_announcement_digest(connection, KP) is None
    recorded(store, KP, NOW_MS)
    announced(store, KP, SENT)
    with store.engine.connect() as connection:
        assert fetch_expired_exists(connection, KP, NOW_MS)
        assert fetch_announcement_digest(connection, KP) == SENT


def test_a_poll_keeps_no_table_from_being_migrated(store: Store) -> None:
    # A transaction that was left open would hold the table's definition until it ends.
    lean = make_engine(store.settings.mysql, lean=True)
    try:
        with lean.connect() as connection:
            assert not fetch_expired_exists(connection, KP, NOW_MS)
        with store.connect() as other, other.cursor() as cursor:
            cursor.execute("SET SESSION lock_wait_timeout = 2")
            cursor.execute("ALTER TABLE key_records ADD COLUMN added INT NULL")
            cursor.execute("ALTER TABLE key_records DROP COLUMN added")
    finally:
        lean.dispose()


def test_a_connection_that_the_server_has_ended_costs_one_poll(store: Store, mariadb: MariaDbServer) -> None:
    lean = make_engine(store.settings.mysql, lean=True)
    try:
        with lean.connect() as connection:
            server_id = connection.execute(text("SELECT CONNECTION_ID()")).scalar_one()
        with mariadb.admin_connection() as admin, admin.cursor() as cursor:
            cursor.execute(f"KILL {server_id}")
        with pytest.raises(StoreUnavailable), driver_errors(), lean.connect() as connection:
            fetch_expired_exists(connection, KP, NOW_MS)
        with lean.connect() as connection:
            assert not fetch_expired_exists(connection, KP, NOW_MS)
    finally:
        lean.dispose()
