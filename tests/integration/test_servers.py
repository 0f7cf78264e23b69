"""Facts about connections to the store: credentials that change, ways to log in, and several servers."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from sandbox.mariadb import Database, MariaDbServer
from sandbox.ports import free_port
from skipbus.services.api.group_commit import GroupCommit, Limits
from skipbus.services.api.links import IssueRequest
from skipbus.shared.errors import StoreRefused, StoreUnavailable
from skipbus.shared.settings import MySqlSettings, Secret, load_settings
from skipbus.shared.store.engine import connect, make_engine
from skipbus.shared.store.servers import CONNECT_TIMEOUT_SECONDS, servers_of
from tests.integration.cutting_proxy import CuttingProxy
from tests.integration.key_providers import Store, announced, queue_engine


@pytest.fixture
def mysql(database: Database) -> MySqlSettings:
    return database.settings


@pytest.fixture
def account(mariadb: MariaDbServer, mysql: MySqlSettings) -> Iterator[MySqlSettings]:
    """An account that the test may change."""
    administer(mariadb, "CREATE USER 'changing'@'%' IDENTIFIED BY 'first'")
    administer(mariadb, f"GRANT ALL PRIVILEGES ON `{mysql.database}`.* TO 'changing'@'%'")
    yield replace(mysql, user="changing", password=Secret("first"))
    administer(mariadb, "DROP USER 'changing'@'%'")


def administer(mariadb: MariaDbServer, statement: str) -> None:
    with mariadb.admin_connection() as connection, connection.cursor() as cursor:
        cursor.execute(statement)


def test_a_password_that_was_changed_with_the_accounts_is_used_without_a_restart(
    mariadb: MariaDbServer, account: MySqlSettings, tmp_path: Path
) -> None:
    file = tmp_path / "password"
    file.touch(0o600)
    file.write_text("first\n")
    settings = load_settings(
        {
            "SKIP_LOCAL_SYSTEM_ID": "KP_Alice",
            "SKIP_REMOTE_SYSTEM_ID_1": "KP_Bob",
            "MYSQL_HOST": account.host,
            "MYSQL_PORT": str(account.port),
            "MYSQL_USER": account.user,
            "MYSQL_PASSWORD_FILE": str(file),
            "MYSQL_DATABASE": account.database,
        }
    ).mysql
    connect(settings).close()
    administer(mariadb, "ALTER USER 'changing'@'%' IDENTIFIED BY 'second'")
    with pytest.raises(StoreRefused, match="MYSQL_PASSWORD"):
        connect(settings)
    file.write_text("second\n")
    connect(settings).close()


def test_an_account_that_logs_in_by_a_plugin_we_have_no_package_for_is_refused_in_one_sentence(
    mariadb: MariaDbServer, account: MySqlSettings
) -> None:
    if mariadb.flavour == "mysql":
        # MySQL has no such plugin. Its default, caching_sha2_password, works without TLS.
        connect(account).close()
        return
    administer(mariadb, "INSTALL SONAME 'auth_ed25519'")
    administer(mariadb, "ALTER USER 'changing'@'%' IDENTIFIED VIA ed25519 USING PASSWORD('first')")
    with pytest.raises(StoreRefused, match=r"ed25519.*mysql_native_password"):
        connect(account)


def test_a_server_that_is_away_is_passed_over_and_the_one_that_answered_stays_the_first(mysql: MySqlSettings) -> None:
    settings = replace(mysql, host=f"127.0.0.1:{free_port()},127.0.0.1:{mysql.port}")
    assert servers_of(settings).current.endswith(settings.host.split(",")[0])
    connect(settings).close()
    assert servers_of(settings).current == f"127.0.0.1:{mysql.port}"


def test_a_frozen_server_is_passed_over_within_seconds(mysql: MySqlSettings) -> None:
    with socket.create_server(("127.0.0.1", 0)) as frozen:
        settings = replace(mysql, host=f"127.0.0.1:{frozen.getsockname()[1]},127.0.0.1:{mysql.port}")
        begun = time.monotonic()
        connect(settings).close()
    assert time.monotonic() - begun < CONNECT_TIMEOUT_SECONDS + 2


def test_where_all_servers_are_away_the_store_is_away(mysql: MySqlSettings) -> None:
    with pytest.raises(StoreUnavailable):
        connect(replace(mysql, host=f"127.0.0.1:{free_port()},127.0.0.1:{free_port()}"))


def test_of_several_servers_one_that_only_reads_is_passed_over(mariadb: MariaDbServer, mysql: MySqlSettings) -> None:
    settings = replace(mysql, host=f"127.0.0.1:{mysql.port},127.0.0.1:{free_port()}")
    administer(mariadb, "SET GLOBAL read_only = 1")
    try:
        with pytest.raises(StoreUnavailable):
            connect(settings)
        # The only server there is must do: most of what is asked of it are queries.
        connect(mysql).close()
    finally:
        administer(mariadb, "SET GLOBAL read_only = 0")
    connect(settings).close()


def test_a_pool_leaves_a_server_that_has_become_read_only(mariadb: MariaDbServer, mysql: MySqlSettings) -> None:
    engine = make_engine(mysql)
    with engine.begin() as connection:
        first = connection.exec_driver_sql("SELECT CONNECTION_ID()").scalar()
        connection.exec_driver_sql("CREATE TABLE written (number INT PRIMARY KEY)")
    administer(mariadb, "SET GLOBAL read_only = 1")
    try:
        with pytest.raises(Exception, match=r"read.only"), engine.begin() as connection:
            connection.exec_driver_sql("INSERT INTO written VALUES (1)")
    finally:
        administer(mariadb, "SET GLOBAL read_only = 0")
    with engine.begin() as connection:
        assert connection.exec_driver_sql("SELECT CONNECTION_ID()").scalar() != first
        connection.exec_driver_sql("DROP TABLE written")
    engine.dispose()


async def test_a_connection_that_a_firewall_has_forgotten_costs_a_wait_and_no_answer(store: Store) -> None:
    alice, bob = announced(store, "KP_Alice", "KP_Bob")
    proxy = CuttingProxy(store.settings.mysql.port)
    limits = Limits(16, 1000, alice.settings.request_timeout_seconds)
    queue = GroupCommit("test", alice.issue_batch, queue_engine(alice.settings, proxy.port), limits)
    try:
        for _ in range(2):
            issued = await queue.submit(IssueRequest("KP_Bob", 256, ""))
            assert bob.claim(issued.key_id, alice).key == issued.key
            proxy.forget()
    finally:
        await queue.close()
        proxy.close()
