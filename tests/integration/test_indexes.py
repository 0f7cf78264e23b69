"""Facts about cost: on a filled store no statement of ``shared/store`` reads a table, or an index, from end to end.

Every public function of the store is called here, and a new one fails the test until it is; what each sends is
caught on its way to the driver and explained by the server.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
from sqlalchemy import Connection, event

from sandbox.mariadb import Database, MariaDbServer
from skipbus.shared.crypto.sealing import KeyRecord, SealedWrappingKey
from skipbus.shared.protocol.announcements import Announcement
from skipbus.shared.store import (
    announcements,
    inbox,
    key_records,
    outbox,
    peers,
    pinned_identities,
    processes,
    stock,
    withdrawn_keys,
    wrapping_keys,
)
from tests.integration.key_providers import Store

Parameters = dict[str, object] | tuple[object, ...] | None
NOW_MS = 1_800_000_000_000
KP = "KP_17"
PEER = "KP_18"
KEY_IDS = [n.to_bytes(16, "big") for n in (3, 700, 2500)]
MODULES = (
    *(announcements, inbox, key_records, outbox, peers, pinned_identities),
    *(processes, stock, withdrawn_keys, wrapping_keys),
)

# What is asked for is the whole table: one row a KP, its long body left where it is.
WHOLE_TABLE_IS_THE_QUESTION = {"fetch_announcement_digests"}

RECORD = KeyRecord(b"new key id.16byt", KP, PEER, 256, NOW_MS, b"w" * 16, b"n" * 12, b"s" * 48, "c")
WRAPPING_KEY = SealedWrappingKey(b"new wrapping key", KP, PEER, b"e" * 16, NOW_MS, b"s", b"s")
FEW = [RECORD._replace(key_id=bytes([n]) * 16, expires_ms=NOW_MS + n) for n in range(20)]
MOST = [record.key_id for record in FEW[:-1]]
OUTBOX_ROW = outbox.OutboxRow(KP, PEER, "key.placed", b"\x90", 0, NOW_MS, b"r" * 16)
KEY_RANGE = key_records.KeyRange(KP, NOW_MS - 1000, NOW_MS, KEY_IDS[0])

CALLS: dict[str, Callable[[Connection], object]] = {
    "fetch_key_range": lambda c: key_records.fetch_key_range(c, KP, NOW_MS - 1000, NOW_MS, 100),
    "fetch_expired": lambda c: key_records.fetch_expired(c, KEY_RANGE),
    "delete_expired": lambda c: key_records.delete_expired(c, KEY_RANGE),
    "fetch_targets": key_records.fetch_targets,
    "delete_expired_wrapping_keys": lambda c: wrapping_keys.delete_expired_wrapping_keys(c, NOW_MS, 100),
    "delete_expired_held": lambda c: stock.delete_expired_held(c, KP, NOW_MS, 100),
    "delete_expired_withdrawn": lambda c: withdrawn_keys.delete_expired_withdrawn(c, KP, NOW_MS, 100),
    "claim_unsent_rows": lambda c: outbox.claim_unsent_rows(c, KP, 500),
    "update_numbered": lambda c: outbox.update_numbered(c, [5, 6], 77),
    "fetch_envelopes": lambda c: outbox.fetch_envelopes(c, KP),
    "fetch_payloads": lambda c: outbox.fetch_payloads(c, KP, PEER, 7),
    "fetch_waiting": lambda c: outbox.fetch_waiting(c, KP, PEER),
    "update_sent": lambda c: outbox.update_sent(c, KP, PEER, [7, 8], NOW_MS),
    "delete_acknowledged": lambda c: outbox.delete_acknowledged(c, KP, PEER, [7, 8]),
    "delete_expired_outbox": lambda c: outbox.delete_expired_outbox(c, KP, NOW_MS, 100),
    "insert_inbox": lambda c: inbox.insert_inbox(c, KP, PEER, 10**9, NOW_MS),
    "delete_expired_inbox": lambda c: inbox.delete_expired_inbox(c, KP, NOW_MS, 100),
    "add_to_counters": lambda c: peers.add_to_counters(c, KP, PEER, {"issued": 1}),
    "fetch_heartbeat_numbers": lambda c: peers.fetch_heartbeat_numbers(c, KP, [PEER]),
    "fetch_last_number": lambda c: peers.fetch_last_number(c, KP),
    "upsert_last_number": lambda c: peers.upsert_last_number(c, KP, 1),
    "update_last_number": lambda c: peers.update_last_number(c, KP, 2, 1),
    "upsert_heartbeats": lambda c: peers.upsert_heartbeats(c, KP, [peers.ReceivedHeartbeat(PEER, 1, 5000)], NOW_MS),
    "upsert_clock_skew": lambda c: peers.upsert_clock_skew(c, KP, PEER, 1, 5000),
    "fetch_liveness": lambda c: peers.fetch_liveness(c, KP),
    "fetch_peer_rows": lambda c: peers.fetch_peer_rows(c, KP),
    "upsert_announcement": lambda c: announcements.upsert_announcement(c, Announcement(KP, b"k", 1, "a", ()), b"body"),
    "fetch_announcement_digests": announcements.fetch_announcement_digests,
    "fetch_bus_announcement_digests": lambda c: announcements.fetch_bus_announcement_digests(c, KP),
    "fetch_announcement": lambda c: announcements.fetch_announcement(c, KP),
    "fetch_announcement_digest": lambda c: announcements.fetch_announcement_digest(c, KP),
    "fetch_announcement_issued_ms": lambda c: announcements.fetch_announcement_issued_ms(c, KP),
    "upsert_bus_announcement": lambda c: announcements.upsert_bus_announcement(
        c, KP, Announcement(PEER, b"k", 1, "a", ()), b"b"
    ),
    "delete_bus_announcement": lambda c: announcements.delete_bus_announcement(c, KP, PEER),
    "fetch_bus_announcement": lambda c: announcements.fetch_bus_announcement(c, KP, PEER),
    "fetch_pin": lambda c: pinned_identities.fetch_pin(c, KP, PEER),
    "fetch_pins": lambda c: pinned_identities.fetch_pins(c, KP),
    "insert_pin": lambda c: pinned_identities.insert_pin(c, KP, PEER, b"k", NOW_MS),
    "update_presented_key": lambda c: pinned_identities.update_presented_key(c, KP, PEER, b"k", NOW_MS),
    "update_pin": lambda c: pinned_identities.update_pin(c, KP, PEER, b"k", NOW_MS),
    "upsert_presented": lambda c: pinned_identities.upsert_presented(c, KP, PEER, b"k", b"p", NOW_MS),
    "upsert_process": lambda c: processes.upsert_process(c, KP, "api", "host:1", NOW_MS, "ok"),
    "fetch_processes": lambda c: processes.fetch_processes(c, KP),
    "delete_expired_processes": lambda c: processes.delete_expired_processes(c, KP, NOW_MS),
}
CALLS |= {
    "insert_key_records": lambda c: key_records.insert_key_records(c, [RECORD]),
    "claim_key_records": lambda c: key_records.claim_key_records(c, KEY_IDS),
    "delete_key_records": lambda c: key_records.delete_key_records(c, KEY_IDS),
    "fetch_expired_exists": lambda c: key_records.fetch_expired_exists(c, KP, NOW_MS),
    "fetch_key_record_exists": lambda c: key_records.fetch_key_record_exists(c, KEY_IDS[0]),
    "insert_outbox_rows": lambda c: outbox.insert_outbox_rows(c, [OUTBOX_ROW]),
    "fetch_tokens": lambda c: outbox.fetch_tokens(c, KEY_IDS),
    "insert_wrapping_keys": lambda c: wrapping_keys.insert_wrapping_keys(c, [WRAPPING_KEY]),
    "fetch_envelope_rows": lambda c: outbox.fetch_envelope_rows(c, KP, PEER, [7, 8]),
    "fetch_row_payloads": lambda c: outbox.fetch_row_payloads(c, [5, 6]),
    "delete_stocked_rows": lambda c: outbox.delete_stocked_rows(c, KP, PEER),
    "delete_stock_of_peer": lambda c: stock.delete_stock_of_peer(c, KP, PEER),
    "delete_rows": lambda c: outbox.delete_rows(c, [5, 6]),
    "fetch_rows_of_tokens": lambda c: outbox.fetch_rows_of_tokens(c, KEY_IDS),
    "delete_inbox": lambda c: inbox.delete_inbox(c, KP, PEER, 7),
    "upsert_rejection": lambda c: peers.upsert_rejection(c, KP, PEER, "no", NOW_MS),
    "fetch_known_key_ids": lambda c: key_records.fetch_known_key_ids(c, KEY_IDS),
    "insert_stock_held": lambda c: stock.insert_stock_held(c, KP, PEER, [RECORD]),
    "delete_stock_held": lambda c: stock.delete_stock_held(c, KP, PEER, KEY_IDS),
    "delete_key_records_of_source": lambda c: key_records.delete_key_records_of_source(c, KP, PEER, KEY_IDS),
    "insert_withdrawn_keys": lambda c: withdrawn_keys.insert_withdrawn_keys(c, KP, PEER, [(KEY_IDS[0], NOW_MS)]),
    "fetch_withdrawn_keys": lambda c: withdrawn_keys.fetch_withdrawn_keys(c, KP, PEER, KEY_IDS),
    "update_stock_placed": lambda c: stock.update_stock_placed(c, KEY_IDS, NOW_MS),
    "claim_old_stock": lambda c: stock.claim_old_stock(c, KP, PEER, NOW_MS, 100),
    "claim_stock_of_tokens": lambda c: stock.claim_stock_of_tokens(c, KP, KEY_IDS),
    "insert_stock": lambda c: stock.insert_stock(c, KP, PEER, b"t" * 16, [RECORD]),
    "claim_stock": lambda c: stock.claim_stock(c, KP, PEER, NOW_MS, 10),
    "delete_stock": lambda c: stock.delete_stock(c, KEY_IDS),
    "fetch_oldest_stock": lambda c: stock.fetch_oldest_stock(c, KP),
    "fetch_held_counts": lambda c: stock.fetch_held_counts(c, KP),
    "fetch_sealed_wrapping_keys": lambda c: wrapping_keys.fetch_sealed_wrapping_keys(c, KEY_IDS),
    "fetch_stock_level": lambda c: stock.fetch_stock_level(c, KP, PEER, NOW_MS),
}


@pytest.fixture(scope="module")
def store(mariadb: MariaDbServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """A store of thirty KPs, filled once for all tests of this module."""
    with mariadb.databases("indexes_filled") as (database,):
        made = Store(database, tmp_path_factory.mktemp("store"))
        fill(made)
        yield made
        made.close()


def fill(store: Store) -> None:
    kp, peer = "CONCAT('KP_', seq % 30)", "CONCAT('KP_', (seq DIV 30) % 30)"
    # MySQL has none of the sequence tables of MariaDB.
    store.rows("CREATE TABLE numbers (seq INT PRIMARY KEY)")
    store.rows("INSERT INTO numbers VALUES " + ",".join(f"({n})" for n in range(1, 6301)))
    id_of_seq = "UNHEX(LPAD(HEX(seq), 32, '0'))"
    contents = {
        "key_records": f"{kp}, {NOW_MS} - 3000 + seq, {id_of_seq}, {peer}, 256, {id_of_seq}, 'n', 's', 'c'",
        "wrapping_keys": f"{id_of_seq}, {kp}, {peer}, 'e', 's', 's', {NOW_MS} - 100 + seq",
        "outbox": f"seq, {kp}, {peer}, 'key.issued', 'p', 1, {id_of_seq}, {NOW_MS} - 100 + seq, "
        "IF(seq % 5 = 0, NULL, seq DIV 3), NULL, 0",
        "inbox": f"{kp}, {peer}, seq, {NOW_MS} - 100 + seq",
        "peers (local_id, peer_id)": f"DISTINCT {kp}, {peer}",
        "pinned_identities": f"DISTINCT {kp}, {peer}, 'k', 1, NULL, NULL",
        "announcements": f"DISTINCT {kp}, 'd', 'b', 1",
        "bus_announcements": f"DISTINCT {kp}, {peer}, 'd', 'b', 1",
        "stock": f"{kp}, {peer}, {NOW_MS} - 100 + seq, {id_of_seq}, 256, {id_of_seq}, 'n', 's', {id_of_seq}, "
        "IF(seq % 5 = 0, NULL, 1)",
        "stock_held": f"{kp}, {peer}, {id_of_seq}, {NOW_MS} - 100 + seq",
        "withdrawn_keys": f"{kp}, {peer}, {id_of_seq}, {NOW_MS} - 100 + seq",
        "processes": f"{kp}, 'api', CONCAT('host:', seq), {NOW_MS}, ''",
    }
    for table, columns in contents.items():
        store.rows(f"INSERT INTO {table} SELECT {columns} FROM numbers")
    for (table,) in store.rows("SHOW TABLES"):
        store.rows(f"ANALYZE TABLE {table}")


def public_functions(module: ModuleType) -> set[str]:
    """Those that execute statements on a connection that they are given."""
    return {
        name
        for name, value in vars(module).items()
        if inspect.isfunction(value)
        and value.__module__ == module.__name__
        and not name.startswith("_")
        and "connection" in inspect.signature(value).parameters
    }


def explain(store: Store, statement: str, parameters: Parameters) -> list[tuple[str, str, str]]:
    """(table, type, key) of each step, by the server's own plan. An INSERT of values reads nothing."""
    with store.connect() as connection, connection.cursor() as cursor:
        # MySQL shows a tree unless it is asked for the table.
        cursor.execute(f"EXPLAIN FORMAT=TRADITIONAL {statement}", parameters)
        assert cursor.description is not None
        names = [column[0] for column in cursor.description]
        rows = [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]
    return [(str(row["table"]), str(row["type"]), str(row["key"])) for row in rows]


def assert_indexed(store: Store, statements: list[tuple[str, Parameters]]) -> None:
    for statement, parameters in statements:
        if statement.upper().startswith(("INSERT", "COMMIT", "ROLLBACK", "SET SESSION")):
            continue
        for table, access, key in explain(store, statement, parameters):
            # No step has a table where the plan shows an impossible condition, or the best row at once; a list that
            # stands in the statement itself is read from end to end.
            if table != "None" and not table.startswith(("<derived", "<union")):
                assert access not in ("ALL", "index"), f"{statement}\nreads all of {table} (key {key})"
                assert key != "None", statement


def test_every_function_of_the_store_is_explained_here() -> None:
    assert set(CALLS) == set().union(*map(public_functions, MODULES))


@pytest.mark.parametrize("name", sorted(set(CALLS) - WHOLE_TABLE_IS_THE_QUESTION))
def test_statement_uses_an_index(store: Store, name: str) -> None:
    statements = statements_of(store, CALLS[name])
    assert statements
    assert_indexed(store, statements)


def test_of_what_bus_peers_announced_only_this_kps_own_part_is_read(store: Store) -> None:
    statements = statements_of(store, lambda c: announcements.fetch_bus_announcement_digests(c, KP))
    (plan,) = [step for step in explain(store, *statements[0]) if step[0] == "bus_announcements"]
    assert plan[1:] == ("ref", "PRIMARY")


@pytest.fixture
def small(database: Database, tmp_path: Path) -> Iterator[Store]:
    """A store with a handful of keys: the optimizer would rather read them all than look most of them up."""
    made = Store(database, tmp_path)
    with made.engine.begin() as connection:
        key_records.insert_key_records(connection, FEW)
    made.rows("ANALYZE TABLE key_records")
    yield made
    made.close()


@pytest.mark.parametrize("wanted", [MOST, MOST[:1]], ids=["most", "one"])
def test_statements_on_a_small_store_do_not_scan_it(small: Store, wanted: list[bytes]) -> None:
    for call in (key_records.claim_key_records, key_records.delete_key_records):
        assert_indexed(small, statements_of(small, lambda c, call=call: call(c, wanted)))  # type: ignore[misc]


def test_a_claim_on_a_small_store_waits_for_no_record_of_others(small: Store) -> None:
    # A scan reads the other caller's row, and waits for its lock until the transaction is given up.
    with small.engine.connect() as other, small.engine.connect() as mine:
        assert set(key_records.claim_key_records(other, [FEW[-1].key_id])) == {FEW[-1].key_id}
        assert set(key_records.claim_key_records(mine, MOST)) == set(MOST)
        assert key_records.delete_key_records(mine, MOST) == len(MOST)
        mine.commit()
        other.rollback()
    assert small.count("key_records") == 1


def test_a_deletion_tells_how_many_rows_there_were(small: Store) -> None:
    with small.engine.connect() as connection:
        assert key_records.delete_key_records(connection, [*MOST[:3], b"never there.16by"]) == 3
        assert key_records.delete_key_records(connection, MOST[:4]) == 1
        assert key_records.delete_key_records(connection, []) == 0


def statements_of(store: Store, call: Callable[[Connection], object]) -> list[tuple[str, Parameters]]:
    """What a function sends; rolled back."""
    statements: list[tuple[str, Parameters]] = []

    def note(_c: object, _cursor: object, statement: str, parameters: Parameters, *_: object) -> None:
        statements.append((statement, parameters))

    with store.engine.connect() as connection:
        event.listen(connection, "before_cursor_execute", note)
        call(connection)
        connection.rollback()
    return statements


# Each deletes by a list: of the rows of FEW, or of outbox rows with the same numbers as ids.
TOKENS = [bytes([n]) * 16 for n in range(20)]
ROW_IDS = list(range(1, 21))
DELETIONS: dict[str, tuple[str, Callable[[Connection], object]]] = {
    "delete_stock": ("stock", lambda c: stock.delete_stock(c, MOST)),
    "delete_stock_held": ("stock_held", lambda c: stock.delete_stock_held(c, KP, PEER, MOST)),
    "delete_rows": ("outbox", lambda c: outbox.delete_rows(c, ROW_IDS[:-1])),
    "delete_acknowledged": ("outbox", lambda c: outbox.delete_acknowledged(c, KP, PEER, ROW_IDS[:-1])),
}


@pytest.fixture
def few_on_a_link(database: Database, tmp_path: Path) -> Iterator[Store]:
    """A store with a handful of rows in each of the tables of a bus link."""
    made = Store(database, tmp_path)
    for n, record in enumerate(FEW):
        made.rows(
            "INSERT INTO outbox (id, local_id, peer_id, type, payload, items, token, created_ms, envelope_no) "
            "VALUES (%s, %s, %s, 'key.placed', 'p', 1, %s, 1, %s)",
            *(ROW_IDS[n], KP, PEER, TOKENS[n], ROW_IDS[n]),
        )
        made.rows("INSERT INTO stock_held VALUES (%s, %s, %s, 1)", KP, PEER, record.key_id)
        made.rows(
            "INSERT INTO stock VALUES (%s, %s, %s, %s, 256, 'w', 'n', 's', 't', 1)",
            *(KP, PEER, record.expires_ms, record.key_id),
        )
    for table in ("outbox", "stock", "stock_held"):
        made.rows(f"ANALYZE TABLE {table}")
    yield made
    made.close()


@pytest.mark.parametrize("name", sorted(DELETIONS))
def test_a_deletion_on_a_small_store_waits_for_no_row_of_others(few_on_a_link: Store, name: str) -> None:
    table, call = DELETIONS[name]
    held = "id = 20" if table == "outbox" else f"key_id = 0x{FEW[-1].key_id.hex()}"
    # By its whole primary key: a server that has to look for the row may lock others on its way, as MySQL 9.7 does.
    held += f" AND local_id = '{KP}' AND source_id = '{PEER}'" if table == "stock_held" else ""
    store = few_on_a_link
    with store.connect() as other, other.cursor() as cursor:
        assert cursor.execute(f"SELECT 1 FROM {table} WHERE {held} FOR UPDATE") == 1
        with store.engine.begin() as connection:
            call(connection)
        other.rollback()
    assert store.rows(f"SELECT COUNT(*) FROM {table} WHERE {held}") == [(1,)]
    assert store.count(table) == 1


def test_the_guard_itself_sees_a_statement_without_an_index(store: Store) -> None:
    with pytest.raises(AssertionError, match="reads all of key_records"):
        assert_indexed(store, [("SELECT * FROM key_records WHERE correlation_id = 'c'", None)])
