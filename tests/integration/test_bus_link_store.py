"""Facts about the api's transactions for bus links: placing, settling, stock. The peer is played by the test.

Two key providers of one store stand for the two ends: how announcements come to know each other does not matter here.
"""

from __future__ import annotations

import asyncio
import functools
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest
from pymysql.connections import Connection

from sandbox.servers import Database
from skipbus.services.api.batching import Batch, Lane
from skipbus.services.api.issuing import Sealer
from skipbus.services.api.links import IssuedKey, IssueRequest
from skipbus.services.api.links.confirmation import Settler
from skipbus.services.api.links.placing import (
    Check,
    Outcome,
    PlaceBatch,
    PlacedKey,
    Placement,
    SettleBatch,
    Settlement,
    Withdraw,
)
from skipbus.services.api.links.refill import StockMaker
from skipbus.services.api.links.stock import StockClaimBatch, StockOpener, StockRequest
from skipbus.shared.clock import now_ms
from skipbus.shared.errors import NotPlaced, Overloaded, PeerNotReady, SkipbusError, StoreUnavailable
from skipbus.shared.protocol import encoding
from skipbus.shared.store.steps import run_steps
from tests.integration.cutting_proxy import Cut, CuttingProxy
from tests.integration.key_providers import KeyProvider, Store, announced, through_port

R = TypeVar("R")
A = TypeVar("A")
ALICE, BOB = "KP_Alice", "KP_Bob"
SYNC_TIMEOUT_SECONDS = 2.0
TTL_SECONDS = 3600


@dataclass
class Ends:
    """Both ends of a link and the store of the source."""

    store: Store
    alice: KeyProvider
    bob: KeyProvider

    def place(self, count: int = 1) -> list[PlacedKey]:
        batch = PlaceBatch(self.alice.bus_sealer, TTL_SECONDS, requests(count))
        with self.store.connect() as connection:
            return [expect(answer, PlacedKey) for answer in run_steps(connection, batch.run())]

    def settle(self, *requests: Settlement) -> list[Outcome]:
        with self.store.connect() as connection:
            answers = run_steps(connection, SettleBatch(ALICE, SYNC_TIMEOUT_SECONDS, requests).run())
        return [expect(answer, Outcome) for answer in answers]

    def acknowledge(self, placement: Placement) -> None:
        self.store.rows("DELETE FROM outbox WHERE token = %s", placement.token)

    def make_stock(
        self, count: int, peer_id: str = BOB, *, placed: bool = True, ttl_seconds: int = TTL_SECONDS
    ) -> None:
        sealer = Sealer(ALICE, self.alice.keyring.identity, self.alice.directory)
        maker = StockMaker(self.store.settings.mysql, ALICE, ttl_seconds, sealer)
        maker.make(peer_id, count)
        maker.close()
        if placed:
            self.store.rows("UPDATE stock SET placed_ms = 1")
            self.store.rows("DELETE FROM outbox WHERE type = 'key.stocked'")

    def stock_batch(self, count: int, peer_id: str = BOB) -> StockClaimBatch:
        opener = StockOpener(self.alice.keyring, self.alice.directory)
        return StockClaimBatch(opener, TTL_SECONDS, [StockRequest(peer_id, f"c-{n}") for n in range(count)])

    def take(self, count: int = 1, peer_id: str = BOB) -> list[IssuedKey | None]:
        with self.store.connect() as connection:
            answers = run_steps(connection, self.stock_batch(count, peer_id).run())
        return [answer for answer in answers if not isinstance(answer, SkipbusError)]

    def told(self, kind: str) -> list[bytes]:
        rows = self.store.rows("SELECT payload FROM outbox WHERE type = %s ORDER BY id", kind)
        return [entry[0] for (payload,) in rows for entry in encoding.unpack(payload)]


@pytest.fixture
def ends(database: Database, tmp_path: Path) -> Iterator[Ends]:
    store = Store(database, tmp_path)
    alice, bob = announced(store, ALICE, BOB)
    yield Ends(store, alice, bob)
    store.close()


@pytest.fixture
def proxy(ends: Ends) -> Iterator[CuttingProxy]:
    made = CuttingProxy(ends.store.settings.mysql.port)
    yield made
    made.close()


def requests(count: int) -> list[IssueRequest]:
    return [IssueRequest(BOB, 256, f"c-{n}") for n in range(count)]


def expect(answer: object, kind: type[A]) -> A:
    if isinstance(answer, SkipbusError):
        raise answer
    assert isinstance(answer, kind)
    return answer


@asynccontextmanager
async def lane(
    make_batch: Callable[[Sequence[R]], Batch[A]], connect: Callable[[], Connection[Any]], timeout_seconds: float = 10
) -> AsyncIterator[Lane[R, A]]:
    made = Lane(
        "test",
        make_batch,
        connect,
        max_batch=100,
        max_queue=1000,
        timeout_seconds=timeout_seconds,
        observe=lambda _size, _seconds: None,
    )
    try:
        yield made
    finally:
        await made.close()


# --- placing


@pytest.mark.parametrize("cut", ["cut_before", "cut_after"])
async def test_keys_whose_commit_was_interrupted_are_placed_once(ends: Ends, proxy: CuttingProxy, cut: Cut) -> None:
    make = functools.partial(PlaceBatch, ends.alice.bus_sealer, TTL_SECONDS)
    async with lane(make, through_port(ends.store.settings, proxy.port)) as place:
        proxy.cut_next(cut)
        answers = await asyncio.gather(*(place.submit(request) for request in requests(5)))
    assert proxy.cut_count == 1
    assert sorted(answer.issued.key_id for answer in answers) == sorted(i.hex() for i in ends.told("key.placed"))
    rows = ends.store.rows("SELECT token, items FROM outbox")
    assert {(answer.placement.token, len(answer.placement.keys)) for answer in answers} == set(rows)


def test_several_peers_of_one_batch_have_a_row_and_a_token_each(ends: Ends) -> None:
    both = [IssueRequest(peer, 128, "c") for peer in (BOB, ALICE, BOB, ALICE, BOB)]
    with ends.store.connect() as connection:
        answered = run_steps(connection, PlaceBatch(ends.alice.bus_sealer, TTL_SECONDS, both).run())
    answers = [expect(answer, PlacedKey) for answer in answered]
    rows = ends.store.rows("SELECT peer_id, items FROM outbox ORDER BY items")
    assert rows == [(ALICE, 2), (BOB, 3)]
    assert len({answer.placement.token for answer in answers}) == 2


def test_one_peer_that_cannot_be_sealed_to_fails_nobody_else(ends: Ends) -> None:
    mixed = [IssueRequest("KP_Nobody", 256, "c"), *requests(2)]
    with ends.store.connect() as connection:
        first, *others = run_steps(connection, PlaceBatch(ends.alice.bus_sealer, TTL_SECONDS, mixed).run())
    assert isinstance(first, PeerNotReady)
    assert all(isinstance(answer, PlacedKey) for answer in others)


# --- settling


def test_placed_means_that_the_row_is_gone(ends: Ends) -> None:
    ((one), (other)) = ends.place()[0], ends.place()[0]
    ends.acknowledge(one.placement)
    assert ends.settle(Check(one.placement), Check(other.placement)) == [Outcome.PLACED, Outcome.WAITING]


def test_of_a_withdrawal_and_an_acknowledgement_the_first_one_holds(ends: Ends) -> None:
    one, other = ends.place()[0].placement, ends.place(3)[0].placement
    ends.acknowledge(one)
    assert ends.settle(Withdraw(one), Withdraw(other)) == [Outcome.PLACED, Outcome.WITHDRAWN]
    assert ends.told("key.withdrawn") == [key_id for key_id, _, _ in other.keys]
    assert ends.told("key.placed") == []


def test_after_twice_the_timeout_a_row_that_is_gone_is_no_longer_taken_for_placed(ends: Ends) -> None:
    late = ends.place()[0].placement
    ends.acknowledge(late)
    late.begun -= 2 * SYNC_TIMEOUT_SECONDS + 0.1
    assert ends.settle(Check(late)) == [Outcome.WAITING]
    assert ends.settle(Withdraw(late)) == [Outcome.WITHDRAWN]
    assert ends.told("key.withdrawn") == [late.keys[0][0]]


def test_what_a_caller_was_told_500_for_is_withdrawn_though_the_peer_has_it(ends: Ends) -> None:
    placement = ends.place()[0].placement
    ends.acknowledge(placement)
    assert ends.settle(Withdraw(placement, certainly=True)) == [Outcome.WITHDRAWN]
    assert ends.told("key.withdrawn") == [placement.keys[0][0]]


async def test_a_withdrawal_whose_commit_was_interrupted_is_not_taken_for_placed(
    ends: Ends, proxy: CuttingProxy
) -> None:
    placement = ends.place()[0].placement
    make = functools.partial(SettleBatch, ALICE, SYNC_TIMEOUT_SECONDS)
    async with lane(make, through_port(ends.store.settings, proxy.port)) as settle:
        proxy.cut_next("cut_after")
        # By then the row is gone by our own hand.
        assert await settle.submit(Withdraw(placement)) is Outcome.WITHDRAWN
    assert proxy.cut_count == 1
    assert set(ends.told("key.withdrawn")) == {placement.keys[0][0]}


def test_each_race_of_withdrawal_and_acknowledgement_ends_with_one_of_them(ends: Ends) -> None:
    outcomes = []
    for _ in range(60):
        placement = ends.place()[0].placement
        deleted: list[int] = []

        def acknowledge(token: bytes = placement.token, deleted: list[int] = deleted) -> None:
            with ends.store.connect() as connection, connection.cursor() as cursor:
                deleted.append(cursor.execute("DELETE FROM outbox WHERE token = %s", (token,)))
                connection.commit()

        peer = threading.Thread(target=acknowledge)
        peer.start()
        (outcome,) = ends.settle(Withdraw(placement))
        peer.join()
        assert (outcome is Outcome.PLACED) == (deleted == [1])
        assert (placement.keys[0][0] in ends.told("key.withdrawn")) == (outcome is Outcome.WITHDRAWN)
        outcomes.append(outcome)
    assert Outcome.WITHDRAWN in outcomes


class Gate:
    """A way to the store that can be closed."""

    def __init__(self, connect: Callable[[], Connection[Any]]) -> None:
        self._connect = connect
        self.open = True

    def __call__(self) -> Connection[Any]:
        if not self.open:
            raise StoreUnavailable("closed by the test")
        return self._connect()


async def test_a_store_that_is_away_at_the_timeout_gets_the_withdrawal_when_it_is_back(ends: Ends) -> None:
    gate = Gate(through_port(ends.store.settings, ends.store.settings.mysql.port))
    make = functools.partial(SettleBatch, ALICE, SYNC_TIMEOUT_SECONDS)
    placement = ends.place()[0].placement
    async with lane(make, gate, timeout_seconds=0.3) as settle:
        settler = Settler(settle, 0.2, 10)
        gate.open = False
        with pytest.raises(StoreUnavailable):
            await settler.settle(placement)
        # The peer has it by now, and its caller was told 500: it must be taken back all the same.
        ends.acknowledge(placement)
        with pytest.raises(SkipbusError):
            await settler.tidy()
        gate.open = True
        await settler.tidy()
        assert ends.told("key.withdrawn") == [placement.keys[0][0]]
        await settler.tidy()
        assert len(ends.told("key.withdrawn")) == 1


async def test_callers_of_one_row_share_its_settlement_and_one_who_leaves_does_not_end_it(ends: Ends) -> None:
    make = functools.partial(SettleBatch, ALICE, SYNC_TIMEOUT_SECONDS)
    placement = ends.place(3)[0].placement
    async with lane(make, through_port(ends.store.settings, ends.store.settings.mysql.port)) as settle:
        settler = Settler(settle, 5, 10)
        callers = [asyncio.create_task(settler.settle(placement)) for _ in range(3)]
        await asyncio.sleep(0.05)
        callers[0].cancel()
        ends.acknowledge(placement)
        settler.stored([placement.token])
        async with asyncio.timeout(2):
            assert await asyncio.gather(*callers[1:]) == [None, None]
        # Whoever comes late must not look again: a row that is gone says nothing by then.
        await settler.settle(placement)
        assert len(settler) == 0


async def test_what_was_withdrawn_stays_so_for_a_caller_who_comes_late(ends: Ends) -> None:
    make = functools.partial(SettleBatch, ALICE, SYNC_TIMEOUT_SECONDS)
    placement = ends.place(2)[0].placement
    async with lane(make, through_port(ends.store.settings, ends.store.settings.mysql.port)) as settle:
        settler = Settler(settle, 0.1, 10)
        for _ in range(2):
            with pytest.raises(NotPlaced, match=BOB):
                await settler.settle(placement)


async def test_no_more_callers_wait_for_peers_than_may(ends: Ends) -> None:
    make = functools.partial(SettleBatch, ALICE, SYNC_TIMEOUT_SECONDS)
    async with lane(make, through_port(ends.store.settings, ends.store.settings.mysql.port)) as settle:
        settler = Settler(settle, 30, 2)
        waiting = [asyncio.create_task(settler.settle(one.placement)) for one in (*ends.place(), *ends.place())]
        await asyncio.sleep(0.05)
        with pytest.raises(Overloaded):
            settler.check_room()
        settler.close()
        await asyncio.gather(*waiting, return_exceptions=True)


# --- stock


def test_stock_is_given_out_once_and_the_peer_is_told(ends: Ends) -> None:
    ends.make_stock(5)
    given = [expect(key, IssuedKey) for key in ends.take(5)]
    assert len({key.key_id for key in given}) == 5
    assert sorted(key.key_id for key in given) == sorted(i.hex() for i in ends.told("key.issued"))
    assert ends.take(1) == [None]
    assert ends.store.count("stock") == 0


def test_a_claim_passes_over_what_another_one_holds(ends: Ends) -> None:
    ends.make_stock(6)
    with ends.store.connect() as first, first.cursor() as cursor:
        held = cursor.execute(
            "SELECT key_id FROM stock WHERE local_id = %s AND peer_id = %s ORDER BY expires_ms LIMIT 4 FOR UPDATE",
            (ALICE, BOB),
        )
        assert held == 4
        started = time.monotonic()
        assert [key is not None for key in ends.take(4)] == [True, True, False, False]
        assert time.monotonic() - started < 1


@pytest.mark.parametrize("cut", ["cut_before", "cut_after"])
async def test_stock_whose_commit_was_interrupted_is_given_out_once(ends: Ends, proxy: CuttingProxy, cut: Cut) -> None:
    ends.make_stock(6)
    opener = StockOpener(ends.alice.keyring, ends.alice.directory)
    make = functools.partial(StockClaimBatch, opener, TTL_SECONDS)
    async with lane(make, through_port(ends.store.settings, proxy.port)) as stock:
        proxy.cut_next(cut)
        given = await asyncio.gather(*(stock.submit(StockRequest(BOB, f"c-{n}")) for n in range(4)))
    assert proxy.cut_count == 1
    assert ends.store.count("stock") == 2
    assert sorted(key.key_id for key in given if key) == sorted(i.hex() for i in ends.told("key.issued"))


def test_stock_that_is_not_placed_or_too_old_is_not_given_out(ends: Ends) -> None:
    ends.make_stock(1, placed=False)
    assert ends.take(1) == [None]
    ends.store.rows("UPDATE stock SET placed_ms = 1, expires_ms = %s", now_ms() + TTL_SECONDS * 500 - 1000)
    assert ends.take(1) == [None]


def test_a_copy_that_was_moved_to_another_peer_is_never_given_out_for_it(ends: Ends) -> None:
    ends.make_stock(3, peer_id=ALICE)
    ends.store.rows("UPDATE stock SET peer_id = %s LIMIT 2", BOB)
    assert ends.take(2) == [None, None]
    assert len(ends.told("key.withdrawn")) == 2
    assert [key is not None for key in ends.take(1, peer_id=ALICE)] == [True]


def test_a_copy_does_not_open_as_a_key_that_somebody_issued_for_this_kp(ends: Ends) -> None:
    ends.make_stock(1)
    ends.store.rows(
        "INSERT INTO key_records (target_id, expires_ms, key_id, source_id, size_bits, wrapping_key_id, nonce, sealed, "
        "correlation_id) SELECT local_id, expires_ms, key_id, local_id, size_bits, wrapping_key_id, nonce, sealed, '' "
        "FROM stock"
    )
    (key_id,) = ends.store.rows("SELECT key_id FROM stock")[0]
    with pytest.raises(SkipbusError, match="does not open"):
        ends.alice.claim(key_id, ALICE)


def test_stock_is_not_made_for_a_peer_without_an_announcement(ends: Ends) -> None:
    with pytest.raises(PeerNotReady):
        ends.make_stock(1, peer_id="KP_Nobody")
    assert ends.store.count("stock") == 0


def test_stock_that_would_be_too_old_at_once_is_not_made(ends: Ends) -> None:
    # The target keeps its epochs for the lifetime that is configured there.
    with pytest.raises(PeerNotReady, match="SKIP_KEY_TTL_SECONDS differs"):
        ends.make_stock(1, ttl_seconds=4 * TTL_SECONDS)
    assert ends.store.count("stock") == 0
    ends.make_stock(1, ttl_seconds=TTL_SECONDS * 3 // 2)
    assert ends.store.count("stock") == 1


def test_the_keys_of_a_refill_share_one_wrapping_key_for_each_side(ends: Ends) -> None:
    ends.make_stock(50)
    assert sorted(ends.store.rows("SELECT source_id, target_id FROM wrapping_keys")) == [(ALICE, ALICE), (ALICE, BOB)]
