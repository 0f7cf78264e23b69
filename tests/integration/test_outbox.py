"""Facts about the outbox as the elected syncer works on it: what it claims, and what it counts."""

from __future__ import annotations

import secrets
from pathlib import Path

import pytest

from skipbus.services.syncer.leader import SequenceNumbers
from skipbus.services.syncer.outbox import MAX_ROWS, Outbox
from skipbus.shared.protocol import encoding
from skipbus.shared.store.outbox import OutboxRow, insert_outbox_rows
from tests.integration.key_providers import Store, settings_for

KP, BOB, CAROL = "KP_Alice", "KP_Bob", "KP_Carol"
NOW_MS = 1_800_000_000_000


def row(peer_id: str = BOB, kind: str = "key.retrieved") -> OutboxRow:
    payload = encoding.pack([[secrets.token_bytes(16), NOW_MS, "c"]])
    return OutboxRow(KP, peer_id, kind, payload, 1, NOW_MS)


@pytest.fixture
def outbox(store: Store, tmp_path: Path) -> Outbox:
    return Outbox(settings_for(store.database, KP, tmp_path / "keyring"), store.engine, SequenceNumbers())


def insert(store: Store, *rows: OutboxRow) -> None:
    with store.engine.begin() as connection:
        insert_outbox_rows(connection, rows)


def test_a_writer_that_has_not_committed_yet_delays_no_other_row(store: Store, outbox: Outbox) -> None:
    with store.engine.connect() as writer:
        insert_outbox_rows(writer, [row(BOB)])
        insert(store, row(CAROL))
        numbered, more = outbox.number_new_rows()
        assert [one.envelope.peer_id for one in numbered] == [CAROL]
        assert not more
        writer.commit()
    numbered, _ = outbox.number_new_rows()
    assert [one.envelope.peer_id for one in numbered] == [BOB]


def test_rows_are_numbered_and_counted_once(store: Store, outbox: Outbox) -> None:
    insert(store, row(), row(), row(CAROL))
    numbered, _ = outbox.number_new_rows()
    assert sorted((one.envelope.peer_id, one.envelope.items) for one in numbered) == [(BOB, 2), (CAROL, 1)]
    assert outbox.number_new_rows() == ([], False)
    counted = store.rows("SELECT peer_id, inbound_retrieved FROM peers WHERE local_id = %s ORDER BY peer_id", KP)
    assert counted == [(BOB, 2), (CAROL, 1)]
    known = {one.number for one in numbered}
    assert {envelope.number for envelope in outbox.fetch_unacknowledged()} == known


def test_more_rows_than_one_round_takes_are_left_for_the_next(store: Store, outbox: Outbox) -> None:
    insert(store, *(row() for _ in range(MAX_ROWS + 1)))
    numbered, more = outbox.number_new_rows()
    assert more
    rest, more = outbox.number_new_rows()
    assert not more
    assert sum(one.envelope.items for one in (*numbered, *rest)) == MAX_ROWS + 1


def test_a_malformed_row_is_numbered_and_marked_and_the_others_are_read(store: Store, outbox: Outbox) -> None:
    insert(store, row(CAROL)._replace(payload=b"\xc1"), row(BOB))
    numbered, _ = outbox.number_new_rows()
    assert {one.envelope.peer_id: one.malformed for one in numbered} == {BOB: False, CAROL: True}
    assert set(outbox.read(numbered)) == {one.number for one in numbered if not one.malformed}
