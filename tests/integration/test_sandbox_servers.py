"""The private servers themselves: they serve, survive a crash with their data, and leave nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pymysql
import pytest

from sandbox.mariadb import Database, MariaDbServer
from sandbox.ports import answers
from sandbox.rabbitmq import RabbitMqServer
from tests.waiting import wait_for

pytestmark = pytest.mark.stops_servers


def processes_naming(folder: Path) -> list[str]:
    """Command lines and working folders are where a private server's processes name its folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and entry.name != str(os.getpid()):
            try:
                text = (entry / "cmdline").read_text() + " " + str((entry / "cwd").readlink())
            except OSError:
                continue
            if str(folder) in text:
                found.append(text)
    return found


def test_commits_are_durable_and_only_loopback_is_served(mariadb: MariaDbServer) -> None:
    with mariadb.admin_connection() as connection, connection.cursor() as cursor:
        cursor.execute("SELECT @@innodb_flush_log_at_trx_commit, @@bind_address")
        assert cursor.fetchone() == (1, "127.0.0.1")


@pytest.mark.parametrize("user", ["root", "", "mysql"])
def test_no_account_opens_without_a_password(mariadb: MariaDbServer, user: str) -> None:
    with pytest.raises(pymysql.err.OperationalError, match="Access denied"):
        pymysql.connect(host=mariadb.host, port=mariadb.port, user=user, password="")


def test_a_tests_user_reaches_its_own_database_only(mariadb: MariaDbServer, database: Database) -> None:
    with database.connect() as connection, connection.cursor() as cursor:
        cursor.execute("CREATE TABLE t (id INT)")
        with pytest.raises(pymysql.err.OperationalError, match="denied"):
            cursor.execute(f"CREATE TABLE `{mariadb.database}`.t (id INT)")


def test_committed_rows_survive_a_killed_database(mariadb: MariaDbServer, database: Database) -> None:
    with database.connect() as connection, connection.cursor() as cursor:
        cursor.execute("CREATE TABLE t (id INT)")
        cursor.execute("INSERT INTO t VALUES (7)")
        mariadb.kill()
    mariadb.start()
    with database.connect() as connection, connection.cursor() as cursor:
        cursor.execute("SELECT id FROM t")
        assert cursor.fetchall() == ((7,),)


def test_the_broker_comes_back_on_its_port_after_a_kill(rabbitmq: RabbitMqServer) -> None:
    before = rabbitmq.pid
    rabbitmq.kill()
    assert not answers(rabbitmq.port)
    rabbitmq.start()
    assert rabbitmq.pid != before


def test_a_stopped_server_leaves_no_process_and_no_listener(tmp_path: Path) -> None:
    mariadb, rabbitmq = (
        MariaDbServer(tmp_path / "m", buffer_pool_mib=32, log_file_mib=16),
        RabbitMqServer(tmp_path / "r"),
    )
    mariadb.start()
    rabbitmq.start()
    assert len(processes_naming(tmp_path)) >= 3
    mariadb.stop()
    rabbitmq.stop()
    assert processes_naming(tmp_path) == []
    assert not any(answers(port) for port in (mariadb.port, rabbitmq.port, rabbitmq.dist_port, rabbitmq.epmd_port))


def test_servers_die_with_the_process_that_started_them(tmp_path: Path) -> None:
    program = (
        "import pathlib, sys, time; from sandbox.mariadb import MariaDbServer\n"
        "server = MariaDbServer(pathlib.Path(sys.argv[1]), buffer_pool_mib=32, log_file_mib=16)\n"
        "server.start(); print(server.pid, flush=True); time.sleep(600)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "m")], stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        assert int(owner.stdout.readline()) > 0
        owner.send_signal(signal.SIGKILL)
    wait_for(lambda: processes_naming(tmp_path) == [], timeout_seconds=10)
