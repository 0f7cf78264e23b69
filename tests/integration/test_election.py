"""Facts about the election: one holder at a time, and a lock that goes with its connection."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from sandbox.mariadb import Database, MariaDbServer
from skipbus.shared.errors import StoreUnavailable
from skipbus.shared.settings import MySqlSettings
from skipbus.shared.store.election import Election
from tests.waiting import wait_for


@pytest.fixture
def mysql(database: Database) -> MySqlSettings:
    return database.settings


@pytest.fixture
def candidates(mysql: MySqlSettings) -> Iterator[list[Election]]:
    made = [Election(mysql, "janitor KP_Alice") for _ in range(3)]
    yield made
    for candidate in made:
        candidate.release()


def kill_connection(mariadb: MariaDbServer, candidate: Election) -> None:
    victim = candidate._ask("SELECT CONNECTION_ID() + LENGTH(%s) * 0")
    with mariadb.admin_connection() as connection, connection.cursor() as cursor:
        cursor.execute(f"KILL {victim}")


def test_one_of_several_is_elected(candidates: list[Election]) -> None:
    assert [candidate.acquire() for candidate in candidates] == [True, False, False]
    assert [candidate.held() for candidate in candidates] == [True, False, False]


def test_asking_twice_changes_nothing(candidates: list[Election]) -> None:
    first, second, _ = candidates
    assert [first.acquire(), first.acquire(), second.acquire()] == [True, True, False]
    first.release()
    # The server frees the lock when it has seen the connection's end.
    wait_for(second.acquire, timeout_seconds=2)


def test_who_was_never_asked_holds_nothing(candidates: list[Election]) -> None:
    assert not candidates[0].held()


def test_a_released_lock_is_free_at_once(candidates: list[Election]) -> None:
    first, second, _ = candidates
    assert first.acquire()
    first.release()
    assert not first.held()
    wait_for(second.acquire, timeout_seconds=2)


def test_a_holder_whose_connection_is_killed_knows_it_and_another_is_elected(
    mariadb: MariaDbServer, candidates: list[Election]
) -> None:
    first, second, _ = candidates
    assert first.acquire()
    kill_connection(mariadb, first)
    wait_for(second.acquire, timeout_seconds=2)
    assert not first.held()
    assert not first.acquire()
    second.release()
    wait_for(first.acquire, timeout_seconds=2)


def test_a_waiting_candidate_whose_connection_is_killed_can_still_be_elected(
    mariadb: MariaDbServer, candidates: list[Election]
) -> None:
    first, second, _ = candidates
    assert first.acquire()
    assert not second.acquire()
    kill_connection(mariadb, second)
    with pytest.raises(StoreUnavailable):
        second.acquire()
    assert not second.acquire()
    first.release()
    wait_for(second.acquire, timeout_seconds=2)


def test_elections_of_other_names_go_on_side_by_side(mysql: MySqlSettings) -> None:
    names = ["janitor KP_Alice", "janitor KP_Bob", "syncer KP_Alice", "janitor KP_Alice" + "x" * 200]
    elections = [Election(mysql, name) for name in names]
    assert [election.acquire() for election in elections] == [True] * 4
    for election in elections:
        election.release()


def test_two_stores_on_one_server_do_not_share_their_elections(mariadb: MariaDbServer, mysql: MySqlSettings) -> None:
    # The account keeps its password: it is made only where it does not exist.
    other = mariadb.create_database(f"{mysql.database}_b", user=mysql.user)
    elections = [
        Election(settings, "janitor KP_Alice") for settings in (mysql, replace(mysql, database=other.database))
    ]
    try:
        assert [election.acquire() for election in elections] == [True, True]
    finally:
        for election in elections:
            election.release()
        mariadb.drop_database(replace(other, user=mariadb.user))


def test_a_store_that_is_away_is_an_error_to_the_candidate_and_no_lock_to_the_holder(
    mysql: MySqlSettings,
) -> None:
    away = Election(replace(mysql, port=1), "janitor KP_Alice")
    with pytest.raises(StoreUnavailable):
        away.acquire()
    assert not away.held()
