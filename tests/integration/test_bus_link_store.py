"""Facts about the api's transactions for bus links: placing, confirming, stock. The peer is simulated by the test.

Two key providers of one store stand for the two ends: how announcements come to know each other does not matter here.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest
import structlog.testing
from prometheus_client import CollectorRegistry
from pymysql.connections import Connection as PyMySqlConnection
from pymysql.constants import CR, ER
from pymysql.err import OperationalError
from sqlalchemy import Connection, Engine, NullPool, create_engine

from sandbox.mariadb import Database
from skipbus.services.api.group_commit import Batch, GroupCommit, Limits
from skipbus.services.api.links import IssuedKey, IssueRequest
from skipbus.services.api.links.confirmation import (
    ConfirmationWaiter,
    ConfirmBatch,
    ConfirmRequest,
    PlacementStatus,
)
from skipbus.services.api.links.placing import PlaceBatch, PlacedKey, Placement
from skipbus.services.api.links.refill import StockKeeper, StockMaker
from skipbus.services.api.links.sealing import Opener, Sealer
from skipbus.services.api.links.stock_claim import StockBatch, StockRequest
from skipbus.shared.clock import now_ms
from skipbus.shared.errors import (
    NotPlaced,
    Overloaded,
    PeerNotReady,
    SkipbusError,
    StoreConflict,
    StoreUnavailable,
)
from skipbus.shared.metrics import _TASKS
from skipbus.shared.protocol import encoding
from skipbus.shared.store.engine import connect
from tests.integration.cutting_proxy import Cut, CuttingProxy
from tests.integration.key_providers import KeyProvider, Store, announced, queue_engine
from tests.integration.test_key_store import before_the_deletion

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
        batch = PlaceBatch(self.alice.sealer, TTL_SECONDS, requests(count))
        return [expect(answer, PlacedKey) for answer in self.alice.commit(batch)]

    def confirm(self, *requests: ConfirmRequest) -> list[PlacementStatus]:
        batch = ConfirmBatch(ALICE, SYNC_TIMEOUT_SECONDS, requests)
        return [expect(answer, PlacementStatus) for answer in self.alice.commit(batch)]

    def acknowledge(self, placement: Placement) -> None:
        self.store.rows("DELETE FROM outbox WHERE token = %s", placement.token)

    def make_stock(
        self, count: int, peer_id: str = BOB, *, placed: bool = True, ttl_seconds: int = TTL_SECONDS
    ) -> None:
        sealer = Sealer(ALICE, self.alice.keyring.identity, self.alice.directory)
        StockMaker(self.store.engine, ttl_seconds, sealer).make(peer_id, count)
        if placed:
            self.store.rows("UPDATE stock SET placed_ms = 1")
            self.store.rows("DELETE FROM outbox WHERE type = 'key.stocked'")

    def stock_batch(self, count: int, peer_id: str = BOB) -> StockBatch:
        opener = Opener(self.alice.keyring, self.alice.directory)
        return StockBatch(opener, TTL_SECONDS, [StockRequest(peer_id, f"c-{n}") for n in range(count)])

    def take(self, count: int = 1, peer_id: str = BOB) -> list[IssuedKey | None]:
        answers = self.alice.commit(self.stock_batch(count, peer_id))
        return [answer for answer in answers if not isinstance(answer, SkipbusError)]

    def events(self, kind: str) -> list[bytes]:
        """keyIds in the outbox rows of this type."""
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


def key_ids(placement: Placement) -> list[bytes]:
    return [record.key_id for record in placement.records]


def expect(answer: object, kind: type[A]) -> A:
    if isinstance(answer, SkipbusError):
        raise answer
    assert isinstance(answer, kind)
    return answer


@asynccontextmanager
async def queue(
    make_batch: Callable[[Sequence[R]], Batch[A]], engine: Engine, timeout_seconds: float = 10, max_queue: int = 1000
) -> AsyncIterator[GroupCommit[R, A]]:
    made = GroupCommit("test", make_batch, engine, Limits(min(100, max_queue), max_queue, timeout_seconds))
    try:
        yield made
    finally:
        await made.close()


# --- placing


@pytest.mark.parametrize("cut", ["cut_before", "cut_after"])
async def test_keys_whose_commit_was_interrupted_are_placed_once(ends: Ends, proxy: CuttingProxy, cut: Cut) -> None:
    make = functools.partial(PlaceBatch, ends.alice.sealer, TTL_SECONDS)
    async with queue(make, queue_engine(ends.store.settings, proxy.port)) as place:
        proxy.cut_next(cut)
        answers = await asyncio.gather(*(place.submit(request) for request in requests(5)))
    assert proxy.cut_count == 1
    assert sorted(answer.issued.key_id for answer in answers) == sorted(i.hex() for i in ends.events("key.placed"))
    rows = ends.store.rows("SELECT token, items FROM outbox")
    assert {(answer.placement.token, len(answer.placement.records)) for answer in answers} == set(rows)


def test_several_peers_of_one_batch_have_a_row_and_a_token_each(ends: Ends) -> None:
    both = [IssueRequest(peer, 128, "c") for peer in (BOB, ALICE, BOB, ALICE, BOB)]
    answered = ends.alice.commit(PlaceBatch(ends.alice.sealer, TTL_SECONDS, both))
    answers = [expect(answer, PlacedKey) for answer in answered]
    rows = ends.store.rows("SELECT peer_id, items FROM outbox ORDER BY items")
    assert rows == [(ALICE, 2), (BOB, 3)]
    assert len({answer.placement.token for answer in answers}) == 2


def test_one_peer_that_cannot_be_sealed_to_fails_nobody_else(ends: Ends) -> None:
    mixed = [IssueRequest("KP_Nobody", 256, "c"), *requests(2)]
    first, *others = ends.alice.commit(PlaceBatch(ends.alice.sealer, TTL_SECONDS, mixed))
    assert isinstance(first, PeerNotReady)
    assert all(isinstance(answer, PlacedKey) for answer in others)


# --- confirming


def test_placed_means_that_the_row_is_gone(ends: Ends) -> None:
    one, other = ends.place()[0].placement, ends.place()[0].placement
    ends.acknowledge(one)
    assert ends.confirm(ConfirmRequest(one), ConfirmRequest(other)) == [PlacementStatus.PLACED, PlacementStatus.WAITING]


def test_of_a_withdrawal_and_an_acknowledgement_the_first_one_holds(ends: Ends) -> None:
    one, other = ends.place()[0].placement, ends.place(3)[0].placement
    ends.acknowledge(one)
    withdrawals = ConfirmRequest(one, withdraw=True), ConfirmRequest(other, withdraw=True)
    assert ends.confirm(*withdrawals) == [PlacementStatus.PLACED, PlacementStatus.WITHDRAWN]
    assert ends.events("key.withdrawn") == key_ids(other)
    assert ends.events("key.placed") == []


def test_after_twice_the_timeout_a_row_that_is_gone_is_no_longer_taken_for_placed(ends: Ends) -> None:
    late = ends.place()[0].placement
    ends.acknowledge(late)
    late.begun -= 2 * SYNC_TIMEOUT_SECONDS + 0.1
    assert ends.confirm(ConfirmRequest(late)) == [PlacementStatus.WAITING]
    assert ends.confirm(ConfirmRequest(late, withdraw=True)) == [PlacementStatus.WITHDRAWN]
    assert ends.events("key.withdrawn") == key_ids(late)


async def test_a_withdrawal_whose_commit_was_interrupted_is_not_taken_for_placed(
    ends: Ends, proxy: CuttingProxy
) -> None:
    placement = ends.place()[0].placement
    make = functools.partial(ConfirmBatch, ALICE, SYNC_TIMEOUT_SECONDS)
    async with queue(make, queue_engine(ends.store.settings, proxy.port)) as confirm:
        proxy.cut_next("cut_after")
        # The row is gone by then, but not because of the peer.
        assert await confirm.submit(ConfirmRequest(placement, withdraw=True)) is PlacementStatus.WITHDRAWN
    assert proxy.cut_count == 1
    assert set(ends.events("key.withdrawn")) == set(key_ids(placement))


def test_what_may_have_been_withdrawn_is_never_taken_for_placed_by_another_batch(ends: Ends) -> None:
    placement = ends.place()[0].placement
    request = ConfirmRequest(placement, withdraw=True)
    with ends.store.engine.connect() as connection:
        ConfirmBatch(ALICE, SYNC_TIMEOUT_SECONDS, [request]).run(connection)
        connection.rollback()
    ends.acknowledge(placement)
    assert ends.confirm(ConfirmRequest(placement)) == [PlacementStatus.WAITING]
    assert ends.confirm(request) == [PlacementStatus.WITHDRAWN]


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
        (outcome,) = ends.confirm(ConfirmRequest(placement, withdraw=True))
        peer.join()
        assert (outcome is PlacementStatus.PLACED) == (deleted == [1])
        assert (key_ids(placement)[0] in ends.events("key.withdrawn")) == (outcome is PlacementStatus.WITHDRAWN)
        outcomes.append(outcome)
    assert PlacementStatus.WITHDRAWN in outcomes


@asynccontextmanager
async def waiter(
    ends: Ends,
    sync_timeout_seconds: float,
    *,
    max_callers: int = 10,
    engine: Engine | None = None,
    queue_seconds: float = 10,
    max_queue: int = 1000,
) -> AsyncIterator[ConfirmationWaiter]:
    make = functools.partial(ConfirmBatch, ALICE, SYNC_TIMEOUT_SECONDS)
    async with queue(make, engine or queue_engine(ends.store.settings), queue_seconds, max_queue) as confirm:
        made = ConfirmationWaiter(confirm, sync_timeout_seconds, max_callers)
        try:
            yield made
        finally:
            made.close()


def engine_unless(ends: Ends, away: list[bool]) -> Engine:
    """Connections to the store, none while ``away`` is not empty."""

    def connect_unless_away() -> PyMySqlConnection:
        if away:
            raise OperationalError(CR.CR_CONN_HOST_ERROR, "closed by the test")
        return connect(ends.store.settings.mysql)

    return create_engine("mysql+pymysql://", creator=connect_unless_away, poolclass=NullPool)


async def test_a_store_that_is_away_at_the_timeout_gets_the_withdrawal_when_it_is_back(ends: Ends) -> None:
    away = [True]
    engine = engine_unless(ends, away)
    placement = ends.place()[0].placement
    async with waiter(ends, 0.2, engine=engine, queue_seconds=2) as made:
        with pytest.raises(StoreUnavailable):
            await made.confirm(placement)
        # The peer has it by now, and its caller was answered 500: it must be withdrawn all the same.
        ends.acknowledge(placement)
        with pytest.raises(SkipbusError):
            await made.tick()
        away.clear()
        await made.tick()
        assert ends.events("key.withdrawn") == key_ids(placement)
        await made.tick()
        assert len(ends.events("key.withdrawn")) == 1


@pytest.mark.parametrize("max_callers", [2, 100])
async def test_of_many_withdrawals_each_is_done_once_though_the_queue_refuses_some(
    ends: Ends, max_callers: int
) -> None:
    away = [True]
    placements = [ends.place()[0].placement for _ in range(12)]
    async with waiter(
        ends, 0.1, max_callers=max_callers, engine=engine_unless(ends, away), queue_seconds=1, max_queue=5
    ) as made:
        for some in (placements[:4], placements[4:8], placements[8:]):
            await asyncio.gather(*(made.confirm(placement) for placement in some), return_exceptions=True)
        away.clear()
        for _ in range(12):
            with contextlib.suppress(Overloaded):
                await made.tick()
        await made.tick()
    withdrawn = ends.events("key.withdrawn")
    assert sorted(withdrawn) == sorted(key_id for placement in placements for key_id in key_ids(placement))


async def test_callers_of_one_row_share_its_confirmation_and_one_who_leaves_does_not_end_it(ends: Ends) -> None:
    placement = ends.place(3)[0].placement
    async with waiter(ends, 5) as made:
        callers = [asyncio.create_task(made.confirm(placement)) for _ in range(3)]
        await asyncio.sleep(0.05)
        callers[0].cancel()
        ends.acknowledge(placement)
        made.acknowledged([placement.token])
        async with asyncio.timeout(2):
            assert await asyncio.gather(*callers[1:]) == [None, None]


async def test_a_notification_that_comes_before_the_caller_waits_is_not_lost(ends: Ends) -> None:
    placement, rejected = ends.place()[0].placement, ends.place()[0].placement
    async with waiter(ends, 30) as made:
        ends.acknowledge(placement)
        made.acknowledged([placement.token])
        made.rejected([rejected.token])
        async with asyncio.timeout(0.9):
            await made.confirm(placement)
            with pytest.raises(NotPlaced, match="refused the key"):
                await made.confirm(rejected)


async def test_what_was_withdrawn_stays_so_for_a_caller_who_comes_late(ends: Ends) -> None:
    placement = ends.place(2)[0].placement
    async with waiter(ends, 0.1) as made:
        for _ in range(2):
            with pytest.raises(NotPlaced, match=BOB):
                await made.confirm(placement)


async def test_no_more_callers_wait_for_peers_than_may(ends: Ends) -> None:
    async with waiter(ends, 30, max_callers=2) as made:
        waiting = [asyncio.create_task(made.confirm(one.placement)) for one in (*ends.place(), *ends.place())]
        await asyncio.sleep(0.05)
        with pytest.raises(Overloaded):
            made.check_room()
        made.close()
        await asyncio.gather(*waiting, return_exceptions=True)
        made.check_room()


# --- stock


def test_stock_is_given_out_once_and_the_peer_is_told(ends: Ends) -> None:
    ends.make_stock(5)
    given = [expect(key, IssuedKey) for key in ends.take(5)]
    assert len({key.key_id for key in given}) == 5
    assert sorted(key.key_id for key in given) == sorted(i.hex() for i in ends.events("key.issued"))
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
    opener = Opener(ends.alice.keyring, ends.alice.directory)
    make = functools.partial(StockBatch, opener, TTL_SECONDS)
    async with queue(make, queue_engine(ends.store.settings, proxy.port)) as stock:
        proxy.cut_next(cut)
        given = await asyncio.gather(*(stock.submit(StockRequest(BOB, f"c-{n}")) for n in range(4)))
    assert proxy.cut_count == 1
    assert ends.store.count("stock") == 2
    assert sorted(key.key_id for key in given if key) == sorted(i.hex() for i in ends.events("key.issued"))


def vanish(table: str) -> Callable[[Connection], None]:
    """As if another node of a cluster had deleted the rows, which knows nothing of locks here."""

    def act(connection: Connection) -> None:
        dbapi: Any = connection.connection.dbapi_connection
        dbapi.cursor().execute(f"DELETE FROM {table} LIMIT 1")

    return act


def test_stock_that_was_given_out_elsewhere_after_it_was_locked_is_not_given_out_here(ends: Ends) -> None:
    ends.make_stock(2)
    with before_the_deletion(ends.store.engine, vanish("stock")) as vanished, pytest.raises(StoreConflict):
        ends.take(2)
    assert vanished
    assert (ends.store.count("stock"), ends.store.count("outbox")) == (2, 0)
    assert all(ends.take(2))


def test_a_row_that_was_acknowledged_elsewhere_after_it_was_locked_is_not_withdrawn_here(ends: Ends) -> None:
    placement = ends.place()[0].placement
    with before_the_deletion(ends.store.engine, vanish("outbox")) as vanished, pytest.raises(StoreConflict):
        ends.confirm(ConfirmRequest(placement, withdraw=True))
    assert vanished
    assert ends.events("key.withdrawn") == []


def test_stock_that_is_not_placed_or_too_old_is_not_given_out(ends: Ends) -> None:
    ends.make_stock(1, placed=False)
    assert ends.take(1) == [None]
    ends.store.rows("UPDATE stock SET placed_ms = 1, expires_ms = %s", now_ms() + TTL_SECONDS * 500 - 1000)
    assert ends.take(1) == [None]


def test_a_copy_that_was_moved_to_another_peer_is_never_given_out_for_it(ends: Ends) -> None:
    ends.make_stock(3, peer_id=ALICE)
    ends.store.rows("UPDATE stock SET peer_id = %s LIMIT 2", BOB)
    assert ends.take(2) == [None, None]
    assert len(ends.events("key.withdrawn")) == 2
    assert [key is not None for key in ends.take(1, peer_id=ALICE)] == [True]


def test_a_copy_does_not_open_as_a_key_that_a_peer_issued_for_this_kp(ends: Ends) -> None:
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


async def test_a_store_that_refuses_to_count_stock_is_reported_to_operator_and_probes(ends: Ends) -> None:
    def refuse() -> PyMySqlConnection:
        raise OperationalError(ER.TABLEACCESS_DENIED_ERROR, "SELECT command denied")

    engine = create_engine("mysql+pymysql://", creator=refuse, poolclass=NullPool)
    maker = StockMaker(engine, TTL_SECONDS, ends.alice.sealer)
    keeper, stop = StockKeeper(ends.alice.settings, engine, maker, lambda: None), asyncio.Event()
    with structlog.testing.capture_logs() as lines:
        keeping = asyncio.create_task(keeper.run(stop))
        for _ in range(20):
            keeper.wake()
            await asyncio.sleep(0.02)
        stop.set()
        await keeping
    reported = [line for line in lines if line["log_level"] == "warning"]
    assert [line.get("task") for line in reported] == ["stock"]
    assert "grant" in reported[0]["reason"]
    registry = CollectorRegistry()
    registry.register(_TASKS)
    assert registry.get_sample_value("skipbus_task_done_age_seconds", {"task": "stock"}) == math.inf


def test_the_keys_of_a_refill_share_one_wrapping_key_for_each_side(ends: Ends) -> None:
    ends.make_stock(50)
    assert sorted(ends.store.rows("SELECT source_id, target_id FROM wrapping_keys")) == [(ALICE, ALICE), (ALICE, BOB)]
