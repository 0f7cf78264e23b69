"""What verified envelopes do to the store: the whole effect of each or none, and once however often it comes."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator

import pymysql
import pytest
from sqlalchemy import event

from skipbus.services.syncer.apply import Applied, Applier, Result
from skipbus.services.syncer.verify import Verified
from skipbus.shared.clock import now_ms
from skipbus.shared.errors import StoreConflict, StoreUnavailable
from skipbus.shared.protocol.envelopes import EnvelopeType, Header
from skipbus.shared.protocol.payloads import Acknowledgement, Payload
from skipbus.shared.protocol.placed_keys import PlacedKeys, Record
from skipbus.shared.store.outbox import OutboxRow, insert_outbox_rows
from tests.integration.key_providers import Store

KP, PEER, STRANGER = "KP_Bob", "KP_Carol", "KP_Dora"
WRAPPING_KEY = (b"w" * 16, b"e" * 16, now_ms() + 3_600_000, b"sealed", b"signature")


@pytest.fixture
def applier(store: Store) -> Applier:
    return Applier(store.engine, KP, {PEER})


def accepted(payload: Payload, kind: EnvelopeType, number: int, sender: str = PEER) -> Verified:
    return Verified(Header(kind, sender, KP, number, now_ms()), payload, redelivered=False)


def record(key_id: bytes = b"") -> Record:
    return (key_id or secrets.token_bytes(16), 256, now_ms() + 60_000, "c", WRAPPING_KEY[0], b"n" * 12, b"s" * 48)


def placed(number: int, records: list[Record], *, stock: bool = False) -> Verified:
    return accepted(PlacedKeys(tuple(records), (WRAPPING_KEY,), stock), EnvelopeType.KEY_ISSUED, number)


def acknowledged(*numbers: int, sender: str = PEER) -> Verified:
    return accepted(Acknowledgement(numbers), EnvelopeType.KEY_STORED, 99, sender)


def apply(applier: Applier, *batch: Verified) -> Applied:
    return applier.apply(batch, now_ms(), again=False)


def state(store: Store) -> list[list[tuple[object, ...]]]:
    """All that keys and acknowledgements change, without times."""
    return [
        store.rows("SELECT target_id, source_id, key_id, sealed, correlation_id FROM key_records ORDER BY key_id"),
        store.rows("SELECT local_id, sender_id, envelope_no FROM inbox"),
        store.rows("SELECT local_id, peer_id, issued, inbound_issued, inbound_withdrawn FROM peers"),
        store.rows("SELECT peer_id, type, envelope_no FROM outbox ORDER BY id"),
        store.rows("SELECT key_id FROM stock_held ORDER BY key_id"),
    ]


def outbox(store: Store, *types: str, items: int = 1) -> list[bytes]:
    """A row for the peer of each type, in envelopes of their own from 1 on; their tokens."""
    tokens = [secrets.token_bytes(16) for _ in types]
    rows = [OutboxRow(KP, PEER, kind, b"\x90", items, now_ms(), one) for kind, one in zip(types, tokens, strict=True)]
    with store.engine.begin() as connection:
        insert_outbox_rows(connection, rows)
    for number, token in enumerate(tokens, 1):
        store.rows("UPDATE outbox SET envelope_no = %s WHERE token = %s", number, token)
    return tokens


def take_back(store: Store, source: str, key_id: object) -> None:
    store.rows("INSERT INTO withdrawn_keys VALUES (%s, %s, %s, %s)", KP, source, key_id, now_ms() + 60_000)


# --- keys


def test_keys_are_stored_counted_and_remembered(store: Store, applier: Applier) -> None:
    records = [record(b"a" * 16), record(b"b" * 16)]
    done = apply(applier, placed(7, records))
    assert done.results == [Result.HANDLED]
    assert done.after_commit.arrived == [b"a" * 16, b"b" * 16]
    assert state(store) == [
        [(KP, PEER, key_id, b"s" * 48, "c") for key_id in (b"a" * 16, b"b" * 16)],
        [(KP, PEER, 7)],
        [(KP, PEER, 0, 2, 0)],
        [],
        [],
    ]


def test_keys_whose_wrapping_key_is_known_are_stored_as_the_first_ones(store: Store, applier: Applier) -> None:
    for number in (7, 8):
        assert apply(applier, placed(number, [record()])).results == [Result.HANDLED]
    assert (store.count("key_records"), store.count("wrapping_keys")) == (2, 1)


def test_stock_is_held_and_neither_counted_nor_announced(store: Store, applier: Applier) -> None:
    done = apply(applier, placed(7, [record(b"a" * 16)], stock=True))
    assert done.after_commit.arrived == []
    assert state(store)[2:] == [[], [], [(b"a" * 16,)]]
    assert store.count("key_records") == 1


def test_an_envelope_that_was_handled_before_is_a_duplicate_without_effect(store: Store, applier: Applier) -> None:
    envelope = placed(7, [record()])
    apply(applier, envelope)
    store.rows("DELETE FROM key_records")
    before = state(store)
    done = apply(applier, envelope)
    assert (done.results, done.after_commit.arrived) == ([Result.DUPLICATE], [])
    assert state(store) == before


def test_a_key_that_exists_is_never_overwritten_and_its_envelope_is_not_remembered(
    store: Store, applier: Applier
) -> None:
    known = record()
    apply(applier, placed(7, [known]))
    changed = (*known[:-1], b"x" * 48)
    before = state(store)
    done = apply(applier, placed(8, [record(), changed]))
    assert (done.results, done.after_commit.arrived) == ([Result.KEY_EXISTS], [])
    assert state(store) == before


def test_of_a_batch_the_envelope_with_a_key_that_exists_takes_nothing_from_the_others(
    store: Store, applier: Applier
) -> None:
    known = record()
    done = apply(applier, placed(7, [known]), placed(8, [record(), known]), placed(9, [record()]))
    assert done.results == [Result.HANDLED, Result.KEY_EXISTS, Result.HANDLED]
    assert store.count("key_records") == 2
    assert store.rows("SELECT envelope_no FROM inbox ORDER BY envelope_no") == [(7,), (9,)]


def test_a_key_that_its_source_has_taken_back_is_left_out(store: Store, applier: Applier) -> None:
    taken_back, other = record(), record()
    take_back(store, PEER, taken_back[0])
    done = apply(applier, placed(7, [other, taken_back]))
    assert (done.results, done.after_commit.arrived) == ([Result.HANDLED], [other[0]])
    assert store.rows("SELECT key_id FROM key_records") == [(other[0],)]
    assert store.rows("SELECT inbound_issued FROM peers") == [(1,)]


def test_an_envelope_of_keys_that_were_all_taken_back_is_handled_and_stores_nothing(
    store: Store, applier: Applier
) -> None:
    taken_back = record()
    take_back(store, PEER, taken_back[0])
    done = apply(applier, placed(7, [taken_back]))
    assert (done.results, done.after_commit.arrived) == ([Result.HANDLED], [])
    assert store.count("key_records") == 0


def test_what_another_source_has_taken_back_keeps_no_key_away(store: Store, applier: Applier) -> None:
    mine = record()
    take_back(store, STRANGER, mine[0])
    apply(applier, placed(7, [mine]))
    assert store.count("key_records") == 1


# --- acknowledgements


def test_an_acknowledgement_takes_rows_away_and_counts_keys_on_demand(store: Store, applier: Applier) -> None:
    tokens = outbox(store, "key.placed", "key.issued", "key.placed", items=3)
    done = apply(applier, acknowledged(1, 2))
    assert done.after_commit.stored == [tokens[0]]
    assert store.rows("SELECT envelope_no FROM outbox") == [(3,)]
    assert store.rows("SELECT issued FROM peers") == [(3,)]


def test_an_acknowledgement_that_comes_twice_counts_once(store: Store, applier: Applier) -> None:
    tokens = outbox(store, "key.placed", items=3)
    assert apply(applier, acknowledged(1)).after_commit.stored == tokens
    assert apply(applier, acknowledged(1)).after_commit.stored == []
    assert store.rows("SELECT issued FROM peers") == [(3,)]


def test_numbers_that_were_never_sent_acknowledge_nothing(store: Store, applier: Applier) -> None:
    outbox(store, "key.placed")
    before = state(store)
    assert apply(applier, acknowledged(17)).after_commit.stored == []
    assert state(store) == before


def test_nobody_acknowledges_what_was_sent_to_another(store: Store, applier: Applier) -> None:
    outbox(store, "key.placed", "key.issued")
    before = state(store)
    assert apply(applier, acknowledged(1, 2, sender=STRANGER)).after_commit.stored == []
    assert state(store) == before


def test_keys_that_arrived_before_an_acknowledgement_failed_are_notified_at_the_next_attempt(
    store: Store, applier: Applier
) -> None:
    outbox(store, "key.placed")
    batch = placed(7, [record(b"a" * 16)]), placed(8, [record(b"b" * 16)], stock=True), acknowledged(1)

    def fail(_c: object, _cursor: object, statement: str, *_: object) -> None:
        if statement.startswith("DELETE") and "outbox" in statement:
            raise pymysql.err.OperationalError(2013, "Lost connection")

    event.listen(store.engine, "before_cursor_execute", fail)
    try:
        with pytest.raises(StoreUnavailable):
            apply(applier, *batch)
    finally:
        event.remove(store.engine, "before_cursor_execute", fail)
    done = applier.apply(batch, now_ms(), again=True)
    assert done.results == [Result.DUPLICATE, Result.DUPLICATE, Result.HANDLED]
    assert done.after_commit.arrived == [b"a" * 16]


# --- transactions that meet others


def conflicts(store: Store, times: int) -> contextlib.AbstractContextManager[list[str]]:
    """The first statements that insert a key fail as the victim of a deadlock does."""
    met: list[str] = []

    def meet(_c: object, _cursor: object, statement: str, *_: object) -> None:
        if statement.startswith("INSERT INTO key_records") and len(met) < times:
            met.append(statement)
            raise pymysql.err.OperationalError(1213, "Deadlock found")

    @contextlib.contextmanager
    def listening() -> Iterator[list[str]]:
        event.listen(store.engine, "before_cursor_execute", meet)
        try:
            yield met
        finally:
            event.remove(store.engine, "before_cursor_execute", meet)

    return listening()


def test_the_victim_of_a_deadlock_is_tried_again_with_the_whole_effect_once(store: Store, applier: Applier) -> None:
    with conflicts(store, 2) as met:
        done = apply(applier, placed(7, [record(b"a" * 16)]))
    assert len(met) == 2
    assert (done.results, done.after_commit.arrived) == ([Result.HANDLED], [b"a" * 16])
    assert store.rows("SELECT inbound_issued FROM peers") == [(1,)]


def test_conflicts_without_an_end_are_told_and_leave_nothing(store: Store, applier: Applier) -> None:
    with conflicts(store, 100) as met, pytest.raises(StoreConflict):
        apply(applier, placed(7, [record()]))
    assert 1 < len(met) < 100
    assert state(store) == [[], [], [], [], []]
