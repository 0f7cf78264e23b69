"""Facts about pruning: what nobody needs any more goes, what somebody may still need stays."""

from __future__ import annotations

import pytest

from skipbus.services.janitor import pruning
from skipbus.services.janitor.pruning import WITHDRAWN_KEPT_MS, prune
from skipbus.shared.crypto.epochs import MAX_CLOCK_SKEW_MS
from skipbus.shared.store.inbox import INBOX_LIFETIME_MS, insert_inbox
from skipbus.shared.store.outbox import OUTBOX_LIFETIME_MS, OutboxRow, insert_outbox_rows
from skipbus.shared.store.processes import ProcessSeen, fetch_processes, upsert_process
from tests.integration.key_providers import Store

NOW_MS = 1_800_000_000_000
KP = "KP_Alice"


def prune_now(store: Store) -> None:
    prune(store.engine, KP, NOW_MS, lambda: True)


def add_wrapping_key(store: Store, name: bytes, expires_ms: int) -> None:
    store.rows("INSERT INTO wrapping_keys VALUES (%s, 'KP_Bob', %s, 'e', 's', 's', %s)", name.ljust(16), KP, expires_ms)


def test_wrapping_keys_go_when_their_epoch_is_destroyed(store: Store) -> None:
    add_wrapping_key(store, b"gone", NOW_MS)
    add_wrapping_key(store, b"long gone", 1)
    add_wrapping_key(store, b"needed", NOW_MS + 1)
    prune_now(store)
    assert store.rows("SELECT wrapping_key_id FROM wrapping_keys") == [(b"needed".ljust(16),)]


def add_notes(store: Store, local_id: str, key_id: bytes, expires_ms: int) -> None:
    for table in ("stock_held", "withdrawn_keys"):
        store.rows(f"INSERT INTO {table} VALUES (%s, 'KP_Carol', %s, %s)", local_id, key_id, expires_ms)


def key_ids(store: Store, table: str) -> list[bytes]:
    return [row[0] for row in store.rows(f"SELECT key_id FROM {table} ORDER BY key_id")]


def test_notes_on_stock_go_when_it_expires_and_only_ones_own(store: Store) -> None:
    add_notes(store, KP, b"1", NOW_MS)
    add_notes(store, KP, b"2", NOW_MS + 1)
    add_notes(store, "KP_Bob", b"3", 1)
    prune_now(store)
    assert key_ids(store, "stock_held") == [b"2", b"3"]


def test_a_withdrawal_is_remembered_until_no_clock_would_have_its_record_stored(store: Store) -> None:
    assert WITHDRAWN_KEPT_MS > MAX_CLOCK_SKEW_MS
    add_notes(store, KP, b"1", NOW_MS - WITHDRAWN_KEPT_MS)
    add_notes(store, KP, b"2", NOW_MS - WITHDRAWN_KEPT_MS + 1)
    add_notes(store, "KP_Bob", b"3", 1)
    prune_now(store)
    assert key_ids(store, "withdrawn_keys") == [b"2", b"3"]


def test_outbox_rows_go_after_a_day_and_only_ones_own(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    with store.engine.begin() as connection:
        for local_id, peer_id, created_ms in (
            (KP, "KP_Late", NOW_MS - OUTBOX_LIFETIME_MS - 1),
            (KP, "KP_Bob", NOW_MS - OUTBOX_LIFETIME_MS),
            ("KP_Bob", KP, NOW_MS - OUTBOX_LIFETIME_MS - 1),
        ):
            insert_outbox_rows(connection, [OutboxRow(local_id, peer_id, "key.issued", b"\x90", 0, created_ms)])
    prune_now(store)
    assert store.rows("SELECT local_id, peer_id FROM outbox ORDER BY id") == [(KP, "KP_Bob"), ("KP_Bob", KP)]
    assert "events given up" in capsys.readouterr().out


def test_handled_envelopes_are_remembered_for_longer_than_any_can_be_sent_again(store: Store) -> None:
    assert INBOX_LIFETIME_MS > OUTBOX_LIFETIME_MS
    with store.engine.begin() as connection:
        insert_inbox(connection, KP, "KP_Bob", 1, NOW_MS - INBOX_LIFETIME_MS - 1)
        insert_inbox(connection, KP, "KP_Bob", 2, NOW_MS - INBOX_LIFETIME_MS)
        insert_inbox(connection, "KP_Bob", KP, 3, NOW_MS - INBOX_LIFETIME_MS - 1)
    prune_now(store)
    assert store.rows("SELECT envelope_no FROM inbox ORDER BY 1") == [(2,), (3,)]


def test_processes_that_fell_silent_an_hour_ago_are_forgotten(store: Store) -> None:
    with store.engine.begin() as connection:
        upsert_process(connection, KP, "api", "host:1", NOW_MS - 3_600_001, "ok")
        upsert_process(connection, KP, "api", "host:2", NOW_MS - 3_600_000, "ok")
        upsert_process(connection, "KP_Bob", "api", "host:3", 1, "ok")
    prune_now(store)
    with store.engine.connect() as connection:
        assert fetch_processes(connection, KP) == [ProcessSeen("api", "host:2", NOW_MS - 3_600_000, "ok")]
        assert len(fetch_processes(connection, "KP_Bob")) == 1


def test_a_sign_of_life_replaces_the_one_before_and_a_long_one_is_cut(store: Store) -> None:
    with store.engine.begin() as connection:
        upsert_process(connection, KP, "janitor", "host:1", NOW_MS, "ok")
        upsert_process(connection, KP, "janitor", "host:1", NOW_MS + 1, "x" * 1000)
    with store.engine.connect() as connection:
        assert fetch_processes(connection, KP) == [ProcessSeen("janitor", "host:1", NOW_MS + 1, "x" * 255)]


def test_more_rows_than_a_batch_all_go(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pruning, "_ROWS", 7)
    for n in range(30):
        add_wrapping_key(store, f"gone {n}".encode(), NOW_MS - n)
        add_notes(store, KP, f"gone {n}".encode(), n)
    with store.engine.begin() as connection:
        for n in range(30):
            insert_inbox(connection, KP, "KP_Bob", n, 1)
            insert_outbox_rows(connection, [OutboxRow(KP, "KP_Bob", "key.issued", b"\x90", 0, 1)])
    prune_now(store)
    tables = ("wrapping_keys", "stock_held", "withdrawn_keys", "inbox", "outbox")
    assert [store.count(table) for table in tables] == [0] * 5


def test_a_stop_is_heeded_between_batches(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pruning, "_ROWS", 7)
    for n in range(30):
        add_wrapping_key(store, f"gone {n}".encode(), 1)
    answers = iter([True, False])
    prune(store.engine, KP, NOW_MS, lambda: next(answers, False))
    assert store.count("wrapping_keys") == 23
