"""Facts about the queue of one peer: what is sent first, what is kept in memory, and what is left alone."""

from __future__ import annotations

import pytest

from skipbus.services.syncer.peer_queue import MAX_DUE, MAX_HELD_CONTENTS, PeerQueue, Unacknowledged
from skipbus.services.syncer.transport import Outcome, OutgoingEnvelope
from skipbus.shared.protocol.envelopes import EnvelopeType
from skipbus.shared.store.outbox import OutboxEnvelope

BOB = "KP_Bob"
NOW_MS = 1_800_000_000_000


def envelope(number: int, kind: str = "key.issued", *, expire_ms: int | None = None) -> Unacknowledged:
    """One that was just numbered."""
    content = OutgoingEnvelope(EnvelopeType.KEY_ISSUED, BOB, b"\x90", number, expire_ms)
    one = Unacknowledged(OutboxEnvelope(BOB, number, kind, 1, 0, None), content)
    one.note_content(content)
    return one


def queue_of(*envelopes: Unacknowledged) -> PeerQueue:
    queue = PeerQueue(BOB)
    for one in envelopes:
        queue.add(one)
    return queue


def numbers(envelopes: list[Unacknowledged]) -> list[int]:
    return [one.number for one in envelopes]


def test_keys_that_an_encryptor_waits_for_are_sent_first_and_all_else_in_its_order() -> None:
    made = [envelope(1), envelope(2, "key.stocked"), envelope(3, "key.placed"), envelope(4), envelope(5, "key.placed")]
    queue = queue_of(*made)
    queue.make_ready(made)
    assert numbers(queue.take(3)) == [3, 5, 1]
    assert numbers(queue.take(3)) == [2, 4]
    assert not queue.has_ready


def test_the_content_of_a_few_envelopes_is_kept_in_memory() -> None:
    made = [envelope(number) for number in range(MAX_HELD_CONTENTS + 5)]
    queue = queue_of(*made)
    queue.make_ready(made)
    assert [one.content is not None for one in made] == [True] * MAX_HELD_CONTENTS + [False] * 5


def test_what_is_being_sent_is_not_due_a_second_time_and_is_due_again_when_it_was_postponed() -> None:
    one = envelope(1)
    queue = queue_of(one)
    queue.make_ready(queue.due("online", NOW_MS))
    assert queue.due("online", NOW_MS) == []
    queue.postpone()
    assert queue.due("online", NOW_MS) == [one]


def test_what_was_acknowledged_in_the_meantime_is_not_sent() -> None:
    made = [envelope(1), envelope(2)]
    queue = queue_of(*made)
    queue.make_ready(made)
    queue.forget([1])
    assert numbers(queue.take(8)) == [2]


def test_a_peer_that_acknowledges_nothing_is_sent_a_bounded_number_of_envelopes_in_a_round() -> None:
    queue = queue_of(*(envelope(number) for number in range(MAX_DUE + 1)))
    assert len(queue.due("online", NOW_MS)) == MAX_DUE


@pytest.mark.parametrize("outcome", [Outcome.LOST, Outcome.UNCONFIRMED])
def test_what_could_not_be_sent_counts_as_no_attempt_and_is_due_again(outcome: Outcome) -> None:
    one = envelope(1)
    queue = queue_of(one)
    queue.note_sent(one, outcome, NOW_MS)
    assert queue.take_attempts() == []
    assert queue.due("online", NOW_MS) == [one]


def test_attempts_are_given_once_and_not_for_what_was_acknowledged_before_they_were_recorded() -> None:
    made = [envelope(1), envelope(2)]
    queue = queue_of(*made)
    for one in made:
        queue.note_sent(one, Outcome.TAKEN, NOW_MS)
    queue.forget([1])
    assert queue.take_attempts() == [(2, NOW_MS)]
    assert queue.take_attempts() == []


def test_what_a_peer_rejected_is_left_alone_for_minutes() -> None:
    one = envelope(1)
    queue = queue_of(one)
    queue.note_sent(one, Outcome.TAKEN, NOW_MS)
    queue.note_rejected(1)
    queue.note_rejected(17)
    assert queue.due("online", NOW_MS + 299_999) == []
    assert queue.due("online", NOW_MS + 300_000) == [one]


def test_malformed_rows_are_neither_sent_nor_withdrawn_nor_given_up() -> None:
    one = envelope(1, "key.placed")
    one.note_content(None)
    queue = queue_of(one)
    assert queue.due("online", NOW_MS) == []
    assert queue.expiry_unknown(8) == []
    assert queue.abandoned(one.seen_at + 60) == []
    assert queue.expired(NOW_MS) == []


def test_only_what_is_about_expired_keys_is_expired() -> None:
    queue = queue_of(envelope(1, expire_ms=NOW_MS - 1), envelope(2, expire_ms=NOW_MS), envelope(3))
    assert queue.expired(NOW_MS) == [1]


def test_keys_on_demand_are_abandoned_by_their_age_and_nothing_else_is() -> None:
    placed, stocked = envelope(1, "key.placed"), envelope(2, "key.stocked")
    queue = queue_of(placed, stocked)
    assert queue.abandoned(placed.seen_at) == []
    assert queue.abandoned(placed.seen_at + 0.001) == [1]


def test_an_envelope_that_another_syncer_numbered_is_read_to_learn_when_it_expires() -> None:
    queue = queue_of(Unacknowledged(OutboxEnvelope(BOB, 1, "key.issued", 1, 3, NOW_MS)), envelope(2))
    assert numbers(queue.expiry_unknown(8)) == [1]


def test_a_queue_is_in_use_until_its_last_attempt_is_recorded() -> None:
    one = envelope(1)
    queue = queue_of(one)
    assert queue.in_use
    queue.note_sent(one, Outcome.TAKEN, NOW_MS)
    queue.forget([1])
    assert not queue.in_use
