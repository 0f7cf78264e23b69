"""Facts about what each process looks up once a second: it is what the tables say, and it holds nothing up."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import pytest

from sandbox.servers import MariaDbServer
from skipbus.shared.errors import StoreRefused, StoreUnavailable
from skipbus.shared.glance import Glance
from skipbus.shared.store.announcements import Digests
from skipbus.shared.store.glances import (
    Due,
    look_at_due,
    look_at_view,
)
from skipbus.shared.store.peers import OWN_ROW, PeerRow, fetch_peer_rows
from skipbus.shared.store.processes import ProcessSeen
from tests.integration.key_providers import Store

KP, OTHER = "KP_Alice", "KP_Ällice"
PEER, SECOND = "KP_Bob", "KP_Carol"
NOW_MS = 1_800_000_000_000
DIGEST, SENT = b"d" * 48, b"s" * 48
# What escaping by hand would trip over.
ODD = "O'Neil\\;--"


@pytest.fixture
def glance(store: Store) -> Iterator[Glance]:
    made = Glance(store.settings.mysql)
    yield made
    made.close()


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


def stocked(store: Store, local_id: str, peer_id: str, expires_ms: int, *, placed: bool) -> None:
    number = store.count("stock") + 1
    store.rows(
        "INSERT INTO stock VALUES (%s, %s, %s, %s, 256, 'w', 'n', 's', 't', %s)",
        *(local_id, peer_id, expires_ms, bytes([number]) * 16, NOW_MS if placed else None),
    )


def recorded(store: Store, target_id: str, expires_ms: int) -> None:
    number = store.count("key_records") + 1
    store.rows(
        "INSERT INTO key_records VALUES (%s, %s, %s, %s, 256, 'w', 'n', 's', '')",
        *(target_id, expires_ms, bytes([number]) * 16, PEER),
    )


def test_an_api_sees_what_the_tables_say_of_its_peers_and_processes(store: Store, glance: Glance) -> None:
    heard(store, KP, PEER)
    heard(store, KP, OWN_ROW)
    announced(store, KP, DIGEST)
    store.rows("INSERT INTO processes VALUES (%s, 'syncer', 'host:1', %s, 'ok')", KP, NOW_MS)
    store.rows("INSERT INTO processes VALUES (%s, 'syncer', 'host:2', %s, 'ok')", OTHER, NOW_MS)
    digests, peers, processes = glance.read(partial(look_at_view, local_id=KP, bus=True))
    with store.engine.connect() as connection:
        assert peers == fetch_peer_rows(connection, KP)
    (row,) = peers
    assert isinstance(row, PeerRow)
    assert (row.peer_id, row.issued) == (PEER, 7)
    assert processes == [ProcessSeen("syncer", "host:1", NOW_MS, "ok")]
    assert digests == Digests({KP: DIGEST}, {})


def test_a_janitor_sees_that_a_record_of_its_own_has_expired(store: Store, glance: Glance) -> None:
    look = partial(look_at_due, local_id=KP, now_ms=NOW_MS)
    recorded(store, OTHER, NOW_MS - 1)
    recorded(store, KP, NOW_MS + 1)
    announced(store, OTHER, DIGEST)
    assert glance.read(look) == Due(expired=False, digest=None)
    recorded(store, KP, NOW_MS)
    announced(store, KP, SENT)
    assert glance.read(look) == Due(expired=True, digest=SENT)


def test_what_is_committed_between_two_looks_is_seen(store: Store, glance: Glance) -> None:
    look = partial(look_at_due, local_id=KP, now_ms=NOW_MS)
    assert glance.read(look).digest is None
    announced(store, KP, DIGEST)
    assert glance.read(look).digest == DIGEST


def test_a_look_keeps_no_table_from_being_migrated(store: Store, glance: Glance) -> None:
    # A transaction that was left open would hold the table's definition until it ends.
    assert glance.read(partial(look_at_due, local_id=KP, now_ms=NOW_MS)) == Due(expired=False, digest=None)
    with store.connect() as connection, connection.cursor() as cursor:
        cursor.execute("SET SESSION lock_wait_timeout = 2")
        cursor.execute("ALTER TABLE key_records ADD COLUMN added INT NULL")


def test_a_connection_that_the_server_has_ended_costs_one_look(
    store: Store, glance: Glance, mariadb: MariaDbServer
) -> None:
    look = partial(look_at_due, local_id=KP, now_ms=NOW_MS)
    glance.read(look)
    assert glance._own._connection is not None
    with glance._own._connection.cursor() as cursor:
        cursor.execute("SELECT CONNECTION_ID()")
        (server_id,) = cursor.fetchone() or (0,)
    with mariadb.admin_connection() as connection, connection.cursor() as cursor:
        cursor.execute(f"KILL {server_id}")
    with pytest.raises(StoreUnavailable):
        glance.read(look)
    assert glance.read(look) == Due(expired=False, digest=None)


def test_a_store_that_is_away_or_refuses_is_told_as_such(store: Store, glance: Glance) -> None:
    look = partial(look_at_due, local_id=KP, now_ms=NOW_MS)
    mysql = store.settings.mysql
    with pytest.raises(StoreUnavailable):
        Glance(replace(mysql, port=1)).read(look)
    store.rows("DROP TABLE announcements")
    # The second question of the packet: its error must not be missed.
    with pytest.raises(StoreRefused):
        glance.read(look)
