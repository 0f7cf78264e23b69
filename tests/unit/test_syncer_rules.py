"""Facts about the syncer's rules: what goes into one envelope, its number, and when it is sent again."""

from __future__ import annotations

import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skipbus.services.syncer.apply_keys import portions
from skipbus.services.syncer.leader import SequenceNumbers
from skipbus.services.syncer.outbox import (
    MAX_PAYLOAD_BYTES,
    MAX_SEALED_ROWS,
    ROW_TYPES,
    group_rows,
)
from skipbus.services.syncer.peer_queue import LAST_RESEND_MS, is_due, resend_after_ms
from skipbus.services.syncer.verify import OwnEpochs
from skipbus.shared.broker.names import encode_id, live_routing_key, queue_name, routing_key
from skipbus.shared.errors import EnvelopeRefused
from skipbus.shared.protocol import encoding
from skipbus.shared.protocol.envelopes import MAX_AGE_MS, EnvelopeType
from skipbus.shared.protocol.payloads import Events, pack_events, read_payload
from skipbus.shared.protocol.placed_keys import MAX_KEYS
from skipbus.shared.store.inbox import INBOX_LIFETIME_MS
from skipbus.shared.store.outbox import OUTBOX_LIFETIME_MS, UnsentRow

NOW_MS = 1_800_000_000_000
printable_ids = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), min_size=1, max_size=64)


def entry(row_id: int, peer: str = "KP_Bob", kind: str = "key.issued", payload_bytes: int = 100) -> UnsentRow:
    return UnsentRow(row_id, peer, kind, 1, payload_bytes)


def ids(groups: list[list[UnsentRow]]) -> list[list[int]]:
    return [[row.id for row in group] for group in groups]


# --- gathering


def test_rows_of_one_peer_and_one_type_share_an_envelope() -> None:
    rows = [entry(1), entry(2, kind="key.expired"), entry(3, peer="KP_Carol"), entry(4)]
    assert ids(group_rows(rows)) == [[1, 4], [2], [3]]


def test_an_envelope_is_full_at_256_kib_and_no_later_row_goes_ahead_of_its_turn() -> None:
    half = MAX_PAYLOAD_BYTES // 2
    rows = [entry(1, payload_bytes=half), entry(2, payload_bytes=half), entry(3, payload_bytes=half), entry(4)]
    assert ids(group_rows(rows)) == [[1, 2]]


def test_a_row_that_is_too_large_for_any_envelope_goes_alone() -> None:
    rows = [entry(1, payload_bytes=MAX_PAYLOAD_BYTES + 1), entry(2)]
    assert ids(group_rows(rows)) == [[1]]


@pytest.mark.parametrize("kind", ["key.placed", "key.stocked"])
def test_rows_with_sealed_keys_share_an_envelope_as_long_as_their_keys_and_wrapping_keys_fit(kind: str) -> None:
    rows = [UnsentRow(n, "KP_Bob", kind, 500, 100) for n in range(6)]
    assert ids(group_rows(rows)) == [[0, 1, 2, 3]]
    small = [UnsentRow(n, "KP_Bob", kind, 1, 100) for n in range(MAX_SEALED_ROWS + 1)]
    assert len(group_rows(small)[0]) == MAX_SEALED_ROWS


def test_rows_that_differ_only_in_what_they_count_as_do_not_share_an_envelope() -> None:
    kinds = ["key.placed", "key.stocked", "key.issued", "key.withdrawn", "stock.dropped"]
    assert ids(group_rows(entry(n, kind=kind) for n, kind in enumerate(kinds))) == [[0], [1], [2], [3], [4]]
    assert [ROW_TYPES[kind].envelope.value for kind in kinds] == ["key.issued"] * 3 + ["key.withdrawn"] * 2
    assert [ROW_TYPES[kind].counter for kind in kinds] == [None, None, "issued", "withdrawn", None]


def test_the_events_of_several_rows_are_one_list_in_their_order() -> None:
    first = encoding.pack([[b"a", 1, "c-1"], [b"b", 2, "c-2"]])
    second = encoding.pack([[b"c", 3, "c-3"]])
    assert encoding.unpack(pack_events([first, second])) == [[b"a", 1, "c-1"], [b"b", 2, "c-2"], [b"c", 3, "c-3"]]


def test_no_more_than_twenty_correlation_ids_go_into_a_log_line() -> None:
    payload = encoding.pack([[bytes([i]), 1, f"c-{i}"] for i in range(30)])
    events = read_payload(EnvelopeType.KEY_EXPIRED, payload)
    assert isinstance(events, Events)
    assert (events.count, events.correlation_ids) == (30, tuple(f"c-{i}" for i in range(20)))


@pytest.mark.parametrize("kind", ["key.issued", "key.withdrawn"])
def test_an_envelope_changes_no_more_keys_than_one_transaction_may(kind: str) -> None:
    middle = [256, 1] if kind == "key.issued" else [1]
    entries = [[n.to_bytes(16, "big"), *middle, ""] for n in range(MAX_KEYS + 1)]
    with pytest.raises(EnvelopeRefused):
        read_payload(EnvelopeType(kind), encoding.pack(entries))
    read = read_payload(EnvelopeType(kind), encoding.pack(entries[:-1]))
    assert isinstance(read, Events)
    assert read.count == MAX_KEYS
    rows = [UnsentRow(n, "KP_Bob", kind, MAX_KEYS // 2, 100) for n in range(3)]
    assert ids(group_rows(rows)) == [[0, 1]]


def test_events_that_are_only_counted_share_an_envelope_beyond_that() -> None:
    rows = [UnsentRow(n, "KP_Bob", "key.expired", MAX_KEYS, 100) for n in range(3)]
    assert ids(group_rows(rows)) == [[0, 1, 2]]


# --- numbers


def test_numbers_grow_even_where_the_clock_does_not() -> None:
    numbers = SequenceNumbers()
    given_out = [numbers.next() for _ in range(10_000)]
    assert given_out == sorted(set(given_out))


def test_a_number_is_greater_than_those_still_in_the_outbox_after_the_clock_was_set_back() -> None:
    ahead = time.time_ns() // 1000 + 3_600_000_000
    assert SequenceNumbers().next(ahead) == ahead + 1


def test_a_clock_that_steps_back_does_not_make_numbers_go_back() -> None:
    clock_us = iter([5_000, 5_001, 1, 2])
    numbers = SequenceNumbers(lambda: next(clock_us))
    assert [numbers.next() for _ in range(4)] == [5_000, 5_001, 5_002, 5_003]


def test_numbers_are_unique_between_threads() -> None:
    numbers, taken = SequenceNumbers(), list[int]()
    threads = [threading.Thread(target=lambda: taken.extend(numbers.next() for _ in range(2_000))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(taken)) == 8_000


# --- transactions


def test_a_transaction_takes_as_many_envelopes_as_have_its_keys_together_and_one_at_least() -> None:
    sizes = [1, MAX_KEYS - 1, 1, MAX_KEYS, MAX_KEYS + 1, 1, 1]
    assert list(portions(sizes, lambda size: size)) == [
        [1, MAX_KEYS - 1],
        [1],
        [MAX_KEYS],
        [MAX_KEYS + 1],
        [1, 1],
    ]


# --- what expires


def test_news_of_keys_is_expired_when_the_last_of_them_has_expired() -> None:
    assert ROW_TYPES["key.withdrawn"].keys_expire_ms([[b"a", 7, ""], [b"b", 9, ""], [b"c", 8, ""]]) == 9
    assert ROW_TYPES["stock.dropped"].keys_expire_ms([[b"a", 7, ""]]) == 7
    assert ROW_TYPES["key.issued"].keys_expire_ms([[b"a", 256, 7, ""]]) == 7
    assert ROW_TYPES["key.stocked"].keys_expire_ms([[b"a", 256, 7, "", b"w", b"n", b"s"]]) == 7


def test_what_keys_came_to_and_keys_that_somebody_waits_for_never_expire() -> None:
    assert ROW_TYPES["key.retrieved"].keys_expire_ms([[b"a", 7, ""]]) is None
    assert ROW_TYPES["key.expired"].keys_expire_ms([[b"a", 7, ""]]) is None
    assert ROW_TYPES["key.placed"].keys_expire_ms([[b"a", 256, 7, "", b"w", b"n", b"s"]]) is None


# --- sending again


def test_waiting_for_an_acknowledgement_grows_from_ten_seconds_to_five_minutes() -> None:
    assert [resend_after_ms(attempts) // 1000 for attempts in range(1, 8)] == [10, 20, 40, 80, 160, 300, 300]
    assert resend_after_ms(10**9) == LAST_RESEND_MS


def test_what_was_never_sent_is_due_whoever_is_offline() -> None:
    assert is_due(0, None, "offline", NOW_MS)


@pytest.mark.parametrize(("age_ms", "due"), [(9_999, False), (10_000, True)])
def test_what_a_listening_peer_did_not_acknowledge_is_due_after_ten_seconds(age_ms: int, due: bool) -> None:
    assert is_due(1, NOW_MS - age_ms, "online", NOW_MS) is due


def test_nothing_is_heaped_up_in_the_queue_of_a_peer_that_is_offline() -> None:
    assert not is_due(1, NOW_MS - LAST_RESEND_MS, "offline", NOW_MS)
    assert is_due(1, NOW_MS - MAX_AGE_MS, "offline", NOW_MS)


def test_what_found_no_queue_is_due_as_soon_as_its_peer_is_heard() -> None:
    assert not is_due(1, NOW_MS - 2_000, "offline", NOW_MS, unrouted=True)
    assert is_due(1, NOW_MS - 2_000, "online", NOW_MS, unrouted=True)


def test_what_a_peer_refused_is_left_alone_for_five_minutes() -> None:
    assert not is_due(1, NOW_MS - LAST_RESEND_MS + 1, "online", NOW_MS, rejected=True)
    assert is_due(1, NOW_MS - LAST_RESEND_MS, "online", NOW_MS, rejected=True)
    assert not is_due(1, NOW_MS - 2_000, "online", NOW_MS, rejected=True, unrouted=True)


# --- epochs that can be opened


def test_an_epoch_that_was_announced_can_be_opened_until_it_is_destroyed() -> None:
    epochs = OwnEpochs(frozenset)
    epochs.note([(b"e" * 16, NOW_MS + 10)], NOW_MS)
    epochs.note([], NOW_MS + 9)
    assert epochs.has(b"e" * 16, NOW_MS + 10)
    assert not epochs.has(b"e" * 16, NOW_MS + 11)
    epochs.note([], NOW_MS + 10)
    assert not epochs.has(b"e" * 16, NOW_MS)


def test_after_a_restart_the_keyring_tells_of_epochs_that_are_announced_no_more() -> None:
    epochs = OwnEpochs(lambda: [b"e" * 16])
    assert epochs.has(b"e" * 16, NOW_MS)
    assert not epochs.has(b"f" * 16, NOW_MS)


def test_the_inbox_remembers_an_envelope_for_longer_than_it_can_be_sent_again() -> None:
    assert INBOX_LIFETIME_MS > OUTBOX_LIFETIME_MS + MAX_AGE_MS


# --- names on the bus


@given(printable_ids, printable_ids)
def test_different_ids_have_different_names(one: str, other: str) -> None:
    assert (encode_id(one) == encode_id(other)) == (one == other)


@given(printable_ids)
def test_an_id_cannot_reach_out_of_its_word_in_a_routing_key(system_id: str) -> None:
    assert not set(encode_id(system_id)) & set(".*#/ ")
    assert len(queue_name(system_id)) < 255


def test_names_are_as_they_are_written_down() -> None:
    assert queue_name("KP Bob.1") == "skipbus.kp.KP:20Bob:2E1"
    assert (routing_key("KP_Bob"), live_routing_key("KP_Bob")) == ("kp.KP_Bob", "live.KP_Bob")
