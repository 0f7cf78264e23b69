"""Facts about keys in the store: placed before they are answered, given out once, and to nobody else.

Batches and lanes are the api's own, on real connections; what an interrupted commit does is shown by a proxy that
cuts the connection at that very moment, and by killing it from another one.
"""

from __future__ import annotations

import asyncio
import statistics
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
from pymysql.connections import Connection

from sandbox.servers import Database
from skipbus.services.api.batching import Lane
from skipbus.services.api.claiming import ClaimedKey, ClaimRequest
from skipbus.services.api.issuing import IssuedKey, IssueRequest
from skipbus.services.api.lanes import make_lane
from skipbus.shared.clock import now_ms
from skipbus.shared.errors import (
    CommitUnknown,
    KeyNotAvailable,
    NoEntropy,
    PeerNotReady,
    SealBroken,
    SkipbusError,
    StoreRefused,
    StoreUnavailable,
)
from skipbus.shared.protocol import encoding
from skipbus.shared.store.keys import PREPARED, commit_issued
from skipbus.shared.store.packets import OutboxRow
from skipbus.shared.store.steps import run_steps
from tests.integration.cutting_proxy import Cut, CuttingProxy
from tests.integration.key_providers import KeyProvider, Store, announced, tend, through_port
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
    announcement = source.directory.get(target.system_id)
    assert announcement is not None
    current = source.sealer.wrapping_key_for(target.system_id, now_ms())
    key_id = bytes([7]) * 16
    record = current.key.seal(key_id, bytes(32), expires_ms, "placed")
    told = encoding.pack([[key_id, 256, expires_ms, "placed"]])
    event = OutboxRow(source.system_id, target.system_id, "key.issued", told, 1, now_ms())
    with source.store.connect() as connection:
        wrapping_keys = [current.unstored] if current.unstored else []
        run_steps(connection, commit_issued(lambda: [record], wrapping_keys, [event]))
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
    told = encoding.unpack(row[4])
    assert [item[0].hex() for item in told] == [key.key_id for key in issued]
    assert {item[1] for item in told} == {256}
    assert [item[3] for item in told] == [f"issue-{n}" for n in range(5)]


def test_a_claimed_key_is_gone_from_the_store_and_its_source_is_told(store: Store, kps: list[KeyProvider]) -> None:
    alice, bob, _ = kps
    (issued,) = alice.issue(bob)
    assert bob.claim(issued.key_id, alice).issued_as == "issue-0"
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


def test_a_refused_claim_leaves_no_lock_behind(store: Store, kps: list[KeyProvider]) -> None:
    alice, bob, carol = kps
    (issued,) = alice.issue(bob)
    with store.connect() as connection:
        wanted = bytes.fromhex(issued.key_id)
        run_steps(connection, carol.claim_batch([ClaimRequest(wanted, "KP_Alice", "")]).run())
        run_steps(connection, bob.claim_batch([ClaimRequest(wanted, "KP_Carol", "")]).run())
        # The connection lives on, as a lane's does.
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
    long_lived = type(alice.issue_batch([]))(alice.sealer, 10 * 86_400, [IssueRequest("KP_Bob", 256, "")])
    with store.connect() as connection:
        run_steps(connection, long_lived.run())
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
    with store.connect() as connection:
        answers = run_steps(connection, alice.issue_batch(requests).run())
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
    current = alice.sealer.wrapping_key_for(bob.system_id, now_ms())
    span = current.span
    assert alice.sealer.held(bob.system_id, span.starts_ms) is current
    assert alice.sealer.held(bob.system_id, span.ends_ms - 1) is current
    assert alice.sealer.held(bob.system_id, span.ends_ms) is None
    later = alice.sealer.wrapping_key_for(bob.system_id, span.ends_ms)
    assert later.key.epoch_id != current.key.epoch_id
    assert alice.sealer.held(bob.system_id, span.starts_ms) is None


def test_a_wrapping_key_is_kept_when_its_target_announces_its_epoch_again(kps: list[KeyProvider]) -> None:
    alice, bob, _ = kps
    at_ms = alice.sealer.wrapping_key_for(bob.system_id, now_ms()).span.ends_ms
    current = alice.sealer.wrapping_key_for(bob.system_id, at_ms)
    before = current.announcement
    tend(bob.keeper, at_ms)
    alice.refresh()
    assert alice.sealer.held(bob.system_id, at_ms) is current
    assert current.announcement is alice.directory.get(bob.system_id)
    assert current.announcement is not before


def test_a_target_that_is_not_believed_any_more_is_not_sealed_to(store: Store, kps: list[KeyProvider]) -> None:
    alice, bob, _ = kps
    at_ms = now_ms()
    alice.sealer.wrapping_key_for(bob.system_id, at_ms)
    store.rows("DELETE FROM announcements WHERE system_id = %s", bob.system_id)
    alice.refresh()
    with pytest.raises(PeerNotReady):
        alice.sealer.held(bob.system_id, at_ms)


def test_of_two_claims_for_one_key_in_a_batch_the_first_gets_it(store: Store, kps: list[KeyProvider]) -> None:
    alice, bob, _ = kps
    first, second = alice.issue(bob, count=2)
    wanted = [bytes.fromhex(key.key_id) for key in (first, first, second, first)]
    with store.connect() as connection:
        answers = run_steps(connection, bob.claim_batch([ClaimRequest(i, "KP_Alice", "") for i in wanted]).run())
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
    with store.connect() as connection:
        wrong, right = run_steps(connection, bob.claim_batch(requests).run())
    assert isinstance(wrong, KeyNotAvailable)
    assert isinstance(right, ClaimedKey)


def test_one_damaged_record_of_a_batch_leaves_the_others_theirs(store: Store, kps: list[KeyProvider]) -> None:
    alice, bob, _ = kps
    issued = alice.issue(bob, count=3)
    damaged = bytes.fromhex(issued[1].key_id)
    store.rows("UPDATE key_records SET sealed = REVERSE(sealed) WHERE key_id = %s", damaged)
    requests = [ClaimRequest(bytes.fromhex(key.key_id), "KP_Alice", "") for key in issued]
    with store.connect() as connection:
        answers = run_steps(connection, bob.claim_batch(requests).run())
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
    with store.connect() as first, store.connect() as second:
        for issued in keys:
            request = ClaimRequest(bytes.fromhex(issued.key_id), "KP_Alice", "")

            def claim(connection: Connection[Any], request: ClaimRequest = request) -> object:
                (answer,) = run_steps(connection, bob.claim_batch([request]).run())
                return answer

            answers = race([lambda c=first: claim(c), lambda c=second: claim(c)])  # type: ignore[misc]
            assert sorted(type(answer).__name__ for answer in answers) == ["ClaimedKey", "KeyNotAvailable"]
    assert store.count("key_records") == 0


async def run_lanes(lanes: Sequence[Lane[Any, Any]], work: Callable[[], Awaitable[list[object]]]) -> list[object]:
    try:
        async with asyncio.timeout(60):
            return await work()
    finally:
        for lane in lanes:
            await lane.close()


def unobserved(_size: int, _seconds: float) -> None:
    """For lanes whose measures nobody looks at."""


def lane_of(make_batch: Callable[[Any], Any], connect: Callable[[], Connection[Any]]) -> Lane[Any, Any]:
    return Lane(
        "lane",
        make_batch,
        connect,
        max_batch=16,
        max_queue=1000,
        timeout_seconds=20,
        observe=unobserved,
    )


async def test_a_batch_of_many_keys_is_answered_when_it_is_committed_and_waits_for_nothing_else(
    kps: list[KeyProvider], database: Database
) -> None:
    # Its results are longer than those of one key, and come in parts: none may lie unread until the next sweep.
    alice, bob, _ = kps
    issue = lane_of(alice.issue_batch, through_port(alice.settings, database.port))
    claim = lane_of(bob.claim_batch, through_port(bob.settings, database.port))
    took_seconds: list[float] = []

    async def work() -> list[object]:
        for _ in range(15):
            started = time.monotonic()
            keys = await asyncio.gather(*[issue.submit(IssueRequest("KP_Bob", 256, "")) for _ in range(17)])
            wanted = [ClaimRequest(bytes.fromhex(key.key_id), "KP_Alice", "") for key in keys]
            await asyncio.gather(*[claim.submit(request) for request in wanted])
            took_seconds.append(time.monotonic() - started)
        return []

    await run_lanes([issue, claim], work)
    assert statistics.median(took_seconds) < 0.2


async def test_lanes_that_want_the_same_keys_in_opposite_orders_give_each_key_out_once(
    store: Store, kps: list[KeyProvider], database: Database
) -> None:
    alice, bob, _ = kps
    keys = alice.issue(bob, count=200)
    requests = [ClaimRequest(bytes.fromhex(key.key_id), "KP_Alice", "") for key in keys]
    connect = through_port(bob.settings, database.port)
    lanes = [lane_of(bob.claim_batch, connect) for _ in range(3)]

    async def work() -> list[object]:
        orders = [requests, requests[::-1], requests[100:] + requests[:100]]
        calls = [lane.submit(r) for lane, order in zip(lanes, orders, strict=True) for r in order]
        return list(await asyncio.gather(*calls, return_exceptions=True))

    answers = await run_lanes(lanes, work)
    got = [answer.key for answer in answers if isinstance(answer, ClaimedKey)]
    assert sorted(got) == sorted(key.key for key in keys)
    assert {type(answer) for answer in answers} == {ClaimedKey, KeyNotAvailable}


# --- interrupted commits


@pytest.mark.parametrize("cut", CUTS)
async def test_a_key_whose_commit_was_interrupted_is_retrievable_when_it_is_answered(
    store: Store, kps: list[KeyProvider], proxy: CuttingProxy, cut: Cut
) -> None:
    alice, bob, _ = kps
    lane = lane_of(alice.issue_batch, through_port(alice.settings, proxy.port))
    proxy.cut_next(cut)

    async def work() -> list[object]:
        return [await lane.submit(IssueRequest("KP_Bob", 256, ""))]

    (issued,) = await run_lanes([lane], work)
    assert isinstance(issued, IssuedKey)
    assert proxy.cut_count == 1
    assert bob.claim(issued.key_id, alice).key == issued.key
    assert store.count("key_records") == 0


@pytest.mark.parametrize("cut", CUTS)
async def test_a_claim_whose_commit_was_interrupted_gives_the_key_out_once(
    store: Store, kps: list[KeyProvider], proxy: CuttingProxy, cut: Cut
) -> None:
    alice, bob, _ = kps
    (issued,) = alice.issue(bob)
    lane = lane_of(bob.claim_batch, through_port(bob.settings, proxy.port))
    proxy.cut_next(cut)
    request = ClaimRequest(bytes.fromhex(issued.key_id), "KP_Alice", "")

    async def work() -> list[object]:
        return [await lane.submit(request), await asyncio.gather(lane.submit(request), return_exceptions=True)]

    first, second = await run_lanes([lane], work)
    assert isinstance(first, ClaimedKey)
    assert first.key == issued.key
    assert isinstance(second, list)
    assert isinstance(second[0], KeyNotAvailable)
    assert store.rows("SELECT COUNT(*) FROM outbox WHERE type = 'key.retrieved'") == [(1,)]


async def test_commits_that_are_interrupted_again_and_again_lose_no_answered_key(
    store: Store, kps: list[KeyProvider], proxy: CuttingProxy
) -> None:
    alice, bob, _ = kps
    lane = lane_of(alice.issue_batch, through_port(alice.settings, proxy.port))
    proxy.cut_next("cut_before", "cut_after", "cut_before", "cut_before", "cut_after")

    async def work() -> list[object]:
        return list(await asyncio.gather(*[lane.submit(IssueRequest("KP_Bob", 256, "")) for _ in range(60)]))

    answers = await run_lanes([lane], work)
    assert proxy.cut_count == 5
    for issued in answers:
        assert isinstance(issued, IssuedKey)
        assert bob.claim(issued.key_id, alice).key == issued.key


def test_a_commit_that_lands_after_it_was_given_up_does_not_vouch_for_the_next_one(
    store: Store, kps: list[KeyProvider], proxy: CuttingProxy
) -> None:
    # The store was asked too early, found nothing, and the batch was run again; then the first commit landed.
    alice, bob, _ = kps
    batch = alice.issue_batch([IssueRequest("KP_Bob", 256, "")])
    with store.connect() as connection:
        run_steps(connection, batch.run())
    proxy.cut_next("cut_before")
    again = through_port(alice.settings, proxy.port)()
    with pytest.raises(CommitUnknown):
        run_steps(again, batch.run())
    with store.connect() as connection:
        answers = run_steps(connection, batch.committed())
    for issued in answers or []:
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
    cut_off = through_port(bob.settings, proxy.port)()
    with pytest.raises(CommitUnknown):
        run_steps(cut_off, batch.run())
    store.rows("DELETE FROM outbox")
    with store.connect() as connection:
        assert run_steps(connection, batch.committed()) is None
        (answer,) = run_steps(connection, batch.run())
    assert isinstance(answer, StoreUnavailable)
    assert store.count("key_records") == 0


async def test_a_claim_whose_connection_is_killed_while_it_waits_is_tried_again(
    store: Store, kps: list[KeyProvider], database: Database
) -> None:
    alice, bob, _ = kps
    (issued,) = alice.issue(bob)
    lane = lane_of(bob.claim_batch, through_port(bob.settings, database.port))
    waiting = "SELECT id FROM information_schema.processlist WHERE info LIKE '%%FOR UPDATE' AND db = %s"

    async def work() -> list[object]:
        with store.connect() as holder, holder.cursor() as cursor:
            cursor.execute("SELECT * FROM key_records FOR UPDATE")
            call = asyncio.create_task(lane.submit(ClaimRequest(bytes.fromhex(issued.key_id), "KP_Alice", "")))
            await asyncio.to_thread(wait_for, lambda: bool(store.rows(waiting, database.database)), timeout_seconds=3)
            ((victim,),) = store.rows(waiting, database.database)
            store.rows(f"KILL {int(victim)}")
            await asyncio.to_thread(
                wait_for,
                lambda: (victim,) not in store.rows(waiting, database.database),
                timeout_seconds=3,
            )
            holder.rollback()
        return [await call]

    (answer,) = await run_lanes([lane], work)
    assert isinstance(answer, ClaimedKey)
    assert answer.key == issued.key


# --- commands that leave without waiting for one another


def prepared_lane(source: KeyProvider, port: int) -> Lane[Any, Any]:
    """The issuing lane as the api makes it."""
    settings = replace(source.settings, mysql=replace(source.settings.mysql, port=port))
    return make_lane(settings, "issue", source.issue_batch, prepared=PREPARED)


def executed(store: Store) -> int:
    """How many prepared statements the server has executed for anybody."""
    return int(store.rows("SHOW GLOBAL STATUS LIKE 'Com_stmt_execute'")[0][1])


async def issued_over(lane: Lane[Any, Any], *targets: str, size_bits: int = 256) -> list[object]:
    """The answers to requests that go in one batch."""
    requests = [IssueRequest(target, size_bits, f"issue-{n}") for n, target in enumerate(targets)]

    async def work() -> list[object]:
        return list(await asyncio.gather(*map(lane.submit, requests), return_exceptions=True))

    return await run_lanes([lane], work)


@pytest.mark.parametrize("size_bits", [128, 256, 512])
async def test_a_key_alone_goes_in_prepared_statements_and_is_the_same_as_any_other(
    store: Store, kps: list[KeyProvider], database: Database, size_bits: int
) -> None:
    alice, bob, _ = kps
    alice.issue(bob)
    text = store.rows("SELECT * FROM outbox")[0], store.rows("SELECT * FROM key_records")[0]
    store.rows("DELETE FROM outbox")
    store.rows("DELETE FROM key_records")
    before = executed(store)
    (issued,) = await issued_over(prepared_lane(alice, database.port), "KP_Bob", size_bits=size_bits)
    assert executed(store) >= before + 2
    bound = store.rows("SELECT * FROM outbox")[0], store.rows("SELECT * FROM key_records")[0]
    assert [[type(value) for value in row] for row in bound] == [[type(value) for value in row] for row in text]
    assert isinstance(issued, IssuedKey)
    (told,) = encoding.unpack(store.rows("SELECT payload FROM outbox")[0][0])
    assert (told[0].hex(), told[1], told[3]) == (issued.key_id, size_bits, "issue-0")
    claimed = bob.claim(issued.key_id, alice)
    assert (claimed.key, claimed.issued_as) == (issued.key, "issue-0")


async def test_ids_of_every_printable_character_come_through_prepared_statements(
    store: Store, database: Database
) -> None:
    printable = "".join(chr(n) for n in range(0x21, 0x7F) if chr(n) not in "*?[]")
    first, second = announced(store, "KP_" + printable[:60], "KP_" + printable[60:])
    for source, target in ((first, second), (second, first)):
        # A wrapping key that is new goes as text, and the event with it.
        source.issue(target)
        before = executed(store)
        (issued,) = await issued_over(prepared_lane(source, database.port), target.system_id)
        assert executed(store) >= before + 2
        assert isinstance(issued, IssuedKey)
        assert target.claim(issued.key_id, source).key == issued.key


@pytest.mark.parametrize("cut", CUTS)
async def test_a_prepared_key_whose_commit_was_interrupted_is_there_once_when_it_is_answered(
    store: Store, kps: list[KeyProvider], proxy: CuttingProxy, cut: Cut
) -> None:
    alice, bob, _ = kps
    # The wrapping key goes as text with the first key.
    alice.issue(bob)
    store.rows("DELETE FROM key_records")
    store.rows("DELETE FROM outbox")
    proxy.cut_next(cut)
    (issued,) = await issued_over(prepared_lane(alice, proxy.port), "KP_Bob")
    assert proxy.cut_count == 1
    assert isinstance(issued, IssuedKey)
    assert (store.count("key_records"), store.count("outbox")) == (1, 1)
    assert bob.claim(issued.key_id, alice).key == issued.key


@pytest.mark.parametrize("targets", [["KP_Bob"], ["KP_Bob", "KP_Bob", "KP_Carol"]])
async def test_where_the_events_are_refused_no_key_is_committed_although_it_has_left(
    store: Store, kps: list[KeyProvider], database: Database, targets: list[str]
) -> None:
    alice, bob, carol = kps
    alice.issue(bob)
    alice.issue(carol)
    store.rows("DELETE FROM key_records")
    # The column takes 128 characters.
    alice.sealer.local_id = "KP_" + "A" * 200
    before = connected(store)
    answers = await issued_over(prepared_lane(alice, database.port), *targets)
    assert [type(answer) for answer in answers] == [StoreRefused] * len(targets)
    wait_for(lambda: connected(store) <= before, timeout_seconds=5)
    assert store.count("key_records") == 0
    alice.sealer.local_id = "KP_Alice"
    (issued,) = alice.issue(bob)
    assert bob.claim(issued.key_id, alice).key == issued.key


async def test_a_key_alone_that_cannot_be_inserted_is_refused_and_the_one_with_its_key_id_stays(
    store: Store, kps: list[KeyProvider], database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    alice, bob, _ = kps
    alice.issue(bob)
    key_id = place(alice, bob, now_ms() + 60_000)
    store.rows("DELETE FROM outbox")
    before, connections = store.rows("SELECT * FROM key_records"), connected(store)
    monkeypatch.setattr("skipbus.services.api.issuing.new_key_id", lambda: key_id)
    answers = await issued_over(prepared_lane(alice, database.port), "KP_Bob")
    assert [type(answer) for answer in answers] == [StoreRefused]
    wait_for(lambda: connected(store) <= connections, timeout_seconds=5)
    assert store.rows("SELECT * FROM key_records") == before
    # Its COMMIT had left: the event is counted, and nobody was given a key.
    assert store.count("outbox") == 1
    assert bob.claim(key_id, alice).key == bytes(32).hex()


@pytest.mark.parametrize("altered", [False, True])
async def test_the_guard_holds_on_a_connection_on_which_keys_were_placed_before(
    store: Store, kps: list[KeyProvider], database: Database, *, altered: bool
) -> None:
    alice, bob, _ = kps
    alice.issue(bob)
    lane = prepared_lane(alice, database.port)
    request = IssueRequest("KP_Bob", 256, "")
    connections = connected(store)

    async def work() -> list[object]:
        for _ in range(3):
            await lane.submit(request)
        if altered:
            # The server prepares the statements anew.
            store.rows("ALTER TABLE key_records COMMENT = 'altered'")
            store.rows("ALTER TABLE outbox COMMENT = 'altered'")
        local_id, alice.sealer.local_id = alice.sealer.local_id, "KP_" + "A" * 200
        with pytest.raises(StoreRefused):
            await lane.submit(request)
        alice.sealer.local_id = local_id
        await asyncio.to_thread(wait_for, lambda: connected(store) <= connections, timeout_seconds=5)
        assert store.count("key_records") == 4
        return [await lane.submit(request)]

    (issued,) = await run_lanes([lane], work)
    assert isinstance(issued, IssuedKey)
    assert bob.claim(issued.key_id, alice).key == issued.key
    assert (store.count("key_records"), store.count("outbox")) == (4, 6)


def connected(store: Store) -> set[object]:
    """The server's connections to this database. One that was ended from here has had all done that it was sent."""
    others = "SELECT id FROM information_schema.processlist WHERE db = DATABASE() AND id <> CONNECTION_ID()"
    return {row[0] for row in store.rows(others)}


async def test_where_no_key_can_be_made_nothing_is_committed_and_the_next_request_is_served(
    store: Store, kps: list[KeyProvider], database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    alice, bob, _ = kps
    lane = prepared_lane(alice, database.port)

    def fail(_count: int) -> bytes:
        raise OSError("no entropy")

    async def work() -> list[object]:
        monkeypatch.setattr("skipbus.services.api.issuing.os.urandom", fail)
        with pytest.raises(NoEntropy):
            await lane.submit(IssueRequest("KP_Bob", 256, ""))
        monkeypatch.undo()
        assert store.count("outbox") == 0
        return [await lane.submit(IssueRequest("KP_Bob", 256, ""))]

    (issued,) = await run_lanes([lane], work)
    assert isinstance(issued, IssuedKey)
    assert bob.claim(issued.key_id, alice).key == issued.key
    assert store.count("outbox") == 2


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
