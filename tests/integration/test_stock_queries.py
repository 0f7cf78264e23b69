"""Facts about the queries of stock: what is counted, claimed and deleted."""

from __future__ import annotations

import secrets

from skipbus.shared.crypto.sealing import KeyRecord
from skipbus.shared.store import stock
from skipbus.shared.store.listed import delete_listed
from skipbus.shared.store.schema import STOCK_HELD
from skipbus.shared.store.stock import StockLevel, StockRow
from tests.integration.key_providers import Store

KP, OTHER = "KP_Alice", "KP_Ällice"
PEER, SECOND = "KP_Bob", "KP_Carol"
NOW_MS = 1_800_000_000_000
# What escaping by hand would get wrong.
ODD = b"'\\\0\n\r\x1a\"%s" + b"\xff" * 6


def copies(count: int, expires_ms: int) -> list[KeyRecord]:
    return [
        KeyRecord(secrets.token_bytes(16), KP, KP, 256, expires_ms, b"w" * 16, b"n" * 12, b"s" * 48, "")
        for _ in range(count)
    ]


def stocked(store: Store, local_id: str, peer_id: str, expires_ms: int, *, placed: bool, count: int = 1) -> list[bytes]:
    """keyIds of new stock."""
    token, made = secrets.token_bytes(16), copies(count, expires_ms)
    with store.engine.begin() as connection:
        stock.insert_stock(connection, local_id, peer_id, token, made)
        if placed:
            stock.update_stock_placed(connection, [token], NOW_MS)
    return [copy.key_id for copy in made]


def held(store: Store, local_id: str, source_id: str, *key_ids: bytes) -> None:
    for key_id in key_ids:
        store.rows("INSERT INTO stock_held VALUES (%s, %s, %s, 1)", local_id, source_id, key_id)


def test_stock_is_counted_by_peer_and_only_where_it_lives_long_enough(store: Store) -> None:
    for expires_ms, placed in ((NOW_MS - 1, True), (NOW_MS, True), (NOW_MS + 1, True), (NOW_MS + 1, False)):
        stocked(store, KP, PEER, expires_ms, placed=placed)
    stocked(store, OTHER, PEER, NOW_MS + 1, placed=True)
    with store.engine.connect() as connection:
        assert stock.fetch_stock_level(connection, KP, PEER, NOW_MS) == StockLevel(2, 1)
        assert stock.fetch_stock_level(connection, KP, SECOND, NOW_MS) == StockLevel(0, 0)


def test_held_stock_is_counted_by_source(store: Store) -> None:
    held(store, KP, PEER, b"a", b"b")
    held(store, OTHER, PEER, b"c")
    with store.engine.connect() as connection:
        assert stock.fetch_held_counts(connection, KP) == {PEER: 2}


def test_of_each_peers_stock_the_oldest_is_found(store: Store) -> None:
    for peer_id, expires_ms in ((PEER, NOW_MS + 9), (PEER, NOW_MS + 5), (SECOND, NOW_MS + 7)):
        stocked(store, KP, peer_id, expires_ms, placed=True)
    stocked(store, OTHER, PEER, NOW_MS, placed=True)
    with store.engine.connect() as connection:
        assert stock.fetch_oldest_stock(connection, KP) == {PEER: NOW_MS + 5, SECOND: NOW_MS + 7}


def test_a_claim_gets_placed_keys_that_live_long_enough_the_oldest_first(store: Store) -> None:
    stocked(store, KP, PEER, NOW_MS - 1, placed=True)
    (late,) = stocked(store, KP, PEER, NOW_MS + 9, placed=True)
    (early,) = stocked(store, KP, PEER, NOW_MS, placed=True)
    stocked(store, KP, PEER, NOW_MS + 1, placed=False)
    stocked(store, KP, SECOND, NOW_MS + 1, placed=True)
    with store.engine.connect() as connection:
        claimed = stock.claim_stock(connection, KP, PEER, NOW_MS, 10)
    assert [record.key_id for record in claimed] == [early, late]
    assert {(record.source_id, record.target_id) for record in claimed} == {(KP, KP)}


def test_what_is_too_old_and_what_a_refused_row_carried_is_found_for_deletion(store: Store) -> None:
    (old,) = stocked(store, KP, PEER, NOW_MS - 1, placed=True)
    (young,) = stocked(store, KP, PEER, NOW_MS, placed=False)
    with store.engine.begin() as connection:
        (row,) = stock.claim_old_stock(connection, KP, PEER, NOW_MS, 10)
        assert (row.key_id, row.expires_ms, row.placed) == (old, NOW_MS - 1, True)
        (token,) = store.rows("SELECT token FROM stock WHERE key_id = %s", young)[0]
        assert stock.claim_stock_of_tokens(connection, KP, [token, row.token]) == [
            StockRow(young, NOW_MS, token, placed=False)
        ]
        assert stock.delete_stock(connection, [old, secrets.token_bytes(16)]) == 1
    assert store.count("stock") == 1


def test_a_deletion_by_a_long_list_deletes_what_is_listed_and_nothing_else(store: Store) -> None:
    ids = [n.to_bytes(16, "big") for n in range(2_500)] + [ODD]
    store.rows("INSERT INTO stock_held VALUES " + ",".join(f"('{KP}','{PEER}',0x{i.hex()},1)" for i in ids))
    held(store, OTHER, PEER, ids[1])
    held(store, KP, SECOND, ids[1])
    with store.engine.begin() as connection:
        assert delete_listed(connection, STOCK_HELD.name, "PRIMARY", "key_id", []) == 0
        assert stock.delete_stock_held(connection, KP, PEER, ids[1:]) == 2_500
    assert sorted(store.rows("SELECT local_id, source_id, key_id FROM stock_held")) == sorted(
        [(KP, PEER, ids[0]), (OTHER, PEER, ids[1]), (KP, SECOND, ids[1])]
    )


def test_a_key_that_is_noted_as_held_twice_stays_as_it_is(store: Store) -> None:
    record = copies(1, NOW_MS)[0]
    with store.engine.begin() as connection:
        stock.insert_stock_held(connection, KP, PEER, [record])
        stock.insert_stock_held(connection, KP, PEER, [record._replace(expires_ms=1)])
    assert store.rows("SELECT expires_ms FROM stock_held") == [(NOW_MS,)]
