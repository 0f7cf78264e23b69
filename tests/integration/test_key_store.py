"""Facts about keys in the store: placed before they are answered, given out once, and to nobody else.

Batches and queues are the api's own, on real connections; what an interrupted commit does is shown by a proxy that
cuts the connection at that very moment, and by killing it from another one.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, event

from sandbox.mariadb import Database
from skipbus.services.api.group_commit import GroupCommit, Limits
from skipbus.services.api.links import ClaimedKey, IssuedKey, IssueRequest
from skipbus.services.api.links.store import ClaimBatch, ClaimRequest, IssueBatch
from skipbus.shared.clock import now_ms
from skipbus.shared.errors import (
    CommitUnknown,
    KeyNotAvailable,
    NoEntropy,
    PeerNotReady,
    SealBroken,
    SkipbusError,
    StoreConflict,
    StoreMisconfigured,
    StoreRefused,
    StoreUnavailable,
)
from skipbus.shared.protocol import encoding
from skipbus.shared.store.engine import driver_errors
from skipbus.shared.store.key_records import insert_key_records
from skipbus.shared.store.outbox import OutboxRow, insert_outbox_rows
from tests.integration.cutting_proxy import Cut, CuttingProxy
from tests.integration.key_providers import KeyProvider, Store, announced, queue_engine, tend
from tests.waiting import wait_for

CUTS: list[Cut] = ["cut_before", "cut_after"]


@pytest.fixture
def kps(store: Store) -> list[KeyProvider]:
    return announced(store, "KP_Alice", "KP_Bob", "KP_Carol")


@pytest.fixture
def proxy(database: Database) -> Iterator[CuttingProxy]:
    made = CuttingProxy(database.port)
    yield made
    made.close()


def place(source: KeyProvider, target: KeyProvider, expires_ms: int) -> bytes:
    """A key that expires when the test says."""
    key_id = bytes([7]) * 16
    event = encoding.pack([[key_id, 256, expires_ms, "placed"]])
    with driver_errors(), source.engine.connect() as connection:
        wrapping_key = source.sealer.wrapping_key(connection, target.system_id, now_ms())
        insert_key_records(connection, [wrapping_key.seal(key_id, bytes(32), expires_ms, "placed")])
        row = OutboxRow(source.system_id, target.system_id, "key.issued", event, 1, now_ms())
        insert_outbox_rows(connection, [row])
        connection.commit()
    return key_id


# --- one after another


@pytest.mark.parametrize("size_bits", [128, 256, 512])
def test_the_target_gets_the_key_that_the_source_was_given(kps: list[KeyProvider], size_bits: int) -> None:
    alice, bob, _ = kps
    (issued,) = alice.issue(bob, size_bits=size_bits)
    assert len(issued.key) == size_bits // 4
    assert bob.claim(issued.key_id, alice).key == issued.key


def test_an_answered_key_is_committed_and_its_event_with_it(store: Store, kps: list[KeyProvider]) -> None:
    alice, bob, _ = kps
    issued = alice.issue(bob, count=5)
    assert store.count("key_records") == 5
    assert store.count("wrapping_keys") == 1
    (row,) = store.rows("SELECT local_id, peer_id, type, items, payload FROM outbox")
    assert row[:4] == ("KP_Alice", "KP_Bob", "key.issued", 5)
    reported = encoding.unpack(row[4])
    assert [item[0].hex() for item in reported] == [key.key_id for key in issued]
    assert {item[1] for item in reported} == {256}
    assert [item[3] for item in reported] == [f"issue-{n}" for n in range(5)]


def test_a_claimed_key_is_gone_from_the_store_and_its_source_is_told(store: Store, kps: list[KeyProvider]) -> None:
    alice, bob, _ = kps
    (issued,) = alice.issue(bob)
    assert bob.claim(issued.key_id, alice).issue_correlation_id == "issue-0"
    assert store.count("key_records") == 0
    rows = store.rows("SELECT peer_id, items, payload FROM outbox WHERE type = 'key.retrieved'")
    assert [row[:2] for row in rows] == [("KP_Alice", 1)]
    assert encoding.unpack(rows[0][2])[0][0].hex() == issued.key_id


def test_a_second_claim_is_told_that_no_key_waits(kps: list[KeyProvider]) -> None:
    alice, bob, _ = kps
    (issued,) = alice.issue(bob)
    bob.claim(issued.key_id, alice)
    with pytest.raises(KeyNotAvailable):
        bob.claim(issued.key_id, alice)


def test_no_column_of_any_table_holds_a_key_in_clear(store: Store, kps: list[KeyProvider]) -> None:
    alice, bob, _ = kps
    keys = [bytes.fromhex(issued.key) for issued in alice.issue(bob, count=20)]
    tables = [row[0] for row in store.rows("SHOW TABLES")]
    dump = b"".join(
        value if isinstance(value, bytes) else str(value).encode()
        for table in tables
        for row in store.rows(f"SELECT * FROM {table}")
        for value in row
    )
    assert len(dump) > 20_000
    assert not any(key in dump or key.hex().encode() in dump.lower() for key in keys)


def test_the_source_cannot_read_back_what_it_sealed(kps: list[KeyProvider]) -> None:
    alice, bob, _ = kps
    (issued,) = alice.issue(bob)
    for source in (alice, bob):
        with pytest.raises(KeyNotAvailable):
            alice.claim(issued.key_id, source)
    assert bob.claim(issued.key_id, alice).key == issued.key


def test_a_key_provider_for_itself_serves_both_ends(kps: list[KeyProvider]) -> None:
    alice, _, _ = kps
    (issued,) = alice.issue(alice)
    assert alice.claim(issued.key_id, alice).key == issued.key


def refused_by(kps: list[KeyProvider], who: str, source: str) -> Callable[[str], object]:
    by_name = {kp.system_id: kp for kp in kps}
    return lambda key_id: by_name[who].claim(key_id, source)


@pytest.mark.parametrize(
    ("who", "source"),
    [
        ("KP_Bob", "KP_Carol"),
        ("KP_Bob", "KP_Bob"),
        ("KP_Bob", "kp_alice"),
        ("KP_Bob", "KP_Alice "),
        ("KP_Carol", "KP_Alice"),
        ("KP_Carol", "KP_Bob"),
        ("KP_Alice", "KP_Bob"),
    ],
)
def test_a_wrong_claim_changes_nothing_and_the_right_one_still_works(
    store: Store, kps: list[KeyProvider], who: str, source: str
) -> None:
    alice, bob, _ = kps
    (issued,) = alice.issue(bob)
    before = store.rows("SELECT * FROM key_records"), store.count("outbox")
    with pytest.raises(KeyNotAvailable) as caught:
        refused_by(kps, who, source)(issued.key_id)
    assert str(caught.value) == "no key with this keyId waits here for this remoteSystemID"
    assert (store.rows("SELECT * FROM key_records"), store.count("outbox")) == before
    assert bob.claim(issued.key_id, alice).key == issued.key


def test_a_refused_claim_leaves_no_lock_behind(kps: list[KeyProvider]) -> None:
    alice, bob, carol = kps
    (issued,) = alice.issue(bob)
    wanted = bytes.fromhex(issued.key_id)
    with bob.engine.connect() as connection:
        carol.claim_batch([ClaimRequest(wanted, "KP_Alice", "")]).run(connection)
        bob.claim_batch([ClaimRequest(wanted, "KP_Carol", "")]).run(connection)
        # The connection lives on, as a queue's does.
        assert bob.claim(issued.key_id, alice).key == issued.key


def test_an_expired_key_is_never_served_and_is_left_to_the_janitor(store: Store, kps: list[KeyProvider]) -> None:
    alice, bob, _ = kps
    key_id = place(alice, bob, now_ms() - 1)
    with pytest.raises(KeyNotAvailable) as caught:
        bob.claim(key_id, alice)
    assert "expired" in caught.value.__notes__
    assert store.count("key_records") == 1


def test_a_key_is_served_until_the_moment_of_its_expiry(kps: list[KeyProvider]) -> None:
    alice, bob, _ = kps
    assert bob.claim(place(alice, bob, now_ms() + 60_000), alice).key == bytes(32).hex()


def test_no_key_outlives_the_private_half_that_opens_it(store: Store, kps: list[KeyProvider]) -> None:
    alice, bob, _ = kps
    # The source believes in a longer lifetime than the target keeps its epochs for.
    alice.commit(IssueBatch(alice.sealer, 10 * 86_400, [IssueRequest("KP_Bob", 256, "")]))
    ((expires_ms, destroy_ms),) = store.rows(
        "SELECT k.expires_ms, w.expires_ms FROM key_records k JOIN wrapping_keys w USING (wrapping_key_id)"
    )
    assert expires_ms == destroy_ms
    assert bob.keyring.epoch_ids()


def test_a_peer_that_never_announced_itself_gets_no_key_and_the_others_of_the_batch_theirs(
    store: Store, kps: list[KeyProvider]
) -> None:
    alice = kps[0]
    requests = [IssueRequest(name, 256, "") for name in ("KP_Bob", "KP_Nobody", "KP_Carol")]
    answers = alice.commit(alice.issue_batch(requests))
    assert [type(answer) for answer in answers] == [IssuedKey, PeerNotReady, IssuedKey]
    assert store.count("key_records") == 2


def test_all_keys_of_one_epoch_share_one_wrapping_key(store: Store, kps: list[KeyProvider]) -> None:
    alice, bob, carol = kps
    for target in (bob, bob, carol, bob):
        alice.issue(target, count=3)
    assert store.rows("SELECT target_id, COUNT(*) FROM wrapping_keys GROUP BY target_id ORDER BY 1") == [
        ("KP_Bob", 1),
        ("KP_Carol", 1),
    ]


# --- in one batch


def test_a_wrapping_key_is_used_during_its_epoch_only_whatever_the_clock_does(kps: list[KeyProvider]) -> None:
    alice, bob, _ = kps
    announcement = alice.directory.get(bob.system_id)
    assert announcement is not None
    spans = [epoch.span for epoch in announcement.epochs]
    (span,) = [span for span in spans if span.starts_ms <= now_ms() < span.ends_ms]
    with alice.engine.connect() as connection:
        current = alice.sealer.wrapping_key(connection, bob.system_id, now_ms())
        assert alice.sealer.wrapping_key(connection, bob.system_id, span.starts_ms) is current
        assert alice.sealer.wrapping_key(connection, bob.system_id, span.ends_ms - 1) is current
        later = alice.sealer.wrapping_key(connection, bob.system_id, span.ends_ms)
        assert later.epoch_id != current.epoch_id
        assert alice.sealer.wrapping_key(connection, bob.system_id, span.starts_ms).epoch_id == current.epoch_id


def test_a_wrapping_key_is_kept_when_its_target_announces_its_epoch_again(kps: list[KeyProvider]) -> None:
    alice, bob, _ = kps
    before = alice.directory.get(bob.system_id)
    assert before is not None
    at_ms = next(epoch.span.ends_ms for epoch in before.epochs if epoch.span.ends_ms > now_ms())
    with alice.engine.connect() as connection:
        current = alice.sealer.wrapping_key(connection, bob.system_id, at_ms)
        tend(bob.keeper, at_ms)
        alice.refresh()
        assert alice.directory.get(bob.system_id) is not before
        assert alice.sealer.wrapping_key(connection, bob.system_id, at_ms) is current


def test_a_target_that_is_not_believed_any_more_is_not_sealed_to(store: Store, kps: list[KeyProvider]) -> None:
    alice, bob, _ = kps
    alice.issue(bob)
    store.rows("DELETE FROM announcements WHERE system_id = %s", bob.system_id)
    alice.refresh()
    with pytest.raises(PeerNotReady):
        alice.issue(bob)


@pytest.mark.parametrize("role", ["sealer", "opener"])
def test_no_wrapping_key_is_held_for_longer_than_its_epoch(kps: list[KeyProvider], role: str) -> None:
    alice, bob, _ = kps
    (issued,) = alice.issue(bob)
    bob.claim(issued.key_id, alice)
    held = alice.sealer._in_use if role == "sealer" else bob.opener._opened
    user = alice.sealer if role == "sealer" else bob.opener
    assert len(held) == 1
    ((expires_ms,),) = alice.store.rows("SELECT expires_ms FROM wrapping_keys")
    user.forget_ended(expires_ms - 1)
    assert len(held) == 1
    user.forget_ended(expires_ms)
    assert not held


def test_of_two_claims_for_one_key_in_a_batch_the_first_gets_it(store: Store, kps: list[KeyProvider]) -> None:
    alice, bob, _ = kps
    first, second = alice.issue(bob, count=2)
    wanted = [bytes.fromhex(key.key_id) for key in (first, first, second, first)]
    answers = bob.commit(bob.claim_batch([ClaimRequest(i, "KP_Alice", "") for i in wanted]))
    assert [answer.key if isinstance(answer, ClaimedKey) else type(answer) for answer in answers] == [
        first.key,
        KeyNotAvailable,
        second.key,
        KeyNotAvailable,
    ]


def test_a_wrong_claim_before_the_right_one_in_a_batch_takes_nothing_from_it(
    store: Store, kps: list[KeyProvider]
) -> None:
    alice, bob, _ = kps
    (issued,) = alice.issue(bob)
    wanted = bytes.fromhex(issued.key_id)
    requests = [ClaimRequest(wanted, "KP_Carol", ""), ClaimRequest(wanted, "KP_Alice", "")]
    wrong, right = bob.commit(bob.claim_batch(requests))
    assert isinstance(wrong, KeyNotAvailable)
    assert isinstance(right, ClaimedKey)


def test_one_damaged_record_of_a_batch_leaves_the_others_theirs(store: Store, kps: list[KeyProvider]) -> None:
    alice, bob, _ = kps
    issued = alice.issue(bob, count=3)
    damaged = bytes.fromhex(issued[1].key_id)
    store.rows("UPDATE key_records SET sealed = REVERSE(sealed) WHERE key_id = %s", damaged)
    requests = [ClaimRequest(bytes.fromhex(key.key_id), "KP_Alice", "") for key in issued]
    answers = bob.commit(bob.claim_batch(requests))
    assert [type(answer) for answer in answers] == [ClaimedKey, SealBroken, ClaimedKey]
    assert store.rows("SELECT key_id FROM key_records") == [(damaged,)]


# --- tampering with the store

TAMPERING = {
    "sealed": "sealed = CONCAT(CHAR(ASCII(sealed) ^ 1), SUBSTRING(sealed, 2))",
    "sealed cut": "sealed = LEFT(sealed, 10)",
    "nonce": "nonce = REVERSE(nonce)",
    "size": "size_bits = 512",
    "expiry": "expires_ms = expires_ms + 1",
    "unknown wrapping key": "wrapping_key_id = REVERSE(wrapping_key_id)",
}


@pytest.mark.parametrize("change", TAMPERING.values(), ids=TAMPERING)
def test_a_tampered_record_is_not_served_and_is_kept_for_whoever_looks_into_it(
    store: Store, kps: list[KeyProvider], change: str
) -> None:
    alice, bob, _ = kps
    (issued,) = alice.issue(bob)
    store.rows(f"UPDATE key_records SET {change}")
    tampered = store.rows("SELECT * FROM key_records")
    with pytest.raises(SealBroken):
        bob.claim(issued.key_id, alice)
    assert store.rows("SELECT * FROM key_records") == tampered


def test_a_record_that_was_given_to_another_target_in_the_store_does_not_open_there(
    store: Store, kps: list[KeyProvider]
) -> None:
    alice, bob, carol = kps
    (issued,) = alice.issue(bob)
    store.rows("UPDATE key_records SET target_id = 'KP_Carol'")
    store.rows("UPDATE wrapping_keys SET target_id = 'KP_Carol'")
    with pytest.raises(SealBroken):
        carol.claim(issued.key_id, alice)
    assert store.count("key_records") == 1


def test_a_record_that_was_given_another_source_in_the_store_does_not_open(
    store: Store, kps: list[KeyProvider]
) -> None:
    alice, bob, _ = kps
    (issued,) = alice.issue(bob)
    store.rows("UPDATE key_records SET source_id = 'KP_Carol'")
    with pytest.raises(SealBroken):
        bob.claim(issued.key_id, "KP_Carol")
    store.rows("UPDATE wrapping_keys SET source_id = 'KP_Carol'")
    with pytest.raises(SealBroken):
        bob.restarted().claim(issued.key_id, "KP_Carol")


def test_a_key_planted_by_somebody_who_can_write_to_the_store_is_not_served(
    store: Store, kps: list[KeyProvider]
) -> None:
    alice, bob, carol = kps
    # Carol's own identity seals a key to Bob in Alice's name.
    carol.sealer.local_id = "KP_Alice"
    (planted,) = carol.issue(bob)
    with pytest.raises(SealBroken, match="signature"):
        bob.claim(planted.key_id, alice)


def test_a_wrapping_key_that_is_missing_costs_its_keys_and_nothing_else(store: Store, kps: list[KeyProvider]) -> None:
    alice, bob, _ = kps
    (lost,) = alice.issue(bob)
    store.rows("DELETE FROM wrapping_keys")
    (kept,) = alice.restarted().issue(bob)
    with pytest.raises(SealBroken, match="not in the store"):
        bob.claim(lost.key_id, alice)
    assert bob.claim(kept.key_id, alice).key == kept.key


def test_a_key_of_a_destroyed_epoch_cannot_be_read_by_anyone(store: Store, kps: list[KeyProvider]) -> None:
    alice, bob, _ = kps
    (issued,) = alice.issue(bob)
    for epoch_id in bob.keyring.epoch_ids():
        bob.keyring.destroy_epoch(epoch_id)
    with pytest.raises(SealBroken):
        bob.claim(issued.key_id, alice)
    assert store.count("key_records") == 1


HOSTILE_ANNOUNCEMENTS = {
    "empty": b"",
    "garbage": b"\xc1" * 50,
    "no signature": encoding.pack([b"body"]),
    "a number for a signature": b"number",
    "nothing for a signature": b"nothing",
}


@pytest.mark.parametrize("body", HOSTILE_ANNOUNCEMENTS.values(), ids=HOSTILE_ANNOUNCEMENTS)
def test_a_hostile_announcement_in_the_store_costs_its_own_name_and_nothing_else(
    store: Store, kps: list[KeyProvider], body: bytes
) -> None:
    alice, bob, _ = kps
    if body in (b"number", b"nothing"):
        # A body that is well-formed up to the place where its signature should be.
        signed = encoding.unpack(store.rows("SELECT body FROM announcements WHERE system_id = 'KP_Carol'")[0][0])[0]
        body = encoding.pack([signed, 5 if body == b"number" else None])
    store.rows("UPDATE announcements SET body = %s, digest = REVERSE(digest) WHERE system_id = 'KP_Carol'", body)
    alice.refresh()
    assert alice.directory.get("KP_Carol") is None
    (issued,) = alice.issue(bob)
    assert bob.claim(issued.key_id, alice).key == issued.key


# --- races


def race(callers: Sequence[Callable[[], object]]) -> list[object]:
    """What each caller got; all start at the same moment, each in its own thread."""
    barrier = threading.Barrier(len(callers))
    results: list[object] = [None] * len(callers)

    def run(place: int) -> None:
        barrier.wait()
        try:
            results[place] = callers[place]()
        except SkipbusError as error:
            results[place] = error

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(callers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return results


def test_of_two_racing_connections_exactly_one_gets_the_key(store: Store, kps: list[KeyProvider]) -> None:
    alice, bob, _ = kps
    keys = alice.issue(bob, count=60)
    with bob.engine.connect() as first, bob.engine.connect() as second:
        for issued in keys:
            request = ClaimRequest(bytes.fromhex(issued.key_id), "KP_Alice", "")

            def claim(connection: Connection, request: ClaimRequest = request) -> object:
                (answer,) = bob.claim_batch([request]).run(connection)
                connection.commit()
                return answer

            answers = race([lambda c=first: claim(c), lambda c=second: claim(c)])  # type: ignore[misc]
            assert sorted(type(answer).__name__ for answer in answers) == ["ClaimedKey", "KeyNotAvailable"]
    assert store.count("key_records") == 0


Queue = GroupCommit[Any, Any]


def queue_of(make_batch: Callable[[Any], Any], engine: Engine) -> Queue:
    return GroupCommit("test", make_batch, engine, Limits(max_batch=16, max_queue=1000, timeout_seconds=20))


@asynccontextmanager
async def closing(*queues: Queue) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(60):
            yield
    finally:
        for queue in queues:
            await queue.close()


async def answers_of(queue: Queue, requests: Sequence[object]) -> list[object]:
    """The answers or errors to requests that arrive together."""
    return list(await asyncio.gather(*map(queue.submit, requests), return_exceptions=True))


async def test_queues_that_want_the_same_keys_in_opposite_orders_give_each_key_out_once(
    kps: list[KeyProvider],
) -> None:
    alice, bob, _ = kps
    keys = alice.issue(bob, count=200)
    requests = [ClaimRequest(bytes.fromhex(key.key_id), "KP_Alice", "") for key in keys]
    queues = [queue_of(bob.claim_batch, queue_engine(bob.settings)) for _ in range(3)]
    orders = [requests, requests[::-1], requests[100:] + requests[:100]]
    async with closing(*queues):
        calls = [answers_of(queue, order) for queue, order in zip(queues, orders, strict=True)]
        answers = [answer for of_queue in await asyncio.gather(*calls) for answer in of_queue]
    got = [answer.key for answer in answers if isinstance(answer, ClaimedKey)]
    assert sorted(got) == sorted(key.key for key in keys)
    assert {type(answer) for answer in answers} == {ClaimedKey, KeyNotAvailable}


# --- only what was deleted is handed out


@contextmanager
def before_the_deletion(engine: Engine, action: Callable[[Connection], None]) -> Iterator[list[str]]:
    """``action`` is done once, between the SELECT and the DELETE of the next claim; notes that it was."""
    done: list[str] = []

    def act(connection: Connection, _cursor: object, statement: str, *_: object) -> None:
        if statement.startswith("DELETE") and not done:
            done.append(statement)
            action(connection)

    event.listen(engine, "before_cursor_execute", act)
    try:
        yield done
    finally:
        event.remove(engine, "before_cursor_execute", act)


async def test_a_key_that_another_transaction_deletes_after_it_was_locked_is_not_handed_out(
    store: Store, kps: list[KeyProvider]
) -> None:
    # On a cluster, two nodes can lock one row each. Here the lock is given up, as if it were only the other node's.
    alice, bob, _ = kps
    stolen, kept = alice.issue(bob, count=2)
    store.rows("DELETE FROM outbox")
    engine = queue_engine(bob.settings)

    def steal(connection: Connection) -> None:
        dbapi: Any = connection.connection.dbapi_connection
        dbapi.rollback()
        store.rows("DELETE FROM key_records WHERE key_id = %s", bytes.fromhex(stolen.key_id))

    queue = queue_of(bob.claim_batch, engine)
    requests = [ClaimRequest(bytes.fromhex(key.key_id), "KP_Alice", "") for key in (stolen, kept)]
    with before_the_deletion(engine, steal) as stole:
        async with closing(queue):
            first, second = await answers_of(queue, requests)
    assert stole
    assert isinstance(first, KeyNotAvailable)
    assert isinstance(second, ClaimedKey)
    assert second.key == kept.key
    # One event, with one key: what was rolled back left neither an event nor a token.
    ((items, payload),) = store.rows("SELECT items, payload FROM outbox")
    assert (items, [item[0].hex() for item in encoding.unpack(payload)]) == (1, [kept.key_id])


def test_a_claim_that_deletes_nothing_does_not_commit_and_leaves_no_token(store: Store, kps: list[KeyProvider]) -> None:
    alice, bob, _ = kps
    (issued,) = alice.issue(bob)
    store.rows("DELETE FROM outbox")

    def vanish(connection: Connection) -> None:
        dbapi: Any = connection.connection.dbapi_connection
        dbapi.cursor().execute("DELETE FROM key_records")

    with before_the_deletion(bob.engine, vanish) as vanished, pytest.raises(StoreConflict):
        bob.claim(issued.key_id, alice)
    assert vanished
    assert (store.count("key_records"), store.count("outbox")) == (1, 0)
    assert bob.claim(issued.key_id, alice).key == issued.key


# --- interrupted commits


@pytest.mark.parametrize("cut", CUTS)
async def test_a_key_whose_commit_was_interrupted_is_retrievable_when_it_is_answered(
    store: Store, kps: list[KeyProvider], proxy: CuttingProxy, cut: Cut
) -> None:
    alice, bob, _ = kps
    # The wrapping key is committed with the first key, on its own.
    alice.issue(bob)
    store.rows("DELETE FROM key_records")
    store.rows("DELETE FROM outbox")
    queue = queue_of(alice.issue_batch, queue_engine(alice.settings, proxy.port))
    proxy.cut_next(cut)
    async with closing(queue):
        issued = await queue.submit(IssueRequest("KP_Bob", 256, ""))
    assert proxy.cut_count == 1
    assert (store.count("key_records"), store.count("outbox")) == (1, 1)
    assert bob.claim(issued.key_id, alice).key == issued.key
    assert store.count("key_records") == 0


@pytest.mark.parametrize("cut", CUTS)
async def test_a_wrapping_key_whose_commit_was_interrupted_costs_no_key(
    kps: list[KeyProvider], proxy: CuttingProxy, cut: Cut
) -> None:
    alice, bob, _ = kps
    queue = queue_of(alice.issue_batch, queue_engine(alice.settings, proxy.port))
    proxy.cut_next(cut)
    async with closing(queue):
        issued = await queue.submit(IssueRequest("KP_Bob", 256, ""))
    assert proxy.cut_count == 1
    assert bob.claim(issued.key_id, alice).key == issued.key


@pytest.mark.parametrize("cut", CUTS)
async def test_a_claim_whose_commit_was_interrupted_gives_the_key_out_once(
    store: Store, kps: list[KeyProvider], proxy: CuttingProxy, cut: Cut
) -> None:
    alice, bob, _ = kps
    (issued,) = alice.issue(bob)
    queue = queue_of(bob.claim_batch, queue_engine(bob.settings, proxy.port))
    proxy.cut_next(cut)
    request = ClaimRequest(bytes.fromhex(issued.key_id), "KP_Alice", "")
    async with closing(queue):
        first = await queue.submit(request)
        with pytest.raises(KeyNotAvailable):
            await queue.submit(request)
    assert first.key == issued.key
    assert proxy.cut_count == 1
    assert store.rows("SELECT COUNT(*) FROM outbox WHERE type = 'key.retrieved'") == [(1,)]


async def test_commits_that_are_interrupted_again_and_again_lose_no_answered_key(
    kps: list[KeyProvider], proxy: CuttingProxy
) -> None:
    alice, bob, _ = kps
    queue = queue_of(alice.issue_batch, queue_engine(alice.settings, proxy.port))
    proxy.cut_next("cut_before", "cut_after", "cut_before", "cut_before", "cut_after")
    async with closing(queue):
        answers = await answers_of(queue, [IssueRequest("KP_Bob", 256, "")] * 60)
    assert proxy.cut_count == 5
    for issued in answers:
        assert isinstance(issued, IssuedKey)
        assert bob.claim(issued.key_id, alice).key == issued.key


def run_and_lose_the_connection(batch: IssueBatch | ClaimBatch, provider: KeyProvider, proxy: CuttingProxy) -> None:
    """Runs a batch whose commit the proxy cuts."""
    with pytest.raises(StoreUnavailable):
        provider.commit(batch, queue_engine(provider.settings, proxy.port))


def test_a_commit_that_lands_after_it_was_given_up_does_not_vouch_for_the_next_one(
    kps: list[KeyProvider], proxy: CuttingProxy
) -> None:
    # The store was asked too early, found nothing, and the batch was run again; then the first commit landed.
    alice, bob, _ = kps
    batch = alice.issue_batch([IssueRequest("KP_Bob", 256, "")])
    alice.commit(batch)
    proxy.cut_next("cut_before")
    run_and_lose_the_connection(batch, alice, proxy)
    with alice.engine.connect() as connection:
        (issued,) = batch.committed(connection) or []
    assert isinstance(issued, IssuedKey)
    assert bob.claim(issued.key_id, alice).key == issued.key


def test_a_claim_that_was_committed_but_whose_event_is_gone_is_not_given_out_again(
    store: Store, kps: list[KeyProvider], proxy: CuttingProxy
) -> None:
    # The peer acknowledged the event before the store could be asked, so nothing proves the commit any more.
    alice, bob, _ = kps
    (issued,) = alice.issue(bob)
    batch = bob.claim_batch([ClaimRequest(bytes.fromhex(issued.key_id), "KP_Alice", "")])
    proxy.cut_next("cut_after")
    run_and_lose_the_connection(batch, bob, proxy)
    store.rows("DELETE FROM outbox")
    with bob.engine.connect() as connection:
        assert batch.committed(connection) is None
        (answer,) = batch.run(connection)
    assert isinstance(answer, StoreUnavailable)
    assert store.count("key_records") == 0


async def test_where_nobody_can_look_whether_keys_were_given_out_their_callers_are_not_told_that_there_were_none(
    store: Store, kps: list[KeyProvider], proxy: CuttingProxy
) -> None:
    # The commit happened, and what fails next is no absence of the store: a new batch would find the keys gone.
    alice, bob, _ = kps
    keys = alice.issue(bob, count=2)
    engine = queue_engine(bob.settings, proxy.port)
    queue = queue_of(bob.claim_batch, engine)
    failed: list[str] = []

    def fail(_connection: Connection, _cursor: object, statement: str, *_: object) -> None:
        if proxy.cut_count and not failed:
            failed.append(statement)
            raise ZeroDivisionError

    event.listen(engine, "before_cursor_execute", fail)
    proxy.cut_next("cut_after")
    async with closing(queue):
        requests = [ClaimRequest(bytes.fromhex(key.key_id), "KP_Alice", "") for key in keys]
        answers = await answers_of(queue, requests)
    assert failed
    assert [type(answer) for answer in answers] == [CommitUnknown] * 2
    assert store.count("key_records") == 0


async def test_a_claim_whose_connection_is_killed_while_it_waits_is_tried_again(
    store: Store, kps: list[KeyProvider]
) -> None:
    alice, bob, _ = kps
    (issued,) = alice.issue(bob)
    queue = queue_of(bob.claim_batch, queue_engine(bob.settings))
    waiting = "SELECT id FROM information_schema.processlist WHERE info LIKE '%%FOR UPDATE' AND db = %s"

    def waits() -> list[tuple[Any, ...]]:
        return store.rows(waiting, store.database.database)

    async with closing(queue):
        with store.connect() as holder, holder.cursor() as cursor:
            cursor.execute("SELECT * FROM key_records FOR UPDATE")
            call = asyncio.create_task(queue.submit(ClaimRequest(bytes.fromhex(issued.key_id), "KP_Alice", "")))
            await asyncio.to_thread(wait_for, lambda: bool(waits()), timeout_seconds=3)
            ((victim,),) = waits()
            store.rows(f"KILL {int(victim)}")
            await asyncio.to_thread(wait_for, lambda: (victim,) not in waits(), timeout_seconds=3)
            holder.rollback()
        assert (await call).key == issued.key


# --- a key and its event are committed together or not at all


@pytest.mark.parametrize("targets", [["KP_Bob"], ["KP_Bob", "KP_Bob", "KP_Carol"]])
async def test_where_the_events_are_refused_no_key_is_committed(
    store: Store, kps: list[KeyProvider], targets: list[str]
) -> None:
    alice, bob, carol = kps
    alice.issue(bob)
    alice.issue(carol)
    store.rows("DELETE FROM key_records")
    queue = queue_of(alice.issue_batch, queue_engine(alice.settings))
    async with closing(queue):
        with store.without_table("outbox"):
            answers = await answers_of(queue, [IssueRequest(target, 256, "") for target in targets])
            assert [type(answer) for answer in answers] == [StoreMisconfigured] * len(targets)
            assert store.count("key_records") == 0
        issued = await queue.submit(IssueRequest("KP_Bob", 256, ""))
    assert bob.claim(issued.key_id, alice).key == issued.key


async def test_where_the_event_is_refused_no_key_is_deleted_and_it_can_be_claimed_later(
    store: Store, kps: list[KeyProvider]
) -> None:
    alice, bob, _ = kps
    (issued,) = alice.issue(bob)
    queue = queue_of(bob.claim_batch, queue_engine(bob.settings))
    request = ClaimRequest(bytes.fromhex(issued.key_id), "KP_Alice", "")
    async with closing(queue):
        with store.without_table("outbox"):
            with pytest.raises(StoreMisconfigured):
                await queue.submit(request)
            assert store.count("key_records") == 1
        assert (await queue.submit(request)).key == issued.key


async def test_a_key_that_cannot_be_inserted_is_refused_alone_and_the_one_with_its_key_id_stays(
    store: Store, kps: list[KeyProvider], monkeypatch: pytest.MonkeyPatch
) -> None:
    alice, bob, _ = kps
    key_id = place(alice, bob, now_ms() + 60_000)
    store.rows("DELETE FROM outbox")
    before = store.rows("SELECT * FROM key_records")
    key_ids = iter([b"1" * 16, key_id, b"2" * 16, b"3" * 16, key_id, b"4" * 16])
    monkeypatch.setattr("skipbus.services.api.links.store.new_key_id", lambda: next(key_ids))
    queue = queue_of(alice.issue_batch, queue_engine(alice.settings))
    async with closing(queue):
        answers = await answers_of(queue, [IssueRequest("KP_Bob", 256, "")] * 3)
    assert [type(answer) for answer in answers] == [IssuedKey, StoreRefused, IssuedKey]
    assert (store.count("key_records"), store.count("outbox")) == (3, 2)
    assert store.rows("SELECT * FROM key_records WHERE key_id = %s", key_id) == before
    assert bob.claim(key_id, alice).key == bytes(32).hex()


async def test_where_no_key_can_be_made_nothing_is_committed_and_the_next_request_is_served(
    store: Store, kps: list[KeyProvider], monkeypatch: pytest.MonkeyPatch
) -> None:
    alice, bob, _ = kps
    queue = queue_of(alice.issue_batch, queue_engine(alice.settings))

    def fail(_count: int) -> bytes:
        raise OSError("no entropy")

    async with closing(queue):
        with monkeypatch.context() as patched:
            patched.setattr("skipbus.services.api.entropy.os.urandom", fail)
            with pytest.raises(NoEntropy):
                await queue.submit(IssueRequest("KP_Bob", 256, ""))
        assert (store.count("key_records"), store.count("outbox")) == (0, 0)
        issued = await queue.submit(IssueRequest("KP_Bob", 256, ""))
    assert bob.claim(issued.key_id, alice).key == issued.key


# --- statements


def test_ids_of_every_printable_character_come_through_the_statements(store: Store) -> None:
    printable = "".join(chr(n) for n in range(0x21, 0x7F) if chr(n) not in "*?[]")
    names = ["KP_" + printable[:60], "KP_" + printable[60:], "KP_'; --"]
    first, second, third = announced(store, *names)
    for source, target in ((first, second), (second, third), (third, first)):
        (issued,) = source.issue(target)
        assert target.claim(issued.key_id, source).key == issued.key


def test_a_key_id_that_is_taken_is_refused_and_the_key_under_it_stays(store: Store, kps: list[KeyProvider]) -> None:
    alice, bob, carol = kps
    key_id = place(alice, bob, now_ms() + 60_000)
    before = store.rows("SELECT * FROM key_records")
    with pytest.raises(StoreRefused):
        place(alice, carol, now_ms() + 60_000)
    assert store.rows("SELECT * FROM key_records") == before
    assert bob.claim(key_id, alice).key == bytes(32).hex()
