"""Facts about zeroizing: only what has expired goes, sources are notified, and what nobody tends is swept up late."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace

import pytest

from skipbus.services.janitor import expiry
from skipbus.services.janitor.expiry import ABANDONED_AFTER_MS, BATCH, PACE_PER_SECOND, Zeroizer
from skipbus.shared.errors import StoreUnavailable
from skipbus.shared.protocol import encoding
from skipbus.shared.store.engine import connect, driver_errors
from skipbus.shared.store.key_records import fetch_expired, fetch_key_range
from tests.integration.key_providers import Store

NOW_MS = 1_800_000_000_000


@pytest.fixture
def zeroizer(store: Store) -> Zeroizer:
    return zeroizer_of(store, "KP_Bob")


def zeroizer_of(store: Store, local_id: str) -> Zeroizer:
    return Zeroizer(store.engine, local_id, lambda: True)


def fill(
    store: Store, expiries_ms: list[int], target: str = "KP_Bob", source: str = "KP_Alice", first: int = 0
) -> list[bytes]:
    """Records that expire at these times; the store looks at nothing else of them."""
    key_ids = [(first + n).to_bytes(16, "big") for n in range(len(expiries_ms))]
    with store.connect() as connection, connection.cursor() as cursor:
        cursor.executemany(
            "INSERT INTO key_records (target_id, expires_ms, key_id, source_id, size_bits, wrapping_key_id, nonce, "
            "sealed, correlation_id) VALUES (%s, %s, %s, %s, 256, 'w', 'n', 's', %s)",
            [(target, at, i, source, f"c-{n}") for n, (at, i) in enumerate(zip(expiries_ms, key_ids, strict=True))],
        )
        connection.commit()
    return key_ids


def key_ids_left(store: Store) -> list[bytes]:
    return [row[0] for row in store.rows("SELECT key_id FROM key_records ORDER BY key_id")]


def reported(store: Store) -> list[tuple[str, str, list[list[object]]]]:
    """(by whom, to whom, of which keys) in the outbox."""
    rows = store.rows("SELECT local_id, peer_id, type, payload, items, created_ms FROM outbox ORDER BY id")
    for row in rows:
        assert row[2] == "key.expired"
        assert len(encoding.unpack(row[3])) == row[4]
    return [(row[0], row[1], sorted(encoding.unpack(row[3]))) for row in rows]


def test_only_the_expired_are_zeroized(store: Store, zeroizer: Zeroizer) -> None:
    key_ids = fill(store, [NOW_MS - 3_600_000, NOW_MS - 1, NOW_MS, NOW_MS + 1, NOW_MS + 3_600_000])
    assert zeroizer.zeroize_own(NOW_MS) == 3
    assert key_ids_left(store) == key_ids[3:]


def test_nothing_expired_is_nothing_done(store: Store, zeroizer: Zeroizer) -> None:
    fill(store, [NOW_MS + 1])
    assert zeroizer.zeroize_own(NOW_MS) == 0
    assert reported(store) == []


def test_every_source_is_told_of_its_own_keys_with_their_correlation_ids(store: Store, zeroizer: Zeroizer) -> None:
    alices = fill(store, [NOW_MS - 2, NOW_MS - 1], source="KP_Alice")
    (carols,) = fill(store, [NOW_MS - 5], source="KP_Carol", first=100)
    zeroizer.zeroize_own(NOW_MS)
    assert sorted(reported(store)) == [
        ("KP_Bob", "KP_Alice", [[alices[0], NOW_MS - 2, "c-0"], [alices[1], NOW_MS - 1, "c-1"]]),
        ("KP_Bob", "KP_Carol", [[carols, NOW_MS - 5, "c-0"]]),
    ]


def hold_as_stock(store: Store, key_ids: list[bytes], source: str = "KP_Alice", local: str = "KP_Bob") -> None:
    for key_id in key_ids:
        store.rows(
            "INSERT INTO stock_held (local_id, source_id, key_id, expires_ms) VALUES (%s, %s, %s, %s)",
            local,
            source,
            key_id,
            NOW_MS,
        )


def test_stock_that_was_given_to_nobody_expires_without_a_word(store: Store, zeroizer: Zeroizer) -> None:
    issued, held, issued_too = fill(store, [NOW_MS - 3, NOW_MS - 2, NOW_MS - 1])
    carols = fill(store, [NOW_MS - 2] * 2, source="KP_Carol", first=100)
    daves = fill(store, [NOW_MS - 2], source="KP_Dave", first=200)
    hold_as_stock(store, [held])
    hold_as_stock(store, carols, source="KP_Carol")
    # What is another's stock, or stock of another source, is not this one's.
    hold_as_stock(store, [issued], source="KP_Dave")
    hold_as_stock(store, [issued_too, *daves], local="KP_Other")
    assert zeroizer.zeroize_own(NOW_MS) == 6
    assert store.count("key_records") == 0
    assert sorted(reported(store)) == [
        ("KP_Bob", "KP_Alice", [[issued, NOW_MS - 3, "c-0"], [issued_too, NOW_MS - 1, "c-2"]]),
        ("KP_Bob", "KP_Dave", [[daves[0], NOW_MS - 2, "c-0"]]),
    ]


def test_a_whole_batch_of_the_longest_entries_is_told_of_as_it_is(store: Store, zeroizer: Zeroizer) -> None:
    key_ids = [n.to_bytes(64, "big") for n in range(BATCH)]
    longest, last_ms = "c" * 64, 2**62
    with store.connect() as connection, connection.cursor() as cursor:
        cursor.executemany(
            "INSERT INTO key_records (target_id, expires_ms, key_id, source_id, size_bits, wrapping_key_id, nonce, "
            "sealed, correlation_id) VALUES ('KP_Bob', %s, %s, 'KP_Alice', 256, 'w', 'n', 's', %s)",
            [(last_ms, key_id, longest) for key_id in key_ids],
        )
        connection.commit()
    assert zeroizer.zeroize_own(last_ms) == BATCH
    assert reported(store) == [("KP_Bob", "KP_Alice", [[key_id, last_ms, longest] for key_id in key_ids])]


def test_whatever_octets_a_key_id_has_it_is_told_of_as_it_is(store: Store, zeroizer: Zeroizer) -> None:
    with store.connect() as connection, connection.cursor() as cursor:
        cursor.executemany(
            "INSERT INTO key_records (target_id, expires_ms, key_id, source_id, size_bits, wrapping_key_id, nonce, "
            "sealed, correlation_id) VALUES ('KP_Bob', %s, %s, 'KP_Alice', 256, 'w', 'n', 's', '')",
            [(n + 1, bytes([n]) * 16) for n in range(256)],
        )
        connection.commit()
    assert zeroizer.zeroize_own(NOW_MS) == 256
    assert reported(store) == [("KP_Bob", "KP_Alice", [[bytes([n]) * 16, n + 1, ""] for n in range(256)])]


def test_more_than_a_batch_goes_in_several_and_every_key_is_told_of_once(
    store: Store, zeroizer: Zeroizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    worked: list[float] = []

    def pause_seconds(worked_seconds: float) -> float:
        worked.append(worked_seconds)
        return 0.0

    monkeypatch.setattr(expiry, "pause_seconds", pause_seconds)
    # Many expire in the same millisecond, and batches end in the middle of one.
    expiries = [NOW_MS - 1 - n // 700 for n in range(2 * BATCH + 300)]
    key_ids = fill(store, expiries)
    kept = fill(store, [NOW_MS + 1] * 5, first=10**6)
    assert zeroizer.zeroize_own(NOW_MS) == len(key_ids)
    assert key_ids_left(store) == kept
    reports = [item for _, _, items in reported(store) for item in items]
    assert len(reported(store)) == 3
    assert len(worked) == 2
    assert sorted(item[0] for item in reports) == key_ids  # type: ignore[type-var]


@pytest.mark.parametrize(
    ("worked_seconds", "pause_seconds"),
    [
        (0.01, 0.025),
        (0.04, 0.1),
        (0.09, BATCH / PACE_PER_SECOND - 0.09),
        (0.2, 0.1),
    ],
)
def test_it_pauses_for_a_million_keys_in_a_minute_but_within_bounds(
    worked_seconds: float, pause_seconds: float
) -> None:
    assert expiry.pause_seconds(worked_seconds) == pytest.approx(pause_seconds)
    assert 10**6 / PACE_PER_SECOND < 57


def test_keys_of_other_targets_are_left_to_their_own_janitors(store: Store, zeroizer: Zeroizer) -> None:
    fill(store, [NOW_MS - 1])
    others = fill(store, [NOW_MS - 1] * 3, target="KP_Carol", first=100)
    others += fill(store, [NOW_MS - 1] * 3, target="KP_Bobby", first=200)
    others += fill(store, [NOW_MS - 1] * 3, target="KP_bob", first=300)
    assert zeroizer.zeroize_own(NOW_MS) == 1
    assert key_ids_left(store) == others


def test_keys_that_nobody_tends_are_swept_up_after_a_minute_without_a_word(store: Store, zeroizer: Zeroizer) -> None:
    own = fill(store, [NOW_MS - ABANDONED_AFTER_MS - 5])
    fresh, stale = fill(store, [NOW_MS - ABANDONED_AFTER_MS + 1, NOW_MS - ABANDONED_AFTER_MS], "KP_Gone", first=100)
    (stale_too,) = fill(store, [NOW_MS - 10**9], "KP_Long_Gone", first=200)
    assert zeroizer.zeroize_abandoned(NOW_MS) == 2
    left = key_ids_left(store)
    assert stale not in left
    assert stale_too not in left
    assert left == [*own, fresh]
    assert reported(store) == []


def test_two_janitors_at_once_zeroize_every_key_once(store: Store, zeroizer: Zeroizer) -> None:
    key_ids = fill(store, [NOW_MS - 1] * 50)
    # The first holds its batch locked; the second must wait, and then find nothing.
    with store.engine.begin() as connection:
        key_range = fetch_key_range(connection, "KP_Bob", 0, NOW_MS, BATCH)
        assert [of_source.items for of_source in fetch_expired(connection, key_range)] == [50]
        with closing(connect(store.settings.mysql)) as other, other.cursor() as cursor:
            cursor.execute("SET SESSION innodb_lock_wait_timeout = 1")
            with pytest.raises(StoreUnavailable), driver_errors():
                cursor.execute("SELECT key_id FROM key_records WHERE target_id = 'KP_Bob' FOR UPDATE")
    assert zeroizer.zeroize_own(NOW_MS) == 50
    assert zeroizer_of(store, "KP_Bob").zeroize_own(NOW_MS) == 0
    assert len([item for _, _, items in reported(store) for item in items]) == len(key_ids)


def test_a_stop_ends_the_work_after_the_batch_in_hand(store: Store) -> None:
    fill(store, [NOW_MS - 1] * (BATCH + 10))
    go_on = iter([True, False])
    assert Zeroizer(store.engine, "KP_Bob", lambda: next(go_on)).zeroize_own(NOW_MS) == BATCH
    assert store.count("key_records") == 10


def test_a_key_is_told_of_only_when_it_is_gone(store: Store, zeroizer: Zeroizer) -> None:
    fill(store, [NOW_MS - 1])
    with store.without_table("outbox"), pytest.raises(Exception, match="store refused"):
        zeroizer.zeroize_own(NOW_MS)
    assert store.count("key_records") == 1
    assert zeroizer.zeroize_own(NOW_MS) == 1
    assert len(reported(store)) == 1


def test_an_unreachable_store_is_a_backend_error(store: Store) -> None:
    settings = replace(store.settings.mysql, port=1)
    with pytest.raises(StoreUnavailable):
        connect(settings)
