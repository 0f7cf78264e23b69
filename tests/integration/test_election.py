"""Facts about the election: one holder at a time, and how a silent, ended or cut-off holder is replaced."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Event

import pytest
from sqlalchemy import Engine, event

from sandbox.mariadb import Database, MariaDbServer
from skipbus.shared.errors import StoreUnavailable
from skipbus.shared.store.election import RENEW_SECONDS, SILENCE_SECONDS, VALID_SECONDS, Election
from skipbus.shared.store.engine import make_engine
from skipbus.shared.store.migrate import upgrade_store

NAME = "janitor KP_Alice"
# The rest of a process that has ended without a word: its holder is in the lease.
ENDED = """
import sys
from skipbus.shared.settings import MySqlSettings, Secret
from skipbus.shared.store.election import Election
from skipbus.shared.store.engine import make_engine
host, port, user, password, database = sys.stdin.read().split()
engine = make_engine(MySqlSettings(host, int(port), user, Secret(password), database))
assert Election(engine, "janitor KP_Alice").tick()
"""


class Clock:
    """Monotonic seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def engine(database: Database) -> Iterator[Engine]:
    upgrade_store(database.settings)
    made = make_engine(database.settings)
    yield made
    made.dispose()


@pytest.fixture
def candidates(engine: Engine, clock: Clock) -> list[Election]:
    return [Election(engine, NAME, clock=clock) for _ in range(3)]


def test_one_of_several_is_elected_and_stays_so(candidates: list[Election], clock: Clock) -> None:
    for _ in range(20):
        assert [candidate.tick() for candidate in candidates] == [True, False, False]
        assert [candidate.elected for candidate in candidates] == [True, False, False]
        clock.now += 1


def test_a_candidate_that_never_asked_is_not_elected(candidates: list[Election]) -> None:
    assert not candidates[0].elected


def test_a_lease_that_is_given_back_is_free_immediately(candidates: list[Election]) -> None:
    first, second, third = candidates
    assert first.tick()
    assert not second.tick()
    first.release()
    assert not first.elected
    assert second.tick()
    assert not third.tick()


def test_a_candidate_that_has_given_its_lease_back_does_not_take_it_again(candidates: list[Election]) -> None:
    first, second, _ = candidates
    assert first.tick()
    first.release()
    # The tick of another thread that was under way when the process began to end.
    assert not first.tick()
    assert second.tick()


def test_a_lease_is_given_back_after_the_tick_that_is_under_way(engine: Engine, candidates: list[Election]) -> None:
    first, second, _ = candidates
    ticking, go_on = Event(), Event()

    def wait(*_: object) -> None:
        ticking.set()
        assert go_on.wait(10)

    event.listen(engine, "before_cursor_execute", wait)
    try:
        with ThreadPoolExecutor(2) as pool:
            tick = pool.submit(first.tick)
            assert ticking.wait(10)
            release = pool.submit(first.release)
            time.sleep(0.1)
            go_on.set()
            assert tick.result()
            release.result()
    finally:
        event.remove(engine, "before_cursor_execute", wait)
    assert not first.elected
    assert second.tick()


def test_who_is_not_elected_gives_nothing_back(candidates: list[Election]) -> None:
    first, second, third = candidates
    assert first.tick()
    second.release()
    assert not third.tick()
    assert first.tick()


def test_a_silent_holder_is_replaced_and_finds_out_by_its_own_clock(candidates: list[Election], clock: Clock) -> None:
    first, second, _ = candidates
    assert first.tick()
    waited = 0
    while not second.tick():
        waited += 1
        clock.now += 1
        # There are never two who rely on it.
        assert not (first.elected and second.elected)
    assert SILENCE_SECONDS <= waited <= 10
    assert not first.elected
    assert not first.tick()


def test_a_holder_relies_on_its_lease_for_less_time_than_others_wait(candidates: list[Election], clock: Clock) -> None:
    first, *_ = candidates
    assert first.tick()
    clock.now += VALID_SECONDS
    assert not first.elected
    assert RENEW_SECONDS < VALID_SECONDS < SILENCE_SECONDS


def test_a_holder_that_was_away_for_a_while_goes_on_if_nobody_took_over(
    candidates: list[Election], clock: Clock
) -> None:
    first, second, _ = candidates
    assert first.tick()
    assert not second.tick()
    clock.now += VALID_SECONDS + 0.5
    assert first.tick()
    clock.now += SILENCE_SECONDS - VALID_SECONDS
    assert not second.tick()


def test_the_lease_of_a_process_of_this_host_that_has_ended_is_free_immediately(
    database: Database, candidates: list[Election]
) -> None:
    mysql = database.settings
    account = f"{mysql.host} {mysql.port} {mysql.user} {mysql.password.reveal()} {mysql.database}"
    subprocess.run([sys.executable, "-c", ENDED], input=account, text=True, check=True, timeout=60)
    assert [candidate.tick() for candidate in candidates] == [True, False, False]


def test_an_ended_process_of_another_host_is_waited_for(
    database: Database, candidates: list[Election], clock: Clock
) -> None:
    with database.connect() as connection, connection.cursor() as cursor:
        cursor.execute("INSERT INTO leases VALUES (%s, 'another-host 1 pid:[4026531836] 4194999 ab', 7)", (NAME,))
        connection.commit()
    assert not candidates[0].tick()
    clock.now += SILENCE_SECONDS
    assert candidates[0].tick()


@pytest.mark.parametrize("holder", ["x", " ", "a b", "{host} many ab", "{host} 99999999999999999999999 ab"])
def test_a_holder_that_is_no_process_is_waited_for_like_any_other(
    database: Database, candidates: list[Election], clock: Clock, holder: str
) -> None:
    host = candidates[0]._holder.rsplit(" ", 2)[0]
    with database.connect() as connection, connection.cursor() as cursor:
        cursor.execute("INSERT INTO leases VALUES (%s, %s, 7)", (NAME, holder.format(host=host)))
        connection.commit()
    assert not candidates[0].tick()
    clock.now += SILENCE_SECONDS
    assert candidates[0].tick()


def test_elections_of_other_names_go_on_side_by_side(engine: Engine) -> None:
    names = ["janitor KP_Alice", "janitor KP_Bob", "syncer KP_Alice", "janitor " + "x" * 64]
    assert [Election(engine, name).tick() for name in names] == [True] * 4


def test_two_stores_on_one_server_do_not_share_their_elections(mariadb: MariaDbServer, engine: Engine) -> None:
    with mariadb.databases("second_store") as (other,):
        upgrade_store(other.settings)
        second = make_engine(other.settings)
        assert [Election(one, NAME).tick() for one in (engine, second)] == [True, True]
        second.dispose()


def test_of_many_candidates_that_ask_together_one_is_elected(database: Database, engine: Engine) -> None:
    engines = [make_engine(database.settings) for _ in range(8)]
    for name in map(str, range(20)):
        with ThreadPoolExecutor(len(engines)) as pool:
            elected = list(pool.map(lambda one: Election(one, name).tick(), engines))  # noqa: B023 -- used at once
        assert elected.count(True) == 1
    for one in engines:
        one.dispose()


def test_a_store_that_is_away_is_an_error_to_the_candidate_and_not_the_end_of_a_lease(
    database: Database, candidates: list[Election], clock: Clock
) -> None:
    away = make_engine(replace(database.settings, port=1))
    with pytest.raises(StoreUnavailable):
        Election(away, NAME).tick()
    first, *_ = candidates
    assert first.tick()
    first._engine = away
    clock.now += RENEW_SECONDS
    with pytest.raises(StoreUnavailable):
        first.tick()
    assert first.elected
    clock.now += VALID_SECONDS
    assert not first.elected
